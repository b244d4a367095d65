"""What an artefact on disk is: a diffusers folder, and beside its index `hcf_manifest.json`.

Content decides, never paths: the manifest holds a SHA-256 of every file and one over all of them.
Everything is written to a temporary folder beside its target and renamed. No file is a pickle.
Large files of a clone are hard links to the original: replace a file, never write into one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from hcf.errors import InvalidArtifact, RecipeError, StorageError, UnsafeFile
from hcf.weights import check_weights, read_header

MANIFEST = "hcf_manifest.json"
INDEX = "model_index.json"
SCHEMA_VERSION = 1
PICKLES = frozenset({".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle"})
LINK_FROM_BYTES = 1 << 20  # smaller files are copied, so that a JSON file may be edited in place
PACKAGES = (
    "torch", "diffusers", "transformers", "safetensors", "numpy", "onnx", "onnxscript",
    "onnxruntime", "openvino", "nvidia-modelopt", "tensorrt", "tensorrt-rtx", "hcf-toolkit",
)  # fmt: skip


class Parent(BaseModel):
    """An artefact this one was made from."""

    model_config = ConfigDict(extra="forbid")

    name: str
    content_hash: str


class Sampling(BaseModel):
    """How the pipeline is called unless the caller says otherwise; None is its own default."""

    model_config = ConfigDict(extra="forbid")

    steps: int | None = None
    guidance_scale: float | None = None


class EngineEntry(BaseModel):
    """One engine built for one component, and how it did.

    `file` is relative to the artefact (None: made at load time); `layer_precisions` counts what
    really runs; `error` is the relative L2 distance to eager fp32; `version` is the runtime's and
    `machine` the instruction sets or compute capability it was built for. `reason`: why it was or
    was not chosen; `details`: what its engine needs or tells besides.
    """

    model_config = ConfigDict(extra="forbid")

    engine: str
    precision: str
    device: str = "cpu"
    provider: str = ""
    version: str = ""
    machine: str = ""
    file: str | None = None
    source: str | None = None
    source_hash: str = ""
    layer_precisions: dict[str, int] = {}
    shapes: dict[str, list[list[int]]] = {}
    threads: int | None = None
    build_s: float | None = None
    latency_ms: float | None = None
    latency_low_ms: float | None = None
    latency_high_ms: float | None = None
    error: float | None = None
    notes: str = ""
    reason: str = ""
    details: dict[str, Any] = {}


class Manifest(BaseModel):
    """The content of hcf_manifest.json. `chosen`: the entry that `auto` takes. `cache`: settings of
    the feature cache that the engines were built for."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    schema_version: int = SCHEMA_VERSION
    name: str
    content_hash: str = ""
    parents: list[Parent] = []
    files: dict[str, str] = {}
    created: str = ""
    recipe: dict[str, Any] | None = None
    environment: dict[str, str] = {}
    sampling: Sampling = Sampling()
    distillation: dict[str, Any] = {}
    quantization: dict[str, dict[str, Any]] = {}
    exports: dict[str, list[dict[str, Any]]] = {}
    engines: dict[str, list[EngineEntry]] = {}
    chosen: dict[str, str] = {}
    cache: dict[str, Any] = {}
    quality: dict[str, Any] = {}
    latency: dict[str, Any] = {}


@dataclass(frozen=True)
class Problem:
    """Something `verify` found: `kind` of trouble with the file `path` (relative)."""

    path: str
    kind: Literal["missing", "truncated", "edited", "extra"]
    detail: str

    def __str__(self) -> str:
        return f"{self.path}: {self.kind}, {self.detail}"


def read_manifest(path: Path) -> Manifest:
    """The manifest of artefact folder `path`; InvalidArtifact if absent, broken or newer."""
    file = Path(path) / MANIFEST
    if not file.is_file():
        raise InvalidArtifact(
            f"{path} has no {MANIFEST}: it is not an artefact of this toolkit",
            fix="make one with `hcf run`, `hcf distill`, `hcf quantize` or `hcf export`",
        )
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        version = tree.get("schema_version") if isinstance(tree, dict) else None
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise InvalidArtifact(
                f"{file} has schema version {version}; this toolkit reads up to {SCHEMA_VERSION}",
                fix="pip install --upgrade hcf-toolkit",
            )
        return Manifest.model_validate(tree)
    except (ValueError, ValidationError) as error:
        raise InvalidArtifact(f"{file} is damaged: {error}", "make the artefact again") from error


