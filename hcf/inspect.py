"""What is in a model: an artefact, a diffusers folder, a safetensors or an ONNX file, as tables.

Only headers and manifests are read, so a model of many gigabytes takes no longer than a small one.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from hcf.artifact import INDEX, MANIFEST, read_manifest, refuse_pickle
from hcf.errors import InvalidArtifact
from hcf.weights import ITEM_BYTES, read_header

MOST_TENSORS = 30


@dataclass(frozen=True)
class Table:
    """A heading, column names, and rows of text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Inspection:
    """What `inspect_path` found: tables for people, `data` for programs."""

    path: str
    kind: str
    tables: tuple[Table, ...] = ()
    data: dict[str, Any] = field(default_factory=dict)


def inspect_path(path: Path) -> Inspection:
    """Looks at a folder or file; UnsafeFile for a pickle, InvalidArtifact for no model."""
    path = Path(path)
    if path.is_dir():
        if not (path / INDEX).is_file():
            raise InvalidArtifact(
                f"{path} has no {INDEX}", "give a pipeline folder or a model file"
            )
        return _inspect_folder(path)
    if not path.is_file():
        raise InvalidArtifact(f"nothing at {path}", "check the path")
    refuse_pickle(path)
    if path.suffix == ".safetensors":
        return _inspect_safetensors(path)
    if path.suffix == ".onnx":
        return _inspect_onnx(path)
    raise InvalidArtifact(
        f"{path} is not something this command reads",
        fix="give an artefact, a diffusers folder, a .safetensors or an .onnx file",
    )


def describe(inspection: Inspection) -> str:
    """The tables as aligned plain text."""
    lines = [f"{inspection.path}: {inspection.kind}"]
    for table in inspection.tables:
        rows = [table.columns, *table.rows]
        widths = [max(len(row[i]) for row in rows) for i in range(len(table.columns))]
        lines += ["", table.title]
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def _inspect_folder(path: Path) -> Inspection:
    index = json.loads((path / INDEX).read_text(encoding="utf-8"))
    rows, components = [], {}
    for name, value in index.items():
        if not (isinstance(value, list) and len(value) == 2 and isinstance(value[1], str)):
            continue
        count, size, kinds = _weights_of(path / name)
        components[name] = {"class": value[1], "parameters": count, "bytes": size, "dtypes": kinds}
        types = ", ".join(f"{kind} {n:,}" for kind, n in kinds.items())
        rows.append((name, value[1], f"{count:,}" if count else "", _megabytes(size), types))
    tables = [
        Table(
            f"{index.get('_class_name', 'pipeline')}",
            ("component", "class", "parameters", "MB", "tensors by type"),
            tuple(rows),
        )
    ]
    graphs = sorted(path.glob("*/*.onnx"))
    if graphs:
        found = tuple((str(g.relative_to(path)), _megabytes(g.stat().st_size)) for g in graphs)
        tables.append(Table("graphs", ("file", "MB"), found))
    data: dict[str, Any] = {"components": components}
    if not (path / MANIFEST).is_file():
        return Inspection(str(path), "diffusers pipeline", tuple(tables), data)
    manifest = read_manifest(path)
    facts = {
        "name": manifest.name,
        "content hash": manifest.content_hash[:16],
        "made": manifest.created,
        "made from": " <- ".join(f"{p.name} {p.content_hash[:8]}" for p in manifest.parents),
        "steps": manifest.sampling.steps,
        "guidance scale": manifest.sampling.guidance_scale,
        "quantised": ", ".join(manifest.quantization),
        "quality": ", ".join(f"{k}: {_verdict(v)}" for k, v in manifest.quality.items()),
    }
    stated = tuple((k, str(v)) for k, v in facts.items() if v not in (None, ""))
    tables.insert(0, Table("manifest", ("", ""), stated))
    engines = []
    for name, entries in manifest.engines.items():
        for entry in entries:
            engines.append(
                (
                    name,
                    entry.engine,
                    entry.precision,
                    "" if entry.latency_ms is None else f"{entry.latency_ms:.2f}",
                    "" if entry.error is None else f"{entry.error:.1e}",
                    ", ".join(f"{kind} {n}" for kind, n in entry.layer_precisions.items()),
                    "chosen"
                    if manifest.chosen.get(name)
                    in (entry.engine, f"{entry.engine}-{entry.precision}")
                    else "",
                )
            )
    if engines:
        columns = ("component", "engine", "precision", "ms", "error", "layers run as", "")
        tables.append(Table("engines", columns, tuple(engines)))
    data["manifest"] = manifest.model_dump(mode="json", exclude_none=True)
    return Inspection(str(path), "artefact", tuple(tables), data)


def _inspect_safetensors(path: Path) -> Inspection:
    entries = read_header(path)
    kinds = Counter(entry.dtype for entry in entries.values())
    count = sum(prod(entry.shape) for entry in entries.values())
    largest = sorted(entries.items(), key=lambda item: -prod(item[1].shape))
    rows = tuple((name, e.dtype, "x".join(map(str, e.shape))) for name, e in largest[:MOST_TENSORS])
    title = f"{len(entries)} tensors, {count:,} values"
    if len(entries) > MOST_TENSORS:
        title += f"; the {MOST_TENSORS} largest"
    data = {"tensors": len(entries), "values": count, "dtypes": dict(kinds)}
    table = Table(title, ("tensor", "type", "shape"), rows)
    return Inspection(str(path), "safetensors file", (table,), data)


def _inspect_onnx(path: Path) -> Inspection:
    from hcf.export.inspect import inspect_onnx

    found = inspect_onnx(path)
    products = len(found.quantized) + len(found.floating)
    facts = (
        ("opset", str(found.opset)),
        *((f"input {name}", kind) for name, kind in found.inputs.items()),
        *((f"output {name}", kind) for name, kind in found.outputs.items()),
        ("Q / DQ nodes", f"{found.quantize_nodes} / {found.dequantize_nodes}"),
        ("products in INT8", f"{len(found.quantized)} of {products}"),
        *((f"weights {kind}", f"{_megabytes(n)} MB") for kind, n in found.weight_bytes.items()),
    )
    operators = tuple((name, str(n)) for name, n in found.operators.items())
    tables = (
        Table("graph", ("", ""), facts),
        Table("operators", ("operator", "count"), operators),
    )
    return Inspection(str(path), "ONNX graph", tables, asdict(found))


def _weights_of(folder: Path) -> tuple[int, int, dict[str, int]]:
    """Parameters, bytes and number of tensors by type in a component's own weight files."""
    kinds: Counter[str] = Counter()
    count = size = 0
    for file in sorted(
        [*folder.glob("model*.safetensors"), *folder.glob("diffusion*.safetensors")]
    ):
        for entry in read_header(file).values():
            kinds[entry.dtype] += 1
            count += prod(entry.shape)
            size += prod(entry.shape) * ITEM_BYTES.get(entry.dtype, 0)
    return count, size, dict(kinds)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f}" if size else ""


def _verdict(value: Any) -> str:
    return "passed" if isinstance(value, dict) and value.get("passed") else "failed"
