"""torch.compile with inductor: the whole component, or only its repeated blocks.

full        one graph, the fastest code; a U-Net takes half a minute and more at its first call
regional    the blocks a model repeats (diffusers' `_repeated_blocks`), compiled once for all of
            them: starts in a fraction of the time, the rest stays eager
Shapes are static unless `dynamic`: a new shape compiles again, and after `RECOMPILE_LIMIT` shapes
torch would go on uncompiled in silence; here that is an error.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hcf.engines import check_precision
from hcf.engines.eager import EagerEngine, cast_inputs, named_outputs
from hcf.errors import HcfError, MissingDependency

RECOMPILE_LIMIT = 64  # a regional compilation has one for each width and resolution


class CompiledEngine(EagerEngine):
    """The eager engine's module through inductor; needs a C++ compiler at run time.

    `mode` "full" or "regional". Raises HcfError for a regional compilation of a model that names
    no repeated blocks.
    """

    def __init__(
        self,
        pipe: Any,
        component: str,
        names: Sequence[str],
        precision: str,
        device: str = "cpu",
        mode: str = "full",
        dynamic: bool = False,
    ) -> None:
        check_precision("compile", precision)
        require_compiler()
        super().__init__(pipe, component, names, precision, device)
        if mode == "regional":
            blocks = repeated_blocks(self.module)
            if not blocks:
                raise HcfError(
                    f"{component} is a {type(_inner(self.module)).__name__}, which names no "
                    "repeated blocks to compile",
                    fix="set build.compile_mode to full",
                )
            self.module = structural_copy(self.module)
            for block in self.module.modules():
                if type(block).__name__ in blocks:
                    block.compile(fullgraph=True, dynamic=dynamic)
            self.compiled: Callable[..., Any] = self.module
        else:
            blocks = ()
            self.compiled = torch.compile(self.module, fullgraph=True, dynamic=dynamic)
        self.report = replace(
            self.report,
            engine="compile",
            provider=f"inductor {self.report.provider}",
            details={"mode": mode, "dynamic": dynamic, "blocks": sorted(blocks)},
        )

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        try:
            with (
                torch.no_grad(),
                torch._dynamo.config.patch(
                    recompile_limit=RECOMPILE_LIMIT, fail_on_recompile_limit_hit=True
                ),
            ):
                out = self.compiled(*cast_inputs(inputs, self.names, self.dtype, self.device))
        except (
            torch._dynamo.exc.TorchDynamoException,
            torch._dynamo.exc.FailOnRecompileLimitHit,
        ) as error:
            raise HcfError(
                f"torch.compile failed on {self.report.component}: {error}",
                fix="use another engine, or build.compile_dynamic for many shapes",
            ) from error
        return named_outputs(self.outputs, out)


def repeated_blocks(module: nn.Module) -> tuple[str, ...]:
    """Class names that the model of a component says it repeats, those that it has."""
    named: set[str] = set()
    for part in module.modules():
        named |= set(getattr(part, "_repeated_blocks", None) or ())
    return tuple(sorted(named & {type(part).__name__ for part in module.modules()}))


def structural_copy(module: nn.Module) -> nn.Module:
    """A second tree of modules over the same parameters and buffers."""
    shared = (*module.parameters(), *module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in shared})


def require_compiler() -> None:
    """Raises MissingDependency without a C++ compiler."""
    if shutil.which(os.environ.get("CXX", "g++")) is None and shutil.which("clang++") is None:
        raise MissingDependency(
            "the compile engine needs a C++ compiler, and there is no g++ or clang++ on PATH",
            fix="apt install g++, or use another engine",
        )


def _inner(module: nn.Module) -> nn.Module:
    """The model that a component's wrapper holds."""
    return next(module.children(), module)
