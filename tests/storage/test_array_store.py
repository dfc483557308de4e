"""Stored rows of arrays are read back as written, and make the same batches as rows in a list."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_distill.data.batching import collate, plan_epoch
from mlx_distill.data.chat import TokenizedRow
from mlx_distill.data.packing import plan_sequences
from mlx_distill.errors import FileError
from mlx_distill.storage.array_store import Store, StoreWriter, is_stored

Arrays = dict[str, np.ndarray]


def make_rows(count: int = 23) -> list[Arrays]:
    random = np.random.default_rng(0)
    return [
        {
            "tokens": random.integers(0, 1000, n).astype(np.int32),
            "trained": random.random(n - 1) < 0.5,
            "top": random.normal(size=(n % 4, 3)).astype(np.float16),
            "weight": np.array([n], dtype=np.float64),
        }
        for n in random.integers(2, 40, count).tolist()
    ]


def write(folder: Path, rows: list[Arrays], key: str = "") -> Store[Arrays]:
    with StoreWriter(folder, key) as writer:
        for row in rows:
            writer.append(**row)
        writer.facts = {"rows": writer.rows}
    return Store(folder, dict)


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    rows = make_rows()
    store = write(tmp_path / "store", rows)
    assert (
        len(store) == 23
        and store.lengths.tolist() == [len(row["tokens"]) for row in rows]
        and store.facts == {"rows": 23}
    )
    for number in [*np.random.default_rng(1).permutation(23).tolist(), -1, -23]:
        read, row = store[number], rows[number]
        assert list(read) == list(row)
        for name, array in row.items():
            assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape) and read[
                name
            ].tobytes() == array.tobytes()
            assert read[name].flags.aligned and not read[name].flags.writeable
    assert [row["weight"].item() for row in store[3:9:2]] == [row["weight"].item() for row in rows[3:9:2]]
    assert sum(1 for _ in store) == 23
    for number in (23, -24):
        with pytest.raises(IndexError):
            store[number]


def test_a_store_may_have_no_rows(tmp_path: Path) -> None:
    store = write(tmp_path / "store", [])
    assert len(store) == 0 and store.lengths.tolist() == [] and list(store) == []


@pytest.mark.parametrize("packing", [False, True])
def test_batches_of_a_store_are_those_of_a_list(tmp_path: Path, packing: bool) -> None:
    tokenized = [TokenizedRow(row["tokens"], row["trained"]) for row in make_rows(60)]
    with StoreWriter(tmp_path / "store") as writer:
        for row_tokens in tokenized:
            writer.append(tokens=row_tokens.tokens, trained=row_tokens.trained)
    store = Store(tmp_path / "store", TokenizedRow)
    plan = plan_sequences([len(row_tokens.tokens) for row_tokens in tokenized], 64, 0, packing)
    assert plan_sequences(store.lengths.tolist(), 64, 0, packing) == plan
    for chosen in plan_epoch(plan.lengths, 4, seed=0, epoch=1):
        ours, theirs = (collate(rows, plan.rows_of(chosen), 0, plan.multiple) for rows in (store, tokenized))
        assert ours.rows == theirs.rows and (ours.segments is None) == (theirs.segments is None)
        for name in (
            "inputs",
            "labels",
            "mask",
            *(["segments"] if packing and ours.segments is not None else []),
        ):
            assert np.array_equal(np.array(getattr(ours, name)), np.array(getattr(theirs, name))), name


def test_planning_an_epoch_reads_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = write(tmp_path / "store", make_rows())
    read: list[int] = []
    whole = os.pread
    monkeypatch.setattr(
        "os.pread", lambda handle, size, start: (read.append(size), whole(handle, size, start))[1]
    )
    for epoch in range(3):
        assert plan_epoch(plan_sequences(store.lengths.tolist(), 64, 0, True).lengths, 4, seed=0, epoch=epoch)
    assert read == []
    assert store[4]["tokens"].size and len(read) == 1


def test_the_content_hash_depends_on_the_rows_and_their_order(tmp_path: Path) -> None:
    rows = make_rows()
    content = write(tmp_path / "a", rows, "key").content
    assert write(tmp_path / "b", rows, "another key").content == content
    longer = {**rows[0], "tokens": np.append(rows[0]["tokens"], np.int32(0))}
    masked = {**rows[0], "trained": ~rows[0]["trained"]}
    wide = [{**row, "tokens": row["tokens"].astype(np.int64)} for row in rows]
    named = [
        {"ids": row["tokens"], "trained": row["trained"], "top": row["top"], "weight": row["weight"]}
        for row in rows
    ]
    others = [rows[::-1], rows[:-1], [longer, *rows[1:]], [masked, *rows[1:]], wide, named]
    contents = {write(tmp_path / f"other{number}", other).content for number, other in enumerate(others)}
    assert len(contents) == len(others) and content not in contents


def test_a_store_is_found_under_its_key_only(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    assert not is_stored(folder, "one")
    write(folder, make_rows(), "one")
    assert is_stored(folder, "one") and not is_stored(folder, "two")
    write(folder, make_rows(5), "two")
    assert is_stored(folder, "two") and not is_stored(folder, "one") and len(Store(folder, dict)) == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store"]


def test_rows_have_the_same_arrays(tmp_path: Path) -> None:
    row = make_rows(1)[0]
    for other in (
        {"tokens": row["tokens"]},
        {**row, "tokens": row["tokens"].astype(np.int64)},
        {**row, "top": np.zeros((1, 4), np.float16)},
    ):
        with pytest.raises(ValueError, match="row 1"):
            write(tmp_path / "store", [row, other])
    assert list(tmp_path.iterdir()) == []


def test_a_failed_writer_leaves_the_old_store(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    write(folder, make_rows(), "old")
    with pytest.raises(KeyError), StoreWriter(folder, "new") as writer:
        writer.append(**make_rows()[0])
        raise KeyError
    assert is_stored(folder, "old") and [p.name for p in tmp_path.iterdir()] == ["store"]


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(FileError, match="no space left") as caught:
        write(tmp_path / "store", make_rows())
    assert "free some space" in (caught.value.fix or "") and list(tmp_path.iterdir()) == []


def truncated(name: str) -> Callable[[Path], Any]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 4)


def older_format(folder: Path) -> None:
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "format": 0}))


@pytest.mark.parametrize(
    "damage",
    [
        truncated("rows.bin"),
        truncated("counts.bin"),
        older_format,
        lambda folder: (folder / "rows.bin").unlink(),
        lambda folder: (folder / "index.json").unlink(),
    ],
    ids=["rows", "counts", "version", "no rows", "no index"],
)
def test_an_incomplete_store_is_not_read(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    folder = tmp_path / "store"
    write(folder, make_rows(), "key")
    damage(folder)
    assert not is_stored(folder, "key")
    with pytest.raises(FileError) as caught:
        Store(folder, dict)
    assert "same command again" in (caught.value.fix or "")


def test_a_file_that_is_truncated_while_it_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    store = write(folder, make_rows())
    truncated("rows.bin")(folder)
    assert store[0]["tokens"].size
    with pytest.raises(FileError, match=r"rows\.bin: ends at"):
        store[22]
    # An open store can be read after its folder is deleted: a finished stage deletes its scratch folder.
    shutil.rmtree(folder)
    assert store[0]["tokens"].size


def test_the_leftover_of_a_killed_writer_is_not_a_store_and_is_replaced(tmp_path: Path) -> None:
    left = tmp_path / ".store.tmp"
    write(tmp_path / "other", make_rows(), "key")
    shutil.copytree(tmp_path / "other", left)  # all but the rename
    shutil.rmtree(tmp_path / "other")
    assert not is_stored(tmp_path / "store", "key")
    assert len(write(tmp_path / "store", make_rows(3), "key")) == 3 and [
        p.name for p in tmp_path.iterdir()
    ] == ["store"]
