"""Records on disk; `synthetic_record` makes seeded ones for the tests of what is made of them."""

from __future__ import annotations

import json
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hcf.errors import InvalidArtifact
from hcf_bench.environment import Environment, Gpu
from hcf_bench.records import (
    Ceiling,
    LayerTime,
    Memory,
    Profile,
    Record,
    Row,
    SelfTest,
    machine_name,
    merge_rows,
    read_record,
    read_records,
    record_path,
)
from hcf_bench.results import Bounds, Latency, Stages
from hcf_bench.statistics import Verdict, decide, pair_statistics

ENVIRONMENT = Environment(
    cpu_model="Example(R) Fast(TM) Processor 9 (6/999)",
    cpu_cores=2,
    cpu_isa=("avx2", "fma"),
    cpu_governor="unknown",
    memory_gib=16,
    threads=2,
    os="Linux, kernel 6.1",
    python="3.11.2",
    packages={"torch": "2.13.0", "diffusers": "0.42.1"},
    gpus=(),
    load_average=0.5,
)
GPU = Gpu(name="NVIDIA H100 80GB HBM3", driver="580.1", memory_mib=81559, compute_capability="9.0")


def synthetic_row(
    rng: np.random.Generator,
    subject: str,
    ms: float,
    *,
    baseline_ms: float | None = None,
    workload: str = "sd15/unet",
    **more: Any,
) -> Row:
    """Times around `ms`; with a baseline also pairs, their interval and the verdict on it."""
    samples = ms * np.exp(rng.normal(0, 0.02, 24))
    found: dict[str, Any] = {}
    if baseline_ms is not None:
        other = baseline_ms * np.exp(rng.normal(0, 0.02, 24))
        statistics = pair_statistics(other.tolist(), samples.tolist(), seed=0)
        found = {
            "baseline": "eager",
            "speedup": Bounds.of(statistics.speedup),
            "pairs": statistics.pairs,
            "verdict": decide(statistics, threshold=0.01, floor_ms=0.0),
            "fidelity": {"sqnr_db": float(rng.uniform(30, 60))},
        }
    latency = Latency.of(samples.tolist(), 3 * ms)
    return Row(
        workload=workload,
        subject=subject,
        **{
            "latency": latency,
            "batch": 2,
            "throughput_per_s": 2e3 / latency.p50_ms,
            "memory": Memory(host_peak_mib=float(rng.integers(900, 9000))),
            "tflop": 1.606,
            "roofline_ms": 0.4 * ms,
            "fraction_of_peak": 0.38,
            "fraction_of_roofline": 0.4,
            "engine": {"engine": subject, "precision": "fp32", "threads": 2},
            **found,
            **more,
        },
    )


