"""HCF: makes a text-to-image diffusion model fast, and shows that it is still good.

`import hcf` loads no torch: `load` and `accelerate` are fetched when they are first used.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hcf.load import accelerate as accelerate
    from hcf.load import load as load

    __version__: str

__all__ = ["__version__", "accelerate", "load"]


def __getattr__(name: str) -> Any:
    if name in ("load", "accelerate"):
        import importlib

        return getattr(importlib.import_module("hcf.load"), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("hcf-toolkit")
    raise AttributeError(f"module 'hcf' has no attribute '{name}'")


class _Package(ModuleType):
    """Keeps `hcf.load(...)` callable after Python binds the submodule hcf/load.py to that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "load" and isinstance(value, ModuleType):
            value = value.load
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
