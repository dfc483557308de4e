"""What prepare says of the rows: fields that none has, and what a training on them would suffer from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlx_distill.data.layouts import CHAT_COLUMNS, closest, listed
from mlx_distill.data.splits import SPLITS
from mlx_distill.data.statistics import RowStatistics
from mlx_distill.errors import ConfigError, DataError
from mlx_distill.recipe import DataConfig
from mlx_distill.tasks.task import Task
from mlx_distill.text import counted

FEW_ROWS = 500
_IMBALANCE = 10  # times that the most frequent class may be more frequent than the rarest
_LISTED = 100  # domains that are kept for an error
_NOT_FIELDS = {*CHAT_COLUMNS, "instruction", "input", "output", "prompt", "completion", "answer", "fields"}


class FieldsSeen:
    """The fields that the rows have a value of, collected while they are read."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.domains: set[str] = set()  # values of data.domain_field, where rows are chosen by it

    def add(self, values: Mapping[str, Any], columns: Mapping[str, str], config: DataConfig) -> None:
        """Note the fields of one row, given with its columns under their own names."""
        if config.domains and len(self.domains) < _LISTED:
            self.domains.add(str(values.get(config.domain_field)))
        present = {name for name, value in values.items() if value is not None}
        present |= {field for field, column in columns.items() if column in present}
        self.names |= present

    def check(self, task: Task, config: DataConfig) -> list[str]:
        """Warnings about fields that no row has.

        Rows of one's own for a task of somebody else often lack a field that it shows results by, so that is
        a warning; beside a similar name it is a slip, and an error.

        Raises:
            ConfigError: a field that the task or the recipe names and no row has.
        """
        warnings: list[str] = []
        if not self.names:  # no row could be read, which is said elsewhere
            return warnings
        for key, name, is_needed in _named_fields(task, config):
            if name in self.names:
                continue
            near = closest(name, self.names - _NOT_FIELDS)
            known = listed(sorted(self.names))
            if is_needed or near:
                hint = f"did you mean {near!r}? " if near else ""
                raise ConfigError(
                    f"{key}: no row has the field {name!r}",
                    fix=f"{hint}the rows have {known}; name one of them, or leave it out",
                )
            warnings.append(f"{key}: no row has the field {name!r} (they have {known}): {_without(key)}")
        return warnings


def _without(key: str) -> str:
    """What the run does without a field that a task names."""
    if key.endswith("group"):
        return "error rates are not compared by it"
    if key.endswith("cluster"):
        return "intervals take all rows as independent"
    return "the rows are named by their text" if key.endswith("id") else "results are not shown by it"


def _named_fields(task: Task, config: DataConfig) -> Iterator[tuple[str, str, bool]]:
    """The fields that the task and the recipe name: the key, the field, and whether the stage needs it."""
    own = set(() if task.is_chats else task.schema["properties"])
    for key, names in (
        ("slices", task.slices),
        ("group", [task.group]),
        ("title", [task.title]),
        ("cluster", [task.cluster]),
    ):
        for name in names:
            if name and name not in own:
                yield f"task {task.name!r}: {key}", name, False
    if task.id != "id":
        yield f"task {task.name!r}: id", task.id, False
    for name in config.stratify:
        yield "data.stratify", name, True
    for name in config.min_share:
        if name not in own:
            yield "data.min_share", name, True
    if config.folds and task.cluster and task.cluster not in own:
        yield f"task {task.name!r}: cluster", task.cluster, True
    if config.split_field != "split":
        yield "data.split_field", config.split_field, True
    if config.min_rating is not None:
        yield "data.rating_field", config.rating_field, True
    if config.domains:
        yield "data.domain_field", config.domain_field, True


def check_shares(kept: RowStatistics, task: Task, config: DataConfig) -> None:
    """Refuse training rows in which a value of a field is rarer than ``data.min_share`` says.

    Raises:
        DataError: with the field, its value and its share.
    """
    total = kept.rows["train"]
    for field, least in config.min_share.items():
        counts = Counter(kept.labels["train"] if field == task.label else kept.slices["train"][field])
        counts.pop("", None)
        for name in task.labels if field == task.label else ():
            counts.setdefault(name, 0)
        value, count = min(counts.items(), key=lambda pair: pair[1], default=("", total))
        if total and count / total < least:
            raise DataError(
                f"{field}: {value!r} has {count} of {total} training rows ({count / total:.1%}), less than "
                f"data.min_share.{field}: {least:g}",
                fix=f"add rows of it, or lower data.min_share.{field}",
            )


def warnings_of(kept: RowStatistics, task: Task, config: DataConfig) -> list[str]:
    """What a training on these rows, or a measurement on them, would suffer from."""
    out = []
    fractions = {"train": 1.0, "valid": config.valid_fraction, "test": config.test_fraction}
    for split in SPLITS:
        if not kept.rows[split] and fractions[split]:
            out.append(f"no rows in {split}: too few without a split of their own")
    total = kept.rows["train"]
    is_demo = all(source.generator or str(source.path).startswith("asset:") for source in config.sources)
    if total < FEW_ROWS and not is_demo:
        out.append(
            f"{counted(total, 'training row')}: with fewer than {FEW_ROWS}, results vary much; add rows"
        )
    if task.label:
        out += _label_warnings(kept, task.labels)
    group = [task.group] if task.group else []
    for name in dict.fromkeys([*task.slices, *group]):
        without = sum(kept.slices[split][name][""] for split in SPLITS)
        rows = sum(kept.rows.values())
        if 0 < without < rows / 2:  # a field that few rows have is a tag, not one that is missing
            out.append(f"{without} of {rows} rows have no {name!r}: they count under an empty name")
    return out


def _label_warnings(kept: RowStatistics, labels: Sequence[str]) -> list[str]:
    counts = kept.labels["train"]
    present = [name for name in labels if counts[name]]
    if len(present) == 1:
        return [f"every training row is labelled {present[0]}: a model learns to say that alone"]
    out = []
    for split, name_of in (("train", "training"), ("valid", "validation"), ("test", "test")):
        missing = [name for name in labels if not kept.labels[split][name]]
        if missing and kept.rows[split]:
            out.append(f"no {name_of} row is labelled {', '.join(missing)}")
    if present:
        rare, common = (find(present, key=lambda name: counts[name]) for find in (min, max))
        if counts[common] > _IMBALANCE * counts[rare]:
            out.append(
                f"class imbalance: {common} has {counted(counts[common], 'training row')}, {rare} has "
                f"{counts[rare]}; add rows of {rare}, and read F1 rather than accuracy"
            )
    return out


def left_out(statistics: Mapping[str, Any]) -> list[str]:
    """One line with how many rows were left out, why, and where the first is; no line where none was."""
    dropped = statistics["dropped"]
    if not dropped:
        return []
    lost = sum(entry["count"] for entry in dropped.values())
    why = "; ".join(f"{reason}: {entry['count']}" for reason, entry in dropped.items())
    first = next(iter(dropped.values()))["examples"][0]
    return [
        f"{lost} of {statistics['read']} rows left out ({why}), such as {first}; statistics.json has more"
    ]
