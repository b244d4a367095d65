"""Peers: other ways to run the same module, each behind one small adapter.

A peer says why it cannot run here, prepares a case once, and reports what really runs, read back
from the runtime. It raises rather than run something else than it was asked for.
"""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hcf.errors import MissingDependency, RecipeError

if TYPE_CHECKING:
    from torch import Tensor

    from hcf_bench.workloads import Case

Check = Callable[[str], str]  # device -> "" or why not


@dataclass(frozen=True)
class PeerOptions:
    """Where and how to run. Exported graphs and engines go into `folder`, which may be shared by
    the peers of one run."""

    device: str
    threads: int
    folder: Path


@dataclass(frozen=True)
class Prepared:
    """`run` does the work of one sample and returns its output (tensor or array); its time is
    divided by `forwards`. `report` is what runs; some of it is known only after the first run."""

    run: Callable[[], Any]
    forwards: int = 1
    report: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Peer:
    """One way to run a case that was built in `dtype`.

    `min_sqnr_db` bounds the output against eager fp32, -inf where the method is lossy by design.
    `missing(device)` is "" or why it cannot run there. `prepare` takes the case over: it may change
    or empty its module. `components` empty means any.
    """

    name: str
    dtype: str
    min_sqnr_db: float
    devices: tuple[str, ...]
    kinds: tuple[str, ...]
    missing: Check
    prepare: Callable[[Case, PeerOptions], Prepared]
    prepare_pipeline: Callable[[Any, PeerOptions], dict[str, Any]] | None = None
    components: tuple[str, ...] = ()


def find_peer(name: str) -> Peer:
    """The peer of that name; RecipeError with the nearest ones for a name that is none."""
    if name in PEERS:
        return PEERS[name]
    near = difflib.get_close_matches(name, PEERS, 3, 0.4)
    fix = f"did you mean {' or '.join(near)}?" if near else f"use one of {', '.join(PEERS)}"
    raise RecipeError(f"there is no peer {name!r}", fix)


def missing_unless(devices: Sequence[str], *checks: Check) -> Check:
    """`Peer.missing`: the first reason of device and `checks`, in that order."""

    def missing(device: str) -> str:
        kind = device.partition(":")[0]
        if kind not in devices:
            return f"runs on {' and '.join(devices)}, not on {kind}"
        if kind == "cuda":
            import torch

            if not torch.cuda.is_available():
                return "no CUDA device: torch finds none"
        return next(filter(None, (check(device) for check in checks)), "")

    return missing


def installed(package: str, pip: str) -> Check:
    """A check for an importable package; the reason has the line that installs it."""

    def check(device: str) -> str:
        return "" if find_spec(package) else f"{package} is not installed: pip install '{pip}'"

    return check


def import_package(name: str, pip: str) -> Any:
    """An optional package; MissingDependency with the pip line without it."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise MissingDependency(
            f"{name} cannot be imported: {error}", fix=f"pip install '{pip}'"
        ) from error


def sqnr_db(wanted: Tensor, found: Tensor) -> float:
    """10 log10(sum wanted^2 / sum (found - wanted)^2): inf where equal, nan where not finite."""
    wanted, found = wanted.detach().double().cpu(), found.detach().double().cpu()
    noise = float((found - wanted).square().sum())
    power = float(wanted.square().sum())
    if not (math.isfinite(noise) and math.isfinite(power)):
        return math.nan
    if noise == 0:
        return math.inf
    return 10 * math.log10(power / noise) if power else -math.inf


def _all_peers() -> dict[str, Peer]:
    # here, because the adapters import this module's classes
    from hcf_bench.peers import (
        compiled,
        deepcache,
        eager,
        fused,
        onnxruntime,
        openvino,
        own,
        tensorrt,
        torchao,
    )

    adapters = (eager, compiled, fused, torchao, onnxruntime, openvino, own, tensorrt, deepcache)
    return {peer.name: peer for adapter in adapters for peer in adapter.ADAPTED}


PEERS = _all_peers()
