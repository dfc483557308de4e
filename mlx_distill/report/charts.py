"""Charts as inline SVG.

Bars and strips use percentages instead of a view box, so they stretch without distorting text or dots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from mlx_distill.report.svg import element
from mlx_distill.text import MINUS, interval, percent, significant

Point = tuple[float, float]

_ENDS = ("low", "high")
_WIDTH, _HEIGHT = 460, 232
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 10, 30
_NAME = 70  # width of a point's name


def _share(x: float) -> str:
    return f"{100 * min(1.0, max(0.0, x)):.2f}%"


def bar(estimate: Mapping[str, Any] | None, label: str) -> Markup | None:
    """A bar from 0 to 100 % with the interval as a whisker; None where nothing was measured."""
    if not estimate or estimate.get("value") is None:
        return None
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    return element(
        "svg",
        element("title", f"{label}: {percent(value)}, interval {interval(estimate)}, n = {estimate['n']}"),
        element("rect", x=0, y=3, width="100%", height=8, rx=2, class_="track"),
        element("rect", x=0, y=3, width=_share(value), height=8, rx=2, class_="fill"),
        [] if low is None or high is None else _whisker(_share(low), _share(high), 7, 4),
        class_="bar",
        width="100%",
        height=14,
        role="img",
        focusable="false",
    )


def _whisker(low: str, high: str, y: float, cap: float) -> list[Markup]:
    ends = [element("line", x1=x, x2=x, y1=y - cap, y2=y + cap, class_="whisker") for x in (low, high)]
    return [element("line", x1=low, x2=high, y1=y, y2=y, class_="whisker"), *ends]


def strip(
    estimates: Sequence[tuple[str, str, Mapping[str, Any] | None]],
    low: float,
    high: float,
    *,
    zero: float | None = None,
    margin: float | None = None,
    ticks: Sequence[float] = (),
) -> Markup:
    """Dots with intervals on one axis, one line for each estimate.

    Args:
        estimates: (CSS class, name, estimate) from top to bottom; the line of one without a value is empty.
        low, high: Ends of the axis.
        zero: Position of a strong vertical line.
        margin: Position of a dashed vertical line.
        ticks: Positions of faint vertical lines.
    """

    def position(x: float) -> str:
        return _share((x - low) / (high - low))

    height = 15 * len(estimates) + 5
    marks = [element("line", x1=position(x), x2=position(x), y1=0, y2=height, class_="grid") for x in ticks]
    for at, class_ in ((zero, "zero"), (margin, "margin")):
        if at is not None:
            marks.append(element("line", x1=position(at), x2=position(at), y1=0, y2=height, class_=class_))
    for i, (class_, name, estimate) in enumerate(estimates):
        if not estimate or estimate.get("value") is None:
            continue
        y = 10 + 15 * i
        # Of a single row a difference has no interval.
        ends = [position(estimate["value"] if estimate[end] is None else estimate[end]) for end in _ENDS]
        marks.append(
            element(
                "g",
                element("title", f"{name}: {percent(estimate['value'])}, interval {interval(estimate)}"),
                element(
                    "line",
                    x1=ends[0],
                    x2=ends[1],
                    y1=y,
                    y2=y,
                    class_="range",
                ),
                element("circle", cx=position(estimate["value"]), cy=y, r=4.5, class_="dot"),
                class_=class_,
            )
        )
    return element(
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


def axis(low: float, high: float, ticks: Sequence[float]) -> Markup:
    """The numbers below a column of strips."""
    anchors = ["start" if x <= low else "end" if x >= high else "middle" for x in ticks]
    texts = [f"{100 * x:.0f}".replace("-", MINUS) for x in ticks]
    numbers = [
        element("text", text, x=_share((x - low) / (high - low)), y=11, text_anchor=anchor)
        for x, text, anchor in zip(ticks, texts, anchors, strict=True)
    ]
    return element(
        "svg", numbers, class_="axis", width="100%", height=15, aria_hidden="true", focusable="false"
    )


def stacked(parts: Sequence[tuple[str, str, int]], label: str) -> Markup:
    """A bar of stacked counts, each a (CSS class, name, count)."""
    total = sum(count for _, _, count in parts) or 1
    marks, start = [], 0.0
    for class_, name, count in parts:
        width = count / total
        if count:
            text = f"{name}: {count} ({percent(width)})"
            marks.append(
                element(
                    "rect",
                    element("title", text),
                    x=_share(start),
                    y=0,
                    width=_share(width),
                    height=22,
                    class_=f"part {class_}",
                )
            )
            if width > 0.07:
                marks.append(
                    element(
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
    return element(
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
) -> Markup:
    """Losses over steps, on a logarithmic axis where they span more than a factor of 30.

    A series of many points is drawn faint, with its moving mean on top; points of a short one are marked.

    Args:
        series: ``{name: {"step", "value"}}``.
        classes: The CSS class of each name.
        label: Alternative text of the chart.
    """
    steps = [x for s in series.values() for x in s["step"]]
    values = [y for s in series.values() for y in s["value"]]
    log = min(values) > 0 and max(values) / min(values) > 30
    first, last = min(steps), max(max(steps), min(steps) + 1)
    ticks = _log_ticks(min(values), max(values)) if log else nice_ticks(min(0.0, *values), max(values))
    bottom, top = min(ticks[0], *values) if log else ticks[0], max(ticks[-1], *values)

    def to_pixels(x: float, y: float) -> tuple[float, float]:
        width = (x - first) / (last - first)
        height = math.log(y / bottom) / math.log(top / bottom) if log else (y - bottom) / (top - bottom)
        return (
            _LEFT + width * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - height * (_HEIGHT - _TOP - _BOTTOM),
        )

    marks = [_y_tick(to_pixels(first, y)[1], y) for y in ticks]
    for x in [t for t in nice_ticks(first, last) if first <= t <= last and t == int(t)]:
        left = f"{to_pixels(x, top)[0]:.1f}"
        marks.append(element("text", f"{x:,.0f}", x=left, y=_HEIGHT - 12, text_anchor="middle"))
    marks.append(element("text", "step", x=_WIDTH - _RIGHT, y=_HEIGHT - 1, text_anchor="end", class_="unit"))
    for name, curve in series.items():
        points = list(zip(curve["step"], curve["value"], strict=True))
        marks.append(_curve(name, points, classes[name], to_pixels))
    return element(
        "svg",
        marks,
        class_="lines",
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=label + (", logarithmic scale" if log else ""),
    )


def points_chart(
    line: Sequence[tuple[float, float, str]],
    dots: Sequence[tuple[float, float, str]],
    unit: str,
    label: str,
) -> Markup:
    """Named points joined by a line and other named points beside it, on a logarithmic vertical axis.

    Args:
        line: (x, y, name) by rising x; y is positive.
        dots: The same, not joined.
        unit: Of the horizontal axis.
        label: Alternative text of the chart.
    """
    points = [*line, *dots]
    xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
    x_ticks, y_ticks = nice_ticks(min(xs), max(xs)), _log_ticks(min(ys), max(ys))
    left = min(x_ticks)
    # Room for the name to the right of the last point.
    room = (_WIDTH - _LEFT - _RIGHT) / (_WIDTH - _LEFT - _NAME)
    right = max(max(x_ticks), left + (max(xs) - left) * room)
    bottom, top = min(*y_ticks, *ys) * 0.9, max(*y_ticks, *ys) * 1.1

    def to_pixels(x: float, y: float) -> tuple[float, float]:
        width, height = (x - left) / (right - left), math.log(y / bottom) / math.log(top / bottom)
        return (
            _LEFT + width * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - height * (_HEIGHT - _TOP - _BOTTOM),
        )

    marks = [_y_tick(to_pixels(left, y)[1], y) for y in y_ticks]
    for x in x_ticks:
        at = f"{to_pixels(x, top)[0]:.1f}"
        marks.append(element("text", f"{x:g}", x=at, y=_HEIGHT - 12, text_anchor="middle"))
    marks.append(element("text", unit, x=_WIDTH - _RIGHT, y=_HEIGHT - 1, text_anchor="end", class_="unit"))
    joined = element("polyline", points=_polyline([(x, y) for x, y, _ in line], to_pixels), class_="curve")
    marks.append(element("g", joined, [_named_point(point, to_pixels) for point in line], class_="s0 valid"))
    below = float(_WIDTH)  # height of the names so far; down is more
    named = []
    for x, y, name in sorted(dots, key=lambda dot: dot[1]):
        dot = to_pixels(x, y)
        below = min(dot[1] + 14, below - 12)  # names of near dots stand one above the other
        named.append(_named_point((x, y, name), to_pixels, below if dot[0] > _LEFT + _NAME else None))
    marks.append(element("g", named, class_="s1"))
    named_values = "; ".join(f"{name} {significant(y, 3)} at {x:.2f}" for x, y, name in points)
    return element(
        "svg",
        marks,
        class_="lines",
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=f"{label}, logarithmic scale: {named_values}",
    )


def _named_point(
    point: tuple[float, float, str], to_pixels: Callable[..., Point], left_at: float | None = None
) -> list[Markup]:
    """A dot with its name to the upper right, where a falling line leaves room; with ``left_at`` to the left
    at that height, below the line.
    """
    x, y = to_pixels(point[0], point[1])
    at = {"x": f"{x + 6:.1f}", "y": f"{y - 5:.1f}", "text_anchor": "start"}
    if left_at is not None:
        at = {"x": f"{x - 6:.1f}", "y": f"{left_at:.1f}", "text_anchor": "end"}
    text = element("text", point[2], **at)
    return [element("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=3.2, class_="mark"), text]


def _y_tick(y: float, value: float) -> Markup:
    text = element("text", f"{float(f'{value:.3g}'):,g}", x=_LEFT - 7, y=f"{y + 3.5:.1f}", text_anchor="end")
    return element(
        "g", element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="grid"), text
    )


def _curve(name: str, points: Sequence[Point], class_: str, to_pixels: Callable[..., Point]) -> Markup:
    is_validation = name.startswith("valid_")
    as_measured = is_validation or len(points) < 12
    drawn = []
    if not as_measured and len(points) >= 30:
        drawn.append(element("polyline", points=_polyline(points, to_pixels), class_="raw"))
    curve = points if as_measured else smoothed(points)
    drawn.append(element("polyline", points=_polyline(curve, to_pixels), class_="curve"))
    if as_measured and len(points) <= 60:
        for point in points:
            x, y = to_pixels(*point)
            drawn.append(element("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=2.6, class_="mark"))
    return element("g", drawn, class_=class_ + (" valid" if is_validation else ""))


def _polyline(points: Sequence[Point], to_pixels: Callable[..., Point]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in (to_pixels(*point) for point in points))


def smoothed(points: Sequence[Point]) -> list[Point]:
    """The centred moving mean over a twentieth of the points; the window is smaller at the ends.

    >>> smoothed([(1, 2.0), (2, 4.0)])
    [(1, 2.0), (2, 4.0)]
    """
    radius = len(points) // 40
    out = []
    for i, (x, _) in enumerate(points):
        r = min(radius, i, len(points) - 1 - i)
        window = [y for _, y in points[i - r : i + r + 1]]
        out.append((x, sum(window) / len(window)))
    return out


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About ``count`` steps of round numbers that span a range.

    >>> nice_ticks(0, 9.3)
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    """
    span = (high - low) or 1.0
    exact = span / count
    power = 10 ** math.floor(math.log10(exact))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= exact * 0.8)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(round(i * step, 10)) for i in range(first, max(last, first + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Multiples 1, 2 and 5 of powers of ten inside a range; fewer multiples where they are too many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1, 2, 5), (1, 3), (1,)):
        ticks = [multiple * 10.0**power for power in powers for multiple in multiples]
        inside = [tick for tick in ticks if low * 0.8 <= tick <= high * 1.25]
        if len(inside) <= 7:
            break
    return inside if len(inside) >= 2 else [low, high]
