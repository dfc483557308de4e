"""Data sets that the ledger knows by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_distill.cli import cli
from mlx_distill.data_sets import add_data_set, check_data_set, export_data_set, get_data_set, list_data_sets
from mlx_distill.errors import ConfigError, DataError
from mlx_distill.ledger.database import Ledger
from mlx_distill.ledger.root import Root
from mlx_distill.storage import write_jsonl

_LONG = (
    "the quick brown fox jumps over the lazy dog while seven small owls watch from an old oak tree by the "
    "river bank {}"
)


def chat(question: str, answer: str = "yes", **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **more}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    rows = [
        chat("What is a fugue?"),
        chat("What is a fugue?"),  # exact
        chat(_LONG.format("today"), split="train"),
        chat(_LONG.format("again"), split="test"),  # near, and in another split
        {"messages": [{"role": "user", "content": "Who?"}]},  # no answer
    ]
    write_jsonl(tmp_path / "songs.jsonl", rows)
    return Ledger(Root.at(tmp_path))


def test_statistics_duplicates_and_leaks(ledger: Ledger) -> None:
    found = add_data_set(ledger, "songs.jsonl").description
    assert (found.rows, found.invalid["count"]) == (5, 1)
    assert found.splits == {"train": 1, "test": 1, "(none)": 2}
    assert (found.duplicates["exact"], found.duplicates["near"]) == (1, 1)
    assert (found.leaks["exact"], found.leaks["near"]) == (0, 1)
    assert found.leaks["examples"] == ["songs.jsonl:3 and songs.jsonl:4"]
    assert found.statistics["characters"]["test"]["answer"]["max"] == 3
    assert "songs.jsonl:5" in found.problems[0] and "held-out" in found.problems[-1]


def test_splits_are_those_of_the_files_too(ledger: Ledger, tmp_path: Path) -> None:
    for name, question in (
        ("train", "What is a fugue?"),
        ("test", "what is a FUGUE?"),
        ("valid", "Who wrote it?"),
    ):
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", [chat(question)])
    (tmp_path / "data" / "statistics.json").write_text("{}")
    found = check_data_set(ledger, "data")
    assert found.splits == {"train": 1, "valid": 1, "test": 1}
    assert found.leaks["exact"] + found.leaks["near"] == 1
    with pytest.raises(ConfigError, match="several splits: train, valid"):
        export_data_set(ledger, "data", tmp_path / "out.jsonl", "openai")
    assert not (tmp_path / "out.jsonl").exists()
    assert export_data_set(ledger, "data", tmp_path / "train.jsonl", "openai", split="train") == 1
    assert export_data_set(ledger, "data", tmp_path / "all.jsonl", "openai", split="all") == 3
    with pytest.raises(ConfigError, match="no split 'dev'"):
        export_data_set(ledger, "data", tmp_path / "out.jsonl", "openai", split="dev")


def test_rows_of_a_task_have_labels_and_contradictions(ledger: Ledger, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"kind": {"enum": ["ham", "spam"]}}, "required": ["kind"]}
    task = {"name": "mail", "system": "", "user": "{text}", "schema": schema, "label": "kind"}
    (tmp_path / "task.yaml").write_text(json.dumps(task))
    rows = [
        {"text": text, "kind": kind} for text, kind in (("Buy!", "spam"), ("buy!", "ham"), ("Hello", "ham"))
    ]
    write_jsonl(tmp_path / "mail.jsonl", rows)
    found = add_data_set(ledger, "mail.jsonl", task="task.yaml")
    assert found.task == "task.yaml"
    assert found.description.statistics["labels"]["(none)"] == {"ham": 2, "spam": 1}
    assert found.description.duplicates["conflicting"] == 2


def test_a_data_set_is_kept_by_name_and_notices_changes(ledger: Ledger, tmp_path: Path) -> None:
    added = add_data_set(ledger, "songs.jsonl")
    assert (added.name, added.changed) == ("songs", False)
    with open(tmp_path / "songs.jsonl", "a") as file:
        file.write(json.dumps(chat("One more?")) + "\n")
    assert get_data_set(ledger, "songs").changed
    again = add_data_set(ledger, "songs.jsonl")
    assert (again.rows, again.changed, again.id) == (6, False, added.id)
    write_jsonl(tmp_path / "more.jsonl", [chat("Who?")])
    with pytest.raises(ConfigError, match=r"is the data set songs\.jsonl"):
        add_data_set(ledger, "more.jsonl", name="songs")
    with pytest.raises(ConfigError, match=r"no data set 'song'.*songs"):
        get_data_set(ledger, "song")
    assert [data.name for data in list_data_sets(ledger)] == ["songs"]


@pytest.mark.parametrize("path", ["../rows.jsonl", "/etc/hostname"])
def test_paths_outside_of_the_root_are_refused(ledger: Ledger, path: str) -> None:
    with pytest.raises(ConfigError, match="not under the root"):
        add_data_set(ledger, path)
    with pytest.raises(ConfigError, match="not under the root"):
        check_data_set(ledger, path)


def test_an_export_names_the_rows_that_it_cannot_hold(ledger: Ledger, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 of 5 rows would not be the same: row 5: "):
        export_data_set(ledger, "songs.jsonl", tmp_path / "out.jsonl", "openai", split="all")
    assert not (tmp_path / "out.jsonl").exists()


def test_the_commands(ledger: Ledger, tmp_path: Path, runner: Any) -> None:
    root, songs = ["--root", str(tmp_path)], str(tmp_path / "songs.jsonl")
    assert "no data sets yet" in runner.invoke(cli, ["data", "list", *root]).stdout
    assert "rows        5" in runner.invoke(cli, ["data", "add", songs, *root]).stdout
    assert json.loads(runner.invoke(cli, ["data", "list", "--json", *root]).stdout)[0]["rows"] == 5
    assert "songs: songs.jsonl" in runner.invoke(cli, ["data", "show", "songs", *root]).stdout
    checked = runner.invoke(cli, ["data", "check", "songs", *root])
    assert checked.exit_code == 1 and "problem: " in checked.stdout
    write_jsonl(tmp_path / "good.jsonl", [chat("Who?")])
    out = str(tmp_path / "out.jsonl")
    exported = runner.invoke(
        cli, ["data", "export", str(tmp_path / "good.jsonl"), out, "--to", "alpaca", *root]
    )
    assert exported.exit_code == 0 and "1 row" in exported.stdout, exported.output
    again = runner.invoke(cli, ["data", "export", "songs", out, "--to", "openai", *root])
    assert again.exit_code == 2 and "exists already" in again.stderr
