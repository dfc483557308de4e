"""Rows in every kind of file, and what is said of files that are damaged or not what their name says."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from mlx_distill.data.prepare import prepare
from mlx_distill.data.sources import read_source
from mlx_distill.errors import ConfigError, DataError
from mlx_distill.graph import graph
from mlx_distill.recipe import DataConfig, Recipe, SourceConfig, ValueConfig
from mlx_distill.status import current_key
from mlx_distill.storage import fingerprint
from mlx_distill.tasks.task import Task

ROWS = [
    {"title": "Rain", "text": "la, la", "verdict": "yes", "score": 95, "why": None, "genre": "folk"},
    {"title": 'The "Sea"', "text": "ho\nho", "verdict": "no", "score": 5, "why": "déjà", "genre": "pop"},
]
ANSWER = {"verdict": "yes", "score": 95}


def read(path: Path, task: Task | None = None, **settings: Any) -> list[dict[str, Any]]:
    return [row for _, row in read_source(SourceConfig(path=path.name, **settings), task, path.parent)]


def csv_text(delimiter: str = ",", **settings: Any) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, ROWS[0], delimiter=delimiter, **settings)
    writer.writeheader()
    writer.writerows(ROWS)
    return out.getvalue()


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    """Write rows as the ending of the path says."""
    table = pa.Table.from_pylist(rows)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    match path.suffix:
        case ".parquet":
            pyarrow.parquet.write_table(table, path, row_group_size=1)
        case ".feather":
            pyarrow.feather.write_feather(table, path)
        case ".arrow":
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)
        case ".ipc":
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
        case ".csv":
            path.write_text(csv_text(), encoding="utf-8")
        case ".tsv":
            path.write_text(csv_text("\t"), encoding="utf-8")
        case ".gz":
            path.write_bytes(gzip.compress(lines))
        case ".bz2":
            path.write_bytes(bz2.compress(lines))
        case ".xz":
            path.write_bytes(lzma.compress(lines))
        case ".zst":
            with pa.output_stream(str(path), compression="zstd") as file:
                file.write(lines)
        case _:
            path.write_bytes(lines)
    return path


@pytest.mark.parametrize(
    "name",
    [
        *("r.parquet", "r.feather", "r.arrow", "r.ipc", "r.csv", "r.tsv", "r.jsonl", "r.ndjson", "r.json"),
        *("r.jsonl.gz", "r.jsonl.bz2", "r.jsonl.xz", "r.jsonl.zst", "r.JSON.GZ".lower()),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, task: Task, name: str) -> None:
    path = write(tmp_path / name)
    assert read(path, task) == ROWS
    assert len(read(path, task, count=1)) == 1
    where = next(read_source(SourceConfig(path=name), task, tmp_path))[0]
    assert where == f"{name}:{2 if name in ('r.csv', 'r.tsv') else 1}"


def test_compressed_files_of_every_kind_and_with_another_name(tmp_path: Path, task: Task) -> None:
    (tmp_path / "r.csv.gz").write_bytes(gzip.compress(csv_text().encode()))
    (tmp_path / "r.json.bz2").write_bytes(bz2.compress(json.dumps(ROWS, indent=1).encode()))
    (tmp_path / "plain.jsonl").write_bytes(gzip.compress(write(tmp_path / "r.jsonl").read_bytes()))
    for name in ("r.csv.gz", "r.json.bz2", "plain.jsonl"):
        assert read(tmp_path / name, task) == ROWS


@pytest.mark.parametrize(
    "name", ["r.jsonl.gz", "r.jsonl.bz2", "r.jsonl.xz", "r.jsonl.zst", "r.parquet", "r.arrow"]
)
def test_a_file_that_is_cut_off_is_an_error(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=name) as caught:
        read(path)
    assert "cut off" in (caught.value.fix or "")


def test_the_texts_of_a_damaged_table_are_not_read_beyond_its_memory(tmp_path: Path) -> None:
    table = pa.table({"text": ["ab", "cd"]})
    path = tmp_path / "r.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    ends = b"\0\0\0\0\2\0\0\0\4\0\0\0"
    assert path.read_bytes().count(ends) == 1
    path.write_bytes(path.read_bytes().replace(ends, ends[:-4] + b"\0\xff\xff\x7f"))
    with pytest.raises(DataError, match=r"r.arrow: cannot be read") as caught:
        read(path)
    assert "damaged" in (caught.value.fix or "")


def test_a_file_that_is_another_kind_is_an_error(tmp_path: Path) -> None:
    for name in ("r.parquet", "r.arrow"):
        (tmp_path / name).write_text("not a table")
        with pytest.raises(DataError, match=f"{name}: cannot be read") as caught:
            read(tmp_path / name)
        assert caught.value.fix
    (tmp_path / "old.feather").write_bytes(b"FEA1" + b"\0" * 20)
    with pytest.raises(DataError, match="Feather of version 1"):
        read(tmp_path / "old.feather")


@pytest.mark.parametrize(
    "text",
    [
        csv_text(),
        "\ufeff" + csv_text(),
        csv_text().replace("\r\n", "\n"),
        csv_text().replace("\r\n", "\r\n\r\n", 1),
        csv_text(";"),
        csv_text("|"),
        csv_text(quoting=csv.QUOTE_ALL),
        csv_text()
        .replace("title,", ",title,")
        .replace("Rain", "0,Rain")
        .replace('"The', '1,"The'),  # an index
        "\r\n".join(
            line + "," if line.endswith(("genre", "folk", "pop")) else line
            for line in csv_text().split("\r\n")
        ),
    ],
)
def test_csv_as_programs_write_it(tmp_path: Path, task: Task, text: str) -> None:
    path = tmp_path / "r.csv"
    path.write_bytes(text.encode())
    assert read(path, task) == ROWS


def test_cells_of_a_csv_file_fit_the_answers_schema(tmp_path: Path, task: Task) -> None:
    path = tmp_path / "r.csv"
    path.write_text("song,words,judgement,points,year,genre\nRain,la,yes, 95 ,1999,folk\n")
    columns = {"title": "song", "text": "words", "verdict": "judgement", "score": "points"}
    assert read(path, task, columns=columns, where={"year": 1999})[0]["points"] == 95
    assert read(path, task, columns=columns)[0]["year"] == "1999"  # no field of the answer: text
    data = DataConfig(
        sources=[SourceConfig(path=str(path), columns=columns)], valid_fraction=0, test_fraction=0
    )
    assert prepare(data, task, None, tmp_path)["rows"]["train"] == 1
    assert json.loads((tmp_path / "train.jsonl").read_text())["answer"] == ANSWER


def test_values_are_mapped_from_the_cells(tmp_path: Path, task: Task) -> None:
    path = tmp_path / "r.csv"
    path.write_text("title,text,stars,hit,genre\nRain,la,0.95,1,folk\n")
    values = {
        "score": ValueConfig(field="stars", scale=100, round=True),
        "verdict": ValueConfig(field="hit", map={"0": "no", "1": "yes"}),
    }
    source = SourceConfig(path=str(path), values=values)
    prepare(DataConfig(sources=[source], valid_fraction=0, test_fraction=0), task, None, tmp_path)
    assert json.loads((tmp_path / "train.jsonl").read_text())["answer"] == ANSWER


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a,b\n1\n", "r.csv:2: 1 cells, and the header has 2: a, b"),
        ("a,b\n1,2\n\n1,2,3\n", "r.csv:4: 3 cells"),
        ('a,b\n1,"2\n3,4\n', "r.csv:2: not CSV: unexpected end of data"),
        ('a,b\n1,2\n3,"x"y\n', "r.csv:3: not CSV"),
        ("a,a\n1,2\n", "two columns are called 'a'"),
        (b"a,b\n1,2\ncaf\xe9,2\n", r"r.csv:3: not UTF-8 \(byte 3 of the line\)"),
        ("a,b\n", "r.csv: no rows"),
        ("", "r.csv: no rows"),
    ],
)
def test_a_bad_csv_file_is_an_error_with_its_line(tmp_path: Path, text: str | bytes, reason: str) -> None:
    path = tmp_path / "r.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=reason) as caught:
        read(path)
    assert caught.value.fix and "\n" not in str(caught.value)


def test_a_text_of_a_megabyte_fits_a_cell(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text(f"a,b\n{'x' * 1_000_000},2\n")
    assert len(read(tmp_path / "r.csv")[0]["a"]) == 1_000_000


@pytest.fixture(scope="module")
def features() -> Any:
    from datasets import ClassLabel, Features, Image, List, Value

    names = ClassLabel(names=["no", "yes"])
    return Features(
        {
            "text": Value("string"),
            "verdict": names,
            "score": ClassLabel(names=["low", "high"]),
            "tags": List(names),
            "cover": Image(),
            "at": Value("timestamp[us]"),
        }
    )


DECODED = [
    {"text": "la", "verdict": "yes", "score": 1, "tags": ["no"]},
    {"text": "ho", "verdict": "no", "score": 0, "tags": []},
]


def saved(features: Any) -> Any:
    from datasets import Dataset

    return Dataset.from_dict(
        {
            "text": ["la", "ho"],
            "verdict": [1, 0],
            "score": [1, 0],
            "tags": [[0], []],
            "cover": [None, None],
            "at": [0, 1],
        },
        features=features,
    )


def without_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    assert all(set(row) == {"text", "verdict", "score", "tags", "at"} for row in rows)
    return [{key: value for key, value in row.items() if key != "at"} for row in rows]


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No progress bars of datasets on standard error."""
    from datasets import disable_progress_bars

    disable_progress_bars()


