"""Suites of tiny parts: what is on disk when, what a second run does, what is refused at once."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hcf.errors import MissingDependency, RecipeError
from hcf_bench.records import Record, Row, read_record, record_path
from hcf_bench.suite import (
    failures,
    load_suite,
    recipe_path,
    run_suite,
    selftest_record,
    source_commit,
    store_record,
)
from hcf_bench.suite_recipe import SuiteConfig

KERNEL = "kernel/group_norm_silu_1x32x16x16"
NOT_HERE = "onnxruntime-cuda-fp16"  # a GPU's
BUDGET_S = 600.0
BATCHES = {
    "kind": "batches", "workload": KERNEL, "peers": ["eager"], "batches": [1], "pairs_s": 1.0,
}  # fmt: skip
PEERS = {
    "kind": "peers", "workload": KERNEL, "baseline": "eager", "pairs": 6, "pairs_s": 1.0,
    "threshold": 20.0,
}  # fmt: skip


def suite_of(*parts: dict[str, Any], **options: Any) -> SuiteConfig:
    return SuiteConfig(name="tiny", threads=1, parts=list(parts), **options)


WHOLE = suite_of(
    {"name": "ceilings", "kind": "ceilings", "dtypes": ["fp32", "fp8"], "box_s": 10.0},
    {"name": "broken", **PEERS, "peers": [NOT_HERE], "subject_s": 0.1},  # nothing is that quick
    {"name": "norm", **PEERS, "peers": [NOT_HERE]},
    {"name": "batches", **BATCHES, "batches": [1, 3]},
)
TWO = suite_of({"name": "one", **BATCHES}, {"name": "two", **BATCHES, "batches": [2]})


@dataclass
class Ran:
    """A run: its record, what it said, and what lay on disk when it said it."""

    out: Path
    record: Record
    lines: list[str] = field(default_factory=list)
    on_disk: list[dict[str, str]] = field(default_factory=list)

    def part(self, name: str) -> Path:
        (path,) = (self.out / "parts").glob(f"*-{name}.json")
        return path

    def said(self, name: str) -> str:
        """What became of a part."""
        began = [line for line in self.lines if line.startswith(f"[{name}]")]
        return began[0].partition("] ")[2] if began else ""


def run(suite: SuiteConfig, out: Path, **options: Any) -> Ran:
    lines: list[str] = []
    on_disk: list[dict[str, str]] = []

    def log(line: str) -> None:
        lines.append(line)
        files = sorted((out / "parts").glob("*.json"))
        on_disk.append({path.name: path.read_text() for path in files})

    record = run_suite(suite, out, **{"budget_s": BUDGET_S, "log": log, **options})
    return Ran(out, record, lines, on_disk)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def write_recipe(path: Path, **changes: Any) -> Path:
    """A suite of one part with the keys that are given."""
    tree = {"name": "tiny", "parts": [{"name": "one", **BATCHES, **changes}]}
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Ceilings, a part whose baseline cannot run, one with a peer that is not here, and batches."""
    return run(WHOLE, tmp_path_factory.mktemp("whole"), command="hcf bench suite tiny.yaml")


def test_every_part_delivers_though_one_cannot(whole: Ran) -> None:
    rows = [(row.workload, row.subject, row.batch, row.status) for row in whole.record.rows]
    assert rows == [
        (KERNEL, "eager", 1, "timed_out"),
        (KERNEL, "broken", 1, "failed"),
        (KERNEL, "eager", 1, "ok"),
        (KERNEL, NOT_HERE, 1, "missing"),
        (KERNEL, "eager", 1, "ok"),
        (KERNEL, "eager", 3, "ok"),
    ]
    missing = whole.record.rows[3]
    assert "cuda" in missing.reason and missing.dtype == "fp16"
    assert missing.latency is None and missing.speedup is None
    assert not whole.record.finished
    late, broken = whole.record.rows[:2]
    assert "baseline eager cannot run" in broken.reason
    assert failures(whole.record) == [  # what is missing did not fail
        f"{KERNEL} eager: timed_out: {late.reason}",
        f"{KERNEL} broken: failed: {broken.reason}",
    ]
    assert any(note.startswith("broken: no fp32 reference") for note in whole.record.notes)
    assert any(line.startswith("[broken] failed") for line in whole.lines)


