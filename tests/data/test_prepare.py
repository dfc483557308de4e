from __future__ import annotations

import errno
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_distill.data.prepare import prepare
from mlx_distill.errors import ConfigError, DataError, FileError
from mlx_distill.progress import NullProgress
from mlx_distill.recipe import DataConfig, SourceConfig
from mlx_distill.storage import read_jsonl
from mlx_distill.tasks.task import Task

WORDS = [f"word{i}" for i in range(500)]


def song(rng: random.Random, number: int, **extra: Any) -> dict[str, Any]:
    answer = {"verdict": rng.choice(["yes", "no"]), "score": rng.randrange(101)}
    text = " ".join(rng.choices(WORDS, k=60))
    return {
        "id": f"s{number}",
        "title": f"Song {number}",
        "text": text,
        "genre": rng.choice(["folk", "pop"]),
        "answer": answer,
        **extra,
    }


def songs(count: int, seed: int = 0, **extra: Any) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [song(rng, number, **extra) for number in range(count)]


def write(path: Path, rows: list[dict[str, Any]]) -> SourceConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceConfig(path=str(path))


def run(
    folder: Path, task: Task, rows: list[dict[str, Any]], **settings: Any
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Statistics, and the prepared rows by id with their split."""
    folder.mkdir(exist_ok=True)
    source = write(folder / "rows.jsonl", rows)
    return prepare_and_read(DataConfig(sources=[source], **settings), task, folder / "data")


def prepare_and_read(
    config: DataConfig, task: Task, out: Path
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    out.mkdir(exist_ok=True)
    statistics = prepare(config, task, None, out)
    rows = {}
    for split in ("train", "valid", "test"):
        for line in (out / f"{split}.jsonl").read_text().splitlines():
            row = json.loads(line)
            rows[row["id"]] = {**row, "split": split}
    return statistics, rows


def test_every_row_goes_to_one_split_and_is_counted(tmp_path: Path, task: Task) -> None:
    statistics, rows = run(
        tmp_path, task, songs(200), stratify=["genre"], test_fraction=0.2, valid_fraction=0.1
    )
    assert len(rows) == 200 and statistics["read"] == 200 and statistics["dropped"] == {}
    assert statistics["rows"] == {"train": 140, "valid": 20, "test": 40} and statistics["sets"] == {
        "test": 40
    }
    for split, count in statistics["rows"].items():
        inside = [row for row in rows.values() if row["split"] == split]
        assert (
            len(inside)
            == count
            == sum(statistics["labels"][split].values())
            == sum(statistics["slices"][split]["genre"].values())
        )
        assert statistics["labels"][split]["yes"] == sum(row["answer"]["verdict"] == "yes" for row in inside)
        assert statistics["slices"][split]["genre"]["pop"] == sum(
            row["fields"]["genre"] == "pop" for row in inside
        )
        assert {row["set"] for row in inside} == {split}
    assert json.loads((tmp_path / "data" / "statistics.json").read_text()) == statistics
    assert {row["id"] for _, row in read_jsonl(tmp_path / "data" / "test.jsonl")} <= set(rows)
    assert sorted(p.name for p in (tmp_path / "data").glob("*.json*")) == [
        "statistics.json",
        "test.jsonl",
        "train.jsonl",
        "valid.jsonl",
    ]
    assert not list((tmp_path / "data").rglob("rows.jsonl"))


@pytest.mark.slow
def test_the_split_is_the_same_every_time_and_in_any_order(tmp_path: Path, task: Task) -> None:
    rows = songs(120)
    rows += [{**row, "id": f"copy{row['id']}", "text": row["text"] + " end"} for row in rows[:30]]
    settings = {"stratify": ["genre"], "test_fraction": 0.3, "valid_fraction": 0.1}
    first, again = (run(tmp_path / name, task, rows, **settings) for name in "ab")
    assert first == again
    random.Random(1).shuffle(rows)
    _, shuffled = run(tmp_path / "c", task, rows, **settings)
    assert {name: row["split"] for name, row in shuffled.items()} == {
        name: row["split"] for name, row in first[1].items()
    }
    _, other = run(tmp_path / "d", task, rows, **settings, seed=1)
    assert {name: row["split"] for name, row in other.items()} != {
        name: row["split"] for name, row in first[1].items()
    }


def test_of_rows_with_the_same_text_one_is_kept(tmp_path: Path, task: Task) -> None:
    rows = songs(40)
    rows.append({**rows[3], "id": "same", "text": rows[3]["text"].upper().replace(" ", "\n ")})
    rows.append({**rows[4], "id": "contradicts", "answer": {"verdict": "yes", "score": 0}})
    rows[4]["answer"] = {"verdict": "no", "score": 99}
    statistics, kept = run(tmp_path, task, rows)
    assert len(kept) == 40
    assert {reason: entry["count"] for reason, entry in statistics["dropped"].items()} == {
        "duplicate": 1,
        "duplicate, with another answer": 1,
    }
    assert "rows.jsonl:" in statistics["dropped"]["duplicate"]["examples"][0]


@pytest.mark.slow
def test_near_duplicates_go_to_one_split(tmp_path: Path, task: Task) -> None:
    rows = songs(60)
    rng = random.Random(0)
    for row in list(rows):
        for copy in range(2):
            text = row["text"].split()
            text[rng.randrange(60)] = "changed"
            rows.append({**row, "id": f"{row['id']}-{copy}", "text": " ".join(text)})
    statistics, kept = run(tmp_path, task, rows, test_fraction=0.3, valid_fraction=0.1, near_duplicates=0.75)
    assert len(kept) == 180 and statistics["near_duplicates"] == {"clusters": 60, "rows": 180, "largest": 3}
    for number in range(60):
        assert len({kept[name]["split"] for name in (f"s{number}", f"s{number}-0", f"s{number}-1")}) == 1
    assert abs(statistics["rows"]["test"] - 54) <= 3
    _, apart = run(tmp_path / "off", task, rows, test_fraction=0.3, near_duplicates=0.0)
    assert any(len({apart[n]["split"] for n in (f"s{i}", f"s{i}-0", f"s{i}-1")}) > 1 for i in range(60))


def test_a_held_out_row_wins_over_its_copies_in_the_training_rows(tmp_path: Path, task: Task) -> None:
    train, test = songs(50), songs(10, seed=1)
    test[0]["text"] = train[0]["text"]
    test[0]["title"] = train[0]["title"]
    test[1]["text"] = train[1]["text"] + " tail"
    test[1]["title"] = train[1]["title"]
    for row in test:
        row["id"] = "t" + row["id"]
    sources = [write(tmp_path / "train.jsonl", train), write(tmp_path / "test.jsonl", test)]
    forced = [
        SourceConfig(path=s.path, split=split, set=name)
        for s, split, name in zip(sources, ("train", "test"), (None, "hand"), strict=True)
    ]
    statistics, kept = prepare_and_read(
        DataConfig(sources=forced, near_duplicates=0.8), task, tmp_path / "data"
    )
    assert "s0" not in kept and "s1" not in kept and len(kept) == 58
    assert all(kept["t" + row["id"].removeprefix("t")]["split"] == "test" for row in test)
    assert statistics["sets"] == {"hand": 10} and {kept[row["id"]]["set"] for row in test} == {"hand"}
    held_out = [count["count"] for reason, count in statistics["dropped"].items() if "held-out" in reason]
    assert sum(held_out) == 2 and statistics["rows"]["valid"] == 0


def test_the_prompts_own_words_do_not_make_rows_similar(tmp_path: Path, task: Task) -> None:
    wordy = replace(
        task,
        user="Read the following song with care and weigh each line against the rest of it: {title} {text}.",
    )
    rows = [{**row, "title": "x", "text": " ".join(row["text"].split()[:4])} for row in songs(40)]
    statistics, _ = run(tmp_path, wordy, rows, near_duplicates=0.6)
    assert statistics["near_duplicates"]["clusters"] == 0
    assert statistics["rows"]["train"] + statistics["rows"]["valid"] + statistics["rows"]["test"] == 40


@pytest.mark.parametrize(
    ("name", "split"), [("train", "train"), ("validation", "valid"), ("dev", "valid"), ("TEST", "test")]
)
def test_a_row_may_name_its_own_split(tmp_path: Path, task: Task, name: str, split: str) -> None:
    rows = songs(20)
    rows[7]["split"] = name
    _, kept = run(tmp_path, task, rows)
    assert kept["s7"]["split"] == split
    rows[7]["split"] = "somewhere"
    with pytest.raises(DataError, match=r"rows.jsonl:8: split: 'somewhere' is not a split"):
        run(tmp_path, task, rows)


def test_filters_count_what_they_drop(tmp_path: Path, task: Task) -> None:
    rows = songs(30, rating=5, domain="songs")
    rows[0]["rating"], rows[1]["rating"] = 2, None
    rows[2]["domain"] = "news"
    rows[3]["text"], rows[4]["text"] = "x", "long " * 500
    statistics, kept = run(
        tmp_path,
        task,
        rows,
        min_rating=3.0,
        domains=["songs"],
        min_chars=20,
        max_chars=2000,
        test_fraction=0.0,
        valid_fraction=0.0,
    )
    assert set(kept) == {f"s{number}" for number in range(5, 30)}
    assert {reason: entry["examples"] for reason, entry in statistics["dropped"].items()} == {
        "rating below 3": [f"{tmp_path}/rows.jsonl:1"],
        "no number in the field 'rating'": [f"{tmp_path}/rows.jsonl:2"],
        "of another domain": [f"{tmp_path}/rows.jsonl:3"],
        "shorter than 20 characters": [f"{tmp_path}/rows.jsonl:4"],
        "longer than 2000 characters": [f"{tmp_path}/rows.jsonl:5"],
    }


def test_equal_ids_are_made_different(tmp_path: Path, task: Task) -> None:
    rows = [{**row, "id": "one"} for row in songs(5)]
    statistics, kept = run(tmp_path, task, rows)
    assert statistics["renamed_ids"] == 4 and set(kept) == {"one", "one~2", "one~3", "one~4", "one~5"}


@pytest.mark.parametrize(
    "ids", [["a", "a", "a~2"], ["a~2", "a", "a"], ["a", "a~2", "b", "a~2", "a", "a~3"], ["x~2", "x", "y"]]
)
def test_a_changed_id_is_never_one_that_is_in_use(tmp_path: Path, task: Task, ids: list[str]) -> None:
    wanted: list[str] = []
    for name in ids:
        tried = [name, *(f"{name}~{number}" for number in range(2, 9))]
        wanted.append(next(each for each in tried if each not in wanted))
    statistics, kept = run(
        tmp_path, task, [{**row, "id": name} for row, name in zip(songs(len(ids)), ids, strict=True)]
    )
    assert set(kept) == set(wanted) and statistics["renamed_ids"] == sum(
        a != b for a, b in zip(ids, wanted, strict=True)
    )


def test_a_row_that_does_not_fit_stops_or_is_counted(tmp_path: Path, task: Task) -> None:
    rows = songs(20)
    rows[4] = {"messages": [{"role": "user", "content": "A song"}]}
    rows[6]["answer"]["verdict"] = "maybe"
    with pytest.raises(DataError, match=r"rows\.jsonl:5: no assistant turn") as caught:
        run(tmp_path, task, rows)
    assert "drop_invalid" in (caught.value.fix or "")
    assert not list((tmp_path / "data").glob("*.jsonl")) and not list((tmp_path / "data").rglob("rows.jsonl"))
    statistics, kept = run(tmp_path, task, rows, drop_invalid=True)
    entry = statistics["dropped"]["does not fit the task"]
    assert (
        len(kept) == 18
        and entry["count"] == 2
        and entry["examples"][0] == f"{tmp_path}/rows.jsonl:5: no assistant turn"
    )


def test_a_row_whose_prompt_has_no_text_is_left_out(tmp_path: Path, task: Task) -> None:
    """Such as a line of a CSV file with empty cells, whose prompt would be the task's own words."""
    rows, task = songs(20), replace(task, user="{title}: {text}")
    assert set(task.input_fields) == {"title", "text"}
    rows[3] |= dict.fromkeys(task.input_fields, " ")
    rows[4] |= {task.input_fields[0]: ""}
    statistics, kept = run(tmp_path, task, rows)
    (reason,) = statistics["dropped"]
    assert reason.endswith(": empty") and all(name in reason for name in task.input_fields)
    assert rows[3]["id"] not in kept and rows[4]["id"] in kept


def test_nothing_left_is_an_error_with_the_commonest_reason(tmp_path: Path, task: Task) -> None:
    with pytest.raises(DataError, match=r"no rows are left of 5: longer than 10 characters, such as \S+:1"):
        run(tmp_path, task, songs(5), max_chars=10)
    with pytest.raises(DataError, match="of another domain; the domains are folk, pop"):
        run(tmp_path, task, songs(9), domains=["fol"], domain_field="genre")
    with pytest.raises(DataError, match="no rows are left to train on"):
        run(tmp_path, task, songs(5, split="test"))
    with pytest.raises(ConfigError, match="no sources"):
        prepare(DataConfig(), task, None, tmp_path)
    with pytest.raises(ConfigError, match="no row has the field 'gender'"):
        run(tmp_path, task, songs(5), stratify=["gender"])
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match=r"empty\.jsonl: no rows"):
        prepare(DataConfig(sources=[SourceConfig(path=str(tmp_path / "empty.jsonl"))]), task, None, tmp_path)


