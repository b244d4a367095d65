"""`bench/README.md` out of `bench/results`: the same records always make the same text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from hcf_bench.environment import same_environment
from hcf_bench.published import (
    HOW,
    PUBLISHED,
    Published,
    estimated_rows,
    published_rows,
    read_published,
    with_floors,
)
from hcf_bench.records import (
    REFERENCE,
    Profile,
    Record,
    Row,
    SelfTest,
    read_records,
    record_path,
)
from hcf_bench.report import (
    bounds_text,
    cell,
    decibel_text,
    environment_line,
    markdown_table,
    number_text,
    one_line,
    percent_text,
    precision_text,
    row_p50,
    stage_cells,
    verdict_text,
    write_text,
)

Dated = tuple[Record, Row]
COMMANDS: Final = (
    ("hcf bench peers", "time every peer that is here against eager PyTorch, in one run"),
    ("hcf bench compare", "two models, commits or stored results; exit code 9 when slower"),
    ("hcf bench profile", "the ten layers of a module that lie furthest above their floor"),
    ("hcf bench selftest", "how often the harness errs: alarms on A/A, a 2 % slowdown caught"),
    ("hcf bench suite", "the parts of a recipe, resumable; make bench runs recipes/bench/cpu.yaml"),
    ("hcf bench gpu", "everything that waits for a GPU, in order of value, within a budget"),
    ("hcf bench history", "a workload over commits, as PNG and HTML"),
)
INTRO: Final = """\
# Benchmarks

Rendered from the records in `results/` by `hcf bench render`; edits here are lost.

Every speed comes from pairs timed next to each other, after the outputs were checked against each
other, with its interval, its distance from what the machine could do at best, and the environment
it was taken in. Peers run live in the same run; figures of others are listed apart, with source.

A record is one run on one machine, `results/<machine>/<date>-<commit>-<name>.json`. Models have
random weights of their true architecture, but for the shipped mini model: they time like the
trained ones, and nothing is said about pictures.
"""
LEGEND: Final = """\
How to read the tables

- *speed-up*: time of the baseline over time of the row, median of interleaved pairs with its 95 %
  interval; the baseline is eager PyTorch in fp32 where no other is named. Absolute times drift with
  the state of a machine, and a baseline's own row is timed before the pairs: divide no two of them,
  read this ratio.
- *verdict*: FASTER, SAME or SLOWER only where the whole interval says so, else UNDECIDED. With a
  star the ratio is one of processor time, because other work kept the threads waiting.
- *p50 [p90, p99]*: of warm calls; *first call* is the cold one and counts nowhere else.
- *of peak*: counted FLOPs over time, as a share of the GEMM rate measured in the same run.
- *of roofline*: the floor (sum over operations of the larger of FLOPs and bytes at the measured
  rates) over the time. A floor is no prediction: nobody reaches all of it.
