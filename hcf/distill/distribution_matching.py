"""Distribution matching: the student's images are moved to where the teacher finds them likelier.

Yin et al., "Improved Distribution Matching Distillation" (DMD2), arXiv 2405.14867. A second
network, the fake score, is trained to denoise what the student makes. The student's image x is
noised to x_t, and the difference of what both networks think it was,

    grad = (x_fake(x_t) - x_real(x_t)) / mean |x - x_real(x_t)|

(DMD, arXiv 2311.18828, equations 7 and 8), is the gradient of KL(student || teacher). The fake
score takes several updates per one of the student (two time scales, section 4.2). A head on the
fake score's middle features tells noised real latents from the student's (section 4.3); without
it no image is needed. Training follows sampling: the student's own earlier steps make the input of
the one that is trained (backward simulation, section 4.5).

B batch, C channels, H W latent size, N steps of the student.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hcf.distill.solver import SolverGrid, noised, prediction_target, x0_eps
from hcf.distill.teacher import Guidance, Teacher
from hcf.errors import RecipeError
from hcf.settings import DistributionMatchingConfig
from hcf.trace import call_denoiser

STUDENT, FAKE = "student", "fake"


class DiscriminatorHead(nn.Module):
    """Middle features (B, F, h, w) -> one logit a place (B, 1, h', w')"""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(groups, width),
            nn.SiLU(),
            nn.Conv2d(width, 1, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.layers(features.float())
        return logits


class DistributionMatchingObjective(nn.Module):
    """Two turns: the student's, and the fake score's with its head.

    `fake` starts as the teacher, trained as the student is (all weights, or LoRA); it is not told
    the guidance scale. `grid` has one point a step of the student. `shape` (C, H, W) is that of a
    latent. Raises RecipeError for a denoiser without a middle block to put the head on.
    """

    turns = (STUDENT, FAKE)
    alpha: Tensor

    def __init__(
        self,
        student: nn.Module,
        fake: nn.Module,
        teacher: Teacher,
        grid: SolverGrid,
        schedule: Tensor,
        guidance: Guidance,
        config: DistributionMatchingConfig,
        shape: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.student, self.fake, self.teacher, self.grid = student, fake, teacher, grid
        self.guidance, self.config, self.shape = guidance, config, shape
        self.register_buffer("alpha", schedule.float(), persistent=False)
        self.turn_periods = {STUDENT: config.fake_updates}
        self.lr_scales = {FAKE: config.fake_lr_scale}
        self.head: DiscriminatorHead | None = None
        self._features: Tensor | None = None
        if config.gan_weight:
            middle = getattr(fake, "mid_block", None)
            if middle is None:
                raise RecipeError(
                    f"{type(fake).__name__} has no mid_block for the discriminator",
                    fix="use distill.distribution_matching.gan_weight=0",
                )
            width = middle.resnets[-1].out_channels
            self.head = DiscriminatorHead(width, middle.resnets[-1].norm2.num_groups)
            middle.register_forward_hook(self._keep)

    def parameters_of(self, turn: str) -> Iterator[nn.Parameter]:
        modules = (self.student,) if turn == STUDENT else (self.fake, self.head)
        for module in modules:
            if module is not None:
                yield from (p for p in module.parameters() if p.requires_grad)

    def forward(
        self,
        generator: torch.Generator,
        turn: str,
        step: int,
        latents: Tensor | None = None,
        **cond: Tensor,
    ) -> tuple[Tensor, dict[str, float]]:
        """latents (B, C, H, W) where there is a head, cond (B, ...) each -> scalar loss, parts"""
        count = len(next(iter(cond.values())))
        scale = self.guidance.draw(count, generator).to(self.alpha.device)
        told = {**cond, **self.guidance.told(scale)}
        with torch.set_grad_enabled(turn == STUDENT):
            x_0 = self.sample(count, told, generator)
        timestep = self._timesteps(count, generator)
        x_t, eps = self._noised(x_0, timestep, generator)
        if turn == STUDENT:
            return self._student_loss(x_0, x_t, timestep, cond, scale)
        real = None
        if self.head is not None:
            if latents is None:
                raise ValueError("the discriminator needs latents of real images")
            real, _ = self._noised(latents, timestep, generator)
        return self._fake_loss(x_0, eps, x_t, real, timestep, cond)

    def sample(self, count: int, told: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """Clean latents (B, C, H, W) after a random one of the student's steps, with its gradient
        alone."""
        grid, device = self.grid, self.alpha.device
        x = torch.randn(count, *self.shape, generator=generator).to(device)
        last = int(torch.randint(grid.points, (1,), generator=generator))
        for i in range(last + 1):
            at = torch.full((count,), i, device=device)
            with torch.set_grad_enabled(torch.is_grad_enabled() and i == last):
                prediction = call_denoiser(self.student, x, grid.timesteps[at], told).float()
                x_0, eps = x0_eps(prediction, x, grid.alpha[at], grid.kind)
            if i == last:
                break
            if self.config.sampler == "lcm":
                eps = torch.randn(x.shape, generator=generator).to(device)
            x = noised(x_0, eps, grid.alpha[at + 1])
        return x_0

    def _student_loss(
        self, x_0: Tensor, x_t: Tensor, timestep: Tensor, cond: dict[str, Tensor], scale: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        alpha, kind = self.alpha[timestep], self.grid.kind
        with torch.set_grad_enabled(self.head is not None):  # else nothing of it is kept
            fake_says, features = self._fake_prediction(x_t, timestep, cond)
        with torch.no_grad():
            guided = self.teacher.guided(x_t.detach(), timestep, cond, scale)
            real, _ = x0_eps(guided, x_t, alpha, kind)
            fake, _ = x0_eps(fake_says.detach(), x_t, alpha, kind)
            size = (x_0 - real).abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-5)
            grad = (fake - real) / size  # where not finite, the loop skips the step and says so
        loss = 0.5 * F.mse_loss(x_0, (x_0 - grad).detach())
        parts = {"matching": grad.square().mean().item()}
        if self.head is not None and features is not None:
            fooled = F.softplus(-self.head(features)).mean()
            loss = loss + self.config.gan_weight * fooled
            parts["fooled"] = fooled.item()
        return loss, parts

    def _fake_loss(
        self,
        x_0: Tensor,
        eps: Tensor,
        x_t: Tensor,
        real_t: Tensor | None,
        timestep: Tensor,
        cond: dict[str, Tensor],
    ) -> tuple[Tensor, dict[str, float]]:
        prediction, features = self._fake_prediction(x_t, timestep, cond)
        target = prediction_target(x_0, eps, self.alpha[timestep], self.grid.kind)
        loss = F.mse_loss(prediction, target)
        parts = {"denoising": loss.item()}
        if self.head is not None and features is not None and real_t is not None:
            _, real_features = self._fake_prediction(real_t, timestep, cond)
            assert real_features is not None  # the hook is there for both
            logits, real_logits = self.head(features), self.head(real_features)
            apart = F.softplus(logits).mean() + F.softplus(-real_logits).mean()
            loss = loss + self.config.gan_weight * apart
            told = ((logits < 0).float().mean() + (real_logits > 0).float().mean()) / 2
            parts |= {"discriminator": apart.item(), "told_apart": told.item()}
        return loss, parts

    def _fake_prediction(
        self, x_t: Tensor, timestep: Tensor, cond: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """The fake score's prediction (B, C, H, W); its middle features (B, F, h, w) for a head"""
        prediction = call_denoiser(self.fake, x_t, timestep, cond).float()
        features, self._features = self._features, None
        return prediction, features

    def _keep(self, module: nn.Module, args: tuple[object, ...], output: Tensor) -> None:
        self._features = output

    def _timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        low, high = (
            round(share * len(self.alpha)) for share in (self.config.low, self.config.high)
        )
        drawn = torch.randint(low, max(high, low + 1), (count,), generator=generator)
        return drawn.to(self.alpha.device)

    def _noised(
        self, x_0: Tensor, timestep: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        eps = torch.randn(x_0.shape, generator=generator).to(x_0.device)
        return noised(x_0, eps, self.alpha[timestep]), eps
