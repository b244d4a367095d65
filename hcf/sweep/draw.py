"""What the judges see of a model's images, drawn once: features, rule hits, a few images to show.

Kept under <work>/drawn/<key>/, one file a chunk of prompts, so that a sweep that was killed goes on
where it was and one of more images draws the rest alone. The key is that of the model's content,
its sampling, the engine and the code that draws and sees. n images of a chunk, F features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hcf.artifact import PACKAGES, Sampling, environment
from hcf.code_hash import code_hash
from hcf.distill.data import keep, kept
from hcf.engines import machine_kind
from hcf.load import accelerate, load
from hcf.quality.features import Floats, Images, image_features
from hcf.quality.rules import ASPECTS, rule_hits
from hcf.quality.sampling import Prompt, generate_images
from hcf.sweep.recipe import DrawConfig
from hcf.trace import call_denoiser, denoiser_name, record_calls

Log = Callable[[str], None]
Doubles = npt.NDArray[np.float64]
# whose change makes what was drawn or seen stale
SOURCES = (
    "hcf/quality/features.py", "hcf/quality/rules.py", "hcf/quality/sampling.py", "hcf/engines",
    "hcf/export", "hcf/routing.py", "taiji/data/rule_judge.py", "taiji/pipelines",
)  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A pipeline folder of the comparison, hashed, and how it is sampled."""

    name: str
    folder: Path
    content_hash: str
    sampling: Sampling


@dataclass(frozen=True)
class On:
    """What every model runs on. `precision` None is the engine's own choice: eager float32."""

    engine: str
    precision: str | None
    device: str
    threads: int | None


@dataclass(frozen=True)
class Seen:
    """features (N, F), hits {aspect: (N,)} of N prompts; shown (n, H, W, 3) of the first."""

    features: Floats
    hits: Mapping[str, Doubles]
    shown: Images

    def features_of(self, rows: Sequence[int]) -> Floats:
        return self.features[list(rows)]

    def hits_of(self, rows: Sequence[int]) -> dict[str, Doubles]:
        return {aspect: each[list(rows)] for aspect, each in self.hits.items()}


class Opened:
    """A model's pipeline, opened when it is first wanted: eager, then in place on the engine.

    `accelerated` raises what `hcf.accelerate` does: an engine that cannot be had, or whose error
    its precision does not explain.
    """

    def __init__(self, model: Model, on: On, log: Log) -> None:
        self.model, self.on, self.log = model, on, log
        self._eager: Any = None
        self._accelerated: Any = None

    def eager(self) -> Any:
        if self._accelerated is not None:
            raise ValueError(f"{self.model.name} is on {self.on.engine} already")
        if self._eager is None:
            pipe = load(self.model.folder, engine="eager", threads=self.on.threads)
            self._eager = pipe.to(self.on.device)
        return self._eager

    def accelerated(self) -> Any:
        if self._accelerated is None:
            pipe, on = self.eager(), self.on
            if (on.engine, on.precision) not in (("eager", None), ("eager", "fp32")):
                accelerate(
                    pipe, engine=on.engine, precision=on.precision, threads=on.threads, log=self.log
                )
            self._accelerated = pipe
        return self._accelerated


def choose_engine(teacher: Model, config: DrawConfig, threads: int | None, log: Log) -> On:
    """The engine of the recipe; for "auto" the one that is fastest for the teacher's denoiser."""
    device = config.device
    if device == "auto":
        on_cpu = config.engine == "openvino" or not torch.cuda.is_available()
        device = "cpu" if on_cpu else "cuda"
    if config.engine != "auto":
        return On(config.engine, config.precision, device, threads)
    pipe = Opened(teacher, On("auto", config.precision, device, threads), log).accelerated()
    name = denoiser_name(pipe)
    report = next(r for r in pipe.hcf_report if r.component == name)
    return On(report.engine, report.precision, device, threads)


def see(opened: Opened, prompts: Sequence[Prompt], config: DrawConfig, folder: Path) -> Seen:
    """Draws what is not there yet; prompt i has the seed config.seed + i."""
    parts: list[dict[str, torch.Tensor]] = []
    for start in range(0, len(prompts), config.chunk):
        own = prompts[start : start + config.chunk]
        shown = config.shown if start == 0 else 0
        said = json.dumps(
            [start, config.seed, config.batch_size, shown, [(p.text, p.truth) for p in own]],
            ensure_ascii=False, sort_keys=True,
        )  # fmt: skip
        key = hashlib.sha256(said.encode()).hexdigest()
        path = folder / f"{start:06d}-{key[:12]}.safetensors"
        found = kept(path, key=key)
        if found is None:
            seeds = [config.seed + start + i for i in range(len(own))]
            pipe, sampling = opened.accelerated(), opened.model.sampling
            found = _draw(pipe, sampling, own, seeds, config.batch_size, shown)
            keep(path, found, key=key)
            opened.log(f"{opened.model.name}: {start + len(own)} of {len(prompts)} images")
        parts.append(found)
    hits = np.concatenate([part["hits"].numpy() for part in parts])
    return Seen(
        np.concatenate([part["features"].numpy() for part in parts]),
        {aspect: hits[:, i] for i, aspect in enumerate(ASPECTS)},
        parts[0]["shown"].numpy(),
    )


def _draw(
    pipe: Any,
    sampling: Sampling,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    batch_size: int,
    shown: int,
) -> dict[str, torch.Tensor]:
    """{"features" (n, F), "hits" (n, aspects), "shown"} of one chunk"""
    images = generate_images(
        pipe, [p.text for p in prompts], seeds, batch_size=batch_size, sampling=sampling
    )
    hits = np.full((len(prompts), len(ASPECTS)), np.nan)
    scenes = [i for i, p in enumerate(prompts) if p.kind == "shapes" and p.truth]
    if scenes:
        found = rule_hits(images[scenes], [prompts[i].truth or {} for i in scenes])
        hits[scenes] = np.stack([found[aspect] for aspect in ASPECTS], axis=1)
    return {
        "features": torch.from_numpy(image_features(images)),
        "hits": torch.from_numpy(hits),
        "shown": torch.from_numpy(images[:shown]),
    }


def drawing_key(model: Model, on: On) -> str:
    """SHA-256 of what images and their features depend on besides prompts and seeds."""
    versions = environment()
    parts = [
        model.content_hash,
        model.sampling.model_dump(),
        [on.engine, on.precision, on.device, machine_kind() if on.engine != "eager" else ""],
        code_hash(SOURCES),
        {name: versions.get(name) for name in PACKAGES if name != "hcf-toolkit"},
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class ImageCost:
    """Of one image: calls of the denoiser, their rows (guidance doubles them), their FLOPs."""

    calls: int
    rows: int
    flop: int


def image_cost(pipe: Any, prompt: str, steps: int, guidance_scale: float, seed: int) -> ImageCost:
    """Counted on a real run of an eager pipeline: 2 FLOPs a multiply-accumulate, of convolutions,
    products and attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    calls = record_calls(pipe, [prompt], steps=steps, guidance_scale=guidance_scale, seed=seed)
    denoiser = getattr(pipe, denoiser_name(pipe))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call_denoiser(denoiser, calls[0].sample, calls[0].timestep, calls[0].kwargs)
    rows = [len(call.sample) for call in calls]
    return ImageCost(len(calls), sum(rows), counter.get_total_flops() * sum(rows) // rows[0])
