"""The phases a Taiji-SD is trained in, each an objective, a way to draw batches, and what it saves.

first_stage -> image_clip -> unet. A phase reads the folder the previous ones wrote and adds its
components, so the folder is a complete pipeline after the last.
"""

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import ChineseCLIPModel

from taiji.diffusion.losses import denoising_loss, diffusion_target
from taiji.text.conditioner import TextConditioner

Parts = dict[str, float]


class ImageClipObjective(nn.Module):
    """Symmetric InfoNCE of the two towers; rows of one concept are positives of each other."""

    def __init__(self, image_clip: ChineseCLIPModel) -> None:
        super().__init__()
        self.image_clip = image_clip

    def forward(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        concept: Tensor,
        generator: torch.Generator,
    ) -> tuple[Tensor, Parts]:
        """images (B, 3, H, W), input_ids and attention_mask (B, S), concept (B,) -> loss, parts"""
        out = self.image_clip(
            input_ids=input_ids, attention_mask=attention_mask, pixel_values=images
        )
        logits = out.logits_per_text.float()
        same = (concept[:, None] == concept[None, :]).float()
        target = same / same.sum(1, keepdim=True)
        loss = -(target * logits.log_softmax(1)).sum(1).mean() / 2
        loss = loss - (target * logits.t().log_softmax(1)).sum(1).mean() / 2
        hit = same[torch.arange(len(logits)), logits.argmax(1)].mean()
        with torch.no_grad():  # CLIP's cap on the learned temperature
            self.image_clip.logit_scale.clamp_(max=4.6052)
        return loss, {"r1_batch": hit.item()}


class UNetObjective(nn.Module):
    """Denoising loss of the U-Net with Sandwich and fusion trained beside it, ImageCLIP frozen.

    Condition dropout for guidance: both encoders absent in `drop_both` of the rows, one absent in
    `drop_one` each.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text: TextConditioner,
        scheduler: DDIMScheduler,
        time_ids: Tensor,
        *,
        gamma: float | None = 5.0,
        drop_both: float = 0.1,
        drop_one: float = 0.05,
        high_noise_share: float = 0.0,
    ) -> None:
        super().__init__()
        self.time_ids: Tensor
        self.alphas_cumprod: Tensor
        self.unet = unet
        self.text = text
        self.text.image_clip.requires_grad_(False)
        self.scheduler = scheduler
        self.register_buffer("time_ids", time_ids, persistent=False)
        self.register_buffer("alphas_cumprod", scheduler.alphas_cumprod.clone(), persistent=False)
        self.gamma, self.drop_both, self.drop_one = gamma, drop_both, drop_one
        self.high_noise_share = high_noise_share

    def forward(
        self,
        latents: Tensor,
        clip_ids: Tensor,
        clip_mask: Tensor,
        ids: Tensor,
        mask: Tensor,
        generator: torch.Generator,
    ) -> tuple[Tensor, Parts]:
        """latents (B, C, H, W) scaled; ids and masks (B, S1), (B, S2) -> loss, parts"""
        count = len(latents)
        u = torch.rand(count, generator=generator).to(latents.device)
        keep_clip = u >= self.drop_both + self.drop_one
        keep_sandwich = (u >= self.drop_both) & (u <= 1 - self.drop_one)
        context, pooled = self.text(clip_ids, clip_mask, ids, mask, keep_clip, keep_sandwich)
        timestep = self.draw_timesteps(count, generator).to(latents.device)
        eps = torch.randn(latents.shape, generator=generator).to(latents.device)
        x_t, target = diffusion_target(self.scheduler, latents, eps, timestep)
        condition = {"text_embeds": pooled, "time_ids": self.time_ids.expand(count, -1)}
        prediction = self.unet(x_t, timestep, context, added_cond_kwargs=condition).sample
        kind = self.scheduler.config.prediction_type
        loss = denoising_loss(
            prediction, target, self.alphas_cumprod[timestep], gamma=self.gamma, kind=kind
        )
        mse = (prediction.detach().float() - target).square().mean().item()
        return loss, {"mse": mse}

    def draw_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """(count,) int64, one per equal slice of the schedule so that a batch's loss varies less.

        A share `high_noise_share` is spread over the noisiest two fifths alone. The slices are
        shuffled: a batch's rows are in the order of their kinds.
        """
        high = round(count * self.high_noise_share)
        slices = torch.cat([torch.arange(n) / n for n in (count - high, high) if n])
        widths = torch.cat([torch.full((n,), 1 / n) for n in (count - high, high) if n])
        u = slices + widths * torch.rand(count, generator=generator)
        u[count - high :] = 0.6 + 0.4 * u[count - high :]
        u = u[torch.randperm(count, generator=generator)]
        return (u * len(self.alphas_cumprod)).long().clamp(max=len(self.alphas_cumprod) - 1)
