"""Engines of a pipeline in hand: made once for what it holds, kept, and found again by content.

    $HCF_HOME/engines/<key>/    (default $XDG_CACHE_HOME/hcf, ~/.cache/hcf)
        hcf_manifest.json       engines, what was chosen and why, parity with torch
        <component>/model.onnx, engines/<component>/...

The key is a SHA-256 over weights (adapters included), configurations, options, the code that makes
engines, package versions and machine: never a path. A folder is written whole or not at all. The
store is kept under HCF_ENGINE_CACHE_GB (default 20) by removing what was used longest ago.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hcf.artifact import (
    MANIFEST,
    PACKAGES,
    EngineEntry,
    Manifest,
    Sampling,
    environment,
    hcf_home,
    read_manifest,
    staged_folder,
    write_manifest,
)
from hcf.code_hash import code_hash
from hcf.engines import Engine, is_floating, machine_kind
from hcf.engines.build import build_components
from hcf.engines.forms import entry_name, open_form, refit_form
from hcf.errors import RecipeError
from hcf.export.component import CACHED, cached_components
from hcf.export.onnx import FP32_GRAPH, export_components, export_quantized
from hcf.export.quantized import export_quantized_step
from hcf.export.refit import refit_graph
from hcf.lora import clean_module, effective_weights, weights_hash
from hcf.quantize.calibrate import CALIBRATION_FILE
from hcf.quantize.quantize import quantize_component, write_quantised
from hcf.quantize.ranges import rescale
from hcf.quantize.scales import REPORT_FILE, SCALES_FILE, read_scales, write_scales
from hcf.routing import owner_of, unrouted
from hcf.settings import BuildConfig, ExportConfig, QuantizeConfig

Log = Callable[[str], None]
DEFAULT_CACHE_GB = 20.0
# whose change makes engines that are kept stale
SOURCES = (
    "hcf/quantize", "hcf/export", "hcf/engines", "hcf/feature_cache", "hcf/lora", "hcf/trace.py",
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What is to be made of a pipeline: which components, on which engines, how quantised."""

    components: tuple[str, ...]
    export: ExportConfig
    build: BuildConfig
    quantize: QuantizeConfig | None = None
    cache_branch: int | None = None

    @property
    def graphs(self) -> list[str]:
        """The components as graphs: a cached U-Net is two, a full and a shallow step."""
        if self.cache_branch is None:
            return list(self.components)
        pair = cached_components(self.cache_branch)
        return [g for c in self.components for g in (pair if c == "unet" else (c,))]


def engines_of(pipe: Any, request: Request, log: Log) -> tuple[Path, Manifest]:
    """The store's folder for this pipeline and request, made if it is not there, and its manifest.

    Raises what quantising, exporting and building raise; then nothing is left behind.
    """
    root = engines_folder()
    folder = root / content_key(pipe, request)[:32]
    if (folder / MANIFEST).is_file():
        os.utime(folder / MANIFEST)
        return folder, read_manifest(folder)
    log(f"building engines of {', '.join(request.components)} into {folder}")
    with staged_folder(folder) as temporary, plain_components(pipe, request.components):
        manifest = Manifest(name=type(pipe).__name__, sampling=Sampling())
        if request.quantize is not None:
            name = request.quantize.component
            (temporary / name).mkdir()
            found = quantize_component(pipe, request.quantize, log)
            manifest.quantization[name] = write_quantised(temporary / name, found, request.quantize)
        export = request.export.model_copy(update={"components": request.graphs})
        build = request.build.model_copy(update={"components": request.graphs})
        manifest.exports = export_components(pipe, temporary, export, log)
        engines, chosen = build_components(pipe, temporary, build, log)
        manifest.engines, manifest.chosen = engines, chosen
        write_manifest(temporary, manifest)
    trim(root, keep=folder)
    return folder, read_manifest(folder)


def refitted(
    pipe: Any, component: str, folder: Path, entry: EngineEntry, threads: int, log: Log
) -> Engine:
    """The engine of `entry` (built in `folder`) with the weights that the component has now.

    Always from the graph in `folder`, never from an earlier refit, so that adapters A, B, A end
    where they began. Kept in the store under the weights' own hash.
    """
    module = owner_of(pipe, component)
    root = engines_folder()
    parts = {
        "base": entry.source_hash,
        "component": component,
        "entry": entry.model_dump(mode="json", include={"engine", "precision", "version"}),
        "machine": machine_kind(),
        "code": code_hash(SOURCES),
        "weights": weights_hash(module),
    }
    target = root / _digest(parts)[:32]
    if not (target / MANIFEST).is_file():
        log(f"{component}: its weights have changed, {entry_name(entry)} is refitted")
        with staged_folder(target) as temporary:
            manifest = Manifest(name=f"{component}-refit")
            made = _refit(module, component, folder, temporary, entry, threads, log)
            manifest.engines[component] = [made]
            write_manifest(temporary, manifest)
        trim(root, keep=target)
    os.utime(target / MANIFEST)
    return open_form(target, component, read_manifest(target).engines[component][0], threads)


