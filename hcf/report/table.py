"""The ladder: what each rung of a run costs and keeps, for a terminal, Markdown and the page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

HEADINGS = (
    "rung", "steps", "engine, precision", "latency ms (p50)", "speed-up [95 %]", "CLIP-zh", "FED",
    "PSNR dB",
)  # fmt: skip


@dataclass(frozen=True)
class Rung:
    """One row of the ladder; None is printed as a dash (not measured, or not defined here).

    `speedup` is over the first rung, end to end; `psnr_db` is against the same student in fp32.
    """

    name: str
    steps: int
    engine: str
    precision: str
    latency_ms: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    clip_zh: float | None = None
    fed: float | None = None
    psnr_db: float | None = None
    chosen: bool = False

    def cells(self) -> tuple[str, ...]:
        """The texts of the row, in the order of `HEADINGS`."""
        return (
            self.name,
            str(self.steps),
            f"{self.engine}, {self.precision}",
            number(self.latency_ms, 1),
            speedup_text(self.speedup, self.speedup_low, self.speedup_high),
            number(self.clip_zh, 4),
            number(self.fed, 3),
            number(self.psnr_db, 1),
        )


def number(value: float | None, digits: int) -> str:
    """Fixed decimals, thousands apart; a dash for None."""
    return "-" if value is None else f"{value:,.{digits}f}"


def ratio(value: float) -> str:
    """Three significant digits without an exponent: 0.94, 5.31, 42.7, 118."""
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{digits}f}"


def speedup_text(value: float | None, low: float | None, high: float | None) -> str:
    """ "42.1x [41.6, 42.7]"; without bounds it says so."""
    if value is None:
        return "-"
    if low == high == value:
        return f"{ratio(value)}x"  # a rung over itself has no interval
    if low is None or high is None:
        return f"{ratio(value)}x (no interval)"
    return f"{ratio(value)}x [{ratio(low)}, {ratio(high)}]"


def ladder_text(rungs: Sequence[Rung]) -> str:
    """Plain aligned columns; numbers to the right."""
    rows = [HEADINGS, *(rung.cells() for rung in rungs)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))]
    lines = [
        "  ".join(
            cell.ljust(width) if i in (0, 2) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def ladder_markdown(rungs: Sequence[Rung]) -> str:
    """A GitHub table; the chosen rung in bold."""
    lines = ["| " + " | ".join(HEADINGS) + " |"]
    lines.append("|" + "|".join(" --- " if i in (0, 2) else " ---: " for i in range(8)) + "|")
    for rung in rungs:
        cells = [cell.replace("|", "\\|") for cell in rung.cells()]
        if rung.chosen:
            cells = [f"**{cell}**" if cell != "-" else cell for cell in cells]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def final_table(
    rungs: Sequence[Rung], *, title: str = "", notes: Sequence[str] = (), file: TextIO | None = None
) -> None:
    """Prints the ladder: with rich on a terminal, as plain text anywhere else."""
    out = sys.stdout if file is None else file
    if not out.isatty():
        print("\n".join(part for part in (title, ladder_text(rungs), *notes) if part), file=out)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if i in (0, 2) else "right")
    for rung in rungs:
        table.add_row(*rung.cells(), style="bold green" if rung.chosen else "")
    console = Console(file=out)
    console.print(table)
    for note in notes:
        console.print(note, style="dim", highlight=False, markup=False)
