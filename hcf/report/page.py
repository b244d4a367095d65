"""One self-contained HTML page from a run: verdict, images, gate, times, errors, provenance.

Nothing is loaded from anywhere: images are `data:` addresses, style and drawings are inline, there
is no script. The page is rendered by jinja2 with escaping on, from the template `page.html.jinja`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from hcf.artifact import EngineEntry, Manifest
from hcf.report.charts import interval_bar, log_axis, share_bar, stacked_bar
from hcf.report.grid import png_data_uri, replace_file
from hcf.report.table import Rung, number, ratio

if TYPE_CHECKING:
    from hcf.quality.gate import MetricResult, Verdict

WORST_LAYERS = 15
# Names of the gate's metrics for people, and the decimals they are printed with.
METRIC_LABELS = {
    "psnr_db": ("PSNR over all pixels, dB", 2),
    "psnr_mean_db": ("PSNR, mean over images, dB", 2),
    "ssim": ("SSIM", 4),
    "fed": ("Fréchet distance (FED)", 3),
    "clip_zh": ("CLIP-zh", 4),
    "retrieval_r5": ("caption retrieval, top 5 of 64", 3),
    "diversity": ("diversity: feature distance of one prompt's images", 4),
    "colour": ("colour right (rule judge)", 3),
    "shape": ("shape right (rule judge)", 3),
    "count": ("count right (rule judge)", 3),
    "pair": ("both objects right (rule judge)", 3),
    "position": ("position right (rule judge)", 3),
}
# A layer below this SQNR loses more than well behaved INT8 layers do (25 to 45 dB).
WEAK_SQNR_DB = 25.0


@dataclass(frozen=True)
class Figure:
    """One headline figure: value with its unit, what it is, and what it should be."""

    label: str
    value: str
    detail: str = ""
    passed: bool | None = None


@dataclass(frozen=True)
class ImageColumn:
    """Images of one rung, one for each prompt of the page, in their order."""

    label: str
    images: Sequence[Any]


@dataclass(frozen=True)
class GateRow:
    """One metric of the quality gate; `passed` is None where it is reported but not gated.

    `interval` is the value's, and the ratio to the baseline with its own.
    """

    metric: str
    value: float | None
    threshold: str
    passed: bool | None
    baseline: float | None = None
    note: str = ""
    digits: int = 4
    interval: str = ""


@dataclass(frozen=True)
class SpeedRow:
    """One comparison; times are medians in milliseconds, stages are those of one call."""

    label: str
    baseline: str
    candidate: str
    verdict: str
    reason: str = ""
    baseline_ms: float | None = None
    candidate_ms: float | None = None
    speedup: float | None = None
    low: float | None = None
    high: float | None = None
    pairs: int = 0
    paired: bool = True
    threads: int = 0
    goal: float | None = None
    baseline_stages: Mapping[str, float] = field(default_factory=dict)
    candidate_stages: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerRow:
    """One quantised layer and the error its quantisation alone makes, dB (higher is better)."""

    layer: str
    kind: str
    shape: str
    sqnr_db: float
    input_amax: float | None = None


@dataclass(frozen=True)
class EngineRow:
    """One engine that was tried: median time with its interval, relative L2 error to eager fp32.

    `runs` says what really runs, `note` why there is no time.
    """

    component: str
    engine: str
    precision: str
    p50_ms: float | None
    low_ms: float | None = None
    high_ms: float | None = None
    error: float | None = None
    version: str = ""
    runs: str = ""
    chosen: bool = False
    note: str = ""


def write_report(
    output_html: Path,
    *,
    title: str,
    passed: bool | None,
    summary: str = "",
    figures: Sequence[Figure] = (),
    rungs: Sequence[Rung] = (),
    prompts: Sequence[str] = (),
    images: Sequence[ImageColumn] = (),
    gate: Sequence[GateRow] = (),
    judge: Mapping[str, Any] | None = None,
    speeds: Sequence[SpeedRow] = (),
    layers: Sequence[LayerRow] = (),
    quantization_note: str = "",
    engines: Sequence[EngineRow] = (),
    manifest: Mapping[str, Any] | None = None,
    environment: str = "",
    notes: Sequence[str] = (),
) -> Path:
    """Writes the page in one piece (temporary file, then renamed) and returns its path.

    Args:
        output_html: the page.
        title: of the run.
        passed: verdict of the quality gate; None where no gate ran.
        summary: one or two sentences under the title.
        figures: headline figures.
        rungs: the ladder.
        prompts: captions of the images.
        images: one column a rung; each holds as many images as there are prompts.
        gate: rows of the quality gate.
        judge: the judge's own accuracies, printed beside the scores it gives.
        speeds: comparisons; `speed_row` makes one from a stored comparison.
        layers: per-layer error of the quantisation, any order.
        quantization_note: algorithm, calibration and exclusions in words.
        engines: everything that was built and timed.
        manifest: of the artefact: hashes, parents, versions, recipe.
        environment: the machine in one line.
        notes: what fell short, and other remarks a reader must see.

    Raises:
        ValueError: a column with another number of images than there are prompts; a bad image.
        StorageError: the page cannot be written.
    """
    for column in images:
        if len(column.images) != len(prompts):
            raise ValueError(
                f"column {column.label!r}: {len(column.images)} images, {len(prompts)} prompts"
            )
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent, encoding="utf-8")
    page = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("page.html.jinja")
    ordered = sorted(layers, key=lambda row: row.sqnr_db)
    text = page.render(
        title=title,
        passed=passed,
        summary=summary,
        figures=figures,
        rungs=rungs,
        cards=_cards(prompts, images),
        gate=[(row, _gate_value(row.baseline, row), _gate_value(row.value, row)) for row in gate],
        judge=_facts(judge or {}),
        speeds=_speed_view(speeds),
        stages=_stage_view(speeds),
        worst=_layer_view(ordered[:WORST_LAYERS], ordered),
        layers=_layer_view(ordered, ordered),
        weak_sqnr_db=WEAK_SQNR_DB,
        weak_layers=sum(row.sqnr_db < WEAK_SQNR_DB for row in ordered),
        quantization_note=quantization_note,
        engines=_engine_view(engines),
        provenance=_provenance(manifest or {}),
        recipe=_yaml((manifest or {}).get("recipe")),
        files=sorted(((manifest or {}).get("files") or {}).items()),
        environment=environment,
        notes=notes,
    )
    return replace_file(output_html, text.encode("utf-8"))


def speed_row(label: str, comparison: Mapping[str, Any], goal: float | None = None) -> SpeedRow:
    """A row from a comparison as `hcf bench` stores it (its JSON)."""

    def stages(side: Mapping[str, Any]) -> dict[str, float]:
        found = side.get("stages") or {}
        return {name: found[f"{name}_ms"] for name in ("text", "denoise", "decode") if found}

    baseline, candidate = comparison["baseline"], comparison["candidate"]
    speedup = comparison.get("speedup") or {}
    return SpeedRow(
        label=label,
        baseline=baseline["name"],
        candidate=candidate["name"],
        verdict=str(comparison["verdict"]),
        reason=comparison.get("reason", ""),
        baseline_ms=(baseline.get("latency") or {}).get("p50_ms"),
        candidate_ms=(candidate.get("latency") or {}).get("p50_ms"),
        speedup=speedup.get("value"),
        low=speedup.get("low"),
        high=speedup.get("high"),
        pairs=comparison.get("pairs", 0),
        paired=comparison.get("paired", True),
        threads=(comparison.get("environment") or {}).get("threads", 0),
        goal=goal,
        baseline_stages=stages(baseline),
        candidate_stages=stages(candidate),
    )


def gate_rows(verdict: Verdict) -> list[GateRow]:
    """The metrics of a gate's verdict; ungated ones without a value are left out."""
    rows = []
    for metric in verdict.metrics:
        if metric.value is None and metric.passed is None:
            continue
        label, digits = METRIC_LABELS.get(metric.name, (metric.name.replace("_", " "), 4))
        rows.append(
            GateRow(
                metric=label,
                value=metric.value,
                threshold=metric.threshold,
                passed=metric.passed,
                baseline=metric.baseline,
                note=metric.reason,
                digits=digits,
                interval=_interval_text(metric, digits),
            )
        )
    return rows


