"""What a suite leaves on disk: rows, ceilings, profiles and the environment they were taken in.

A record is one strict JSON file, `bench/results/<machine>/<date>-<commit>.json`. Nothing in it is
written by hand: measured rows come from a run, estimates from a formula that is named in the row,
published ones from `bench/results/published.yaml`, where each has its source.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, Field, ValidationError

from hcf.errors import InvalidArtifact
from hcf_bench.environment import Environment
from hcf_bench.results import STRICT, Bounds, Latency, Stages
from hcf_bench.statistics import Verdict

RECORD_SCHEMA: Final = 1
# ok: timed. missing: a package or device is not here. failed: it raised. timed_out: killed at its
# time box. invalid: its output is wrong or its environment differs, so no time is kept.
Status = Literal["ok", "missing", "failed", "timed_out", "invalid"]
Provenance = Literal["measured", "published", "estimated"]
REFERENCE: Final = "eager"  # fp32: what every output is held against


class Memory(BaseModel):
    """Peaks while the subject was built and ran, MiB; None where the machine cannot tell."""

    model_config = STRICT

    host_peak_mib: float | None = None
    device_peak_mib: float | None = None


class Row(BaseModel):
    """One subject on one workload. Times are of one forward (module) or one batch (pipeline).

    `tflop` and `gbyte` are counted over the whole batch; `roofline_ms` is the sum over ops of the
    larger of FLOPs / ceiling and bytes / ceiling; `fraction_of_peak` is against the measured GEMM
    ceiling of the row's dtype. `speedup` is baseline time over this row's time, from pairs.
    """

    model_config = STRICT

    workload: str
    subject: str
    device: str = "cpu"
    dtype: str = "fp32"
    batch: int = Field(1, gt=0)
    status: Status = "ok"
    reason: str = ""
    provenance: Provenance = "measured"
    source: str = ""
    latency: Latency | None = None
    p50_ms: float | None = None
    stages: Stages | None = None
    throughput_per_s: float | None = None
    memory: Memory | None = None
    tflop: float | None = None
    gbyte: float | None = None
    roofline_ms: float | None = None
    fraction_of_peak: float | None = None
    fraction_of_roofline: float | None = None
    baseline: str = ""
    speedup: Bounds | None = None
    pairs: int = 0
    verdict: Verdict | None = None
    clock: Literal["wall", "cpu", "device"] = "wall"
    fidelity: dict[str, float] = Field(default_factory=dict)
    engine: dict[str, Any] = Field(default_factory=dict)


class Ceiling(BaseModel):
    """What the machine reached in the same run: "copy" in GB/s, "gemm-<dtype>" in TFLOP/s."""

    model_config = STRICT

    name: str
    value: float = Field(gt=0)
    unit: Literal["GB/s", "TFLOP/s"]
    note: str = ""


class LayerTime(BaseModel):
    """One layer of a profile. `floor_ms` is its roofline sum; `excess_ms` what lies above it."""

    model_config = STRICT

    name: str
    kind: str
    time_ms: float
    floor_ms: float
    excess_ms: float
    tflop: float
    gbyte: float


class Profile(BaseModel):
    """The layers of one module that lie furthest above their floor, worst first."""

    model_config = STRICT

    workload: str
    subject: str
    dtype: str
    batch: int
    total_ms: float
    floor_ms: float
    layers: tuple[LayerTime, ...]


class SelfTest(BaseModel):
    """Comparisons whose truth is known. `slowdown` is 0 for the same against itself.

    `call_ms` is the processor time of the timed call: the shorter it is, the sooner a verdict.
    """

    model_config = STRICT

    name: str
    slowdown: float
    comparisons: int
    alarms: int
    right: int
    undecided: int
    pairs_p50: float
    seconds_p50: float
    seconds_max: float
    load: int
    processes: int = 1
    overhead_us: float | None = None
    call_ms: float | None = None


class Record(BaseModel):
    """One run of a suite."""

    model_config = STRICT

    schema_version: Literal[1] = RECORD_SCHEMA
    kind: Literal["record"] = "record"
    name: str
    date: date
    # of the start; tells records of one day apart, whose commits have no order
    time_utc: str = Field("", pattern=r"^(\d\d:\d\d:\d\d)?$")
    commit: str
    command: str
    environment: Environment
    finished: bool = True
    recipe: str = ""  # of a suite's part: a hash of what was asked for
    spent_s: float = 0.0
    ceilings: tuple[Ceiling, ...] = ()
    rows: tuple[Row, ...] = ()
    profiles: tuple[Profile, ...] = ()
    selftests: tuple[SelfTest, ...] = ()
    notes: tuple[str, ...] = ()


def machine_name(environment: Environment) -> str:
    """The folder of a machine: its GPU, or its processor with cores ("intel-xeon-6-167-2c").

    It names a model of hardware, never a host.
    """
    model = environment.gpus[0].name if environment.gpus else environment.cpu_model
    slug = re.sub(r"\b(corporation|processor|cpu)\b|\((?:r|tm)\)", " ", model.lower())
    slug = re.sub(r"[^a-z0-9]+", "-", slug).strip("-")
    return slug if environment.gpus else f"{slug}-{environment.cpu_cores}c"


def record_path(results: Path, record: Record) -> Path:
    """`results/<machine>/<date>-<commit>[-name].json`."""
    folder = results / machine_name(record.environment)
    return folder / f"{record.date.isoformat()}-{record.commit[:12]}-{record.name}.json"


def read_record(path: Path) -> Record:
    """Reads a stored record.

    Raises:
        InvalidArtifact: missing, not JSON, or another schema; names the field.
    """
    rerun = "measure again with `hcf bench suite`, or delete the file"
    try:
        return Record.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise InvalidArtifact(f"cannot read the record {path}: {error.strerror}", rerun) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise InvalidArtifact(f"{path} is no record: {where}: {first['msg']}", rerun) from error
    except ValueError as error:
        raise InvalidArtifact(f"{path} is not JSON: {error}", rerun) from error


def read_records(results: Path) -> list[tuple[Path, Record]]:
    """Every record below a folder, oldest first."""
    found = [(path, read_record(path)) for path in sorted(results.glob("*/*.json"))]
    return sorted(found, key=lambda pair: (pair[1].date, pair[1].time_utc, pair[0].name))


def merge_rows(records: Iterable[Record]) -> tuple[Row, ...]:
    """Rows of several records, a later one in place of an earlier one of the same subject."""
    rows: dict[tuple[str, str, str, str, int], Row] = {}
    for record in records:
        for row in record.rows:
            rows[row.workload, row.subject, row.device, row.dtype, row.batch] = row
    return tuple(rows.values())
