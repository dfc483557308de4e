"""Rows of a SQLite query: as the schema has them, read-only, with errors that help."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_distill.data.sources import read_source
from mlx_distill.errors import ConfigError, DataError
from mlx_distill.graph import graph
from mlx_distill.recipe import SourceConfig, load_recipe
from mlx_distill.status import current_key
from mlx_distill.tasks.task import Task, parse_task

QUERY = "SELECT title, lyrics AS text, verdict, score, explicit, themes FROM songs JOIN ratings USING (id)"
ROWS = [
    {"title": "Rain", "text": "la", "verdict": "yes", "score": 95, "explicit": False, "themes": ["grace"]},
    {"title": "Sea", "text": "ho", "verdict": "no", "score": 0.5, "explicit": True, "themes": []},
]


@pytest.fixture
def songs(tmp_path: Path) -> Path:
    path = tmp_path / "gold #1?.db"
    with sqlite3.connect(path) as database:
        database.executescript(
            """
            CREATE TABLE songs (id INTEGER PRIMARY KEY, title TEXT, lyrics TEXT);
            CREATE TABLE ratings (id INTEGER, verdict TEXT, score, explicit INTEGER, themes TEXT, cover BLOB);
            INSERT INTO songs VALUES (1, 'Rain', 'la'), (2, 'Sea', 'ho');
            INSERT INTO ratings VALUES
                (1, 'yes', '95', 0, '["grace"]', x'ffd8'), (2, 'no', 0.5, 1, '[]', NULL);
            """
        )
    database.close()
    return path


@pytest.fixture
def gold() -> Task:
    properties = {
        "verdict": {"enum": ["yes", "no"]},
        "score": {"type": "number"},
        "explicit": {"type": "boolean"},
        "themes": {"type": "array"},
    }
    return parse_task(
        {
            "name": "gold",
            "system": "",
            "user": "{title} {text}",
            "label": "verdict",
            "schema": {"type": "object", "required": list(properties), "properties": properties},
        },
        "gold.yaml",
    )


def read(path: Path, query: str | None = QUERY, task: Task | None = None, **settings: Any) -> list[Any]:
    source = SourceConfig(sqlite=path.name, query=query, **settings)
    return list(read_source(source, task, path.parent))


def test_the_rows_of_a_query_fit_the_answers_schema(songs: Path, gold: Task) -> None:
    before = songs.read_bytes()
    assert read(songs, task=gold) == [(f"{songs.name}:{number}", row) for number, row in enumerate(ROWS, 1)]
    assert [row for _, row in read(songs, task=gold, count=1)] == ROWS[:1]
    assert [row for _, row in read(songs, task=gold, where={"explicit": True})] == ROWS[1:]
    assert read(songs)[0][1]["themes"] == '["grace"]'  # without a task as they lie there
    assert songs.read_bytes() == before and [p.name for p in songs.parent.iterdir()] == [songs.name]


@pytest.mark.parametrize(
    ("query", "reason", "fix"),
    [
        (None, "a database without query", "songs (id, title, lyrics)"),
        ("", "a database without query", "ratings (id, verdict, score, explicit, themes, cover)"),
        ("SELECT * FROM song", "no such table: song", "its tables: ratings (id"),
        ("SELECT lyric FROM songs", "no such column: lyric", "songs (id, title, lyrics)"),
        ("SELEC 1", "syntax error", "correct query"),
        ("SELECT 1; SELECT 2", "one statement at a time", "correct query"),
        ("DELETE FROM songs", "readonly", "read a copy"),
        ("PRAGMA query_only = 0", "the query selects no rows", "SELECT"),
        ("ATTACH 'other.db' AS other", "attaches another database", "one database of both"),
        ("SELECT * FROM songs JOIN ratings", "two columns are called 'id'", "SELECT a.id AS a_id"),
        ("SELECT * FROM songs WHERE id > 9", "no rows", "add rows"),
        ("SELECT CAST(cover AS TEXT) AS c FROM ratings", "Could not decode to UTF-8", "leave the column out"),
    ],
)
def test_a_wrong_query_is_an_error_with_fix(songs: Path, query: str | None, reason: str, fix: str) -> None:
    before = songs.read_bytes()
    with pytest.raises(DataError) as caught:
        read(songs, query)
    assert caught.value.message.startswith(songs.name) and reason in caught.value.message
    assert fix in (caught.value.fix or "") and "\n" not in str(caught.value)
    assert songs.read_bytes() == before


def test_bytes_that_nobody_asks_for_do_not_hinder(songs: Path) -> None:
    assert read(songs, "SELECT cover FROM ratings")[0][1]["cover"] == b"\xff\xd8"


def test_what_is_no_database_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_text("hello " * 200)
    with pytest.raises(DataError, match=r"x.db: file is not a database") as caught:
        read(tmp_path / "x.db")
    assert "name a SQLite file" in (caught.value.fix or "")
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path / "none.db")
    (tmp_path / "folder.db").mkdir()
    with pytest.raises(DataError, match=r"folder.db: a folder, not a database"):
        read(tmp_path / "folder.db")


def test_a_damaged_name_of_a_column_is_an_error(songs: Path) -> None:
    songs.write_bytes(songs.read_bytes().replace(b"lyrics TEXT", b"lyri\xffs TEXT"))
    with pytest.raises(DataError, match="the name of a column is not UTF-8"):
        read(songs, "SELECT * FROM songs")


def test_a_database_named_by_path_or_a_query_without_one_is_an_error(songs: Path) -> None:
    with pytest.raises(DataError, match="a SQLite database") as caught:
        list(read_source(SourceConfig(path=songs.name), None, songs.parent))
    assert "query: SELECT" in (caught.value.fix or "")
    with pytest.raises(ConfigError, match="query without sqlite"):
        list(read_source(SourceConfig(path=songs.name, query="SELECT 1"), None, songs.parent))


def test_a_locked_database_is_an_error(songs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = sqlite3.connect(songs)
    writer.execute("BEGIN EXCLUSIVE")
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **more: connect(*args, **{**more, "timeout": 0}))
    with pytest.raises(DataError, match="database is locked: another program is writing to it") as caught:
        read(songs)
    assert "close that program" in (caught.value.fix or "")
    writer.rollback()
    writer.close()


@pytest.fixture
def app(songs: Path) -> Iterator[sqlite3.Connection]:
    """A program that has the database open and writes ahead of it."""
    database = sqlite3.connect(songs)
    database.execute("PRAGMA journal_mode=WAL")
    yield database
    database.close()


def key(songs: Path) -> str:
    recipe = songs.parent / "recipe.yaml"
    recipe.write_text(
        f"""
