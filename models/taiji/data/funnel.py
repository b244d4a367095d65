"""The funnel report: what every rule let through, by domain, as JSON and as one page of HTML."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from taiji.data.metadata import (
    id_order,
    ids_as_integers,
    read_columns,
    read_images,
    write_json,
)
from taiji.data.select import Selection

THUMBNAIL = 64
EXAMPLES = 6

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
.bar { background: #dde6f5; height: .7rem; width: 10rem; }
.bar > i { display: block; background: #3b6fc4; height: 100%; }
figure { display: inline-block; margin: .3rem; width: 7rem; vertical-align: top; }
figcaption { font-size: 12px; overflow-wrap: anywhere; }
"""


def funnel(selection: Selection, reasons: Sequence[str]) -> dict[str, Any]:
    """The selection as plain values; every rejected row is counted under its one reason."""
    counts = np.bincount(selection.reason[selection.reason >= 0], minlength=len(reasons))
    kept = selection.kept
    by_domain = np.bincount(selection.domain[kept], minlength=len(selection.domains))
    return {
        "rows": len(kept),
        "kept": int(kept.sum()),
        "rejected": {name: int(n) for name, n in zip(reasons, counts, strict=True)},
        "domains": {name: int(n) for name, n in zip(selection.domains, by_domain, strict=True)},
        "steps": [asdict(step) for step in selection.steps],
    }


def write_report(
    name: str,
    selection: Selection,
    folders: Sequence[Path],
    root: Path,
    output: Path,
    *,
    thumbnails: bool = True,
) -> Path:
    """Writes report.json and report.html into `output`; the page's path."""
    reasons = [step.name for step in selection.steps]
    found = funnel(selection, reasons)
    write_json(found, output / "report.json")
    examples = _examples(selection, folders, root) if thumbnails else {}
    page = _page(name, found, examples)
    target = output / "report.html"
    temporary = target.with_name(".report.html.tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, target)
    return target


Example = tuple[str, str]  # caption, data URI of the thumbnail ("" without an image)


def _examples(
    selection: Selection, folders: Sequence[Path], root: Path
) -> dict[str, list[Example]]:
    """A few rows of each reason, and of those kept, first by their ids."""
    order = id_order(ids_as_integers(read_columns(folders, ["id"])["id"]))
    reasons = selection.reason[order]
    chosen = {
        name: order[np.flatnonzero(reasons == code)[:EXAMPLES]]
        for code, name in enumerate([*(s.name for s in selection.steps)])
    }
    chosen["kept"] = order[np.flatnonzero(reasons < 0)[:EXAMPLES]]
    table = read_columns(folders, ["file", "offset", "bytes", "caption"])
    return {name: _thumbnails(table.take(pa.array(rows)), root) for name, rows in chosen.items()}


def _thumbnails(rows: pa.Table, root: Path) -> list[Example]:
    found = []
    for caption, item in zip(rows["caption"].to_pylist(), read_images(root, rows), strict=True):
        uri = ""
        if not isinstance(item, str):
            image = item[1]
            image.thumbnail((THUMBNAIL, THUMBNAIL))
            jpeg = io.BytesIO()
            image.save(jpeg, "jpeg", quality=80)
            uri = "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()
        found.append((caption or "", uri))
    return found


def _page(name: str, found: dict[str, Any], examples: dict[str, list[Example]]) -> str:
    title = escape(f"{name}: {found['kept']:,} of {found['rows']:,} pairs kept")
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body><h1>{title}</h1>",
        "<h2>Rules in order</h2>",
        _rules_table(found),
        "<h2>Kept of what reached the rule, by domain</h2>",
        _domain_table(found),
    ]
    if examples:
        parts.append("<h2>Examples</h2>")
    for reason, rows in examples.items():
        figures = "".join(_figure(*row) for row in rows)
        parts.append(f"<h3>{escape(reason)}</h3><div>{figures or 'none'}</div>")
    return "\n".join([*parts, "</body></html>\n"])


def _rules_table(found: dict[str, Any]) -> str:
    rows = [
        "<tr><th>rule</th><th>in</th><th>rejected</th><th>out</th><th>of all</th><th></th></tr>"
    ]
    for step in found["steps"]:
        before, after = sum(step["rows_in"].values()), sum(step["rows_out"].values())
        share = 100 * after / max(found["rows"], 1)
        rows.append(
            f"<tr><td>{escape(step['name'])}</td><td>{before:,}</td><td>{before - after:,}</td>"
            f"<td>{after:,}</td><td>{share:.1f} %</td>"
            f'<td><div class="bar"><i style="width:{share:.1f}%"></i></div></td>'
            "</tr>"
        )
    return "<table>" + "".join(rows) + "</table>"


def _domain_table(found: dict[str, Any]) -> str:
    names = list(found["domains"])
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = [f"<tr><th>rule</th>{head}</tr>"]
    for step in found["steps"]:
        cells = []
        for name in names:
            before, after = step["rows_in"][name], step["rows_out"][name]
            cells.append(f"<td>{after:,} / {before:,}</td>")
        rows.append(f"<tr><td>{escape(step['name'])}</td>{''.join(cells)}</tr>")
    kept = "".join(f"<td>{found['domains'][name]:,}</td>" for name in names)
    rows.append(f"<tr><td>kept</td>{kept}</tr>")
    return "<table>" + "".join(rows) + "</table>"


def _figure(caption: str, uri: str) -> str:
    image = f'<img alt="" src="{uri}">' if uri else "(no image)"
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"