def synthetic_record(
    seed: int = 0, *, days: int = 0, scale: float = 1.0, rows: tuple[Row, ...] = (), **more: Any
) -> Record:
    """A record with every part filled; `scale` slows the whole machine down."""
    rng = np.random.default_rng(seed)
    pipeline = {
        "workload": "mini/pipeline",
        "batch": 1,
        "stages": Stages(text_ms=3.0, denoise_ms=150.0, decode_ms=20.0, denoiser_calls=4),
    }
    int8 = {"engine": {"precision": "int8", "layer_precisions": {"INT8": 40, "FP32": 12}}}
    made = rows or (
        synthetic_row(rng, "eager", 4000.0 * scale),
        synthetic_row(rng, "compile", 3000.0 * scale, baseline_ms=4000.0 * scale),
        synthetic_row(rng, "openvino", 2000.0 * scale, baseline_ms=4000.0 * scale, **int8),
        synthetic_row(rng, "slow|peer", 5000.0 * scale, baseline_ms=4000.0 * scale),
        synthetic_row(rng, "eager", 180.0 * scale, **pipeline),
        Row(workload="sd15/unet", subject="tensorrt", status="missing", reason="no CUDA device"),
        Row(
            workload="sd15/unet",
            subject="crasher",
            status="failed",
            reason="\x1b[31mRuntimeError\x1b[0m: <bad> & worse\n  at line 3\x00",
        ),
        Row(workload="sd15/unet", subject="sleeper", status="timed_out", reason="killed at 60 s"),
    )
    layer = LayerTime(
        name="down.0|conv", kind="conv", time_ms=90.0, floor_ms=30.0, excess_ms=60.0, tflop=0.1,
        gbyte=0.02,
    )  # fmt: skip
    profile = Profile(
        workload="sd15/unet", subject="eager", dtype="fp32", batch=2, total_ms=4000.0,
        floor_ms=1600.0, layers=(layer,) * 10,
    )  # fmt: skip
    selftest = SelfTest(
        name="A/A", slowdown=0.0, comparisons=200, alarms=1, right=196, undecided=3, pairs_p50=42,
        seconds_p50=4.2, seconds_max=20.0, load=4, overhead_us=3.1,
    )  # fmt: skip
    return Record(
        **{
            "name": "peers",
            "date": date(2026, 11, 24) + timedelta(days=days),
            "time_utc": "10:00:00",
            "commit": f"{seed:07x}c0ffee",
            "command": "hcf bench peers",
            "environment": ENVIRONMENT,
            "spent_s": 321.0,
            "ceilings": (
                Ceiling(name="copy", value=9.8, unit="GB/s"),
                Ceiling(name="gemm-fp32", value=0.142, unit="TFLOP/s", note="best of 3 shapes"),
            ),
            "rows": made,
            "profiles": (profile,),
            "selftests": (selftest,),
            "notes": ("a note",),
            **more,
        }
    )


def store(results: Path, *records: Record) -> None:
    """As a run leaves them below `results`."""
    for record in records:
        path = record_path(results, record)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record.model_dump(mode="json")), encoding="utf-8")


def test_a_record_survives_the_disk(tmp_path: Path) -> None:
    record = synthetic_record(3)
    store(tmp_path, record)
    path = record_path(tmp_path, record)
    assert path.name == "2026-11-24-0000003c0ffe-peers.json"
    assert read_record(path) == record
    assert record.rows[1].verdict is Verdict.FASTER


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"schema_version": 2}, "schema_version"),
        ({"kind": "comparison"}, "kind"),
        ({"surprise": 1}, "surprise"),
        ({"rows": [{"workload": "a"}]}, "rows.0.subject"),
        ({"ceilings": [{"name": "copy", "value": 0, "unit": "GB/s"}]}, "ceilings.0.value"),
        ({"time_utc": "noon"}, "time_utc"),
    ],
)
def test_another_schema_is_refused_by_field(
    tmp_path: Path, change: dict[str, Any], field: str
) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps(synthetic_record().model_dump(mode="json") | change))
    with pytest.raises(InvalidArtifact) as caught:
        read_record(path)
    assert "other.json" in str(caught.value) and field in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\udcff"])
def test_what_is_no_record_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InvalidArtifact, match="broken.json"):
        read_record(path)
    with pytest.raises(InvalidArtifact, match="absent.json"):
        read_record(tmp_path / "absent.json")


def test_records_of_one_day_are_in_the_order_they_ran(tmp_path: Path) -> None:
    late = synthetic_record(1, time_utc="18:00:00", commit="0000000")
    early = synthetic_record(2, time_utc="09:00:00", commit="fffffff")
    before = synthetic_record(3, days=-1, time_utc="23:00:00")
    store(tmp_path, late, early, before)
    assert [record for _, record in read_records(tmp_path)] == [before, early, late]


def test_a_machine_is_named_by_its_hardware() -> None:
    assert machine_name(ENVIRONMENT) == "example-fast-9-6-999-2c"
    assert machine_name(ENVIRONMENT.model_copy(update={"gpus": (GPU,)})) == "nvidia-h100-80gb-hbm3"


def test_a_later_row_replaces_an_earlier_one_of_the_same_device() -> None:
    rng = np.random.default_rng(0)
    rows = [
        synthetic_row(rng, "eager", ms, device=device)
        for ms, device in ((10.0, "cpu"), (1.0, "cuda"), (9.0, "cpu"))
    ]
    merged = merge_rows(synthetic_record(rows=(row,)) for row in rows)
    assert merged == (rows[2], rows[1])
