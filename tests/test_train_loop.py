"""The loop on tiny regressions. Run as a script, this file is the process that gets killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from taiji.train import checkpoint as checkpoint_module
from taiji.train.loop import LoopConfig, Probe, learning_rate_scale, run
from taiji.train.objective import parameter_groups
from taiji.train.stability import SpikeDetector
from taiji.train.throughput import FlopCounter


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


def config(steps: int, **changes: Any) -> LoopConfig:
    settings: dict[str, Any] = {
        "batch_size": 8, "learning_rate": 0.05, "warmup_steps": 5, "ema_decay": 0.9,
        "checkpoint_every": 10, "decay_share": 0.0, "tensorboard": False,
    }  # fmt: skip
    return LoopConfig(steps=steps, **{**settings, **changes})


def curve(folder: Path, key: str = "loss") -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row[key]) for row in rows]


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
    kinds = {p.suffix for p in (tmp_path / "checkpoints" / "00000010").iterdir()}
    assert kinds == {".safetensors", ".json"}


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    run(Regression(), draw, config(10), tmp_path, silent)
    other = Regression()
    other.extra = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="another model"):
        run(other, draw, config(20), tmp_path, silent)


def test_losses_that_stay_not_finite_stop_the_run(tmp_path: Path) -> None:
    def bad(rng: np.random.Generator, count: int) -> dict[str, Tensor]:
        return {"x": torch.full((2, 4), torch.nan), "y": torch.zeros(2, 1)}

    with pytest.raises(FloatingPointError, match="5 steps in a row from step 0"):
        run(Regression(), bad, config(10), tmp_path, silent)
    with pytest.raises(FloatingPointError, match="no step had a finite loss"):
        run(Regression(), bad, config(3), tmp_path / "short", silent)


def test_learning_rate_warms_up_stays_and_decays() -> None:
    settings = LoopConfig(steps=100, warmup_steps=10, decay_share=0.2)
    scale = [learning_rate_scale(s, settings) for s in range(100)]
    assert scale[0] == 0.1 and scale[50] == 1.0 and scale[90] == 0.5 and scale[99] == 0.05


class Faulty(Regression):
    """Fails as `fault` says for the step its batch is of; counts its calls."""

    def __init__(self, fault: Any) -> None:
        super().__init__()
        self.fault, self.calls = fault, 0

    def forward(
        self, x: Tensor, y: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        loss, parts = super().forward(x, y, generator)
        self.calls += 1
        return self.fault(self.calls, loss), parts


def test_a_bad_step_is_skipped_and_counted(tmp_path: Path) -> None:
    lines: list[str] = []
    for kind in ("loss", "gradient"):

        def fault(call: int, loss: Tensor, kind: str = kind) -> Tensor:
            if call != 4:
                return loss
            if kind == "loss":
                return loss * torch.nan
            return loss + (loss * 0).sqrt() * 0  # finite, with an infinite slope

        objective = Faulty(fault)
        metrics = run(objective, draw, config(12), tmp_path / kind, lines.append)
        assert metrics["skipped"] == 1 and np.isfinite(metrics["loss"])
        assert torch.isfinite(objective.layer.weight).all()
        assert f"step 3: {kind} is not finite; skipped" in lines


def test_a_row_of_bad_steps_goes_back_to_the_checkpoint(tmp_path: Path) -> None:
    """Calls 13 to 17 fail: step 17 is the fifth bad one, and the run is back at step 10."""
    objective = Faulty(lambda call, loss: loss * torch.nan if 13 <= call <= 17 else loss)
    metrics = run(objective, draw, config(20, log_every=1), tmp_path, silent)
    assert metrics["rollbacks"] == 1 and metrics["skipped"] == 5
    assert objective.calls == 17 + 10
    assert [step for step, _ in curve(tmp_path)] == list(range(1, 21))
    straight = Regression()
    run(straight, draw, config(20), tmp_path / "straight", silent)
    assert not torch.equal(objective.layer.weight, straight.layer.weight)  # other randomness


def test_after_its_roll_backs_a_run_stops_and_names_the_checkpoint(tmp_path: Path) -> None:
    def fault(call: int, loss: Tensor) -> Tensor:
        return loss * torch.nan if call > 12 else loss

    with pytest.raises(FloatingPointError, match="after 2 roll-backs.*checkpoints/00000010"):
        run(Faulty(fault), draw, config(30, max_rollbacks=2), tmp_path, silent)
    slower = config(30, learning_rate=0.01)
    with pytest.raises(ValueError, match="loop.learning_rate: 0.05 -> 0.01"):
        run(Regression(), draw, slower, tmp_path, silent)
    accepted = slower.model_copy(
        update={"accept_changes": ("loop.learning_rate", "loop.max_rollbacks")}
    )
    assert run(Regression(), draw, accepted, tmp_path, silent)["loss"] < 10
    assert curve(tmp_path)[-1][0] == 30


def test_another_recipe_is_refused_but_more_steps_are_not(tmp_path: Path) -> None:
    run(Regression(), draw, config(10), tmp_path, silent)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="loop.batch_size: 8 -> 16; loop.seed: 0 -> 1"):
        run(Regression(), draw, config(10, seed=1, batch_size=16), tmp_path, silent)
    with pytest.raises(ValueError, match="past loop.steps 5"):
        run(Regression(), draw, config(5), tmp_path, silent)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    run(Regression(), draw, config(12, log_every=1), tmp_path, silent)
    assert [step for step, _ in curve(tmp_path)] == [10, 11, 12]


def test_the_newest_checkpoints_are_kept_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    run(Regression(), draw, config(40, keep_checkpoints=3), tmp_path, silent)
    saved = tmp_path / "checkpoints"
    assert sorted(p.name for p in saved.iterdir()) == ["00000020", "00000030", "00000040"]
    weights = saved / "00000040" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(ValueError, match="00000040 is damaged"):
        run(Regression(), draw, config(50), tmp_path, silent)


def test_pieces_of_a_batch_add_up(tmp_path: Path) -> None:
    """Without randomness four pieces give the gradient of the whole batch."""

    def fixed(rng: np.random.Generator, count: int) -> dict[str, Tensor]:
        return {"x": torch.ones(count, 4), "y": torch.full((count, 1), 4.0)}

    found = []
    for pieces in (1, 4):
        objective = Regression()
        objective.forward = lambda x, y, generator, o=objective: (  # type: ignore[method-assign]
            (o.layer(x) - y).square().mean(),
            {},
        )
        run(objective, fixed, config(5, micro_batches=pieces), tmp_path / str(pieces), silent)
        found.append(objective.layer.weight.detach().clone())
    assert torch.allclose(*found, atol=1e-6)


class Game(nn.Module):
    turns = ("first", "second")

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 1), nn.Linear(4, 1)
        self.seen: list[tuple[str, int]] = []
        self.lr_scales: dict[str, float] = {}
        self.turn_periods: dict[str, int] = {}

    def parameters_of(self, turn: str) -> list[nn.Parameter]:
        return list(getattr(self, turn).parameters())

    def forward(
        self, x: Tensor, y: Tensor, generator: torch.Generator, turn: str, step: int
    ) -> tuple[Tensor, dict[str, float]]:
        self.seen.append((turn, step))
        return (getattr(self, turn)(x) - (y if turn == "first" else -y)).square().mean(), {}


def test_turns_alternate_and_resume(tmp_path: Path) -> None:
    whole, parts = Game(), Game()
    metrics = run(whole, draw, config(60), tmp_path / "whole", silent)
    assert whole.seen[:4] == [("first", 0), ("second", 0), ("first", 1), ("second", 1)]
    assert metrics.keys() >= {"loss", "loss_second"}
    assert whole.first.weight.mean() > 0.3 > -0.3 > whole.second.weight.mean()
    for steps in (30, 60):
        parts = Game()
        run(parts, draw, config(steps), tmp_path / "parts", silent)
    assert torch.equal(whole.second.weight, parts.second.weight)


def test_a_turn_has_its_own_rate(tmp_path: Path) -> None:
    game, start = Game(), Game()
    game.lr_scales = {"second": 0.0}
    run(game, draw, config(5, weight_decay=0.0), tmp_path, silent)
    assert torch.equal(game.second.weight, start.second.weight)
    assert not torch.equal(game.first.weight, start.first.weight)


def test_a_turn_may_be_taken_in_some_steps_alone(tmp_path: Path) -> None:
    game = Game()
    game.turn_periods = {"first": 3}
    run(game, draw, config(7), tmp_path, silent)
    assert [step for turn, step in game.seen if turn == "first"] == [0, 3, 6]
    assert [step for turn, step in game.seen if turn == "second"] == list(range(7))


def test_a_probe_sees_the_average_and_may_end_the_run(tmp_path: Path) -> None:
    watched, plain = Regression(), Regression()
    seen: list[Tensor] = []

    def look(step: int) -> bool:
        seen.append(watched.layer.weight.detach().clone())
        return step == 40

    run(watched, draw, config(60), tmp_path / "a", silent, probe=Probe(20, look))
    run(plain, draw, config(40), tmp_path / "b", silent)
    assert len(seen) == 2
    # looking changes nothing, and what it saw last is what the run leaves
    assert torch.equal(watched.layer.weight, plain.layer.weight)
    assert torch.equal(seen[1], plain.layer.weight)


def test_groups_have_their_own_rate_and_nothing_is_forgotten(tmp_path: Path) -> None:
    class Grouped(Regression):
        def parameter_groups(self) -> list[dict[str, Any]]:
            return [
                {"params": [self.layer.weight]},
                {"params": [self.layer.bias], "lr_scale": 0.0},
            ]

    objective, start = Grouped(), Grouped()
    run(objective, draw, config(5, weight_decay=0.0), tmp_path, silent)
    assert torch.equal(objective.layer.bias, start.layer.bias)
    assert not torch.equal(objective.layer.weight, start.layer.weight)
    objective.parameter_groups = lambda: [{"params": [objective.layer.bias]}]  # type: ignore
    with pytest.raises(ValueError, match="layer.weight"):
        parameter_groups(objective, "")


def test_buffers_are_part_of_a_checkpoint(tmp_path: Path) -> None:
    class Counted(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(
            self, x: Tensor, y: Tensor, generator: torch.Generator
        ) -> tuple[Tensor, dict[str, float]]:
            return super().forward(self.norm(x), y, generator)

    whole, resumed = Counted(), Counted()
    run(whole, draw, config(20), tmp_path / "whole", silent)
    run(Counted(), draw, config(10), tmp_path / "parts", silent)
    run(resumed, draw, config(20), tmp_path / "parts", silent)
    assert torch.equal(whole.norm.running_mean, resumed.norm.running_mean)
    assert int(resumed.norm.num_batches_tracked) == 20


class Denoising(nn.Module):
    def __init__(self, flops_per_sample: float | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.unet = UNet2DModel(
            sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16),
            layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        self.flops_per_sample = flops_per_sample

    def forward(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        eps = torch.randn(x.shape, generator=generator)
        return (self.unet(x + eps, 3).sample.float() - eps).square().mean(), {}


def images(rng: np.random.Generator, count: int) -> dict[str, Tensor]:
    return {"x": torch.from_numpy(rng.standard_normal((count, 3, 8, 8))).float()}


def test_counting_operations_changes_nothing_and_the_speed_is_in_the_log(tmp_path: Path) -> None:
    lines: list[str] = []
    counted, told = Denoising(), Denoising(1e6)
    settings = config(6, batch_size=4, log_every=3)
    metrics = run(counted, images, settings, tmp_path / "counted", lines.append)
    given = run(told, images, settings, tmp_path / "told", silent)
    assert all(map(torch.equal, counted.parameters(), told.parameters()))
    assert metrics["img_per_s"] > 0 and 0 <= metrics["data_wait"] < 1
    assert metrics["mfu"] > 0 and given["mfu"] > 0
    assert "img/s, data wait" in lines[-1] and "mfu" in lines[-1]


def test_operations_are_those_torch_counts() -> None:
    objective = Denoising()
    batch = images(np.random.default_rng(0), 2)
    ours, theirs = FlopCounter(), FlopCounterMode(display=False)
    with ours:
        objective(**batch, generator=torch.Generator()).__getitem__(0).backward()
    with theirs:
        objective(**batch, generator=torch.Generator()).__getitem__(0).backward()
    missing = ours.flops - theirs.get_total_flops()  # torch leaves out attention on processors
    assert 0 <= missing < 0.1 * ours.flops


def test_activations_are_recomputed_where_asked(tmp_path: Path) -> None:
    plain, recomputed = Denoising(1.0), Denoising(1.0)
    run(plain, images, config(3, batch_size=2), tmp_path / "plain", silent)
    settings = config(3, batch_size=2, gradient_checkpointing=True)
    run(recomputed, images, settings, tmp_path / "recomputed", silent)
    assert recomputed.unet.is_gradient_checkpointing
    assert all(map(torch.allclose, plain.parameters(), recomputed.parameters()))
    with pytest.raises(ValueError, match="no trained part supports it"):
        run(Regression(), draw, config(1, gradient_checkpointing=True), tmp_path / "none", silent)


def test_bf16_after_fp32_in_one_process(tmp_path: Path) -> None:
    settings = config(3, batch_size=2)
    run(Denoising(), images, settings, tmp_path / "fp32", silent)
    metrics = run(Denoising(), images, settings.model_copy(update={"precision": "bf16"}),
                  tmp_path / "bf16", silent)  # fmt: skip
    assert np.isfinite(metrics["loss"])


def test_tensorboard_gets_the_same_curve(tmp_path: Path) -> None:
    run(Regression(), draw, config(10, tensorboard=True, log_every=2), tmp_path, silent)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    seen = {event.step: event.value for event in events.Scalars("loss")}
    assert seen == pytest.approx(dict(curve(tmp_path)))


def test_a_spike_is_told_once_there_is_a_mean() -> None:
    detector, rng = SpikeDetector(), np.random.default_rng(0)
    told = [detector.is_spike(1 + 0.1 * rng.standard_normal(), 8.0) for _ in range(300)]
    assert not any(told)
    assert detector.is_spike(3.0, 8.0) and not detector.is_spike(1.2, 8.0)
    assert detector.mean == pytest.approx(1.0, abs=0.05)


KILLED = ("between", "writing", "renaming", "removing")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("killed")
    found = subprocess.run(
        [sys.executable, __file__, str(root)], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    return root


@pytest.mark.parametrize("where", KILLED)
def test_a_killed_run_repeats_the_uninterrupted_one_exactly(killed: Path, where: str) -> None:
    assert (killed / where / "killed").read_text() == "9"
    assert curve(killed / where) == curve(killed / "whole")
    for name in ("model", "ema", "optimizer_0"):
        file = Path("checkpoints") / "00000012" / f"{name}.safetensors"
        saved, whole = load_file(killed / where / file), load_file(killed / "whole" / file)
        assert all(torch.equal(tensor, whole[key]) for key, tensor in saved.items())
    left = [p.name for p in (killed / where / "checkpoints").iterdir()]
    assert sorted(left) == ["00000010", "00000012"]


def kill_myself(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(where: str) -> Any:
    """The draw of a run that is killed at step 7, or while its third checkpoint is written."""
    writes = iter(range(1000))
    save_file, replace = checkpoint_module.save_file, os.replace

    def save(*arguments: Any) -> None:
        save_file(*arguments)
        if where == "writing" and next(writes) == 9:
            kill_myself()

    def rename(source: Any, target: Any) -> None:
        if where == "renaming" and Path(target).name == "00000006":
            kill_myself()
        replace(source, target)
        if where == "removing" and Path(target).name == "00000002.old":
            kill_myself()

    checkpoint_module.save_file, os.replace = save, rename  # type: ignore[assignment]
    draws = iter(range(1000))

    def killing(rng: np.random.Generator, count: int) -> dict[str, Tensor]:
        if where == "between" and next(draws) == 7:
            kill_myself()
        return draw(rng, count)

    return killing


def in_child(folder: Path, drawing: Any) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            settings = config(12, checkpoint_every=2, log_every=3)
            run(Regression(), drawing(), settings, folder, silent)
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    base = Path(sys.argv[1])
    in_child(base / "whole", lambda: draw)
    for place in KILLED:
        signal_number = in_child(base / place, lambda place=place: arm(place))
        (base / place / "killed").write_text(str(signal_number))
        in_child(base / place, lambda: draw)
