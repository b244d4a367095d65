"""Small inline SVG: no script, no font, no address; colours come from the page's CSS classes.

Each drawing is stretched to its cell (`preserveAspectRatio="none"`), so it holds only rectangles
and upright lines; every word and number stands beside it as text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

WIDTH, HEIGHT = 1000.0, 20.0


def log_axis(values: Sequence[float]) -> tuple[float, float]:
    """Ends of a logarithmic axis that holds 1 and every positive value, with a little room."""
    held = [value for value in values if value > 0 and math.isfinite(value)] + [1.0]
    low, high = min(held), max(held)
    room = max((high / low) ** 0.06, 1.02)
    return (low / room if low < 1.0 else 1.0), high * room


def interval_bar(
    value: float, low: float, high: float, axis: tuple[float, float], goal: float | None = None
) -> Markup:
    """A bar from 1x to `value` on a log axis, its interval darker, its goal as a dashed line."""

    def x(at: float) -> float:
        start, stop = axis
        return WIDTH * (math.log(at) - math.log(start)) / (math.log(stop) - math.log(start))

    one, tip = x(1.0), x(value)
    left, right = x(low), max(x(high), x(low) + 3.0)
    parts = [
        _rect("track", 0, 8, WIDTH, 4),
        _rect("bar", min(one, tip), 4, abs(tip - one), 12),
        _rect("whisker", left, 7, right - left, 6),
        _line("tick", left, 3, 17),
        _line("tick", right, 3, 17),
    ]
    if goal is not None:
        parts.append(_line("goal", x(goal), 0, 20))
    return _svg(parts, f"{value:.3g} times, interval {low:.3g} to {high:.3g}")


def share_bar(value: float, most: float, css: str = "bar") -> Markup:
    """A bar of length value / most."""
    length = 0.0 if most <= 0 else WIDTH * min(max(value / most, 0.0), 1.0)
    return _svg([_rect("track", 0, 8, WIDTH, 4), _rect(css, 0, 4, length, 12)], f"{value:.4g}")


def stacked_bar(parts: Sequence[tuple[str, float]], most: float) -> Markup:
    """Parts of a whole one after the other, class s0, s1, ...; the whole is sum / most long."""
    drawn, at = [], 0.0
    for i, (_, value) in enumerate(parts):
        length = WIDTH * value / most if most > 0 else 0.0
        drawn.append(_rect(f"s{i}", at, 3, max(length, 1.0), 14))
        at += length
    return _svg(drawn, ", ".join(f"{name} {value:.3g}" for name, value in parts))


def _svg(parts: Sequence[str], label: str) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" preserveAspectRatio="none" role="img" '
        f'aria-label="{Markup.escape(label)}">{"".join(parts)}</svg>'
    )


def _rect(css: str, x: float, y: float, width: float, height: float) -> str:
    place = f'x="{x:.1f}" y="{y:g}" width="{max(width, 0):.1f}" height="{height:g}"'
    return f'<rect class="{css}" {place}/>'


def _line(css: str, x: float, top: float, bottom: float) -> str:
    return f'<line class="{css}" x1="{x:.1f}" x2="{x:.1f}" y1="{top:g}" y2="{bottom:g}"/>'
