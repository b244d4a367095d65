"""Taiji super-resolution: an image, and a text if wished, -> the image `scale` times as large.

Latent (LDM-SR): with a first stage of factor f the low-resolution image is concatenated to the
noisy latent. For x4 over f4 both have the same grid; for a smaller scale its pixels are unshuffled
by f/scale, for a larger one they are resized by scale/f. Pixel space is the case without a first
stage, f = 1. The continuous latent before quantisation is diffused; the decoder quantises. Any
height and width: what the U-Net cannot halve evenly is padded and cut off again.

B images, h w low-resolution pixels, H W = scale * (h, w), gh gw cells of the U-Net's grid.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, VQModel
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, pad, pixel_unshuffle
from transformers import PreTrainedTokenizerFast

from taiji.diffusion.augmentation import noise_augment, signal_share
from taiji.diffusion.condition import Text, check_text_length, encode_prompts, uses_text
from taiji.diffusion.guidance import ThresholdRule
from taiji.diffusion.sampling import Generators, OnStep, Sampling, sample
from taiji.diffusion.tiling import tiled
from taiji.pipelines.stable_diffusion import StepCallback
from taiji.text.sandwich import SandwichTextEncoder


@dataclass(frozen=True)
class Upscaler:
    """The models of one super-resolution stage; pixel space without `vae`."""

    unet: ModelMixin
    scheduler: SchedulerMixin
    vae: VQModel | None
    scale: int

    def __post_init__(self) -> None:
        f, s = self.factor, self.scale
        if s < 1 or (s % f and f % s):
            raise ValueError(f"scale={s} must divide the first stage's factor {f}, or be divided")
        needed = self.channels + 3 * max(f // s, 1) ** 2
        if self.unet.config.in_channels != needed or self.unet.config.out_channels != self.channels:
            raise ValueError(
                f"x{s} over a first stage of factor {f} needs a U-Net with {needed} channels in, "
                f"{self.channels} out; this one has {self.unet.config.in_channels}, "
                f"{self.unet.config.out_channels}"
            )
        if self.unet.config.class_embed_type != "timestep":
            raise ValueError("the U-Net must have class_embed_type='timestep' for the noise level")

    @property
    def factor(self) -> int:
        """Pixels along a side of one cell of the U-Net's grid."""
        return 1 if self.vae is None else first_stage_factor(self.vae)

    @property
    def channels(self) -> int:
        """Channels of what is diffused: pixels, or the latent before quantisation."""
        if self.vae is None:
            return 3
        return self.vae.config.vq_embed_dim or self.vae.config.latent_channels

    @property
    def multiple(self) -> int:
        """Sides of the low-resolution image must be multiples of this to be halved evenly."""
        halvings = 2 ** (len(self.unet.config.block_out_channels) - 1)
        f, s = self.factor, self.scale
        return halvings * (f // s) if f > s else halvings // math.gcd(halvings, s // f)


def first_stage_factor(vae: VQModel) -> int:
    return 2 ** (len(vae.config.block_out_channels) - 1)


def condition_image(low: Tensor, scale: int, factor: int) -> Tensor:
    """low (B, 3, h, w) -> (B, 3 (f/s)^2, gh, gw) on the U-Net's grid, f = `factor`, s = `scale`"""
    if factor >= scale:
        return pixel_unshuffle(low, factor // scale)
    return interpolate(low, scale_factor=scale // factor, mode="bilinear", align_corners=False)


def back_project(pixels: Tensor, low: Tensor, weight: float) -> Tensor:
    """pixels (B, 3, s h, s w), low (B, 3, h, w) -> pixels + weight up(low - averaged(pixels))

    One step of iterative back-projection (Irani and Peleg, "Improving Resolution by Image
    Registration", 1991): the enlarged image, averaged down, comes closer to what it was made from,
    and its detail stays.
    """
    scale = pixels.shape[-1] // low.shape[-1]
    error = low - avg_pool2d(pixels, scale)
    up = interpolate(error, scale_factor=scale, mode="bilinear", align_corners=False)
    return pixels + weight * up


def upscale(
    models: Upscaler,
    low: Tensor,
    texts: dict[str, Text],
    settings: Sampling,
    *,
    back_projection: float = 0.0,
    tile: int | None = None,
    overlap: int = 32,
    generator: Generators = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """low (B, 3, h, w) in [-1, 1] -> (B, 3, H, W) in [-1, 1], by `settings`

    `back_projection` is the weight of that correction at noise level 0; it falls as less of the
    low-resolution image is to be trusted. `tile` and `overlap` are in cells of the U-Net's grid.
    Raises ValueError for tiles that the U-Net cannot halve evenly.
    """
    halvings = 2 ** (len(models.unet.config.block_out_channels) - 1)
    if tile is not None and (tile % halvings or overlap % halvings):
        raise ValueError(f"tile={tile} and overlap={overlap} must be multiples of {halvings}")
    height, width = low.shape[-2:]
    down, across = (-side % models.multiple for side in (height, width))
    image = condition_image(
        pad(low, (0, across, 0, down), mode="replicate"), models.scale, models.factor
    )
    if "condition" in texts:
        length = texts["condition"].hidden.shape[1]
        rows, columns = (min(side, tile or side) for side in image.shape[-2:])
        check_text_length(models.unet, length, rows, columns)

    shape = (len(low), models.channels, *image.shape[-2:])
    draw = {"generator": generator, "device": low.device, "dtype": low.dtype}
    level = torch.full((len(low),), settings.noise_level)
    image, labels = noise_augment(image, level, randn_tensor(tuple(image.shape), **draw))
    x_0 = sample(
        models.unet,
        models.scheduler,
        randn_tensor(shape, **draw),
        texts,
        settings,
        space="pixel" if models.vae is None else "latent",
        image=image,
        class_labels=labels,
        tile=tile,
        overlap=overlap,
        generator=generator,
        on_step=on_step,
    )
    pixels = _decode(models, x_0, tile, overlap)
    pixels = pixels[..., : height * models.scale, : width * models.scale].clamp(-1, 1)
    if back_projection:
        weight = back_projection * signal_share(settings.noise_level)
        pixels = back_project(pixels, low, weight).clamp(-1, 1)
    return pixels


def _decode(models: Upscaler, x_0: Tensor, tile: int | None, overlap: int) -> Tensor:
    """x_0 (B, C, gh, gw) -> (B, 3, f gh, f gw)"""
    vae = models.vae
    if vae is None:
        return x_0

    def decode(latents: Tensor) -> Tensor:
        return vae.decode(latents, return_dict=False)[0]

    latents = x_0 / vae.config.scaling_factor
    if tile is None:
        return decode(latents)
    return tiled(decode, latents, tile, overlap, models.factor)


def _check_weight(back_projection: float) -> None:
    if not 0 <= back_projection <= 1:
        raise ValueError(f"back_projection={back_projection} is outside 0 (none) to 1 (full)")


class TaijiSuperResolutionPipeline(DiffusionPipeline):
    """`settings` (see `Sampling`) and `back_projection` are the defaults of a call."""

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["vae", "tokenizer", "text_encoder"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        vae: VQModel | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
        text_encoder: SandwichTextEncoder | None = None,
        scale: int = 4,
        settings: dict[str, Any] | None = None,
        back_projection: float = 0.0,
    ) -> None:
        super().__init__()
        self.register_modules(
            unet=unet,
            scheduler=scheduler,
            vae=vae,
            tokenizer=tokenizer,
            text_encoder=text_encoder,
        )
        defaults = Sampling.model_validate(settings or {})
        _check_weight(back_projection)
        self.register_to_config(
            scale=scale, settings=defaults.model_dump(), back_projection=back_projection
        )
        Upscaler(unet, scheduler, vae, scale)
        self.image_processor = VaeImageProcessor(do_resize=False, do_convert_rgb=True)
        self.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str]) -> Text:
        """B texts -> Text. Raises ValueError for a pipeline without a text encoder."""
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(
                "this pipeline has no text encoder; give `text`, or load it with tokenizer and "
                "text_encoder"
            )
        device, dtype = self._execution_device, self.unet.dtype
        return encode_prompts(self.tokenizer, self.text_encoder, prompts, device, dtype)

    def texts(self, prompt: str | list[str] | None, count: int) -> dict[str, Text]:
        """Condition and null condition of `count` images; no prompt is the null condition."""
        if not uses_text(self.unet):
            if prompt:
                raise ValueError("this model takes no text; leave the prompt out")
            return {}
        prompts = [prompt or ""] * count if prompt is None or isinstance(prompt, str) else prompt
        if len(prompts) != count:
            raise ValueError(f"{len(prompts)} prompts for {count} images")
        return {
            "condition": self.encode_prompt(list(prompts)),
            "null": self.encode_prompt([""] * count),
        }

    @torch.no_grad()
    def __call__(
        self,
        image: PipelineImageInput,
        prompt: str | list[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        noise_level: float | None = None,
        thresholding: ThresholdRule | None = None,
        back_projection: float | None = None,
        text: dict[str, Text] | None = None,
        tile: int | None = None,
        overlap: int = 32,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """`image` (B images, h x w each; tensors (B, 3, h, w) in [0, 1]) enlarged `scale` times.

        `text` replaces `prompt` by states made elsewhere, {"condition": ..., "null": ...}.
        `noise_level` is a share of the augmentation's schedule, 0 keeps to the image, and so does
        `back_projection` (see `back_project`), in [0, 1]; 0 leaves it out. `tile` cells of the
        U-Net's grid bound the memory. `output_type`: "pil", "np" (B, H, W, 3) or "pt" (B, 3, H, W)
        in [0, 1].
        """
        settings = Sampling.model_validate(dict(self.config.settings)).changed(
            steps=num_inference_steps,
            guidance_scale=guidance_scale,
            noise_level=noise_level,
            thresholding=thresholding,
        )
        weight = self.config.back_projection if back_projection is None else back_projection
        _check_weight(weight)
        low = self.image_processor.preprocess(image).to(self._execution_device, self.unet.dtype)
        if low.shape[1] != 3:
            raise ValueError(f"images have {low.shape[1]} channels; give RGB")

        def on_step(i: int, timestep: Tensor, x_t: Tensor) -> Tensor:
            bar.update()
            if callback_on_step_end is None:
                return x_t
            return callback_on_step_end(self, i, timestep, {"latents": x_t}).pop("latents", x_t)

        with self.progress_bar(total=settings.steps) as bar:
            pixels = upscale(
                Upscaler(self.unet, self.scheduler, self.vae, self.config.scale),
                low,
                self.texts(prompt, len(low)) if text is None else text,
                settings,
                back_projection=weight,
                tile=tile,
                overlap=overlap,
                generator=generator,
                on_step=on_step,
            )
        images = self.image_processor.postprocess(pixels, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