def _refit(
    module: nn.Module,
    component: str,
    folder: Path,
    target: Path,
    entry: EngineEntry,
    threads: int,
    log: Log,
) -> EngineEntry:
    weights: Mapping[str, Tensor] = effective_weights(module)
    if CACHED.fullmatch(component):
        weights = _held_by(folder / component / FP32_GRAPH, weights)
    (target / component).mkdir(parents=True)
    source = Path(entry.source or "").name
    quantised = not is_floating(entry.precision)
    graph = target / component / (FP32_GRAPH if quantised else source)
    counts = refit_graph(folder / component / graph.name, weights, graph)
    log(f"{component}: {counts}")
    if quantised and CACHED.fullmatch(component):
        scales = rescale(read_scales(folder / "unet" / SCALES_FILE), weights)
        (target / "unet").mkdir()
        write_scales(target / "unet" / SCALES_FILE, scales)
        export_quantized_step(target, component, log)
    elif quantised:
        scales = rescale(read_scales(folder / component / SCALES_FILE), weights)
        write_scales(target / component / SCALES_FILE, scales)
        for name in (CALIBRATION_FILE, REPORT_FILE):
            shutil.copyfile(folder / component / name, target / component / name)
        export_quantized(target, component, log)
    form = refit_form(folder, target, component, entry, threads)
    return entry.model_copy(update=form)


def _held_by(graph: Path, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of `weights` that a graph of a part of the model has."""
    import onnx

    tensors = onnx.load(str(graph), load_external_data=False).graph.initializer
    # the graph's names have the attribute of the module that was exported in front
    names = {t.name.partition(".")[2].removesuffix("_transposed") for t in tensors}
    return {name: weights[name] for name in weights if name in names}


@contextlib.contextmanager
def plain_components(pipe: Any, components: Sequence[str]) -> Iterator[None]:
    """Inside, the components compute in torch, in float32, on the CPU, adapters merged.

    float16 and bfloat16 weights go to float32 and back without loss.
    """
    before = {
        name: (module, next(module.parameters()).dtype, next(module.parameters()).device)
        for name, module in pipe.components.items()
        if isinstance(module, nn.Module) and next(module.parameters(), None) is not None
    }
    owners = {id(owner_of(pipe, component)) for component in components}
    for name, (module, dtype, device) in before.items():
        if dtype != torch.float32 or device.type != "cpu":
            nn.Module.to(module, device="cpu", dtype=torch.float32)
        if id(module) in owners:
            adapted = bool(getattr(module, "peft_config", None))
            setattr(pipe, name, clean_module(module) if adapted else unrouted(module))
    try:
        yield
    finally:
        for name, (module, dtype, device) in before.items():
            if dtype != torch.float32 or device.type != "cpu":
                nn.Module.to(module, device=device, dtype=dtype)
            if id(module) in owners:
                setattr(pipe, name, module)


def content_key(pipe: Any, request: Request) -> str:
    """SHA-256 of everything that the engines depend on."""
    parts: dict[str, Any] = {
        "pipeline": type(pipe).__name__,
        "components": {
            component: {
                "class": type(owner_of(pipe, component)).__name__,
                "config": _config(owner_of(pipe, component)),
                "weights": weights_hash(owner_of(pipe, component)),
            }
            for component in request.components
        },
        "export": request.export.model_dump(mode="json"),
        "build": request.build.model_dump(mode="json"),
        "cache_branch": request.cache_branch,
        "machine": machine_kind(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "code": code_hash(SOURCES),
        "packages": {name: environment().get(name) for name in PACKAGES},
    }
    if request.quantize is not None:
        parts["quantize"] = request.quantize.model_dump(mode="json")
        parts["scheduler"] = [type(pipe.scheduler).__name__, _config(pipe.scheduler)]
        parts["text"] = {
            name: weights_hash(module)
            for name, module in pipe.components.items()
            if name.startswith("text_encoder") and isinstance(module, nn.Module)
        }
    return _digest(parts)


def engines_folder() -> Path:
    return hcf_home() / "engines"


def trim(root: Path, keep: Path) -> list[Path]:
    """Removes folders of the store, least recently used first, until it fits; returns them."""
    text = os.environ.get("HCF_ENGINE_CACHE_GB", str(DEFAULT_CACHE_GB))
    try:
        limit = float(text) * 1e9
    except ValueError as error:
        raise RecipeError(
            f"HCF_ENGINE_CACHE_GB is {text!r}", fix="set it to a number of gigabytes"
        ) from error
    folders = [path.parent for path in root.glob(f"*/{MANIFEST}")]
    sizes = {f: sum(p.stat().st_size for p in f.rglob("*") if p.is_file()) for f in folders}
    removed: list[Path] = []
    for folder in sorted(folders, key=lambda f: (f / MANIFEST).stat().st_mtime):
        if sum(sizes.values()) <= limit:
            break
        if folder != keep:
            shutil.rmtree(folder, ignore_errors=True)
            sizes.pop(folder)
            removed.append(folder)
    return removed


def _config(owner: Any) -> dict[str, Any]:
    """The configuration of a model or scheduler without names of places it was loaded from."""
    config = owner.config.to_dict() if hasattr(owner.config, "to_dict") else dict(owner.config)
    hidden = ("_name_or_path", "transformers_version", "_diffusers_version")
    return {key: value for key, value in config.items() if key not in hidden}


def _digest(parts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