def _interval_text(metric: MetricResult, digits: int) -> str:
    found = metric.paired
    if found is None:
        return ""
    text = f"[{number(found.candidate.low, digits)}, {number(found.candidate.high, digits)}]"
    if found.ratio is not None:
        bounds = f"[{found.ratio.low:.3f}, {found.ratio.high:.3f}]"
        text += f", ratio {found.ratio.value:.3f} {bounds}"
    return text


def engine_rows(manifest: Manifest) -> list[EngineRow]:
    """The engines of a manifest; `chosen` marks the entry that `hcf.load` takes."""
    rows = []
    for component, entries in manifest.engines.items():
        chosen = chosen_entry(manifest, component)
        for entry in entries:
            counts = sorted(entry.layer_precisions.items(), key=lambda item: -item[1])
            rows.append(
                EngineRow(
                    component=component,
                    engine=entry.engine,
                    precision=entry.precision,
                    p50_ms=entry.latency_ms,
                    low_ms=entry.latency_low_ms,
                    high_ms=entry.latency_high_ms,
                    error=entry.error,
                    version=entry.version,
                    runs=", ".join(f"{name} {count}" for name, count in counts),
                    chosen=entry is chosen,
                    note=entry.notes,
                )
            )
    return rows


def chosen_entry(manifest: Manifest, component: str) -> EngineEntry | None:
    """The entry the manifest chose: named by its place, its engine or "engine-precision"."""
    entries = manifest.engines.get(component, [])
    named: object = manifest.chosen.get(component)
    if isinstance(named, int):
        return entries[named] if 0 <= named < len(entries) else None
    found = [e for e in entries if named in (e.engine, f"{e.engine}-{e.precision}")]
    timed = [entry for entry in found if entry.latency_ms is not None]
    return (
        min(timed, key=lambda entry: entry.latency_ms or 0.0) if timed else next(iter(found), None)
    )


