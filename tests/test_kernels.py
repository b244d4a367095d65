"""What every operator of hcf_kernels has: reference, CPU, fake and CUDA form, a plan, test, row."""

from __future__ import annotations

import pkgutil
import re
from importlib import import_module
from pathlib import Path

import pytest

import hcf_kernels.gpu
from hcf_kernels import MODULES

ROOT = Path(__file__).parents[1]
# their variants share the plan of the plain form
WITHOUT_PLAN = {
    "group_norm_silu_quantized", "layer_norm_quantized", "layer_norm_per_token",
    "guidance_multistep",
}  # fmt: skip


def test_every_operator_is_listed() -> None:
    texts = [p.read_text(encoding="utf-8") for p in (ROOT / "kernels/hcf_kernels").glob("*.py")]
    written = {op for text in texts for op in re.findall(r'custom_op\(\s*"hcf::(\w+)"', text)}
    assert written == set(MODULES)


@pytest.mark.parametrize("op", MODULES)
def test_an_operator_has_all_it_needs(op: str) -> None:
    module = import_module(f"hcf_kernels.{MODULES[op]}")
    made = getattr(module, op)
    assert {None, "cuda"} <= set(made._backend_fns) and made._abstract_fn is not None
    assert callable(getattr(module, f"{op}_ref"))
    tests = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests").glob("test_*.py"))
    assert re.search(rf"opcheck\(\s*[\w.]*{op}\b", tests) or op in tests
    assert f"`{op}`" in (ROOT / "kernels/README.md").read_text(encoding="utf-8")


def test_every_operator_can_be_planned() -> None:
    planned = {
        op
        for module in pkgutil.iter_modules(hcf_kernels.gpu.__path__)
        for op in getattr(import_module(f"hcf_kernels.gpu.{module.name}"), "PLANS", ())
    }
    assert planned == set(MODULES) - WITHOUT_PLAN
