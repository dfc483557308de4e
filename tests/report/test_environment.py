"""The environment of the pages, the base template and its macros."""

from __future__ import annotations

import subprocess
import sys

import jinja2
import pytest
from helpers.html_page import assert_loads_nothing

from mlx_distill.report.environment import environment

ESTIMATE = {"value": 0.9, "low": 0.876, "high": 0.94, "n": 300}
GAP = {"value": -0.027, "low": -0.05, "high": 0.001, "n": 300}
PAGE = """
{% extends "base.html.j2" %}
{% import "macros.html.j2" as m %}
{% block title %}{{ name }}{% endblock %}
{% block main %}
{% call m.table("Models", ["Model", "Accuracy", "Difference", "Size"], "headline") %}
{% call m.row(m.model("student", "after"), "m-student") %}
{{ m.cell("Accuracy", m.rate(estimate, "Student")) }}
{{ m.cell("Difference", m.forest(gap, "Student", 0.1, margin=0.03, class="open")) }}
{{ m.cell("Size", m.number(2140000 | size, name)) }}
{% endcall %}
{% call m.row(m.model("teacher")) %}
{{ m.cell("Accuracy", m.rate(none, "Teacher")) }}
{{ m.cell("Difference", m.difference(none)) }}
{{ m.cell("Size", m.number(none)) }}
{% endcall %}
{% endcall %}
{% for word in ("better", "non_inferior", "worse", "inconclusive", "met", "missed", "undecided") %}
{{ m.verdict(word) }},
{% endfor %}
{{ m.models_legend(["teacher", "student"]) }}{{ m.legend([("l0", name)]) }}{{ m.note(name) }}{{ m.few() }}
{% call m.folded(name, open=true) %}{{ m.facts("Seeds", {"seed": 3, name: [name]}) }}{% endcall %}
{{ m.matrix({"labels": ["a", name], "counts": [[3, 1, 0], [0, 2, 1]], "n": 7, "left_out": 2}, name, "data") }}
{% endblock %}
"""
MARKUP = "<script>alert(1)</script>\"'>"


def test_every_macro_renders_escaped_markup() -> None:
    html = environment().from_string(PAGE).render(name=MARKUP, estimate=ESTIMATE, gap=GAP)
    page = assert_loads_nothing(html)
    text = page.text.replace("\u202f", " ")
    assert "90.0 % 87.6–94.0" in text
    assert "−2.7 −5.0 to +0.1" in text
    assert "▲ better, ✓ as good, ▼ worse, ? not shown, ✓ met, ✗ missed, ? undecided" in text
    assert "71.4 % of 7 on the diagonal, 2 left out" in text
    assert "alert(1)" in text
    names = [a.get("data-label") for tag, a in page.tags if tag == "td" and a.get("role") == "cell"]
    assert names == ["Accuracy", "Difference", "Size"] * 2
    margin = next(a for tag, a in page.tags if a.get("class") == "margin")
    assert margin["x1"] == margin["x2"] == "35.00%"


def test_a_name_that_is_not_given_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError, match="figurs"):
        environment().from_string("{{ figurs.accuracy }}").render(figures={})
    with pytest.raises(jinja2.UndefinedError, match="acuracy"):
        environment().from_string("{{ figures.acuracy }}").render(figures={"accuracy": 1})
    assert environment().from_string("{{ x }}").render(x=None) == ""


def test_templates_do_not_load_mlx() -> None:
    """A comparison of files is rendered without it."""
    code = "import sys; from mlx_distill.report.environment import environment; environment(); "
    code += "sys.exit('mlx.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