- *SQNR*: signal to error against eager fp32 on the same input, dB.
- *ran*: the precision read back from the engine, not the one asked for.
"""
ROWS: Final = (
    "workload", "subject", "dtype", "batch", "p50 ms [p90, p99]", "first call ms",
    "speed-up [95 %]", "verdict", "per s", "of peak", "of roofline", "SQNR dB", "peak MiB", "ran",
    "record",
)  # fmt: skip
CHIPS: Final = {"A100": "A100 (A800 rows: the same chip with slower links)", "H100": "H100"}


def render(results: Path) -> str:
    """The whole page.

    Raises:
        InvalidArtifact: a record or `published.yaml` does not hold what it should.
    """
    machines: dict[str, list[Record]] = {}
    for path, record in read_records(results):
        machines.setdefault(path.parent.name, []).append(record)
    parts = [INTRO, _commands(), LEGEND]
    parts += [_machine(name, machines[name]) for name in sorted(machines)]
    if (results / PUBLISHED).is_file():
        published = read_published(results / PUBLISHED)
        for chip, title in CHIPS.items():
            here = [r for name in sorted(machines) if chip.lower() in name for r in machines[name]]
            parts.append(_chip(chip, title, published, here))
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def write_readme(results: Path, target: Path) -> Path:
    """Renders and writes; StorageError where it cannot be written."""
    return write_text(target, render(results))


def is_rendered(results: Path, target: Path) -> bool:
    """Whether `target` is what the records render to."""
    return target.is_file() and target.read_text(encoding="utf-8") == render(results)


def newest(records: Sequence[Record]) -> list[Dated]:
    """Rows of records, oldest record first; of one subject against one baseline only the newest.

    What failed once and was timed later, or the reverse, is shown as it was last.
    """
    found: dict[tuple[str, str, str, int, str, str], Dated] = {}
    for record in records:
        for row in record.rows:
            subject = (row.workload, row.subject, row.device, row.batch)
            outdated = [
                key
                for key, (earlier, other) in found.items()
                if key[:4] == subject
                and earlier is not record
                and (other.status == "ok") != (row.status == "ok")
            ]
            for key in outdated:
                del found[key]
            found[*subject, row.dtype, row.baseline] = (record, row)
    return list(found.values())


def _commands() -> str:
    lines = [f"{command:<20}  # {what}" for command, what in COMMANDS]
    return "\n".join(["```", *lines, "```"])


def _machine(name: str, records: Sequence[Record]) -> str:
    last = records[-1]
    rows = newest(records)
    parts = [
        f"## {name}",
        cell(environment_line(last.environment)) + ".",
        _records(records),
        _ceilings(records),
        _rows(rows),
        _stages(rows),
        _not_timed(rows),
        _profiles(records),
        _selftests(records),
    ]
    return "\n\n".join(part for part in parts if part)


def _records(records: Sequence[Record]) -> str:
    lines = []
    for record in records:
        state = "" if record.finished else ", cut off"
        link = record_path(Path("results"), record).as_posix()
        lines.append(
            f"- [{_label(record)} {record.name}]({link}): `{record.command}`, "
            f"{record.spent_s:.0f} s{state}"
        )
        differences = same_environment(records[-1].environment, record.environment)
        if differences:
            lines.append(f"  - ran in another environment: {cell('; '.join(differences))}")
        lines += [f"  - {cell(note)}" for note in record.notes]
    return "\n".join(lines)


def _ceilings(records: Sequence[Record]) -> str:
    found = {c.name: (c, record) for record in records for c in record.ceilings}
    if not found:
        return ""
    table = [
        (c.name, f"{number_text(c.value)} {c.unit}", c.note, _label(record))
        for c, record in found.values()
    ]
    return "Ceilings measured here:\n\n" + markdown_table(
        ("ceiling", "reached", "how", "record"), table, words=(0, 2, 3)
    )


def _rows(rows: Sequence[Dated]) -> str:
    timed = [(record, row) for record, row in rows if row.status == "ok"]
    bases = {(row.workload, row.baseline) for _, row in timed if row.baseline}
    timed.sort(key=lambda found: _order(found[1], bases))
    if not timed:
        return ""
    table = [_cells(record, row, bases) for record, row in timed]
    return markdown_table(ROWS, table, words=(0, 1, 2, 7, 13, 14))


def _order(row: Row, bases: set[tuple[str, str]]) -> tuple[str, bool, float, str, str, int]:
    """Workloads by name; in each the baseline first, then the fastest."""
    p50 = row_p50(row)
    is_base = row.speedup is None and (row.workload, row.subject) in bases
    time = float("inf") if p50 is None else p50
    return row.workload, not is_base, time, row.subject, row.dtype, row.batch


def _cells(record: Record, row: Row, bases: set[tuple[str, str]]) -> tuple[str, ...]:
    time = number_text(row_p50(row))
    if row.latency:
        time += f" [{number_text(row.latency.p90_ms)}, {number_text(row.latency.p99_ms)}]"
    is_base = row.speedup is None and (row.workload, row.subject) in bases
    return (
        row.workload,
        row.subject if row.device == "cpu" else f"{row.subject} ({row.device})",
        row.dtype,
        str(row.batch),
        time,
        number_text(row.latency.first_ms if row.latency else None),
        "baseline" if is_base else speedup_text(row),
        verdict_text(row),
        number_text(row.throughput_per_s),
        percent_text(row.fraction_of_peak),
        percent_text(row.fraction_of_roofline),
        decibel_text(row.fidelity),
        _memory(row),
        precision_text(row.engine),
        _label(record),
    )


def speedup_text(row: Row) -> str:
    """The ratio with its interval; the baseline is named where it is not eager PyTorch."""
    text = bounds_text(row.speedup)
    return text if row.baseline in ("", REFERENCE) else f"{text} over {row.baseline}"


def _memory(row: Row) -> str:
    memory = row.memory
    if memory is None:
        return "-"
    if memory.device_peak_mib is not None:
        return f"{memory.device_peak_mib:,.0f} (device)"
    return "-" if memory.host_peak_mib is None else f"{memory.host_peak_mib:,.0f}"


def _stages(rows: Sequence[Dated]) -> str:
    table = [
        (row.workload, row.subject, row.dtype, *stage_cells(row.stages))
        for _, row in sorted(rows, key=lambda found: _order(found[1], set()))
        if row.stages and row.status == "ok"
    ]
    if not table:
        return ""
    heads = (
        "workload", "subject", "dtype", "text ms", "denoise ms", "decode ms", "denoiser calls",
    )  # fmt: skip
    return "Stages of a pipeline, medians:\n\n" + markdown_table(heads, table, words=(0, 1, 2))


def _not_timed(rows: Sequence[Dated]) -> str:
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for _, row in rows:
        if row.status != "ok":
            key = (row.subject, row.status, one_line(row.reason))
            reasons.setdefault(key, []).append(row.workload)
    if not reasons:
        return ""
    lines = [
        f"- {subject}, {status.replace('_', ' ')} on {', '.join(sorted(set(workloads)))}: "
        f"{cell(reason)}"
        for (subject, status, reason), workloads in sorted(reasons.items())
    ]
    return "\n".join(["Not timed:", "", *lines])


def _profiles(records: Sequence[Record]) -> str:
    found: dict[tuple[str, str, str, int], tuple[Record, Profile]] = {}
    for record in records:
        for profile in record.profiles:
            key = (profile.workload, profile.subject, profile.dtype, profile.batch)
            found[key] = (record, profile)
    return "\n\n".join(_profile(*found[key]) for key in sorted(found))


def _profile(record: Record, profile: Profile) -> str:
    share = percent_text(profile.floor_ms / profile.total_ms) if profile.total_ms else "-"
    named = sum(not layer.name.startswith("(") for layer in profile.layers)  # the rest are sums
    title = (
        f"{profile.workload} {profile.subject} {profile.dtype}, batch {profile.batch}: "
        f"{number_text(profile.total_ms)} ms, {share} of roofline; the {named} "
        f"layers furthest above their floor ({_label(record)})"
    )
    table = [
        (
            f"`{layer.name}`",
            layer.kind,
            number_text(layer.time_ms),
            number_text(layer.floor_ms),
            number_text(layer.excess_ms),
            percent_text(layer.excess_ms / profile.total_ms) if profile.total_ms else "-",
            number_text(layer.tflop),
            number_text(layer.gbyte),
        )
        for layer in profile.layers
    ]
    heads = ("layer", "kind", "ms", "floor ms", "above ms", "of the whole", "TFLOP", "GB")
    return (
        f"<details><summary>{cell(title)}</summary>\n\n"
        f"{markdown_table(heads, table, words=(0, 1))}\n\n</details>"
    )


def _selftests(records: Sequence[Record]) -> str:
    found: dict[str, tuple[Record, SelfTest]] = {}
    for record in records:
        for test in record.selftests:
            found[test.name] = (record, test)
    if not found:
        return ""
    table = [
        (
            test.name,
            f"{test.slowdown:.1%}" if test.slowdown else "none (A/A)",
            str(test.comparisons),
            str(test.alarms),
            str(test.right),
            str(test.undecided),
            number_text(test.call_ms),
            f"{test.pairs_p50:g}",
            f"{test.seconds_p50:.1f} ({test.seconds_max:.1f})",
            str(test.load),
            str(test.processes),
            number_text(test.overhead_us),
            _label(record),
        )
        for record, test in found.values()
    ]
    heads = (
        "self-test", "slowdown", "comparisons", "alarms", "right", "undecided", "call ms",
        "pairs p50", "seconds p50 (max)", "load", "processes", "overhead us", "record",
    )  # fmt: skip
    return (
        "Self-test, comparisons whose truth is known (an alarm is a difference found where there "
        "is none, or the wrong way round):\n\n" + markdown_table(heads, table, words=(0, 1, 12))
    )


def _label(record: Record) -> str:
    return f"{record.date.isoformat()} {record.commit[:7]}"


def _chip(chip: str, title: str, published: Published, records: Sequence[Record]) -> str:
    """Measured, published and estimated rows of one chip, each labelled."""
    estimates = estimated_rows(chip, published.figures(chip))
    others = published_rows(published, chip)
    if not others:
        return ""
    sources = list(dict.fromkeys(row.source for row in [*others, *estimates]))
    how = {row.source: HOW[row.engine["how"]] for row in others}
    held = {row.workload for row in others}
    rows = [(row, str(sources.index(row.source) + 1)) for row in with_floors(others, estimates)]
    rows += [(row, str(sources.index(row.source) + 1)) for row in estimates]
    rows += [
        (row, _label(record)) for record, row in newest(records)
        if row.status == "ok" and row.workload in held and row.device != "cpu"
    ]  # fmt: skip
    rows.sort(key=lambda found: _chip_order(found[0]))
    table = [
        (
            row.workload,
            _steps(row),
            str(row.batch),
            row.subject + (f" ({row.engine['note']})" if "note" in row.engine else ""),
            row.dtype,
            number_text(row_p50(row)),
            percent_text(row.fraction_of_roofline),
            row.provenance,
            str(row.engine.get("machine", chip)),
            str(row.engine.get("published", "-")),
            source,
        )
        for row, source in rows
    ]
    heads = (
        "workload", "steps", "batch", "subject", "dtype", "p50 ms", "of floor", "provenance",
        "machine", "as printed", "source",
    )  # fmt: skip
    listed = [
        f"{i}. {cell(source)}" + (f" ({how[source]})" if source in how else "")
        for i, source in enumerate(sources, 1)
    ]
    return "\n\n".join(
        [
            f"## {title}: measured, published and estimated",
            "Measured rows come from a record, published ones from the source numbered at the "
            "end of the row, estimated ones from a formula: a floor, not a latency.",
            markdown_table(heads, table, words=(0, 3, 4, 7, 8, 9)),
            "\n".join(listed),
        ]
    )


def _steps(row: Row) -> str:
    if not row.workload.endswith("/pipeline"):
        return "-"
    steps = str(row.engine.get("steps", "not stated"))
    return steps if row.engine.get("guided", True) else f"{steps}, unguided"


def _chip_order(row: Row) -> tuple[str, int, bool, int, float, str]:
    pipeline = row.workload.endswith("/pipeline")
    steps = int(row.engine.get("steps") or 0) if pipeline else 0
    guided = bool(row.engine.get("guided", True))
    return row.workload, steps, guided, row.batch, row_p50(row) or 0.0, row.subject
