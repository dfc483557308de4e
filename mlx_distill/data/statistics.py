"""Statistics of the prepared rows: counts of each split, label and slice, lengths, and why rows were left
out.
"""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mlx_distill.records import Example

_EXAMPLES = 5  # rows that are named for each reason
_VALUES = 100  # values of a field that are listed


class DropCounter:
    """The rows left out: how many for each reason, and where the first few of them are."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.examples: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, reason: str, where: str | Callable[[], str]) -> None:
        """Count one row; ``where`` is its place, or a function that finds it and is called while examples are
        still collected.
        """
        self.count[reason] += 1
        if len(self.examples[reason]) < _EXAMPLES:
            self.examples[reason].append(where if isinstance(where, str) else where())

    def summary(self) -> dict[str, Any]:
        """``{reason: {"count", "examples"}}``, the most frequent first."""
        return {
            reason: {"count": count, "examples": self.examples[reason]}
            for reason, count in self.count.most_common()
        }


class RowFigures(NamedTuple):
    """What is counted of one row: its label, None in a task without one, the values of the counted fields,
    and lengths in characters.
    """

    label: str | None
    values: Sequence[str]
    prompt_chars: int
    answer_chars: int


def row_figures(example: Example, label: str | None, fields: Sequence[str]) -> RowFigures:
    """The figures of a row under the label field ``label`` and the counted ``fields``, of the row or of its
    answer.
    """
    answer = example.answer or {}
    return RowFigures(
        str(answer.get(label)) if label else None,
        [str(example.fields.get(field, answer.get(field, ""))) for field in fields],
        sum(len(message.content) for message in example.messages[:-1]),
        len(example.messages[-1].content),
    )


class RowStatistics:
    """Statistics of the rows that are kept, updated while they are written.

    Args:
        fields: The counted fields, in the order of :attr:`RowFigures.values`.
    """

    def __init__(self, fields: Sequence[str]) -> None:
        self.fields = fields
        self.rows: Counter[str] = Counter()
        self.sets: Counter[str] = Counter()
        self.labels: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.slices: defaultdict[str, defaultdict[str, Counter[str]]] = defaultdict(
            lambda: defaultdict(Counter)
        )
        self.lengths: defaultdict[str, dict[str, array[int]]] = defaultdict(
            lambda: {"prompt": array("I"), "answer": array("I")}
        )

    def add(self, split: str, set_name: str, figures: RowFigures) -> None:
        """Count one row of ``split``; a test row also counts in its set."""
        self.rows[split] += 1
        if split == "test":
            self.sets[set_name] += 1
        if figures.label is not None:
            self.labels[split][figures.label] += 1
        for field, value in zip(self.fields, figures.values, strict=True):
            self.slices[split][field][value] += 1
        self.lengths[split]["prompt"].append(figures.prompt_chars)
        self.lengths[split]["answer"].append(figures.answer_chars)

    def summary(self, splits: Iterable[str]) -> dict[str, Any]:
        """All statistics as plain JSON, splits in the given order."""
        splits = list(splits)
        return {
            "rows": {split: self.rows[split] for split in splits},
            "sets": dict(sorted(self.sets.items())),
            "labels": {split: dict(sorted(self.labels[split].items())) for split in splits},
            "slices": {
                split: {field: _most_common(self.slices[split][field]) for field in self.fields}
                for split in splits
            },
            "characters": {
                split: {part: _quantiles(values) for part, values in self.lengths[split].items()}
                for split in splits
            },
        }


def _most_common(counter: Counter[str]) -> Mapping[str, int]:
    listed = dict(sorted(counter.most_common(_VALUES)))
    others = counter.total() - sum(listed.values())
    return {**listed, "(others)": others} if others else listed


def _quantiles(values: array[int]) -> dict[str, float]:
    if not values:
        return {}
    data = np.array(values)
    return {
        "min": int(data.min()),
        "mean": round(float(data.mean()), 1),
        "median": float(np.median(data)),
        "p95": float(np.quantile(data, 0.95)),
        "max": int(data.max()),
    }
