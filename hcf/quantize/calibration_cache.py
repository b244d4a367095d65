"""One cache of calibration trajectories and statistics for everything that asks for the same.

    $HCF_HOME/calibration/<key>/request.json                    what was recorded, for people
                               /part-0003.safetensors, .sha256  the calls of one batch of prompts
                               /statistics-<id>.safetensors, .sha256

The key is content: every weight of the pipeline, its configurations and scheduler, prompts, steps,
guidance, seed, batch and size. INT8, FP8, low rank, sensitivity and distillation that ask for the
same get the same files. A part is written whole or not at all, so that a killed run goes on where
it was; what does not match its SHA-256 is made again. The least recently used keys are removed
beyond HCF_CALIBRATION_CACHE_GB (default 20), never one that a process has open.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from hcf.artifact import hash_file, hcf_home, is_disk_full, save_text
from hcf.errors import HcfError, RecipeError, StorageError
from hcf.quantize.calibrate import (
    MAX_CALLS,
    load_calibration,
    save_calibration,
    spread_indices,
)
from hcf.quantize.estimate import (
    Estimate,
    Probe,
    estimate_calibration,
    fitted,
    probe,
    require_disk,
    scaled,
)
from hcf.quantize.statistics import (
    BUCKETS,
    HISTOGRAM_BINS,
    Statistics,
    collect_statistics,
    load_statistics,
    save_statistics,
)
from hcf.trace import DenoiserCall, record_calls

Log = Callable[[str], None]
DEFAULT_LIMIT_GB = 20.0
SCHEMA = 1  # of the files; another one is another key
# keys of configurations that say where a model came from, not what it computes
WHERE_FROM = ("name_or_path", "transformers_version", "torch_dtype", "dtype")


@dataclass(frozen=True)
class CalibrationRequest:
    """What to record. Prompt i starts from the noise of seed + i; None is the model's own size.

    `component` "controlnet" records its calls, without it the denoiser's.
    """

    prompts: tuple[str, ...]
    steps: int
    guidance_scale: float
    seed: int = 0
    batch_size: int = 8
    height: int | None = None
    width: int | None = None
    component: str | None = None


@dataclass(frozen=True)
class Calibration:
    """Recorded trajectories on disk. `index`: (part, number in it, timestep) of every call."""

    folder: Path
    key: str
    index: tuple[tuple[str, int, float], ...]

    def calls(
        self, count: int | None = MAX_CALLS, *, besides: int | None = None
    ) -> list[DenoiserCall]:
        """At most `count` calls, spread evenly over the trajectory.

        With `besides`, none of those that `calls(besides)` gives: calls held out of a choice.
        """
        chosen = list(range(len(self.index)))
        times = [time for _, _, time in self.index]
        if besides is not None:
            used = set(spread_indices(times, besides))
            chosen = [i for i in chosen if i not in used]
        if count is not None:
            chosen = [chosen[i] for i in spread_indices([times[i] for i in chosen], count)]
        found: dict[int, DenoiserCall] = {}
        for part in dict.fromkeys(self.index[i][0] for i in sorted(chosen)):
            numbers = {self.index[i][1]: i for i in chosen if self.index[i][0] == part}
            calls = load_calibration(self.folder / part, only=list(numbers))
            found |= dict(zip(numbers.values(), calls, strict=True))
        return [found[i] for i in chosen]

    def statistics(
        self,
        denoiser: nn.Module,
        layers: Sequence[str],
        *,
        count: int | None = MAX_CALLS,
        buckets: int = BUCKETS,
        log: Log = lambda line: None,
    ) -> Statistics:
        """Statistics of `layers` over `calls(count)`: read as far as they are there.

        One file for all who ask: layers that another method has not asked for are added to it.
        """
        spec = hashlib.sha256(json.dumps([count, buckets, HISTOGRAM_BINS]).encode())
        _add_weights(spec, "", denoiser)  # it may have been changed since it was recorded
        path = self.folder / f"statistics-{spec.hexdigest()[:16]}.safetensors"
        known = load_statistics(path) if _is_whole(path, log) else None
        missing = [name for name in layers if known is None or name not in known]
        if missing or known is None:
            calls = self.calls(count)
            log(f"calibration: statistics of {len(missing)} layers over {len(calls)} calls")
            found = collect_statistics(denoiser, missing, calls, buckets=buckets)
            known = Statistics({**(known or {}), **found}, found.bucket_edges)
            _write(path, partial(save_statistics, known))
        return Statistics({name: known[name] for name in layers}, known.bucket_edges)


@contextlib.contextmanager
def open_calibration(
    pipe: Any, request: CalibrationRequest, log: Log = lambda line: None, offload: str = "auto"
) -> Iterator[Calibration]:
    """The trajectories of `request`, recorded as far as they are not there; kept while inside.

    What recording will take is logged first; `offload` as in `hcf.quantize.estimate.fitted`. Raises
    RecipeError for no prompts or steps or a bad HCF_CALIBRATION_CACHE_GB, StorageError when the
    disk is full or cannot be written, HcfError where memory or disk will not do.
    """
    if not request.prompts:
        raise RecipeError(
            "no calibration prompts", fix="set quantize.calibration_prompts to a list or a file"
        )
    limit = cache_limit_bytes()
    key = calibration_key(pipe, request)
    root = hcf_home() / "calibration"
    with _storage_errors(root):
        root.mkdir(parents=True, exist_ok=True)
    with _locked(root / f"{key}.lock", exclusive=True) as lock:
        folder = root / key
        with _storage_errors(folder):
            folder.mkdir(exist_ok=True)
            save_text(folder / "request.json", json.dumps(asdict(request), ensure_ascii=False))
        index = _complete(pipe, request, folder, log, offload)
        _lock(lock, exclusive=False)  # others may read along; removal needs it exclusive
        make_room(root, limit, log)
        yield Calibration(folder, key, tuple(index))


def calibration_key(pipe: Any, request: CalibrationRequest) -> str:
    """SHA-256 over all that decides the recorded calls; paths are not part of it.

    Raises HcfError for weights that are offloaded: they cannot be read.
    """
    import diffusers

    digest = hashlib.sha256()

    def add(*values: Any) -> None:
        digest.update(json.dumps(values, sort_keys=True, default=_plain).encode())

    add(SCHEMA, asdict(request), type(pipe).__name__, diffusers.__version__, _config(pipe))
    for name, component in sorted(pipe.components.items()):
        add(name, type(component).__name__, _config(component))
        if isinstance(component, nn.Module):
            _add_weights(digest, name, component)
    return digest.hexdigest()


def cache_limit_bytes() -> float:
    """HCF_CALIBRATION_CACHE_GB in bytes; RecipeError for what is no positive number."""
    text = os.environ.get("HCF_CALIBRATION_CACHE_GB", str(DEFAULT_LIMIT_GB))
    with contextlib.suppress(ValueError):
        if (value := float(text)) > 0:
            return value * 1e9
    raise RecipeError(f"HCF_CALIBRATION_CACHE_GB={text!r} is no positive number", "set it to 20")


def make_room(root: Path, limit: float, log: Log = lambda line: None) -> None:
    """Removes the least recently used keys under `root` until `limit` bytes hold; not open ones."""
    folders = [path for path in root.iterdir() if path.is_dir()]
    sizes = {
        path: sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) for path in folders
    }
    total = sum(sizes.values())
    for folder in sorted(folders, key=_last_use):
        if total <= limit:
            return
        with contextlib.suppress(BlockingIOError):
            with _locked(root / f"{folder.name}.lock", exclusive=True, wait=False):
                shutil.rmtree(folder, ignore_errors=True)
                total -= sizes[folder]
                log(f"calibration cache: removed {folder.name[:12]}, {sizes[folder] / 1e9:.2f} GB")
    if total > limit:
        log(
            f"calibration cache: {total / 1e9:.2f} GB in use, more than the limit of "
            f"{limit / 1e9:.2f} GB (HCF_CALIBRATION_CACHE_GB)"
        )


def _complete(
    pipe: Any, request: CalibrationRequest, folder: Path, log: Log, offload: str
) -> list[tuple[str, int, float]]:
    """Records the parts that are missing or damaged; the index of all calls."""
    prompts, size = list(request.prompts), request.batch_size
    starts = range(0, len(prompts), size)
    found = {start: folder / f"part-{start // size:04d}.safetensors" for start in starts}
    missing = [start for start in starts if not _is_whole(found[start], log)]
    log(
        f"calibration {folder.name[:12]}: {len(prompts)} prompts x {request.steps} steps, "
        f"{len(starts) - len(missing)} of {len(starts)} parts are there"
    )
    if missing:
        found_size = _estimate(pipe, request, len(missing) / len(starts))
        require_disk(found_size, folder)
        with fitted(pipe, found_size, offload, log):
            for start in missing:
                calls = _record(pipe, request, start)
                _write(found[start], partial(save_calibration, calls))
                log(f"calibration: part {start // size + 1} of {len(starts)}, {len(calls)} calls")
    index: list[tuple[str, int, float]] = []
    for path in found.values():
        times = load_calibration(path, names=("timestep",))
        index += [(path.name, i, float(call.timestep.flatten()[0])) for i, call in enumerate(times)]
    return index


def probe_of(pipe: Any, request: CalibrationRequest) -> Probe:
    """What one batch of the request takes."""
    return probe(
        pipe,
        request.prompts[: request.batch_size],
        steps=request.steps,
        guidance_scale=request.guidance_scale,
        height=request.height,
        width=request.width,
        component=request.component,
    )


def _estimate(pipe: Any, request: CalibrationRequest, share: float) -> Estimate:
    found = probe_of(pipe, request)
    return scaled(estimate_calibration(found, len(request.prompts)), share)


def _record(pipe: Any, request: CalibrationRequest, start: int) -> list[DenoiserCall]:
    batch = list(request.prompts[start : start + request.batch_size])
    calls = record_calls(
        pipe,
        batch,
        steps=request.steps,
        guidance_scale=request.guidance_scale,
        seed=request.seed + start,
        batch_size=len(batch),
        height=request.height,
        width=request.width,
        component=request.component,
    )
    if not calls:
        raise RecipeError(
            "the pipeline never called its denoiser",
            fix=f"steps is {request.steps}: use at least 1",
        )
    return calls


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """A file and beside it its SHA-256, which comes last: without it the file does not count."""
    temporary = path.with_name(f".hcf-{os.getpid()}-{path.name}")
    with _storage_errors(path):
        try:
            write(temporary)
            sha256 = hash_file(temporary)
            path.with_suffix(".sha256").unlink(missing_ok=True)
            temporary.replace(path)
            save_text(path.with_suffix(".sha256"), sha256)
        finally:
            temporary.unlink(missing_ok=True)


def _is_whole(path: Path, log: Log = lambda line: None) -> bool:
    note = path.with_suffix(".sha256")
    if not path.is_file() or not note.is_file():
        return False
    if hash_file(path) != note.read_text(encoding="utf-8").strip():
        log(f"calibration: {path.name} is damaged and is made again")
        return False
    return True


@contextlib.contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and not is_disk_full(error):
            raise
        what = "the disk is full" if is_disk_full(error) else str(error)
        raise StorageError(
            f"the calibration cache cannot write {path}: {what}",
            fix="free some space, or set HCF_HOME to a folder on another disk",
        ) from error


@contextlib.contextmanager
def _locked(path: Path, *, exclusive: bool, wait: bool = True) -> Iterator[IO[bytes]]:
    with _storage_errors(path):
        stream = open(path, "ab")
    with stream:
        _lock(stream, exclusive=exclusive, wait=wait)
        yield stream


def _lock(stream: IO[bytes], *, exclusive: bool, wait: bool = True) -> None:
    """BlockingIOError where another has it and `wait` is False; the kernel frees a dead one's."""
    import fcntl

    kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    fcntl.flock(stream, kind if wait else kind | fcntl.LOCK_NB)


