"""Which of the engines that were built and timed is taken, and why each other one was not.

The fastest that computes what eager fp32 does, within what its precision explains. A quantised
engine has to win: it must be faster than the fastest one that quantises nothing, at the 10th
percentile and in the median. Every entry gets its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hcf.artifact import EngineEntry
from hcf.engines import is_floating
from hcf.engines.forms import entry_name, speed
from hcf.errors import HcfError

Log = Callable[[str], None]

# Relative L2 distance to eager fp32 that rounding explains; more means a wrong graph.
ERROR_LIMITS = {
    "fp32": 1e-3, "fp16": 0.02, "bf16": 0.1, "int8-weight": 0.1, "int4-weight": 0.3,
    "fp8": 0.3, "int8": 0.3, "int8-bf16": 0.3, "int4": 0.4,
}  # fmt: skip


def choose(component: str, entries: Sequence[EngineEntry], engines: Sequence[str], log: Log) -> int:
    """Index of the entry of `engines` to take; every entry's `reason` is set, and logged.

    Raises HcfError where none computes what eager fp32 does.
    """
    refused = {i: reason for i, e in enumerate(entries) if (reason := no_candidate(e, engines))}
    allowed = [i for i in range(len(entries)) if i not in refused]
    if not allowed:
        raise HcfError(
            f"no engine of {component} computes what eager fp32 does: "
            + ", ".join(f"{entry_name(e)}: {refused[i]}" for i, e in enumerate(entries)),
            fix="export again, or quantise fewer layers",
        )
    best = min(allowed, key=lambda i: speed(entries[i]))
    plain = [i for i in allowed if is_floating(entries[i].precision)]
    reasons = dict(refused)
    while plain and not is_floating(entries[best].precision):
        rival = min(plain, key=lambda i: speed(entries[i]))
        if _median(entries[best]) < _median(entries[rival]):
            break
        reasons[best] = (
            f"quantised, and in the median not faster than {entry_name(entries[rival])} "
            f"({entries[best].latency_ms} against {entries[rival].latency_ms} ms)"
        )
        allowed.remove(best)
        best = min(allowed, key=lambda i: speed(entries[i]))
    winner = entries[best]
    for index in allowed:
        if index != best:
            times = speed(entries[index]) / speed(winner)
            reasons[index] = f"{times:.2f}x the time of {entry_name(winner)}"
    seconds = [i for i in allowed if i != best]
    if seconds:
        second = entries[min(seconds, key=lambda i: speed(entries[i]))]
        ahead = f", {speed(second) / speed(winner):.2f}x {entry_name(second)}"
    else:
        ahead = ", the only candidate"
    reasons[best] = f"chosen: the fastest{ahead}"
    _report(component, entries, reasons, best, log)
    return best


def no_candidate(entry: EngineEntry, engines: Sequence[str]) -> str:
    """Why an entry cannot be chosen at all; "" if it can."""
    if entry.reason:
        return entry.reason  # it could not be built, or is not for this machine
    if entry.provider.startswith("simulated"):
        return "simulated: it tells the error of the format, not a speed"
    if entry.engine not in engines:
        return "built as the reference; not asked for"
    if entry.latency_ms is None:
        return f"built for {entry.machine}, not run here"
    if entry.error is None or entry.error == float("inf"):
        return "its output is not finite"
    limit = ERROR_LIMITS[entry.precision]
    if entry.error > limit:
        return f"its error is too large: {entry.error:.2g}, {entry.precision} explains {limit:g}"
    return ""


def _report(
    component: str,
    entries: Sequence[EngineEntry],
    reasons: dict[int, str],
    best: int,
    log: Log,
) -> None:
    baseline = next(
        (e for e in entries if e.engine == "eager" and e.precision == "fp32"), entries[best]
    )
    for index, entry in enumerate(entries):
        entry.reason = reasons[index]
        name = f"{component}: {entry.engine:<11} {entry.precision}"
        if entry.latency_ms is None or baseline.latency_ms is None:
            error = "" if entry.error is None else f" error {entry.error:.1e} "
            log(f"{name} {error}{entry.layer_precisions or ''}  {entry.reason}")
            continue
        log(
            f"{name} {entry.latency_ms:8.2f} ms "
            f"[{entry.latency_low_ms:.2f}, {entry.latency_high_ms:.2f}] "
            f"{baseline.latency_ms / entry.latency_ms:5.2f}x  error {entry.error:.1e}  "
            f"{entry.layer_precisions}  {entry.reason}"
        )
    int8 = [e for e in entries if not is_floating(e.precision) and e.latency_ms is not None]
    if int8 and is_floating(entries[best].precision):
        kinds = " and ".join(sorted({e.precision.upper() for e in int8}))
        verb = "are" if " and " in kinds else "is"
        log(
            f"{component}: {kinds} {verb} not the fastest here; {entries[best].engine} "
            f"{entries[best].precision} is, and is chosen"
        )


def _median(entry: EngineEntry) -> float:
    return float("inf") if entry.latency_ms is None else entry.latency_ms
