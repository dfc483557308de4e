"""The songs with drawn answers: the probabilities that rows carry are those that answers are drawn from."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from mlx_distill.assets.music import drawn, drawn_fields
from mlx_distill.data.sources import read_source
from mlx_distill.errors import ConfigError
from mlx_distill.graph import graph
from mlx_distill.recipe import SourceConfig, load_recipe
from mlx_distill.tasks.answer import check_answer
from mlx_distill.tasks.task import load_task

POLICIES = {"drawn": "music_drawn", "drawn_fields": "music_drawn_fields"}


def values_of(answer: dict[str, Any]) -> dict[str, str]:
    """The drawn values of an answer, by the names under which rows have their probabilities."""
    themes = dict(zip(("themes[0]", "themes[1]"), answer.get("themes", ()), strict=False))
    digits = dict(zip(("score[0]", "score[1]"), str(answer["score"]), strict=True))
    return {"verdict": answer["verdict"], **digits, **themes}


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_fit_their_task_and_distributions_sum_to_one(policy: str) -> None:
    task = load_task(POLICIES[policy])
    rows = [row for _, row in read_source(SourceConfig(generator="music", policy=policy, count=50, seed=3))]
    for row in rows:
        assert check_answer(row["answer"], task.schema) is None
        assert list(row["probabilities"]["verdict"]) == list(task.labels)
        for name, distribution in row["probabilities"].items():
            assert sum(distribution.values()) == pytest.approx(1)
            assert distribution[values_of(row["answer"])[name]] > 0
    assert rows == [
        row for _, row in read_source(SourceConfig(generator="music", policy=policy, count=50, seed=3))
    ]


def test_answers_are_drawn_from_the_probabilities_of_their_rows() -> None:
    """Per drawn value: the counts of a song's kind against the sum of its rows' probabilities."""
    expected: dict[str, Counter[Any]] = defaultdict(Counter)
    counted: dict[str, Counter[Any]] = defaultdict(Counter)
    variance: dict[str, Counter[Any]] = defaultdict(Counter)
    for row in drawn_fields.generate(4000, seed=5):
        for name, value in values_of(row["answer"]).items():
            counted[name][row["stance"], value] += 1
            for other, p in row["probabilities"][name].items():
                expected[name][row["stance"], other] += p
                variance[name][row["stance"], other] += p * (1 - p)
    off = [
        (counted[name][cell] - expected[name][cell]) / variance[name][cell] ** 0.5
        for name in drawn_fields.VALUES
        for cell in expected[name]
    ]
    assert len(off) == 4 * (4 + 8 + 10 + 8 + 4)
    assert max(map(abs, off)) < 4.5


def test_the_tens_depend_on_the_verdict_and_the_first_form_has_the_same_verdicts() -> None:
    first, second = (drawn_fields.probabilities("faith", "mock", v) for v in drawn.VERDICTS[:2])
    differing = [name for name in first if first[name] != second[name]]
    assert differing == ["score[0]"]
    assert first["verdict"] == drawn.verdict_probabilities("faith", "mock")


def test_the_tables_are_those_of_the_measured_figures() -> None:
    """The figures under docs/ belong to these numbers: another order of draws would be another task."""
    row = next(drawn_fields.generate(1, seed=31, part="test"))
    assert row["lyrics"] == "I roll my eyes at the needle and move along\nlong ago I laugh at gin"
    assert row["answer"] == {"verdict": "ACCEPTABLE", "score": 85, "themes": ["intoxication", "joy"]}
    known = row["probabilities"]
    assert known["verdict"]["ACCEPTABLE"] == pytest.approx(0.7718499706)
    assert known["score[0]"]["8"] == pytest.approx(0.3527988539)
    assert known["themes[1]"]["joy"] == pytest.approx(0.6164174244)
    rows = list(drawn.generate(1000, seed=31, part="test"))
    bayes = sum(max(row["probabilities"]["verdict"].values()) for row in rows) / len(rows)
    assert bayes == pytest.approx(0.6899, abs=5e-4)


def test_an_unknown_policy_and_noise_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no policy 'drwan'.*drawn"):
        next(read_source(SourceConfig(generator="music", policy="drwan")))
    with pytest.raises(ConfigError, match="no policy 'drawn'"):
        next(read_source(SourceConfig(generator="moderation", policy="drawn")))
    with pytest.raises(ConfigError, match="noise"):
        next(read_source(SourceConfig(generator="music", policy="drawn", noise=0.1)))


def test_the_stage_key_holds_every_module_that_draws() -> None:
    sources = [{"generator": "music", "policy": "drawn_fields", "count": 9}]
    raw = {"data.sources": sources, "task": "music_drawn_fields"}
    recipe = load_recipe("tiny", raw)
    data = next(stage for stage in graph(recipe, recipe.load_task()) if stage.name == "data")
    assert {Path(path).name for path in data.inputs} == {"generator.py", "drawn.py", "drawn_fields.py"}


def test_rows_keep_their_probabilities_through_prepare() -> None:
    from mlx_distill.data.rows import to_example

    task = load_task("music_drawn")
    row = next(drawn.generate(1))
    example = to_example(row, task, "x:1")
    assert example.fields["probabilities"] == row["probabilities"]
    assert json.loads(json.dumps(dict(example.fields)))["probabilities"] == row["probabilities"]
