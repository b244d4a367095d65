"""Comparisons whose truth is known: the same against itself, and against 2 % more work.

A gate is worth what it does on a busy machine, so both are run beside a synthetic load. Every
comparison builds both sides anew, in memory of their own, as two real models would be: where
buffers happen to lie can change a time by more than noise does. The slower side does more of the
same work, so its slowdown is real whatever the machine does.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hcf_bench.clocks import Sample, read_usage, sample_call
from hcf_bench.pairs import PairedTimes, UsageReader, calls_per_pair, interleave
from hcf_bench.records import SelfTest
from hcf_bench.remote import Worker
from hcf_bench.statistics import Verdict
from hcf_bench.timing import loop_overhead_us, torch_threads
from hcf_bench.worker import Spec

Log = Callable[[str], None]

BLOCKS = 50
TOKENS, WIDTH = 16, 64
WARMUP = 5
FIRST_LOOK = 16  # pairs before the first look at the data
BUILD_S = 120.0  # for two processes to start on a busy machine
# Bounds of the whole test: 200 comparisons each, at most these errors.
MOST_FALSE_ALARMS = 0.005
LEAST_CAUGHT = 0.99
MOST_UNDECIDED = 0.05
MOST_SECONDS = 300.0
BUDGET_S = 290.0  # the pair that runs when it ends is still finished

# SIGKILL when the parent dies (PR_SET_PDEATHSIG), or a killed self-test would leave them running
DIE = "import ctypes, sys\nif sys.platform == 'linux': ctypes.CDLL(None).prctl(1, 9)\n"
SPIN = DIE + "while True: pass"
STREAM = DIE + "a = bytearray(1 << 26); b = bytes(1 << 26)\nwhile True: a[:] = b"


@dataclass(frozen=True)
class SelfTestConfig:
    """`comparisons` of each kind, each within `budget_s`; `load` processes compete for the cores.

    `processes` is 1 (both sides in this process) or 2 (a process each, taking turns).
    """

    comparisons: int = 200
    slowdown: float = 0.02
    threshold: float = 0.01
    load: int = 4
    budget_s: float = BUDGET_S
    threads: int = 1
    processes: int = 1
    blocks: int = BLOCKS
    seed: int = 0

    def __post_init__(self) -> None:
        if self.comparisons < 1 or self.load < 0 or self.processes not in (1, 2):
            raise ValueError(
                f"comparisons must be >= 1, load >= 0 and processes 1 or 2, not "
                f"{self.comparisons}, {self.load} and {self.processes}"
            )
        if not 0.0 < self.threshold < self.slowdown:
            raise ValueError(
                f"a slowdown of {self.slowdown:g} cannot pass a threshold of {self.threshold:g}; "
                "the threshold must lie between 0 and the slowdown"
            )


class Blocks(nn.Module):
    """x (L, D) -> (L, D) through `blocks` linear layers, orthogonal so that x keeps its size."""

    def __init__(self, blocks: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        linears = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)]
        for linear in linears:
            nn.init.orthogonal_(linear.weight)
        self.linears = nn.ModuleList(linears)
        self.register_buffer("x", torch.randn(TOKENS, WIDTH))
        self.blocks = blocks
        self.requires_grad_(False)

    def forward(self) -> Tensor:
        x: Tensor = self.x  # type: ignore[assignment]
        for i in range(self.blocks):
            x = self.linears[i % 4](x)
        return x


def run_selftest(config: SelfTestConfig, log: Log = print) -> tuple[SelfTest, SelfTest]:
    """The same against itself, then against `slowdown` more work; both under the load."""
    with torch_threads(config.threads), synthetic_load(config.load):
        same = _comparisons("A/A", 0.0, config, log)
        slower = _comparisons("slowdown", config.slowdown, config, log)
    return same, slower


def failures(tests: tuple[SelfTest, ...] | list[SelfTest], *, allowance: int = 0) -> list[str]:
    """Bounds that were missed, in words. `allowance` more errors pass: for shortened forms."""
    found = []
    for t in tests:
        if t.slowdown == 0.0:
            most = int(MOST_FALSE_ALARMS * t.comparisons) + allowance
            if t.alarms > most:
                found.append(f"{t.alarms} false alarms in {t.comparisons}, at most {most} allowed")
        else:
            least = int(np.ceil(LEAST_CAUGHT * t.comparisons)) - allowance
            if t.right < least:
                found.append(
                    f"{t.right} of {t.comparisons} slowdowns of {t.slowdown:.1%} caught, "
                    f"at least {least} wanted"
                )
        most = int(MOST_UNDECIDED * t.comparisons) + allowance
        if t.undecided > most:
            found.append(f"{t.name}: {t.undecided} of {t.comparisons} undecided, at most {most}")
        if t.seconds_max > MOST_SECONDS:
            found.append(f"{t.name}: a comparison took {t.seconds_max:.0f} s")
    return found


@contextmanager
def synthetic_load(processes: int) -> Iterator[None]:
    """Keeps processes busy inside: every other one computes, the rest stream memory."""
    with ExitStack() as stack:
        for number in range(processes):
            code = SPIN if number % 2 == 0 else STREAM
            worker = subprocess.Popen([sys.executable, "-c", code])
            stack.callback(worker.wait)
            stack.callback(worker.kill)
        if processes:
            time.sleep(1.0)  # until they run
        yield


def describe(test: SelfTest) -> str:
    """One line: what was compared, how often it was right, how long it took."""
    what = "the same against itself" if test.slowdown == 0.0 else f"{test.slowdown:.1%} more work"
    judged = f"{test.alarms} false alarms" if test.slowdown == 0.0 else f"{test.right} caught"
    length = f", calls of {test.call_ms:.2g} ms" if test.call_ms else ""
    return (
        f"{what}: {judged} of {test.comparisons}, {test.undecided} undecided; a comparison took "
        f"{test.seconds_p50:.1f} s, at most {test.seconds_max:.1f} s, {test.pairs_p50:.0f} pairs; "
        f"load {test.load}, processes {test.processes}{length}, "
        f"overhead {test.overhead_us or 0.0:.2f} us a call"
    )


def sampling_overhead_us() -> float:
    """What timing adds to a call, microseconds: the whole of `sample_call` on an empty one."""
    return round(loop_overhead_us(lambda: sample_call(_nothing)), 3)


def _comparisons(name: str, slowdown: float, config: SelfTestConfig, log: Log) -> SelfTest:
    found: list[PairedTimes] = []
    started = time.perf_counter()
    for number in range(config.comparisons):
        found.append(_compare(slowdown, config, config.seed + number))
        if (number + 1) % max(1, config.comparisons // 10) == 0:
            seen = Counter(str(f.verdict) for f in found)
            counts = ", ".join(f"{verdict} {count}" for verdict, count in seen.items())
            log(f"{name}: {number + 1} of {config.comparisons}: {counts}")
    verdicts = Counter(f.verdict for f in found)
    seconds = [f.spent_s for f in found]
    waiting = [f.contention for f in found if f.contention is not None]
    log(
        f"{name}: {time.perf_counter() - started:.0f} s, waiting {np.median(waiting or [0.0]):.0%} "
        f"of the time, ratio {np.median([f.statistics.speedup.value for f in found]):.4f}"
    )
    expected = Verdict.SAME if slowdown == 0.0 else Verdict.SLOWER
    alarms = verdicts[Verdict.FASTER] + verdicts[Verdict.SLOWER] if slowdown == 0.0 else 0
    used = [sample.cpu_ms for f in found for sample in f.baseline if sample.cpu_ms]
    return SelfTest(
        name=f"{name}, {config.blocks} blocks, {config.processes} process"
        + ("es" if config.processes > 1 else ""),
        slowdown=slowdown,
        comparisons=len(found),
        alarms=alarms,
        right=verdicts[expected],
        undecided=verdicts[Verdict.UNDECIDED],
        pairs_p50=float(np.median([f.statistics.pairs for f in found])),
        seconds_p50=round(float(np.median(seconds)), 3),
        seconds_max=round(max(seconds), 3),
        load=config.load,
        processes=config.processes,
        overhead_us=sampling_overhead_us(),
        call_ms=round(float(np.median(used)), 3) if used else None,
    )


def _compare(slowdown: float, config: SelfTestConfig, seed: int) -> PairedTimes:
    """One comparison of `blocks` blocks against so many more, both sides built anew."""
    sizes = (config.blocks, round(config.blocks * (1.0 + slowdown)))
    if config.processes == 2:
        return _compare_workers(sizes, config, seed)
    samplers = [_sampler(Blocks(blocks, seed)) for blocks in sizes]
    return _interleave(samplers, (read_usage,), config, seed)


def _compare_workers(sizes: tuple[int, int], config: SelfTestConfig, seed: int) -> PairedTimes:
    deadline = time.monotonic() + config.budget_s + BUILD_S
    with ExitStack() as stack:
        workers = [
            stack.enter_context(
                Worker(
                    Spec(kind="blocks", blocks=blocks, threads=config.threads, seed=seed),
                    deadline=deadline,
                )
            )
            for blocks in sizes
        ]
        usage = tuple(worker.usage for worker in workers)
        return _interleave([worker.sample for worker in workers], usage, config, seed)


def _interleave(
    samplers: Sequence[Callable[[int], Sample]],
    usage: tuple[UsageReader, ...],
    config: SelfTestConfig,
    seed: int,
) -> PairedTimes:
    for sampler in samplers:
        for index in range(WARMUP):
            sampler(index)
    return interleave(
        samplers[0],
        samplers[1],
        pairs=FIRST_LOOK,
        budget_s=config.budget_s,
        seed=seed,
        threshold=config.threshold,
        usage=usage,
        calls=calls_per_pair(min(samplers[0](i).wall_ms for i in range(WARMUP))),
    )


def _sampler(module: nn.Module) -> Callable[[int], Sample]:
    return lambda _: sample_call(module)


def _nothing() -> None:
    return None
