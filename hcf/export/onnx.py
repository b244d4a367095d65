"""Components of a pipeline to ONNX graphs, each compared with torch before it is kept.

    <component>/model.onnx                    float32, as torch computes it
    <component>/model.fp16.onnx, .bf16.onnx   with float32 islands (hcf.export.precision)
    <component>/model.<format>.onnx, ...      of a quantised component (hcf.export.quantized)

torch computes what every case should give first, so that its weights need not be in memory while
graphs run. The limit of the fp32 graph is `config.tolerance`, relative L2; fp16 and bf16 ones have
the limit that their depth explains, unless `config.tolerances` says otherwise. A first stage whose
configuration says force_upcast has no fp16 graph (`config.force_upcast`). More than 1 GiB of
weights goes into `<graph>.data` beside the graph.
"""

from __future__ import annotations

import gc
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hcf.artifact import clone_artifact, staged_folder, write_manifest
from hcf.errors import HcfError, RecipeError
from hcf.export.component import (
    CACHED,
    TEXT_ENCODERS,
    VAE_DECODER,
    VAE_ENCODER,
    check_component,
    component_module,
    default_components,
    example_inputs,
    output_names,
    with_batch,
)
from hcf.export.estimate import AttentionScores, ExportProbe, estimate_export
from hcf.export.functions import DOMAIN
from hcf.export.graphs import (
    FP32_GRAPH,
    INT8_GRAPH,
    INT8_ORT_GRAPH,
    describe,
    graph_name,
    record,
    require_onnx,
    save_graph,
    write_graph,
)
from hcf.export.offload import offloaded
from hcf.export.parity import (
    Case,
    compare,
    graph_runner,
    open_runner,
    require_in_float16,
    torch_outputs,
)
from hcf.export.precision import Lowering, lower, matching, raise_opset
from hcf.export.quantized import export_quantized, export_quantized_step, is_quantized
from hcf.export.simplify import PassRecord, simplify
from hcf.fuse import layers_in_8_bits
from hcf.quantize.estimate import component_bytes, fitted, peak_memory, require_disk
from hcf.settings import ExportConfig
from hcf.source import open_pipeline
from hcf.trace import own_size

__all__ = [
    "FP32_GRAPH",
    "INT8_GRAPH",
    "INT8_ORT_GRAPH",
    "export",
    "export_component",
    "export_components",
    "export_quantized",
    "graph_name",
    "graph_runner",
]

Log = Callable[[str], None]
Record = dict[str, Any]


def export(model: Path, output: Path, config: ExportConfig, log: Log = print) -> Path:
    """Artefact `model` -> artefact `output` with the ONNX graphs of `config.components` added.

    Raises as `export_components`; then there is no `output`.
    """
    pipe = open_pipeline(model)
    with staged_folder(output) as folder:
        manifest = clone_artifact(model, folder)
        for component, records in export_components(pipe, folder, config, log).items():
            manifest.exports[component] = records
            # engines of the parent were built from its graphs
            manifest.engines.pop(component, None)
            manifest.chosen.pop(component, None)
            shutil.rmtree(folder / "engines" / component, ignore_errors=True)
        write_manifest(folder, manifest)
    return output


def export_components(
    pipe: Any, folder: Path, config: ExportConfig, log: Log = print
) -> dict[str, list[Record]]:
    """Graphs of a float32 pipeline in hand, in `folder`/<component>; {component: their records}.

    Quantised graphs are added where `folder`/<component> has scales and calibration calls. Raises
    RecipeError for an unknown component or island, HcfError where a graph is further from torch
    than its limit, where float16 cannot hold a layer's values, or where fp16 is asked for and no
    component can have it; MissingDependency without onnx, onnxscript or onnxruntime.
    """
    require_onnx()
    wanted = default_components(pipe) if config.components is None else config.components
    for component in wanted:
        check_component(pipe, component)
        _check_not_in_8_bits(pipe, component)
    _check_islands(pipe, wanted, config)
    refused = [c for c in wanted if "fp16" in config.precisions and _upcasts(pipe, c, config)]
    if refused and refused == list(wanted):
        raise HcfError(
            f"export.precisions asks for fp16, but {', '.join(refused)} must not run in it: the "
            "configuration says force_upcast",
            fix="use bf16, or try it with export.force_upcast: measured",
        )
    return {component: _export_all(pipe, component, folder, config, log) for component in wanted}


