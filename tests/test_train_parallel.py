"""Real gloo processes: run as a script, this file is one launch of them (it imports once, then
forks), as torchrun would start them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn

from taiji import presets
from taiji.train.loop import LoopConfig, run
from taiji.train.parallel import ParallelConfig, make_accelerator
from taiji.train.recipe import train

LOOP: dict[str, Any] = {
    "batch_size": 8, "micro_batches": 4, "learning_rate": 0.01, "warmup_steps": 2,
    "ema_decay": 0.9, "log_every": 1, "checkpoint_every": 3, "tensorboard": False,
}  # fmt: skip


class Denoiser(nn.Module):
    """Two layers, a running mean, and noise from the step's generator."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 4))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        noise = torch.randn(x.shape, generator=generator)
        loss = (self.net(x + noise) - self.frozen(x)).square().mean()
        return loss, {"double": 2 * loss.item()}


class Adversaries(nn.Module):
    """Two players, each of whose parameters the other's turn leaves without a gradient."""

    turns = ("generator", "critic")

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.generator_net = nn.Linear(4, 4)
        self.critic = nn.Linear(4, 1)

    def parameters_of(self, turn: str) -> list[nn.Parameter]:
        net = self.generator_net if turn == "generator" else self.critic
        return list(net.parameters())

    def forward(
        self, x: Tensor, generator: torch.Generator, turn: str, step: int
    ) -> tuple[Tensor, dict[str, float]]:
        fake = self.generator_net(torch.randn(x.shape, generator=generator))
        if turn == "generator":
            return -self.critic(fake).mean() + fake.square().mean(), {}
        return (self.critic(fake.detach()) - self.critic(x)).mean() + self.critic.weight.norm(), {}


