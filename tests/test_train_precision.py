"""`precision: auto` is what the device has, and a precision that it lacks is said."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from hcf.settings import DistillConfig
from taiji.train import loop
from taiji.train.loop import LoopConfig, run
from taiji.train.precision import fastest_precision

RECIPES = Path(__file__).parents[1] / "recipes"


def machine(monkeypatch: pytest.MonkeyPatch, *, gpu: bool = False, **flags: bool) -> None:
    """Settings are read as on a machine with these instruction sets, and a GPU that has bf16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: gpu)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"avx2": True, "avx512_bf16": False}, "fp32"),
        ({"avx512_bf16": True}, "bf16"),
        ({"amx_bf16": True}, "bf16"),
        ({"neon": True, "bf16": True}, "bf16"),
        ({}, "fp32"),
    ],
)
def test_auto_is_read_as_what_the_processor_has(
    monkeypatch: pytest.MonkeyPatch, flags: dict[str, bool], expected: str
) -> None:
    machine(monkeypatch, **flags)
    assert fastest_precision() == expected
    for config in (DistillConfig, LoopConfig):
        found = config.model_validate({"precision": "auto", "steps": 1})
        assert found.precision == expected  # type: ignore[attr-defined]
        assert found.model_dump()["precision"] == expected  # what keys are made of


def test_a_gpu_decides_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, gpu=True, avx2=True)
    assert fastest_precision() == "bf16"


def test_a_torch_that_does_not_say_gets_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert fastest_precision() == "fp32"


def test_what_is_named_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, avx2=True)
    assert LoopConfig(steps=1, precision="bf16").precision == "bf16"
    with pytest.raises(ValueError, match="'fp32' or 'bf16'"):
        LoopConfig.model_validate({"steps": 1, "precision": "fp16"})


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x: torch.Tensor, generator: Any) -> tuple[torch.Tensor, dict[str, float]]:
        return self.layer(x).square().mean(), {}


@pytest.mark.parametrize(
    ("precision", "has", "told"),
    [("bf16", False, True), ("bf16", True, False), ("fp32", False, False)],
)
def test_emulated_bf16_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, has: bool, told: bool
) -> None:
    monkeypatch.setattr(loop, "has_bf16", lambda device: has)
    lines: list[str] = []
    settings = {"steps": 1, "batch_size": 2, "precision": precision, "tensorboard": False}
    run(Mean(), lambda rng, count: {"x": torch.ones(count, 2)}, LoopConfig.model_validate(settings),
        tmp_path, lines.append)  # fmt: skip
    assert (loop.EMULATED in lines) is told


def precisions(tree: Any) -> set[str]:
    """Every value of `precision` in a recipe."""
    if isinstance(tree, list):
        return set().union(*map(precisions, tree))
    if not isinstance(tree, dict):
        return set()
    own = {str(v) for k, v in tree.items() if k == "precision"}
    return own.union(*map(precisions, tree.values()))


def test_recipes_for_a_processor_leave_it_the_precision() -> None:
    """Named, bf16 would take days on one that lacks it; the comparison draws on bf16 as well, and
    names its hardware."""
    paths = [
        RECIPES / "quickstart.yaml",
        *RECIPES.glob("train/*.yaml"),
        *RECIPES.glob("distill/*.yaml"),
    ]
    texts = {path: path.read_text() for path in paths}
    for_cpu = [p for p, text in texts.items() if "CPU" in text.split("\nname:")[0]]
    assert len(for_cpu) > 15
    assert {p.name for p in for_cpu if "bf16" in precisions(yaml.safe_load(texts[p]))} == {
        "compare.yaml"
    }
