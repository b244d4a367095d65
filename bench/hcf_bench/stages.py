"""Runs a diffusers pipeline and splits its time into text, denoising loop and decode.

The split is by boundaries, so it holds for any pipeline whatever its text towers are called: text
ends where the denoiser is first called, the loop ends where `vae.decode` is called, decode ends
with the call. Marks are clock readings on the CPU and, on a GPU, CUDA events that wait for nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from hcf.artifact import Sampling
from hcf.trace import denoiser_name, quiet
from hcf_bench.timing import synchronise


@dataclass(frozen=True)
class StagedRun:
    """One call of a pipeline: images (B, C, H, W) in [0, 1] as a tensor, times in milliseconds."""

    images: Any
    total_ms: float
    text_ms: float
    denoise_ms: float
    decode_ms: float
    denoiser_calls: int


def run_staged(pipe: Any, prompts: list[str], sampling: Sampling, seed: int) -> StagedRun:
    """Generates once and times the stages.

    Args:
        pipe: a diffusers pipeline with `unet` or `transformer`, and usually `vae`.
        prompts: one batch.
        sampling: steps and guidance of the call.
        seed: of the initial noise, the same on both sides of a comparison.
    """
    device = str(getattr(pipe, "device", "cpu"))
    clock = _EventClock(device) if device.startswith("cuda") else _HostClock()
    generator = torch.Generator("cpu").manual_seed(seed)
    synchronise(device)
    with quiet(pipe), _marked(pipe, clock), torch.no_grad():
        clock.mark("start")
        result = pipe(
            prompts, generator=generator, output_type="pt", **sampling_arguments(sampling)
        )
        clock.mark("end")
    synchronise(device)
    if "denoiser" not in clock.marks:
        raise ValueError("the pipeline never called its denoiser")
    total = clock.between("start", "end")
    text = clock.between("start", "denoiser")
    decode = clock.between("decode", "end") if "decode" in clock.marks else 0.0
    return StagedRun(
        result.images, total, text, total - text - decode, decode, clock.denoiser_calls
    )


def sampling_arguments(sampling: Sampling) -> dict[str, Any]:
    """As keyword arguments of a diffusers call; what is None is left to the pipeline."""
    given = {"num_inference_steps": sampling.steps, "guidance_scale": sampling.guidance_scale}
    return {name: value for name, value in given.items() if value is not None}


class _HostClock:
    def __init__(self) -> None:
        self.marks: dict[str, Any] = {}
        self.denoiser_calls = 0

    def mark(self, name: str) -> None:
        self.marks.setdefault(name, time.perf_counter_ns())

    def between(self, start: str, end: str) -> float:
        return float(self.marks[end] - self.marks[start]) / 1e6


class _EventClock(_HostClock):
    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def mark(self, name: str) -> None:
        if name not in self.marks:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self.marks[name] = event

    def between(self, start: str, end: str) -> float:
        return float(self.marks[start].elapsed_time(self.marks[end]))


@contextmanager
def _marked(pipe: Any, clock: _HostClock) -> Iterator[None]:
    """Marks the first denoiser call and the first decode; both hooks are gone afterwards."""

    def before_denoiser(*_: Any) -> None:
        clock.mark("denoiser")
        clock.denoiser_calls += 1

    hook = getattr(pipe, denoiser_name(pipe)).register_forward_pre_hook(before_denoiser)
    vae = getattr(pipe, "vae", None)
    decode = getattr(vae, "decode", None)
    # `decode` may itself be an instance attribute (an engine put there); it is put back as it was.
    was_own = vae is not None and "decode" in vars(vae)
    if decode is not None:

        def marked_decode(*args: Any, **kwargs: Any) -> Any:
            clock.mark("decode")
            return decode(*args, **kwargs)

        vars(vae)["decode"] = marked_decode
    try:
        yield
    finally:
        hook.remove()
        if decode is not None:
            if was_own:
                vars(vae)["decode"] = decode
            else:
                del vars(vae)["decode"]
