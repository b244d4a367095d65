"""How fast a run goes: samples a second, the share of time spent waiting for data, and MFU.

MFU is the model's floating point operations (2 a multiply-accumulate; forward and backward, no
optimiser) a second over what the device can do at most. Recomputation of gradient checkpointing
counts as work where the operations are counted rather than given.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

# Dense peak TFLOP/s, from the vendor's data sheets (without sparsity): bf16 with fp32 accumulation,
# and fp32 as torch runs it by default (no TF32).
PEAK_TFLOPS: dict[str, tuple[float, float]] = {
    "A100": (312.0, 19.5),
    "H100 PCIe": (756.0, 51.0),
    "H100": (989.4, 67.0),
    "H200": (989.4, 67.0),
    "H800": (989.4, 67.0),
    "A800": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.0, 35.6),
}


class FlopCounter(TorchDispatchMode):
    """Sums the FLOPs of every operator below it, backward included.

    torch's own FlopCounterMode also follows modules with hooks, which change what a step does;
    this changes nothing, so that a counted step and any other are bit for bit the same.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        elif packet is _CPU_ATTENTION:
            self.flops += sdpa_flop_count(*(x.shape for x in args[:3]))
        elif packet is _CPU_ATTENTION_BACKWARD:
            self.flops += sdpa_backward_flop_count(*(x.shape for x in args[:4]))
        return out


# Attention on a processor, which the registry lacks.
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """Peak FLOP/s and where the figure is from: the table for a known GPU, a GEMM for the rest."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for key, (bf16, fp32) in PEAK_TFLOPS.items():
            if key in name or key.replace(" ", "-") in name:
                return (bf16 if precision == "bf16" else fp32) * 1e12, f"data sheet, {key}"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return measured_gemm(str(device), dtype), "measured GEMM"


@cache
def measured_gemm(device: str, dtype: torch.dtype, size: int = 1024, calls: int = 5) -> float:
    """FLOP/s of the fastest of a few square products on `device`."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(size, size, generator=generator).to(device, dtype)
    best = float("inf")
    for _ in range(calls + 1):  # the first warms up
        begun = time.perf_counter()
        a @ a
        if a.is_cuda:
            torch.cuda.synchronize(a.device)
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


@dataclass
class Meter:
    """Times the steps since the last reading. The first step of a run only warms up."""

    samples_per_step: int
    flops_per_sample: float | None
    warm: bool = False
    steps: int = 0
    waited: float = 0.0
    begun: float = field(default_factory=time.perf_counter)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.waited += time.perf_counter() - begun

    def step_done(self) -> None:
        if self.warm:
            self.steps += 1
        else:
            self.warm, self.steps = True, 0
            self._restart()

    def read(self, peak: float) -> dict[str, float]:
        """Figures since the last reading; none before the second step of a run.

        `peak` is that of all devices together, FLOP/s.
        """
        if self.steps == 0:
            return {}
        seconds = time.perf_counter() - self.begun
        rate = self.steps * self.samples_per_step / seconds
        found = {"img_per_s": rate, "data_wait": self.waited / seconds}
        if self.flops_per_sample:
            found["mfu"] = rate * self.flops_per_sample / peak
        self.steps = 0
        self._restart()
        return found

    def _restart(self) -> None:
        self.waited, self.begun = 0.0, time.perf_counter()


def given_flops(objective: nn.Module) -> float | None:
    """FLOPs of one sample, forward and backward, where the objective states them."""
    value: Any = getattr(objective, "flops_per_sample", None)
    return None if value is None else float(value)


def describe_speed(speed: dict[str, float]) -> str:
    if not speed:
        return ""
    text = f" | {speed['img_per_s']:.1f} img/s, data wait {speed['data_wait']:.0%}"
    return text + (f", mfu {speed['mfu']:.1%}" if "mfu" in speed else "")