class TextUNet(nn.Module):
    """The smallest U-Net of the family, its attention divided in pieces of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.unet = UNet2DConditionModel(**presets.A_TINY_UNET)

    def forward(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        noise = torch.randn(len(x), 3, 16, 16, generator=generator)
        text = x[:, None].repeat(1, 4, 8)
        return (self.unet(noise, 5, text).sample - noise.flip(-1)).square().mean(), {}


def draw(rng: np.random.Generator, count: int) -> dict[str, Tensor]:
    return {"x": torch.from_numpy(rng.standard_normal((count, 4))).float()}


def silent(message: str) -> None: ...


def worker(out: Path, mode: str, steps: int, kind: str) -> None:
    kinds: dict[str, Any] = {"turns": Adversaries, "unet": TextUNet, "": Denoiser}
    objective: nn.Module = kinds[kind]()
    parallel = ParallelConfig(mode=mode, unit_params=10_000 if kind == "unet" else 64)
    config = LoopConfig(steps=steps, parallel=parallel, **LOOP)
    run(objective, draw, config, out, silent)
    rank = os.environ.get("RANK", "0")
    weights = {n: p.flatten().tolist() for n, p in objective.named_parameters()}
    (out / f"weights-{rank}.json").write_text(json.dumps(weights))


def launch(out: Path, world: int, mode: str, steps: int, kind: str) -> None:
    """Forks `world` processes with the variables torchrun gives them, and waits."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out.mkdir(parents=True, exist_ok=True)
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            if world > 1:
                os.environ |= {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                    "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }  # fmt: skip
            code = 1
            try:
                worker(out, mode, steps, kind)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    failed = [child for child in children if os.waitpid(child, 0)[1]]
    if failed:
        raise RuntimeError(f"{len(failed)} of {world} processes failed in {out.name}")


LAUNCHES = (
    ("one", 1, "ddp", 6, ""), ("two", 2, "ddp", 6, ""), ("four", 4, "ddp", 6, ""),
    ("sharded", 2, "fsdp2", 6, ""),
    ("moved", 2, "fsdp2", 3, ""), ("moved", 1, "ddp", 6, ""),  # the second goes on from the first
    ("turns-one", 1, "ddp", 6, "turns"), ("turns-two", 2, "ddp", 6, "turns"),
    ("turns-sharded", 2, "fsdp2", 6, "turns"),
    ("unet-one", 1, "ddp", 3, "unet"), ("unet-sharded", 2, "fsdp2", 3, "unet"),
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parallel")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, __file__, str(root)], env=environment, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return root


def curve(folder: Path) -> list[float]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def weights(folder: Path, rank: int = 0) -> Tensor:
    saved = json.loads((folder / f"weights-{rank}.json").read_text())
    return torch.cat([torch.tensor(values) for _, values in sorted(saved.items())])


@pytest.mark.parametrize("name", ["two", "four", "sharded", "moved"])
def test_any_number_of_processes_gives_the_same_loss(runs: Path, name: str) -> None:
    assert len(curve(runs / name)) == 6
    assert curve(runs / name) == pytest.approx(curve(runs / "one"), abs=1e-5)
    assert torch.allclose(weights(runs / name), weights(runs / "one"), atol=1e-5)


@pytest.mark.parametrize("name", ["turns-two", "turns-sharded"])
def test_turns_are_taken_by_several_processes(runs: Path, name: str) -> None:
    assert curve(runs / name) == pytest.approx(curve(runs / "turns-one"), abs=1e-5)
    assert torch.allclose(weights(runs / name), weights(runs / "turns-one"), atol=1e-5)


def test_a_unet_divided_among_processes_trains_as_a_whole_one(runs: Path) -> None:
    assert curve(runs / "unet-sharded") == pytest.approx(curve(runs / "unet-one"), abs=1e-5)


def test_every_process_ends_with_the_same_weights(runs: Path) -> None:
    for name in ("two", "sharded"):
        assert torch.equal(weights(runs / name, 0), weights(runs / name, 1))


def test_a_checkpoint_of_divided_parameters_holds_whole_ones(runs: Path) -> None:
    saved = runs / "sharded" / "checkpoints" / "00000006"
    shapes = {n: tuple(t.shape) for n, t in load_file(saved / "model.safetensors").items()}
    assert shapes["net.0.weight"] == (16, 4)
    assert load_file(saved / "optimizer_0.safetensors")["0.exp_avg"].shape == (16, 4)


@pytest.mark.slow
def test_torchrun_trains_a_recipe_as_one_process_does(tmp_path: Path) -> None:
    recipe: dict[str, Any] = {
        "phase": "first_stage",
        "data": {"shapes": 24, "colours": ["red", "blue"], "kinds": ["circle", "star"]},
        "loop": {"steps": 2, "batch_size": 4, "micro_batches": 2, "warmup_steps": 1},
    }
    for name in ("one", "two"):
        paths = {"model": str(tmp_path / name / "model"), "work": str(tmp_path / name / "work")}
        (tmp_path / f"{name}.yaml").write_text(json.dumps({**recipe, **paths}))
    train(tmp_path / "one.yaml", log=silent)
    hcf = Path(sys.executable).with_name("hcf")
    found = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "--no-python", str(hcf), "train", str(tmp_path / "two.yaml")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.count("step 2/2") == 1
    losses = [
        json.loads((tmp_path / name / "model" / "training.json").read_text())["first_stage"][
            "metrics"
        ]["loss"]
        for name in ("one", "two")
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert (tmp_path / "two" / "model" / "vae" / "config.json").exists()


def test_a_batch_that_does_not_divide_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValidationError, match="no multiple of micro_batches 3"):
        LoopConfig(steps=1, batch_size=8, micro_batches=3)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="set loop.micro_batches to a multiple of 3"):
        accelerator("ddp")


def test_deepspeed_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises((ImportError, ValueError), match="pip install deepspeed|needs GPUs"):
        accelerator("zero2")


def accelerator(mode: Any) -> None:
    make_accelerator(
        ParallelConfig(mode=mode), precision="fp32", batch_size=8, micro_batches=4, turns=1,
        max_grad_norm=1.0, tensorboard=False, folder=None,
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="DeepSpeed and NCCL need two GPUs")
@pytest.mark.parametrize("mode", ["ddp", "fsdp2", "zero1", "zero2"])
def test_two_gpus_give_the_loss_of_one_process(mode: str, runs: Path, tmp_path: Path) -> None:
    if mode.startswith("zero"):
        pytest.importorskip("deepspeed")
    subprocess.run([sys.executable, __file__, str(tmp_path), mode], env={**os.environ}, check=True)
    assert curve(tmp_path / mode) == pytest.approx(curve(runs / "one"), abs=1e-4)


if __name__ == "__main__":
    root = Path(sys.argv[1])
    chosen = LAUNCHES if len(sys.argv) < 3 else ((sys.argv[2], 2, sys.argv[2], 6, ""),)
    for name, world, mode, steps, kind in chosen:
        launch(root / name, world, mode, steps, kind)
