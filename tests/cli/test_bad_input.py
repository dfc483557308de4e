"""Wrong input through the entry point: one error line, a fix, exit code 1 or 2, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.small_run import write_recipe

from mlx_distill.cli import cli
from mlx_distill.recipe import recipe_names
from mlx_distill.storage import lock_folder


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe with good rows and models that do not exist, for prepare alone."""
    return write_recipe(tmp_path, model="org/model")


@pytest.fixture
def prepare(runner: Any, recipe: Path, tmp_path: Path) -> Callable[..., Any]:
    def invoke(*options: str) -> Any:
        return runner.invoke(cli, ["prepare", str(recipe), "--out", str(tmp_path / "out"), *options])

    return invoke


def refuses(result: Any, code: int, *parts: str) -> None:
    """Assert an error of one line with all ``parts``, a fix, no output and no traceback."""
    lines = [line for line in result.stderr.splitlines() if line.startswith(("error:", "fix:"))]
    assert result.exit_code == code, result.output
    assert [line.split(":")[0] for line in lines] == ["error", "fix"], result.stderr
    assert "Traceback" not in result.output
    assert "unexpected" not in lines[0]
    assert result.stdout == ""
    for part in parts:
        assert part in lines[0]


def visible(folder: Path) -> list[str]:
    """The files of a folder without hidden ones, such as resumable partial folders."""
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) if folder.exists() else []


def test_good_rows_are_prepared(prepare: Callable[..., Any], tmp_path: Path) -> None:
    result = prepare()
    assert result.exit_code == 0, result.output
    assert {"train.jsonl", "valid.jsonl", "test.jsonl", "statistics.json", "manifest.json"} <= set(
        visible(tmp_path / "out" / "data")
    )
    rows = [
        json.loads(line)
        for line in (tmp_path / "out/data/train.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert json.loads(rows[0]["messages"][-1]["content"]) == rows[0]["answer"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ("rows.jsonl",)),
        (b'{"messages": [{"role": "user", "content": "hello"}]}\n', ("rows.jsonl:1", "assistant")),
        (
            b'{"text": "a red heron", "colour": "yes"}\n{"text": "caf\xe9", "colour": "no"}\n',
            ("rows.jsonl:2", "not UTF-8"),
        ),
        (b'{"text": "a red heron", "colour": "yes"}\n{"text": \n', ("rows.jsonl:2", "not JSON")),
        (b'{"text": "a red heron", "colour": "maybe"}\n', ("rows.jsonl:1", "maybe")),
        (b"[1, 2]\n", ("rows.jsonl:1",)),
        (b"\xef\xbb\xbf\r\n", ("rows.jsonl: no rows",)),
        (b"[" * 100_000, ("rows.jsonl:1: not JSON",)),
    ],
    ids=[
        "empty",
        "no-assistant",
        "not-utf-8",
        "not-json",
        "unknown-label",
        "not-an-object",
        "a-mark-alone",
        "nested-without-end",
    ],
)
def test_bad_rows(
    prepare: Callable[..., Any], tmp_path: Path, content: bytes, parts: tuple[str, ...]
) -> None:
    good = (tmp_path / "rows.jsonl").read_bytes()
    (tmp_path / "rows.jsonl").write_bytes(content)
    refuses(prepare(), 1, *parts)
    assert visible(tmp_path / "out") == []
    (tmp_path / "rows.jsonl").write_bytes(good)
    assert prepare().exit_code == 0


def test_a_line_that_is_not_json_is_named_once_with_its_column(
    prepare: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(
        b'{"text": "a red heron", "colour": "yes"}\n{"text": "a \x07 heron", "colour": "no"}\n'
    )
    result = prepare("--set", "data.drop_invalid=true")
    refuses(result, 1, "rows.jsonl:2: not JSON: Invalid control character at column 13")
    assert "line 1" not in result.stderr and "at at" not in result.stderr
    assert "drop_invalid does not cover such a line" in result.stderr


def test_rows_that_are_left_out_are_reported(prepare: Callable[..., Any], tmp_path: Path) -> None:
    assert "left out" not in prepare().stderr
    with open(tmp_path / "rows.jsonl", "a", encoding="utf-8") as file:
        file.write('{"text": "a red heron"}\n')
    result = prepare("--set", "data.drop_invalid=true")
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stderr.splitlines() if "left out" in line]
    assert line.startswith(
        "prepare: 1 of 41 rows left out (does not fit the task: 1), such as rows.jsonl:41: no answer: "
    )