def write_manifest(path: Path, manifest: Manifest) -> Manifest:
    """Hashes the folder's files into `manifest`, writes it, and returns it as written."""
    files = hash_files(path)
    written = manifest.model_copy(
        update={
            "files": files,
            "content_hash": _digest(files),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": environment(),
        }
    )
    save_text(Path(path) / MANIFEST, written.model_dump_json(indent=1, exclude_none=True))
    return written


def hash_file(path: Path) -> str:
    """SHA-256 of one file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(path: Path) -> dict[str, str]:
    """{relative path: SHA-256} of what counts as content: no manifest, report.html or PNG."""
    found: dict[str, str] = {}
    for file in sorted(Path(path).rglob("*")):
        if file.is_file() and _is_content(file):
            found[file.relative_to(path).as_posix()] = hash_file(file)
    return found


def content_hash(path: Path) -> str:
    """SHA-256 over the sorted (relative path, SHA-256) of the folder's content."""
    return _digest(hash_files(path))


def verify(path: Path) -> list[Problem]:
    """Recomputes the hashes of artefact `path`: the files that are not what the manifest says."""
    manifest = read_manifest(path)
    problems: list[Problem] = []
    found = hash_files(path)
    for name, expected in manifest.files.items():
        if name not in found:
            problems.append(Problem(name, "missing", "listed in the manifest"))
        elif found[name] != expected:
            detail = f"SHA-256 {found[name][:12]}, manifest {expected[:12]}"
            cut = _is_truncated(Path(path) / name)
            problems.append(Problem(name, "truncated" if cut else "edited", detail))
    problems += [
        Problem(name, "extra", "not in the manifest")
        for name in found
        if name not in manifest.files
    ]
    if not problems and manifest.content_hash != _digest(found):
        problems.append(Problem(MANIFEST, "edited", "content_hash does not match its own files"))
    return problems


