"""TensorRT plans: one path for `tensorrt` 10/11 and `tensorrt_rtx`, precision taken from the graph.

The network is strongly typed: an INT8 plan is built from the explicit Q/DQ graph, never from a
flag. TensorRT builds for the GPU it runs on; TensorRT-RTX also for a compute capability by name, on
a machine without a GPU. A plan is `engines/<component>/<driver>-<sm>-<hash12>.plan` with a .json
beside it, its key: the graph's hash, shapes, package version, compute capability, options.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from hcf.artifact import EngineEntry, hash_file, save_text
from hcf.errors import HcfError, InvalidArtifact, MissingDependency, RecipeError
from hcf.recipe import BuildConfig

Driver = Literal["tensorrt", "tensorrt_rtx"]
DRIVERS: dict[Driver, str] = {"tensorrt": "trt", "tensorrt_rtx": "trt-rtx"}  # module: our extra
PRODUCTS = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY")
MOVES = ("SHUFFLE", "UNSQUEEZE", "SQUEEZE", "IDENTITY")  # what may stand between Q/DQ and a product
PRECISION_NAMES = {"FLOAT": "fp32", "HALF": "fp16"}  # the others are called as we call them

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class PlanOptions:
    """How to build. Shapes by input name; with `opt_shapes` alone exactly those are built.

    `compute_capability` ("8.0", "sm80") is the GPU here if None. `hardware_compatibility_level`:
    "ampere_plus" or "same_compute_capability". An option the driver does not have is an error.
    """

    driver: Driver | None = None
    compute_capability: str | None = None
    min_shapes: Shapes = field(default_factory=dict)
    opt_shapes: Shapes = field(default_factory=dict)
    max_shapes: Shapes = field(default_factory=dict)
    builder_optimization_level: int = 3
    timing_cache: Path | None = None
    refit: bool = False
    strip_weights: bool = False
    version_compatible: bool = False
    hardware_compatibility_level: str | None = None


@dataclass(frozen=True)
class LayerPrecision:
    """A layer of a parsed network: its kind ("convolution") and the precision it computes in."""

    kind: str
    precision: str


def package(driver: Driver | None = None) -> tuple[Driver, Any]:
    """The driver and its module; without a name the first that is installed.

    Raises MissingDependency where the package, or a library it loads, is not there.
    """
    wanted: Sequence[Driver] = [driver] if driver else list(DRIVERS)
    failures: list[str] = []
    for name in wanted:
        try:
            module = importlib.import_module(name)
            module.Builder  # noqa: B018  (a lean runtime, or a namespace left behind, has none)
            return name, module
        except (ImportError, AttributeError, OSError) as error:
            failures.append(f"{name}: {error}")
    extra = DRIVERS[driver] if driver else "trt-rtx"
    raise MissingDependency(
        "the tensorrt engine needs a TensorRT package: " + "; ".join(failures),
        fix=f"pip install 'hcf-toolkit[{extra}]'",
    )


def version(driver: Driver | None = None) -> str:
    """Version of the package behind `driver`, e.g. "tensorrt_rtx 1.7.1.116"."""
    name, trt = package(driver)
    return f"{name} {trt.__version__}"


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
    """Every layer of the network TensorRT parses from an ONNX file, by name; needs no GPU.

    A convolution or product computes in INT8 (or FP8) when both its inputs are dequantised from it;
    every other layer computes in the type of its first output: the network is strongly typed.
    """
    _, trt = package(driver)
    network, _keep = _parse(trt, graph)
    return _network_precisions(network)


def build_plan(graph: Path, folder: Path, options: PlanOptions) -> Path:
    """Build `graph` into a plan under `folder`; returns its path. An equal key is not built again.

    Raises HcfError with TensorRT's own words where the graph cannot be parsed or compiled for the
    target, RecipeError for shapes or options that do not fit, MissingDependency without a package
    or, where one is needed, a GPU.
    """
    driver, trt = package(options.driver)
    target = _target(driver, trt, options.compute_capability)
    network, logger_and_parser = _parse(trt, graph)
    log, builder = logger_and_parser[0], logger_and_parser[1]
    config = builder.create_builder_config()
    if config is None:
        raise HcfError(f"{driver} cannot build here: {log.tail()}", fix="run `hcf doctor`")
    if hasattr(config, "num_compute_capabilities"):
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), 0)
    _apply_options(trt, config, options, driver)
    shapes = _add_profile(builder, network, config, options)
    precisions = _network_precisions(network)
    key = {
        "graph": hash_file(graph),
        "driver": driver,
        "version": str(trt.__version__),
        "compute_capability": target,
        "shapes": shapes,
        "options": {
            name: value
            for name, value in asdict(options).items()
            if name not in ("driver", "compute_capability", "timing_cache")
            and not name.endswith("_shapes")
        },
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    path = folder / f"{driver}-{target}-{digest}.plan"
    if path.is_file() and path.with_suffix(".json").is_file():
        return path
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise HcfError(
            f"{driver} {trt.__version__} cannot build {graph.name} for {target}: {log.tail()}",
            fix="choose a target that has these data types, or another precision; "
            "refit and stripped plans need a GPU while building",
        )
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(bytes(serialized))
    if options.timing_cache is not None:
        _save_timing_cache(config, options.timing_cache)
    counts = Counter(p.precision for p in precisions.values() if p.kind.upper() in PRODUCTS)
    save_text(
        path.with_suffix(".json"), json.dumps({**key, "layer_precisions": dict(counts)}, indent=1)
    )
    temporary.replace(path)
    return path


def logger(trt: Any) -> Any:
    """A logger that keeps what TensorRT complains about, for the message of the error."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message.strip())

        def tail(self) -> str:
            return "; ".join(dict.fromkeys(self.errors[-3:])) or "TensorRT gave no reason"

    return Log()


