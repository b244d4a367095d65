"""Precomputed latents: safetensors in a folder named by the first stage that made them.

A latent means something to its own first stage only. The folder's name begins with the hash of that
stage's configuration and weights, every file carries the whole hash and that of its images, and
reading with another stage is refused. At 512 pixels a latent of KL-f8 is 32 KB in float16.

A corpus in memory has one file, a data set one for each shard and bucket: whoever comes first makes
it. N images of H x W, latents (N, C, h, w), B of a draw.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL, VQModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from taiji.autoencoder.kl import encode_images
from taiji.data.corpus import Corpus
from taiji.data.metadata import json_hash
from taiji.data.shard_corpus import Samples, ShardCorpus
from taiji.train.parallel import rank, world

Images = npt.NDArray[np.uint8]
Log = Callable[[str], object]
ENCODED = 64  # images of a shard that are encoded at a time
OPENED = 64  # files of latents that are held open


def first_stage_hash(stage: nn.Module) -> str:
    """SHA-256 of a first stage's configuration and weights; the same wherever it was loaded from.

    Weights count as float16, so that a stage and its half-precision copy on disk are one.
    """
    config: Any = getattr(stage, "config", {})
    settings = {k: v for k, v in dict(config).items() if not k.startswith("_")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(stage.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().half().contiguous().numpy().tobytes())
    return digest.hexdigest()


def latents_path(folder: Path, stage_hash: str, shard: str = "latents") -> Path:
    return folder / stage_hash[:16] / f"{shard}.safetensors"


def write_latents(
    path: Path,
    latents: Tensor,
    *,
    stage_hash: str,
    images_hash: str = "",
    rows: Tensor | None = None,
    skipped: dict[str, str] | None = None,
) -> None:
    """latents (N, C, h, w), kept in float16, beside `path` and then in its place. Of a shard also
    whose they are, `rows` (N,), and why its other rows have none."""
    if not stage_hash:
        raise ValueError("latents need the hash of their first stage: first_stage_hash(stage)")
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # several processes may write it
    tensors = {"latents": latents.half().contiguous()}
    about = {"first_stage": stage_hash, "images": images_hash}
    if rows is not None:
        tensors["rows"] = rows
        about["skipped"] = json.dumps(skipped or {}, ensure_ascii=False)
    save_file(tensors, staging, about)
    os.replace(staging, path)


def read_latents(path: Path, stage_hash: str) -> Tensor:
    """(N, C, h, w) float16. Raises ValueError when another first stage, or none, made them."""
    with safe_open(path, "pt") as file:
        _same_stage(path, file.metadata() or {}, stage_hash)
        latents: Tensor = file.get_tensor("latents")
    return latents


def _same_stage(path: Path, about: dict[str, str], stage_hash: str) -> None:
    made_by = about.get("first_stage")
    if not made_by:
        raise ValueError(
            f"{path} does not say which first stage made it: encode again, with write_latents"
        )
    if made_by != stage_hash:
        raise ValueError(
            f"{path} is of first stage {made_by[:16]}, this one is {stage_hash[:16]}: encode "
            "again, or train on the stage it was made with"
        )


def load_or_encode(
    folder: Path,
    stage: nn.Module,
    images: Images,
    encode: Callable[[Images], Tensor],
    shard: str = "latents",
) -> Tensor:
    """Latents of `images` (N, H, W, 3) by `stage`, read where the folder has them, else encoded
    and kept. Changed weights or images are noticed by their hash."""
    stage_hash = first_stage_hash(stage)
    images_hash = hashlib.sha256(repr(images.shape).encode() + images.tobytes()).hexdigest()
    path = latents_path(folder, stage_hash, shard)
    if path.exists():
        with safe_open(path, "pt") as file:
            known = (file.metadata() or {}).get("images") == images_hash
        if known:
            return read_latents(path, stage_hash)
    latents = encode(images).half()
    write_latents(path, latents, stage_hash=stage_hash, images_hash=images_hash)
    return latents


@dataclass(frozen=True)
class ShardLatents:
    """`[numbers]` (B,) of one bucket -> (B, C, h, w) float16, read from the shards' files: each
    sample's `file` (N,) in `paths`, and its `place` (N,) there."""

    paths: list[Path]
    file: npt.NDArray[np.int32]
    place: npt.NDArray[np.int32]
    opened: dict[int, Any] = field(default_factory=dict)

    def __getitem__(self, numbers: npt.NDArray[np.int64]) -> Tensor:
        return torch.cat([self._read(int(number)) for number in numbers])

    def _read(self, number: int) -> Tensor:
        i, place = int(self.file[number]), int(self.place[number])
        if i not in self.opened:
            while len(self.opened) >= OPENED:
                del self.opened[next(iter(self.opened))]
            self.opened[i] = safe_open(self.paths[i], "pt")
        found: Tensor = self.opened[i].get_slice("latents")[place : place + 1]
        return found


