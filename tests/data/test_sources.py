from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_distill.config import ASSETS
from mlx_distill.data.sources import read_source
from mlx_distill.errors import ConfigError, DataError, DistillError
from mlx_distill.recipe import SourceConfig

ROWS = [{"a": 1}, {"a": 2}, {"a": 3}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def read(path: Path, **settings: Any) -> list[tuple[str, dict[str, Any]]]:
    return list(read_source(SourceConfig(path=path.name, **settings), base=path.parent))


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize(
    ("name", "text", "places"),
    [
        ("r.jsonl", LINES, ["r.jsonl:1", "r.jsonl:2", "r.jsonl:3"]),
        ("r.jsonl", "\ufeff" + LINES.replace("\n", "\r\n\r\n"), ["r.jsonl:1", "r.jsonl:3", "r.jsonl:5"]),
        ("r.json", LINES, ["r.json:1", "r.json:2", "r.json:3"]),
        ("r.json", json.dumps(ROWS), ["r.json[0]", "r.json[1]", "r.json[2]"]),
        ("r.json", json.dumps({"data": ROWS}), ["r.json[0]", "r.json[1]", "r.json[2]"]),
        ("r.json", json.dumps({"data": ROWS}, indent=1), ["r.json[0]", "r.json[1]", "r.json[2]"]),
    ],
)
def test_files_yield_each_row_with_its_line(tmp_path: Path, name: str, text: str, places: list[str]) -> None:
    assert read(write(tmp_path, name, text)) == list(zip(places, ROWS, strict=True))


def test_a_single_object_is_one_row(tmp_path: Path) -> None:
    assert read(write(tmp_path, "r.json", json.dumps({"a": 1}, indent=2))) == [("r.json[0]", {"a": 1})]
    assert read(write(tmp_path, "s.json", '{"a": 1}')) == [("s.json:1", {"a": 1})]
    turns = {"messages": [{"role": "user", "content": "x"}], "id": 1}
    assert read(write(tmp_path, "t.json", json.dumps(turns))) == [("t.json:1", turns)]


def test_count_takes_the_first_rows_and_reads_no_further(tmp_path: Path) -> None:
    path = write(tmp_path, "r.jsonl", LINES + "broken")
    assert [row["a"] for _, row in read(path, count=2)] == [1, 2]


def test_a_path_starts_at_the_recipes_folder(tmp_path: Path) -> None:
    write(tmp_path, "r.jsonl", LINES)
    assert len(list(read_source(SourceConfig(path="r.jsonl"), base=tmp_path))) == 3


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("empty.jsonl", "", r"empty.jsonl: no rows"),
        ("blank.jsonl", "\n \n", r"blank.jsonl: no rows"),
        ("empty.json", "", r"empty.json: no rows"),
        ("none.json", "[]", r"none.json: no rows"),
        ("latin.jsonl", LINES.encode() + b'{"a": "caf\xe9"}\n', r"latin.jsonl:4: not UTF-8"),
        ("latin.json", b'[{"a": 1},\n{"a": "caf\xe9"}]', r"latin.json:2: not UTF-8"),
        ("cut.jsonl", LINES + '{"a": ', r"cut.jsonl:4: not JSON: Expecting value at column 7"),
        (
            "open.jsonl",
            LINES + '{"a": "x',
            r"open.jsonl:4: not JSON: Unterminated string starting at column 7",
        ),
        ("cut.json", '[{"a": 1}, {"a"', r"cut.json: not JSON"),
        ("list.jsonl", "[1]\n", r"list.jsonl:1: a JSON list, not an object"),
        ("list.json", "[1]", r"list.json\[0\]: a JSON number, not an object"),
        ("text.json", '"hello"', r"no list of objects"),
        ("twice.jsonl", LINES + '{"a": 1, "a": 2}', r"twice.jsonl:4: the key 'a' occurs twice"),
        ("inside.jsonl", '{"b": [{"a": 1, "a": 1}]}\n', r"inside.jsonl:1: the key 'a' occurs twice"),
        ("twice.json", '[{"a": 1}, {"a": 1, "a": 2}]', r"in one of the objects the key 'a' occurs twice"),
        ("rows.xlsx", "a,b\n1,2\n", r"\.xlsx is not a known file type"),
    ],
)
def test_a_bad_file_is_an_error_with_file_and_line(
    tmp_path: Path, name: str, text: str | bytes, reason: str
) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        read(write(tmp_path, name, text))
    assert caught.value.fix and "\n" not in str(caught.value)


