"""Taiji-SD: Chinese text -> image through two text encoders, a latent U-Net and a first stage.

Works with any diffusers scheduler. A few-step student is the same class with an LCM or TCD
scheduler and its own `default_steps` and `default_guidance_scale`.

B prompts, n images per prompt, C latent channels, h w latent size, H W pixels.
"""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import ChineseCLIPModel, PreTrainedTokenizerFast

from taiji.diffusion.guidance import guidance_embedding
from taiji.text.conditioner import TextConditioner
from taiji.text.fusion import TextFusion
from taiji.text.sandwich import SandwichTextEncoder

StepCallback = Callable[[DiffusionPipeline, int, Tensor, dict[str, Any]], dict[str, Any]]


class TaijiStableDiffusionPipeline(DiffusionPipeline):
    model_cpu_offload_seq = "image_clip->text_encoder->fusion->unet->vae"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        image_clip: ChineseCLIPModel,
        text_encoder: SandwichTextEncoder,
        fusion: TextFusion,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        scheduler: SchedulerMixin,
        default_steps: int = 50,
        default_guidance_scale: float = 3.0,
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer,
            image_clip=image_clip,
            text_encoder=text_encoder,
            fusion=fusion,
            unet=unet,
            vae=vae,
            scheduler=scheduler,
        )
        self.register_to_config(
            default_steps=default_steps, default_guidance_scale=default_guidance_scale
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """B texts -> context (B, S1+S2, D), pooled (B, P). An empty text is the null condition."""
        device = self._execution_device
        clip = self.tokenize(prompts, self.fusion.config.clip_tokens)
        sandwich = self.tokenize(prompts, self.fusion.config.sandwich_tokens)
        keep = torch.tensor([bool(p.strip()) for p in prompts], device=device)
        conditioner = TextConditioner(self.image_clip, self.text_encoder, self.fusion)
        inputs = [t.to(device) for t in (*clip, *sandwich)]
        context, pooled = conditioner(*inputs, keep, keep)
        return context.to(self.unet.dtype), pooled.to(self.unet.dtype)

    def tokenize(self, prompts: list[str], length: int) -> tuple[Tensor, Tensor]:
        """B texts -> ids and attention mask (B, length) int64, cut and padded to `length` tokens"""
        batch = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        return batch.input_ids, batch.attention_mask

    def check_inputs(self, prompt: list[str], height: int, width: int, steps: int) -> None:
        multiple = self.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        if height % multiple or width % multiple:
            raise ValueError(f"height={height} and width={width} must be multiples of {multiple}")
        if not prompt or not all(isinstance(p, str) for p in prompt):
            raise ValueError(f"prompt must be a text or a non-empty list of texts, not {prompt!r}")
        if steps < 1:
            raise ValueError(f"num_inference_steps={steps} must be at least 1")

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        **scheduler_step: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Images of `prompt` (B texts), n each, in prompt order: B*n images of height x width.

        `guidance_scale` 1 is the conditional branch alone; a U-Net with `time_cond_proj_dim` is
        told the scale instead. `latents` (B*n, C, h, w) replaces the initial noise. `output_type`:
        "pil", "np" (B*n, H, W, 3) and "pt" (B*n, 3, H, W) in [0, 1], or "latent". Raises
        ValueError for sizes the first stage and U-Net cannot take.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        steps = self.config.default_steps if num_inference_steps is None else num_inference_steps
        scale = self.config.default_guidance_scale if guidance_scale is None else guidance_scale
        size = self.unet.config.sample_size * self.vae_scale_factor
        height, width = height or size, width or size
        self.check_inputs(prompts, height, width, steps)
        # a student that is told its guidance scale needs no second branch
        told = self.unet.config.time_cond_proj_dim
        device, guided = self._execution_device, scale != 1.0 and told is None

        negative = negative_prompt or ""
        negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        if len(negatives) != len(prompts):
            raise ValueError(f"{len(negatives)} negative prompts for {len(prompts)} prompts")
        texts = [*negatives, *prompts] if guided else prompts
        context, pooled = self.encode_prompt(texts)
        context = context.repeat_interleave(num_images_per_prompt, 0)
        pooled = pooled.repeat_interleave(num_images_per_prompt, 0)
        time_ids = torch.tensor([[height, width, 0, 0, height, width]], device=device)
        time_ids = time_ids.to(pooled.dtype).expand(len(pooled), -1)
        condition = {"text_embeds": pooled, "time_ids": time_ids}
        timestep_cond = None
        if told is not None:
            scales = torch.full((len(pooled),), float(scale), device=device)
            timestep_cond = guidance_embedding(scales, told).to(pooled.dtype)

        count = len(prompts) * num_images_per_prompt
        shape = (
            count,
            self.unet.config.in_channels,
            height // self.vae_scale_factor,
            width // self.vae_scale_factor,
        )
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=context.dtype)
        elif latents.shape != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}; needed {shape}")
        self.scheduler.set_timesteps(steps, device=device)
        latents = latents.to(device, context.dtype) * self.scheduler.init_noise_sigma
        accepted = inspect.signature(self.scheduler.step).parameters
        extra = {
            k: v for k, v in {"generator": generator, **scheduler_step}.items() if k in accepted
        }

        with self.progress_bar(total=steps) as bar:
            for i, timestep in enumerate(self.scheduler.timesteps):
                x_t = self.scheduler.scale_model_input(
                    torch.cat([latents, latents]) if guided else latents, timestep
                )
                out = self.unet(
                    x_t,
                    timestep,
                    encoder_hidden_states=context,
                    timestep_cond=timestep_cond,
                    added_cond_kwargs=condition,
                    return_dict=False,
                )[0]
                if guided:
                    uncond, cond = out.chunk(2)
                    out = uncond + scale * (cond - uncond)
                latents = self.scheduler.step(out, timestep, latents, **extra, return_dict=False)[0]
                if callback_on_step_end is not None:
                    changed = callback_on_step_end(self, i, timestep, {"latents": latents})
                    latents = changed.pop("latents", latents)
                bar.update()

        if output_type == "latent":
            images: Tensor | np.ndarray = latents
        else:
            scaled = latents / self.vae.config.scaling_factor
            images = self.vae.decode(scaled, return_dict=False)[0]
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
