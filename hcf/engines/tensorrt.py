"""TensorRT plans: one path for `tensorrt` 10.12+ and 11, and for `tensorrt_rtx`.

The network is strongly typed: an INT8 plan is built from the explicit Q/DQ graph, never from a
flag. TensorRT builds for the GPU it runs on; TensorRT-RTX also for a compute capability by name, on
a machine without a GPU. A plan is `engines/<component>/<driver>-<sm>-<hash12>.plan` with a .json
beside it: its key (the graph's hash with its weights, shapes, package version, compute capability,
options) and what the build told (layer precisions, workspace, skipped tactics).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from hcf.artifact import EngineEntry, save_text
from hcf.engines import EngineReport, require_layers
from hcf.engines.products import graph_products, hash_graph
from hcf.engines.tensorrt_network import LayerPrecision as LayerPrecision
from hcf.engines.tensorrt_network import (
    Listener,
    engine_layers,
    engine_products,
    is_out_of_memory,
    parse,
    precisions_of,
    products_in,
    summary,
)
from hcf.engines.tensorrt_package import (
    DRIVERS as DRIVERS,
)
from hcf.engines.tensorrt_package import (
    Driver,
    package,
    require_hardware,
    target_of,
    timing_cache_path,
)
from hcf.engines.tensorrt_package import version as version
from hcf.engines.tensorrt_profiles import Profile, ShapeRange, Shapes, add_profiles
from hcf.errors import HcfError, RecipeError
from hcf.settings import BuildConfig

LADDER = 6  # rungs: all memory, then a half of it, a quarter, ... down to 1/32


@dataclass(frozen=True)
class PlanOptions:
    """How to build. Shapes by input name; with `opt_shapes` alone exactly those are built.

    `profiles` stand in place of the three shapes. `compute_capability` ("8.0", "sm80") is the GPU
    here if None. `hardware_compatibility_level`: "ampere_plus" or "same_compute_capability".
    `workspace_gb` is the first rung of the ladder that a build goes down when memory runs out.
    `plugins`: nodes of the domain hcf that become plugins. An option the driver does not have is an
    error.
    """

    driver: Driver | None = None
    compute_capability: str | None = None
    min_shapes: Shapes = field(default_factory=dict)
    opt_shapes: Shapes = field(default_factory=dict)
    max_shapes: Shapes = field(default_factory=dict)
    profiles: tuple[ShapeRange, ...] = ()
    builder_optimization_level: int = 3
    timing_cache: Path | None = None
    refit: bool = False
    strip_weights: bool = False
    version_compatible: bool = False
    hardware_compatibility_level: str | None = None
    workspace_gb: float | None = None
    pixels_per_latent: int | None = None
    plugins: tuple[str, ...] = ()

    def ranges(self) -> tuple[ShapeRange, ...]:
        """The profiles, or the one of the three shapes."""
        own = ShapeRange(self.min_shapes, self.opt_shapes, self.max_shapes)
        return self.profiles or (own,)


# options that are in a plan's key; the others are in it as what they come to, or change no plan
KEYED = (
    "builder_optimization_level", "refit", "strip_weights", "version_compatible",
    "hardware_compatibility_level", "workspace_gb", "plugins",
)  # fmt: skip

Check = Callable[[dict[str, str], dict[str, str], bool], None]


def parse_shapes(text: str) -> dict[str, list[int]]:
    """Text like sample:1x4x64x64,timestep:1 as {"sample": [1, 4, 64, 64], "timestep": [1]}."""
    shapes: dict[str, list[int]] = {}
    for part in filter(None, text.split(",")):
        name, _, dims = part.strip().rpartition(":")
        try:
            shapes[name] = [int(dim) for dim in dims.lower().split("x")]
        except ValueError:
            shapes[name] = []
        if not name or not shapes[name] or min(shapes[name]) < 1:
            raise RecipeError(f"{part!r} is no shape", fix="write it as sample:1x4x64x64")
    return shapes


def network_precisions(graph: Path, driver: Driver | None = None) -> dict[str, LayerPrecision]:
    """Every layer of the network TensorRT parses from an ONNX file, by name; needs no GPU."""
    _, trt = package(driver)
    network, _keep = parse(trt, graph)
    return precisions_of(network)


def build_plan(graph: Path, folder: Path, options: PlanOptions, check: Check | None = None) -> Path:
    """Build `graph` into a plan under `folder`; returns its path. An equal key is not built again.

    `check` is called with what the graph's products should compute in and what the parsed network's
    do before the build, and on a GPU with the network's and the engine's after it, where types have
    to be the same; what it raises leaves no plan.
    Raises HcfError with TensorRT's own words where the graph cannot be parsed or compiled for the
    target, RecipeError for shapes or options that do not fit, MissingDependency without a package
    or, where one is needed, a GPU.
    """
    driver, trt = package(options.driver)
    target = target_of(driver, trt, options.compute_capability)
    network, kept = parse(trt, graph, options.plugins)
    log, builder = kept[0], kept[1]
    asked, parsed = graph_products(graph), products_in(precisions_of(network))
    require_hardware(graph, parsed, target)
    if check is not None:
        check(asked, parsed, False)
    if options.timing_cache is None and driver == "tensorrt":
        options = replace(options, timing_cache=timing_cache_path(driver, trt.__version__, target))
    config, profiles = _config(trt, driver, target, builder, network, options, log)
    key = {
        "graph": hash_graph(graph),
        "driver": driver,
        "version": str(trt.__version__),
        "compute_capability": target,
        "shapes": profiles[0],
        "profiles": profiles,
        "options": {name: value for name, value in asdict(options).items() if name in KEYED},
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    path = folder / f"{driver}-{target}-{digest}.plan"
    if path.is_file() and path.with_suffix(".json").is_file():
        return path
    started = time.perf_counter()

    def configure() -> Any:
        return _config(trt, driver, target, builder, network, options, log)[0]

    serialized, config, ladder = _build_down_the_ladder(
        trt, builder, network, config, configure, options, log
    )
    if serialized is None:
        raise HcfError(
            f"{driver} {trt.__version__} cannot build {graph.name} for {target}: {log.tail()}"
            + (f" (workspace tried: {_ladder_text(ladder)})" if len(ladder) > 1 else ""),
            fix="choose a target that has these data types, another precision, or smaller "
            "profiles; refit and stripped plans need a GPU while building",
        )
    plan = bytes(serialized)
    told: dict[str, Any] = {
        "layer_precisions": dict(Counter(parsed.values())),
        "counted_in": "the parsed network",
        "pixels_per_latent": options.pixels_per_latent,
        "source": os.path.relpath(graph, folder),
        "workspace": ladder,
        "skipped_tactics": log.skipped_tactics,
        "out_of_memory_lines": log.out_of_memory,
        "build_s": round(time.perf_counter() - started, 3),
    }
    if torch.cuda.is_available() and not options.strip_weights:
        layers = engine_layers(inspect_plan(trt, plan, options, log))
        told["engine"] = summary(layers)
        if check is not None:
            check(parsed, {**parsed, **engine_products(layers, parsed)}, True)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(plan)
    if options.timing_cache is not None:
        _save_timing_cache(config, options.timing_cache)
    save_text(path.with_suffix(".json"), json.dumps({**key, **told}, indent=1))
    temporary.replace(path)
    return path


def inspect_plan(trt: Any, plan: bytes, options: PlanOptions, log: Listener) -> dict[str, Any]:
    """The engine inspector's JSON of a plan; needs the GPU it was built for."""
    runtime = trt.Runtime(log.handle)
    if options.version_compatible:
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise HcfError(f"TensorRT cannot load what it has just built: {log.tail()}")
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    found: dict[str, Any] = json.loads(text)
    return found


