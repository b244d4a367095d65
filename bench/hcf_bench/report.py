"""Comparisons and records for CI and for people: JUnit XML, Markdown, a table for a terminal."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from hcf.artifact import save_text
from hcf.errors import StorageError
from hcf.report.table import ratio, speedup_text
from hcf_bench.environment import Environment, describe
from hcf_bench.records import Record, Row
from hcf_bench.results import Bounds, Comparison, Latency, Stages
from hcf_bench.statistics import Verdict

Found = Comparison | Record
MOST_LINES: Final = 60
MOST_COLUMNS: Final = 120
EXACT_DB: Final = 999.0  # how `hcf_bench.pairs.output_distance` writes no error at all
# Colour codes of a peer's error message, and what XML 1.0 cannot hold, not even escaped.
NOT_XML: Final = re.compile(
    "\x1b\\[[0-9;]*m|[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
)
COMPARED: Final = (
    "workload", "baseline", "candidate", "verdict", "speed-up [95 %]", "baseline p50 ms",
    "candidate p50 ms", "pairs", "threshold", "why",
)  # fmt: skip
TERMINAL: Final = (
    "workload", "subject", "dtype", "b", "p50 ms", "p90 ms", "speed-up [95 %]", "verdict", "peak",
    "roof", "dB",
)  # fmt: skip
WIDEST: Final = (24, 22, 6, 3, 9, 9, 19, 10, 5, 5, 5)


def junit(found: Sequence[Found]) -> str:
    """JUnit XML: one suite a comparison or record, one case a candidate or row.

    A comparison that ended SLOWER is a failure, INVALID an error, UNDECIDED skipped. Rows of a
    record are no gate, whatever their verdict: failed, killed and invalid ones are errors, missing
    ones skipped, with the reason. `time` is what the timed calls took, in seconds.
    """
    root = ET.Element("testsuites", name="hcf bench")
    totals = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    spent = 0.0
    for item in found:
        suite = ET.SubElement(root, "testsuite")
        _properties(suite, item.environment)
        cases = [_comparison_case(item)] if isinstance(item, Comparison) else _record_cases(item)
        suite.extend(cases)
        name = item.workload if isinstance(item, Comparison) else item.name
        counts = {
            "tests": len(cases),
            "failures": sum(case.find("failure") is not None for case in cases),
            "errors": sum(case.find("error") is not None for case in cases),
            "skipped": sum(case.find("skipped") is not None for case in cases),
        }
        suite.attrib.update({"name": _xml_text(name), "time": f"{item.spent_s:.3f}"})
        suite.attrib.update({key: str(count) for key, count in counts.items()})
        totals = {key: totals[key] + counts[key] for key in totals}
        spent += item.spent_s
    root.attrib.update({key: str(count) for key, count in totals.items()})
    root.set("time", f"{spent:.3f}")
    ET.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def markdown(found: Sequence[Found]) -> str:
    """A table of verdicts, then stages, notes and the environments they hold for."""
    rows = [row for item in found for row in _compared(item)]
    parts = [markdown_table(COMPARED, rows, words=(0, 1, 2, 3, 9))]
    stages = [
        (item.workload, side.name, *stage_cells(side.stages))
        for item in found
        if isinstance(item, Comparison)
        for side in (item.baseline, item.candidate)
        if side.stages
    ]
    if stages:
        heads = ("workload", "side", "text ms", "denoise ms", "decode ms", "denoiser calls")
        parts.append("Stages, medians:\n\n" + markdown_table(heads, stages, words=(0, 1)))
    notes = dict.fromkeys(note for item in found for note in item.notes)
    if notes:
        parts.append("\n".join(f"- {cell(note)}" for note in notes))
    lines = dict.fromkeys(environment_line(item.environment) for item in found)
    parts.append("\n\n".join(f"Environment: {line}" for line in lines))
    return "\n\n".join(part for part in parts if part) + "\n"


def terminal_table(record: Record, file: str = "") -> str:
    """At most 60 lines of at most 120 columns: rows in the order they ran, then what failed.

    Args:
        record: its rows are in order of value, as the suite runs them.
        file: where the record was written, named when something is cut.
    """
    title = f"{record.name}  {record.date}  {record.commit[:12]}  {record.spent_s:.0f} s" + (
        "" if record.finished else "  CUT OFF"
    )
    head = [title, describe(record.environment)]
    if record.ceilings:
        ceilings = (f"{c.name} {number_text(c.value)} {c.unit}" for c in record.ceilings)
        head.append("ceilings: " + ", ".join(ceilings))
    timed = [row for row in record.rows if row.status == "ok"]
    others = [row for row in record.rows if row.status != "ok"]
    starred = any(row.verdict and row.clock == "cpu" for row in timed)
    # Two heading lines, the one on the star and the one that says what was cut.
    room = MOST_LINES - len(head) - 3 - starred
    failures = min(len(others), max(room // 4, room - len(timed)))
    shown = timed[: room - failures]
    lines = aligned(TERMINAL, [_terminal_cells(row) for row in shown], WIDEST, words=(0, 1, 2, 7))
    lines += [
        f"{row.status}: {row.workload} {row.subject} {row.dtype}: {one_line(row.reason)}"
        for row in others[:failures]
    ]
    cut = len(record.rows) - len(shown) - failures
    if starred:
        lines.append("* by processor time: other work kept the threads waiting")
    if cut:
        lines.append(f"{cut} more in {file or 'the record'}")
    return "\n".join(shorten(line, MOST_COLUMNS) for line in head + lines)


def write_junit(path: Path, found: Sequence[Found]) -> Path:
    """Writes `junit`; StorageError where it cannot."""
    return write_text(path, junit(found))


def write_markdown(path: Path, found: Sequence[Found]) -> Path:
    """Writes `markdown`; StorageError where it cannot."""
    return write_text(path, markdown(found))


def write_text(path: Path, text: str) -> Path:
    """Writes a file whole or not at all, with the folders above it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"{path.parent} cannot be made: {error.strerror}", "choose another output"
        ) from error
    save_text(path, text)
    return path