def _add_weights(digest: hashlib._Hash, name: str, module: nn.Module) -> None:
    for key, value in sorted(module.state_dict().items()):
        if value.is_meta:
            raise HcfError(
                f"{name}.{key} is offloaded, so the calibration has no content key",
                fix="ask for the calibration before weights are offloaded",
            )
        value = value.detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    for key, part in module.named_modules():
        if isinstance(scaling := getattr(part, "scaling", None), dict):  # a LoRA layer's weights
            digest.update(f"{key} {scaling} {getattr(part, 'active_adapters', [])}".encode())


def _last_use(folder: Path) -> float:
    request = folder / "request.json"
    return request.stat().st_mtime if request.is_file() else 0.0


def _config(component: Any) -> Any:
    """What a component is besides its weights: configuration, vocabulary."""
    if hasattr(component, "get_vocab"):
        return sorted(component.get_vocab().items()), component.model_max_length
    found = getattr(component, "config", component)
    tree = found if isinstance(found, Mapping) else getattr(found, "to_dict", dict)()
    return {k: v for k, v in tree.items() if not k.startswith("_") and k not in WHERE_FROM}


def _plain(value: Any) -> str:
    """Configurations hold types and dtypes; an object's address must not get into the key."""
    text = str(value)
    return type(value).__name__ if " at 0x" in text else text
