"""What a distillation takes, said before: each part counted, refused where it does not fit."""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
import types
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from hcf.cli import app
from hcf.distill import estimate as work
from hcf.distill.estimate import ACTIVATIONS, estimate, read_denoiser, require_fit
from hcf.distill.student import frozen_in, make_student
from hcf.distill.trainer import distill
from hcf.errors import HcfError, InvalidArtifact
from hcf.settings import DistillConfig

ROWS: work.Shapes = {"encoder_hidden_states": ((16, 32), torch.float32)}


def settings(**changes: Any) -> DistillConfig:
    return DistillConfig.model_validate({"batch_size": 8, "steps": 2, "solver_steps": 4, **changes})


def found(unet: Any, device: str = "cuda", **changes: Any) -> work.Memory:
    return estimate(unet, settings(**changes), ROWS, guided=True, size=(16, 16), device=device)


def test_every_part_is_what_the_training_holds(tiny_pipeline: Any) -> None:
    unet = tiny_pipeline.unet
    count = sum(p.numel() for p in unet.parameters())
    full = found(unet, method="guidance")
    assert full.items["the student's weights"] == full.items["the teacher's"] == 4 * count
    assert full.items["the optimiser's moments"] == 8 * count
    assert full.items["the average"] == 4 * count
    low = {"method": "dmd2", "precision": "bf16", "optimizer": "adamw8bit"}
    matching = found(unet, **low)
    matrices = sum(p.numel() for p in unet.parameters() if p.ndim > 1)
    assert matching.items["the teacher's"] == 4 * count - 2 * matrices
    assert matching.items["the student's weights"] == 4 * count  # masters
    assert matching.items["the fake score's"] > 4 * count
    head = matching.items["the fake score's"] // 4 - count
    large = 2 * sum(p.numel() for p in unet.parameters() if p.numel() >= 4096)
    small = 2 * count + head - large
    assert 2 * large < matching.items["the optimiser's moments"] < 2.2 * large + 8 * small
    adapter = {"kind": "lora", "rank": 2}
    lora = found(unet, method="guidance", precision="bf16", student=adapter)
    assert 2 * count < lora.items["the student's weights"] < 3 * count
    assert lora.items["the optimiser's moments"] < count


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_those_that_a_real_forward_pass_keeps(
    tiny_pipeline: Any, checkpointing: bool
) -> None:
    """Of the storages that autograd saves, each once, no parameter; and a piece is half of two."""
    config = settings(method="trajectory", gradient_checkpointing=checkpointing)
    student: Any = make_student(tiny_pipeline.unet, config)
    if checkpointing:
        student.enable_gradient_checkpointing()
    own = {p.untyped_storage().data_ptr() for p in student.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    cond = {"encoder_hidden_states": torch.zeros(8, 16, 32)}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = student(torch.zeros(8, 4, 16, 16), torch.zeros(8), **cond).sample
    saved = sum(size for size, _ in kept.values())
    del out
    changes = {"method": "trajectory", "gradient_checkpointing": checkpointing}
    whole, half = (
        found(tiny_pipeline.unet, "cpu", **changes, micro_batches=n).items[ACTIVATIONS]
        for n in (1, 2)
    )
    assert whole == pytest.approx(2 * half, rel=0.1)
    if checkpointing:  # the peak is inside the block that is computed again
        assert saved < whole < 4 * saved
    else:
        assert saved <= whole < 1.35 * saved


def test_work_follows_the_method(tiny_pipeline: Any) -> None:
    flops = {m: found(tiny_pipeline.unet, method=m).flops for m in ("trajectory", "guidance", "pd")}
    one = flops["trajectory"] / 3  # a forward pass of the student and its backward pass
    assert flops["guidance"] == pytest.approx(5 * one) and flops["pd"] == pytest.approx(7 * one)
    again = found(tiny_pipeline.unet, method="trajectory", gradient_checkpointing=True).flops
    assert again == pytest.approx(4 * one)
    memory = found(tiny_pipeline.unet, method="guidance", train_steps=10)
    assert memory.seconds(1e12) == pytest.approx(10 * memory.flops / 1e12 / work.MFU)


def test_what_does_not_fit_is_refused_with_what_would(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HCF_HOME", str(tmp_path / "home"))
    unet = read_denoiser(tiny_folder)
    assert all(p.is_meta for p in unet.parameters())
    given: dict[str, Any] = {"guided": True, "size": (16, 16)}
    config = settings(method="guidance", batch_size=64)
    memory = estimate(unet, config, ROWS, device="cpu", **given)
    assert memory.largest == ACTIVATIONS
    require_fit(memory, memory.total, unet, config, ROWS, **given)
    with pytest.raises(HcfError, match="the largest part is activations") as caught:
        require_fit(memory, memory.total // 4, unet, config, ROWS, **given)
    assert caught.value.fix.startswith("--set distill.micro_batches=64 needs")
    changes = [list(c) for c in work._savings(config)]
    assert changes[-1] == ["micro_batches", "gradient_checkpointing", "optimizer", "student"]
    last = config.model_copy(
        update={"micro_batches": 64, "gradient_checkpointing": True, "optimizer": "adamw8bit"}
    )
    with pytest.raises(HcfError) as caught:
        require_fit(memory, 1000, unet, last, ROWS, **given)
    for word in ("even --set distill.student.kind=lora needs", "check_memory=false"):
        assert word in caught.value.fix

    data = tiny_folder / "hcf_data"
    data.mkdir()
    (data / "captions_distill.json").write_text(json.dumps(["cat", "dog"]))
    small = {"method": "trajectory", "trajectory": {"count": 2}, "train_steps": 1, "batch_size": 2}
    monkeypatch.setattr("hcf.distill.trainer.device_memory", lambda denoiser: ("cpu", 1000))
    with pytest.raises(HcfError, match="needs about .* GiB, and there is 0.00"):
        distill(tiny_folder, tmp_path / "out", settings(**small), lambda line: None)
    said: list[str] = []
    monkeypatch.setattr("hcf.distill.trainer.device_memory", lambda denoiser: ("cpu", 10**12))
    distill(tiny_folder, tmp_path / "out", settings(**small), said.append)
    assert any(line.startswith("trajectory: about 0.0") for line in said)


def test_a_dry_run_says_memory_and_time(tiny_folder: Path, tmp_path: Path) -> None:
    def run(model: Path) -> dict[str, Any]:
        done = CliRunner().invoke(
            app,
            ["distill", "-m", str(model), "-o", str(tmp_path / "out"), "--method", "dmd2",
             "--dry-run", "--format", "json"],
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        return dict(json.loads(done.output))

    said = run(tiny_folder)
    assert said["config"]["method"] == "distribution_matching"
    assert "GiB" in said["memory"] and "the fake score's" in said["memory"]
    assert "estimated" in said["time"] and not (tmp_path / "out").exists()
    assert run(tmp_path / "nothing")["memory"].startswith("not estimated")
    with pytest.raises(InvalidArtifact, match="cannot be estimated"):
        read_denoiser(tmp_path)


def train_two_steps(config: DistillConfig) -> tuple[int, int]:
    """(estimated, resident) bytes: a U-Net of 55M parameters, 4 rows, a process of its own."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    from hcf.distill import trainer
    from hcf.distill.data import DistillationSet
    from hcf.distill.job import Distillation
    from hcf.distill.teacher import Guidance, Teacher
    from hcf.quantize.estimate import peak_memory
    from taiji.train import loop

    def unet(*widths: int) -> Any:
        crossed = len(widths) - 1
        return UNet2DConditionModel(
            sample_size=32, block_out_channels=widths, layers_per_block=1, attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock2D",) * crossed + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * crossed,
            cross_attention_dim=256, norm_num_groups=8,
        ).requires_grad_(False)  # fmt: skip

    torch.set_num_threads(1)
    loop.save = lambda session: None  # a checkpoint is no part of a step
    rows = {"encoder_hidden_states": torch.zeros(2, 77, 256)}
    uncond = {name: each[:1] for name, each in rows.items()}
    pick, latents = torch.tensor([0, 1]), torch.randn(2, 4, 32, 32)
    data = DistillationSet(rows, uncond, pick, latents, pick)
    pipe = types.SimpleNamespace(scheduler=DDIMScheduler(prediction_type="v_prediction"))

    def run(denoiser: Any) -> None:
        teacher, student = Teacher(denoiser, uncond), make_student(denoiser, config)
        for network in (denoiser, student):
            frozen_in(network, config.precision)
        job = Distillation(
            config, Path(), pipe, teacher, student, Guidance.of(config, teacher), data,
            (4, 32, 32), lambda line: None,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            trainer.train(job, Path(folder))

    run(unet(8, 16))  # what libraries keep once they are used
    with peak_memory() as peak:
        large = unet(160, 320, 480)
        run(large)
    shapes = work.shapes_of(rows)
    memory = estimate(large, config, shapes, guided=True, size=(32, 32), device="cpu")
    return memory.total, peak[0] - peak[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "consistency", "student": {"kind": "lora", "rank": 16}},
        *(
            pytest.param(each, marks=pytest.mark.heavy)
            for each in (
                {"method": "guidance"},
                {"method": "guidance", "gradient_checkpointing": True},
                {"method": "guidance", "precision": "bf16"},
                {"method": "guidance", "precision": "bf16", "student": {"kind": "lora"}},
                {"method": "dmd2", "student": {"kind": "lora", "rank": 16}},
                {"method": "dmd2", "micro_batches": 2},
            )
        ),
    ],
    ids=str,
)
def test_the_estimate_is_what_a_run_takes(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resident bytes, with a glibc that returns what is freed; by default its heap keeps much."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = settings(train_steps=2, batch_size=4, guidance_scale=3.0, **changes)
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh) as pool:
        estimated, resident = pool.submit(train_two_steps, config).result()
    ratio = estimated / resident
    print(f"{changes}: {estimated / 2**30:.2f} GiB estimated, {ratio:.2f} of what it takes")
    assert 0.8 < ratio < 1.15


def test_frozen_weights_are_in_the_precision_of_training(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the saved LoRA student stands on the teacher's own weights, not their copies."""
    from hcf.distill import trainer
    from hcf.source import open_pipeline

    monkeypatch.setenv("HCF_HOME", str(tmp_path / "home"))
    data = tiny_folder / "hcf_data"
    data.mkdir()
    (data / "captions_distill.json").write_text(json.dumps(["cat", "dog"]))
    jobs: list[Any] = []
    train = trainer.train

    def kept(job: Any, folder: Path) -> Any:
        jobs.append(job)
        types = {p.dtype for p in job.student.parameters() if p.requires_grad}
        assert types == {torch.float32}
        frozen = [p for p in job.student.parameters() if not p.requires_grad]
        frozen += list(job.teacher.denoiser.parameters())
        assert {p.dtype for p in frozen if p.ndim > 1} == {torch.bfloat16}
        assert {p.dtype for p in frozen if p.ndim == 1} == {torch.float32}
        return train(job, folder)

    monkeypatch.setattr(trainer, "train", kept)
    config = settings(
        method="dmd2", precision="bf16", train_steps=1, batch_size=2, learning_rate=1e-30,
        student={"kind": "lora", "rank": 2}, distribution_matching={"gan_weight": 0},
        check_memory=False, probe={"every": 1, "prompts": 1, "images": 1},
    )  # fmt: skip
    prompts = [{"id": "0", "prompt": "cat"}]
    (data / "check_prompts.json").write_text(json.dumps(prompts))
    out = distill(tiny_folder, tmp_path / "out", config, lambda line: None)
    assert len(jobs) == 1 and (out / "grids" / "step-000001.png").is_file()
    old, new = (open_pipeline(p).unet.state_dict() for p in (tiny_folder, out))
    assert all(torch.equal(new[k], old[k].half().float()) for k in old)
    same = frozen_in(jobs[0].pipe.vae, "fp32")
    assert {p.dtype for p in same.parameters()} == {torch.float32}


def test_the_eight_bit_optimiser_is_imported_only_when_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After diffusers, which breaks where torchao's quantisers are imported first."""
    from taiji.train.session import _optimizer
    from taiji.train.settings import LoopConfig

    layer = torch.nn.Linear(4, 4)
    config = LoopConfig(steps=1, optimizer="adamw8bit", learning_rate=0.5)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ImportError, match="pip install torchao"):
        _optimizer(layer, "", config)
    given: list[Any] = []

    class AdamW8bit(torch.optim.AdamW):
        def __init__(self, groups: Any, **settings: Any) -> None:
            given.append(settings)
            super().__init__(groups, **settings)

    optim: Any = types.ModuleType("torchao.optim")
    optim.AdamW8bit = AdamW8bit
    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.optim", optim)
    assert isinstance(_optimizer(layer, "", config), AdamW8bit)
    assert "diffusers" in sys.modules and given[0]["lr"] == 0.5
    assert _optimizer(layer, "", config).param_groups[0]["lr_scale"] == 1.0