def markdown_table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[int] = (0,)
) -> str:
    """A GitHub table; the columns in `words` to the left, numbers to the right."""
    lines = ["| " + " | ".join(headings) + " |"]
    lines.append(
        "|" + "|".join(" --- " if i in words else " ---: " for i in range(len(headings))) + "|"
    )
    lines += ["| " + " | ".join(cell(text) for text in row) + " |" for row in rows]
    return "\n".join(lines)


def aligned(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    widest: Sequence[int],
    words: Sequence[int] = (0,),
) -> list[str]:
    """Plain text in columns no wider than `widest`: headings, a rule, the rows."""
    table = [headings, *rows]
    widths = [min(most, max(len(row[i]) for row in table)) for i, most in enumerate(widest)]
    lines = []
    for row in table:
        texts = (shorten(text, width) for text, width in zip(row, widths, strict=True))
        lines.append(
            "  ".join(
                text.ljust(width) if i in words else text.rjust(width)
                for i, (text, width) in enumerate(zip(texts, widths, strict=True))
            ).rstrip()
        )
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def cell(text: str) -> str:
    """As the cell of a Markdown table: one line, no bar that would end it, no tag."""
    flat = " ".join(text.split())
    return flat.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;") or "-"


def one_line(text: str, most: int = 200) -> str:
    """The first line that says something, shortened."""
    lines = [line.strip() for line in NOT_XML.sub("", text).splitlines() if line.strip()]
    return shorten(lines[0], most) if lines else "no reason given"


def shorten(text: str, most: int) -> str:
    """Cut to `most` characters, with two dots where something is missing."""
    return text if len(text) <= most else text[: max(most - 2, 0)].rstrip() + ".."


