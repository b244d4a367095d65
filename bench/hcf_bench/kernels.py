"""Every fused kernel over the shapes models ask for, beside torch, its compiler and the libraries.

    hcf bench kernels --device cuda --out out/kernels          a row for each call
    hcf bench kernels --device cuda --tune                     configurations by capability

Each call is checked before it is timed. All contenders of a call are timed in turns, round by
round, and a ratio is of times of the same round. Bytes are what must move (inputs and output once),
FLOPs the product's own; their rates stand beside the ceilings that were measured in the same run.
"""

from __future__ import annotations

import json
import math
import pkgutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor
from torch.nn import functional as F

import hcf_kernels
import hcf_kernels.gpu
from hcf_bench.environment import Environment, read_environment
from hcf_bench.kernel_calls import KernelCall, TensorSpec
from hcf_bench.peers import sqnr_db
from hcf_bench.records import Ceiling
from hcf_bench.results import STRICT, Bounds
from hcf_bench.roofline import survey_ceilings
from hcf_bench.statistics import pair_statistics
from hcf_bench.timing import cache_flusher, time_batches
from hcf_kernels.tables import FOLDER, Plan, capability

Call = Callable[[], Any]
Log = Callable[[str], None]
ROUNDS = 7
LEAST_SQNR_DB = 20.0  # of our output against the reference in float32
EXACT_DB = 999.0  # of an output without any difference: records hold finite numbers
LARGEST_REFERENCE = 2**31  # FLOPs of a product that is checked in float64 on a CPU


class KernelRow(BaseModel):
    """One call. `ms` by contender, medians over rounds; `faster` is how many times as fast ours is.

    Rates are ours; `share` is of the ceiling named.
    """

    model_config = STRICT

    op: str
    call: str
    dtype: str
    count: int
    gbyte: float
    tflop: float
    ms: dict[str, float] = {}
    faster: dict[str, Bounds] = {}
    sqnr_db: float | None = None
    gbps: float | None = None
    tflops: float | None = None
    ceiling: str = ""
    share: float | None = None
    failed: dict[str, str] = {}


class KernelRecord(BaseModel):
    """What a run of `hcf bench kernels` leaves on disk."""

    model_config = STRICT

    schema_version: int = 1
    date: str
    device: str
    command: str
    environment: Environment
    ceilings: list[Ceiling]
    rows: list[KernelRow]


def run_kernels(
    calls: Mapping[KernelCall, int],
    *,
    device: str,
    compiles: bool = True,
    budget_s: float = 540.0,
    command: str = "",
    log: Log = print,
) -> KernelRecord:
    """A row for each of `calls` that the budget has time for, in their order."""
    deadline = time.monotonic() + budget_s
    dtypes = ["bf16", "int8", "fp8"] if device != "cpu" else ["fp32", "bf16"]
    ceilings, _ = survey_ceilings(device, dtypes, budget_s=min(60.0, budget_s / 8))
    values = {found.name: found.value for found in ceilings}
    rows: list[KernelRow] = []
    for call, count in calls.items():
        if time.monotonic() > deadline:
            log(f"out of time: {len(rows)} of {len(calls)} calls")
            break
        row = time_call(call, count, device, compiles, values)
        log(row_line(row))
        rows.append(row)
    return KernelRecord(
        date=datetime.now(UTC).date().isoformat(),
        device=torch.cuda.get_device_name() if device != "cpu" else "cpu",
        command=command,
        environment=read_environment(torch.get_num_threads()),
        ceilings=ceilings,
        rows=rows,
    )