def test_rows_are_held_against_the_ceilings_of_the_same_run(whole: Ran) -> None:
    ceilings = {ceiling.name: ceiling.value for ceiling in whole.record.ceilings}
    assert {"copy", "gemm-fp32"} <= set(ceilings)
    assert ("gemm-fp8" in ceilings) != any("gemm-fp8" in note for note in whole.record.notes)
    for row in whole.record.rows:
        if row.status != "ok":
            continue
        assert row.latency is not None and row.tflop is not None
        assert row.gbyte and row.roofline_ms  # a norm moves bytes
        seconds = row.latency.p50_ms / 1e3
        assert row.fraction_of_peak == pytest.approx(row.tflop / seconds / ceilings["gemm-fp32"])
        assert row.fraction_of_roofline == pytest.approx(row.roofline_ms / row.latency.p50_ms)
    one, three = whole.record.rows[-2:]
    assert one.gbyte and three.gbyte == pytest.approx(3 * one.gbyte, rel=0.01)
    assert three.latency and three.throughput_per_s == pytest.approx(3e3 / three.latency.p50_ms)


def test_a_part_is_on_disk_after_its_first_row(whole: Ran) -> None:
    seen = [
        (line, Record.model_validate_json(whole.on_disk[i]["03-batches.json"]))
        for i, line in enumerate(whole.lines)
        if line.strip().startswith("eager b")
    ]
    assert [line.strip()[:8] for line, _ in seen] == ["eager b1", "eager b3"]
    assert [len(record.rows) for _, record in seen] == [1, 2]
    assert not any(record.finished for _, record in seen)
    assert read_record(whole.part("batches")).finished


def test_the_record_says_where_it_comes_from(whole: Ran) -> None:
    record = read_record(whole.out / "tiny.json")
    assert record == whole.record
    assert record.command == "hcf bench suite tiny.yaml"
    assert record.commit == source_commit()
    assert record.environment.threads == 1
    assert record.time_utc and record.spent_s > 0.0
    assert [path.name for path in sorted((whole.out / "parts").iterdir())] == [
        "00-ceilings.json", "01-broken.json", "02-norm.json", "03-batches.json",
    ]  # fmt: skip


def test_the_table_fits_a_screen(whole: Ran) -> None:
    lines = (whole.out / "table.txt").read_text().splitlines()
    assert len(lines) <= 60
    text = "\n".join(lines)
    for word in (KERNEL, "eager", NOT_HERE, "broken"):
        assert word in text


def test_a_second_run_goes_on_where_the_first_stopped(whole: Ran, tmp_path: Path) -> None:
    out = shutil.copytree(whole.out, tmp_path / "out")
    norm = out / "parts" / "02-norm.json"
    edit(norm, finished=False)  # as if cut
    before = {path.name: path.read_bytes() for path in (out / "parts").iterdir()}
    again = run(WHOLE, out, only=["ceilings", "norm", "batches"])
    assert again.said("ceilings") == again.said("batches") == "done before"
    assert again.said("norm").startswith("peers")
    assert any(line.strip().startswith(f"{NOT_HERE}: missing") for line in again.lines)
    assert again.record.rows == whole.record.rows  # no time was taken twice, and none is lost
    assert again.record.ceilings == whole.record.ceilings
    assert read_record(norm).finished
    for name in ("00-ceilings.json", "03-batches.json"):
        assert (out / "parts" / name).read_bytes() == before[name]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """`TWO` with only its second part run."""
    return run(TWO, tmp_path_factory.mktemp("two"), only=["two"])


