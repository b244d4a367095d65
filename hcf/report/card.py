"""The README.md of an artefact: a model card of what was done, what it costs and what it keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hcf.report.grid import replace_file
from hcf.report.page import GateRow, SpeedRow
from hcf.report.table import Rung, ladder_markdown, number, ratio


def model_card(
    *,
    name: str,
    manifest: Mapping[str, Any],
    rungs: Sequence[Rung] = (),
    gate: Sequence[GateRow] = (),
    speeds: Sequence[SpeedRow] = (),
    language: Sequence[str] = ("zh",),
    licence: str = "",
    environment: str = "",
    example_prompt: str = "一只红色的猫",
    image: str = "",
) -> str:
    """Markdown with front matter that the Hugging Face hub reads.

    Args:
        name: of the artefact.
        manifest: its `hcf_manifest.json`.
        rungs: the ladder.
        gate: rows of the quality gate.
        speeds: comparisons.
        language: of the prompts.
        licence: SPDX identifier in lower case; left out where empty.
        environment: the machine the figures come from, in one line.
        example_prompt: in the example.
        image: relative path of a grid of images; left out where empty.
    """
    parents = [parent.get("name", "") for parent in manifest.get("parents") or ()]
    front: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    if licence:
        front["license"] = licence
    front["language"] = list(language)
    front["tags"] = _tags(manifest)
    sections = [
        "---\n" + yaml.safe_dump(front, allow_unicode=True, sort_keys=False).strip() + "\n---",
        f"# {name}",
        _what(manifest, parents),
    ]
    if image:
        sections.append(f"![images by rung]({image})")
    sections.append(
        "## Use\n\n```python\nimport hcf\n\n"
        f'pipe = hcf.load("{name}")\nimage = pipe("{example_prompt}").images[0]\n```\n\n'
        "It is an ordinary diffusers folder: without HCF, diffusers loads the same weights in fp32."
    )
    if rungs:
        where = f"\n\nMeasured on {environment}." if environment else ""
        sections.append(f"## What each step buys\n\n{ladder_markdown(rungs)}{where}")
    if speeds:
        lines = "\n".join(_speed_line(row) for row in speeds)
        sections.append(f"## Speed, as interleaved pairs\n\n{lines}")
    if gate:
        sections.append("## Quality gate\n\n" + _gate_table(gate))
    sections.append("## Provenance\n\n" + _provenance(manifest))
    return "\n\n".join(sections) + "\n"


def write_card(path: Path, text: str) -> Path:
    """Writes the card in one piece."""
    return replace_file(path, text.encode("utf-8"))


def _tags(manifest: Mapping[str, Any]) -> list[str]:
    tags = ["hcf", "text-to-image"]
    if manifest.get("distillation"):
        tags.append("few-step")
    formats = {
        str(facts.get("format", "")) for facts in (manifest.get("quantization") or {}).values()
    }
    return tags + sorted(formats - {""})


def _what(manifest: Mapping[str, Any], parents: Sequence[str]) -> str:
    """One paragraph: what was done to which model."""
    sampling = manifest.get("sampling") or {}
    done = []
    if manifest.get("distillation"):
        method = (manifest.get("distillation") or {}).get("method", "")
        done.append(f"distilled ({method})" if method else "distilled")
    for component, facts in (manifest.get("quantization") or {}).items():
        done.append(f"its {component} quantised to {str(facts.get('format', '')).upper()}".rstrip())
    origin = f"Made from {' and '.join(p for p in parents if p)}" if any(parents) else "Made"
    text = f"{origin} by HCF" + (f": {', '.join(done)}." if done else ".")
    if sampling.get("steps"):
        guidance = sampling.get("guidance_scale")
        text += f" It samples in {sampling['steps']} steps"
        if guidance is not None:
            text += " without guidance" if guidance <= 1.0 else f" at guidance {guidance:g}"
        text += "."
    return text


def _speed_line(row: SpeedRow) -> str:
    if row.speedup is None or row.low is None or row.high is None:
        return f"- {row.label}: {row.verdict}. {row.reason}".rstrip()
    kind = "interleaved pairs" if row.paired else "unpaired runs, weaker"
    return (
        f"- {row.label}: {row.candidate} is **{ratio(row.speedup)}x** "
        f"[{ratio(row.low)}, {ratio(row.high)}] as fast as {row.baseline} "
        f"({row.pairs} {kind}, {row.threads} threads each)."
    )


def _gate_table(gate: Sequence[GateRow]) -> str:
    lines = [
        "| metric | baseline | result | threshold | verdict |",
        "| --- | ---: | ---: | --- | --- |",
    ]
    for row in gate:
        verdict = "reported" if row.passed is None else "pass" if row.passed else "**fail**"
        baseline, value = number(row.baseline, row.digits), number(row.value, row.digits)
        cells = (row.metric, baseline, value, row.threshold or "-", verdict)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _provenance(manifest: Mapping[str, Any]) -> str:
    # not its own content hash: this file is part of the content
    lines = [
        f"- parent {parent.get('name', '')} `{parent.get('content_hash', '')}`"
        for parent in manifest.get("parents") or ()
    ]
    lines.append("- recipe, versions and hashes: `hcf_manifest.json`; check with `hcf verify`")
    return "\n".join(lines)
