"""What an evaluation keeps beside ``predictions.jsonl``: a header line, then one line an entry. All of it is
measured again where it is missing.

``valid_labels.jsonl``
    the model's distribution over the labels of each validation row, for its temperature and threshold;
``repeats.jsonl``
    the answers of repeated runs, one line for each kind, run and row;
``label_orders.jsonl``
    the most probable label of each held-out row in several orders of the labels in the prompt.

Without a task there is ``chat_losses.jsonl`` alone, without a header: of each held-out chat the loss in nats,
the trained tokens, and how many of them are the most probable ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlx_distill.errors import DataError
from mlx_distill.storage import read_jsonl, write_jsonl

VALID_LABELS, REPEATS, LABEL_ORDERS = "valid_labels.jsonl", "repeats.jsonl", "label_orders.jsonl"
CHAT_LOSSES = "chat_losses.jsonl"
FORMAT = 1


def write_lines(path: Path, header: Mapping[str, Any], lines: Iterable[Mapping[str, Any]]) -> None:
    """Write one of the files, atomically, with its format number in the header."""
    entries = list(lines)
    write_jsonl(path, [{"format": FORMAT, **header, "lines": len(entries)}, *entries])


def read_lines(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """The header and the entries of one of the files; None where it is not there.

    Raises:
        DataError: another format, or fewer lines than the header counts.
    """
    if not path.is_file():
        return None
    (_, header), *lines = read_jsonl(path)
    if header.get("format") != FORMAT or header.get("lines") != len(lines):
        raise DataError(
            f"{path}: not a whole file of format {FORMAT}", fix="remove it, and run the evaluate stage again"
        )
    return header, [line for _, line in lines]
