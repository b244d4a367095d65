"""What a machine can reach at most, and the time that an op count needs at least.

The floor of a list of ops is the sum over ops of the larger of FLOPs / GEMM ceiling and bytes /
copy ceiling: every op takes its bytes from memory and nothing is fused across ops. The ceilings are
measured in the same run as what is compared with them, by torch's own copy and matrix product:

- copy, GB/s: one read and one write counted, buffers above the last cache. Ops whose data stays in
  a large cache can run below their floor.
- gemm-<dtype>, TFLOP/s: two FLOPs per multiply-accumulate, square x (N, N) times a transposed
  weight, as in nn.Linear. Single precision is without TF32, which cuDNN's convolutions use by
  default: on a GPU they may run below a floor in fp32.

Each ceiling is the best size by the time that the fastest tenth of its samples kept to, which other
work on the machine disturbs least.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from hcf.errors import MissingDependency, RecipeError
from hcf_bench.records import Ceiling
from hcf_bench.statistics import percentile
from hcf_bench.timing import last_cache_bytes, time_batches, time_once, torch_threads

if TYPE_CHECKING:
    from hcf_bench.opcount import OpCost

BITS: Final = {"fp32": 32, "bf16": 16, "fp16": 16, "fp8": 8, "int8": 8}
MATMULS: Final = frozenset(("conv", "linear", "attention"))
FASTEST: Final = 10  # percentile of the times that counts
FEWEST_SAMPLES: Final = 3
FEWEST_CALLS: Final = FEWEST_SAMPLES + 3  # the first, one to learn its time, one to warm up
MOST_SAMPLES: Final = 30
CPU_SIZES: Final = (1024, 2048, 4096)
GPU_SIZES: Final = (2048, 4096, 8192, 16384)
FP8_CAPABILITY: Final = (8, 9)
MIB: Final = 2**20


@dataclass(frozen=True)
class Machine:
    """Published figures of a GPU: measured ceilings as in `Ceiling`, dense datasheet peaks."""

    name: str
    ceilings: Mapping[str, float]
    peaks_tflops: Mapping[str, float]
    source: str


_ML_ENGINEERING: Final = "stas00/ml-engineering compute/accelerator"
# The sources measured bf16; fp16 runs at the same rate on both.
A100: Final = Machine(
    "A100-80GB",
    {"copy": 1750.0, "gemm-bf16": 271.2, "gemm-fp16": 271.2},
    {"bf16": 312.0, "fp16": 312.0, "int8": 624.0},
    _ML_ENGINEERING,
)
H100: Final = Machine(
    "H100",
    {"copy": 3000.0, "gemm-bf16": 794.5, "gemm-fp16": 794.5, "gemm-fp8": 1402.6},
    {"bf16": 989.0, "fp16": 989.0, "fp8": 1979.0, "int8": 1979.0},
    f"{_ML_ENGINEERING}; copy: Dao-AILab/quack",
)
MACHINES: Final = {"A100": A100, "A100-80GB": A100, "H100": H100}


def floor_ms(ops: Sequence[OpCost], ceilings: Mapping[str, float], dtype: str) -> float:
    """Sum over ops of max(FLOPs / GEMM ceiling, bytes / copy ceiling), milliseconds.

    Args:
        ops: counted in the dtype that everything but the matmuls has.
        ceilings: "copy" in GB/s and "gemm-<dtype>" in TFLOP/s.
        dtype: of the matmuls (convolutions, linear layers, attention); where it is not the one
            they were counted in, their bytes are scaled to its width.

    Raises:
        RecipeError: an unknown dtype, or no ceiling for it.
    """
    flops_per_ms = _ceiling(ceilings, f"gemm-{_known(dtype)}") * 1e9
    bytes_per_ms = _ceiling(ceilings, "copy") * 1e6
    total = 0.0
    for op in ops:
        moved = float(op.bytes)
        if op.kind in MATMULS:
            moved *= BITS[dtype] / BITS.get(op.dtype, BITS[dtype])
        total += max(op.flops / flops_per_ms, moved / bytes_per_ms)
    return total


def fraction_of_peak(tflop: float, ms: float, ceilings: Mapping[str, float], dtype: str) -> float:
    """Arithmetic rate over the GEMM ceiling. Raises RecipeError as `floor_ms`."""
    return tflop / (ms / 1e3) / _ceiling(ceilings, f"gemm-{_known(dtype)}")


def fraction_of_roofline(floor: float, ms: float) -> float:
    """Floor over time, both in milliseconds; above 1 where caches help."""
    return floor / ms


def estimate_floor(machine: str, ops: Sequence[OpCost], dtype: str) -> tuple[float, str]:
    """Floor on a machine that is not here, milliseconds, with the formula in words.

    Where nobody published a measured GEMM ceiling of the dtype, the datasheet's peak stands in,
    which the formula says.

    Raises:
        RecipeError: an unknown machine or dtype, or neither figure is known.
    """
    if machine not in MACHINES:
        raise RecipeError(f"no ceilings are known for {machine!r}", f"use {' or '.join(MACHINES)}")
    known = MACHINES[machine]
    name = f"gemm-{_known(dtype)}"
    peaks = {f"gemm-{key}": peak for key, peak in known.peaks_tflops.items()}
    ceilings = {**peaks, **known.ceilings}
    origin = "" if name in known.ceilings else ", the datasheet's peak"
    found = floor_ms(ops, ceilings, dtype)
    return found, (
        f"sum over ops of max(FLOPs / {ceilings[name]:g} TFLOP/s {dtype}{origin}, "
        f"bytes / {ceilings['copy']:g} GB/s), {known.name} ({known.source})"
    )


def ceiling_values(ceilings: Iterable[Ceiling]) -> dict[str, float]:
    """As the mapping that `floor_ms` takes."""
    return {ceiling.name: ceiling.value for ceiling in ceilings}


def measure_ceilings(
    device: str,
    dtypes: Sequence[str],
    *,
    threads: int | None = None,
    budget_s: float = 10.0,
) -> list[Ceiling]:
    """The ceilings of `survey_ceilings` alone."""
    return survey_ceilings(device, dtypes, threads=threads, budget_s=budget_s)[0]


def survey_ceilings(
    device: str,
    dtypes: Sequence[str],
    *,
    threads: int | None = None,
    budget_s: float = 10.0,
) -> tuple[list[Ceiling], dict[str, str]]:
    """Measures "copy" and the GEMM of each dtype; also returns why one of them is left out.

    Args:
        device: "cpu" or "cuda[:n]".
        dtypes: of "fp32", "bf16", "fp16", "int8", "fp8".
        threads: of torch on the CPU; as they are by default.
        budget_s: shared evenly; larger sizes that would not fit are skipped, the first never is.

    Raises:
        RecipeError: an unknown dtype.
        MissingDependency: a GPU that is not here.
    """
    import torch

    wanted = list(dict.fromkeys(_known(dtype) for dtype in dtypes))
    on_gpu = device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        raise MissingDependency("torch finds no CUDA device", "measure the ceilings of the CPU")
    share = budget_s / (len(wanted) + 1)
    left_out: dict[str, str] = {}
    with torch_threads(None if on_gpu else threads) as used, _full_precision():
        where = "" if on_gpu else f", {used} threads"
        found = [_measure_copy(device, share, where)]
        for dtype in wanted:
            name = f"gemm-{dtype}"
            try:
                found.append(_measure_gemm(device, dtype, share, where))
            except (RuntimeError, NotImplementedError, AttributeError, TypeError) as error:
                # which products a build of torch has is only known by trying
                left_out[name] = str(error).splitlines()[0] or type(error).__name__
    return found if on_gpu else _judge_int8(found), left_out


def _measure_copy(device: str, budget_s: float, where: str) -> Ceiling:
    """Best buffer size, each above the last cache where memory allows."""
    import torch

    best, note = 0.0, ""
    sizes = _copy_sizes(device)
    for size in sizes:
        source = torch.ones(size // 4, dtype=torch.float32, device=device)
        target = torch.empty_like(source)
        ms, samples = _fast_ms(_copier(target, source), device, budget_s / len(sizes))
        rate = 2 * size / ms / 1e6
        if rate > best:
            small = "" if size >= last_cache_bytes(device) else ", inside the last cache"
            best = rate
            note = f"{size // MIB} MiB{small}, fastest tenth of {samples}{where}"
        del source, target
    return Ceiling(name="copy", value=round(best, 3), unit="GB/s", note=note)


def _copy_sizes(device: str) -> list[int]:
    """Bytes of one buffer; two are held, in at most a quarter of the free memory."""
    if device.startswith("cuda"):
        import torch

        free = int(torch.cuda.mem_get_info(device)[0])
        wanted: tuple[int, ...] = (256 * MIB, 1024 * MIB)
    else:
        import psutil

        free = int(psutil.virtual_memory().available)
        # 512 MiB is above the largest caches of today; first touch alone takes a second a GiB
        wanted = (min(max(2 * last_cache_bytes("cpu"), 128 * MIB), 512 * MIB),)
    most = max(free // 8, MIB)
    return sorted({min(size, most) // 4096 * 4096 for size in wanted})


def _copier(target: Any, source: Any) -> Callable[[], Any]:
    return lambda: target.copy_(source)


def _measure_gemm(device: str, dtype: str, budget_s: float, where: str) -> Ceiling:
    """Best size and, where torch has several, best product. Raises RuntimeError if none runs."""
    sizes = GPU_SIZES if device.startswith("cuda") else CPU_SIZES
    best, note, rate = 0.0, "", math.inf
    deadline = time.perf_counter() + budget_s
    for number, size in enumerate(sizes):
        flops = 2.0 * size**3
        for library, product in _products(device, dtype, size):
            remaining = deadline - time.perf_counter()
            # the fewest calls that make a figure must fit, at the rate of the size before
            if number and FEWEST_CALLS * flops / (rate * 1e12) > remaining:
                break
            ms, samples = _fast_ms(product, device, remaining / (len(sizes) - number) / 2)
            rate = flops / ms / 1e9
            if rate > best:
                best = rate
                note = f"{library} {size}x{size}x{size}, fastest tenth of {samples}{where}"
    if dtype == "fp32":
        note += ", no TF32"
    return Ceiling(name=f"gemm-{dtype}", value=round(best, 4), unit="TFLOP/s", note=note)


def _products(device: str, dtype: str, n: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Matrix products x (n, n) w^T (n, n) of a dtype with what runs them; operands made once."""
    import torch

    if dtype == "int8":
        x = torch.randint(-127, 128, (n, n), dtype=torch.int8, device=device)
        w = torch.randint(-127, 128, (n, n), dtype=torch.int8, device=device)
        yield "torch._int_mm", lambda: torch._int_mm(x, w.t())
        if device == "cpu":
            quantized = _onednn_linear(n)
            if quantized is not None:
                yield "oneDNN qlinear", quantized
        return
    if dtype == "fp8":
        _require_fp8(device)
        x = torch.randn(n, n, device=device).to(torch.float8_e4m3fn)
        w = torch.randn(n, n, device=device).to(torch.float8_e4m3fn)
        one = torch.ones((), device=device)
        out = torch.bfloat16
        yield (
            "torch._scaled_mm",
            lambda: torch._scaled_mm(x, w.t(), one, one, out_dtype=out, use_fast_accum=True),
        )
        return
    number = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    x = torch.randn(n, n, device=device).to(number)
    w = torch.randn(n, n, device=device).to(number)
    target = torch.empty(n, n, device=device, dtype=number)
    yield "torch.mm", lambda: torch.mm(x, w.t(), out=target)


