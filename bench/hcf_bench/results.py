"""What a benchmark leaves on disk: strict JSON with its environment, whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hcf.errors import InvalidArtifact, StorageError
from hcf_bench.environment import Environment, same_environment
from hcf_bench.statistics import (
    CONFIDENCE,
    Interval,
    PairStatistics,
    Verdict,
    decide,
    percentile,
    unpaired_statistics,
)

SCHEMA_VERSION: Final = 1
STRICT = ConfigDict(extra="forbid", frozen=True)
WEAKER = (
    "unpaired: the baseline is a stored run, so drift of the machine between the two runs is not "
    "cancelled; weaker than an interleaved comparison"
)


class Bounds(BaseModel):
    """An estimate and the bounds that hold it with the given confidence."""

    model_config = STRICT

    value: float
    low: float
    high: float
    confidence: float = CONFIDENCE

    @classmethod
    def of(cls, interval: Interval) -> Bounds:
        """From the statistic's own type."""
        return cls(
            value=interval.value,
            low=interval.low,
            high=interval.high,
            confidence=interval.confidence,
        )


class Latency(BaseModel):
    """Times of one side, milliseconds; `first_ms` is the cold call and counts nowhere else."""

    model_config = STRICT

    p50_ms: float
    p90_ms: float
    p99_ms: float
    first_ms: float | None = None
    samples_ms: tuple[float, ...]

    @classmethod
    def of(cls, samples_ms: Sequence[float], first_ms: float | None = None) -> Latency:
        """Summarises warm samples."""
        return cls(
            p50_ms=percentile(samples_ms, 50),
            p90_ms=percentile(samples_ms, 90),
            p99_ms=percentile(samples_ms, 99),
            first_ms=first_ms,
            samples_ms=tuple(round(float(ms), 6) for ms in samples_ms),
        )


class Stages(BaseModel):
    """Medians of the parts of one image batch, milliseconds, and how often the denoiser ran."""

    model_config = STRICT

    text_ms: float
    denoise_ms: float
    decode_ms: float
    denoiser_calls: int


class Side(BaseModel):
    """One side of a comparison, or the subject of a single measurement.

    `latency` is the wall clock's, whichever clock decided; `cpu_p50_ms` the median of the processor
    time one call used, over all threads.
    """

    model_config = STRICT

    name: str
    content_hash: str = ""
    sampling: dict[str, float] = Field(default_factory=dict)
    engines: tuple[dict[str, Any], ...] = ()
    latency: Latency | None = None
    cpu_p50_ms: float | None = None
    stages: Stages | None = None


class Measurement(BaseModel):
    """One subject timed alone (`hcf bench run`)."""

    model_config = STRICT

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Literal["measurement"] = "measurement"
    workload: str
    subject: Side
    seed: int
    environment: Environment


class Comparison(BaseModel):
    """Baseline and candidate; `speedup` is baseline time over candidate time, above 1 is faster."""

    model_config = STRICT

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Literal["comparison"] = "comparison"
    workload: str
    verdict: Verdict
    reason: str
    paired: bool
    baseline: Side
    candidate: Side
    speedup: Bounds | None = None
    saved_ms: Bounds | None = None
    pairs: int = 0
    launches: int = 1
    decision_confidence: float = CONFIDENCE
    # "wall", or "cpu" where other work kept the threads waiting, or "device"
    clock: Literal["wall", "cpu", "device"] = "wall"
    contention: float | None = None
    speedup_wall: Bounds | None = None
    threshold: float
    floor_ms: float
    fidelity: dict[str, float] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seed: int
    spent_s: float = 0.0
    environment: Environment

    def headline(self) -> str:
        """One line for a terminal or a log."""
        if self.speedup is None:
            return f"{self.workload}: {self.verdict} ({self.reason})"
        s = self.speedup
        return (
            f"{self.workload}: {self.verdict}, {self.candidate.name} is {s.value:.3g}x "
            f"[{s.low:.3g}, {s.high:.3g}] as fast as {self.baseline.name} "
            f"({'interleaved pairs' if self.paired else 'unpaired'}: {self.pairs}"
            f"{f' in {self.launches} launches' if self.launches > 1 else ''}"
            f"{', processor time' if self.clock == 'cpu' else ''})"
        )


def compare_measurements(
    baseline: Measurement, candidate: Measurement, *, threshold: float, floor_ms: float
) -> Comparison:
    """Compares with a stored run: only on the same machine and workload, and said to be weaker."""

    def verdict(
        outcome: Verdict, reason: str, statistics: PairStatistics | None = None
    ) -> Comparison:
        return Comparison(
            workload=candidate.workload,
            verdict=outcome,
            reason=reason,
            paired=False,
            baseline=baseline.subject,
            candidate=candidate.subject,
            speedup=Bounds.of(statistics.speedup) if statistics else None,
            saved_ms=Bounds.of(statistics.saved_ms) if statistics else None,
            pairs=statistics.pairs if statistics else 0,
            threshold=threshold,
            floor_ms=floor_ms,
            notes=(WEAKER,),
            seed=candidate.seed,
            environment=candidate.environment,
        )

    differences = same_environment(baseline.environment, candidate.environment)
    if differences:
        return verdict(Verdict.INVALID, "the environment differs: " + "; ".join(differences))
    if baseline.workload != candidate.workload:
        reason = f"the workload differs: {baseline.workload} and {candidate.workload}"
        return verdict(Verdict.INVALID, reason)
    if baseline.subject.latency is None or candidate.subject.latency is None:
        return verdict(Verdict.INVALID, "one of the results holds no times")
    statistics = unpaired_statistics(
        baseline.subject.latency.samples_ms,
        candidate.subject.latency.samples_ms,
        seed=candidate.seed,
    )
    return verdict(decide(statistics, threshold=threshold, floor_ms=floor_ms), WEAKER, statistics)


def write_result(path: Path, result: Measurement | Comparison) -> Path:
    """Writes the JSON next to its final name and renames it; a reader never sees half a file.

    Raises:
        StorageError: the folder cannot be written or is full.
    """
    text = json.dumps(result.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        raise StorageError(
            f"cannot write the result {path}: {error.strerror}",
            "free space or choose another output",
        ) from error
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
    return path


def read_result(path: Path) -> Measurement | Comparison:
    """Reads a stored result.

    Raises:
        InvalidArtifact: missing, not JSON, of another schema, or with a field missing or unknown.
    """
    rerun = "measure again with `hcf bench run`"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidArtifact(f"cannot read the result {path}: {error.strerror}", rerun) from error
    except ValueError as error:
        raise InvalidArtifact(f"{path} is not a JSON result: {error}", rerun) from error
    if not isinstance(data, dict) or data.get("schema_version") != SCHEMA_VERSION:
        found = data.get("schema_version") if isinstance(data, dict) else type(data).__name__
        message = f"{path} has schema {found}, this version reads {SCHEMA_VERSION}"
        raise InvalidArtifact(message, rerun)
    try:
        if data.get("kind") == "comparison":
            return Comparison.model_validate(data)
        return Measurement.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = f"{path} is not a benchmark result: {where}: {first['msg']}"
        raise InvalidArtifact(message, rerun) from error