def test_missing_rows(prepare: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").unlink()
    refuses(prepare(), 1, "rows.jsonl")
    assert visible(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--set", "distill.lerning_rate=1"], ("distill", "unknown key 'lerning_rate'")),
        (["--set", "nope=1"], ("unknown key 'nope'",)),
        (["--set", "distill.epochs=many"], ("distill: epochs", "a number is needed")),
        (["--set", "distill.label_temperature=-1"], ("label_temperature", "below")),
        (["--set", "quantize.mode=int3"], ("quantize: mode", "'int3'")),
        (["--set", "novalue"], ("--set novalue",)),
        (["--set", "distill.epochs=.nan"], ("distill: epochs", "not a finite number")),
        (["--set", "distill.steps=1.5"], ("distill: steps", "a whole number is needed")),
        (["--set", "base=elsewhere"], ("unknown key 'base'",)),
        (["--set", "name=../elsewhere"], ("name", "'../elsewhere'")),
        (["--set", "name="], ("name", "text is needed")),
        (["--set", "task=nope"], ("no task 'nope'",)),
        (["--set", "task=[nope]"], ("task: text is needed", "['nope']")),
        (["--from", "destill"], ("no stage 'destill'",)),
    ],
)
def test_bad_options(
    prepare: Callable[..., Any], tmp_path: Path, options: list[str], parts: tuple[str, ...]
) -> None:
    refuses(prepare(*options), 2, *parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("name: [", ("recipe.yaml", "not valid YAML")),
        ("", ("recipe.yaml", "no mapping")),
        ("just words", ("recipe.yaml", "no mapping")),
        ("name: x\n", ("teacher is missing",)),
        ("name: 2024\n", ("name: text is needed, not 2024",)),
        ("name: x\ndescription: caf\xe9\n", ("recipe.yaml:2: not UTF-8",)),
        ("name: !!python/object/apply:os.getcwd []\n", ("recipe.yaml:1: not valid YAML",)),
        ("[" * 5000, ("recipe.yaml: nested too deeply",)),
    ],
)
def test_bad_recipe_files(
    prepare: Callable[..., Any], recipe: Path, tmp_path: Path, text: str, parts: tuple[str, ...]
) -> None:
    recipe.write_text(text, encoding="latin-1")
    refuses(prepare(), 2, *parts)
    assert not (tmp_path / "out").exists()


def test_a_missing_model_is_refused_before_anything_is_made(
    runner: Any, recipe: Path, tmp_path: Path
) -> None:
    for key in ("teacher", "student"):
        result = runner.invoke(
            cli, ["run", str(recipe), "--out", str(tmp_path / "out"), "--set", f"{key}=./nope"]
        )
        refuses(result, 1, "./nope: no such folder")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_fix_for_an_unreadable_manifest_works(prepare: Callable[..., Any], tmp_path: Path) -> None:
    assert prepare().exit_code == 0
    manifest = tmp_path / "out" / "data" / "manifest.json"
    for content in (b"{", b"\xff\x00", b""):
        manifest.write_bytes(content)
        refuses(prepare(), 1, "manifest.json: not valid JSON")
        shutil.rmtree(manifest.parent)
        assert prepare().exit_code == 0


def test_missing_recipe(runner: Any, tmp_path: Path) -> None:
    refuses(runner.invoke(cli, ["run", str(tmp_path / "nope.yaml")]), 2, "nope.yaml")


def test_two_runs_on_one_folder(prepare: Callable[..., Any], tmp_path: Path) -> None:
    with lock_folder(tmp_path / "out"):
        refuses(prepare(), 1, "another run is using this folder", f"process {os.getpid()}")
    assert prepare().exit_code == 0


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "no space left"), (errno.EACCES, "permission denied"), (errno.EROFS, "read-only")],
)
def test_an_error_of_the_disk(
    prepare: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def refuse(handle: int) -> None:
        raise OSError(number, os.strerror(number), "train.jsonl")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        refuses(prepare(), 1, words)
    assert visible(tmp_path / "out") == []
    assert prepare().exit_code == 0  # the same command continues


def test_a_file_in_the_place_of_the_folder(prepare: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("not a folder", encoding="utf-8")
    refuses(prepare(), 1, "out")
    assert (tmp_path / "out").read_text(encoding="utf-8") == "not a folder"


def test_a_folder_without_write_permission(
    prepare: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Simulated, because tests may run as root, who can write everywhere.
    make = os.mkdir

    def refuse(path: str | Path, *args: Any, **kwargs: Any) -> None:
        if Path(path).is_relative_to(tmp_path / "out"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        make(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", refuse)
    refuses(prepare(), 1, "out: permission denied")


def test_a_stage_whose_parents_are_missing(runner: Any, recipe: Path, tmp_path: Path) -> None:
    result = runner.invoke(cli, ["distill", str(recipe), "--out", str(tmp_path / "out")])
    refuses(result, 1)
    assert visible(tmp_path / "out") == []


def test_analyze_without_a_model(runner: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    refuses(
        runner.invoke(
            cli, ["analyze", str(tmp_path / "nope"), str(tmp_path / "rows.jsonl"), "--task", "moderation"]
        ),
        1,
        "nope",
    )


@pytest.mark.parametrize("name", recipe_names())
def test_a_dry_run_of_every_packaged_recipe_works_offline(runner: Any, tmp_path: Path, name: str) -> None:
    text = runner.invoke(cli, ["run", name, "--out", str(tmp_path / "out"), "--dry-run"])
    if name.startswith("tiny"):
        assert text.exit_code == 0, text.output
    else:  # the user's own rows are missing; all the rest is as it should be
        assert text.exit_code == 1, text.output
        assert "error: songs.jsonl: no such file or folder" in text.stderr
    raw = runner.invoke(cli, ["run", name, "--out", str(tmp_path / "out"), "--dry-run", "--json"])
    plan = json.loads(raw.stdout)
    commands = [stage["command"] for stage in plan["stages"]]
    assert list(dict.fromkeys(commands)) == [
        "prepare",
        "convert",
        "teach",
        "targets",
        "distill",
        "quantize",
        "evaluate",
        "report",
    ]
    assert all(stage["reads"] and stage["writes"] for stage in plan["stages"])
    assert not (tmp_path / "out").exists()
