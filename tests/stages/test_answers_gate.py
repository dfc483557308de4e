"""The gate behind targets: what it says of each kind of bad answers, and how a run stops there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers.small_chain import finished
from helpers.small_run import TASK

from mlx_distill.cli.main import cli
from mlx_distill.distill.answer_check import FACT, AnswerCheck, joined
from mlx_distill.errors import QualityGateError
from mlx_distill.infer.engine import Generation
from mlx_distill.pipeline import run
from mlx_distill.recipe import load_recipe
from mlx_distill.stages.answers_gate import gate_error, gate_text
from mlx_distill.tasks.task import parse_task

GOOD = '{"colour": "yes"}'


def check(*answers: tuple[str, str], data_tokens: int | None = None) -> dict[str, Any]:
    """The facts of a targets stage whose answers are these texts, each with how it ended."""
    counts = AnswerCheck()
    for i, (text, finish) in enumerate(answers):
        counts.add(f"r{i}", Generation(text, (1,) * 12, 9, finish, 0.1), TASK["schema"], data_tokens)
    return {FACT: joined([counts.to_dict()])}


def error(facts: dict[str, Any], *overrides: str) -> QualityGateError | None:
    recipe = load_recipe("tiny", overrides)
    return gate_error(recipe, parse_task(TASK, "task"), facts, {"steps": 5})


@pytest.mark.parametrize(
    ("bad", "data_tokens", "words", "fix"),
    [
        (("the the", "stop"), None, ["not JSON", "r1", "the the"], "teach.epochs or teach.steps"),
        (("", "stop"), None, ["not JSON", "(empty)"], "targets.text: data"),
        (('{"colour": "maybe"}', "stop"), None, ["'maybe' is not one of"], "correct the task's schema"),
        (
            ('{"colour": "y', "length"),
            30,
            ["cut after 12 tokens"],
            "which is 12: the rows' own answers have up to 30",
        ),
        (("the the", "length"), 6, ["cut after 12 tokens"], "train the teacher longer (it had 5 steps)"),
        (("the the", "length"), None, ["cut after 12 tokens"], "or raise max_answer_tokens of the task"),
    ],
)
def test_the_error_has_the_share_an_example_its_reason_and_the_fix(
    bad: tuple[str, str], data_tokens: int | None, words: list[str], fix: str
) -> None:
    found = error(check((GOOD, "stop"), bad, bad, data_tokens=data_tokens))
    assert found is not None and found.exit_code == 3 and found.fix is not None
    assert "1 of 3 answers" in found.message and all(text in found.message for text in words)
    assert fix in found.fix and "--force" in found.fix and "force=True" in found.fix
    assert found.facts["share"] == pytest.approx(1 / 3) and found.facts["rows"] == 3


def test_longer_answers_are_no_fix_where_the_rows_own_answers_fit() -> None:
    facts = check(("the the", "length"), ("the the", "length"), data_tokens=6)
    twice = {FACT: joined([facts[FACT], facts[FACT]])}
    assert twice[FACT]["reasons"]["cut"]["data_fits"] == 4
    found = error(twice)
    assert found is not None and "max_answer_tokens" not in (found.fix or "")


def test_rows_without_thinking_are_no_reason_why_answers_do_not_fit() -> None:
    counts = AnswerCheck()
    cut = Generation("", (1,) * 12, 9, "length", 0.1, answer_start=12)
    counts.add("r0", cut, TASK["schema"], None)
    for _ in range(3):
        counts.leave_out("r1", GOOD, "no thinking before the answer")
    found = error({FACT: joined([counts.to_dict()])})
    assert found is not None and "Mostly: thinking did not end (1), such as row r0" in found.message
    assert "targets.max_thinking_tokens" in (found.fix or "")


def test_an_answer_behind_thinking_is_held_against_the_rows_own_without_it() -> None:
    counts = AnswerCheck()
    cut = Generation('{"colour": "y', (1,) * 32, 9, "length", 0.1, answer_start=20)
    counts.add("r0", cut, TASK["schema"], 15)
    assert (counts.reasons["cut"]["data_longer"], counts.reasons["cut"]["data_tokens"]) == (1, 15)
    assert "cut after 12 tokens" in counts.reasons["cut"]["error"]


def test_the_fix_names_the_option_that_has_an_effect() -> None:
    found = error(check(("the", "stop")), "teach.steps=9")
    assert found is not None and "teach.steps, teach.learning_rate" in (found.fix or "")
    assert "teach.epochs" not in (found.fix or "")


def test_enough_valid_answers_no_limit_or_no_counts_pass() -> None:
    half = check((GOOD, "stop"), ("the", "stop"))
    assert error(half) is None and error(check(("the", "stop")), "targets.min_valid=0") is None
    assert error({}) is None  # of a run made before answers were counted, or with the data's own text


def test_the_plan_names_the_gate() -> None:
    recipe = load_recipe("tiny")
    wanted = gate_text(recipe)
    assert wanted is not None and "targets.min_valid" in wanted
    assert (gate_text(recipe, check((GOOD, "stop"))) or "").endswith("passed with 100\u202f%")
    assert "FAILED" in (gate_text(recipe, check(("the", "stop"))) or "")
    for override in ("targets.text=data", "targets.min_valid=0"):
        assert gate_text(load_recipe("tiny", [override])) is None


@pytest.mark.slow
def test_a_run_stops_at_the_gate_with_its_targets_made_and_force_goes_on(run_copy: Path) -> None:
    """The teacher of the small run has learnt nothing in five steps."""
    recipe, strict = str(finished() / "recipe.yaml"), "targets.min_valid=0.5"
    made: list[str] = []

    def note(event: dict[str, Any]) -> None:
        if event["event"] == "stage_made":
            made.append(event["stage"])

    for only in (None, "targets"):  # the finished run is current, and its gate is checked again
        with pytest.raises(QualityGateError, match=r"0 of \d+ answers") as caught:
            run(recipe, run_copy, overrides=[strict], only=only, events=note)
        assert caught.value.facts["valid"] == 0 and not made
    run(recipe, run_copy, overrides=[strict], force=True, events=note)
    assert not made  # the option is in no stage's key

    arguments = ["targets", recipe, "--out", str(run_copy), "--set", strict]
    stopped = CliRunner().invoke(cli, arguments)
    assert stopped.exit_code == 3 and "fix: train the teacher longer" in stopped.stderr
    forced = CliRunner().invoke(cli, [*arguments, "--force"])
    assert forced.exit_code == 0 and "going on, as asked" in forced.stderr, forced.stderr
    plan = CliRunner().invoke(cli, [*arguments, "--dry-run", "--json"])
    stages = json.loads(plan.stdout)["stages"]
    assert ["FAILED" in (stage["gate"] or "") for stage in stages].count(True) == 1