@pytest.mark.usefixtures("quiet")
def test_class_numbers_become_names_wherever_datasets_wrote_them(
    tmp_path: Path, features: Any, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    data = saved(features)
    (tmp_path / "hub" / "data").mkdir(parents=True)
    data.to_parquet(str(tmp_path / "hub" / "data" / "train-00000.parquet"))
    data.save_to_disk(str(tmp_path / "disk"))
    for source in (
        SourceConfig(path="hub/data/train-00000.parquet"),
        SourceConfig(path="hub"),
        SourceConfig(hub="hub"),
        SourceConfig(hub="./hub"),
        SourceConfig(path="disk"),
        SourceConfig(hub="disk"),
        SourceConfig(path=str(next((tmp_path / "disk").glob("*.arrow")))),
    ):
        # The score is a number in the task's schema, so its class stays one.
        assert without_time([row for _, row in read_source(source, task, tmp_path)]) == DECODED, source


@pytest.mark.usefixtures("quiet")
def test_the_split_of_a_saved_data_set_is_chosen_and_said(tmp_path: Path, features: Any) -> None:
    from datasets import DatasetDict

    data = saved(features)
    DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(str(tmp_path / "disk"))
    notes: list[str] = []
    rows = list(read_source(SourceConfig(path="disk"), None, tmp_path, notes.append))
    assert len(rows) == 2 and notes == ["disk: the split train is read, not test"]
    assert [row["text"] for row in read(tmp_path / "disk", hub_split="test")] == ["ho"]
    with pytest.raises(DataError, match="no split 'dev', it has train, test") as caught:
        read(tmp_path / "disk", hub_split="dev")
    assert "hub_split: train" in (caught.value.fix or "")


def test_a_damaged_saved_data_set_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="disk: cannot be read"):
        read(tmp_path / "disk")


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.table([pa.array([1]), pa.array([2])], names=["a", "a"])
    pyarrow.parquet.write_table(table, tmp_path / "r.parquet")
    with pytest.raises(DataError, match="two columns are called 'a'"):
        read(tmp_path / "r.parquet")


