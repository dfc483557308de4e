"""Rows of arrays on the disk: what was written comes back, whole or not at all, and training cannot tell it
from a list.
"""

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


def some_rows(count: int = 23) -> list[Arrays]:
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
    rows = some_rows()
    store = write(tmp_path / "store", rows)
    assert (
        len(store) == 23
        and store.lengths.tolist() == [len(row["tokens"]) for row in rows]
        and store.facts == {"rows": 23}
    )
    for number in [*np.random.default_rng(1).permutation(23).tolist(), -1, -23]:
        found, row = store[number], rows[number]
        assert list(found) == list(row)
        for name, array in row.items():
            assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape) and found[
                name
            ].tobytes() == array.tobytes()
            assert found[name].flags.aligned and not found[name].flags.writeable
    assert [row["weight"].item() for row in store[3:9:2]] == [row["weight"].item() for row in rows[3:9:2]]
    assert sum(1 for _ in store) == 23
    for number in (23, -24):
        with pytest.raises(IndexError):
            store[number]


def test_no_rows_are_a_store_too(tmp_path: Path) -> None:
    store = write(tmp_path / "store", [])
    assert len(store) == 0 and store.lengths.tolist() == [] and list(store) == []


@pytest.mark.parametrize("packing", [False, True])
def test_batches_of_a_store_are_those_of_a_list(tmp_path: Path, packing: bool) -> None:
    pieces = [TokenizedRow(row["tokens"], row["trained"]) for row in some_rows(60)]
    with StoreWriter(tmp_path / "store") as writer:
        for piece in pieces:
            writer.append(tokens=piece.tokens, trained=piece.trained)
    store = Store(tmp_path / "store", TokenizedRow)
    lines = plan_sequences([len(piece.tokens) for piece in pieces], 64, 0, packing)
    assert plan_sequences(store.lengths.tolist(), 64, 0, packing) == lines
    for chosen in plan_epoch(lines.lengths, 4, seed=0, epoch=1):
        ours, theirs = (collate(rows, lines.rows_of(chosen), 0, lines.multiple) for rows in (store, pieces))
        assert ours.rows == theirs.rows and (ours.segments is None) == (theirs.segments is None)
        for name in (
            "inputs",
            "labels",
            "mask",
            *(["segments"] if packing and ours.segments is not None else []),
        ):
            assert np.array_equal(np.array(getattr(ours, name)), np.array(getattr(theirs, name))), name


def test_an_order_reads_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = write(tmp_path / "store", some_rows())
    read: list[int] = []
    whole = os.pread
    monkeypatch.setattr(
        "os.pread", lambda handle, size, start: (read.append(size), whole(handle, size, start))[1]
    )
    for epoch in range(3):
        assert plan_epoch(plan_sequences(store.lengths.tolist(), 64, 0, True).lengths, 4, seed=0, epoch=epoch)
    assert read == []
    assert store[4]["tokens"].size and len(read) == 1


def test_the_content_is_the_rows_and_their_order(tmp_path: Path) -> None:
    rows = some_rows()
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
    found = {write(tmp_path / f"other{number}", other).content for number, other in enumerate(others)}
    assert len(found) == len(others) and content not in found


def test_a_key_says_what_it_was_made_from(tmp_path: Path) -> None:
    place = tmp_path / "store"
    assert not is_stored(place, "one")
    write(place, some_rows(), "one")
    assert is_stored(place, "one") and not is_stored(place, "two")
    write(place, some_rows(5), "two")
    assert is_stored(place, "two") and not is_stored(place, "one") and len(Store(place, dict)) == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store"]


def test_rows_have_the_same_arrays(tmp_path: Path) -> None:
    row = some_rows(1)[0]
    for other in (
        {"tokens": row["tokens"]},
        {**row, "tokens": row["tokens"].astype(np.int64)},
        {**row, "top": np.zeros((1, 4), np.float16)},
    ):
        with pytest.raises(ValueError, match="row 1"):
            write(tmp_path / "store", [row, other])
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_fails_leaves_what_stood_there(tmp_path: Path) -> None:
    place = tmp_path / "store"
    write(place, some_rows(), "old")
    with pytest.raises(KeyError), StoreWriter(place, "new") as writer:
        writer.append(**some_rows()[0])
        raise KeyError
    assert is_stored(place, "old") and [p.name for p in tmp_path.iterdir()] == ["store"]


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(FileError, match="no space left") as caught:
        write(tmp_path / "store", some_rows())
    assert "free some space" in (caught.value.fix or "") and list(tmp_path.iterdir()) == []


def _cut(name: str) -> Callable[[Path], Any]:
    return lambda place: os.truncate(place / name, (place / name).stat().st_size - 4)


def _old(place: Path) -> None:
    index = json.loads((place / "index.json").read_text())
    (place / "index.json").write_text(json.dumps({**index, "format": 0}))


@pytest.mark.parametrize(
    "damage",
    [
        _cut("rows.bin"),
        _cut("counts.bin"),
        _old,
        lambda place: (place / "rows.bin").unlink(),
        lambda place: (place / "index.json").unlink(),
    ],
    ids=["rows", "counts", "version", "no rows", "no index"],
)
def test_half_a_store_is_none(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    place = tmp_path / "store"
    write(place, some_rows(), "key")
    damage(place)
    assert not is_stored(place, "key")
    with pytest.raises(FileError) as caught:
        Store(place, dict)
    assert "same command again" in (caught.value.fix or "")


def test_rows_that_vanish_under_a_reader(tmp_path: Path) -> None:
    place = tmp_path / "store"
    store = write(place, some_rows())
    _cut("rows.bin")(place)
    assert store[0]["tokens"].size
    with pytest.raises(FileError, match=r"rows\.bin: ends at"):
        store[22]
    # An open store does not need its folder's name any more: a stage that is done takes its scratch away.
    shutil.rmtree(place)
    assert store[0]["tokens"].size


def test_what_a_kill_left_is_no_store_and_in_nobodys_way(tmp_path: Path) -> None:
    left = tmp_path / ".store.tmp"
    write(tmp_path / "other", some_rows(), "key")
    shutil.copytree(tmp_path / "other", left)  # all but the rename
    shutil.rmtree(tmp_path / "other")
    assert not is_stored(tmp_path / "store", "key")
    assert len(write(tmp_path / "store", some_rows(3), "key")) == 3 and [
        p.name for p in tmp_path.iterdir()
    ] == ["store"]