def layer_row(row: Mapping[str, Any]) -> LayerRow:
    """A row from the per-layer table of `unet/quantization.json`."""
    sqnr = row["sqnr_db"]
    return LayerRow(
        layer=row["layer"],
        kind=row.get("kind", ""),
        shape=" x ".join(str(n) for n in row.get("shape", ())),
        sqnr_db=math.inf if sqnr is None else float(sqnr),
        input_amax=row.get("input_amax"),
    )


def _cards(prompts: Sequence[str], images: Sequence[ImageColumn]) -> list[dict[str, Any]]:
    return [
        {"prompt": prompt, "images": [(c.label, png_data_uri(c.images[i])) for c in images]}
        for i, prompt in enumerate(prompts)
        if images
    ]


def _gate_value(value: float | None, row: GateRow) -> str:
    if value is None or not math.isfinite(value):
        return "-" if value is None else "not finite"
    return number(value, row.digits)


def _speed_view(speeds: Sequence[SpeedRow]) -> list[dict[str, Any]]:
    ends = [
        end
        for row in speeds
        for end in (row.low, row.high, row.speedup, row.goal)
        if end is not None
    ]
    axis = log_axis(ends)
    view = []
    for row in speeds:
        bar: Markup | None = None
        if row.speedup is not None and row.low is not None and row.high is not None:
            bar = interval_bar(row.speedup, row.low, row.high, axis, row.goal)
        # the bound, not the estimate: a goal is met when the interval lies above it
        met = None if row.goal is None or row.low is None else row.low >= row.goal
        view.append(
            {
                "row": row,
                "bar": bar,
                "speedup": None if row.speedup is None else ratio(row.speedup),
                "low": None if row.low is None else ratio(row.low),
                "high": None if row.high is None else ratio(row.high),
                "goal": None if row.goal is None else f"{row.goal:g}",
                "met": met,
                "baseline_ms": number(row.baseline_ms, 1),
                "candidate_ms": number(row.candidate_ms, 1),
            }
        )
    return view


