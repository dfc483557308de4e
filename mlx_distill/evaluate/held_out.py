"""What weakens a comparison on held-out rows: that they were trained on, or looked at often."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlx_distill.errors import FileError
from mlx_distill.storage import read_json, read_jsonl, write_json

LOOKS = "looks.json"
_TRAINED = ("train", "valid")


def leaked_ids(rows: Sequence[Mapping[str, Any]], runs: Iterable[Path]) -> list[str] | None:
    """The ids of compared rows whose input is also a training or validation row of a run; None where no run
    is known. Case and white space do not count.

    Args:
        rows: The compared rows, with ``input``.
        runs: Folders of the runs that the models come from.
    """
    files = [run / "data" / f"{split}.jsonl" for run in dict.fromkeys(runs) for split in _TRAINED]
    files = [file for file in files if file.is_file()]
    if not files:
        return None
    known = {_digest(row["input"]): str(row["id"]) for row in rows if row.get("input")}
    leaked: dict[str, None] = {}
    for file in files:
        for _, row in read_jsonl(file):
            turns = [turn["content"] for turn in row["messages"] if turn["role"] == "user"]
            key = _digest(turns[-1]) if turns else b""
            if key in known:
                leaked[known[key]] = None
    return list(leaked)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(
        " ".join(text.casefold().split()).encode("utf-8", "replace"), digest_size=16
    ).digest()


def count_look(runs: Iterable[Path], dataset: str, comparison: str) -> dict[str, Any]:
    """Count one comparison on held-out rows in the folders of the runs that these come from.

    The same comparison counts once.

    Args:
        runs: Folders of the runs; one that cannot be written to is not counted in.
        dataset: The hash of the rows.
        comparison: The id of the comparison.

    Returns:
        ``times``, ``first`` and ``last``, of the run with the most; all None where there is none.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    best: dict[str, Any] = {"times": None, "first": None, "last": None}
    for run in dict.fromkeys(runs):
        looks: dict[str, dict[str, str]] = {}
        with suppress(FileError, OSError):
            if (run / LOOKS).is_file():
                looks = read_json(run / LOOKS)
            own = looks.setdefault(dataset, {})
            if comparison not in own:
                own[comparison] = now
                write_json(run / LOOKS, looks)
            times = sorted(own.values())
            if best["times"] is None or len(times) > best["times"]:
                best = {"times": len(times), "first": times[0], "last": times[-1]}
    return best