def export_component(
    pipe: Any, component: str, inputs: Mapping[str, Tensor], path: Path, config: ExportConfig
) -> dict[str, float]:
    """Write `path` (fp32) for `inputs` of batch >= 2; returns the relative error at each shape."""
    module = component_module(pipe, component, list(inputs))
    cases = [inputs, *_other_batches(inputs, config)]
    wanted = torch_outputs(module, cases)
    write_graph(module, inputs, output_names(pipe, component), path, config)
    return _check(component, path, "fp32", cases, wanted, config.tolerance)[0]


def parity_cases(pipe: Any, component: str, config: ExportConfig) -> list[Case]:
    """Inputs that graphs are compared on, the first of which they are traced with.

    Batches of 2, 1 and 3 at the pipeline's own size, and one of `config.sizes` each; without
    these, a smaller one that is not square. Graphs that are not dynamic have one case.
    """
    inputs = example_inputs(pipe, component, seed=config.seed)
    if not config.dynamic:
        return [inputs]
    cases = [inputs, *_other_batches(inputs, config)]
    if component in TEXT_ENCODERS:
        return cases
    for height, width in config.sizes or _small_sizes(pipe):
        cases.append(example_inputs(pipe, component, 1, config.seed + 1, height, width))
    if not config.sizes:
        # one batch more, where it costs least
        return [inputs, cases[1], with_batch(cases[-1], 3)]
    return cases


def _export_all(
    pipe: Any, component: str, folder: Path, config: ExportConfig, log: Log
) -> list[Record]:
    cases = parity_cases(pipe, component, config)
    module = component_module(pipe, component, list(cases[0]))
    started = time.perf_counter()
    with peak_memory() as memory, AttentionScores() as attention:
        wanted = torch_outputs(module, cases)
    step_s = (time.perf_counter() - started) / len(cases)
    found = ExportProbe(
        component=component,
        owner=_owner(component),
        weights=component_bytes(pipe),
        layers=sum(isinstance(m, nn.Linear | nn.Conv2d) for m in module.modules()),
        step_s=step_s,
        activations=memory[0] - memory[1],
        resident=memory[1],
        scores=attention.bytes,
    )
    estimate = estimate_export(found, config.precisions)
    require_disk(estimate, folder)
    with fitted(pipe, estimate, "auto", log):
        return _write_all(pipe, component, folder, config, module, cases, wanted, log)


def _write_all(
    pipe: Any,
    component: str,
    folder: Path,
    config: ExportConfig,
    module: nn.Module,
    cases: Sequence[Case],
    wanted: Sequence[tuple[Tensor, ...]],
    log: Log,
) -> list[Record]:
    """Writes every graph of `component` and compares each with torch's `wanted`."""
    path = folder / component / FP32_GRAPH
    low = [name for name in dict.fromkeys(config.precisions) if name != "fp32"]
    if "fp16" in low and _upcasts(pipe, component, config):
        low.remove("fp16")
        log(f"{component}: no fp16 graph, its configuration says force_upcast")
    if "fp16" in low:
        # one row at the pipeline's own size, where there is such a case
        case = cases[1] if config.dynamic else cases[0]
        require_in_float16(component, module, case, config.islands)
    passes = write_graph(module, cases[0], output_names(pipe, component), path, config)
    gc.collect()  # the exporter's program holds the weights
    records: list[Record] = []
    with offloaded(module, path.parent):
        errors, runtime = _check(component, path, "fp32", cases, wanted, config.tolerance)
        log(f"{component}: {describe(path)}, relative error {max(errors.values()):.1e}")
        facts = _facts(config, runtime, config.tolerance, passes)
        records.append(record(folder, path, "fp32", errors, **facts))
        for precision in low:
            records.append(_export_low(component, folder, precision, cases, wanted, config, log))
        if CACHED.fullmatch(component) and is_quantized(folder, "unet"):
            records.append(export_quantized_step(folder, component, log))
        elif is_quantized(folder, component):
            records += export_quantized(folder, component, log, pipe=pipe, exporter=config.exporter)
    return records


def _export_low(
    component: str,
    folder: Path,
    precision: str,
    cases: Sequence[Case],
    wanted: Sequence[tuple[Tensor, ...]],
    config: ExportConfig,
    log: Log,
) -> Record:
    """The fp16 or bf16 graph, from the fp32 one."""
    import onnx_ir as ir

    path = folder / component / graph_name(precision)
    model = ir.load(folder / component / FP32_GRAPH)
    raise_opset(model, precision)
    # a higher opset may have operators for what was kept decomposed
    passes = simplify(model, [name for name in config.passes if name in ("norm", "attention")])
    domains = ("", DOMAIN) if config.kernels == "plugins" else ("",)
    lowering = lower(model, precision, config.islands, domains)
    passes += simplify(model, [name for name in config.passes if name in ("casts", "dead")])
    save_graph(model, path)
    del model  # it maps the fp32 weights, and refers to itself
    gc.collect()
    limit = config.tolerances.get(precision, lowering.limit)  # type: ignore[call-overload]
    errors, runtime = _check(component, path, precision, cases, wanted, limit)
    worst = f"relative error {max(errors.values()):.1e}" if errors else runtime
    log(f"{component}: {describe(path)}, {_spread(lowering)}, {worst}")
    facts = _facts(config, runtime, limit, passes)
    return record(folder, path, precision, errors, **facts, lowering=asdict(lowering))