def _stage_view(speeds: Sequence[SpeedRow]) -> list[dict[str, Any]]:
    """Two stacked bars for each comparison whose stages are known, each scaled to its own whole."""
    view = []
    for row in speeds:
        for name, stages in (
            (row.baseline, row.baseline_stages),
            (row.candidate, row.candidate_stages),
        ):
            if stages:
                total = sum(stages.values())
                parts = [(part, ms, 100.0 * ms / total) for part, ms in stages.items()]
                view.append(
                    {
                        "name": name,
                        "total": number(total, 1),
                        "parts": parts,
                        "bar": stacked_bar([(part, ms) for part, ms, _ in parts], total),
                    }
                )
    return view


def _layer_view(
    rows: Sequence[LayerRow], all_rows: Sequence[LayerRow]
) -> list[tuple[LayerRow, str, Markup]]:
    most = max((row.sqnr_db for row in all_rows if math.isfinite(row.sqnr_db)), default=1.0)
    view = []
    for row in rows:
        weak = row.sqnr_db < WEAK_SQNR_DB
        text = "exact" if math.isinf(row.sqnr_db) else f"{row.sqnr_db:.1f}"
        bar = share_bar(min(row.sqnr_db, most), most, "weak" if weak else "bar")
        view.append((row, text, bar))
    return view


def _engine_view(engines: Sequence[EngineRow]) -> list[dict[str, Any]]:
    """Rows by component, fastest first, those without a time last."""
    most: dict[str, float] = {}
    for row in engines:
        if row.p50_ms is not None:
            most[row.component] = max(most.get(row.component, 0.0), row.p50_ms)
    order: list[str] = list(dict.fromkeys(row.component for row in engines))
    ranked = sorted(
        engines,
        key=lambda r: (order.index(r.component), math.inf if r.p50_ms is None else r.p50_ms),
    )
    return [
        {
            "row": row,
            "first": i == 0 or ranked[i - 1].component != row.component,
            "ms": number(row.p50_ms, 2),
            "interval": None
            if row.low_ms is None or row.high_ms is None
            else f"[{number(row.low_ms, 2)}, {number(row.high_ms, 2)}]",
            "error": "-" if row.error is None else f"{row.error:.2g}",
            "bar": None
            if row.p50_ms is None
            else share_bar(row.p50_ms, most[row.component], "chosen" if row.chosen else "bar"),
        }
        for i, row in enumerate(ranked)
    ]


def _facts(mapping: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Plain name and value pairs; nested mappings become dotted names."""
    facts: list[tuple[str, str]] = []
    for name, value in mapping.items():
        if isinstance(value, Mapping):
            facts += [(f"{name}.{inner}", text) for inner, text in _facts(value)]
        elif isinstance(value, float):
            facts.append((str(name), f"{value:.4g}"))
        elif isinstance(value, (list, tuple)):
            facts.append((str(name), ", ".join(str(item) for item in value) or "none"))
        elif value is not None:
            facts.append((str(name), str(value)))
    return facts


def _provenance(manifest: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Groups of facts of the manifest that are short enough to be read."""
    groups: list[tuple[str, list[tuple[str, str]]]] = []
    identity = _facts(
        {k: manifest.get(k) for k in ("name", "content_hash", "created", "schema_version")}
    )
    for i, parent in enumerate(manifest.get("parents") or ()):
        identity.append(
            (f"parent {i + 1}", f"{parent.get('name', '')} {parent.get('content_hash', '')}")
        )
    if identity:
        groups.append(("Artefact", identity))
    for heading, key in (
        ("Sampling", "sampling"),
        ("Distillation", "distillation"),
        ("Machine and versions", "environment"),
    ):
        facts = _facts(manifest.get(key) or {})
        if facts:
            groups.append((heading, facts))
    return groups


def _yaml(recipe: Any) -> str:
    if not recipe:
        return ""
    import yaml

    return yaml.safe_dump(recipe, allow_unicode=True, sort_keys=False, width=100)
