"""Every Triton kernel compiles to machine code for sm_80 and sm_90, without a GPU."""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys

import pytest

import hcf_kernels.gpu
from hcf_kernels.aot import Compiled, Variant, lacking, largest_tiles, variants

MODULES = sorted({variant.name.partition(".")[0] for variant in variants()})


def test_every_module_with_kernels_is_compiled() -> None:
    names = {module.name for module in pkgutil.iter_modules(hcf_kernels.gpu.__path__)}
    assert set(MODULES) <= names


@pytest.mark.parametrize("module", MODULES)
def test_machine_code_has_no_spills_and_what_it_needs(module: str) -> None:
    # in a process of its own: here Triton is an interpreter
    command = [sys.executable, "-m", "hcf_kernels.aot", "--only", f"{module}.", "--largest"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    made = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr[-2000:] or [m for m in made if m["problems"]]
    asked = [v for v in largest_tiles(variants()) if v.name.startswith(f"{module}.")]
    assert len(made) == sum(len(variant.architectures) for variant in asked)
    assert all(0 < m["registers"] <= 255 and m["shared_bytes"] <= 227 * 1024 for m in made)


def test_of_each_form_the_largest_tile_is_taken() -> None:
    names = ["a.b_64x64", "a.b_128x64", "a.c_32x32", "a.b_128x64_split", "conv3x3.sum"]
    kept = largest_tiles(Variant(name, None, {}, {}) for name in names)
    assert [v.name for v in kept] == ["a.b_128x64", "a.c_32x32", "a.b_128x64_split", "conv3x3.sum"]


def test_what_is_missing_is_named() -> None:
    variant = Variant("x.y", None, {}, {}, expect={90: ("HGMMA",), 80: ("HMMA",)})
    made = Compiled("x.y", "sm_90", 64, 0, 8, 3, {"HMMA": 4})
    assert lacking(variant, made) == ["no HGMMA", "3 spills"]
    assert lacking(variant, Compiled("x.y", "sm_80", 64, 0, 0, 0, {"HMMA": 4})) == []
