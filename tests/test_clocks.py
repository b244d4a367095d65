"""Two clocks on calls that wait and calls that work; what the kernel says of processes that end."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hcf_bench.clocks import Sample, Usage, contention, read_usage, sample_call

MS = 1_000_000
linux = pytest.mark.skipif(sys.platform != "linux", reason="schedstat is Linux's")


def work(seconds: float) -> None:
    """Uses so much processor time, however long that takes."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


@contextmanager
def another_process(code: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_contention_is_the_share_of_waiting() -> None:
    start = Usage(cpu_ns=100 * MS, waiting_ns=40 * MS)
    assert contention(start, Usage(400 * MS, 140 * MS)) == pytest.approx(0.25)
    assert contention(start, Usage(200 * MS, 40 * MS)) == 0.0
    assert contention(start, Usage(100 * MS, 90 * MS)) == 1.0


def test_contention_is_none_where_nothing_is_known() -> None:
    some = Usage(100 * MS, 40 * MS)
    assert contention(None, some) is None
    assert contention(some, None) is None
    assert contention(some, some) is None  # nothing ran and nothing waited


def test_threads_that_ended_never_make_contention_negative() -> None:
    before = Usage(100 * MS, 40 * MS)
    assert contention(before, Usage(110 * MS, 10 * MS)) == 0.0
    assert contention(before, Usage(50 * MS, 50 * MS)) == 1.0


def test_a_sleeping_call_takes_time_but_no_processor() -> None:
    found = sample_call(lambda: time.sleep(0.05))
    assert found.wall_ms >= 50.0
    assert found.cpu_ms is not None and found.cpu_ms < found.wall_ms / 2


def test_a_working_call_is_seen_by_both_clocks() -> None:
    found = sample_call(lambda: work(0.03))
    assert found.cpu_ms is not None and found.cpu_ms >= 30.0
    assert found.wall_ms >= 30.0


def test_a_call_that_raises_is_not_swallowed() -> None:
    with pytest.raises(ZeroDivisionError):
        sample_call(lambda: 1 / 0)
    with pytest.raises(ValueError):
        sample_call(lambda: None, "cpu", "device")


@pytest.mark.gpu
def test_a_gpu_has_one_clock() -> None:
    for clock in ("host", "device"):
        found = sample_call(lambda: None, "cuda", clock)  # type: ignore[arg-type]
        assert found == Sample(found.wall_ms) and found.cpu_ms is None


@linux
def test_usage_of_this_process_grows_with_its_work() -> None:
    before = read_usage()
    work(0.05)
    after = read_usage()
    assert before is not None and after is not None
    assert after.cpu_ns - before.cpu_ns >= 40 * MS
    assert after.waiting_ns >= before.waiting_ns
    same = read_usage(os.getpid())
    assert same is not None and same.cpu_ns >= after.cpu_ns


@linux
def test_usage_of_another_process_is_its_own() -> None:
    with another_process("print(flush=True)\nwhile True: pass") as process:
        assert process.stdout is not None
        process.stdout.readline()  # it runs
        before, ours = read_usage(process.pid), read_usage()
        time.sleep(0.3)
        after, ours_after = read_usage(process.pid), read_usage()
    assert before is not None and after is not None
    assert ours is not None and ours_after is not None
    theirs = after.cpu_ns - before.cpu_ns
    waited = after.waiting_ns - before.waiting_ns
    assert theirs + waited >= 60 * MS  # it always wants to run
    assert ours_after.cpu_ns - ours.cpu_ns < 150 * MS  # this process slept


@linux
def test_usage_of_a_vanished_process_is_none() -> None:
    with another_process("pass") as process:
        process.wait()
        assert read_usage(process.pid) is None


@linux
def test_waiting_is_seen_when_more_want_to_run_than_there_are_cores() -> None:
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("needs processor affinity")
    spin = "import os\nos.sched_setaffinity(0, {%d})\nprint(flush=True)\nwhile True: pass"
    core = min(os.sched_getaffinity(0))
    with another_process(spin % core) as one, another_process(spin % core) as two:
        for process in (one, two):
            assert process.stdout is not None
            process.stdout.readline()
        before = read_usage(one.pid)
        time.sleep(0.5)
        share = contention(before, read_usage(one.pid))
    assert share is not None and share > 0.2  # half, on a core of their own


def test_processor_time_counts_every_thread() -> None:
    def two_threads() -> None:
        threads = [threading.Thread(target=work, args=(0.03,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    found = sample_call(two_threads)
    assert found.cpu_ms is not None and found.cpu_ms >= 60.0


@linux
def test_threads_that_come_and_go_hide_nothing() -> None:
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            thread = threading.Thread(target=lambda: None)
            thread.start()
            thread.join()

    churner = threading.Thread(target=churn)
    churner.start()
    try:
        found = [read_usage() for _ in range(2000)]
    finally:
        stop.set()
        churner.join()
    assert None not in found
