"""Workers: what they answer, and what is left when one crashes, hangs, or loses its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from hcf.errors import MissingDependency
from hcf_bench.clocks import Sample
from hcf_bench.pairs import compare_subjects
from hcf_bench.records import Memory
from hcf_bench.remote import Worker, WorkerFailed, WorkerTimeout
from hcf_bench.statistics import Verdict
from hcf_bench.worker import Spec

BLOCKS = Spec(kind="blocks", blocks=3)
LONG_S = 120.0  # until a worker must be warm, however busy the machine is
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def soon(seconds: float = LONG_S) -> float:
    return time.monotonic() + seconds


def process_of(worker: Worker) -> psutil.Process:
    assert worker._process is not None
    return psutil.Process(worker._process.pid)


def is_gone(pid: int) -> bool:
    """Ended; a zombie whose new parent does not care counts as ended."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def happens(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker(BLOCKS, deadline=soon(600.0)) as found:
        yield found


def test_a_worker_is_warm_when_it_has_started(worker: Worker) -> None:
    assert worker.ready["first_ms"] > 0.0
    assert worker.ready["forwards"] == 1
    assert worker.memory == Memory.model_validate(worker.ready["memory"])
    assert worker.memory.host_peak_mib is not None and worker.memory.host_peak_mib > 10.0
    assert worker.memory.device_peak_mib is None


def test_a_sample_has_two_clocks(worker: Worker) -> None:
    found = [worker.sample(i) for i in range(3)]
    for sample in found:
        assert sample.wall_ms > 0.0 and sample.cpu_ms is not None and sample.cpu_ms > 0.0
    assert len({sample.wall_ms for sample in found}) > 1  # each is a measurement of its own


def test_an_output_is_the_same_network_here_and_there(worker: Worker) -> None:
    from hcf_bench.selftest import Blocks

    found = worker.output()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, Blocks(3, BLOCKS.seed)().numpy(), atol=1e-5)


@linux
def test_a_worker_is_stopped_between_requests(worker: Worker) -> None:
    process = process_of(worker)
    assert happens(lambda: process.status() == psutil.STATUS_STOPPED)
    before = worker.usage()
    time.sleep(0.1)
    assert worker.usage() == before  # takes nothing while the other side is timed
    worker.sample(0)
    after = worker.usage()
    assert before is not None and after is not None and after.cpu_ns > before.cpu_ns
    assert happens(lambda: process.status() == psutil.STATUS_STOPPED)


@linux
def test_a_worker_that_is_not_paused_goes_on() -> None:
    with Worker(BLOCKS, deadline=soon(), pause=False) as worker:
        worker.sample(0)
        time.sleep(0.05)
        pid = process_of(worker).pid
        assert psutil.Process(pid).status() != psutil.STATUS_STOPPED
    assert is_gone(pid)  # it ends with its block
    assert worker.usage() is None
    with pytest.raises(WorkerFailed, match="not running"):
        worker.sample(0)
    gpu = BLOCKS.model_copy(update={"device": "cuda"})
    assert not Worker(gpu, deadline=soon()).pause  # its work goes on by itself


def test_two_workers_are_sides_of_a_comparison(worker: Worker) -> None:
    with Worker(BLOCKS, deadline=soon()) as other:
        found = compare_subjects(
            worker.subject("a", "hash"), other.subject("b"),
            workload="blocks", pairs=6, budget_s=20.0, threshold=20.0, threads=1,
        )  # fmt: skip
    assert found.verdict is Verdict.SAME
    assert found.baseline.content_hash == "hash"
    assert found.baseline.latency is not None
    assert found.baseline.latency.first_ms == worker.ready["first_ms"]
    assert found.candidate.cpu_p50_ms is not None
    if sys.platform == "linux":
        assert found.contention is not None  # of the workers


def test_a_crash_is_named_with_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nfor i in range(20): print('line', i, file=sys.stderr)\n"
    )
    worker = Worker(Spec(kind="fault", fault="crash"), deadline=soon(), paths=[tmp_path])
    with pytest.raises(WorkerFailed, match="SIGSEGV") as caught, worker:
        pass
    assert "line 19" in caught.value.message and "line 0;" not in caught.value.message
    assert worker._process is None


def test_a_crash_between_requests_is_named() -> None:
    with Worker(BLOCKS, deadline=soon()) as worker:
        process_of(worker).kill()
        with pytest.raises(WorkerFailed, match="SIGKILL"):
            worker.sample(0)


def test_a_worker_that_died_stays_dead() -> None:
    with Worker(BLOCKS, deadline=soon()) as worker:
        process_of(worker).kill()
        for _ in range(3):
            with pytest.raises(WorkerFailed):
                worker.sample(0)