def _check(
    component: str,
    path: Path,
    precision: str,
    cases: Sequence[Case],
    wanted: Sequence[tuple[Tensor, ...]],
    limit: float,
) -> tuple[dict[str, float], str]:
    """({shape: relative error}, what ran the graph). HcfError where one is beyond `limit`."""
    run, runtime = open_runner(path, precision)
    if run is None:
        return {}, runtime
    errors = compare(run, cases, wanted)
    if not max(errors.values()) <= limit:
        raise HcfError(
            f"{component}: {path.name} is {max(errors.values()):.2e} from torch (relative L2), "
            f"the tolerance is {limit:.1e}: {errors}",
            fix="try another export.opset, or raise export.tolerance if that is acceptable"
            if precision == "fp32"
            else f"name what needs float32 in export.islands, or set export.tolerances.{precision}",
        )
    return errors, runtime


def _facts(
    config: ExportConfig, runtime: str, limit: float, passes: Sequence[PassRecord]
) -> dict[str, Any]:
    return {
        "exporter": config.exporter,
        "checked_on": runtime,
        "tolerance": limit,
        "passes": [asdict(made) for made in passes],
    }


def _other_batches(inputs: Mapping[str, Tensor], config: ExportConfig) -> list[Case]:
    batch = len(next(iter(inputs.values())))
    return [with_batch(inputs, n) for n in (1, batch + 1)] if config.dynamic else []


def _small_sizes(pipe: Any) -> list[tuple[int, int]]:
    """About half of the pipeline's own size, wider than high, that every level can halve."""
    own, factor = own_size(pipe), int(pipe.vae_scale_factor)
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    levels = len(getattr(denoiser.config, "block_out_channels", (0, 0)))
    unit = math.lcm(factor * 2 ** (levels - 1), 8)  # pipelines refuse what 8 does not divide
    height = max(1, own // 2 // unit) * unit
    return [(height, max(height + unit, own * 3 // 4 // unit * unit))]


def _owner(component: str) -> str:
    """Name in the pipeline of what holds the component's weights."""
    if CACHED.fullmatch(component):
        return "unet"
    return "vae" if component in (VAE_DECODER, VAE_ENCODER) else component


def _check_islands(pipe: Any, components: Sequence[str], config: ExportConfig) -> None:
    """RecipeError for a pattern that no module of these components fits."""
    owners = {_owner(component) for component in components}
    names = [f"{c}.{name}" for c in owners for name, _ in getattr(pipe, c).named_modules()]
    for pattern in config.islands:
        if matching(names, [pattern]) is None:
            raise RecipeError(
                f"export.islands: {pattern!r} is the name of no module in {', '.join(components)}",
                fix="name modules as in named_modules(), like 'decoder.up_blocks.3.*'",
            )


def _check_not_in_8_bits(pipe: Any, component: str) -> None:
    """HcfError for layers that `hcf.fuse` made compute in 8 bits: graphs have Q/DQ for that."""
    layers = layers_in_8_bits(getattr(pipe, _owner(component)))
    if layers:
        raise HcfError(
            f"{component}: {layers[0]} and {len(layers) - 1} more layers compute in 8 bits "
            "(hcf.fuse with scales), which a graph says with Q/DQ",
            fix="hcf.unfuse it, and export the folder that `hcf quantize` wrote",
        )


def _upcasts(pipe: Any, component: str, config: ExportConfig) -> bool:
    """Whether a first stage's configuration says that float16 is not for it.

    Not where it says so only for want of a value of its own: then it is measured.
    """
    if component not in (VAE_DECODER, VAE_ENCODER) or config.force_upcast == "measured":
        return False
    said = pipe.vae.config
    own = "force_upcast" not in said.get("_use_default_values", ())
    return own and bool(said.get("force_upcast", False))


def _spread(lowering: Lowering) -> str:
    total = lowering.low_products + lowering.float_products
    return f"{lowering.low_products} of {total} products in {lowering.precision}"
