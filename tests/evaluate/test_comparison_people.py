"""Costs, ratings and a judge in a comparison."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from mlx_distill.comparisons import compare
from mlx_distill.errors import ConfigError
from mlx_distill.evaluate.costs import read_prices
from mlx_distill.report.comparison_page import render_comparison
from tests.helpers.comparison_files import make_answers, make_rows, write_lines, write_task

DOCS = Path(__file__).parents[2] / "docs" / "costs.md"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Two models on 60 rows: A is wrong on rows 0 to 5, B on row 1."""
    rows = make_rows(60)
    timed = {"latency_s": 2.0, "tokens": 20, "prompt_tokens": 180}
    return {
        "a": write_lines(tmp_path / "a.jsonl", make_answers(rows, range(6), **timed)),
        "b": write_lines(tmp_path / "b.jsonl", make_answers(rows, [1])),
        "rows": write_lines(tmp_path / "rows.jsonl", rows),
        "task": write_task(tmp_path),
        "costs": tmp_path / "costs.yaml",
        "ratings": tmp_path / "ratings.csv",
    }


def test_the_prices_of_the_documentation_are_read(tmp_path: Path) -> None:
    text = DOCS.read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    (tmp_path / "costs.yaml").write_text(text, encoding="utf-8")
    prices = read_prices(tmp_path / "costs.yaml")
    assert prices.date == "2026-11-27"
    assert prices.errors.false_positive == yaml.safe_load(text)["errors"]["false_positive"]


def test_costs_and_ratings_are_in_the_result_and_on_the_page(files: dict[str, Path]) -> None:
    text = DOCS.read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    files["costs"].write_text(text, encoding="utf-8")
    files["ratings"].write_text("id,model,rating\nr1,a,2\nr1,b,4\nr2,a,5\nr2,b,5\n", encoding="utf-8")
    result = compare(
        files["a"],
        files["b"],
        files["task"],
        files["rows"],
        costs=files["costs"],
        ratings=files["ratings"],
        out=(),
    )
    facts = json.loads(json.dumps(result.to_dict()))
    # A: rows 1, 3 and 5 are dark in truth and said to be light; rows 0, 2 and 4 the reverse. B: row 1.
    assert facts["costs"]["errors"]["a"] == pytest.approx((3 * 10 + 3 * 2) / 60)
    assert facts["costs"]["errors"]["b"] == pytest.approx(2 / 60)
    assert facts["costs"]["errors"]["difference"]["value"] == pytest.approx(-34 / 60 * 10_000)
    assert (facts["ratings"]["win"], facts["ratings"]["tie"], facts["ratings"]["loss"]) == (1, 1, 0)
    lines = "\n".join(result.lines())
    assert "cost of B: its speed was not measured" in lines
    assert "B wins 1, ties 1, loses 0 of 2 rows" in lines
    page = render_comparison(result.facts, result.cases)
    assert 'id="costs"' in page and 'id="people"' in page
    assert "B wins 1, ties 1, loses 0 of 2 rows" in page
    without = compare(files["a"], files["b"], files["task"], files["rows"])
    assert 'id="costs"' not in render_comparison(without.facts, without.cases)


def test_a_judge_without_people_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    with pytest.raises(ConfigError, match="how far the judge is right is not known"):
        compare(nowhere, nowhere, judge="some/model")
    with pytest.raises(ConfigError, match="--judgements: no judge"):
        compare(nowhere, nowhere, judgements="human.csv")