def plan_entry(
    folder: Path,
    component: str,
    graph: Path,
    precision: str,
    config: BuildConfig,
    capability: str | None,
    shapes: Shapes,
) -> EngineEntry:
    """Build `graph` into artefact `folder` for one target; the manifest's entry of the plan.

    `shapes` are the optimal ones where `config` gives none. There is no latency: nothing has run.
    """
    started = time.perf_counter()
    options = PlanOptions(
        compute_capability=capability,
        min_shapes=config.min_shapes,
        opt_shapes={**shapes, **config.opt_shapes},
        max_shapes=config.max_shapes,
        builder_optimization_level=config.builder_optimization_level,
    )
    plan = build_plan(graph, folder / "engines" / component, options)
    key = json.loads(plan.with_suffix(".json").read_text(encoding="utf-8"))
    if not key["layer_precisions"].get(precision):
        raise HcfError(
            f"{component}: {plan.name} was asked for {precision}, but the network TensorRT parsed "
            f"has {key['layer_precisions']}",
            fix="run `hcf quantize` and `hcf export` again",
        )
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
        notes="layers counted in the parsed network; the plan itself was not run",
    )


def _parse(trt: Any, graph: Path) -> tuple[Any, tuple[Any, ...]]:
    """(network, what has to live as long as it does: logger, builder, parser)."""
    if not graph.is_file():
        raise InvalidArtifact(f"{graph} does not exist", fix="run `hcf export` on this model first")
    log = logger(trt)
    try:
        builder = trt.Builder(log)
    except (TypeError, RuntimeError) as error:  # the full TensorRT without a GPU
        raise MissingDependency(
            f"{trt.__name__} {trt.__version__} cannot start: {log.tail()}",
            fix="it needs an NVIDIA GPU and driver; tensorrt-rtx builds without one",
        ) from error
    # TensorRT 10 must be told; later ones know nothing else
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(1 << int(typed) if typed is not None else 0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        found = [parser.get_error(i) for i in range(parser.num_errors)]
        errors = [
            f"{error.node_operator()} {error.node_name()}: {error.desc().strip()}"
            for error in found[:3]
        ]
        raise HcfError(
            f"{trt.__name__} {trt.__version__} cannot parse {graph.name}: "
            + "; ".join(errors or [log.tail()]),
            fix="export with another opset, or leave the layer out of quantisation",
        )
    return network, (log, builder, parser)


def _network_precisions(network: Any) -> dict[str, LayerPrecision]:
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    maker = {layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)}

    def stored_as(tensor: Any) -> str | None:
        """Type a tensor was dequantised from, or None."""
        layer = maker.get(tensor.name)
        while layer is not None and layer.type.name in MOVES:
            layer = maker.get(layer.get_input(0).name)
        if layer is None or layer.type.name != "DEQUANTIZE":
            return None
        return _precision(layer.get_input(0).dtype)

    found: dict[str, LayerPrecision] = {}
    for layer in layers:
        precision = _precision(layer.get_output(0).dtype) if layer.num_outputs else "none"
        if layer.type.name in PRODUCTS and layer.num_inputs > 1:
            both = {stored_as(layer.get_input(0)), stored_as(layer.get_input(1))}
            if len(both) == 1 and None not in both:
                precision = both.pop() or precision
        found[layer.name] = LayerPrecision(layer.type.name.lower(), precision)
    return found


