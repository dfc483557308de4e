"""The Jinja2 environment of all pages: templates under ``assets/report``, the filters that show numbers to
people, and the charts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_distill import text
from mlx_distill.config import ASSETS
from mlx_distill.report import charts
from mlx_distill.report.quantization_section import nats
from mlx_distill.report.tables import AGAINST_TEACHER, DECIMALS
from mlx_distill.run_models import model_class, model_phrase, model_title, run_model

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

FOLDER = ASSETS / "report"

_FILTERS: Mapping[str, Callable[..., Any]] = {
    "counted": text.counted,
    "duration": partial(text.duration, page=True),
    "gigabytes": text.gigabytes,
    "integer": text.integer,
    "interval": text.interval,
    "listed": text.listed,
    "nats": nats,
    "model_class": model_class,
    "model_note": lambda name: run_model(name).note,
    "model_phrase": model_phrase,
    "model_title": model_title,
    "p_value": text.p_value,
    "percent": text.percent,
    "points": text.signed_points,
    "shortened": text.shortened,
    "signed_interval": text.signed_interval,
    "significant": text.significant,
    "size": partial(text.size, page=True),
    "value_text": text.value_text,
    "words": text.words,
}
_CHARTS = (
    charts.axis,
    charts.bar,
    charts.line_chart,
    charts.points_chart,
    charts.stacked,
    charts.strip,
)


@cache
def environment(*folders: Path) -> Environment:
    """The environment: text is escaped, a misspelled name is an error, None is shown as nothing.

    Filters are the functions of :mod:`mlx_distill.text` (``percent``, ``interval``, ``points`` for signed
    percentage points, ``size``, ``duration``, ``p_value``, ...) and the names of models; charts are global
    functions that return SVG.

    Args:
        folders: Folders whose templates come before those of ``assets/report``.

    >>> environment().from_string("{{ x | percent }} of {{ n | counted('row') }}").render(x=0.25, n=4)
    '25.0\u202f% of 4 rows'
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader([*folders, FOLDER]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: "" if value is None else value,
    )
    made.filters |= _FILTERS
    made.globals |= {chart.__name__: chart for chart in _CHARTS}
    made.globals |= {"NONE": text.NONE, "MINUS": text.MINUS, "file_text": _file_text}
    made.globals |= {"AGAINST_TEACHER": AGAINST_TEACHER, "DECIMALS": DECIMALS}
    return made


def render(template: str, **context: Any) -> str:
    """A page from a template under ``assets/report``.

    Control characters of the data, which a page cannot hold, are shown as escapes.

    Args:
        template: The file's name, such as ``comparison.html``.
        context: The template's variables; text among them is escaped unless it is ``markupsafe.Markup``.

    Raises:
        jinja2.UndefinedError: the template names a variable that is not given.
    """
    return text.visible(environment().get_template(template).render(**context))


def _file_text(name: str) -> Markup:
    """The text of a file beside the templates, such as a style sheet, as it is."""
    from markupsafe import Markup

    return Markup((FOLDER / name).read_text(encoding="utf-8"))
