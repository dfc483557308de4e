"""Soft targets on disk: written and read back, interrupted and continued, damaged and reported."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_distill.distill.teacher_cache import TargetReader, TargetWriter, TeacherTargets
from mlx_distill.errors import FileError

K = 3


def make_rows(count: int, seed: int = 0) -> list[TeacherTargets]:
    random = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        n = int(random.integers(1, 7))
        rows.append(
            TeacherTargets(
                f"row-{seed}-{i}",
                f"text {i} Ä\u2028",
                random.normal(size=4).astype(np.float32) if i % 3 else None,
                random.integers(0, 200_000, n).astype(np.int32),
                random.normal(size=n).astype(np.float32),
                random.integers(0, 200_000, (n, K)).astype(np.int32),
                -np.sort(random.exponential(9, (n, K)), 1).astype(np.float32),
            )
        )
    return rows


ROWS = [make_rows(5, 0), make_rows(1, 1), make_rows(4, 2)]


def write(folder: Path, shards: list[list[TeacherTargets]] = ROWS, **facts: Any) -> Path:
    writer = TargetWriter(folder)
    for shard in shards:
        writer.write(shard)
    writer.finish(labels=["a", "b", "c", "d"], **facts)
    return folder


def same(one: TeacherTargets, other: TeacherTargets) -> None:
    assert (one.id, one.text) == (other.id, other.text)
    for name in ("label_logprobs", "ids", "logprobs", "topk_ids"):
        a, b = getattr(one, name), getattr(other, name)
        if a is None or b is None:
            assert a is b, name
            continue
        assert a.dtype == b.dtype and (a == b).all(), name
    assert other.topk_logprobs.dtype == np.float32
    assert (
        other.topk_logprobs == one.topk_logprobs.astype(np.float16)
    ).all()  # half precision, and nothing else is lost


def test_what_was_written_is_read_back_in_its_order(tmp_path: Path) -> None:
    reader = TargetReader(write(tmp_path / "targets", top_k=K))
    assert len(reader) == 10 and reader.labels == ("a", "b", "c", "d") and reader.index["top_k"] == K
    rows = list(reader)
    assert len(rows) == 10
    for one, other in zip([row for shard in ROWS for row in shard], rows, strict=True):
        same(one, other)
    assert [row.id for row in reader] == [row.id for row in rows]  # and again


def test_a_token_costs_what_the_format_says(tmp_path: Path) -> None:
    rows = [
        TeacherTargets(
            "x",
            "",
            None,
            np.zeros(1000, np.int32),
            np.zeros(1000, np.float32),
            np.zeros((1000, 32), np.int32),
            np.zeros((1000, 32)),
        )
    ]
    size = (write(tmp_path, [rows]) / "tokens-00000.safetensors").stat().st_size
    assert size - 1000 * (6 * 32 + 8) < 1000


@pytest.mark.parametrize("interrupted", [0, 1, 2])
def test_an_interrupted_writer_continues_after_its_last_complete_shard(
    tmp_path: Path, interrupted: int
) -> None:
    writer = TargetWriter(tmp_path / "interrupted")
    for shard in ROWS[:interrupted]:
        writer.write(shard)
    # Killed between a shard's rows and its tokens.
    (tmp_path / "interrupted" / f"rows-{interrupted:05d}.jsonl").write_text('{"id": "half"')
    again = TargetWriter(tmp_path / "interrupted")
    assert again.done == sum(len(shard) for shard in ROWS[:interrupted])
    for shard in ROWS[interrupted:]:
        again.write(shard)
    again.finish(labels=["a", "b", "c", "d"])
    write(tmp_path / "whole")
    for path in sorted((tmp_path / "whole").iterdir()):
        assert (tmp_path / "interrupted" / path.name).read_bytes() == path.read_bytes()
    assert sorted(os.listdir(tmp_path / "interrupted")) == sorted(os.listdir(tmp_path / "whole"))


@pytest.mark.parametrize("damage", ["truncated", "missing", "short"])
def test_a_damaged_shard_is_named_with_a_fix(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path / "targets") / "tokens-00002.safetensors"
    if damage == "truncated":
        os.truncate(path, path.stat().st_size - 5)
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes((tmp_path / "targets" / "tokens-00001.safetensors").read_bytes())
    with pytest.raises(FileError) as caught:
        list(TargetReader(tmp_path / "targets"))
    assert "tokens-00002.safetensors" in caught.value.message and "mlx-distill targets" in (
        caught.value.fix or ""
    )


def test_another_format_is_refused(tmp_path: Path) -> None:
    index = write(tmp_path / "targets") / "index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "format": 99}))
    with pytest.raises(FileError, match="format 99, not 2") as caught:
        TargetReader(tmp_path / "targets")
    assert "mlx-distill targets" in (caught.value.fix or "")
    index.unlink()
    with pytest.raises(FileError, match=r"index\.json"):
        TargetReader(tmp_path / "targets")