def _precision(kind: Any) -> str:
    return PRECISION_NAMES.get(kind.name, kind.name.lower())


def _target(driver: Driver, trt: Any, capability: str | None) -> str:
    """ "8.0" or "sm80" -> "sm80"; the GPU here if None."""
    here = None
    if torch.cuda.is_available():
        here = "sm{}{}".format(*torch.cuda.get_device_capability())
    if capability is None:
        if here is None:
            raise MissingDependency(
                "there is no GPU here to build for", fix='name one: compute_capability "8.0"'
            )
        wanted = here
    else:
        wanted = "sm" + capability.lower().removeprefix("sm").replace(".", "").strip("_")
    if not hasattr(trt, "ComputeCapability"):
        if wanted != here:
            raise MissingDependency(
                f"{driver} builds only for the GPU it runs on (here {here}), not for {wanted}",
                fix="build on that GPU, or use driver tensorrt_rtx",
            )
        return wanted
    known = [name.lower() for name in dir(trt.ComputeCapability) if name.startswith("SM")]
    if wanted not in known:
        raise RecipeError(
            f"{driver} {trt.__version__} does not build for {wanted}",
            fix=f"its targets are {', '.join(known)}",
        )
    return wanted


def _apply_options(trt: Any, config: Any, options: PlanOptions, driver: Driver) -> None:
    config.builder_optimization_level = options.builder_optimization_level
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


def _member(kind: Any, name: str, driver: Driver, trt: Any) -> Any:
    if kind is None or not hasattr(kind, name):
        raise HcfError(
            f"{driver} {trt.__version__} has no option {name}", fix="leave it out or change driver"
        )
    return getattr(kind, name)


def _add_profile(
    builder: Any, network: Any, config: Any, options: PlanOptions
) -> dict[str, list[list[int]]]:
    """One optimization profile over the dynamic inputs; returns (min, opt, max) of every input."""
    inputs = {t.name: t for t in (network.get_input(i) for i in range(network.num_inputs))}
    for given in (options.min_shapes, options.opt_shapes, options.max_shapes):
        if unknown := sorted(set(given) - set(inputs)):
            raise RecipeError(
                f"the graph has no input {unknown[0]!r}", fix=f"its inputs: {', '.join(inputs)}"
            )
    profile = builder.create_optimization_profile()
    shapes: dict[str, list[list[int]]] = {}
    dynamic = False
    for name, tensor in inputs.items():
        declared = [int(size) for size in tensor.shape]
        default = None if -1 in declared else declared
        opt = options.opt_shapes.get(name, default)
        if opt is None:
            raise RecipeError(
                f"input {name} has the dynamic shape {declared}: it needs opt shapes",
                fix=f"give opt_shapes {name}:"
                + "x".join("1" if s < 0 else str(s) for s in declared),
            )
        rows = [options.min_shapes.get(name, opt), opt, options.max_shapes.get(name, opt)]
        shapes[name] = [list(row) for row in rows]
        for low, best, high, size in zip(*shapes[name], declared, strict=False):
            if not low <= best <= high or size not in (-1, best) or size not in (-1, low, high):
                break
        else:
            if all(len(row) == len(declared) for row in shapes[name]):
                if -1 in declared:
                    dynamic = True
                    profile.set_shape(name, *(tuple(row) for row in shapes[name]))
                continue
        raise RecipeError(
            f"{name}: min, opt and max shapes {shapes[name]} are not in order or do not fit the "
            f"graph's {declared} (-1 is free)",
            fix="min <= opt <= max in every axis",
        )
    if dynamic and config.add_optimization_profile(profile) < 0:
        raise HcfError("TensorRT refuses the optimization profile", fix="check min/opt/max shapes")
    return shapes


def _save_timing_cache(config: Any, path: Path) -> None:
    temporary = path.with_name(f"{path.name}.{time.time_ns()}.tmp")
    temporary.write_bytes(bytes(config.get_timing_cache().serialize()))
    temporary.replace(path)
