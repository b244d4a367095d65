"""CUDA C++ kernels of `csrc/`: compiled to machine code by NVRTC, kept, loaded and launched.

    python -m hcf_kernels.build --arch 80 --arch 90a --out cubin > report.json

Nothing is compiled before a kernel is first asked for, and what was compiled is kept:

    hcf_kernels/cubin/<stem>-<arch>-<key>.cubin    by `build_all` ahead of time, looked at first
    $HCF_HOME/cubin/<stem>-<arch>-<key>.cubin      default $XDG_CACHE_HOME/hcf, ~/.cache/hcf

The key of the first is of the source, its headers and the definitions; that of the second of the
compiler's version too. Compiling needs no GPU and no driver, launching needs only the driver.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hcf_kernels.aot import inspect_cubin

SOURCES = Path(__file__).parent / "csrc"
AHEAD = Path(__file__).parent / "cubin"
PIP = "pip install 'hcf-toolkit[cuda]'"
INCLUDE = re.compile(r'^#include "([^"]+)"', re.MULTILINE)
# of what NVRTC and ptxas say, the lines that a kernel must not have
COMPLAINT = re.compile(r"warning|Potential Performance Loss|setmaxnreg ignored", re.IGNORECASE)
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

Defines = Mapping[str, str | int]


@dataclass(frozen=True)
class Build:
    """A kernel of one source with its definitions, for one architecture (sm_80, sm_90a).

    `shared_bytes`: the dynamic shared memory it is launched with. `expect`: instructions that its
    machine code must hold.
    """

    stem: str
    arch: str
    defines: dict[str, str | int] = field(default_factory=dict)
    shared_bytes: int = 0
    expect: tuple[str, ...] = ()


def compile_source(stem: str, arch: str, defines: Defines) -> bytes:
    """cubin of csrc/<stem>.cu: ahead of time, kept, or made now.

    Raises ImportError with the pip line where it has to be made and cuda.core is not there,
    RuntimeError with the compiler's log where it does not compile.
    """
    ahead = AHEAD / f"{stem}-{arch}-{source_key(stem, arch, defines)}.cubin"
    if ahead.is_file():
        return ahead.read_bytes()
    kept = cache_folder() / f"{stem}-{arch}-{compiled_key(stem, arch, defines)}.cubin"
    if kept.is_file():
        return kept.read_bytes()
    cubin, _ = compile_now(stem, arch, defines)
    write_whole(kept, cubin)
    return cubin


def compile_now(stem: str, arch: str, defines: Defines) -> tuple[bytes, list[str]]:
    """(cubin, complaints of the compiler), without looking at what was kept."""
    core, _ = _compiler()
    log = io.StringIO()
    options = core.ProgramOptions(
        name=f"{stem}.cu",
        std="c++17",
        arch=arch,
        include_path=[str(SOURCES)],
        define_macro=[(name, str(value)) for name, value in defines.items()] or None,
    )
    source = (SOURCES / f"{stem}.cu").read_text(encoding="utf-8")
    try:
        made = core.Program(source, "c++", options).compile("cubin", logs=log)
    except Exception as error:
        raise RuntimeError(
            f"{stem}.cu does not compile for {arch} with {dict(defines)}: {error}\n{log.getvalue()}"
        ) from error
    lines = log.getvalue().replace("\0", "").splitlines()
    return bytes(made.code), [line.strip() for line in lines if COMPLAINT.search(line)]


def source_key(stem: str, arch: str, defines: Defines) -> str:
    """Of everything that the machine code is made of but the compiler."""
    digest = hashlib.sha256(f"{arch} {sorted((k, str(v)) for k, v in defines.items())}".encode())
    for path in _files(f"{stem}.cu"):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:20]


def compiled_key(stem: str, arch: str, defines: Defines) -> str:
    """`source_key` and the version of NVRTC."""
    _, version = _compiler()
    return hashlib.sha256(f"{source_key(stem, arch, defines)} {version}".encode()).hexdigest()[:20]


@functools.cache
def _files(name: str) -> tuple[Path, ...]:
    """A source and the headers that it includes, itself or through others."""
    found: dict[Path, None] = {}
    waiting = [SOURCES / name]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found[path] = None
        names = INCLUDE.findall(path.read_text(encoding="utf-8"))
        # what only tests include changes no machine code
        waiting += [SOURCES / name for name in names if not name.startswith("emulate")]
    return tuple(sorted(found))


@functools.cache
def _compiler() -> tuple[Any, tuple[int, int]]:
    """(cuda.core, version of NVRTC); ImportError with the pip line."""
    try:
        import cuda.core as core
        from cuda.bindings import nvrtc

        core.ProgramOptions  # noqa: B018  an older cuda.core has it elsewhere
        _, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, AttributeError) as error:
        raise ImportError(f"CUDA C++ kernels are compiled with cuda.core 1.2: {PIP}") from error
    return core, (int(major), int(minor))


def cache_folder() -> Path:
    """$HCF_HOME/cubin, else under $XDG_CACHE_HOME: where the toolkit keeps what it can remake."""
    if given := os.environ.get("HCF_HOME"):
        return Path(given).expanduser() / "cubin"
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache).expanduser() if cache else Path.home() / ".cache") / "hcf" / "cubin"


def write_whole(path: Path, content: bytes) -> None:
    """The file has all of `content` or is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# ---- launching


