"""The precision to train in, which `auto` leaves to the device."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

# torch multiplies bfloat16 on any other processor too, many times as slowly as float32
CPU_BF16 = ("avx512_bf16", "amx_bf16", "bf16")


def has_bf16(device_type: str) -> bool:
    """Whether this machine's `cuda` device or its `cpu` has bfloat16 arithmetic.

    A processor is taken not to have it where torch does not say (`torch.cpu.get_capabilities`).
    """
    import torch

    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in CPU_BF16)


def fastest_precision() -> Literal["fp32", "bf16"]:
    """bf16 where the device that a run trains on has it."""
    import torch

    return "bf16" if has_bf16("cuda" if torch.cuda.is_available() else "cpu") else "fp32"


def _resolved(value: Any) -> Any:
    return fastest_precision() if value == "auto" else value


# "auto" becomes what it stands for when the settings are read, so that keys, checkpoints and
# records have the precision that ran
TrainingPrecision = Annotated[Literal["fp32", "bf16"], BeforeValidator(_resolved)]