def time_call(
    call: KernelCall, count: int, device: str, compiles: bool, ceilings: Mapping[str, float]
) -> KernelRow:
    """Our operator on `call`, checked, then in turns with its contenders."""
    arguments = call.make(device)
    ours = partial_call(operator(call.op), arguments)
    output = ours()
    distance = _checked(call, arguments, output)
    row = KernelRow(
        op=call.op,
        call=str(call),
        dtype=_dtype_of(call),
        count=count,
        gbyte=_bytes_of(call, output) / 1e9,
        tflop=flops_of(call) / 1e12,
        sqnr_db=distance if distance is None or math.isfinite(distance) else EXACT_DB,
    )
    if distance is not None and not distance >= LEAST_SQNR_DB:
        return row.model_copy(update={"failed": {"ours": f"{distance:.1f} dB to the reference"}})
    contenders, failed = {"ours": ours}, {}
    for name, make in contenders_of(call, arguments, compiles).items():
        try:
            make()
            contenders[name] = make
        except (RuntimeError, ValueError, NotImplementedError) as error:
            failed[name] = str(error).splitlines()[0][:200]
    times = in_turns(contenders, device)
    faster = {
        name: Bounds.of(pair_statistics(found, times["ours"], seed=0).speedup)
        for name, found in times.items()
        if name != "ours"
    }
    ms = {name: sorted(found)[len(found) // 2] for name, found in times.items()}
    rates = _rates(row, ms["ours"], ceilings)
    return row.model_copy(update={"ms": ms, "faster": faster, "failed": failed, **rates})


def in_turns(
    contenders: Mapping[str, Call], device: str, rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """{name: milliseconds, one a round}; each round goes the other way than the one before."""
    flush = cache_flusher(device)
    found: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for _ in range(rounds):
        for name in order:
            timing = time_batches(
                contenders[name], calls=1, samples=9, warmup=1, device=device, before=flush
            )
            found[name].append(timing.p50_ms)
        order.reverse()
    return found


def tune_calls(
    calls: Iterable[KernelCall], device: str, budget_s: float, log: Log = print
) -> dict[str, dict[str, dict[str, Any]]]:
    """{operator: {key: the fastest configuration}} of the calls the budget has time for.

    A configuration that fails to compile or launch loses; one whose output differs from the
    default's by more than rounding is an error of the kernel, and is named.
    """
    deadline = time.monotonic() + budget_s
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for call in calls:
        plan = plan_of(call, call.make(device))
        if plan is None or plan.key in table.get(call.op, {}):
            continue
        if time.monotonic() > deadline:
            log("out of time; run it again with --only for the rest")
            break
        best, best_ms, default_ms = _fastest(plan, device, log)
        table.setdefault(call.op, {})[plan.key] = best
        log(f"{call.op} {plan.key}: {best_ms:.4f} ms, default {default_ms:.4f} ms: {best}")
    return table


def write_table(
    table: Mapping[str, Mapping[str, Mapping[str, Any]]], folder: Path | None, device: str
) -> Path:
    """Merges `table` into `folder`/<capability>.json, written whole and then renamed.

    Without a folder that of the package, where launchers look.
    """
    import triton

    folder = folder or FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{capability(torch.device(device))}.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"ops": {}}
    for op, configs in table.items():
        known["ops"].setdefault(op, {}).update(configs)
    known |= {
        "device": torch.cuda.get_device_name(device),
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def plan_of(call: KernelCall, arguments: tuple[Any, ...]) -> Plan | None:
    """How a call can be run; None where its operator has nothing to choose."""
    for module in pkgutil.iter_modules(hcf_kernels.gpu.__path__):
        plans = getattr(import_module(f"hcf_kernels.gpu.{module.name}"), "PLANS", {})
        if call.op in plans:
            found: Plan = plans[call.op](*arguments)
            return found
    return None


def operator(op: str) -> Callable[..., Any]:
    """torch.ops.hcf.`op`."""
    found: Callable[..., Any] = getattr(torch.ops.hcf, op)
    return found


def reference(op: str) -> Callable[..., Any]:
    """The operator in plain torch."""
    module = import_module(f"hcf_kernels.{hcf_kernels.MODULES[op]}")
    found: Callable[..., Any] = getattr(module, f"{op}_ref")
    return found


def partial_call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Call:
    """`function(*arguments)` as a function of nothing."""

    def run() -> Any:
        with torch.no_grad():
            return function(*arguments)

    return run


def contenders_of(call: KernelCall, arguments: tuple[Any, ...], compiles: bool) -> dict[str, Call]:
    """What ours is timed against: torch, its compiler, and for 8-bit products the 16-bit ones."""
    if call.op in LIBRARY:
        return {name: partial_call(f, ()) for name, f in LIBRARY[call.op](*arguments).items()}
    plain = reference(call.op)
    found = {"eager": partial_call(plain, arguments)}
    if compiles:
        torch._dynamo.reset()
        compiled = torch.compile(
            plain, fullgraph=True, dynamic=False, mode="max-autotune-no-cudagraphs"
        )
        found["compile"] = partial_call(compiled, arguments)
    return found


def _product_library(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, *rest: Any
) -> dict[str, Call]:
    """The same product in 16 bits, and the library's in 8 bits, which has no scales or bias."""
    dtype = rest[-1]
    x, w, row = a.to(dtype), b.to(dtype), None if bias is None else bias.to(dtype)
    one = torch.ones((), device=a.device)
    library: Call = lambda: torch._int_mm(a, b.T)  # noqa: E731
    if a.dtype != torch.int8:
        library = lambda: torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16)  # noqa: E731
    return {"16-bit": lambda: F.linear(x, w, row), "library": library}


def _gate_library(
    a: Tensor, weight: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None,
    dtype: torch.dtype,
) -> dict[str, Call]:  # fmt: skip
    """The same GEGLU in 16 bits, by torch."""
    plain = reference("geglu")
    x, w, row = a.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return {"16-bit": lambda: plain(x, w, row)}


def _conv_library(
    x: Tensor, weight: Tensor, scale_x: Tensor, scale_w: Tensor, bias: Tensor | None, add: Any,
    residual: Any, stride: int, dtype: torch.dtype,
) -> dict[str, Call]:  # fmt: skip
    """The same convolution in 16 bits, by the library."""
    image, w = x.to(dtype), weight.to(dtype)
    padding = weight.shape[-1] // 2
    return {"16-bit": lambda: F.conv2d(image, w, bias, stride, padding)}


LIBRARY: dict[str, Callable[..., dict[str, Call]]] = {
    "int8_gemm": _product_library,
    "fp8_gemm": _product_library,
    "geglu_int8": _gate_library,
    "conv3x3_quantized": _conv_library,
}


def flops_of(call: KernelCall) -> float:
    """2 for each multiply-accumulate of a call's products; 0 for what has none."""
    tensors = [a for a in call.arguments if isinstance(a, TensorSpec)]
    shapes = [spec.shape for spec in tensors]
    if call.op in ("int8_gemm", "fp8_gemm", "geglu", "geglu_int8"):
        rows = math.prod(shapes[0][:-1])
        return 2.0 * rows * math.prod(shapes[1])
    if call.op == "attention":
        batch, heads, tokens, width = shapes[0]
        return 4.0 * batch * heads * tokens * shapes[1][2] * width
    if call.op.startswith(("conv3x3", "upsample_conv3x3")):
        output = call.output()
        outputs, weight = output.numel() // output.shape[1], math.prod(shapes[1])
        return 2.0 * outputs * (weight / 4 if call.op.startswith("upsample") else weight)
    return 0.0


def row_line(row: KernelRow) -> str:
    """One line about a row, for the log."""
    if "ours" in row.failed:
        return f"{row.call}: failed, {row.failed['ours']}"
    against = ", ".join(f"{r.value:.2f}x {name}" for name, r in row.faster.items())
    share = f", {row.share:.0%} of {row.ceiling}" if row.share is not None else ""
    return f"{row.call}: {row.ms['ours']:.4f} ms{share}, {against}"


def kernel_table(record: KernelRecord) -> str:
    """Rows as a Markdown table."""
    lines = [
        "| call | times | ours, ms | rate | share | against |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for row in record.rows:
        if "ours" in row.failed:
            lines.append(f"| {row.call} {row.dtype} | {row.count} | failed | | | {row.failed} |")
            continue
        rate = f"{row.tflops:.1f} TFLOP/s" if row.tflops else f"{row.gbps:.0f} GB/s"
        share = "" if row.share is None else f"{row.share:.0%} of {row.ceiling}"
        against = ", ".join(
            f"{name} {r.value:.2f}x [{r.low:.2f}, {r.high:.2f}]" for name, r in row.faster.items()
        )
        lines.append(
            f"| {row.call} {row.dtype} | {row.count} | {row.ms['ours']:.4f} | {rate} | {share} | "
            f"{against} |"
        )
    return "\n".join(lines)


def select(calls: Counter[KernelCall], only: Iterable[str]) -> dict[KernelCall, int]:
    """Those whose text holds one of `only` (all without it), what costs most bytes first."""
    wanted = tuple(only)
    kept = {c: n for c, n in calls.items() if not wanted or any(w in str(c) for w in wanted)}
    size = {c: n * sum(a.nbytes for a in c.arguments if isinstance(a, TensorSpec))
            for c, n in kept.items()}  # fmt: skip
    return dict(sorted(kept.items(), key=lambda item: -size[item[0]]))


def _fastest(plan: Plan, device: str, log: Log) -> tuple[dict[str, Any], float, float]:
    """(fastest configuration, its milliseconds, the default's)"""
    default = plan.candidates[0]
    wanted = plan.run(default)
    times: dict[int, float] = {}
    for index, config in enumerate(plan.candidates):
        try:
            distance = sqnr_db(_float(wanted), _float(plan.run(config)))
        except Exception as error:  # Triton has no common class of its compile and launch errors
            log(f"  {config}: {str(error).splitlines()[0][:120]}")
            continue
        if not distance > LEAST_SQNR_DB:
            raise RuntimeError(f"{plan.key}: {config} is {distance:.1f} dB from {default}")
        once = partial_call(plan.run, (config,))
        times[index] = time_batches(
            once, calls=1, samples=15, warmup=2, device=device, before=cache_flusher(device)
        ).p50_ms
    best = min(times, key=lambda index: times[index])
    return plan.candidates[best], times[best], times[0]


def _checked(call: KernelCall, arguments: tuple[Any, ...], output: Any) -> float | None:
    if flops_of(call) > LARGEST_REFERENCE and not _first(output).is_cuda:
        return None
    wanted = _first(reference(call.op)(*arguments))
    return sqnr_db(_float(wanted), _float(_first(output)))


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _float(output: Any) -> Tensor:
    return _first(output).float()


def _bytes_of(call: KernelCall, output: Any) -> int:
    outputs = output if isinstance(output, tuple) else (output,)
    moved = [a for a in call.arguments if isinstance(a, TensorSpec)]
    return sum(a.nbytes for a in moved) + sum(t.nbytes for t in outputs)


def _dtype_of(call: KernelCall) -> str:
    first = next(a for a in call.arguments if isinstance(a, TensorSpec))
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
            torch.int8: "int8", torch.float8_e4m3fn: "fp8"}[first.dtype]  # fmt: skip


def _rates(row: KernelRow, ms: float, ceilings: Mapping[str, float]) -> dict[str, Any]:
    """GB/s and TFLOP/s of ours, and the share of the ceiling it is nearest to."""
    gbps, tflops = row.gbyte / (ms / 1e3), row.tflop / (ms / 1e3)
    shares = {"copy": gbps / ceilings["copy"]} if "copy" in ceilings else {}
    if row.tflop and (gemm := ceilings.get(f"gemm-{row.dtype}")):
        shares[f"gemm-{row.dtype}"] = tflops / gemm
    nearest = max(shares, key=lambda name: shares[name], default="")
    return {
        "gbps": gbps,
        "tflops": tflops or None,
        "ceiling": nearest,
        "share": shares.get(nearest),
    }
