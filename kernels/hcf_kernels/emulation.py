"""CUDA C++ kernels of `csrc/` run on the CPU, thread by thread: what tests prove them by.

A C++ compiler makes a library of a kernel's own source with the intrinsics of csrc/emulate.h, which
says what is checked on the way. A thread is a fibre: a block of 384 takes milliseconds.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

from hcf_kernels.build import SOURCES, Defines

# when bulk tensor copies arrive: at once, when nothing else can run, at times drawn from the seed
EAGER, LATE, RANDOM = 0, 1, 2


class Launch(ctypes.Structure):
    """Launch of csrc/emulate.h."""

    _fields_ = [
        (name, ctypes.c_int)
        for name in ("blocks", "threads", "cluster", "shared_bytes", "timing", "seed")
    ]


class Emulated:
    """csrc/<stem>.cu with its definitions as a library in `output`."""

    def __init__(self, stem: str, defines: Defines, output: Path, folder: Path = SOURCES) -> None:
        compiler = shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            raise RuntimeError("kernels are emulated through a C++ compiler: install g++")
        library = output / f"{stem}-{len(list(output.iterdir()))}.so"
        command = [compiler, "-std=c++17", "-Og", "-shared", "-fPIC", "-w", "-DHCF_EMULATE"]
        command += [f"-D{name}={value}" for name, value in defines.items()]
        command += ["-x", "c++", str(folder / f"{stem}.cu"), "-o", str(library)]
        subprocess.run(command, check=True)
        self._run = ctypes.CDLL(str(library)).emulate
        self._run.restype = ctypes.c_char_p

    def run(self, launch: Launch, *arguments: Any) -> None:
        """AssertionError with what the emulation found wrong."""
        failure = self._run(launch, *arguments)
        assert failure is None, failure.decode()