def test_a_folder_is_read_file_by_file_and_what_is_skipped_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "songs"
    write(folder / "b.jsonl", ROWS[1:])
    write(folder / "a" / "x.jsonl.gz", ROWS[:1])
    (folder / "README.md").write_text("about")
    (folder / "info.json").write_text("{}")
    write(folder / ".cache" / "c.jsonl")
    (folder / ".DS_Store").write_bytes(b"\0")
    notes: list[str] = []
    rows = list(read_source(SourceConfig(path="songs/"), None, tmp_path, notes.append))
    assert rows == [("songs/a/x.jsonl.gz:1", ROWS[0]), ("songs/b.jsonl:1", ROWS[1])]
    assert notes == ["songs/: 2 of 4 files are read; not README.md, info.json"]


def test_the_files_of_a_folder_may_be_named_by_splits(tmp_path: Path) -> None:
    folder = tmp_path / "songs"
    write(folder / "train-00000.jsonl", ROWS[:1])
    write(folder / "test" / "00000.jsonl", ROWS[1:])
    write(folder / "notes.jsonl")
    notes: list[str] = []
    rows = list(read_source(SourceConfig(path="songs"), None, tmp_path, notes.append))
    assert [row for _, row in rows] == ROWS[:1]
    assert notes == ["songs: 1 of 3 files are read; not notes.jsonl, test/00000.jsonl"]
    assert read(folder, hub_split="test") == ROWS[1:]
    with pytest.raises(DataError, match="no split 'validation', it has test, train"):
        read(folder, hub_split="validation")
    write(tmp_path / "trains" / "contest.jsonl")  # words, not names of splits
    assert read(tmp_path / "trains") == ROWS