def number_text(value: float | None) -> str:
    """About four significant digits without an exponent: 0.0213, 9.81, 1,283; a dash for None."""
    if value is None:
        return "-"
    size = abs(value)
    digits = 4 if size < 0.1 else 3 if size < 1 else 2 if size < 100 else 1 if size < 1000 else 0
    return f"{value:,.{digits}f}"


def percent_text(fraction: float | None) -> str:
    """A share in percent: 0.324 is "32.4 %"."""
    return "-" if fraction is None else f"{100 * fraction:.{1 if fraction < 0.9995 else 0}f} %"


def bounds_text(bounds: Bounds | None) -> str:
    """ "1.96x [1.90, 2.01]"; more digits near 1, where a percent is what is asked."""
    if bounds is None:
        return "-"
    if 0.5 < bounds.low and bounds.high < 2.0:
        return f"{bounds.value:.3f}x [{bounds.low:.3f}, {bounds.high:.3f}]"
    return speedup_text(bounds.value, bounds.low, bounds.high)


def precision_text(engine: Mapping[str, Any]) -> str:
    """The precision that an engine reports to run, with its layers by precision where it tells."""
    name = str(engine.get("precision") or "")
    counts = _layer_counts(engine.get("layer_precisions"))
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    layers = ", ".join(f"{count} {precision}" for precision, count in ordered)
    return (f"{name} ({layers})" if name and layers else name or layers) or "-"


def _layer_counts(layers: Any) -> Counter[str]:
    """Layers by precision; a pipeline's report has them by component, which are added up."""
    counts: Counter[str] = Counter()
    for key, value in layers.items() if isinstance(layers, Mapping) else ():
        if isinstance(value, int):
            counts[str(key)] += value
        else:
            counts.update(_layer_counts(value))
    return counts


def environment_line(environment: Environment) -> str:
    """Machine and packages in one line."""
    packages = ", ".join(f"{name} {version}" for name, version in environment.packages.items())
    gpus = ", ".join(f"driver {gpu.driver}" for gpu in environment.gpus[:1])
    parts = (describe(environment), gpus, f"Python {environment.python}", packages)
    return "; ".join(part for part in parts if part)


def stage_cells(s: Stages) -> tuple[str, ...]:
    """Text, denoising, decode in ms and the calls of the denoiser."""
    return (
        number_text(s.text_ms), number_text(s.denoise_ms), number_text(s.decode_ms),
        str(s.denoiser_calls),
    )  # fmt: skip


def decibel_text(fidelity: Mapping[str, float]) -> str:
    """Signal to error in dB; "exact" where the outputs are the same."""
    value = fidelity.get("sqnr_db")
    if value is None:
        return "-"
    return "exact" if value >= EXACT_DB else f"{value:.1f}"


def row_p50(row: Row) -> float | None:
    """Of the samples where there are any, else the value given."""
    return row.latency.p50_ms if row.latency else row.p50_ms


def _comparison_case(found: Comparison) -> ET.Element:
    name = f"{found.candidate.name} against {found.baseline.name}"
    case = _case(found.workload, name, found.spent_s)
    _outcome(case, found.verdict, found.headline(), found.reason)
    return case


def _record_cases(record: Record) -> list[ET.Element]:
    cases = []
    for row in record.rows:
        name = f"{row.subject} {row.dtype} batch {row.batch} {row.device}"
        case = _case(f"{record.name}.{row.workload}", name, _timed_s(row.latency))
        if row.status == "missing":
            ET.SubElement(case, "skipped", message=_xml_text(one_line(row.reason)))
        elif row.status != "ok":
            error = ET.SubElement(case, "error", type=row.status)
            error.set("message", _xml_text(one_line(row.reason)))
            error.text = _xml_text(row.reason)
        else:
            text = f"{number_text(row_p50(row))} ms, {bounds_text(row.speedup)} of {row.baseline}"
            ET.SubElement(case, "system-out").text = _xml_text(f"{row.verdict or 'timed'}: {text}")
        cases.append(case)
    return cases


