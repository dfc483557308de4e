"""The funnel plot: rates of groups over their sizes, with the limits of equal groups."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from mlx_distill.metrics.homogeneity import funnel_limits
from mlx_distill.report.charts import nice_ticks
from mlx_distill.report.svg import element
from mlx_distill.text import percent

_WIDTH, _HEIGHT = 460, 232
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 14, 10, 30
_STEPS = 40
_LEVELS = ((0.95, "inner"), (0.998, "outer"))


def funnel_chart(groups: Sequence[tuple[str, int, float]], pooled: float, label: str, unit: str) -> Markup:
    """Groups as points at their size and rate, the common rate as a line, and the limits between which 95 %
    and 99.8 % of equal groups lie, dashed and solid.

    Args:
        groups: Name, rows and rate of each.
        pooled: The common rate.
        label: Alternative text of the chart.
        unit: What the rows are, below the horizontal axis.
    """
    sizes = [n for _, n, _ in groups]
    first, last = max(1.0, 0.8 * min(sizes)), 1.15 * max(sizes)
    steps = sorted({round(first * (last / first) ** (i / _STEPS)) for i in range(_STEPS + 1)})
    curves = {name: [funnel_limits(pooled, n, level) for n in steps] for level, name in _LEVELS}
    top = min(1.0, max([rate for _, _, rate in groups] + [high for _, high in curves["outer"]]))
    ticks = nice_ticks(0.0, max(top, 0.02))
    top = min(1.0, ticks[-1])

    def place(n: float, rate: float) -> tuple[str, str]:
        # By the logarithm of the size, so that groups of 30 and of 3,000 rows can be told apart.
        share = math.log(n / steps[0]) / math.log(steps[-1] / steps[0]) if len(steps) > 1 else 0.5
        x = _LEFT + share * (_WIDTH - _LEFT - _RIGHT)
        return f"{x:.1f}", f"{_HEIGHT - _BOTTOM - min(rate, top) / top * (_HEIGHT - _TOP - _BOTTOM):.1f}"

    marks = [_tick(tick, place(steps[0], tick)[1]) for tick in ticks if tick <= top]
    for n in _sizes_shown(steps[0], steps[-1]):
        marks.append(
            element("text", f"{n:,}", x=place(n, 0)[0], y=_HEIGHT - 14, text_anchor="middle", class_="tick")
        )
    marks.append(element("text", unit, x=_WIDTH - _RIGHT, y=_HEIGHT - 1, text_anchor="end", class_="unit"))
    for name, limits in curves.items():
        for end in (0, 1):
            points = " ".join(",".join(place(n, ends[end])) for n, ends in zip(steps, limits, strict=True))
            marks.append(element("polyline", points=points, class_=name))
    y = place(steps[0], pooled)[1]
    marks.append(element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="zero"))
    marks += [_point(name, n, rate, *place(n, rate)) for name, n, rate in groups]
    named = "; ".join(f"{name} {percent(rate)} of {n:,}" for name, n, rate in groups)
    return element(
        "svg",
        marks,
        class_="lines funnel",
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=f"{label}: common rate {percent(pooled)}; {named}",
    )


def _tick(value: float, y: str) -> Markup:
    text = element("text", f"{100 * value:g}", x=_LEFT - 7, y=f"{float(y) + 3.5:.1f}", text_anchor="end")
    return element("g", element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="grid"), text)


def _sizes_shown(first: int, last: int) -> list[int]:
    """Round numbers of rows between two ends of a logarithmic axis."""
    powers = range(len(str(first)) - 1, len(str(last)) + 1)
    known = [multiple * 10**power for power in powers for multiple in (1, 2, 5)]
    inside = [n for n in known if first <= n <= last]
    return inside if len(inside) >= 2 else sorted({first, last})


def _point(name: str, n: int, rate: float, x: str, y: str) -> Markup:
    near_the_end = float(x) > _WIDTH - 90
    text = element(
        "text",
        name if len(name) <= 16 else f"{name[:15]}…",
        x=f"{float(x) + (-7 if near_the_end else 7):.1f}",
        y=f"{float(y) - 5:.1f}",
        text_anchor="end" if near_the_end else "start",
    )
    title = element("title", f"{name}: {percent(rate)} of {n:,}")
    return element("g", title, element("circle", cx=x, cy=y, r=4, class_="dot"), text)