def plan_entry(
    folder: Path,
    component: str,
    graph: Path,
    precision: str,
    config: BuildConfig,
    capability: str | None,
    shapes: Shapes,
    profiles: Sequence[ShapeRange] = (),
    pixels_per_latent: int | None = None,
) -> EngineEntry:
    """Build `graph` into artefact `folder` for one target; the manifest's entry of the plan.

    `shapes` are the optimal ones where `config` gives none. There is no latency: nothing has run.
    Raises HcfError where the layers did not get the precision the graph gives them.
    """
    started = time.perf_counter()
    options = PlanOptions(
        driver=config.tensorrt_driver,
        compute_capability=capability,
        min_shapes=config.min_shapes,
        opt_shapes={**shapes, **config.opt_shapes},
        max_shapes=config.max_shapes,
        profiles=tuple(profiles),
        builder_optimization_level=config.builder_optimization_level,
        timing_cache=config.timing_cache,
        refit=config.refit,
        strip_weights=config.strip_weights,
        version_compatible=config.version_compatible,
        hardware_compatibility_level=config.hardware_compatibility_level,
        workspace_gb=config.workspace_gb,
        pixels_per_latent=pixels_per_latent,
        plugins=tuple(config.plugins),
    )
    driver, trt = package(options.driver)

    def check(asked: dict[str, str], found: dict[str, str], exact: bool) -> None:
        report = EngineReport(
            engine="tensorrt",
            version=f"{driver} {trt.__version__}",
            component=component,
            device="cuda",
            provider=driver,
            precision=precision,
            layer_precisions=dict(Counter(found.values())),
        )
        require_layers(report, asked, found, exact)

    plan = build_plan(graph, folder / "engines" / component, options, check)
    key = json.loads(plan.with_suffix(".json").read_text(encoding="utf-8"))
    told = ("workspace", "skipped_tactics", "out_of_memory_lines", "engine", "profiles")
    return EngineEntry(
        engine="tensorrt",
        precision=precision,
        device="cuda",
        provider=key["driver"],
        version=f"{key['driver']} {key['version']}",
        machine=key["compute_capability"],
        file=plan.relative_to(folder).as_posix(),
        source=graph.relative_to(folder).as_posix(),
        source_hash=key["graph"],
        layer_precisions=key["layer_precisions"],
        shapes=key["shapes"],
        build_s=round(time.perf_counter() - started, 3),
        notes="layers counted in the parsed network",
        details={
            **{name: key[name] for name in told if name in key},
            "options": key["options"],
            "cuda_graphs": config.cuda_graphs,
        },
    )


