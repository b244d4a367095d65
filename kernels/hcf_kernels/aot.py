"""Triton kernels compiled to cubin for a compute capability, without a GPU or a driver.

    python -m hcf_kernels.aot --arch 80 --arch 90 > report.json

Each module of `hcf_kernels.gpu` lists its kernels in `VARIANTS`; what comes back of one is what the
hardware will be asked to do: registers, shared memory, bytes spilled, and how often each matrix and
asynchronous copy instruction stands in the machine code.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import pkgutil
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import hcf_kernels.gpu

ARCHITECTURES = (80, 90)
TILE = re.compile(r"(?<=_)\d+x\d+")
# mma.sync: HMMA, IMMA, QMMA; wgmma: HGMMA, IGMMA, QGMMA; cp.async: LDGSTS; TMA: UTMALDG, UTMASTG
INSTRUCTION = re.compile(r"\b([HIQ]G?MMA|LDGSTS|UTMALDG|UTMASTG|LDSM)\b|\b(LDL|STL)\b")


@dataclass(frozen=True)
class Variant:
    """One way a kernel is compiled. `signature`: {argument: Triton type, or "constexpr"}.

    `expect`: {architecture: instructions that its machine code must hold}. `aligned`: arguments
    that are multiples of 16, as Triton sees of tensors at run time. `architectures`: those that
    have its data types (e4m3 is not on 80).
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    expect: dict[int, tuple[str, ...]] = field(default_factory=dict)
    architectures: tuple[int, ...] = ARCHITECTURES


@dataclass(frozen=True)
class Compiled:
    """What the machine code of a kernel holds. Bytes; registers of one thread."""

    name: str
    arch: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spills: int
    instructions: dict[str, int]


def variants() -> Iterator[Variant]:
    """Of every module of `hcf_kernels.gpu`."""
    for module in pkgutil.iter_modules(hcf_kernels.gpu.__path__):
        found = importlib.import_module(f"hcf_kernels.gpu.{module.name}")
        yield from getattr(found, "VARIANTS", ())


def largest_tiles(found: Iterable[Variant]) -> list[Variant]:
    """Of variants that differ by their tile alone (`..._128x256`) the largest, which holds most."""
    kept: dict[str, tuple[int, Variant]] = {}
    for variant in found:
        sides = [int(side) for side in "x".join(TILE.findall(variant.name)).split("x") if side]
        form, size = TILE.sub("", variant.name), math.prod(sides)
        if form not in kept or kept[form][0] < size:
            kept[form] = size, variant
    return [variant for _, variant in kept.values()]


def compile_variant(variant: Variant, arch: int) -> Compiled:
    """`variant` for compute capability `arch` (80, 90)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    order = list(variant.signature)
    source = ASTSource(
        fn=variant.kernel,
        signature=variant.signature,
        constexprs=variant.constants,
        attrs={(order.index(name),): [["tt.divisibility", 16]] for name in variant.aligned},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return inspect_cubin(variant.name, made.asm["cubin"], f"sm_{arch}", int(made.metadata.shared))


def inspect_cubin(name: str, cubin: bytes, arch: str, dynamic_shared: int = 0) -> Compiled:
    """Resources and instructions of a cubin's only kernel, read with CUDA's own tools."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    resources = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    found = Counter("".join(match) for match in INSTRUCTION.findall(code))
    return Compiled(
        name=name,
        arch=arch,
        registers=resources["REG"],
        shared_bytes=resources["SHARED"] + dynamic_shared,
        stack_bytes=resources["STACK"],
        spills=found.pop("LDL", 0) + found.pop("STL", 0),
        instructions=dict(sorted(found.items())),
    )


def lacking(variant: Variant, made: Compiled) -> list[str]:
    """What is wrong with the machine code: spills, and instructions that are not there."""
    wanted = variant.expect.get(int(made.arch.removeprefix("sm_").rstrip("a")), ())
    missing = [f"no {name}" for name in wanted if name not in made.instructions]
    return missing + ([f"{made.spills} spills"] if made.spills else [])


def tool(name: str) -> str:
    """Path of one of CUDA's binary tools: of its pip package, Triton's, or on the PATH.

    Raises ImportError with the pip line where there is none.
    """
    import shutil

    purelib = Path(sysconfig.get_paths()["purelib"])
    places = [purelib / "nvidia/cu13/bin", purelib / "triton/backends/nvidia/bin"]
    for place in places:
        if (place / name).is_file():
            return str(place / name)
    if (found := shutil.which(name)) is None:
        raise ImportError(f"{name} is not installed: pip install nvidia-cuda-{name}")
    return found


def _run(name: str, *arguments: str) -> str:
    done = subprocess.run([tool(name), *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles all variants; prints one JSON object a line. 1 where one lacks something."""
    parser = argparse.ArgumentParser(prog="python -m hcf_kernels.aot", description=__doc__)
    parser.add_argument("--arch", type=int, action="append", help="80, 90 (default: both)")
    parser.add_argument("--only", default="", help="variants whose name contains this")
    parser.add_argument("--largest", action="store_true", help="of each form the largest tile")
    asked = parser.parse_args(arguments)
    wrong = 0
    for variant in largest_tiles(variants()) if asked.largest else variants():
        if asked.only not in variant.name:
            continue
        for arch in variant.architectures:
            if asked.arch and arch not in asked.arch:
                continue
            made = compile_variant(variant, arch)
            problems = lacking(variant, made)
            wrong += bool(problems)
            print(json.dumps({**asdict(made), "problems": problems}), flush=True)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