def _case(classname: str, name: str, seconds: float) -> ET.Element:
    case = ET.Element("testcase", classname=_xml_text(classname), name=_xml_text(name))
    case.set("time", f"{seconds:.3f}")
    return case


def _outcome(case: ET.Element, verdict: Verdict | None, text: str, reason: str) -> None:
    tags = {Verdict.SLOWER: "failure", Verdict.INVALID: "error", Verdict.UNDECIDED: "skipped"}
    if verdict in tags:
        found = ET.SubElement(case, tags[verdict], type=verdict.value)
        found.set("message", _xml_text(one_line(reason) if reason else text))
    ET.SubElement(case, "system-out").text = _xml_text(text)


def _properties(suite: ET.Element, environment: Environment) -> None:
    found = ET.SubElement(suite, "properties")
    values = environment.model_dump(exclude={"packages", "gpus", "cpu_isa"})
    values["cpu_isa"] = " ".join(environment.cpu_isa)
    values |= {f"package.{name}": version for name, version in environment.packages.items()}
    for i, gpu in enumerate(environment.gpus):
        values |= {f"gpu{i}.{name}": value for name, value in gpu.model_dump().items()}
    for name, value in values.items():
        ET.SubElement(found, "property", name=name, value=_xml_text(str(value)))


def _xml_text(text: str) -> str:
    return NOT_XML.sub("", text)


def _timed_s(latency: Latency | None) -> float:
    return (sum(latency.samples_ms) + (latency.first_ms or 0.0)) / 1e3 if latency else 0.0


def _ratio_cell(found: Comparison) -> str:
    if found.clock != "cpu":
        return bounds_text(found.speedup)
    wall = bounds_text(found.speedup_wall)
    return f"{bounds_text(found.speedup)} of processor time; {wall} of the clock on the wall"


def _compared(item: Found) -> list[tuple[str, ...]]:
    if isinstance(item, Comparison):
        sides = (item.baseline, item.candidate)
        times = [side.latency.p50_ms if side.latency else None for side in sides]
        return [
            (
                item.workload, sides[0].name, sides[1].name, item.verdict.value,
                _ratio_cell(item), number_text(times[0]), number_text(times[1]),
                str(item.pairs) + ("" if item.paired else " (unpaired)"),
                f"{item.threshold:.1%}" + (f", {item.floor_ms:g} ms" if item.floor_ms else ""),
                one_line(item.reason),
            )
        ]  # fmt: skip
    base = {(row.workload, row.subject): row_p50(row) for row in item.rows}
    return [
        (
            row.workload, row.baseline or "-", f"{row.subject} {row.dtype}",
            row.verdict.value if row.verdict and row.status == "ok" else row.status,
            bounds_text(row.speedup), number_text(base.get((row.workload, row.baseline))),
            number_text(row_p50(row)), str(row.pairs or "-"), "-",
            one_line(row.reason) if row.reason else "-",
        )
        for row in item.rows
    ]  # fmt: skip


def _terminal_cells(row: Row) -> tuple[str, ...]:
    speedup = (
        f"{ratio(row.speedup.value)} [{ratio(row.speedup.low)}, {ratio(row.speedup.high)}]"
        if row.speedup
        else "-"
    )
    return (
        row.workload, row.subject, row.dtype, str(row.batch), number_text(row_p50(row)),
        number_text(row.latency.p90_ms if row.latency else None), speedup,
        verdict_text(row), _share(row.fraction_of_peak),
        _share(row.fraction_of_roofline), decibel_text(row.fidelity),
    )  # fmt: skip


def verdict_text(row: Row) -> str:
    """The verdict, with a star where processor time decided it."""
    return f"{row.verdict}{'*' if row.clock == 'cpu' else ''}" if row.verdict else "-"


def _share(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.0f}%"
