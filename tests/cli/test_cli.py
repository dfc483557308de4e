"""The command line through its entry point: output, error output and exit codes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from mlx_distill import __version__
from mlx_distill.cli import cli
from mlx_distill.cli.main import COMMANDS, Commands, explain
from mlx_distill.errors import ConfigError, DataError, Interrupted
from mlx_distill.recipe import load_recipe, recipe_names
from mlx_distill.tasks.task import Task, task_names

PUBLIC = """
    demo run prepare convert teach targets distill quantize evaluate validate compare analyze export inspect
    doctor recipes data costs ledger jobs registry serve
""".split()


def _fails_with(error: BaseException) -> click.Group:
    """The command line with one command that fails."""

    class Failing(Commands):
        def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
            @click.command()
            def fail() -> None:
                raise error

            return fail

    return Failing(params=[click.Option(["--debug"], is_flag=True)])


def test_every_public_command_has_help(runner: Any) -> None:
    assert set(COMMANDS) == set(PUBLIC)
    for name in COMMANDS:
        result = runner.invoke(cli, [name, "--help"])
        assert result.exit_code == 0, result.output
        assert "Usage:" in result.output


def test_help_lists_commands_in_the_order_of_a_run(runner: Any) -> None:
    lines = [
        line.split()[0]
        for line in runner.invoke(cli, ["--help"]).stdout.split("Commands:")[1].splitlines()
        if line.strip()
    ]
    assert lines == list(COMMANDS)


def test_help_lines_are_not_cut_off(runner: Any) -> None:
    assert "..." not in runner.invoke(cli, ["--help"]).stdout.split("Commands:")[1]


def test_version(runner: Any) -> None:
    assert runner.invoke(cli, ["--version"]).stdout.split()[-1] == __version__


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (
            DataError("a.jsonl:3: no assistant turn", fix="drop the row"),
            1,
            ["error: a.jsonl:3: no assistant turn", "fix: drop the row"],
        ),
        (ConfigError("r.yaml: unknown key 'x'"), 2, ["error: r.yaml: unknown key 'x'"]),
        (
            Interrupted("stopped at step 7", fix="run it again"),
            130,
            ["error: stopped at step 7", "fix: run it again"],
        ),
        (
            KeyboardInterrupt(),
            130,
            ["error: interrupted", "fix: the same command continues where it stopped"],
        ),
        (DataError("two\nlines"), 1, ["error: two lines"]),
    ],
)
def test_an_error_is_two_lines_and_an_exit_code(
    runner: Any, error: BaseException, code: int, lines: list[str]
) -> None:
    result = runner.invoke(_fails_with(error), ["fail"])
    assert result.exit_code == code
    assert result.stderr.splitlines() == lines
    assert result.stdout == ""


def test_full_disk_is_explained(runner: Any) -> None:
    result = runner.invoke(
        _fails_with(OSError(28, "No space left on device", "out/model.safetensors")), ["fail"]
    )
    assert result.exit_code == 1
    assert result.stderr.startswith(
        "error: out/model.safetensors: no space left on device\nfix: free some space"
    )


def test_unexpected_error_has_no_traceback_unless_debug(runner: Any) -> None:
    error = RuntimeError("boom\nbang")
    result = runner.invoke(_fails_with(error), ["fail"])
    assert (result.exit_code, result.stderr.splitlines()[0]) == (
        1,
        "error: unexpected RuntimeError: boom bang",
    )
    assert runner.invoke(_fails_with(error), ["--debug", "fail"]).exception is error


def test_debug_may_follow_the_command(runner: Any) -> None:
    assert runner.invoke(cli, ["recipes", "show", "nope"]).exit_code == 2
    for arguments in (["--debug", "recipes", "show", "nope"], ["recipes", "show", "nope", "--debug"]):
        assert isinstance(runner.invoke(cli, arguments).exception, ConfigError)


def test_missing_package_points_to_doctor() -> None:
    message, fix, code = explain(ModuleNotFoundError("No module named 'scipy'", name="scipy"))
    assert (message, code) == ("the package 'scipy' is not installed", 1)
    assert fix is not None
    assert "doctor" in fix


def test_shells_complete_commands_and_options(runner: Any) -> None:
    def completions(line: str) -> list[str]:
        words = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        shell = {"_MLX_DISTILL_COMPLETE": "bash_complete", **words}
        result = runner.invoke(cli, env=shell, prog_name="mlx-distill")
        return [entry.partition(",")[2] for entry in result.stdout.splitlines()]

    assert completions("mlx-distill an") == ["analyze"]
    assert "--max-prompt-tokens" in completions("mlx-distill analyze --max")
    script = runner.invoke(cli, env={"_MLX_DISTILL_COMPLETE": "zsh_source"}, prog_name="mlx-distill").stdout
    assert script.startswith("#compdef mlx-distill")


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["run", "tiny", "--nope"],
        ["nope"],
        ["export", "a", "b", "--to", "gguf"],
        ["analyze", "m"],
    ],
)
def test_usage_errors_exit_with_2(runner: Any, arguments: list[str]) -> None:
    assert runner.invoke(cli, arguments).exit_code == 2


def test_doctor_reports_and_succeeds(runner: Any) -> None:
    result = runner.invoke(cli, ["doctor", "--json"])
    report = json.loads(result.stdout)
    names = [check["name"] for check in report["checks"]]
    assert result.exit_code == 0
    assert report["healthy"] is True
    assert names[:6] == ["system", "memory", "versions", "blas", "device", "speed"]
    assert all(check["fix"] for check in report["checks"] if check["state"] != "ok")
    text = runner.invoke(cli, ["doctor"]).stdout
    assert all(name in text for name in names)


def test_recipes_are_listed_shown_and_copied(runner: Any, tmp_path: Path) -> None:
    listed = runner.invoke(cli, ["recipes"])
    assert listed.exit_code == 0
    recipes, _, remainder = listed.stdout.partition("\n\n")
    heading, *tasks = remainder.splitlines()
    assert [line.split()[0] for line in recipes.splitlines()] == recipe_names()
    assert heading.startswith("tasks ") and [line.split()[0] for line in tasks] == task_names()
    assert all(line.endswith(".") for line in [*recipes.splitlines(), *tasks])
    assert runner.invoke(cli, ["recipes", "list"]).stdout == listed.stdout
    for name in [*recipe_names(), *task_names()]:
        shown = runner.invoke(cli, ["recipes", "show", name])
        copied = runner.invoke(cli, ["recipes", "copy", name, str(tmp_path)])
        assert copied.exit_code == 0, copied.output
        assert (tmp_path / f"{name}.yaml").read_text(encoding="utf-8") == shown.stdout
        again = runner.invoke(cli, ["recipes", "copy", name, str(tmp_path / f"{name}.yaml")])
        assert again.exit_code == 1
        assert "exists already" in again.stderr


def test_a_recipe_may_name_a_copied_task_in_its_folder(runner: Any, tmp_path: Path) -> None:
    for name in ("tiny", "music"):
        said = runner.invoke(cli, ["recipes", "copy", name, str(tmp_path / f"my_{name}.yaml")]).stdout
    assert said.endswith("my_music.yaml; edit it; a recipe beside it says task: my_music.yaml\n")
    task = tmp_path / "my_music.yaml"
    task.write_text(
        task.read_text(encoding="utf-8").replace("You are an adviser", "You are a critic"), encoding="utf-8"
    )
    assert (
        load_recipe(tmp_path / "my_tiny.yaml", ["task=my_music.yaml"])
        .load_task()
        .system.startswith("You are a critic")
    )


def test_unknown_recipe_names_the_packaged_ones(runner: Any) -> None:
    for arguments in (
        ["recipes", "show", "nope"],
        ["recipes", "show", "../music/task"],
        ["recipes", "copy", "nope", "x.yaml"],
    ):
        result = runner.invoke(cli, arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: no packaged recipe or task")
        assert "tiny" in result.stderr and "tasks: judge, moderation, music" in result.stderr


def _mlx_distill(*arguments: str, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mlx_distill", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, **options)


def test_a_closed_pipe_is_quiet(tmp_path: Path) -> None:
    code = f"set -o pipefail; '{sys.executable}' -m mlx_distill doctor --json | true"
    result = subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.stderr == ""


def test_one_key_is_explained_alone(runner: Any) -> None:
    out = runner.invoke(cli, ["recipes", "keys", "distill.token_weight"]).stdout
    assert "token_weight" in out and "text_weight" not in out and out.startswith("distill: ")
    result = runner.invoke(cli, ["recipes", "keys", "distill.token_wait"])
    assert result.exit_code == 2 and "no section or key 'distill.token_wait'" in str(result.output) + str(
        result.exception
    )


def test_every_key_of_a_recipe_is_explained_with_its_default(runner: Any) -> None:
    from mlx_distill.recipe import Recipe

    result = runner.invoke(cli, ["recipes", "keys"])
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 100
    raw = json.loads(runner.invoke(cli, ["recipes", "keys", "--json"]).stdout)
    sections = {part["name"]: {key["name"]: key for key in part["keys"]} for part in raw["sections"]}
    assert list(sections) == [
        "recipe",
        "data",
        "data.sources",
        "data.sources.values",
        "convert",
        "teach",
        "targets",
        "distill",
        "quantize",
        "evaluate",
        "controls",
        "goals",
        "task",
    ]
    for name, keys in sections.items():
        assert all(key["help"] for key in keys.values()), name
        assert all(f"\n  {key} " in result.stdout for key in keys), name
    known = {f.name for f in dataclasses.fields(Recipe)} - {"base"}
    assert {
        *sections["recipe"],
        *(name for name in sections if "." not in name and name != "recipe"),
    } == known
    # A recipe without the key gets the default that is shown.
    recipe = load_recipe("tiny", ["distill={}"])
    assert {name: key["default"] for name, key in sections["distill"].items()} == dataclasses.asdict(
        recipe.distill
    )


def test_the_keys_of_one_section_and_an_unknown_section(runner: Any) -> None:
    result = runner.invoke(cli, ["recipes", "keys", "distill"])
    head, *lines = result.stdout.splitlines()
    assert head.startswith("distill: ")
    assert "  learning_rate         peak learning rate [number; at least 0; default: 1.0e-05]" in lines
    assert not any(line.startswith("teach") for line in lines)
    bad = runner.invoke(cli, ["recipes", "keys", "destill"])
    assert bad.exit_code != 0 and bad.stdout == ""
    assert "sections: recipe, data, data.sources" in bad.stderr


def test_the_keys_of_a_task_are_explained(runner: Any) -> None:
    result = runner.invoke(cli, ["recipes", "keys", "task"])
    head, *lines = result.stdout.splitlines()
    assert head.startswith("task: ")
    settable = {f.name for f in dataclasses.fields(Task) if f.metadata.get("settable", True)}
    assert settable <= {line.split()[0] for line in lines}
    assert any("most tokens of an answer [whole number; at least 1; default: 256]" in line for line in lines)


def test_help_of_from_says_that_an_interrupted_attempt_is_continued(runner: Any) -> None:
    assert "an interrupted attempt with the same settings is continued" in " ".join(
        runner.invoke(cli, ["teach", "--help"]).stdout.split()
    )