@pytest.fixture(scope="module")
def both(first: Ran, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """`first`, gone on with."""
    out = tmp_path_factory.mktemp("both") / "out"
    return run(TWO, shutil.copytree(first.out, out))


@pytest.fixture
def copy(both: Ran, tmp_path: Path) -> Path:
    """A folder in which both parts are done."""
    return shutil.copytree(both.out, tmp_path / "out")


def test_only_the_parts_asked_for(first: Ran, both: Ran) -> None:
    assert [row.batch for row in first.record.rows] == [2]
    assert "not run: one" in first.record.notes and not first.record.finished
    assert first.lines[-1] == "left for another run: one"
    assert not list((first.out / "parts").glob("*-one.json"))
    assert [row.batch for row in both.record.rows] == [1, 2]
    assert both.said("two") == "done before" and both.record.finished
    assert both.record.rows[1] == first.record.rows[0]
    assert not failures(both.record)
    with pytest.raises(RecipeError, match="no part three") as caught:
        run(TWO, both.out, only=["three"])
    assert "one, two" in caught.value.fix


def test_what_another_commit_left_is_measured_again(both: Ran, copy: Path) -> None:
    one = copy / "parts" / "00-one.json"
    edit(one, commit="0" * 40)
    again = run(TWO, copy)
    assert again.said("one").startswith("batches") and again.said("two") == "done before"
    stored, measured = read_record(both.part("one")), read_record(one)
    assert measured.commit == stored.commit and again.record.finished
    assert len(measured.rows) == 1 and measured.rows[0].latency != stored.rows[0].latency


@pytest.mark.parametrize("change", ["nothing", "commit", "cpu_model", "packages", "damage"])
def test_what_is_not_of_this_code_and_machine_is_not_used(copy: Path, change: str) -> None:
    one = copy / "parts" / "00-one.json"
    machine = json.loads(one.read_text())["environment"]
    if change == "commit":
        edit(one, commit="0" * 40)
    elif change == "damage":
        one.write_text(one.read_text()[:100])
    elif change != "nothing":
        other = {"cpu_model": "Another CPU", "packages": {"torch": "0.0"}}[change]
        edit(one, environment={**machine, change: other})
    found = run(TWO, copy, only=["two"])
    if change == "nothing":
        assert [row.batch for row in found.record.rows] == [1, 2] and found.record.finished
    else:
        assert [row.batch for row in found.record.rows] == [2]
        assert "not run: one" in found.record.notes


def test_another_load_is_no_other_machine(copy: Path) -> None:
    one = copy / "parts" / "00-one.json"
    edit(one, environment={**json.loads(one.read_text())["environment"], "load_average": 99.0})
    assert run(TWO, copy).said("one") == "done before"


def test_without_resume_a_part_is_measured_again(both: Ran, copy: Path) -> None:
    again = run(TWO, copy, resume=False, only=["two"])
    assert again.said("two").startswith("batches")
    (row,) = again.record.rows
    assert row.batch == 2 and row.latency != both.record.rows[1].latency


def test_a_recipe_that_changed_is_not_done_before(copy: Path) -> None:
    more = suite_of({"name": "one", **BATCHES, "batches": [1, 3]}, {"name": "two", **BATCHES})
    assert [row.batch for row in run(more, copy, only=["one"]).record.rows][:2] == [1, 3]


def test_a_part_ends_with_its_time_box(tmp_path: Path) -> None:
    part = {"name": "one", **BATCHES, "batches": [1, 2], "box_s": 0.1}
    found = run(suite_of(part), tmp_path)
    assert not found.record.finished
    assert "one: cut at its time box" in found.record.notes
    assert [row.status for row in found.record.rows] == ["timed_out"]  # the second was not begun
    assert failures(found.record)


def test_rows_that_failed_are_tried_again_though_the_part_was_finished(tmp_path: Path) -> None:
    suite = suite_of({"name": "one", **BATCHES, "subject_s": 0.1})
    for _ in range(2):
        found = run(suite, tmp_path)
        assert found.record.finished and found.said("one").startswith("batches")
        assert [row.status for row in found.record.rows] == ["timed_out"]
        assert any(line.strip().startswith("eager: timed_out") for line in found.lines)


def test_no_budget_leaves_everything(tmp_path: Path) -> None:
    began = time.monotonic()
    found = run(TWO, tmp_path, budget_s=0.0)
    assert time.monotonic() - began < 10.0
    assert not found.record.rows and not found.record.finished
    assert "not run: one, two" in found.record.notes
    assert found.lines == ["left for another run: one, two"]
    assert (tmp_path / "tiny.json").is_file() and (tmp_path / "table.txt").is_file()
    part = {"name": "long", **BATCHES, "least_s": BUDGET_S + 1.0}
    assert "not run: long" in run(suite_of(part), tmp_path).record.notes


def test_parts_can_lie_elsewhere(tmp_path: Path) -> None:
    profile = {"name": "layers", "kind": "profile", "workload": KERNEL, "dtypes": ["fp32"]}
    found = run(suite_of(profile), tmp_path / "out", parts_folder=tmp_path / "kept")
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["00-layers.json"]
    assert "layers: no ceiling for fp32, so no profile" in found.record.notes


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_a_gpu_that_is_not_here_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(MissingDependency, match="no CUDA device") as caught:
        run(suite_of({"name": "one", **BATCHES}, device="cuda"), tmp_path)
    assert "gpu-rehearsal" in caught.value.fix
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "wrong", "near"),
    [
        ({"workload": "tiny/unett"}, "tiny/unett", "tiny/unet"),
        ({"peers": ["onnxruntim"]}, "onnxruntim", "onnxruntime"),
        ({"kind": "batchs"}, "batchs", "batches"),
        ({"batchs": [1]}, "parts.0.batchs", "batch"),
        ({"box_s": 0}, "parts.0.box_s", "greater than 0"),
        ({"name": "../up"}, "parts.0.name", "match"),
    ],
)
def test_a_recipe_is_refused_when_it_is_read(
    tmp_path: Path, change: dict[str, Any], wrong: str, near: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        load_suite(write_recipe(tmp_path / "tiny.yaml", **change))
    assert wrong in caught.value.message
    assert near in f"{caught.value}"


def test_recipes_take_overrides(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "tiny.yaml")
    assert load_suite(path, ["parts.0.batches=[4]", "threads=2"]).parts[0].batches == [4]
    with pytest.raises(RecipeError, match="parts.0.batch"):
        load_suite(path, ["parts.0.batch=0"])
    with pytest.raises(RecipeError, match="threds"):
        load_suite(path, ["threds=2"])


def test_the_rehearsal_has_every_kind_of_part() -> None:
    suite = load_suite(recipe_path("rehearsal.yaml"))
    assert suite.device == "cpu"
    assert {part.kind for part in suite.parts} >= {"ceilings", "peers", "batches", "profile"}
    with pytest.raises(RecipeError, match="nothing.yaml"):
        recipe_path("nothing.yaml")


def test_failures_are_the_rows_that_promise_a_time_and_have_none(both: Ran) -> None:
    rows = tuple(
        Row(workload="w", subject=status, status=status, reason=f"why {status}")
        for status in ("ok", "missing", "failed", "timed_out", "invalid")
    )
    assert failures(both.record.model_copy(update={"rows": rows})) == [
        "w failed: failed: why failed",
        "w timed_out: timed_out: why timed_out",
        "w invalid: invalid: why invalid",
    ]


def test_a_record_is_stored_by_machine_date_and_commit(both: Ran, tmp_path: Path) -> None:
    path = store_record(both.record, tmp_path)
    assert path == record_path(tmp_path, both.record)
    assert read_record(path) == both.record
    record = selftest_record((), 1, "hcf bench selftest")
    assert (record.name, record.commit) == ("selftest", source_commit())


def test_the_commit_of_the_sources(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        who = ("-c", "user.name=test", "-c", "user.email=test@localhost")
        command = ["git", "-C", str(tmp_path), *who, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    source = tmp_path / "hcf" / "a.py"
    source.parent.mkdir()
    source.write_text("a = 1\n")
    without = source_commit(tmp_path)
    assert without.startswith("src") and without == source_commit(tmp_path)
    source.write_text("a = 2\n")
    assert source_commit(tmp_path) != without

    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    head = git("rev-parse", "HEAD")
    assert source_commit(tmp_path) == head
    (tmp_path / "notes.txt").write_text("no source")
    assert source_commit(tmp_path) == head
    (tmp_path / "hcf" / "b.py").write_text("b = 1\n")
    assert source_commit(tmp_path).startswith(f"{head[:12]}-dirty")
    (tmp_path / "hcf" / "b.py").unlink()
    assert source_commit(tmp_path) == head
    source.write_text("a = 3\n")
    assert source_commit(tmp_path).startswith(f"{head[:12]}-dirty")
