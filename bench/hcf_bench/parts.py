"""What a suite is made of: each kind of part measures one thing and hands over rows as it goes.

Everything that is timed runs in workers, but for the self-test, which is about timing in one
process; the process of the suite itself never touches the device.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hcf.errors import HcfError
from hcf_bench.records import Ceiling, Profile, Row
from hcf_bench.remote import Worker, ask_once
from hcf_bench.rows import (
    PartRun,
    check_output,
    default_batch,
    make_row,
    measured_row,
    pair_row,
    reference_output,
    row_line,
    status_of,
)
from hcf_bench.worker import Spec


def run_ceilings(run: PartRun) -> None:
    """Copy bandwidth and GEMM rate per dtype, in a worker of their own."""
    answer = ask_once(
        Spec(
            kind="ceilings",
            device=run.suite.device,
            dtypes=tuple(run.part.dtypes),
            threads=run.threads,
            budget_s=run.part.box_s / 2,
        ),
        deadline=run.deadline,
    )
    for item in answer["ceilings"]:
        ceiling = Ceiling.model_validate(item)
        run.log(f"  {ceiling.name}: {ceiling.value:.4g} {ceiling.unit}")
        run.emit("ceilings", ceiling)
    for note in answer.get("left_out", ()):
        run.emit("notes", note)


def run_profile(run: PartRun) -> None:
    """The ten layers furthest above their floor, for each dtype."""
    for dtype in run.part.dtypes:
        if run.over():
            return
        if f"gemm-{dtype}" not in run.ceilings:
            run.emit("notes", f"{run.part.name}: no ceiling for {dtype}, so no profile")
            continue
        spec = run.spec("eager", run.part.batch, "").model_copy(
            update={"kind": "profile", "dtype": dtype, "ceilings": dict(run.ceilings)}
        )
        answer = ask_once(spec, deadline=run.subject_deadline())
        profile = Profile.model_validate(answer["profile"])
        run.log(f"  {dtype}: {profile.total_ms:.1f} ms, floor {profile.floor_ms:.1f} ms")
        run.emit("profiles", profile)


def run_peers(run: PartRun) -> None:
    """The baseline, then each peer against it as interleaved pairs; outputs are checked first."""
    part = run.part
    batch = part.batch or default_batch(part.workload)
    with tempfile.TemporaryDirectory(prefix="hcf-bench-") as scratch:
        wanted = reference_output(run, batch, scratch)
        baseline = Worker(run.spec(part.baseline, batch, scratch), deadline=run.subject_deadline())
        try:
            try:
                baseline.start()
                check_output(baseline, part.baseline, wanted)
            except HcfError as error:
                row = make_row(run, part.baseline, batch, status_of(error), error.message)
                run.emit("rows", row)
                run.log(f"  {row_line(row)}")
                if row.status == "missing":
                    return
                raise HcfError(
                    f"the baseline {part.baseline} cannot run: {error.message}", error.fix
                ) from error
            baseline.deadline = run.deadline
            if (part.workload, part.baseline, batch) not in run.done:
                run.emit("rows", measured_row(run, baseline, part.baseline, batch, wanted))
            for peer in part.peers:
                if (part.workload, peer, batch) in run.done:
                    continue
                if run.over():
                    return
                if not baseline.alive:
                    run.emit("notes", f"{part.name}: {part.baseline} died and was started again")
                    baseline.close()
                    baseline = Worker(baseline.spec, deadline=run.deadline)
                    baseline.start()
                row = _against(run, baseline, peer, batch, scratch, wanted)
                run.emit("rows", row)
                run.log(f"  {row_line(row)}")
        finally:
            baseline.close()


def run_batches(run: PartRun) -> None:
    """Throughput of each peer by batch."""
    with tempfile.TemporaryDirectory(prefix="hcf-bench-") as scratch:
        for batch in run.part.batches:
            for peer in run.part.peers:
                if (run.part.workload, peer, batch) in run.done or run.over():
                    continue
                try:
                    spec = run.spec(peer, batch, scratch)
                    with Worker(spec, deadline=run.subject_deadline(), pause=False) as worker:
                        row = measured_row(run, worker, peer, batch, None)
                except HcfError as error:
                    row = make_row(run, peer, batch, status_of(error), error.message)
                run.emit("rows", row)
                run.log(f"  {row_line(row)}")


def run_artifacts(run: PartRun) -> None:
    """Artefact folders from prompt to pixels: the first against each of the others.

    A folder may be followed by `@engine-precision`, as in `out/quickstart@openvino-int8`.
    """
    part, batch = run.part, run.part.batch or 1
    with Worker(_artifact_spec(run, part.baseline, batch), deadline=run.deadline) as baseline:
        name = _artifact_name(part.baseline, baseline)
        run.emit("rows", measured_row(run, baseline, name, batch, None))
        for folder in part.peers:
            if run.over():
                return
            try:
                spec = _artifact_spec(run, folder, batch)
                with Worker(spec, deadline=run.subject_deadline()) as worker:
                    candidate = _artifact_name(folder, worker)
                    row = pair_row(run, baseline, name, worker, candidate, batch, None)
            except HcfError as error:
                row = make_row(run, folder, batch, status_of(error), error.message)
            run.emit("rows", row)
            run.log(f"  {row_line(row)}")


def run_selftest_part(run: PartRun) -> None:
    """Comparisons whose truth is known."""
    from hcf_bench.selftest import BUDGET_S, SelfTestConfig, run_selftest

    # a comparison that is out of its budget is undecided: the part ends within its box
    each_s = (run.deadline - time.monotonic()) / (2 * run.part.comparisons)
    config = SelfTestConfig(
        comparisons=run.part.comparisons,
        load=run.part.load,
        budget_s=min(each_s, BUDGET_S),
        seed=run.suite.seed,
    )
    for test in run_selftest(config, run.log):
        run.emit("selftests", test)


PARTS: dict[str, Callable[[PartRun], None]] = {
    "ceilings": run_ceilings,
    "peers": run_peers,
    "batches": run_batches,
    "profile": run_profile,
    "artifacts": run_artifacts,
    "selftest": run_selftest_part,
}


def _against(
    run: PartRun, baseline: Worker, peer: str, batch: int, scratch: str, wanted: Any
) -> Row:
    try:
        spec = run.spec(peer, batch, scratch)
        with Worker(spec, deadline=run.subject_deadline()) as worker:
            return pair_row(run, baseline, run.part.baseline, worker, peer, batch, wanted)
    except HcfError as error:
        return make_row(run, peer, batch, status_of(error), error.message)


def _artifact_spec(run: PartRun, text: str, batch: int) -> Spec:
    folder, _, asked = text.partition("@")
    engine, _, precision = asked.partition("-")
    return Spec(
        kind="artifact",
        model=folder,
        engine=engine or "auto",
        precision=precision or None,
        batch=batch,
        device=run.suite.device,
        threads=run.threads,
        seed=run.suite.seed,
        steps=run.part.steps,
    )


def _artifact_name(text: str, worker: Worker) -> str:
    sampling, engines = worker.ready.get("sampling") or {}, worker.ready.get("engines") or []
    steps = f", {sampling['num_inference_steps']} steps" if sampling else ""
    running = f", {engines[0]['engine']} {engines[0]['precision']}" if engines else ""
    return f"{Path(text.partition('@')[0]).name}{steps}{running}"
