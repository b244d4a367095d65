"""The other side of `worker.py`: starts a subject's process, asks it for samples, ends it.

While one side of a comparison is timed, the other is stopped (SIGSTOP), so that threads which spin
for work take no core from it. A worker that does not answer by its deadline is killed with all it
started; one that dies is reported with the last lines it printed.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from hcf.errors import HcfError, MissingDependency
from hcf_bench.clocks import Sample, Usage, read_usage
from hcf_bench.pairs import Subject
from hcf_bench.records import Memory
from hcf_bench.results import Stages
from hcf_bench.worker import Spec

LAST_LINES = 6
# Where 4 KiB pages happen to lie in memory makes one process a few percent faster than another that
# does the same, and the one that was started first slower; with 2 MiB pages far less of that is
# left (measured, docs/benchmarking.md). Both sides get them, from glibc's allocator.
HUGE_PAGES = "glibc.malloc.hugetlb=1"
STAGE_NAMES = ("text_ms", "denoise_ms", "decode_ms", "denoiser_calls")


class WorkerTimeout(HcfError):
    """A subject did not answer within its time box and was killed."""


class WorkerFailed(HcfError):
    """A subject raised or died; the message has its own words."""


class Worker:
    """A subject in its own process. Use as a context manager; `start` returns when it is warm.

    Args:
        spec: what it builds.
        deadline: `time.monotonic()` at which it is killed, whatever it does.
        paths: searched for packages before all others: the source roots of another commit.
        pause: stop the process between requests. Not for a GPU's: its work goes on by itself.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        deadline: float,
        paths: Sequence[Path] = (),
        pause: bool = True,
    ) -> None:
        self.spec = spec
        self.deadline = deadline
        self.paths = tuple(paths)
        self.pause = pause and hasattr(signal, "SIGSTOP") and spec.device == "cpu"
        self.ready: dict[str, Any] = {}
        self.first: dict[str, Any] = {}
        self.stages: list[dict[str, Any]] = []
        self.started = time.monotonic()
        self._process: subprocess.Popen[bytes] | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the worker)
        self._buffer = b""

    def __enter__(self) -> Worker:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        """Starts the process and waits until its subject is built and warm."""
        environment = dict(os.environ)
        if self.paths:
            known = environment.get("PYTHONPATH", "")
            roots = [str(path) for path in self.paths]
            environment["PYTHONPATH"] = os.pathsep.join([*roots, *([known] if known else [])])
        environment["OMP_NUM_THREADS"] = str(self.spec.threads)
        if self.spec.device == "cpu":
            environment.setdefault("GLIBC_TUNABLES", HUGE_PAGES)
        self._process = subprocess.Popen(
            # without -P the current folder would be searched before the paths
            [sys.executable, "-P", "-m", "hcf_bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            start_new_session=True,  # it is killed with whatever it started
        )
        if self.pause:
            _pin(self._process.pid, self.spec.threads)
        answer = self._ask(self.spec.model_dump(mode="json"))
        self.ready, self.first = answer["ready"], answer.get("first", {})

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self._process is not None and self._process.poll() is None

    @property
    def memory(self) -> Memory:
        """Peaks while the subject was built and ran first."""
        return Memory.model_validate(self.ready.get("memory") or {})

    def sample(self, index: int) -> Sample:
        """Times call `index` in the worker."""
        found = self._ask({"do": "sample", "index": index})
        if "denoiser_calls" in found:
            self.stages.append(found)
        return Sample(found["wall_ms"], found.get("cpu_ms"))

    def output(self, index: int = 0) -> Any:
        """The output of call `index`, a float32 array."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "output.npy"
            self._ask({"do": "output", "index": index, "path": str(path)})
            return np.load(path, allow_pickle=False)

    def usage(self) -> Usage | None:
        """Processor time of the worker's threads so far."""
        return read_usage(self._process.pid) if self._process else None

    def median_stages(self) -> Stages | None:
        """Medians over the samples of a pipeline; None for anything else."""
        if not self.stages:
            return None
        medians = {name: float(np.median([s[name] for s in self.stages])) for name in STAGE_NAMES}
        calls = int(medians.pop("denoiser_calls"))
        return Stages(denoiser_calls=calls, **medians)

    def subject(self, name: str, content_hash: str = "") -> Subject:
        """As one side of `compare_subjects`."""
        report = self.ready.get("report") or {}
        engines = tuple(self.ready.get("engines") or ([report] if report else []))
        return Subject(
            name,
            self.output,
            content_hash=content_hash,
            sampling=self.ready.get("sampling") or {},
            engines=engines,
            sample=self.sample,
            usage=self.usage,
            first_ms=self.ready.get("first_ms"),
        )

    def close(self) -> None:
        """Kills the process and everything it started."""
        if self._process is not None:
            _kill_group(self._process)
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None
        self._log.close()

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        process = self._process
        if process is None or process.stdin is None:
            raise WorkerFailed(f"{self._name()} is not running")
        if process.poll() is not None:
            raise self._died()
        try:
            if self.pause:
                os.killpg(process.pid, signal.SIGCONT)
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()
        except (BrokenPipeError, ProcessLookupError):
            raise self._died() from None
        found: dict[str, Any] = json.loads(self._read_line())
        if self.pause and process.poll() is None:
            os.killpg(process.pid, signal.SIGSTOP)
        if "error" in found:
            error = found["error"]
            if error["missing"]:
                raise MissingDependency(error["message"], error["fix"])
            raise WorkerFailed(
                f"{self._name()} failed: {error['type']}: {error['message']}", error["fix"]
            )
        return found

    def _read_line(self) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        while b"\n" not in self._buffer:
            left = self.deadline - time.monotonic()
            if left <= 0.0 or not select.select([pipe], [], [], left)[0]:
                took = time.monotonic() - self.started
                self.close()
                raise WorkerTimeout(
                    f"{self._name()} did not answer within its time box ({took:.0f} s) and was "
                    "killed",
                    "give it a larger budget, or leave it out",
                )
            chunk = os.read(pipe, 1 << 16)
            if not chunk:
                raise self._died()
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _died(self) -> WorkerFailed:
        assert self._process is not None
        try:
            code = self._process.wait(timeout=10.0)
        except subprocess.TimeoutExpired:
            code = 0
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        said = "; ".join(line.strip() for line in lines[-LAST_LINES:])
        return WorkerFailed(f"{self._name()} {how}" + (f": {said}" if said else ""))

    def _name(self) -> str:
        s = self.spec
        return {"peer": f"{s.peer} on {s.workload}", "artifact": s.model}.get(s.kind, s.kind)


def ask_once(spec: Spec, *, deadline: float) -> dict[str, Any]:
    """The one answer of a worker that is not timed from outside: ceilings, a profile."""
    with Worker(spec, deadline=deadline, pause=False) as worker:
        return worker.first


def _pin(pid: int, threads: int) -> None:
    """Keeps a process on the last `threads` of the processors this one may use.

    A process that is stopped and continued returns to the processor it was on, so that two of them
    would be compared on two processors, one of which serves the interrupts.
    """
    if hasattr(os, "sched_setaffinity"):
        usable = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(pid, usable[-threads:])


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    for kill in (partial(os.killpg, process.pid, signal.SIGKILL), process.kill):
        try:
            kill()
            break
        except (ProcessLookupError, PermissionError):
            continue
    process.wait()