def test_a_hang_is_ended_at_its_deadline_with_all_it_started(tmp_path: Path) -> None:
    seconds = 4.0
    (tmp_path / "sitecustomize.py").write_text(
        "import pathlib, subprocess\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        f"pathlib.Path({str(tmp_path / 'child')!r}).write_text(str(child.pid))\n"
    )
    began = time.monotonic()
    worker = Worker(Spec(kind="fault", fault="hang"), deadline=soon(seconds), paths=[tmp_path])
    with pytest.raises(WorkerTimeout, match="time box") as caught, worker:
        pass
    assert seconds <= time.monotonic() - began < seconds + 5.0
    assert caught.value.fix
    assert worker._process is None
    assert happens(lambda: is_gone(int((tmp_path / "child").read_text())))


def test_a_hang_of_a_sample_is_ended_too(worker: Worker) -> None:
    with Worker(BLOCKS, deadline=soon()) as other:
        pid = process_of(other).pid
        other.deadline = time.monotonic()
        with pytest.raises(WorkerTimeout):
            other.sample(0)
        assert is_gone(pid)
    assert worker.sample(0).wall_ms > 0.0  # nobody else is ended


def test_an_error_in_building_says_what_and_how_to_fix_it() -> None:
    typo = Spec(kind="peer", workload="tiny/unett", peer="eager")
    with pytest.raises(WorkerFailed) as caught, Worker(typo, deadline=soon()):
        pass
    assert "RecipeError" in caught.value.message and "tiny/unett" in caught.value.message
    assert "did you mean tiny/unet" in caught.value.fix
    assert "eager on tiny/unett" in caught.value.message


def test_what_is_not_here_is_missing_not_failed() -> None:
    gpu = Spec(kind="peer", workload="tiny/unet", peer="onnxruntime-cuda-fp16")
    with pytest.raises(MissingDependency, match="cuda"), Worker(gpu, deadline=soon()):
        pass


def test_an_output_that_is_not_finite_is_never_timed(worker: Worker) -> None:
    with Worker(Spec(kind="fault", fault="nan"), deadline=soon()) as broken:
        assert np.isnan(broken.output()).any()
        found = compare_subjects(worker.subject("a"), broken.subject("b"), workload="w", pairs=6)
    assert found.verdict is Verdict.INVALID
    assert "candidate's output is not finite" in found.reason
    assert found.candidate.latency is None and found.speedup is None


def test_what_libraries_print_is_no_answer(tmp_path: Path) -> None:
    # prints, from Python, from C and from a child, where the worker imports what it builds
    (tmp_path / "sitecustomize.py").write_text(
        "import os, subprocess, sys\n"
        "class Loud:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('hcf_bench.selftest', 'torch', 'numpy'):\n"
        "            print('welcome to', name, flush=True)\n"
        "            os.write(1, b'{\"wall_ms\": 0.0}\\n')\n"
        "            subprocess.run(['echo', 'from a child'])\n"
        f"            open({str(tmp_path / 'seen')!r}, 'a').write(name + '\\n')\n"
        "sys.meta_path.insert(0, Loud())\n"
    )
    with Worker(BLOCKS, deadline=soon(), paths=[tmp_path]) as worker:
        assert worker.sample(0).wall_ms > 0.0
        assert np.isfinite(worker.output()).all()
    assert "hcf_bench.selftest" in (tmp_path / "seen").read_text().split()


def test_paths_come_before_the_packages_that_are_installed(tmp_path: Path) -> None:
    """As the roots of another commit do."""
    package = tmp_path / "hcf_bench"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "worker.py").write_text(
        "import json, sys\n"
        "sys.stdin.readline()\n"
        "print(json.dumps({'ready': {'report': {'engine': 'another commit'}}}), flush=True)\n"
        "for line in sys.stdin:\n"
        "    print(json.dumps({'wall_ms': 7.0, 'cpu_ms': None}), flush=True)\n"
    )
    with Worker(BLOCKS, deadline=soon(), paths=[tmp_path]) as worker:
        assert worker.sample(0) == Sample(7.0)
        assert worker.subject("x").engines == ({"engine": "another commit"},)


@linux
def test_a_worker_dies_with_its_parent() -> None:
    parent_code = (
        "import time\n"
        "from hcf_bench.remote import Worker\n"
        "from hcf_bench.worker import Spec\n"
        f"worker = Worker(Spec(kind='blocks', blocks=2), deadline=time.monotonic() + {LONG_S})\n"
        "worker.start()\n"
        "print(worker._process.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", parent_code], stdout=subprocess.PIPE)
    try:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        # it could not leave by itself
        assert happens(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.communicate()
    assert happens(lambda: is_gone(pid))
