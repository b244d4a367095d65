"""Time, memory and disk that a stage will take, said before it starts, and offload where it must.

One batch of the pipeline is run for a step or two (`probe`); everything else follows from it:

    calibrate     batches x (setup + calls x step); activations + the calls of one batch
    quantise      2 passes for statistics and 4 for the report; the rounded weights, while few
    sensitivity   layers x formats x calls passes, half of each on average (the rest is replayed)

Host memory is the peak resident set of this process, so that it can be compared with what the
machine has. Where it does not fit, "auto" puts the components that wait (text encoders, first
stage) on the disk, and for a stage that only runs the denoiser that one too.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from torch import nn

from hcf.errors import HcfError
from hcf.quantize.simulate import HELD_BYTES
from hcf.trace import DenoiserCall, denoiser_name, record_calls

Log = Callable[[str], None]
ROUNDED_BYTES_PER_S = 4e8  # of float32 weights, on one core
ROUNDING_COPIES = 6  # of the largest weight while it is rounded, measured
STEADY_STEP_S = 2.0  # shorter steps are timed more than once
GIB = 2**30
STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
CGROUP_LIMITS = (
    # (limit, use) of the container, version 2 and 1
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


@dataclass(frozen=True)
class Probe:
    """What one batch of a pipeline took. Bytes and seconds.

    weights: parameters by component. setup_s: from the call to the first step (text encoders).
    step_s: one denoiser call and the scheduler. calls: of a whole run. activations: highest above
    `resident` while it ran. call_bytes change with every call, shared_bytes do not (text).
    largest: of the component's parameters.
    """

    batch: int
    component: str
    weights: dict[str, int]
    setup_s: float
    step_s: float
    calls: int
    activations: int
    resident: int
    call_bytes: int
    shared_bytes: int
    largest: int


@dataclass(frozen=True)
class Estimate:
    """What a stage will take; `host_bytes` is the peak resident set of this process."""

    stage: str
    seconds: float
    host_bytes: int
    disk_bytes: int
    movable: dict[str, int]
    """Component -> bytes that can wait on the disk while the stage runs."""
    fix: str = "use a smaller batch_size or size, or `offload: disk`"

    def __str__(self) -> str:
        return (
            f"{self.stage}: about {_duration(self.seconds)}, {self.host_bytes / GIB:.2f} GiB of "
            f"memory at the peak, {self.disk_bytes / GIB:.2f} GiB of disk"
        )


def probe(
    pipe: Any,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance_scale: float,
    height: int | None = None,
    width: int | None = None,
    component: str | None = None,
) -> Probe:
    """Runs one batch up to its second denoiser call, more often where that is short.

    Raises HcfError for no prompts, or a pipeline that never calls its denoiser.
    """

    def run(count: int) -> tuple[float, list[DenoiserCall]]:
        started = time.perf_counter()
        calls = record_calls(
            pipe, list(prompts), steps=steps, guidance_scale=guidance_scale, seed=0,
            batch_size=len(prompts), max_calls=count, height=height, width=width,
            component=component,
        )  # fmt: skip
        return time.perf_counter() - started, calls

    run(2)  # what is loaded and laid out once
    with peak_memory() as peak:
        setup_s, _ = run(1)
        took, calls = run(2)
    if not calls:
        raise HcfError("the pipeline never called its denoiser", fix=f"steps is {steps}: use 1")
    # a run that is stopped at its n-th call has done n - 1 steps; one that ended before, all n
    step_s = took - setup_s
    if step_s < STEADY_STEP_S:
        setup_s = statistics.median([setup_s, *(run(1)[0] for _ in range(3))])
        done = min(len(run(4)[1]), 3)
        step_s = statistics.median([(run(4)[0] - setup_s) / done for _ in range(4)])
    name = component or denoiser_name(pipe)
    module: nn.Module = getattr(pipe, name)
    changing = calls[0].sample.nbytes + calls[0].timestep.nbytes
    return Probe(
        batch=len(prompts),
        component=name,
        weights=component_bytes(pipe),
        setup_s=setup_s,
        step_s=max(step_s, 1e-6),
        calls=max(len(pipe.scheduler.timesteps), 1),
        activations=max(peak[0] - peak[1], 0),
        resident=peak[1],
        call_bytes=changing,
        shared_bytes=sum(value.nbytes for value in calls[0].kwargs.values()),
        largest=max(parameter.nbytes for parameter in module.parameters()),
    )


def component_bytes(pipe: Any) -> dict[str, int]:
    """Component -> bytes of its parameters and buffers."""
    return {
        name: sum(t.nbytes for t in [*module.parameters(), *module.buffers()])
        for name, module in pipe.components.items()
        if isinstance(module, nn.Module)
    }


def estimate_calibration(found: Probe, prompts: int, kept_calls: int = 64) -> Estimate:
    """Recording `prompts` prompts; the calls of one batch are in memory, and twice when saved."""
    batches = -(-prompts // found.batch)
    part = found.calls * found.call_bytes + found.shared_bytes
    kept = min(kept_calls, batches * found.calls) * (found.call_bytes + found.shared_bytes)
    return Estimate(
        stage="calibration",
        seconds=batches * (found.setup_s + found.calls * found.step_s),
        host_bytes=found.resident + max(found.activations + part, 2 * part, kept),
        disk_bytes=batches * part,
        movable={n: size for n, size in found.weights.items() if n != found.component}
        | {found.component: found.weights[found.component]},
    )


def estimate_quantization(
    found: Probe, kept_calls: int = 64, report_calls: int = 8, weight_passes: int = 0
) -> Estimate:
    """Statistics over `kept_calls`, then an error report over `report_calls`.

    Rounded weights are held beside the model while they are few; else every pass rounds anew.
    """
    weights = found.weights[found.component]
    held = weights <= HELD_BYTES
    report = min(report_calls, kept_calls)
    rounding = 0.0 if held else 2 * report * weights / ROUNDED_BYTES_PER_S
    calls = kept_calls * found.call_bytes + min(kept_calls, 8) * found.shared_bytes
    return Estimate(
        stage="quantisation",
        seconds=(2 * kept_calls + (4 + weight_passes) * report) * found.step_s + rounding,
        host_bytes=found.resident
        + 2 * found.activations
        + calls
        + (weights if held else ROUNDING_COPIES * found.largest),
        disk_bytes=calls,
        movable={n: size for n, size in found.weights.items() if n != found.component},
        fix="use fewer calibration_calls, a smaller batch_size or size, or `offload: disk`",
    )


def estimate_sensitivity(
    found: Probe, layers: int, formats: int, calls: int, held_out: int, exchanges: int, mode: str
) -> Estimate:
    """`calls` passes for each layer and format, and `held_out` for each exchange that is tried."""
    passes = layers * formats * calls / 2 if mode == "output" else 3.0 * formats * calls
    text = found.shared_bytes
    return Estimate(
        stage="sensitivity search",
        seconds=(passes + calls + held_out * (exchanges + 2)) * found.step_s,
        # the outputs of all blocks of one call are kept, about what one pass touches at its peak
        host_bytes=found.resident
        + 2 * found.activations
        + (calls + held_out) * (2 * found.call_bytes + text),
        disk_bytes=layers * formats * calls * 200,
        movable={n: size for n, size in found.weights.items() if n != found.component},
        fix="use mode: layer, fewer calls, a smaller batch_size or size, or `offload: disk`",
    )


@contextmanager
def fitted(
    pipe: Any, estimate: Estimate, offload: str, log: Log = lambda line: None
) -> Iterator[tuple[str, ...]]:
    """Says `estimate`; inside, as many components wait elsewhere as it takes to fit.

    offload "none" never moves one, "disk" moves all that can, "auto" only where it would not fit,
    "cpu" is for a pipeline on a GPU. Yields the names. HcfError where it does not fit even so.
    """
    log(str(estimate))
    available = available_memory() + resident_bytes()
    moved = plan_offload(estimate, available, offload)
    with ExitStack() as stack:
        for name in moved:
            module: nn.Module = getattr(pipe, name)
            where = "the CPU" if offload == "cpu" else "the disk"
            log(f"{estimate.stage}: the weights of {name} wait on {where}")
            stack.enter_context(_offloaded(module, offload))
        yield moved


def plan_offload(estimate: Estimate, available: int, offload: str) -> tuple[str, ...]:
    """Which components have to wait elsewhere for `estimate` to fit into `available` bytes."""
    over = estimate.host_bytes - available
    order = list(estimate.movable)
    if offload in ("disk", "cpu"):
        moved = order
    elif offload == "none":
        moved = []
    else:
        moved, rest = [], over
        for name in order:
            if rest <= 0:
                break
            moved.append(name)
            rest -= estimate.movable[name]
    if (lacking := over - sum(estimate.movable[name] for name in moved)) > 0 and offload != "cpu":
        raise HcfError(
            f"{estimate.stage} needs about {estimate.host_bytes / GIB:.2f} GiB of memory, "
            f"{(estimate.host_bytes - available) / GIB:.2f} GiB more than there is; "
            f"offloading {', '.join(moved) or 'nothing'} leaves {lacking / GIB:.2f} GiB too much",
            fix=estimate.fix if offload != "none" else "set `offload: auto`, or " + estimate.fix,
        )
    return tuple(moved)


def require_disk(estimate: Estimate, folder: Path) -> None:
    """HcfError where the disk of `folder` has less free than `estimate` needs."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if estimate.disk_bytes > free:
        raise HcfError(
            f"{estimate.stage} needs {estimate.disk_bytes / GIB:.2f} GiB on the disk of {folder}, "
            f"which has {free / GIB:.2f} GiB free",
            fix="free some space, choose another folder (HCF_HOME), or use fewer prompts",
        )