class Kernel:
    """A kernel in the context of one device. Arguments are ctypes values, structures included."""

    def __init__(self, cubin: bytes, name: str, shared_bytes: int, ordinal: int) -> None:
        self.name, self.shared_bytes = name, shared_bytes
        # the driver reads the code later too, as it needs it
        self._cubin, self._module = cubin, ctypes.c_void_p()
        self._function, self._context = ctypes.c_void_p(), ctypes.c_void_p()
        cuda = driver()
        check(cuda.cuInit(0), "starting the driver")
        # torch's own context: what the runtime does by itself, calls to the driver do not
        check(
            cuda.cuDevicePrimaryCtxRetain(ctypes.byref(self._context), ordinal),
            f"the context of device {ordinal}",
        )
        check(cuda.cuCtxSetCurrent(self._context), f"device {ordinal}")
        check(cuda.cuModuleLoadData(ctypes.byref(self._module), cubin), f"loading {name}")
        check(
            cuda.cuModuleGetFunction(ctypes.byref(self._function), self._module, name.encode()),
            f"finding {name}",
        )
        check(
            cuda.cuFuncSetAttribute(self._function, MAX_DYNAMIC_SHARED, shared_bytes),
            f"{shared_bytes} bytes of shared memory for {name}",
        )

    def launch(
        self, blocks: int, threads: int, stream: int, *arguments: Any,
        shared_bytes: int | None = None,
    ) -> None:  # fmt: skip
        """One-dimensional grid on a stream of the device, which is torch's current one.

        shared_bytes: less than the kernel was loaded with.
        """
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        cuda = driver()
        check(cuda.cuCtxSetCurrent(self._context), f"launching {self.name}")
        done = cuda.cuLaunchKernel(
            self._function, blocks, 1, 1, threads, 1, 1,
            self.shared_bytes if shared_bytes is None else shared_bytes,
            ctypes.c_void_p(stream), pointers, None,
        )  # fmt: skip
        check(done, f"launching {self.name}")


_loaded: dict[tuple[Any, ...], Kernel] = {}


def load(stem: str, arch: str, device: Any, defines: Defines, shared_bytes: int = 0) -> Kernel:
    """The kernel <stem> of csrc/<stem>.cu on a torch device, compiled when it was not yet.

    Raises RuntimeError with the needed and found capability where `arch` does not run there.
    """
    import torch

    key = (stem, arch, device.index, tuple(sorted(defines.items())), shared_bytes)
    if key not in _loaded:
        require(stem, arch, torch.cuda.get_device_capability(device))
        cubin = compile_source(stem, arch, defines)
        with torch.cuda.device(device):
            _loaded[key] = Kernel(cubin, stem, shared_bytes, device.index)
    return _loaded[key]


def require(stem: str, arch: str, found: tuple[int, int]) -> None:
    """RuntimeError unless machine code of `arch` runs on capability `found`."""
    number = arch.removeprefix("sm_")
    major, minor = int(number.rstrip("a")[:-1]), int(number.rstrip("a")[-1])
    exact = number.endswith("a")
    if found == (major, minor) or (not exact and found[0] == major and found[1] > minor):
        return
    needed = f"exactly {major}.{minor}" if exact else f"{major}.{minor} to {major}.9"
    raise RuntimeError(
        f"{stem} for {arch} needs compute capability {needed}, this GPU has {found[0]}.{found[1]}"
    )


@functools.cache
def driver() -> Any:
    """NVIDIA's driver; RuntimeError where there is none.

    Called through ctypes: tensor maps must lie at multiples of 64 bytes, which Python's own
    objects do not, and code made ahead of time then needs no package to run.
    """
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise RuntimeError("CUDA C++ kernels need NVIDIA's driver; found none") from error


def check(status: int, what: str) -> None:
    """RuntimeError with the driver's own word for a status that is not success."""
    if status == 0:
        return
    text = ctypes.c_char_p()
    driver().cuGetErrorString(status, ctypes.byref(text))
    raise RuntimeError(f"{what}: {(text.value or b'unknown').decode()} ({status})")


# ---- ahead of time


def builds() -> Iterator[Build]:
    """What is compiled ahead of time."""
    from hcf_kernels.gpu import cuda_gemm, cuda_group_norm

    yield from cuda_gemm.BUILDS
    yield from cuda_group_norm.BUILDS


def build_all(folder: Path, architectures: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Compiles all into `folder`; a report of each, `problems` empty where it is as it should be.

    architectures: sm_80, sm_90a, ...; all where none is given.
    """
    return [
        build_one(build, folder)
        for build in builds()
        if not architectures or build.arch in architectures
    ]


def build_one(build: Build, folder: Path | None) -> dict[str, Any]:
    """Compiles one, into `folder` if given -> registers, shared memory, spills, instructions."""
    cubin, problems = compile_now(build.stem, build.arch, build.defines)
    if folder is not None:
        key = source_key(build.stem, build.arch, build.defines)
        write_whole(folder / f"{build.stem}-{build.arch}-{key}.cubin", cubin)
    name = " ".join([build.stem, *(f"{k}={v}" for k, v in build.defines.items())])
    made = inspect_cubin(name, cubin, build.arch, build.shared_bytes)
    problems += [f"no {word}" for word in build.expect if word not in made.instructions]
    problems += [f"{made.spills} spills"] if made.spills else []
    return {**asdict(made), "problems": problems}


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles all; prints one JSON object a line. 1 where one has a problem."""
    parser = argparse.ArgumentParser(prog="python -m hcf_kernels.build", description=__doc__)
    parser.add_argument("--arch", action="append", help="80, 89, 90a (default: all)")
    parser.add_argument("--out", type=Path, help="folder for the cubins")
    asked = parser.parse_args(arguments)
    wrong = 0
    for build in builds():
        if asked.arch and build.arch.removeprefix("sm_") not in asked.arch:
            continue
        report = build_one(build, asked.out)
        wrong += bool(report["problems"])
        print(json.dumps(report), flush=True)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
