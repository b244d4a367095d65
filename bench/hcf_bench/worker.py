"""A subject in a process of its own: reads one request a line, answers one JSON object a line.

Two runtimes in one process take each other's cores, a crash ends both, and a hang cannot be ended.
So each peer, each commit and each artefact of a comparison gets a process; `remote.py` starts it,
asks, and stops it. The first line says what to build, the answer to it that it is ready:

    {"kind": "peer", "workload": "sd15/unet", "peer": "eager"}  -> {"ready": {...}}
    {"do": "sample", "index": 3}                                -> {"wall_ms": 9.1, "cpu_ms": 9.0}
    {"do": "output", "path": "y.npy"}                           -> {}

Libraries print as they like: their output goes to stderr, the answers to the real stdout.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from pydantic import BaseModel, ConfigDict

from hcf.errors import HcfError, MissingDependency

Kind = Literal["peer", "artifact", "blocks", "ceilings", "profile", "fault"]
WARMUP = 2
# A sample of a kernel is the median of so many calls with an empty cache; emptying it takes a CPU
# a hundred times longer than a GPU.
COLD_CALLS = {"cpu": 5, "cuda": 20}
PR_SET_PDEATHSIG = 1


class Spec(BaseModel):
    """What a worker builds. Only the fields of its `kind` count.

    peer: `workload` run by `peer`. artifact: the folder `model`, prompt to pixels. blocks: the
    self-test's network of `blocks` blocks. ceilings, profile: one answer, no samples. fault: tests
    how the other side takes it: `fault` is "crash", "hang" or "nan".
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Kind
    workload: str = ""
    peer: str = "eager"
    device: str = "cpu"
    dtype: str = ""
    batch: int | None = None
    threads: int = 1
    seed: int = 0
    scratch: str = ""
    model: str = ""
    engine: str = "auto"
    precision: str | None = None
    prompts: tuple[str, ...] = ()
    steps: int | None = None
    blocks: int = 1
    dtypes: tuple[str, ...] = ()
    ceilings: dict[str, float] = {}
    budget_s: float = 60.0
    fault: str = ""


@dataclass
class Built:
    """`run(i)` does the work of sample i and returns its output; `sample(i)` times it."""

    run: Callable[[int], Any]
    sample: Callable[[int], dict[str, Any]]
    report: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def main() -> None:
    """Builds what the first line asks for, then answers until stdin ends."""
    answers = _own_stdout()
    _die_with_parent()
    try:
        spec = Spec.model_validate_json(sys.stdin.readline())
        built = _ready(spec, answers)
        for line in sys.stdin:
            _answer(answers, _handle(built, json.loads(line)))
    except BaseException as error:
        fix = error.fix if isinstance(error, HcfError) else ""
        message = error.message if isinstance(error, HcfError) else f"{error}"
        absent = isinstance(error, ModuleNotFoundError)
        if isinstance(error, ModuleNotFoundError) and error.name:
            fix = f"pip install {error.name.partition('.')[0]}"
        _answer(
            answers,
            {
                "error": {
                    "type": type(error).__name__,
                    "message": message or type(error).__name__,
                    "fix": fix,
                    "missing": absent or isinstance(error, MissingDependency),
                }
            },
        )
        raise


def _ready(spec: Spec, answers: IO[str]) -> Built:
    import torch

    from hcf_bench.memory import peak_memory

    torch.set_num_threads(spec.threads)
    torch.set_grad_enabled(False)
    with peak_memory(spec.device) as memory:
        built = BUILDERS[spec.kind](spec)
        first = built.sample(0)
        for index in range(WARMUP if spec.kind in ("peer", "blocks") else 0):
            built.sample(index)
    ready = {"first_ms": first.get("wall_ms"), "report": built.report, **built.facts}
    ready["memory"] = memory.memory.model_dump()
    _answer(answers, {"ready": ready, **({"first": first} if "wall_ms" not in first else {})})
    return built


def _handle(built: Built, request: dict[str, Any]) -> dict[str, Any]:
    if request["do"] == "sample":
        return built.sample(int(request["index"]))
    if request["do"] == "output":
        import numpy as np

        array = _as_array(built.run(int(request.get("index", 0))))
        np.save(request["path"], array, allow_pickle=False)
        return {}
    raise ValueError(f"unknown request {request['do']!r}")


def _as_array(output: Any) -> Any:
    import numpy as np

    if hasattr(output, "detach"):
        return output.detach().float().cpu().numpy()
    return np.asarray(output, dtype=np.float32)


def _build_blocks(spec: Spec) -> Built:
    from hcf_bench.selftest import Blocks

    return _timed(Blocks(spec.blocks, spec.seed), spec)


def _build_peer(spec: Spec) -> Built:
    from hcf_bench.peers import PeerOptions, find_peer
    from hcf_bench.workloads import build_case, find_workload

    workload, peer = find_workload(spec.workload), find_peer(spec.peer)
    reason = peer.missing(spec.device)
    if reason:
        raise MissingDependency(reason)
    if workload.kind not in peer.kinds:
        raise MissingDependency(f"{peer.name} does not run a {workload.kind} workload")
    options = PeerOptions(device=spec.device, threads=spec.threads, folder=Path(spec.scratch))
    if workload.kind == "pipeline":
        return _build_pipeline(spec, workload, peer, options)
    if peer.components and workload.component not in peer.components:
        only = " and ".join(peer.components)
        raise MissingDependency(f"{peer.name} runs {only}, not {workload.component}")
    case = build_case(
        workload, batch=spec.batch, device=spec.device, dtype=peer.dtype, seed=spec.seed
    )
    prepared = peer.prepare(case, options)
    if workload.kind == "kernel":
        return _timed_cold(prepared, spec)
    return _timed(prepared.run, spec, prepared.forwards, prepared.report)


