"""Charts of one quantity against another, as inline SVG: learning curves, reliability, risk and coverage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from markupsafe import Markup

from mlx_distill.report.charts import nice_ticks
from mlx_distill.report.svg import element
from mlx_distill.text import percent, significant

_Scale = Callable[[float], float]
_WIDTH, _HEIGHT = 460, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 10, 40


class Axis(NamedTuple):
    """The range of an axis, its title, and whether its numbers are shares."""

    low: float
    high: float
    title: str
    is_share: bool = True

    def text(self, value: float) -> str:
        """A number of this axis for people."""
        return percent(value, 1) if self.is_share else significant(value, 4)

    @property
    def ticks(self) -> list[float]:
        """Round numbers within the range."""
        slack = 1e-9 * (self.high - self.low)
        return [t for t in nice_ticks(self.low, self.high) if self.low - slack <= t <= self.high + slack]


class Series(NamedTuple):
    """A named series: its points (x, y) by rising x, ends of an interval of y for each (or none), and whether
    points are joined and marked.
    """

    class_: str
    name: str
    points: Sequence[tuple[float, float]]
    intervals: Sequence[tuple[float, float]] = ()
    joined: bool = True
    marked: bool = True


def xy_chart(
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    label: str,
    *,
    band: Sequence[tuple[float, float, float]] = (),
    diagonal: bool = False,
    level: float | None = None,
) -> Markup:
    """Series of points with intervals.

    Args:
        series: What is drawn; points outside the axes are drawn at their ends.
        x, y: The axes.
        label: Alternative text of the chart.
        band: (x, low, high) of a shaded band.
        diagonal: Draw the line y = x.
        level: Draw a horizontal line at this y.
    """

    def left(value: float) -> float:
        share = (min(max(value, x.low), x.high) - x.low) / (x.high - x.low)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def top(value: float) -> float:
        share = (min(max(value, y.low), y.high) - y.low) / (y.high - y.low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    marks = [*_axes(x, y, left, top)]
    if band:
        above = [f"{left(at):.1f},{top(high):.1f}" for at, _, high in band]
        below = [f"{left(at):.1f},{top(low):.1f}" for at, low, _ in reversed(band)]
        marks.append(element("polygon", points=" ".join(above + below), class_="band"))
    if diagonal:
        low, high = max(x.low, y.low), min(x.high, y.high)
        ends = {"x1": left(low), "y1": top(low), "x2": left(high), "y2": top(high)}
        marks.append(element("line", **{k: f"{v:.1f}" for k, v in ends.items()}, class_="margin"))
    if level is not None:
        at = f"{top(level):.1f}"
        marks.append(element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=at, y2=at, class_="margin"))
    for one in series:
        marks.append(_series(one, x, y, left, top))
    return element(
        "svg", marks, class_="lines", viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=label
    )


def _axes(x: Axis, y: Axis, left: _Scale, top: _Scale) -> list[Markup]:
    marks = []
    for value in y.ticks:
        at = f"{top(value):.1f}"
        number = _number(value, y)
        marks.append(element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=at, y2=at, class_="grid"))
        marks.append(element("text", number, x=_LEFT - 7, y=f"{top(value) + 3.5:.1f}", text_anchor="end"))
    for value in x.ticks:
        at = f"{left(value):.1f}"
        marks.append(element("text", _number(value, x), x=at, y=_HEIGHT - _BOTTOM + 15, text_anchor="middle"))
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    titles = {"x": f"{middle:.0f}", "y": _HEIGHT - 5, "text_anchor": "middle", "class_": "unit"}
    return [*marks, element("text", f"{x.title} → · {y.title} ↑", **titles)]


def _number(value: float, axis: Axis) -> str:
    return f"{100 * value:g}" if axis.is_share else f"{value:,.6g}"


def _series(one: Series, x: Axis, y: Axis, left: _Scale, top: _Scale) -> Markup:
    drawn = []
    if one.joined and len(one.points) > 1:
        points = " ".join(f"{left(a):.1f},{top(b):.1f}" for a, b in one.points)
        drawn.append(element("polyline", points=points, class_="curve"))
    for (a, _), (low, high) in zip(one.points, one.intervals, strict=False):
        at = f"{left(a):.1f}"
        drawn.append(
            element("line", x1=at, x2=at, y1=f"{top(low):.1f}", y2=f"{top(high):.1f}", class_="range")
        )
    if one.marked:
        for i, (a, b) in enumerate(one.points):
            ends = (
                f", {y.text(one.intervals[i][0])} to {y.text(one.intervals[i][1])}" if one.intervals else ""
            )
            title = f"{one.name}: {y.title} {y.text(b)}{ends} at {x.title} {x.text(a)}"
            dot = {"cx": f"{left(a):.1f}", "cy": f"{top(b):.1f}", "r": 3.2, "class_": "mark"}
            drawn.append(element("circle", element("title", title), **dot))
    return element("g", drawn, class_=one.class_)


def dots(class_: str, name: str, values: Sequence[float | None], low: float, high: float) -> Markup:
    """Values as dots on one axis, such as the folds of a cross-validation."""
    shown = [(i, value) for i, value in enumerate(values, 1) if value is not None]
    marks = [
        element(
            "circle",
            element("title", f"{name} {i}: {percent(value)}"),
            cx=f"{100 * min(1.0, max(0.0, (value - low) / (high - low))):.2f}%",
            cy=8,
            r=4,
            class_="dot",
        )
        for i, value in shown
    ]
    text = "; ".join(f"{name} {i} {percent(value)}" for i, value in shown)
    return element(
        "svg",
        element("line", x1=0, x2="100%", y1=8, y2=8, class_="grid"),
        element("g", marks, class_=class_),
        class_="strip",
        width="100%",
        height=16,
        role="img",
        aria_label=text or "not measured",
        focusable="false",
    )
