"""Taiji-Imagen: Chinese text -> a small image in pixel space -> two super-resolution stages.

One text encoder serves all stages; the base is any U-Net with `UNet2DConditionModel`'s call. A
stage with a first stage (`sr1_vae`) enlarges in latent space, one without in pixel space. In full
64 -> 256 -> 1024, in one call.

B prompts, n images per prompt, H W pixels of the base.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, VQModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from taiji.diffusion.condition import Text, check_text_length, encode_prompts, uses_text
from taiji.diffusion.guidance import ThresholdRule
from taiji.diffusion.sampling import Generators, Sampling, sample
from taiji.pipelines.stable_diffusion import StepCallback
from taiji.pipelines.super_resolution import Upscaler, upscale
from taiji.text.sandwich import SandwichTextEncoder

# Base and super-resolution stages as NVIDIA/NeMo samples them (7.5, 8, 7.5 in 30, 20, 20 steps);
# a latent stage is guided gently and not thresholded.
BASE = Sampling(steps=30, guidance_scale=7.5, thresholding="dynamic")
PIXEL = Sampling(steps=20, guidance_scale=8.0, thresholding="dynamic", noise_level=0.2)
LATENT = Sampling(steps=20, guidance_scale=2.0, noise_level=0.02)


class TaijiImagenPipeline(DiffusionPipeline):
    """`settings` are the defaults of a call, one `Sampling` a stage, base first; `scales` are the
    enlargements of the two super-resolution stages, four times each."""

    model_cpu_offload_seq = "text_encoder->unet->sr1_unet->sr1_vae->sr2_unet->sr2_vae"
    _optional_components = [
        *("sr1_unet", "sr1_scheduler", "sr1_vae"),
        *("sr2_unet", "sr2_scheduler", "sr2_vae"),
    ]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        text_encoder: SandwichTextEncoder,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        sr1_unet: ModelMixin | None = None,
        sr1_scheduler: SchedulerMixin | None = None,
        sr1_vae: VQModel | None = None,
        sr2_unet: ModelMixin | None = None,
        sr2_scheduler: SchedulerMixin | None = None,
        sr2_vae: VQModel | None = None,
        scales: list[int] | None = None,
        settings: list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            unet=unet,
            scheduler=scheduler,
            sr1_unet=sr1_unet,
            sr1_scheduler=sr1_scheduler,
            sr1_vae=sr1_vae,
            sr2_unet=sr2_unet,
            sr2_scheduler=sr2_scheduler,
            sr2_vae=sr2_vae,
        )
        if unet.config.in_channels != unet.config.out_channels:
            raise ValueError(
                f"the base U-Net has {unet.config.out_channels} channels out for "
                f"{unet.config.in_channels} in; learned variances are not supported"
            )
        self.register_to_config(scales=list(scales or (4, 4)))
        stages = self.upscalers
        kinds = [BASE, *(_defaults(stage) for stage in stages)]
        given = [Sampling.model_validate(s) for s in settings] if settings else kinds
        if len(given) != len(kinds):
            raise ValueError(f"settings for {len(given)} stages, but the cascade has {len(kinds)}")
        self.register_to_config(settings=[s.model_dump() for s in given])
        self.image_processor = VaeImageProcessor(do_resize=False)
        self.set_progress_bar_config(disable=True)

    @property
    def upscalers(self) -> list[Upscaler]:
        """The super-resolution stages that are there, in order."""
        found = [
            Upscaler(unet, scheduler, vae, scale)
            for unet, scheduler, vae, scale in (
                (self.sr1_unet, self.sr1_scheduler, self.sr1_vae, self.config.scales[0]),
                (self.sr2_unet, self.sr2_scheduler, self.sr2_vae, self.config.scales[-1]),
            )
            if unet is not None
        ]
        if self.sr1_unet is None and found:
            raise ValueError("a cascade with sr2_unet needs sr1_unet too; name a single stage sr1")
        return found

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str]) -> Text:
        """B texts -> Text. An empty text is the null condition."""
        device, dtype = self._execution_device, self.unet.dtype
        return encode_prompts(self.tokenizer, self.text_encoder, prompts, device, dtype)

    def stage_settings(
        self,
        count: int,
        *,
        steps: int | Sequence[int] | None,
        guidance_scale: float | Sequence[float] | None,
        thresholding: ThresholdRule | Sequence[ThresholdRule] | None,
        noise_level: float | Sequence[float] | None,
    ) -> list[Sampling]:
        """Defaults of the first `count` stages with a call's changes.

        One value is for every stage it can apply to, a sequence has one a stage; of `noise_level`
        one a super-resolution stage. Raises ValueError for a sequence of another length.
        """
        given, later = self.config.settings[:count], self.upscalers
        if isinstance(thresholding, str):
            pixel = [True, *(stage.vae is None for stage in later)]
            thresholding = [
                thresholding if pixel[i] else d["thresholding"] for i, d in enumerate(given)
            ]
        if isinstance(guidance_scale, (int, float)):
            read = [True, *(uses_text(stage.unet) for stage in later)]
            guidance_scale = [
                guidance_scale if read[i] else d["guidance_scale"] for i, d in enumerate(given)
            ]
        rows = zip(
            given,
            _each("num_inference_steps", steps, count),
            _each("guidance_scale", guidance_scale, count),
            _each("thresholding", thresholding, count),
            [None, *_each("noise_level", noise_level, count - 1)],
            strict=True,
        )
        return [
            Sampling(**defaults).changed(steps=a, guidance_scale=b, thresholding=c, noise_level=d)
            for defaults, a, b, c, d in rows
        ]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        num_inference_steps: int | Sequence[int] | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        thresholding: ThresholdRule | Sequence[ThresholdRule] | None = None,
        noise_level: float | Sequence[float] | None = None,
        super_resolution_stages: int | None = None,
        num_images_per_prompt: int = 1,
        tile: int | None = None,
        overlap: int = 32,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Images of `prompt` (B texts), n each, in prompt order, enlarged by
        `super_resolution_stages` stages (all without it).

        Settings of a stage: see `stage_settings`. `tile` and `overlap` are cells of a
        super-resolution U-Net's grid. `output_type`: "pil", "np" (B*n, H, W, 3) or "pt"
        (B*n, 3, H, W) in [0, 1]. The callback's "latents" are x_t of the stage at work, its step
        numbers go on from stage to stage.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or not all(isinstance(p, str) for p in prompts):
            raise ValueError(f"prompt must be a text or a non-empty list of texts, not {prompt!r}")
        negative = negative_prompt or ""
        negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        if len(negatives) != len(prompts):
            raise ValueError(f"{len(negatives)} negative prompts for {len(prompts)} prompts")
        stages = self._stages(super_resolution_stages)
        settings = self.stage_settings(
            1 + len(stages),
            steps=num_inference_steps,
            guidance_scale=guidance_scale,
            thresholding=thresholding,
            noise_level=noise_level,
        )
        size, channels = self.unet.config.sample_size, self.unet.config.in_channels
        check_text_length(self.unet, self.tokenizer.model_max_length, size, size)
        texts = {
            "condition": self.encode_prompt(prompts).repeat(num_images_per_prompt),
            "null": self.encode_prompt(negatives).repeat(num_images_per_prompt),
        }

        steps_done = 0

        def on_step(_: int, timestep: Tensor, x_t: Tensor) -> Tensor:
            nonlocal steps_done
            bar.update()
            steps_done += 1
            if callback_on_step_end is None:
                return x_t
            changed = callback_on_step_end(self, steps_done - 1, timestep, {"latents": x_t})
            return changed.pop("latents", x_t)

        with self.progress_bar(total=sum(s.steps for s in settings)) as bar:
            noise = randn_tensor(
                (len(prompts) * num_images_per_prompt, channels, size, size),
                generator=generator,
                device=self._execution_device,
                dtype=self.unet.dtype,
            )
            x = sample(
                self.unet,
                self.scheduler,
                noise,
                texts,
                settings[0],
                space="pixel",
                generator=generator,
                on_step=on_step,
            ).clamp(-1, 1)
            for stage, chosen in zip(stages, settings[1:], strict=True):
                x = upscale(
                    stage,
                    x,
                    texts,
                    chosen,
                    tile=tile,
                    overlap=overlap,
                    generator=generator,
                    on_step=on_step,
                )
        images = self.image_processor.postprocess(x, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _stages(self, count: int | None) -> list[Upscaler]:
        stages = self.upscalers
        if count is not None and not 0 <= count <= len(stages):
            raise ValueError(f"super_resolution_stages={count}, but this cascade has {len(stages)}")
        return stages[:count]


def _defaults(stage: Upscaler) -> Sampling:
    settings = PIXEL if stage.vae is None else LATENT
    return settings if uses_text(stage.unet) else settings.changed(guidance_scale=1.0)


def _each(name: str, value: Any, count: int) -> list[Any]:
    """One value a stage."""
    if value is None or isinstance(value, (int, float, str)):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} values for {count} stages")
    return list(value)