def _onednn_linear(n: int) -> Callable[[], Any] | None:
    """torch's quantized linear layer with packed weights; None where this build has none."""
    import torch

    try:
        onednn = torch.ops.onednn
        x = torch.randint(0, 256, (n, n), dtype=torch.uint8)
        w = onednn.qlinear_prepack(torch.randint(-127, 128, (n, n), dtype=torch.int8), [n, n])
        scale, zero_point = torch.ones(n), torch.zeros(n, dtype=torch.int64)

        def product() -> Any:
            return onednn.qlinear_pointwise(
                x, 1.0, 0, w, scale, zero_point, None, 1.0, 0, torch.float32, "none", [], ""
            )

        product()
    except (RuntimeError, AttributeError, TypeError):
        return None
    return product


def _require_fp8(device: str) -> None:
    import torch

    needed = "{}.{}".format(*FP8_CAPABILITY)
    if not device.startswith("cuda"):
        raise NotImplementedError(f"fp8 products need a GPU of compute capability {needed}")
    found = torch.cuda.get_device_capability(device)
    if found < FP8_CAPABILITY:
        have = "{}.{}".format(*found)
        raise NotImplementedError(f"fp8 products need compute capability {needed}, found {have}")


def _fast_ms(call: Callable[[], Any], device: str, budget_s: float) -> tuple[float, int]:
    """10th percentile of the times of a call in milliseconds, and how many were taken."""
    call()
    ms = time_once(call, device)
    fitting = 1e3 * budget_s / max(ms, 1e-3)
    samples = int(min(MOST_SAMPLES, max(FEWEST_SAMPLES, fitting)))
    timing = time_batches(call, samples=samples, warmup=0, device=device)
    return percentile(timing.samples_ms, FASTEST), samples


def _judge_int8(found: Sequence[Ceiling]) -> list[Ceiling]:
    """Says so where torch's int8 product on a CPU is no faster than its floating-point ones."""
    rates = {n: v for n, v in ceiling_values(found).items() if n.startswith("gemm-")}
    int8 = rates.pop("gemm-int8", math.inf)
    faster = [name for name, rate in rates.items() if rate > int8]
    if not faster:
        return list(found)
    said = f"; slower than {', '.join(faster)}: no ceiling for the INT8 of other libraries"
    return [
        c.model_copy(update={"note": c.note + said}) if c.name == "gemm-int8" else c for c in found
    ]


@contextmanager
def _full_precision() -> Iterator[None]:
    """Keeps TF32 and bf16 passes out of fp32 products inside."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _known(dtype: str) -> str:
    if dtype not in BITS:
        raise RecipeError(f"there is no dtype {dtype!r}", f"use {', '.join(BITS)}")
    return dtype


def _ceiling(ceilings: Mapping[str, float], name: str) -> float:
    if name not in ceilings:
        have = ", ".join(ceilings) or "none"
        raise RecipeError(f"the ceiling {name} is not known (known: {have})", "measure it first")
    return ceilings[name]