def test_a_folder_of_several_kinds_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "songs" / "a.jsonl")
    write(tmp_path / "songs" / "a.csv")
    with pytest.raises(DataError, match="files of several kinds: CSV, JSONL"):
        read(tmp_path / "songs")


def test_a_pipe_is_read_once_as_jsonl(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text(json.dumps(ROWS[0]) + "\n"))
    writer.start()
    assert read(pipe) == ROWS[:1]
    writer.join()


def test_a_column_that_no_row_has_is_an_error_with_the_nearest_one(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl")
    with pytest.raises(ConfigError, match="columns: no row has the column 'verdikt'") as caught:
        read(path, columns={"answer": "verdikt"})
    assert "did you mean 'verdict'?" in (caught.value.fix or "")
    assert read(path, columns={"answer": "verdict"}) == ROWS


@pytest.mark.parametrize(
    ("where", "fix"),
    [
        ({"gender": "folk"}, "they have title, text, verdict, score, why, genre; did you mean 'genre'?"),
        ({"genre": "Folk"}, "values of genre: folk, pop; did you mean 'folk'?"),
        ({"genre": "folk", "verdict": "no"}, "each value occurs, but not in one row"),
    ],
)
def test_where_that_fits_no_row_says_what_exists(tmp_path: Path, where: dict[str, Any], fix: str) -> None:
    with pytest.raises(DataError, match="no row fits where: ") as caught:
        read(write(tmp_path / "r.jsonl"), where=where)
    assert caught.value.fix == fix


def test_where_may_name_a_field_of_the_task(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl")
    assert read(path, where={"style": "folk"}, columns={"style": "genre"}) == ROWS[:1]


def test_every_file_of_a_folder_is_part_of_the_key(tmp_path: Path) -> None:
    def key(source: SourceConfig) -> str:
        task: Any = "moderation"
        recipe = Recipe("r", "t", task, "s", data=DataConfig(sources=[source]), base=tmp_path)
        data = graph(recipe, recipe.load_task())[0]
        assert data.inputs == data.local == (str(tmp_path / "songs"),)
        return current_key(data, {})

    write(tmp_path / "songs" / "data" / "train.jsonl", ROWS[:1])
    sources = [SourceConfig(path="songs"), SourceConfig(hub="songs"), SourceConfig(hub="songs:part")]
    before = [key(source) for source in sources]
    write(tmp_path / "songs" / "data" / "train-2.jsonl")
    assert all(key(source) != old for source, old in zip(sources, before, strict=True))


def test_files_of_rows_are_hashed_to_their_end(tmp_path: Path) -> None:
    hashes = set()
    for end in (b"a", b"b"):
        write(tmp_path / "r.jsonl").write_bytes(b"x" * 2_000_000 + end)
        hashes.add(fingerprint(str(tmp_path), hashed_whole=1000))
    assert len(hashes) == 2