name: gold
task: moderation
teacher: t
student: s
data: {{sources: [{{sqlite: '{songs.name}', query: SELECT * FROM songs}}]}}
"""
    )
    loaded = load_recipe(recipe)
    data = graph(loaded, loaded.load_task())[0]
    assert data.inputs[0] == str(songs) and data.local == data.inputs
    return current_key(data, {})


def test_rows_that_wait_in_the_write_ahead_log_are_part_of_it(songs: Path, app: sqlite3.Connection) -> None:
    before, main_file = key(songs), songs.read_bytes()
    app.execute("INSERT INTO songs VALUES (3, 'Hill', 'hm')")
    app.commit()
    assert songs.read_bytes() == main_file  # the row is in the log alone
    assert len(read(songs, "SELECT title FROM songs")) == 3
    after = key(songs)
    assert after != before and key(songs) == after
    log = songs.with_name(songs.name + "-wal")
    assert log.stat().st_size and songs.read_bytes() == main_file  # reading has changed nothing


def test_another_query_is_another_key(songs: Path) -> None:
    first = SourceConfig(sqlite="a.db", query="SELECT 1")
    assert first != SourceConfig(sqlite="a.db", query="SELECT 2")
    before = key(songs)
    with sqlite3.connect(songs) as database:
        database.execute("INSERT INTO songs VALUES (3, 'Hill', 'hm')")
    database.close()
    assert key(songs) != before
