"""The commands of jobs, with a run on the packaged tiny model."""

from __future__ import annotations

import json
from typing import Any

import pytest
from helpers.chat_run import write_recipe

from mlx_distill.cli import cli
from mlx_distill.cli.jobs import check_command
from mlx_distill.jobs import events, get, list_jobs
from mlx_distill.ledger.database import Ledger
from mlx_distill.registry import list_models
from mlx_distill.registry.figures import figures_of, main_figure
from mlx_distill.running_costs import cost_report


@pytest.fixture
def call(ledger: Ledger, runner: Any) -> Any:
    """Call a command of jobs with this ledger's root."""

    def invoke(*arguments: str, code: int = 0) -> str:
        name, *rest = arguments
        result = runner.invoke(cli, ["jobs", name, "--root", str(ledger.root.path), *rest])
        assert result.exit_code == code, (result.output, result.exception)
        return str(result.output)

    return invoke


def test_an_empty_list_says_what_to_do(call: Any) -> None:
    assert "jobs submit run RECIPE" in call("list")
    assert json.loads(call("list", "--json")) == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("submit", "analyze", "x"), "'analyze' cannot be a job"),
        (("submit", "run", "no-such-recipe"), "no-such-recipe"),
        (("submit", "run", "tiny", "--no-such-option"), "no-such-option"),
        (("submit", "run", "tiny", "--out", "../outside"), "not under the root"),
        (("list", "--state", "runing"), "running"),
        (("show", "job-0"), "no job 'job-0'"),
        (("resume", "job-0"), "no job 'job-0'"),
    ],
)
def test_what_cannot_work_is_refused_at_once(
    call: Any, ledger: Ledger, arguments: tuple[str, ...], text: str
) -> None:
    assert text in call(*arguments, code=2)
    assert list_jobs(ledger) == []


def test_a_job_knows_the_recipe_that_it_was_started_from(tmp_path: Any) -> None:
    write_recipe(tmp_path)
    sets = ["teach.learning_rate=0.001"]
    arguments = ["recipe.yaml", "--set", *sets]
    run_path, asked = check_command("run", arguments, tmp_path)
    assert run_path == "runs/chats" and asked is not None
    assert (asked["from"], asked["set"]) == ("file:recipe.yaml", sets)
    assert asked["recipe"]["teach"]["learning_rate"] == 0.001
    run_path, asked = check_command("run", ["tiny", "--out", "x"], tmp_path)
    assert (run_path, asked and asked["from"]) == ("x", "recipe:tiny")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert check_command("run", ["../recipe.yaml"], elsewhere) == ("runs/chats", None)
    assert check_command("compare", ["a", "b"], tmp_path) == (None, None)


@pytest.mark.slow
def test_a_run_is_submitted_watched_and_registered(call: Any, ledger: Ledger) -> None:
    write_recipe(ledger.root.path)
    submitted = json.loads(call("submit", "--json", "run", "recipe.yaml"))
    assert submitted["state"] == "running" and submitted["run_path"] == "runs/chats"
    second = json.loads(call("submit", "--json", "--title", "later", "run", "recipe.yaml", "--out", "runs/b"))
    assert second["state"] == "queued"
    call("pause", second["id"])
    watched = call("watch", submitted["id"])
    assert "stage_made" in watched and watched.strip().splitlines()[-1].split()[1] == "succeeded"
    job = get(ledger, submitted["id"])
    assert job.result == {"path": "runs/chats", "version": "chats:1"}
    (model,) = list_models(ledger)
    figures = figures_of(model.versions[0].info)  # of a recipe without a task
    assert model.name == "chats" and list(figures)[:3] == ["loss", "perplexity", "token_accuracy"]
    assert [figure["unit"] for figure in figures.values()][:3] == ["nats/token", "1", "share"]
    assert main_figure(model.versions[0].info).startswith("loss ")
    assert cost_report(ledger, None).total.seconds > 0
    assert not [event for event in events(ledger, job.id) if event.level != "info"]
    shown = call("show", job.id)
    assert "version: chats:1" in shown and str(job.log(ledger.root)) in shown
    assert "paused" in call("list") and "later" in call("list", "--state", "paused")
    call("cancel", second["id"])
    assert json.loads(call("show", second["id"], "--json"))["state"] == "cancelled"