def available_memory() -> int:
    """Bytes this process can still take: of the machine, or of its container if that is less."""
    found = int(psutil.virtual_memory().available)
    for limit, use in CGROUP_LIMITS:
        try:
            allowed = int(limit.read_text()) - int(use.read_text())
        except (OSError, ValueError):  # not there, or "max"
            continue
        found = min(found, max(allowed, 0))
    return found


def resident_bytes() -> int:
    """Resident set of this process."""
    return int(psutil.Process().memory_info().rss)


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Fills [peak, before] with this process's resident bytes when the block ends.

    Linux lets a process reset its high-water mark; where that is refused a thread samples it.
    """
    before = resident_bytes()
    found: list[int] = []
    try:
        CLEAR_REFS.write_text("5", encoding="ascii")
        resettable = True
    except OSError:
        resettable = False
    if resettable:
        yield found
        line = next(x for x in STATUS.read_text().splitlines() if x.startswith("VmHWM:"))
        found += [max(int(line.split()[1]) * 1024, before), before]
        return
    import threading

    highest, done = [before], threading.Event()

    def sample() -> None:
        while not done.wait(0.005):
            highest[0] = max(highest[0], resident_bytes())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
    found += [highest[0], before]


@dataclass(frozen=True)
class Measured:
    """What a process really took."""

    seconds: float
    peak_bytes: int


def measure_process(code: str, arguments: Sequence[str] = ()) -> Measured:
    """Runs Python `code` in a process of its own: its seconds and its peak resident set.

    RuntimeError with its output where it fails. Needs Linux's /proc: elsewhere a child's peak
    starts with its parent's.
    """
    wrapped = (
        "import time\nstarted = time.perf_counter()\n"
        f"exec(compile({code!r}, 'measured', 'exec'))\n"
        "took = time.perf_counter() - started\n"
        "status = open('/proc/self/status').read()\n"
        "peak = status.partition('VmHWM:')[2].split()[0]\n"
        "print(f'\\nMEASURED {took} {peak}')"
    )
    done = subprocess.run(
        [sys.executable, "-c", wrapped, *arguments], capture_output=True, text=True
    )
    last = done.stdout.strip().splitlines()[-1:] or [""]
    if done.returncode or not last[0].startswith("MEASURED"):
        raise RuntimeError(f"the measured process failed:\n{done.stderr[-4000:]}")
    _, seconds, kib = last[0].split()
    return Measured(float(seconds), int(kib) * 1024)


@contextmanager
def _offloaded(module: nn.Module, offload: str) -> Iterator[None]:
    """Inside, the weights of `module` come when a layer runs and go again; then they are back."""
    from accelerate import cpu_offload, disk_offload
    from accelerate.hooks import remove_hook_from_module

    device = next(module.parameters()).device
    if offload == "cpu":
        if device.type == "cpu":
            raise HcfError(
                "offload: cpu is for a pipeline on a GPU; this one is on the CPU",
                fix="use offload: disk",
            )
        cpu_offload(module, execution_device=device)
        try:
            yield
        finally:
            remove_hook_from_module(module, recurse=True)
            module.to(device)
        return
    with tempfile.TemporaryDirectory(prefix=".hcf-offload-") as folder:
        disk_offload(module, folder, execution_device=device)
        try:
            yield
        finally:
            remove_hook_from_module(module, recurse=True)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def scaled(estimate: Estimate, share: float) -> Estimate:
    """The same stage of which only `share` is still to be done: less time, the same memory."""
    return replace(
        estimate,
        seconds=estimate.seconds * share,
        disk_bytes=int(estimate.disk_bytes * share),
    )
