"""Which TensorRT is installed, and what it and a GPU can build."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from hcf.errors import HcfError, MissingDependency, RecipeError

Driver = Literal["tensorrt", "tensorrt_rtx"]
DRIVERS: dict[Driver, str] = {"tensorrt": "trt", "tensorrt_rtx": "trt-rtx"}  # module: our extra
NEEDED: dict[Driver, tuple[int, ...]] = {"tensorrt": (10, 12), "tensorrt_rtx": (1, 2)}
# the compute capability from which a GPU has arithmetic in a type, and what has it
ARITHMETIC = {"fp8": (89, "Ada, Hopper and later"), "bf16": (80, "Ampere and later")}


def package(driver: Driver | None = None) -> tuple[Driver, Any]:
    """The driver and its module; without a name the first that is installed.

    Raises MissingDependency where the package, or a library it loads, is not there or is too old.
    """
    wanted: Sequence[Driver] = [driver] if driver else list(DRIVERS)
    failures: list[str] = []
    fix = f"pip install 'hcf-toolkit[{DRIVERS[driver] if driver else 'trt-rtx'}]'"
    for name in wanted:
        try:
            module = importlib.import_module(name)
            module.Builder  # noqa: B018  (a lean runtime, or a namespace left behind, has none)
        except (ImportError, AttributeError, OSError) as error:
            failures.append(f"{name}: {error}")
            continue
        least = ".".join(str(part) for part in NEEDED[name])
        if numbers(str(module.__version__)) >= NEEDED[name]:
            return name, module
        failures.append(f"{name} {module.__version__} is installed, {least} or newer is needed")
        fix = f"pip install --upgrade '{name.replace('_', '-')}>={least}'"
    raise MissingDependency("the tensorrt engine needs a TensorRT package: " + "; ".join(failures),
                            fix=fix)  # fmt: skip


def version(driver: Driver | None = None) -> str:
    """Version of the package behind `driver`, e.g. "tensorrt_rtx 1.7.1.116"."""
    name, trt = package(driver)
    return f"{name} {trt.__version__}"


def numbers(text: str) -> tuple[int, ...]:
    """The numbers of a version: "10.12.0.36" -> (10, 12, 0, 36)."""
    return tuple(int(part) for part in re.findall(r"\d+", text))


def timing_cache_path(driver: Driver, number: str, target: str) -> Path:
    """Where timings are kept unless an option says otherwise: one file a version and GPU."""
    from hcf.artifact import hcf_home

    return hcf_home() / "timing" / f"{driver}-{number}-{target}.cache"


def target_of(driver: Driver, trt: Any, capability: str | None) -> str:
    """ "8.0" or "sm80" -> "sm80"; the GPU here if None."""
    here = None
    if torch.cuda.is_available():
        here = "sm{}{}".format(*torch.cuda.get_device_capability())
    if capability is None:
        if here is None:
            raise MissingDependency(
                "there is no GPU here to build for", fix='name one: compute_capability "8.0"'
            )
        wanted = here
    else:
        wanted = "sm" + capability.lower().removeprefix("sm").replace(".", "").strip("_")
    if not hasattr(trt, "ComputeCapability"):
        if wanted != here:
            raise MissingDependency(
                f"{driver} builds only for the GPU it runs on (here {here}), not for {wanted}",
                fix="build on that GPU, or use driver tensorrt_rtx",
            )
        return wanted
    known = [name.lower() for name in dir(trt.ComputeCapability) if name.startswith("SM")]
    if wanted not in known:
        raise RecipeError(
            f"{driver} {trt.__version__} does not build for {wanted}",
            fix=f"its targets are {', '.join(known)}",
        )
    return wanted


def require_hardware(graph: Path, parsed: Mapping[str, str], target: str) -> None:
    """Raises HcfError for a type that the target's arithmetic does not have."""
    have = int(target.removeprefix("sm"))
    for precision, (needed, who) in ARITHMETIC.items():
        count = sum(kind == precision for kind in parsed.values())
        if count and have < needed:
            raise HcfError(
                f"{graph.name} has {count} layers in {precision}; a plan for {target} cannot have "
                f"them: {precision} needs sm{needed} or newer ({who})",
                fix="quantise with quantize.format int8 for this GPU, or build for a newer one"
                if precision == "fp8"
                else "use precision fp16",
            )
