"""What was prepared, counted: per split, label and slice, lengths, and what was left out and why."""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from mlx_distill.records import Example

_EXAMPLES = 5
_VALUES = 100  # values of a field that are listed


class Dropped:
    """Rows left out: how many for each reason, and where the first few stand."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.examples: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, reason: str, where: str | Callable[[], str]) -> None:
        """One row more; where it stands, or what finds it out while examples are wanted."""
        self.count[reason] += 1
        if len(self.examples[reason]) < _EXAMPLES:
            self.examples[reason].append(where if isinstance(where, str) else where())

    def summary(self) -> dict[str, Any]:
        """``{reason: {"count", "examples"}}``, the commonest first."""
        return {
            reason: {"count": count, "examples": self.examples[reason]}
            for reason, count in self.count.most_common()
        }


class Counts:
    """Figures of the rows that are kept, filled while they are written."""

    def __init__(self, label: str, fields: Iterable[str]) -> None:
        self.label, self.fields = label, tuple(dict.fromkeys(fields))
        self.rows: Counter[str] = Counter()
        self.sets: Counter[str] = Counter()
        self.labels: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.slices: defaultdict[str, defaultdict[str, Counter[str]]] = defaultdict(
            lambda: defaultdict(Counter)
        )
        self.lengths: defaultdict[str, dict[str, array[int]]] = defaultdict(
            lambda: {"prompt": array("I"), "answer": array("I")}
        )

    def add(self, split: str, set_name: str, example: Example) -> None:
        """One row more in ``split``; a held-out one also counts under its set."""
        self.rows[split] += 1
        if split == "test":
            self.sets[set_name] += 1
        self.labels[split][str((example.answer or {}).get(self.label))] += 1
        for field in self.fields:
            self.slices[split][field][str(example.fields.get(field, ""))] += 1
        self.lengths[split]["prompt"].append(sum(len(message.content) for message in example.messages[:-1]))
        self.lengths[split]["answer"].append(len(example.messages[-1].content))

    def summary(self, splits: Iterable[str]) -> dict[str, Any]:
        """Plain JSON of everything, splits in their order."""
        splits = list(splits)
        return {
            "rows": {split: self.rows[split] for split in splits},
            "sets": dict(sorted(self.sets.items())),
            "labels": {split: dict(sorted(self.labels[split].items())) for split in splits},
            "slices": {
                split: {field: _common(self.slices[split][field]) for field in self.fields}
                for split in splits
            },
            "characters": {
                split: {part: _quantiles(values) for part, values in self.lengths[split].items()}
                for split in splits
            },
        }


def _common(counter: Counter[str]) -> Mapping[str, int]:
    listed = dict(sorted(counter.most_common(_VALUES)))
    rest = counter.total() - sum(listed.values())
    return {**listed, "(others)": rest} if rest else listed


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
