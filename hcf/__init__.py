"""HCF: makes a text-to-image diffusion model fast, and shows that it is still good.

`import hcf` loads no torch: `load`, `accelerate`, `fuse` and `unfuse` are fetched when first used.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hcf.fuse import fuse as fuse
    from hcf.fuse import unfuse as unfuse
    from hcf.load import accelerate as accelerate
    from hcf.load import load as load

    __version__: str

__all__ = ["__version__", "accelerate", "fuse", "load", "unfuse"]

MODULES = {"load": "load", "accelerate": "load", "fuse": "fuse", "unfuse": "fuse"}


def __getattr__(name: str) -> Any:
    if name in MODULES:
        import importlib

        return getattr(importlib.import_module(f"hcf.{MODULES[name]}"), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("hcf-toolkit")
    raise AttributeError(f"module 'hcf' has no attribute '{name}'")


class _Package(ModuleType):
    """Keeps `hcf.load(...)` and `hcf.fuse(...)` callable after Python binds the submodules."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("load", "fuse") and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
