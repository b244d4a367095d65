"""How fast a student is: interleaved pairs with the teacher, kept by what they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hcf.code_hash import code_hash
from hcf.settings import BenchConfig
from hcf.sweep.recipe import SweepConfig
from hcf.sweep.students import turn

if TYPE_CHECKING:
    from hcf.sweep.draw import Opened
    from hcf_bench.results import Comparison

Log = Callable[[str], None]
SOURCES = ("hcf_bench/compare.py", "hcf_bench/pairs.py", "hcf_bench/statistics.py")


def set_threads(config: SweepConfig) -> int:
    """One number for torch and every engine, whatever OMP_NUM_THREADS says: sides of unequal
    threads are no comparison."""
    import torch

    from hcf_bench.environment import usable_cores

    threads = config.threads or config.bench.threads or usable_cores()
    torch.set_num_threads(threads)
    return threads


def kept_timing(
    config: BenchConfig, teacher: Opened, student: Opened, folder: Path, log: Log
) -> Comparison:
    """Teacher and student on the engine of the comparison; timed again where it was invalid."""
    from hcf_bench.results import Comparison, read_result, write_result

    name = student.model.name
    path = folder / f"{name}-{_timing_key(config, teacher, student)[:12]}.json"
    # one lock for all: two timings at once would each measure the other
    with turn(folder / "machine", f"timing of {name}", log):
        if path.is_file():
            found = read_result(path)
            assert isinstance(found, Comparison)
            return found
        log(f"{name}: timed against the teacher in pairs")
        timed = _time(config, teacher, student)
        if timed.speedup is not None:
            write_result(path, timed)
    log(f"{name}: {timed.headline()}")
    return timed


def _timing_key(config: BenchConfig, teacher: Opened, student: Opened) -> str:
    from hcf.sweep.draw import drawing_key
    from hcf_bench.environment import describe, read_environment

    said = [
        *(drawing_key(side.model, teacher.on) for side in (teacher, student)),
        config.model_dump(mode="json"),
        describe(read_environment(teacher.on.threads)),
        code_hash(SOURCES),
    ]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _time(config: BenchConfig, teacher: Opened, student: Opened) -> Comparison:
    from hcf_bench.compare import PROMPTS, compare_pipelines

    models, on = (teacher.model, student.model), teacher.on
    names = [f"{m.name}, {m.sampling.steps} steps, {on.engine}" for m in models]
    return compare_pipelines(
        teacher.accelerated(),
        student.accelerated(),
        config.prompts or PROMPTS,
        config,
        sampling=(models[0].sampling, models[1].sampling),
        names=(names[0], names[1]),
        content_hashes=(models[0].content_hash, models[1].content_hash),
        threads=on.threads,
    )


def teacher_ms(timings: Sequence[Comparison | None]) -> float | None:
    """The median over the pairs with every student."""
    from hcf_bench.statistics import percentile

    sides = [timing.baseline.latency for timing in timings if timing]
    samples = [ms for side in sides if side for ms in side.samples_ms]
    return percentile(samples, 50) if samples else None
