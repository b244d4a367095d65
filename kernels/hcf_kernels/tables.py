"""Which variant and tile sizes a kernel takes for a shape: measured tables, or a stated default.

tables/<sm>.json, one a compute capability, written by `hcf bench kernels --tune`:

    {"device": ..., "date": ..., "torch": ..., "triton": ..., "ops": {op: {key: configuration}}}

A key is the operator's own text of the shape and dtype. A shape without an entry takes the default
that its operator states, which the interpreter's tests run; never something untried.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Config = dict[str, Any]
FOLDER = Path(__file__).parent / "tables"


def shape_key(*parts: Any) -> str:
    """2x320x64x64-nhwc-bf16 from (2, 320, 64, 64), "nhwc", torch.bfloat16."""
    return "-".join(_word(part) for part in parts)


def find_config(op: str, key: str, default: Config, device: torch.device) -> Config:
    """The measured configuration of `key` on this GPU; `default` where there is none."""
    if device.type != "cuda":
        return default
    return load_table(capability(device)).get(op, {}).get(key, default)


def capability(device: torch.device) -> str:
    """sm_90 of a CUDA device."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@dataclass(frozen=True)
class Plan:
    """How one call can be run: its key in the table, what may be tried, and how to run one.

    `candidates`: the default first. Each module of `hcf_kernels.gpu` has `PLANS`, {operator: a
    function from its arguments to a Plan}; `run` launches the kernel itself, without the operator.
    """

    key: str
    candidates: list[Config]
    run: Callable[[Config], Any]


@functools.cache
def load_table(sm: str) -> dict[str, dict[str, Config]]:
    """{op: {key: configuration}} of a compute capability; empty where none was measured."""
    path = FOLDER / f"{sm}.json"
    if not path.is_file():
        return {}
    found: dict[str, dict[str, Config]] = json.loads(path.read_text(encoding="utf-8"))["ops"]
    return found


def _word(part: Any) -> str:
    if isinstance(part, torch.dtype):
        return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(
            name := str(part).removeprefix("torch."), name
        )
    if isinstance(part, tuple | list | torch.Size):
        return "x".join(str(size) for size in part)
    return str(part)