def test_missing_files_folders_and_assets(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="a folder without files of rows"):
        read(tmp_path)
    with pytest.raises(DataError) as caught:
        list(read_source(SourceConfig(path="none.jsonl"), base=tmp_path))
    assert caught.value.message == f"none.jsonl: no such file in {tmp_path} or {Path.cwd()}"
    assert caught.value.fix == "put it there, or write its whole path under data.sources"
    with pytest.raises(DataError) as caught:
        list(read_source(SourceConfig(path="none.jsonl"), base=ASSETS / "recipes"))
    assert caught.value.message == f"none.jsonl: no such file in {Path.cwd()}"  # never in the package
    with pytest.raises(ConfigError, match="no packaged file"):
        read(Path("asset:nothing.jsonl"))


def test_a_line_of_invalid_json_is_not_covered_by_drop_invalid(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read(write(tmp_path, "cut.jsonl", '{"a": '))
    assert "data.drop_invalid does not cover" in (caught.value.fix or "")


@pytest.mark.parametrize(
    "settings", [{}, {"path": "a.jsonl", "hub": "b/c"}, {"generator": "music", "path": "a"}]
)
def test_a_source_has_exactly_one_origin(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="one of path, sqlite, hub and generator"):
        next(read_source(SourceConfig(**settings)))


@pytest.mark.parametrize("name", ["nothing", "../music", "music.generator", "templates", "os"])
def test_only_packaged_generators_run(name: str) -> None:
    with pytest.raises(ConfigError, match="no generator"):
        next(read_source(SourceConfig(generator=name)))


def test_a_generator_gets_its_settings() -> None:
    rows = list(read_source(SourceConfig(generator="moderation", count=4, seed=3, part="test")))
    assert [where for where, _ in rows] == [f"moderation generator:{i}" for i in range(4)]
    assert rows == list(read_source(SourceConfig(generator="moderation", count=4, seed=3, part="test")))
    assert rows != list(read_source(SourceConfig(generator="moderation", count=4, seed=4, part="test")))
    with pytest.raises(DistillError):
        list(read_source(SourceConfig(generator="music", count=4, part="nowhere")))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The package datasets, replaced by one that notes how it was called."""
    state: dict[str, Any] = {"rows": ROWS, "error": None}

    def load_dataset(*args: Any, **kwargs: Any) -> Iterator[dict[str, Any]]:
        state["call"] = (args, kwargs)
        if state["error"]:
            raise state["error"]
        return iter(state["rows"])

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return state


def test_a_hub_data_set_is_streamed_at_its_revision(hub: dict[str, Any]) -> None:
    rows = list(
        read_source(SourceConfig(hub="org/name:part", revision="abc", hub_split="train[:5]", count=2))
    )
    assert rows == [("org/name:1", ROWS[0]), ("org/name:2", ROWS[1])]
    assert hub["call"] == (("org/name", "part"), {"split": "train[:5]", "revision": "abc", "streaming": True})
    assert "trust_remote_code" not in hub["call"][1]


def test_errors_of_the_hub_become_one_line(hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    hub["error"] = ConnectionError("could not reach the hub\nlong story")
    with pytest.raises(DataError, match="cannot be read: could not reach the hub") as caught:
        list(read_source(SourceConfig(hub="org/name")))
    assert "offline, download it" in (caught.value.fix or "") and "long story" not in str(caught.value)
    hub["error"], hub["rows"] = None, []
    with pytest.raises(DataError, match="org/name: no rows"):
        list(read_source(SourceConfig(hub="org/name")))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="the package datasets is missing"):
        list(read_source(SourceConfig(hub="org/name")))


def test_where_selects_rows_by_their_fields(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1, "b": "x"}\n{"a": 2, "b": "x"}\n{"a": 1, "b": "y"}\n', encoding="utf-8")
    rows = list(read_source(SourceConfig(path=str(path), where={"a": 1})))
    assert [(where.rsplit(":", 1)[1], row["b"]) for where, row in rows] == [("1", "x"), ("3", "y")]
    with pytest.raises(DataError, match="no row fits where: a: 3"):
        list(read_source(SourceConfig(path=str(path), where={"a": 3})))
