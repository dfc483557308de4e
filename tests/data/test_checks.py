"""Fields that a task names and no row has, and what prepare says of rows that make a poor training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_distill.data.prepare import prepare
from mlx_distill.errors import ConfigError, DataError, DistillError
from mlx_distill.progress import NullProgress
from mlx_distill.recipe import DataConfig, SourceConfig
from mlx_distill.tasks.task import Task, load_task

FEW = "training rows: with fewer than 500, results vary much"


def rows(count: int, labels: str = "yn", **extra: Any) -> list[dict[str, Any]]:
    """Rows with a label for each letter of ``labels`` in turn."""
    verdicts = [{"y": "yes", "n": "no"}[labels[i % len(labels)]] for i in range(count)]
    return [
        {
            "title": f"Song {i}",
            "text": f"text {i}",
            "genre": "folk",
            "answer": {"verdict": verdict, "score": 1},
        }
        | extra
        for i, verdict in enumerate(verdicts)
    ]


def chats(count: int, **extra: Any) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"song {i}"},
                {"role": "assistant", "content": json.dumps(row["answer"])},
            ],
            **extra,
        }
        for i, row in enumerate(rows(count))
    ]


def warnings(folder: Path, task: Task, data: list[dict[str, Any]], **settings: Any) -> list[str]:
    path, out = folder / "rows.jsonl", folder / "data"
    out.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in data), encoding="utf-8")
    source = SourceConfig(
        path=str(path), columns=settings.pop("columns", {}), values=settings.pop("values", {})
    )
    said: list[str] = []

    class Notes(NullProgress):
        def note(self, text: str) -> None:
            said.append(text)

    config = DataConfig(sources=[source], near_duplicates=0, **settings)
    statistics = prepare(config, task, None, out, Notes())
    assert [text for text in said if "warning" in text] == [
        f"prepare: warning: {text}" for text in statistics["warnings"]
    ]
    return list(statistics["warnings"])


@pytest.mark.parametrize(
    ("changes", "words", "fix"),
    [
        (
            {"slices": ("gener",)},
            "task 'rain': slices: no row has the field 'gener'",
            "did you mean 'genre'?",
        ),
        ({"group": "gener"}, "group: no row has the field 'gener'", "leave it out"),
        ({"title": "titel"}, "title: no row has the field 'titel'", "did you mean 'title'?"),
        ({"id": "titles"}, "id: no row has the field 'titles'", "the rows have answer, genre, text"),
    ],
)
def test_a_field_that_the_task_names_and_no_row_has_is_an_error(
    tmp_path: Path, task: Task, changes: dict[str, Any], words: str, fix: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        warnings(tmp_path, replace(task, **changes), rows(9))
    assert words in caught.value.message and fix in (caught.value.fix or "")
    assert not list((tmp_path / "data").glob("*.jsonl"))


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"stratify": ["lang"]}, "data.stratify"),
        ({"min_share": {"lang": 0.1}}, "data.min_share"),
        ({"split_field": "part"}, "data.split_field"),
        ({"min_rating": 3.0}, "data.rating_field"),
        ({"domains": ["pop"]}, "data.domain_field"),
    ],
)
def test_a_field_that_the_recipe_names_and_no_row_has_is_an_error(
    tmp_path: Path, task: Task, settings: dict[str, Any], key: str
) -> None:
    for data in (rows(9), chats(9)):
        with pytest.raises(ConfigError, match=f"^{key}: no row has the field"):
            warnings(tmp_path, task, data, **settings)


def test_fields_are_found_under_the_name_that_columns_give_them(tmp_path: Path, task: Task) -> None:
    data = [{**row, "style": row["genre"], "key": f"k{i}"} for i, row in enumerate(rows(9))]
    for row in data:
        del row["genre"]
    keyed = replace(task, id="song")
    assert warnings(tmp_path, keyed, data, columns={"genre": "style", "song": "key"})
    (warning,) = (
        text for text in warnings(tmp_path, keyed, data, columns={"song": "key"}) if "field" in text
    )
    assert warning.startswith("task 'rain': slices: no row has the field 'genre' (they have answer, key, ")


def test_fields_that_rows_of_ones_own_lack_are_warned_of_but_not_for_a_slip(
    tmp_path: Path, task: Task
) -> None:
    assert [text for text in warnings(tmp_path, task, chats(9)) if "field" in text] == [
        "task 'rain': slices: no row has the field 'genre' (they have messages): results are not shown by it",
        "task 'rain': title: no row has the field 'title' (they have messages): results are not shown by it",
    ]
    own = replace(task, slices=("lang",), group="lang", id="song")
    have = "(they have answer, genre, text, title)"
    assert [text for text in warnings(tmp_path, own, rows(9)) if "field" in text] == [
        f"task 'rain': slices: no row has the field 'lang' {have}: results are not shown by it",
        f"task 'rain': group: no row has the field 'lang' {have}: error rates are not compared by it",
        f"task 'rain': id: no row has the field 'song' {have}: the rows are named by their text",
    ]
    with pytest.raises(ConfigError, match="no row has the field 'genre'") as caught:
        warnings(tmp_path, task, chats(9, gener="pop"))
    assert "did you mean 'gener'?" in (caught.value.fix or "")


def test_a_slice_that_some_rows_lack_is_counted(tmp_path: Path, task: Task) -> None:
    data = rows(20)
    for row in data[:3]:
        del row["genre"]
    assert "3 of 20 rows have no 'genre': they count under an empty name" in warnings(tmp_path, task, data)
    for row in data[3:12]:  # most rows: it is a tag of the others
        del row["genre"]
    assert not [text for text in warnings(tmp_path, task, data) if "empty name" in text]


@pytest.mark.parametrize(
    ("count", "labels", "expected"),
    [
        (20, "yn", [f"20 {FEW}"]),
        (20, "y", [f"20 {FEW}", "every training row is labelled yes: a model learns to say that alone"]),
        (
            24,
            "y" * 11 + "n" + "y" * 12,
            [f"24 {FEW}", "class imbalance: yes has 23 training rows, no has 1; add rows of no"],
        ),
        (22, "y" * 10 + "n", [f"22 {FEW}"]),  # ten times as many are no imbalance yet
    ],
)
def test_few_rows_one_class_and_imbalance_are_warned_about(
    tmp_path: Path, task: Task, count: int, labels: str, expected: list[str]
) -> None:
    said = warnings(tmp_path, task, rows(count, labels), valid_fraction=0.0, test_fraction=0.0)
    assert len(said) == len(expected)
    assert all(text.startswith(words) for text, words in zip(said, expected, strict=True))


def test_enough_rows_of_every_class_say_nothing(tmp_path: Path, task: Task) -> None:
    assert warnings(tmp_path, task, rows(600)) == []
    generated = DataConfig(sources=[SourceConfig(generator="music", count=40)], near_duplicates=0)
    statistics = prepare(generated, load_task("music"), None, tmp_path / "data")
    assert not any(FEW in text for text in statistics["warnings"])


def test_labels_that_a_split_lacks_are_named(tmp_path: Path, task: Task) -> None:
    data = [*rows(10, split="train"), *rows(3, "y", split="valid"), *rows(3, "n", split="test")]
    for index, row in enumerate(data):
        row["text"] = f"text {index}"
    assert warnings(tmp_path, task, data)[1:] == [
        "no validation row is labelled no",
        "no test row is labelled yes",
    ]
    said = warnings(tmp_path, task, rows(3), valid_fraction=0.05, test_fraction=0.0)
    assert "no rows in valid: too few without a split of their own" in said


def test_short_prompts_and_answers_are_left_out(tmp_path: Path, task: Task) -> None:
    data = rows(20)
    data[0]["text"] = data[0]["title"] = "x"
    data[1]["answer"]["why"] = "a longer answer"
    prompt, answer = len("You judge songs.Song 1\n\ntext 1"), len('{"verdict": "yes", "score": 1, "why"')
    for settings, reason, count in (
        ({"min_prompt_chars": prompt}, f"prompt shorter than {prompt} characters", 1),
        ({"min_answer_chars": answer}, f"answer shorter than {answer} characters", 19),
    ):
        warnings(tmp_path, task, data, **settings, valid_fraction=0.0, test_fraction=0.0)
        statistics = json.loads((tmp_path / "data" / "statistics.json").read_text())
        assert {name: entry["count"] for name, entry in statistics["dropped"].items()} == {reason: count}


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (
            {"verdict": 0.3},
            "verdict: 'no' has 5 of 20 training rows (25.0%), less than data.min_share.verdict: 0.3",
        ),
        ({"genre": 0.11}, "genre: 'pop' has 2 of 20 training rows (10.0%)"),
        ({"verdict": 0.2, "genre": 0.05}, None),
    ],
)
def test_a_rare_value_is_an_error_where_a_share_is_asked_for(
    tmp_path: Path, task: Task, share: dict[str, float], words: str | None
) -> None:
    data = rows(20, "yyyn")
    for row in data[:2]:
        row["genre"] = "pop"
    settings = {"min_share": share, "valid_fraction": 0.0, "test_fraction": 0.0}
    if words is None:
        assert warnings(tmp_path, task, data, **settings)
        return
    with pytest.raises(DataError) as caught:
        warnings(tmp_path, task, data, **settings)
    assert words in caught.value.message and caught.value.fix
    with pytest.raises(DataError, match=r"verdict: 'no' has 0 of 10"):
        warnings(tmp_path, task, rows(10, "y"), **(settings | {"min_share": {"verdict": 0.01}}))


def test_a_score_outside_of_the_scale_is_refused(tmp_path: Path, task: Task) -> None:
    properties = {**task.schema["properties"], "score": {"type": "number"}}
    scored = replace(task, score="score", schema={**task.schema, "properties": properties})
    data = rows(9)
    data[4]["answer"]["score"] = 101
    with pytest.raises(DistillError, match=r"rows.jsonl:5: score: 101 is outside of .* 0 to 100") as caught:
        warnings(tmp_path, scored, data)
    assert "score_scale" in (caught.value.fix or "")
    assert warnings(tmp_path, replace(scored, score_scale=(0.0, 101.0)), data)