def _config(
    trt: Any,
    driver: Driver,
    target: str,
    builder: Any,
    network: Any,
    options: PlanOptions,
    log: Listener,
) -> tuple[Any, list[Profile]]:
    config = builder.create_builder_config()
    if config is None:
        raise HcfError(f"{driver} cannot build here: {log.tail()}", fix="run `hcf doctor`")
    if hasattr(config, "num_compute_capabilities"):
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), 0)
    config.builder_optimization_level = options.builder_optimization_level
    # else the inspector tells names alone; it costs the plan a few kB
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for asked, flag in (
        (options.refit, "REFIT"),
        (options.strip_weights, "STRIP_PLAN"),
        (options.version_compatible, "VERSION_COMPATIBLE"),
    ):
        if asked:
            config.set_flag(_member(trt.BuilderFlag, flag, driver, trt))
    if options.hardware_compatibility_level is not None:
        name = options.hardware_compatibility_level.upper()
        levels = getattr(trt, "HardwareCompatibilityLevel", None)
        config.hardware_compatibility_level = _member(levels, name, driver, trt)
    if options.timing_cache is not None:
        path = options.timing_cache
        cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            raise HcfError(
                f"{driver} {trt.__version__} does not take {path} as a timing cache",
                fix="leave timing_cache out, or delete the file",
            )
    return config, add_profiles(builder, network, config, options.ranges())


def _build_down_the_ladder(
    trt: Any,
    builder: Any,
    network: Any,
    config: Any,
    configure: Callable[[], Any],
    options: PlanOptions,
    log: Listener,
) -> tuple[Any, Any, list[dict[str, Any]]]:
    """Builds with less and less workspace while memory runs out; (plan or None, config, rungs)."""
    rungs: list[dict[str, Any]] = []
    for size in workspaces(options.workspace_gb):
        if rungs:
            config = configure()
        if size is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, size)
        errors, short = len(log.errors), log.out_of_memory
        serialized = builder.build_serialized_network(network, config)
        lacked = log.out_of_memory > short or any(map(is_out_of_memory, log.errors[errors:]))
        outcome = "built" if serialized is not None else "out of memory" if lacked else "failed"
        gib = None if size is None else round(size / 2**30, 3)
        rungs.append({"gib": gib, "outcome": outcome})
        if outcome != "out of memory":
            return serialized, config, rungs
    return None, config, rungs


def workspaces(first_gb: float | None) -> list[int | None]:
    """Bytes of workspace to try, each half of the one before; None leaves it to TensorRT.

    Without `first_gb` the first is all the memory that is free on the GPU.
    """
    if first_gb is not None:
        most = int(first_gb * 2**30)
    elif torch.cuda.is_available():
        most = int(torch.cuda.mem_get_info()[0])
    else:
        return [None]  # a build for another machine: nothing is run, nothing can run out
    return [most >> rung for rung in range(LADDER) if most >> rung >= 1 << 20]


def _ladder_text(ladder: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{rung['gib']} GiB {rung['outcome']}" for rung in ladder)


def _member(kind: Any, name: str, driver: Driver, trt: Any) -> Any:
    if kind is None or not hasattr(kind, name):
        raise HcfError(
            f"{driver} {trt.__version__} has no option {name}", fix="leave it out or change driver"
        )
    return getattr(kind, name)


def _save_timing_cache(config: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{time.time_ns()}.tmp")
    temporary.write_bytes(bytes(config.get_timing_cache().serialize()))
    temporary.replace(path)


def rebuild_plan(plan: Path, graph: Path, folder: Path) -> Path:
    """A plan of `graph` under `folder` with the target, profiles and options of `plan`."""
    key = json.loads(plan.with_suffix(".json").read_text(encoding="utf-8"))
    ranges = [
        ShapeRange(*({name: rows[i] for name, rows in profile.items()} for i in range(3)))
        for profile in key["profiles"]
    ]
    options = PlanOptions(
        driver=key["driver"],
        compute_capability=key["compute_capability"],
        profiles=tuple(ranges),
        pixels_per_latent=key.get("pixels_per_latent"),
        **key["options"],
    )
    return build_plan(graph, folder, options)