@contextlib.contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place on success and is gone otherwise.

    An existing target is replaced only on success. StorageError when the disk is full,
    RecipeError for a target that holds something this toolkit did not write.
    """
    target = Path(target).absolute()
    refuse_foreign(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        clean_leftovers(target.parent)
        folder = Path(tempfile.mkdtemp(prefix=f".hcf-{os.getpid()}-", dir=target.parent))
    except OSError as error:
        raise StorageError(
            f"{target.parent} cannot be written: {error}", "choose another output folder"
        ) from error
    try:
        yield folder
        folder.chmod(0o755)  # mkdtemp makes it private
        old = target.with_name(f"{folder.name}.old.{target.name}")
        if target.exists():
            target.rename(old)
        folder.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if is_disk_full(error):
            raise StorageError(
                f"the disk filled up while {target} was written; nothing was kept",
                fix=f"free space on the disk of {target.parent} and repeat the command",
            ) from error
        raise


def refuse_foreign(target: Path) -> None:
    """RecipeError where writing `target` would delete a folder that is not an output of ours."""
    ours = (MANIFEST, "done.json")
    if target.is_dir() and any(target.iterdir()) and not any((target / n).is_file() for n in ours):
        raise RecipeError(
            f"{target} exists and is not an artefact of this toolkit: it is not replaced",
            fix="choose another output folder, or remove it",
        )
    if target.exists() and not target.is_dir():
        raise RecipeError(f"the output {target} is a file", "choose a folder")


def clean_leftovers(folder: Path) -> None:
    """Removes what killed processes left in `folder`; an output they had set aside comes back."""
    for path in folder.glob(".hcf-*-*"):
        pid = path.name.split("-")[1]
        if not pid.isdigit() or _alive(int(pid)):
            continue
        _, _, name = path.name.partition(".old.")
        if name and not (folder / name).exists():
            path.rename(folder / name)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def clone_artifact(src: Path, dst: Path) -> Manifest:
    """Puts the content of model folder `src` into `dst`, whose manifest lists `src` as parent."""
    src, dst = Path(src), Path(dst)
    dst.mkdir(parents=True, exist_ok=True)
    for file in sorted(src.rglob("*")):
        if not file.is_file() or not _is_content(file):
            continue
        copy = dst / file.relative_to(src)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if file.stat().st_size >= LINK_FROM_BYTES:
            with contextlib.suppress(OSError):
                os.link(file.resolve(), copy)
                continue
        shutil.copyfile(file, copy)
    if (src / MANIFEST).is_file():
        parent = read_manifest(src)
    else:
        parent = Manifest(name=src.resolve().name, sampling=default_sampling(src))
    lineage = Parent(name=parent.name, content_hash=parent.content_hash or content_hash(src))
    return write_manifest(dst, parent.model_copy(update={"parents": [lineage, *parent.parents]}))


def check_model_folder(path: Path) -> None:
    """Refuses a pipeline folder that must not or cannot be loaded; reads weights without torch.

    UnsafeFile for a pickle (never opened as one). InvalidArtifact for no folder or index, a named
    component that is absent or has no weights, and weights that are cut short, of a wrong type,
    NaN or infinite.
    """
    path = Path(path)
    if path.is_file():
        refuse_pickle(path)
        raise InvalidArtifact(
            f"{path} is a file, not a pipeline folder", f"give a folder with {INDEX}"
        )
    if not path.is_dir():
        raise InvalidArtifact(
            f"no model at {path}", "check the path; it is relative to this folder"
        )
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    for file in files:
        refuse_pickle(file)
    if not (path / INDEX).is_file():
        raise InvalidArtifact(
            f"{path} has no {INDEX}: it is not a diffusers pipeline",
            fix="save one with pipe.save_pretrained(folder)",
        )
    try:
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))
        parts = [
            k for k, v in index.items()
            if isinstance(v, list) and len(v) == 2 and isinstance(v[1], str)
        ]  # fmt: skip
    except (ValueError, AttributeError) as error:
        raise InvalidArtifact(
            f"{path / INDEX} is damaged: {error}", "save the pipeline again"
        ) from error
    for name in parts:
        folder = path / name
        if not folder.is_dir():
            raise InvalidArtifact(
                f"{path} names the component {name!r} but has no such folder",
                "copy the whole model",
            )
        if (folder / "config.json").is_file() and not any(folder.glob("*.safetensors")):
            raise InvalidArtifact(f"{folder} has no *.safetensors weights", "copy the whole model")
        for shards in folder.glob("*.safetensors.index.json"):
            for shard in sorted(set(json.loads(shards.read_text())["weight_map"].values())):
                if not (folder / shard).is_file():
                    raise InvalidArtifact(f"{folder / shard} is missing", "copy the whole model")
    for file in files:
        if file.suffix == ".safetensors":
            check_weights(file)


def refuse_pickle(file: Path) -> None:
    """UnsafeFile for a pickle. A .bin beside its .xml is OpenVINO's own: raw numbers."""
    if file.suffix.lower() not in PICKLES:
        return
    if file.suffix == ".bin" and file.with_suffix(".xml").is_file():
        with open(file, "rb") as stream:
            if stream.read(2) not in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK"):
                return
    raise UnsafeFile(
        f"{file} is a pickle: reading it can run any code, so it is not read",
        fix="convert it to .safetensors where you trust it, and delete it here",
    )


def default_sampling(path: Path) -> Sampling:
    """Sampling that a pipeline folder registers in its index (`default_steps`, ...)."""
    try:
        index = json.loads((Path(path) / INDEX).read_text(encoding="utf-8"))
        return Sampling(
            steps=index.get("default_steps"), guidance_scale=index.get("default_guidance_scale")
        )
    except (OSError, ValueError, AttributeError):
        return Sampling()


def hcf_home() -> Path:
    """Where this toolkit keeps what it can make again: $HCF_HOME, else under $XDG_CACHE_HOME."""
    if given := os.environ.get("HCF_HOME"):
        return Path(given).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache).expanduser() if cache else Path.home() / ".cache") / "hcf"


def save_text(path: Path, text: str) -> None:
    """Writes a small file whole or not at all."""
    temporary = path.with_name(f".hcf-{os.getpid()}-{path.name}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(f"{path} cannot be written: {error}", "free some space") from error


def environment() -> dict[str, str]:
    """Python, machine and the versions of the packages that decide what a model computes."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def is_disk_full(error: BaseException) -> bool:
    """Also true for libraries that report it as text (safetensors: "os error 28")."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "os error 28" in str(error) or "No space left on device" in str(error)


def _is_content(file: Path) -> bool:
    name = file.name
    return (
        name not in (MANIFEST, "report.html")
        and not name.startswith(".hcf-")
        and file.suffix != ".png"
    )


def _digest(files: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()


def _is_truncated(file: Path) -> bool:
    if file.suffix == ".safetensors":
        with contextlib.suppress(InvalidArtifact):
            read_header(file)
            return False
        return True
    return file.stat().st_size == 0


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
