"""Figures of a model in training: they choose the weights and the end of a training, and leave no trace."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from helpers.training_cases import run_case, same, steps_of

from mlx_distill.errors import ConfigError, Interrupted
from mlx_distill.runtime import StopFlag, random_key
from mlx_distill.train.validation import measure_answers

EVERY_STEP = {"method": "full", "evaluate_every": 1, "evaluate_rows": 1}


def scripted(name: str, *values: float | None) -> Callable[[Any], Mapping[str, float | None]]:
    """A measure that gives these values one after the other."""
    given = iter(values)
    return lambda model: {name: next(given)}


def of_weights(model: Any) -> Mapping[str, float | None]:
    """A measure of the weights that leaves all the traces that it can."""
    assert not model.training
    value = float(mx.abs(model.model.up_proj.weight).sum().item())
    mx.random.normal((9,)).tolist()
    model.train()
    return {"accuracy": -value, "score_mae": value, "perplexity": None, "json_valid": float("nan")}


@pytest.mark.parametrize(("metric", "best"), [("accuracy", 2), ("score_mae", 1), ("perplexity", 1)])
def test_the_best_value_is_the_highest_or_the_lowest(tmp_path: Path, metric: str, best: int) -> None:
    case = {**EVERY_STEP, "steps": 4, "best_metric": metric}
    _, result = run_case(tmp_path, case, measure=scripted(metric, 0.3, 0.6, 0.6, 0.5))
    rows = steps_of(tmp_path)
    assert [row[f"valid_{metric}"] for row in rows] == [0.3, 0.6, 0.6, 0.5]
    assert (result.best_step, result.best_value) == (best, [0.3, 0.6][best - 1])
    assert result.best_loss == rows[best - 1]["valid_loss"]
    state = json.loads((tmp_path / "checkpoints" / "best" / "state.json").read_text())
    assert state["step"] == best and state[f"valid_{metric}"] == result.best_value


def test_patience_and_the_weights_go_by_the_metric(tmp_path: Path) -> None:
    """The validation loss falls at each step, so by the loss neither would be as it is here."""
    case = {**EVERY_STEP, "steps": 7, "best_metric": "accuracy", "patience": 3, "use_best": True}
    values = (0.5, 0.7, 0.7, 0.6, 0.2, 0.9, 0.9)
    weights, result = run_case(tmp_path / "a", case, measure=scripted("accuracy", *values))
    losses = [row["valid_loss"] for row in steps_of(tmp_path / "a")]
    assert losses == sorted(losses, reverse=True)
    assert (result.stopped_early, result.steps, result.best_step) == (True, 5, 2)
    flag = StopFlag()
    with pytest.raises(Interrupted):
        hooks = [lambda row: setattr(flag, "set", row["step"] == 2)]
        run_case(tmp_path / "b", case, measure=scripted("accuracy", *values), stop=flag, hooks=hooks)
    at_two = dict(mx.load(str(tmp_path / "b" / "checkpoints" / "step-00000002" / "trainable.safetensors")))
    assert same(weights, at_two)


def test_measuring_changes_nothing_else_and_a_resumed_training_measures_the_same(tmp_path: Path) -> None:
    """The best value lies before the interruption, so that it must come out of the checkpoint."""
    case = {**EVERY_STEP, "evaluate_every": 2, "best_metric": "score_mae"}
    whole, result = run_case(tmp_path / "whole", case, measure=of_weights)
    plain, _ = run_case(tmp_path / "plain", {**case, "evaluate_rows": 0, "best_metric": "loss"})
    assert same(whole, plain)
    rows = steps_of(tmp_path / "whole")
    measured = ["valid_accuracy", "valid_score_mae"]
    without = [{k: v for k, v in row.items() if k not in measured} for row in rows]
    assert without == steps_of(tmp_path / "plain")
    assert [row["step"] for row in rows if "valid_accuracy" in row] == [2, 4, 6, 7]
    flag = StopFlag()
    with pytest.raises(Interrupted, match="step 5 of"):
        hooks = [lambda row: setattr(flag, "set", row["step"] == 5)]
        run_case(tmp_path / "cut", case, measure=of_weights, stop=flag, hooks=hooks)
    again, resumed = run_case(tmp_path / "cut", case, measure=of_weights)
    assert resumed.resumed == 5 and same(again, whole) and steps_of(tmp_path / "cut") == rows
    assert (resumed.best_step, resumed.best_value) == (result.best_step, result.best_value)
    assert result.best_step == 2


def test_a_checkpoint_of_an_older_version_went_by_the_loss(tmp_path: Path) -> None:
    case = {"method": "full", "evaluate_every": 1, "steps": 2}
    _, first = run_case(tmp_path, case)
    path = tmp_path / "checkpoints" / "step-00000002" / "state.json"
    state = json.loads(path.read_text())
    assert state["run"].pop("best_value") == first.best_loss
    path.write_text(json.dumps(state))
    assert run_case(tmp_path, case)[1].best_value == first.best_loss


def test_a_best_metric_that_is_not_measured_is_refused(tmp_path: Path) -> None:
    case = {**EVERY_STEP, "best_metric": "json_valid"}
    with pytest.raises(ConfigError, match="best_metric: json_valid is not measured"):
        run_case(tmp_path, case, measure=of_weights)


def test_figures_that_are_no_numbers_are_left_out_and_the_random_state_stays(tmp_path: Path) -> None:
    from helpers.tiny_model import make_model

    model, key = make_model(dropout=0.5), random_key()
    model.train()
    assert measure_answers(model, of_weights).keys() == {"accuracy", "score_mae"}
    assert model.training and random_key() == key
    model.eval()
    measure_answers(model, of_weights)
    assert not model.training
