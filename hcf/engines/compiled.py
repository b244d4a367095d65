"""torch.compile with inductor: one compilation a shape, at its first call: 30 s for a U-Net."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hcf.engines import check_precision
from hcf.engines.eager import EagerEngine, cast_inputs
from hcf.errors import HcfError, MissingDependency


class CompiledEngine(EagerEngine):
    """The eager engine's module through inductor; needs a C++ compiler at run time."""

    def __init__(self, pipe: Any, component: str, names: Sequence[str], precision: str) -> None:
        check_precision("compile", precision)
        require_compiler()
        super().__init__(pipe, component, names, precision)
        self.compiled = torch.compile(self.module, fullgraph=True, dynamic=False)
        self.report = replace(
            self.report, engine="compile", provider=f"inductor {self.report.provider}"
        )

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        try:
            with torch.no_grad():
                out = self.compiled(*cast_inputs(inputs, self.names, self.dtype))
        except torch._dynamo.exc.TorchDynamoException as error:
            raise HcfError(
                f"torch.compile failed on {self.report.component}: {error}",
                fix="use another engine",
            ) from error
        return {self.output: out.float().contiguous()}


def require_compiler() -> None:
    """Raises MissingDependency without a C++ compiler."""
    if shutil.which(os.environ.get("CXX", "g++")) is None and shutil.which("clang++") is None:
        raise MissingDependency(
            "the compile engine needs a C++ compiler, and there is no g++ or clang++ on PATH",
            fix="apt install g++, or use another engine",
        )
