"""Prices of calls, tokens, trainings and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlx_distill.errors import ConfigError
from mlx_distill.evaluate.costs import (
    ErrorPrice,
    Prices,
    break_even,
    costs_of,
    error_cost,
    read_prices,
)
from mlx_distill.tasks.task import Task

PRICES = """
date: 2026-11-27
currency: EUR
hardware: {price: 4000, watts: 60, electricity: 0.30, lifetime_years: 4, hours_per_day: 8}
replaces:
  - {name: an API, input: 2.5, output: 10}
  - {name: the old analyzer, a_call: 0.0001}
label_a_row: 0.05
errors: {false_positive: 10, false_negative: 1}
calls: 10000
"""


def prices(tmp_path: Path, text: str = PRICES) -> Prices:
    path = tmp_path / "costs.yaml"
    path.write_text(text, encoding="utf-8")
    return read_prices(path)


def task() -> Task:
    schema = {"type": "object", "properties": {"kind": {"enum": ["good", "bad"]}}}
    return Task("t", system="", user="{text}", schema=schema, label="kind", positive=("good",))


def row(truth: str, label: str | None) -> dict[str, Any]:
    return {"truth": {"kind": truth}, "label": label, "answer": label and {"kind": label}}


def test_a_call_costs_electricity_and_wear(tmp_path: Path) -> None:
    figures = {"items_per_minute": 30, "prompt_tokens": 400.0, "tokens": 100.0}
    costs = costs_of(
        prices(tmp_path),
        {"quantized": figures},
        stages={"teach": 3600, "other": 60},
        needs={"quantized": ["teach"]},
        labelled_rows=1000,
    )
    call = costs["models"]["quantized"]["call"]
    electricity = 60 * 2 / 3.6e6 * 0.30
    wear = 4000 * 2 / (4 * 365.25 * 8 * 3600)
    assert call["electricity"] == pytest.approx(electricity, rel=1e-12)
    assert call["total"] == pytest.approx(electricity + wear, rel=1e-12)
    assert call["million_tokens"] == pytest.approx(2000 * call["total"], rel=1e-12)
    hour = 60 * 3600 / 3.6e6 * 0.30 + 4000 / (4 * 365.25 * 8)
    assert costs["stages"]["teach"]["total"] == pytest.approx(hour, rel=1e-12)
    assert costs["models"]["quantized"]["fixed"] == pytest.approx(hour + 50.0, rel=1e-12)
    assert costs["fixed"]["total"] == pytest.approx(hour * 61 / 60 + 50.0, rel=1e-12)
    replaced = costs["models"]["quantized"]["replaced"]
    assert replaced["an API"] == pytest.approx((400 * 2.5 + 100 * 10) / 1e6)
    calls = costs["models"]["quantized"]["break_even"]
    assert calls["an API"] == pytest.approx((hour + 50) / (0.002 - call["total"]), rel=1e-9)
    assert calls["the old analyzer"] is None  # cheaper than a call of ours: never paid back


def test_what_was_not_measured_has_no_price(tmp_path: Path) -> None:
    costs = costs_of(prices(tmp_path), {"student": {"items_per_minute": None, "latency_s": None}})
    assert costs["models"]["student"]["call"] is None
    assert costs["models"]["student"]["break_even"] == {}
    assert costs["models"]["student"]["replaced"]["an API"] is None
    one = costs_of(prices(tmp_path), {"student": {"latency_s": 3.0}})["models"]["student"]
    assert one["call"]["seconds"] == 3.0
    assert one["break_even"] == {}  # what it cost once is not known
    assert one["call"]["million_tokens"] is None


def test_equal_prices_are_never_paid_back() -> None:
    assert break_even(10.0, 0.5, 0.5) is None
    assert break_even(0.0, 0.1, 0.5) == 0.0


def test_errors_are_valued_by_the_interval_of_the_paired_difference(tmp_path: Path) -> None:
    # A: 3 false positives; B: 1 false positive and 1 false negative, the invalid answer to a good row.
    a = [row("bad", "good")] * 3 + [row("good", "good")] * 37
    b = [row("bad", "bad")] * 2 + [row("bad", "good"), row("good", None)] + [row("good", "good")] * 36
    result = error_cost(a, b, task(), prices(tmp_path))
    assert result is not None
    assert (result["a"], result["b"]) == (pytest.approx(30 / 40), pytest.approx(11 / 40))
    difference = result["difference"]
    assert difference["value"] == pytest.approx(-19 / 40 * 10_000)
    assert difference["low"] < difference["value"] < difference["high"]
    swapped = error_cost(b, a, task(), prices(tmp_path))
    assert swapped is not None
    assert swapped["difference"]["low"] == pytest.approx(-difference["high"])


def test_errors_without_a_price_are_not_valued(tmp_path: Path) -> None:
    free = Prices(date="2026-11-27", currency="EUR", errors=ErrorPrice())
    assert error_cost([row("bad", "good")], [row("bad", "bad")], task(), free) is None
    with pytest.raises(ConfigError, match="no positive classes"):
        error_cost([], [], Task("t", "", "{x}", {"properties": {}}), prices(tmp_path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("date: soon", "no date"),
        ("replaces: [{name: x}]", "a price a call, or prices"),
        ("replaces: [{name: x, a_call: 1, input: 1, output: 1}]", "a price a call, or prices"),
        ("replaces: [{name: x, a_call: 1}, {name: x, a_call: 2}]", "occurs twice"),
        ("hardware: {price: -1, watts: 60, electricity: 0.3}", "price"),
        ("pricing: 3", "unknown key 'pricing'"),
    ],
)
def test_a_file_that_is_wrong_is_refused(tmp_path: Path, line: str, message: str) -> None:
    key = line.partition(":")[0]
    base = {"date": "date: 2026-11-27", "currency": "currency: EUR"}
    text = "\n".join(value for name, value in base.items() if name != key) + "\n" + line + "\n"
    with pytest.raises(ConfigError, match=message):
        prices(tmp_path, text)
