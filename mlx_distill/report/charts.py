"""Charts as inline SVG. Strips use percentages instead of a view box, so they stretch without distorting text
or dots.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_distill.report.markup import Html, el
from mlx_distill.text import interval, percent

_WIDTH, _HEIGHT = 460, 232
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 10, 30


def _share(x: float) -> str:
    return f"{100 * min(1.0, max(0.0, x)):.2f}%"


def bar(estimate: Mapping[str, Any] | None, label: str) -> Html | None:
    """A bar from 0 to 100 % with the interval as a whisker; nothing where nothing was measured."""
    if not estimate or estimate.get("value") is None:
        return None
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    return el(
        "svg",
        el("title", f"{label}: {percent(value)}, interval {interval(estimate)}, n = {estimate['n']}"),
        el("rect", x=0, y=3, width="100%", height=8, rx=2, class_="track"),
        el("rect", x=0, y=3, width=_share(value), height=8, rx=2, class_="fill"),
        _whisker(_share(low), _share(high), 7, 4),
        class_="bar",
        width="100%",
        height=14,
        role="img",
        focusable="false",
    )


def _whisker(low: str, high: str, y: float, cap: float) -> list[Html]:
    ends = [el("line", x1=x, x2=x, y1=y - cap, y2=y + cap, class_="whisker") for x in (low, high)]
    return [el("line", x1=low, x2=high, y1=y, y2=y, class_="whisker"), *ends]


def strip(
    estimates: Sequence[tuple[str, str, Mapping[str, Any] | None]],
    low: float,
    high: float,
    *,
    zero: float | None = None,
    ticks: Sequence[float] = (),
) -> Html:
    """Dots with intervals on one axis, one line each.

    Args:
        estimates: (CSS class, name, estimate) from top to bottom; one without a value leaves its line empty.
        low, high: Ends of the axis.
        zero: Where a stronger line stands.
        ticks: Where faint lines stand.
    """

    def place(x: float) -> str:
        return _share((x - low) / (high - low))

    height = 15 * len(estimates) + 5
    marks = [el("line", x1=place(x), x2=place(x), y1=0, y2=height, class_="grid") for x in ticks]
    if zero is not None:
        marks.append(el("line", x1=place(zero), x2=place(zero), y1=0, y2=height, class_="zero"))
    for i, (class_, name, estimate) in enumerate(estimates):
        if not estimate or estimate.get("value") is None:
            continue
        y = 10 + 15 * i
        marks.append(
            el(
                "g",
                el("title", f"{name}: {percent(estimate['value'])}, interval {interval(estimate)}"),
                el("line", x1=place(estimate["low"]), x2=place(estimate["high"]), y1=y, y2=y, class_="range"),
                el("circle", cx=place(estimate["value"]), cy=y, r=4.5, class_="dot"),
                class_=class_,
            )
        )
    return el(
        "svg",
        marks,
        class_="strip",
        width="100%",
        height=height,
        role="img",
        aria_label=_strip_label(estimates),
        focusable="false",
    )


def _strip_label(estimates: Sequence[tuple[str, str, Mapping[str, Any] | None]]) -> str:
    return (
        "; ".join(
            f"{name} {percent(e['value'])}" for _, name, e in estimates if e and e.get("value") is not None
        )
        or "not measured"
    )


def axis(low: float, high: float, ticks: Sequence[float], text: Any = None) -> Html:
    """The numbers under a column of strips."""
    label = text or (lambda x: f"{100 * x:.0f}")
    anchors = ["start" if x <= low else "end" if x >= high else "middle" for x in ticks]
    numbers = [
        el("text", label(x), x=_share((x - low) / (high - low)), y=11, text_anchor=a)
        for x, a in zip(ticks, anchors, strict=True)
    ]
    return el("svg", numbers, class_="axis", width="100%", height=15, aria_hidden="true", focusable="false")


def stacked(parts: Sequence[tuple[str, str, int]], label: str) -> Html:
    """One bar of counts side by side: (CSS class, name, count)."""
    total = sum(count for _, _, count in parts) or 1
    marks, start = [], 0.0
    for class_, name, count in parts:
        width = count / total
        if count:
            text = f"{name}: {count} ({percent(width)})"
            marks.append(
                el(
                    "rect",
                    el("title", text),
                    x=_share(start),
                    y=0,
                    width=_share(width),
                    height=22,
                    class_=f"part {class_}",
                )
            )
            if width > 0.07:
                marks.append(
                    el(
                        "text",
                        count,
                        x=_share(start + width / 2),
                        y=15,
                        text_anchor="middle",
                        class_=f"on {class_}",
                    )
                )
        start += width
    summary = "; ".join(f"{name} {count}" for _, name, count in parts)
    return el(
        "svg",
        marks,
        class_="stacked",
        width="100%",
        height=22,
        role="img",
        aria_label=f"{label}: {summary}",
        focusable="false",
    )


def line_chart(
    series: Mapping[str, Mapping[str, Sequence[float]]], classes: Mapping[str, str], label: str
) -> Html:
    """Losses over steps: each series faint as measured and strong as its moving mean; few points are marked
    one by one.

    Args:
        series: ``{name: {"step", "value"}}``.
        classes: The CSS class of each name.
        label: What the chart shows, for those who cannot see it.
    """
    steps = [x for s in series.values() for x in s["step"]]
    values = [y for s in series.values() for y in s["value"]]
    log = min(values) > 0 and max(values) / min(values) > 30
    first, last = min(steps), max(max(steps), min(steps) + 1)
    ticks = _log_ticks(min(values), max(values)) if log else nice_ticks(min(0.0, *values), max(values))
    bottom, top = (
        (min(ticks[0], *values), max(ticks[-1], *values)) if log else (ticks[0], max(ticks[-1], *values))
    )

    def at(x: float, y: float) -> tuple[float, float]:
        height = math.log(y / bottom) / math.log(top / bottom) if log else (y - bottom) / (top - bottom)
        return _LEFT + (x - first) / (last - first) * (
            _WIDTH - _LEFT - _RIGHT
        ), _HEIGHT - _BOTTOM - height * (_HEIGHT - _TOP - _BOTTOM)

    marks = [_y_tick(at(first, y)[1], y) for y in ticks]
    for x in [t for t in nice_ticks(first, last) if first <= t <= last and t == int(t)]:
        marks.append(el("text", f"{x:,.0f}", x=f"{at(x, top)[0]:.1f}", y=_HEIGHT - 12, text_anchor="middle"))
    marks.append(el("text", "step", x=_WIDTH - _RIGHT, y=_HEIGHT - 1, text_anchor="end", class_="unit"))
    marks += [_curve(name, found, classes[name], at) for name, found in series.items()]
    return el(
        "svg",
        marks,
        class_="lines",
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=label + (", logarithmic scale" if log else ""),
    )


def _y_tick(y: float, value: float) -> Html:
    text = el("text", f"{float(f'{value:.3g}'):,g}", x=_LEFT - 7, y=f"{y + 3.5:.1f}", text_anchor="end")
    return el(
        "g", el("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="grid"), text
    )


def _curve(name: str, found: Mapping[str, Sequence[float]], class_: str, at: Any) -> Html:
    points = list(zip(found["step"], found["value"], strict=True))
    few = name.startswith("valid_") or len(points) < 12
    drawn = (
        [el("polyline", points=_points(points, at), class_="raw")] if not few and len(points) >= 30 else []
    )
    smooth = points if few else smoothed(points)
    drawn.append(el("polyline", points=_points(smooth, at), class_="curve"))
    if few and len(points) <= 60:
        drawn += [
            el("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=2.6, class_="mark")
            for x, y in (at(*p) for p in points)
        ]
    return el("g", drawn, class_=class_ + (" valid" if name.startswith("valid_") else ""))


def _points(points: Sequence[tuple[float, float]], at: Any) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A centred moving mean over a twentieth of the points, narrower at the ends.

    >>> smoothed([(1, 2.0), (2, 4.0)])
    [(1, 2.0), (2, 4.0)]
    """
    reach = len(points) // 40
    out = []
    for i, (x, _) in enumerate(points):
        r = min(reach, i, len(points) - 1 - i)
        near = [y for _, y in points[i - r : i + r + 1]]
        out.append((x, sum(near) / len(near)))
    return out


def nice_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers that span a range.

    >>> nice_ticks(0, 9.3)
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    """
    span = (high - low) or 1.0
    rough = span / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.8)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(round(i * step, 10)) for i in range(first, max(last, first + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten and their 2 and 5 inside a range, thinned where they are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for marks in ((1, 2, 5), (1, 3), (1,)):
        inside = [t for t in (m * 10.0**e for e in powers for m in marks) if low * 0.8 <= t <= high * 1.25]
        if len(inside) <= 7:
            break
    return inside if len(inside) >= 2 else [low, high]
