"""Structure distillation: a smaller U-Net learns what the teacher's says, inside and at the end.

BK-SDM (Kim et al., arXiv 2305.15798, section 3.2): with x_t noised images, S and T the networks,
f_l the output of stage l (down, middle, up),

    L_Task   = E || eps - S(x_t, y, t) ||^2
    L_OutKD  = E || T(x_t, y, t) - S(x_t, y, t) ||^2
    L_FeatKD = E sum_l || f_l^T - f_l^S ||^2

and their weighted sum, in the network's own prediction type and as means over elements, as their
code has it. `feature_scale: relative` divides the term of each stage by the teacher's mean square
there: as they are, features of other sizes than Stable Diffusion's drown the other two. A narrower
student has no 1x1 projection of its features: a channel of it is compared with the teacher's
channel that it was made from. Guidance stays what it was, two branches: a share of the rows has the
unconditional conditioning, and both outputs are matched.

B batch, C channels, H W latent size, h w a stage's size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hcf.distill.solver import noise_schedule, noised, prediction_target
from hcf.distill.takeover import kept_channels
from hcf.distill.teacher import Guidance, Teacher
from hcf.settings import DistillConfig, StructureConfig
from hcf.trace import call_denoiser


class StructureObjective(nn.Module):
    """`student` is a reduced form of the teacher's U-Net, from `hcf.distill.reduction.reduced`.

    `guidance`: the scales that a teacher with an input for them is told, one of 1 without.
    """

    alpha: Tensor

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        scheduler: Any,
        guidance: Guidance,
        config: StructureConfig,
    ) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        self.guidance, self.config = guidance, config
        alpha, self.kind = noise_schedule(scheduler)
        self.register_buffer("alpha", alpha.float(), persistent=False)
        self._kept: dict[str, dict[str, Tensor]] = {"student": {}, "teacher": {}}
        if config.feature_weight:
            self._watch(student, teacher.denoiser)

    def forward(
        self, latents: Tensor, generator: torch.Generator, **cond: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """latents (B, C, H, W), cond (B, ...) each -> scalar loss, parts"""
        count, device, weights = len(latents), latents.device, self.config
        timestep = torch.randint(len(self.alpha), (count,), generator=generator).to(device)
        eps = torch.randn(latents.shape, generator=generator).to(device)
        alpha = self.alpha[timestep]
        x_t = noised(latents, eps, alpha)
        cond = self.drop_captions(cond, torch.rand(count, generator=generator).to(device))
        told = {**cond, **self.guidance.told(self.guidance.draw(count, generator).to(device))}
        with torch.no_grad():
            taught = call_denoiser(self.teacher.denoiser, x_t, timestep, told).float()
        prediction = call_denoiser(self.student, x_t, timestep, told).float()
        losses = {
            "task": F.mse_loss(prediction, prediction_target(latents, eps, alpha, self.kind)),
            "output": F.mse_loss(prediction, taught),
            "feature": self._feature_loss(prediction),
        }
        loss = sum(
            (getattr(weights, f"{name}_weight") * value for name, value in losses.items()),
            start=prediction.new_zeros(()),
        )
        return loss, {name: value.item() for name, value in losses.items()}

    def drop_captions(self, cond: Mapping[str, Tensor], draw: Tensor) -> dict[str, Tensor]:
        """cond (B, ...) each, draw (B,) uniform -> the unconditional branch in a share of rows"""
        found = dict(cond)
        for name in self.teacher.names:
            row = getattr(self.teacher, f"uncond_{name}")
            drop = (draw < self.config.drop_caption).view(-1, *(1,) * (row.ndim - 1))
            found[name] = torch.where(drop, row.to(found[name].dtype), found[name])
        return found

    def _feature_loss(self, like: Tensor) -> Tensor:
        """Mean square differences (), summed over the stages."""
        total, relative = like.new_zeros(()), self.config.feature_scale == "relative"
        for name in list(self._kept["student"]):
            own, taught = (self._kept[side].pop(name).float() for side in ("student", "teacher"))
            size = taught.square().mean().clamp_min(1e-8) if relative else 1.0
            total = total + F.mse_loss(own, taught) / size
        return total

    def _watch(self, student: Any, teacher: Any) -> None:
        """Keeps the output (B, C, h, w) of every stage that both networks have, in the student's
        channels."""
        channels = kept_channels(teacher, student)
        stages, gone = len(channels), len(teacher.down_blocks) - len(channels)
        pairs = [
            (f"down {i}", i, student.down_blocks[i], teacher.down_blocks[i]) for i in range(stages)
        ]
        pairs += [
            (f"up {i}", stages - 1 - i, student.up_blocks[i], teacher.up_blocks[i + gone])
            for i in range(stages)
        ]
        if student.mid_block is not None:
            pairs.append(("middle", stages - 1, student.mid_block, teacher.mid_block))
        for stage, index in enumerate(channels):
            self.register_buffer(f"channels_{stage}", index, persistent=False)
        for name, stage, own, other in pairs:
            narrower = len(channels[stage]) < teacher.config.block_out_channels[stage]
            self._hook("student", name, own)
            self._hook(
                "teacher",
                name,
                other,
                picked=f"channels_{stage}" if narrower else None,
                # the student's innermost stage does not downsample
                before_downsampling=bool(gone) and name == f"down {stages - 1}",
            )

    def _hook(
        self,
        side: str,
        name: str,
        block: nn.Module,
        picked: str | None = None,
        before_downsampling: bool = False,
    ) -> None:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if before_downsampling:
                output = output[1][-2]
            features = output[0] if isinstance(output, tuple) else output
            if picked is not None:
                features = features[:, getattr(self, picked)]
            self._kept[side][name] = features

        block.register_forward_hook(keep)


def told_scales(config: DistillConfig) -> Guidance:
    """Guidance is left as it is: scales only for a teacher that is told them."""
    embedding = config.guidance_embedding
    if embedding is None:
        return Guidance(1.0, 1.0, None)
    return Guidance(embedding.low, embedding.high, embedding.width)


def costs(
    teacher: Any, student: Any, shape: tuple[int, ...], cond: Mapping[str, Tensor]
) -> dict[str, float]:
    """Parameters of both, and GFLOPs of evaluating one latent (C, H, W) with `cond` (1, ...) each.

    2 FLOPs a multiply-accumulate; the products of attention count.
    """
    found: dict[str, float] = {}
    for name, network in (("teacher", teacher), ("student", student)):
        found[f"{name}_parameters"] = float(sum(p.numel() for p in network.parameters()))
        found[f"{name}_gflop"] = evaluation_flops(network, shape, cond) / 1e9
    return {**found, "flop_ratio": found["teacher_gflop"] / found["student_gflop"]}


def evaluation_flops(network: Any, shape: tuple[int, ...], cond: Mapping[str, Tensor]) -> int:
    """Counted on shapes alone, nothing is computed."""
    from taiji.train.throughput import FlopCounter

    config = {k: v for k, v in network.config.items() if not k.startswith("_")}
    with torch.device("meta"), torch.no_grad(), FlopCounter() as counter:
        twin = type(network)(**config)
        given = {name: v.to("meta") for name, v in cond.items()}
        call_denoiser(twin, torch.empty(1, *shape), torch.zeros(1), given)
    return counter.flops