def test_rows_left_out_are_reported_in_one_line(tmp_path: Path, task: Task) -> None:
    class Notes(NullProgress):
        def note(self, text: str) -> None:
            said.append(text)

    for rows, wanted in (
        (songs(30), []),
        (
            [*songs(30), *songs(2), {**songs(1)[0], "text": "x"}],
            [
                "prepare: 3 of 33 rows left out (duplicate: 2; shorter than 20 characters: 1), "
                f"such as {tmp_path}/rows.jsonl:"
            ],
        ),
    ):
        said: list[str] = []
        config = DataConfig(sources=[write(tmp_path / "rows.jsonl", rows)], min_chars=20)
        prepare(config, task, None, tmp_path, Notes())
        lines = [line for line in said if not line.startswith("prepare: warning: ")]
        assert [line.partition("rows.jsonl:")[0] + "rows.jsonl:" for line in lines] == wanted
        assert all(line.endswith("; statistics.json has more") for line in lines)


def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(FileError, match="no space left") as caught:
        patch.setattr("os.fsync", full)
        run(tmp_path, task, songs(20))
    assert "free some space" in (caught.value.fix or "")
    assert not [p for p in (tmp_path / "data").rglob("*") if p.is_file()]
    assert len(run(tmp_path, task, songs(20))[1]) == 20


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path, task: Task) -> None:
    left = tmp_path / "data" / ".train.4242.tmp.jsonl"
    (tmp_path / "data" / "scratch").mkdir(parents=True)
    (tmp_path / "data" / "scratch" / "rows.jsonl").write_text("half a li")
    left.write_text("half a li")
    _, kept = run(tmp_path, task, songs(20))
    assert len(kept) == 20 and not left.exists() and not list((tmp_path / "data").rglob("rows.jsonl"))
