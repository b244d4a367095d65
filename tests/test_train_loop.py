from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from taiji.train.loop import LoopConfig, learning_rate_scale, run


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def forward(
        self, x: Tensor, y: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        noise = 0.01 * torch.randn(x.shape, generator=generator)
        loss = (self.layer(x + noise) - y).square().mean()
        return loss, {"twice": 2 * loss.item()}


def draw(rng: np.random.Generator, count: int) -> dict[str, Tensor]:
    x = torch.from_numpy(rng.standard_normal((count, 4))).float()
    return {"x": x, "y": x.sum(1, keepdim=True)}


def config(steps: int) -> LoopConfig:
    return LoopConfig(
        steps=steps, batch_size=8, learning_rate=0.05, warmup_steps=5, ema_decay=0.9,
        checkpoint_every=10, decay_share=0.0,
    )  # fmt: skip


def silent(message: str) -> None: ...


def test_it_learns(tmp_path: Path) -> None:
    objective = Regression()
    metrics = run(objective, draw, config(200), tmp_path, silent)
    assert metrics["loss"] < 0.01 and metrics["twice"] == pytest.approx(2 * metrics["loss"])
    assert torch.allclose(objective.layer.weight, torch.ones(1, 4), atol=0.05)


def test_resume_repeats_the_uninterrupted_run_exactly(tmp_path: Path) -> None:
    whole, parts = Regression(), Regression()
    run(whole, draw, config(30), tmp_path / "whole", silent)
    run(parts, draw, config(20), tmp_path / "parts", silent)
    resumed = Regression()
    resumed.layer.reset_parameters()
    run(resumed, draw, config(30), tmp_path / "parts", silent)
    assert torch.equal(whole.layer.weight, resumed.layer.weight)
    assert torch.equal(whole.layer.bias, resumed.layer.bias)


def test_no_pickle_in_a_checkpoint(tmp_path: Path) -> None:
    run(Regression(), draw, config(10), tmp_path, silent)
    kinds = {p.suffix for p in (tmp_path / "checkpoint").iterdir()}
    assert kinds == {".safetensors", ".json"}


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    run(Regression(), draw, config(10), tmp_path, silent)
    other = Regression()
    other.extra = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="another model"):
        run(other, draw, config(20), tmp_path, silent)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    def bad(rng: np.random.Generator, count: int) -> dict[str, Tensor]:
        return {"x": torch.full((2, 4), torch.nan), "y": torch.zeros(2, 1)}

    with pytest.raises(FloatingPointError, match="step 0"):
        run(Regression(), bad, config(10), tmp_path, silent)


def test_learning_rate_warms_up_stays_and_decays() -> None:
    settings = LoopConfig(steps=100, warmup_steps=10, decay_share=0.2)
    scale = [learning_rate_scale(s, settings) for s in range(100)]
    assert scale[0] == 0.1 and scale[50] == 1.0 and scale[90] == 0.5 and scale[99] == 0.05