def _build_pipeline(spec: Spec, workload: Any, peer: Any, options: Any) -> Built:
    from hcf.artifact import Sampling
    from hcf_bench.workloads import build_pipeline

    if peer.prepare_pipeline is None:
        raise MissingDependency(f"{peer.name} does not run a whole pipeline")
    pipe = build_pipeline(workload, device=spec.device, dtype=peer.dtype, seed=spec.seed)
    report = peer.prepare_pipeline(pipe, options)
    sampling = Sampling(steps=spec.steps or workload.steps, guidance_scale=workload.guidance_scale)
    return _staged(pipe, sampling, spec, report)


def _build_artifact(spec: Spec) -> Built:
    import hcf
    from hcf.artifact import Sampling

    pipe = hcf.load(
        Path(spec.model), engine=spec.engine, precision=spec.precision, threads=spec.threads
    )
    asked = getattr(pipe, "hcf_sampling", {})
    sampling = Sampling(
        steps=spec.steps or asked.get("steps"), guidance_scale=asked.get("guidance_scale")
    )
    built = _staged(pipe, sampling, spec, {})
    built.facts["engines"] = [asdict(report) for report in pipe.hcf_report]
    return built


def _staged(pipe: Any, sampling: Any, spec: Spec, report: dict[str, Any]) -> Built:
    from hcf_bench.stages import run_staged, sampling_arguments

    count = spec.batch or 1
    prompts = list(spec.prompts) or ["一只红色的猫", "三个蓝色的圆形", "一个绿色的三角形"]

    def staged(index: int) -> Any:
        batch = [prompts[(index * count + j) % len(prompts)] for j in range(count)]
        return run_staged(pipe, batch, sampling, spec.seed + index)

    def sample(index: int) -> dict[str, Any]:
        used = time.process_time_ns()
        found = staged(index)
        used = time.process_time_ns() - used
        return {
            "wall_ms": found.total_ms,
            "cpu_ms": used / 1e6 if spec.device == "cpu" else None,
            "text_ms": found.text_ms,
            "denoise_ms": found.denoise_ms,
            "decode_ms": found.decode_ms,
            "denoiser_calls": found.denoiser_calls,
        }

    facts = {"sampling": sampling_arguments(sampling), "batch": count}
    return Built(lambda index: staged(index).images, sample, report, facts)


def _timed(
    run: Callable[[], Any], spec: Spec, forwards: int = 1, report: dict[str, Any] | None = None
) -> Built:
    from hcf_bench.clocks import sample_call

    clock: Any = "device" if spec.device.startswith("cuda") else "host"

    def sample(_: int) -> dict[str, Any]:
        found = sample_call(run, spec.device, clock)
        cpu_ms = None if found.cpu_ms is None else found.cpu_ms / forwards
        return {"wall_ms": found.wall_ms / forwards, "cpu_ms": cpu_ms}

    return Built(lambda _: run(), sample, report or {}, {"forwards": forwards})


def _timed_cold(prepared: Any, spec: Spec) -> Built:
    """A kernel: every call finds its operands in memory, not in the last cache."""
    from hcf_bench.timing import cache_flusher, time_batches

    flush = cache_flusher(spec.device)
    calls = COLD_CALLS[spec.device.partition(":")[0]]

    def sample(_: int) -> dict[str, Any]:
        found = time_batches(
            prepared.run, samples=calls, warmup=0, device=spec.device, before=flush
        )
        return {"wall_ms": found.p50_ms, "cpu_ms": None}

    return Built(lambda _: prepared.run(), sample, prepared.report, {"forwards": 1})


def _build_ceilings(spec: Spec) -> Built:
    from hcf_bench.roofline import survey_ceilings

    def measure(_: int) -> dict[str, Any]:
        found, absent = survey_ceilings(
            spec.device, list(spec.dtypes), threads=spec.threads, budget_s=spec.budget_s
        )
        left_out = [f"no ceiling for {name}: {reason}" for name, reason in absent.items()]
        return {"ceilings": [c.model_dump() for c in found], "left_out": left_out}

    return Built(lambda _: None, measure)


def _build_profile(spec: Spec) -> Built:
    from hcf_bench.layer_profile import profile_case
    from hcf_bench.workloads import build_case, find_workload

    case = build_case(
        find_workload(spec.workload),
        batch=spec.batch,
        device=spec.device,
        dtype=spec.dtype or "fp32",
        seed=spec.seed,
    )
    return Built(
        lambda _: None,
        lambda _: {"profile": profile_case(case, spec.ceilings, device=spec.device).model_dump()},
    )


def _build_fault(spec: Spec) -> Built:
    import torch

    if spec.fault == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if spec.fault == "hang":
        time.sleep(3600.0)
    return _timed(lambda: torch.tensor([1.0, float("nan")]), spec)


BUILDERS: dict[str, Callable[[Spec], Built]] = {
    "peer": _build_peer,
    "artifact": _build_artifact,
    "blocks": _build_blocks,
    "ceilings": _build_ceilings,
    "profile": _build_profile,
    "fault": _build_fault,
}


def _own_stdout() -> IO[str]:
    """The real stdout for answers; file descriptor 1 becomes stderr for everybody else."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _answer(answers: IO[str], message: dict[str, Any]) -> None:
    answers.write(json.dumps(message, ensure_ascii=False) + "\n")
    answers.flush()


def _die_with_parent() -> None:
    """A worker that is stopped would outlive a parent that was killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
