"""Commands about jobs, models, data and costs where nothing is yet: they say what to do, and make nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_distill.cli import cli


@pytest.mark.parametrize("command", [("jobs", "list"), ("registry", "list"), ("data", "list"), ("costs",)])
def test_looking_makes_nothing(tmp_path: Path, runner: Any, command: tuple[str, ...]) -> None:
    root = ["--root", str(tmp_path)]
    shown = runner.invoke(cli, [*command, *root])
    assert shown.exit_code == 0 and "mlx-distill" in shown.stdout, shown.output
    as_json = runner.invoke(cli, [*command, *root, "--json"])
    assert as_json.exit_code == 0 and isinstance(json.loads(as_json.stdout), list | dict), as_json.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [
        ("jobs", "show", "job-1"),
        ("jobs", "watch", "job-1"),
        ("jobs", "cancel", "job-1"),
        ("jobs", "resume", "job-1"),
        ("registry", "show", "music"),
        ("registry", "history", "music"),
        ("registry", "rollback", "music", "--reason", "x"),
        ("registry", "promote", "music:1", "--reason", "x"),
        ("registry", "archive", "music:1"),
        ("data", "show", "songs"),
        ("ledger", "check"),
    ],
)
def test_what_needs_a_ledger_says_that_there_is_none(
    tmp_path: Path, runner: Any, command: tuple[str, ...]
) -> None:
    done = runner.invoke(cli, [*command, "--root", str(tmp_path)])
    assert done.exit_code == 1
    assert f"error: {tmp_path}: no ledger here" in done.output and "fix: name the folder" in done.output
    assert list(tmp_path.iterdir()) == []


def test_names_that_do_not_exist(tmp_path: Path, runner: Any) -> None:
    root = ["--root", str(tmp_path)]
    for command, text in (
        (["data", "check", "songs"], f"no data set 'songs', and no such file or folder under {tmp_path}"),
        (["data", "add", "songs.jsonl"], "songs.jsonl: no such file or folder"),
        (["registry", "list", "music"], "fix: add one: mlx-distill registry add RUN"),
        (["registry", "history", "music"], "no model 'music' in the registry"),
        (["costs", "--prices", "none.yaml"], "none.yaml: no such file\nfix: check the path\n"),
    ):
        done = runner.invoke(cli, [*command, *root])
        assert done.exit_code in (1, 2) and text in done.output, (command, done.output)
