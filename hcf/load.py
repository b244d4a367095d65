"""A model as an ordinary diffusers pipeline whose components run on engines.

    pipe = hcf.load("out/quickstart")              # the engines that were fastest when built
    pipe = hcf.load(folder, engine="eager")        # plain torch, float32
    hcf.accelerate(pipe)                           # a pipeline in hand: built once, then kept
    pipe.hcf_report                                # what really runs
    pipe.hcf_sampling                              # {"steps": 4, "guidance_scale": 1.0}

The pipeline keeps its class, its scheduler, its components and its call; see `hcf.routing`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hcf.artifact import MANIFEST, EngineEntry, Manifest, default_sampling, read_manifest
from hcf.engines import (
    PRECISIONS,
    Engine,
    EngineReport,
    check_precision,
    cpu_flags,
    is_floating,
)
from hcf.engines.eager import report_of
from hcf.engines.forms import engine_version, entry_name, open_entry, open_torch, speed
from hcf.errors import MissingDependency, RecipeError
from hcf.export.component import (
    CACHED,
    cached_components,
    components_of,
    default_components,
    example_inputs,
)
from hcf.feature_cache import CachedDenoiser, install, remove
from hcf.recipe import parse
from hcf.routing import guard_decoder, owner_of, route, routes_of, unroute, unrouted
from hcf.settings import (
    BuildConfig,
    EngineName,
    ExportConfig,
    FeatureCacheConfig,
    Precision,
    QuantizeConfig,
)
from hcf.source import open_pipeline
from hcf.trace import denoiser_name

Log = Callable[[str], None]
TORCH_ENGINES = ("eager", "compile")
# Compiling a U-Net takes minutes and, on a CPU, loses to the graph runtimes: it has to be named.
MEASURED: dict[str, tuple[EngineName, ...]] = {
    "cpu": ("eager", "onnxruntime", "openvino"),
    "cuda": ("eager", "compile", "onnxruntime", "tensorrt"),
}
FLOATING: dict[str, tuple[Precision, ...]] = {"cpu": ("fp32", "bf16"), "cuda": ("fp16", "bf16")}
logger = logging.getLogger("hcf")


def load(
    path: str | Path,
    engine: str = "auto",
    precision: str | None = None,
    threads: int | None = None,
    components: Sequence[str] | None = None,
) -> Any:
    """The pipeline in folder `path` on the engines that `hcf build` made there.

    `engine` "auto" takes what the build chose; a folder it has not seen runs eager. A named engine
    runs in its fastest `precision` that was built, or in the one given; then components that have
    it take it, and the denoiser must. `threads` holds for torch and the engines. A feature cache
    that the engines were built for comes with them, and not with torch's.

    Raises RecipeError or HcfError for an engine or precision that was not built, EngineMismatch for
    one that another version or machine built, InvalidArtifact and UnsafeFile for broken folders.
    """
    path = Path(path)
    _check_names(engine, precision)
    pipe = open_pipeline(path)
    _set_threads(threads)
    manifest = read_manifest(path) if (path / MANIFEST).is_file() else None
    sampling = manifest.sampling if manifest else default_sampling(path)
    built_for = manifest.cache if manifest else {}
    caching = parse(FeatureCacheConfig, built_for, str(path)) if built_for else None
    if engine in TORCH_ENGINES:
        caching = None  # the plain model, which others are held against
    _install(pipe, path, manifest, engine, precision, components, logger.info, caching)
    pipe.hcf_sampling = sampling.model_dump(exclude_none=True)
    return pipe


def accelerate(
    pipe: Any,
    path: str | Path | None = None,
    *,
    engine: str = "auto",
    precision: str | None = None,
    quantize: str | QuantizeConfig | None = None,
    cache: str | int | FeatureCacheConfig | None = None,
    components: Sequence[str] | None = None,
    threads: int | None = None,
    prompts: Sequence[str] = (),
    log: Log | None = None,
) -> Any:
    """Puts a pipeline in hand on engines, in place, and returns it.

    Without `path` they are built for exactly what the pipeline holds, adapters included, and kept
    in the store (`hcf.store`): the first call takes minutes, later ones seconds. `engine` "auto"
    measures what is installed and takes the fastest whose error its precision explains. `quantize`
    names a format ("int8", "fp8", ...) or holds settings; it is calibrated on `prompts`, or on the
    built-in ones. `components` defaults to the denoiser, the ControlNet and the decoder. `cache`
    reuses deep features between steps (`hcf.feature_cache`): "deepcache", an interval, or settings.
    With `path`, the engines of that artefact of the same model; its weights are not compared.

    Raises RecipeError for names that cannot be meant, MissingDependency, EngineMismatch, and what
    quantising, exporting and building raise; the pipeline then is as it was.
    """
    say = log or logger.info
    _check_names(engine, precision)
    _set_threads(threads)
    caching = _caching(cache)
    if path is not None:
        if quantize is not None:
            raise RecipeError(
                f"quantize={quantize!r} with the engines of {path}, which are built already",
                fix="choose with precision=, or leave `path` out",
            )
        folder, manifest = Path(path), read_manifest(Path(path))
        if caching is None and manifest.cache and engine not in TORCH_ENGINES:
            caching = parse(FeatureCacheConfig, manifest.cache, str(path))
        _install(pipe, folder, manifest, engine, precision, components, say, caching)
        pipe.hcf_sampling = manifest.sampling.model_dump(exclude_none=True)
    else:
        _accelerate_in_hand(pipe, engine, precision, quantize, components, prompts, say, caching)
    return pipe


def decelerate(pipe: Any) -> Any:
    """Takes every engine and feature cache out of `pipe` again, bit for bit, and returns it."""
    remove(pipe)
    unroute(pipe)
    pipe.hcf_report = []
    return pipe


def _accelerate_in_hand(
    pipe: Any,
    engine: str,
    precision: str | None,
    quantize: str | QuantizeConfig | None,
    components: Sequence[str] | None,
    prompts: Sequence[str],
    log: Log,
    caching: FeatureCacheConfig | None,
) -> None:
    from hcf.store import Request, engines_of

    chosen = _components(pipe, components)
    formats = _quantize_config(quantize, denoiser_name(pipe), prompts)
    if engine in TORCH_ENGINES and formats is None:
        _install(pipe, Path(), None, engine, precision, chosen, log, caching)
        return
    if caching is not None and "unet" not in chosen:
        raise RecipeError(
            f"cache= is for a U-Net, and the components are {', '.join(chosen)}",
            fix="name unet in components=, or leave cache out",
        )
    device = pipe.device.type
    engines = _measured(device, log) if engine == "auto" else (engine,)
    precisions = _precisions(device, engines, precision, formats)
    build = parse(
        BuildConfig,
        {
            "engines": engines,
            "precisions": precisions,
            "components": chosen,
            "threads": torch.get_num_threads(),
            "keep_going": engine == "auto",
        },
        "hcf.accelerate",
    )
    # engines of a GPU compute in the types of their graph; those of a CPU start from float32
    graphs = {"fp32"} | ({"fp16", *precisions} & {"fp16", "bf16"} if device == "cuda" else set())
    export = parse(
        ExportConfig, {"components": chosen, "precisions": sorted(graphs)}, "hcf.accelerate"
    )
    branch = None if caching is None else caching.branch
    request = Request(chosen, export, build, formats, branch)
    folder, manifest = engines_of(pipe, request, log)
    _install(pipe, folder, manifest, engine, precision, chosen, log, caching)


def _install(
    pipe: Any,
    path: Path,
    manifest: Manifest | None,
    engine: str,
    precision: str | None,
    components: Sequence[str] | None,
    log: Log,
    caching: FeatureCacheConfig | None = None,
) -> None:
    """Opens every engine first, then routes: an error leaves the pipeline as it was."""
    built = manifest.engines if manifest else {}
    if engine == "auto" and not built:
        engine = "eager"
    threads = torch.get_num_threads()
    denoiser = denoiser_name(pipe)
    wanted = _components(pipe, components)
    if components is None:
        wanted = tuple(dict.fromkeys([*wanted, *(n for n in built if not CACHED.fullmatch(n))]))
    opened: list[tuple[str, Engine, dict[str, list[int]], Callable[[], Engine]]] = []
    reports: list[EngineReport] = []
    with _unrouted_components(pipe, wanted):
        for component in wanted:
            if component == "unet" and caching is not None and engine not in TORCH_ENGINES:
                pair = _cached_entries(path, manifest, engine, precision, caching)
                full, shallow = (
                    open_entry(path, name, e, manifest, pipe, threads)  # type: ignore[arg-type]
                    for name, e in pair.items()
                )
                rows = next(iter(pair.values())).shapes
                shapes = {name: row[len(row) // 2] for name, row in rows.items()}
                cached = CachedDenoiser(full, shallow, caching)
                again = partial(_refitted_cache, pipe, path, pair, caching, threads, log)
                opened.append((component, cached, shapes, again))
                reports += [full.report, shallow.report]
                continue
            entry = None
            if engine not in TORCH_ENGINES and component in built and manifest is not None:
                # a quantised U-Net has a first stage that is not: only the denoiser must have it
                named = precision if component == denoiser else None
                entry = pick_entry(path, component, manifest, engine, named)
            elif engine not in TORCH_ENGINES and component == denoiser:
                raise RecipeError(
                    f"{path} has no {engine} engine of {component}",
                    fix="run `hcf export` and `hcf build` on it, or load it with engine='eager'",
                )
            if entry is not None and entry.file is not None and manifest is not None:
                shapes = {name: rows[len(rows) // 2] for name, rows in entry.shapes.items()}
                runner = open_entry(path, component, entry, manifest, pipe, threads)
                rebuild: Callable[[], Engine] = partial(
                    _refitted, pipe, component, path, entry, threads, log
                )
            else:
                kind = (entry.engine, entry.precision) if entry else (engine, precision)
                if engine not in TORCH_ENGINES and entry is None:
                    kind = ("eager", None)  # `build.components` left it out
                elif component != denoiser and kind[1] and not is_floating(kind[1]):
                    kind = (kind[0], None)
                own = report_of(pipe, component)
                if kind[0] == "eager" and kind[1] in (None, own.precision):
                    reports.append(own)  # the module itself, which still trains, saves and moves
                    continue
                example = example_inputs(pipe, component, batch=1)
                shapes = {name: list(tensor.shape) for name, tensor in example.items()}
                form = kind[1] or own.precision
                make = partial(_torch_engine, pipe, component, kind[0], form, list(shapes), path)
                runner = make()
                rebuild = partial(_made_again, component, make, log)
            opened.append((component, runner, shapes, rebuild))
            reports.append(runner.report)
    remove(pipe)
    unroute(pipe)
    for component, runner, shapes, rebuild in opened:
        route(pipe, component, runner, shapes, rebuild)
        if isinstance(runner, CachedDenoiser):
            runner.follow(pipe)
    if caching is not None and engine in TORCH_ENGINES:
        install(pipe, caching)
    guard_decoder(pipe)
    pipe.hcf_report = reports


def _refitted(
    pipe: Any, component: str, path: Path, entry: EngineEntry, threads: int, log: Log
) -> Engine:
    from hcf.store import refitted

    if entry.file is None:
        names = list(entry.shapes)
        make = partial(_torch_engine, pipe, component, entry.engine, entry.precision, names, path)
        return _made_again(component, make, log)
    return refitted(pipe, component, path, entry, threads, log)


def _cached_entries(
    path: Path,
    manifest: Manifest | None,
    engine: str,
    precision: str | None,
    caching: FeatureCacheConfig,
) -> dict[str, EngineEntry]:
    """{component: entry} of the full and the shallow step of the U-Net."""
    names = cached_components(caching.branch)
    if manifest is None or any(name not in manifest.engines for name in names):
        raise RecipeError(
            f"{path} has no engines of a cache at branch {caching.branch}",
            fix=f"build.components: [{', '.join(names)}, vae_decoder], after export.components of "
            "the same, or engine='eager'",
        )
    return {name: pick_entry(path, name, manifest, engine, precision) for name in names}


def _refitted_cache(
    pipe: Any,
    path: Path,
    pair: Mapping[str, EngineEntry],
    caching: FeatureCacheConfig,
    threads: int,
    log: Log,
) -> Engine:
    full, shallow = (
        _refitted(pipe, name, path, entry, threads, log) for name, entry in pair.items()
    )
    before = routes_of(pipe)["unet"].engine
    if isinstance(before, CachedDenoiser):
        before.follower.release()
    cached = CachedDenoiser(full, shallow, caching)
    cached.follow(pipe)
    return cached


def _torch_engine(
    pipe: Any, component: str, engine: str, precision: str, names: Sequence[str], folder: Path
) -> Engine:
    """Of the weights that the component has now, on the device where it is."""
    device = next(owner_of(pipe, component).parameters()).device.type
    with _unrouted_components(pipe, (component,)):
        return open_torch(pipe, component, engine, precision, names, device=device, folder=folder)


def _made_again(component: str, make: Callable[[], Engine], log: Log) -> Engine:
    engine = make()
    report = engine.report
    log(f"{component}: its weights have changed, {report.engine} {report.precision} is made again")
    return engine


@contextlib.contextmanager
def _unrouted_components(pipe: Any, components: Sequence[str]) -> Iterator[None]:
    """Inside, the components are twins that compute in torch: engines of torch hold those."""
    owners = {id(module): module for module in (owner_of(pipe, name) for name in components)}
    names = [name for name, module in pipe.components.items() if id(module) in owners]
    before = {name: getattr(pipe, name) for name in names}
    for name, module in before.items():
        setattr(pipe, name, unrouted(module))
    try:
        yield
    finally:
        for name, module in before.items():
            setattr(pipe, name, module)


def pick_entry(
    path: Path, component: str, manifest: Manifest, engine: str, precision: str | None
) -> EngineEntry:
    """The entry to open: what the build chose for "auto", else the fastest that fits.

    Raises RecipeError naming what was built where nothing fits.
    """
    entries = manifest.engines.get(component, [])
    fits = [
        e
        for e in entries
        if (e.engine == engine if engine != "auto" else e.latency_low_ms is not None)
        and (e.precision == precision if precision else True)
    ]
    if engine == "auto" and precision is None and component in manifest.chosen:
        chosen = manifest.chosen[component]
        fits = [e for e in entries if chosen in (e.engine, entry_name(e))]
    if not fits:
        there = ", ".join(entry_name(e) for e in entries) or "none"
        raise RecipeError(
            f"{path} has no {engine if engine != 'auto' else ''} {precision or ''} engine of "
            f"{component}; built are: {there}",
            fix="run `hcf build` with it in build.engines and build.precisions",
        )
    return min(fits, key=speed)


def _components(pipe: Any, components: Sequence[str] | None) -> tuple[str, ...]:
    if components is None:
        return default_components(pipe)
    there = components_of(pipe)
    if unknown := [name for name in components if name not in there]:
        raise RecipeError(
            f"{', '.join(unknown)}: no component of {type(pipe).__name__} that engines can replace",
            fix=f"use {', '.join(there)}",
        )
    return tuple(components)


def _measured(device: str, log: Log) -> tuple[EngineName, ...]:
    """The engines "auto" tries on this device; what is not installed is named and left out."""
    found: list[EngineName] = []
    for engine in MEASURED.get(device, ("eager",)):
        try:
            engine_version(engine)
        except MissingDependency as error:
            log(f"{engine} is not measured: {error.message} ({error.fix})")
            continue
        found.append(engine)
    return tuple(found)


def _precisions(
    device: str,
    engines: Sequence[str],
    precision: str | None,
    formats: QuantizeConfig | None,
) -> tuple[str, ...]:
    """What to build: the precision named, or those that these engines and this machine have."""
    if precision is not None:
        return (precision,)
    bf16 = device != "cpu" or bool({"avx512_bf16", "amx_bf16"} & cpu_flags())
    wanted: list[str] = [p for p in FLOATING[device] if p != "bf16" or bf16]
    if formats is not None:
        wanted.append(formats.format)
        if formats.format == "int8" and "openvino" in engines and bf16:
            wanted.append("int8-bf16")
    return tuple(p for p in wanted if any(p in PRECISIONS[engine] for engine in engines))


def _quantize_config(
    quantize: str | QuantizeConfig | None, component: str, prompts: Sequence[str]
) -> QuantizeConfig | None:
    if quantize is None:
        if prompts:
            raise RecipeError(
                "prompts are for calibration, and quantize is None", fix='set quantize="int8"'
            )
        return None
    if isinstance(quantize, QuantizeConfig):
        if prompts:
            return quantize.model_copy(update={"calibration_prompts": list(prompts)})
        return quantize
    settings: Mapping[str, Any] = {
        "format": quantize,
        "component": component,
        "calibration_prompts": list(prompts),
    }
    return parse(QuantizeConfig, settings, "quantize")


def _caching(cache: str | int | FeatureCacheConfig | None) -> FeatureCacheConfig | None:
    if cache is None or isinstance(cache, FeatureCacheConfig):
        return cache
    if cache == "deepcache":
        return FeatureCacheConfig()
    if isinstance(cache, int) and not isinstance(cache, bool):
        return parse(FeatureCacheConfig, {"interval": cache}, "cache")
    raise RecipeError(
        f"cache={cache!r} is no feature cache", fix='use "deepcache", an interval, or settings'
    )


def _check_names(engine: str, precision: str | None) -> None:
    if engine not in ("auto", *PRECISIONS):
        raise RecipeError(
            f"there is no engine {engine!r}", fix=f"use auto, {', '.join(PRECISIONS)}"
        )
    if precision is not None and engine != "auto":
        check_precision(engine, precision)


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        if threads < 1:
            raise RecipeError(f"threads={threads}", fix="use 1 or more")
        torch.set_num_threads(threads)