Latents = Tensor | ShardLatents


def corpus_latents(
    chosen: Path | None, default: Path, stage: AutoencoderKL | VQModel, corpus: Corpus, log: Log
) -> Latents:
    """Scaled latents of a whole corpus, kept in the folder `chosen`, else in `default`.

    Raises ValueError where `chosen` holds latents of other first stages alone.
    """
    folder, stage_hash = chosen or default, first_stage_hash(stage)
    others = [path.name for path in folder.glob("*") if path.is_dir()]
    if chosen is not None and others and stage_hash[:16] not in others:
        raise ValueError(
            f"latents={folder} are of first stage {others[0]}, this one is {stage_hash[:16]}: name "
            "another folder, or train on the stage they were made with"
        )
    if isinstance(corpus, ShardCorpus):
        return shard_latents(folder, stage, corpus.samples, log)
    return load_or_encode(folder, stage, corpus.images, lambda images: encode_images(stage, images))


@dataclass(frozen=True)
class _Part:
    """The samples of one shard and bucket: their numbers, and the file of their latents."""

    path: Path
    numbers: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    images_hash: str


def shard_latents(
    folder: Path, stage: AutoencoderKL | VQModel, samples: Samples, log: Log
) -> ShardLatents:
    """Makes the files that are not there. A sample that cannot be encoded is skipped and listed;
    afterwards `samples` looks at no image any more.

    Of several processes each begins with its own share of the shards and goes on with what the
    others have not made yet; two that make the same file write the same.
    """
    samples.decodes = True
    stage_hash = first_stage_hash(stage)
    parts = list(_parts(folder, stage_hash, samples))
    device = stage.device
    if torch.cuda.is_available():
        stage.to(torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))))
    for i in sorted(range(len(parts)), key=lambda i: i % world() != rank()):
        if not _is_made(parts[i], stage_hash, samples):
            _encode_part(parts[i], stage, stage_hash, samples)
            log(f"{parts[i].path.stem}: latents of {len(parts[i].numbers):,} samples")
    stage.to(device)
    count = len(samples.reader)
    file, place = np.full(count, -1, np.int32), np.full(count, -1, np.int32)
    for i, part in enumerate(parts):
        first = part.numbers[0] - part.rows[0]
        with safe_open(part.path, "pt") as handle:
            rows = handle.get_tensor("rows").numpy()
            file[first + rows], place[first + rows] = i, np.arange(len(rows))
            skipped = json.loads(handle.metadata()["skipped"])
        for row, reason in skipped.items():
            number = int(first) + int(row)
            samples.skips.add(number, samples.reader.name(number), reason)
    samples.decodes = False
    return ShardLatents([part.path for part in parts], file, place)


def _parts(folder: Path, stage_hash: str, samples: Samples) -> Iterator[_Part]:
    reader, first = samples.reader, 0
    for record in reader.manifest.shards:
        bucket = samples.bucket[first : first + record.samples]
        for i in np.unique(bucket):
            height, width = samples.sizes[i]
            rows = np.flatnonzero(bucket == i)
            digest = hashlib.sha256(rows.tobytes()).hexdigest()
            images_hash = json_hash([record.sha256, height, width, digest])
            path = latents_path(folder, stage_hash, f"{record.name}-{height}x{width}")
            yield _Part(path, first + rows, rows, images_hash)
        first += record.samples


def _is_made(part: _Part, stage_hash: str, samples: Samples) -> bool:
    """Of these images, and what was skipped has not been mended since."""
    if not part.path.is_file():
        return False
    with safe_open(part.path, "pt") as file:
        about = file.metadata() or {}
    _same_stage(part.path, about, stage_hash)
    skipped = [int(row) for row in json.loads(about.get("skipped", "{}"))]
    first = int(part.numbers[0] - part.rows[0])
    return about["images"] == part.images_hash and not any(
        samples.can_read(first + row) for row in skipped
    )


def _encode_part(
    part: _Part, stage: AutoencoderKL | VQModel, stage_hash: str, samples: Samples
) -> None:
    found, rows, skipped = [], list[int](), dict[str, str]()
    for start in range(0, len(part.numbers), ENCODED):
        images = []
        for i in range(start, min(start + ENCODED, len(part.numbers))):
            try:
                pixels = samples.read(int(part.numbers[i])).pixels
            except ValueError as error:
                skipped[str(part.rows[i])] = str(error)
            else:
                assert pixels is not None  # they decode until all latents are there
                images.append(pixels)
                rows.append(int(part.rows[i]))
        if images:
            found.append(encode_images(stage, np.stack(images)))
    write_latents(
        part.path,
        torch.cat(found) if found else torch.empty(0, 1, 1, 1),
        stage_hash=stage_hash,
        images_hash=part.images_hash,
        rows=torch.tensor(rows, dtype=torch.int64),
        skipped=skipped,
    )
