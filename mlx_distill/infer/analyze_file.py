"""A file of rows to a file of answers: streamed, in the rows' order, and continued after a kill."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from mlx_distill.config import resolve_asset, to_mapping
from mlx_distill.data.files import ReadOptions, RowsAndErrors, read_each, read_lines
from mlx_distill.errors import ConfigError, DataError, FileError, Interrupted
from mlx_distill.infer.analyze import Analyzer, check_rows, chunk_size, find_model
from mlx_distill.infer.predict import BAD_ROW
from mlx_distill.models.config_files import adapter_base, is_adapter
from mlx_distill.models.hub import resolve
from mlx_distill.progress import Bar, Progress, make_progress
from mlx_distill.records import Classification, Prediction
from mlx_distill.storage import (
    LineFile,
    check_folder,
    digest,
    fingerprint,
    finished_lines,
    os_errors,
    read_manifest,
)
from mlx_distill.tasks.task import Task
from mlx_distill.text import counted, duration

_FORMAT = 1  # of the answers; another one is not continued
_HASHED_WHOLE = 64 << 20
_SHOWN_EVERY = 1000  # rows that are checked
_HALF_PAIR = re.compile("[\ud800-\udfff]")
_OTHER = {
    "format": "of another version",
    "model": "of another model",
    "task": "of another task",
    "settings": "with other settings",
    "input": "of another input",
}


@dataclass
class Summary:
    """What became of the rows of a file.

    Attributes:
        answers: The number of answers, errors included.
        kinds: How many have an error, by its kind.
        first: The first error, with the row's id.
        before: How many were there from an earlier run.
        seconds: Time for the others, without loading the model.
        out: The file.
        was_finished: Whether an earlier run had answered all.
    """

    answers: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    first: str = ""
    before: int = 0
    seconds: float = 0.0
    out: Path | None = None
    was_finished: bool = False

    @property
    def errors(self) -> int:
        """The number of answers with an error."""
        return sum(self.kinds.values())

    @property
    def items_per_minute(self) -> float:
        """The speed of this run."""
        return 60 * (self.answers - self.before) / self.seconds if self.seconds else 0.0

    def add(self, id: str, error: str | None, kind: str | None) -> None:
        """Count one answer."""
        self.answers += 1
        if error:
            self.first = self.first or (error if error.startswith(f"{id}:") else f"{id}: {error}")
            self.kinds[kind or BAD_ROW] += 1

    def line(self) -> str:
        """All in one line, for people."""
        where = f"written to {self.out}: " if self.out else ""
        if self.was_finished:
            where = f"{self.out} is finished: "
        parts = [f"{where}{counted(self.answers, 'answer')}"]
        if self.before and not self.was_finished:
            parts[0] += f", {self.before:,} of them from before"
        if self.seconds:
            parts[0] += f", in {duration(self.seconds)} ({self.items_per_minute:,.0f} items a minute)"
        if self.errors:
            kinds = ", ".join(f"{kind} {count:,}" for kind, count in self.kinds.most_common())
            parts.append(f"{self.errors:,} of them without a valid answer ({kinds}), the first {self.first}")
        return "; ".join(parts)


def analyze_file(
    model: str | Path,
    input: str | Path | Iterable[bytes],
    *,
    task: str | None = None,
    out: Path | None = None,
    force: bool = False,
    write: Callable[[str], Any] = print,
    progress: Progress | None = None,
    **settings: Any,
) -> Summary:
    """Let a model answer the rows of a file, one JSON object a row.

    With ``out`` the answers are on the disk after each chunk, and the same call continues behind the last one
    after a kill; the file appears when it is whole, and is byte for byte that of an undisturbed run. Answers
    of another model, task, input or other settings are never continued.

    Args:
        model: As for :class:`~mlx_distill.infer.analyze.Analyzer`.
        input: A file or folder that ``prepare`` reads, or lines of JSON that can be read once.
        task: A task, or None for that of the model's training.
        out: The file of the answers; None to write them with ``write``.
        force: Answer all rows again where the file is finished.
        write: Takes the answers one by one, as JSON, where there is no file.
        progress: Where progress is shown.
        **settings: The other arguments of :class:`~mlx_distill.infer.analyze.Analyzer`.

    Raises:
        DataError: no such input, one that cannot be read to its end, or one none of whose rows can be asked.
        FileError: the file cannot be written, or another process is writing it.
        Interrupted: by the user.
    """
    progress = progress or make_progress()
    source = find_model(model, task, progress)
    rows = _Input(input)
    rows.check_out(out)
    summary, total = Summary(out=out), None
    if rows.path is not None:
        with progress.task(f"check {rows.name}", unit="row") as bar:
            total, bad = check_rows(_counted(rows.read(), bar), source, progress)
            bar.update(total)
        if bad:
            progress.note(f"{rows.name}: {bad:,} of {counted(total, 'row')} cannot be asked")
    key = None
    if out is not None and rows.path is not None and (out.is_file() or not out.exists()):
        key = _key(resolve(source.model), source.task, rows.path, settings)  # type: ignore[arg-type]
        facts = None if force else finished_lines(out, key)
        if facts is not None:
            return Summary(
                facts["answers"], Counter(facts["kinds"]), facts["first"], out=out, was_finished=True
            )
    elif out is not None:
        progress.note("note: this input or output cannot be read again, so that a killed run starts anew")
    stamp = rows.stamp()
    with _destination(out, key, settings.get("batch_size", 16), progress) as file:
        analyzer = Analyzer(source, progress=progress, **settings)
        try:
            _answer(analyzer, rows, file, summary, total, write, progress)
        except KeyboardInterrupt as error:
            fix = "the same command continues" if key else "--out FILE lets a run be continued"
            raise Interrupted(f"interrupted after {counted(summary.answers, 'answer')}", fix=fix) from error
        if rows.stamp() != stamp:
            raise FileError(f"{rows.name} has changed meanwhile", fix="run the same command again")
        if file is not None:
            file.finish({"answers": summary.answers, "kinds": summary.kinds, "first": summary.first})
    return summary


def answer_line(prediction: Prediction | Classification) -> str:
    """An answer as one line of JSON, without times, which differ from run to run."""
    values = asdict(prediction)
    values.pop("latency_s", None)
    try:
        text = json.dumps(values, ensure_ascii=False, allow_nan=False)
        text.encode()
        return text
    except ValueError:  # NaN, and half surrogate pairs, which UTF-8 cannot hold
        finite = json.loads(json.dumps(values), parse_constant=lambda name: None)
        return _HALF_PAIR.sub("\ufffd", json.dumps(finite, ensure_ascii=False))


class _Input:
    """The rows that are to be answered."""

    def __init__(self, source: str | Path | Iterable[bytes]) -> None:
        self.path: Path | None = None  # of what can be read again
        if not isinstance(source, (str, Path)):
            self.name, self._lines = "standard input", source
            return
        path = Path(resolve_asset(str(source)))
        if not path.exists():
            raise DataError(f"{source}: no such file", fix="check the path; - is standard input")
        self.name = path.name
        if path.is_file() or path.is_dir():
            self.path = path
        else:
            self._lines = open(path, "rb")  # a pipe

    def read(self) -> RowsAndErrors:
        """The rows, each with its place."""
        if self.path is None:
            rows = read_lines(self._lines, self.name)
        else:
            rows = read_each(self.path, self.name, ReadOptions())
        empty = True
        for row in rows:
            empty = False
            yield row
        if empty:
            raise DataError(f"{self.name}: no rows", fix="add rows: one JSON object a line")

    def check_out(self, out: Path | None) -> None:
        """Refuse to write the answers over the rows, or among them."""
        if out is None or self.path is None:
            return
        own, path = self.path.resolve(), out.resolve()
        if own == path or own in path.parents:
            raise ConfigError(f"--out {out}: this is where the rows are", fix="choose another file")

    def stamp(self) -> list[Any]:
        """Sizes and times of the files, by which a change is seen."""
        if self.path is None:
            return []
        files = [self.path] if self.path.is_file() else sorted(self.path.rglob("*"))
        with os_errors():
            stats = [(str(path), path.stat()) for path in files if not path.name.startswith(".")]
        return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def _counted(rows: RowsAndErrors, bar: Bar) -> RowsAndErrors:
    """The rows, of which the bar shows how many there were."""
    for number, row in enumerate(rows):
        if number % _SHOWN_EVERY == 0:
            bar.update(number)
        yield row


def _answer(
    analyzer: Analyzer,
    rows: _Input,
    file: Any,
    summary: Summary,
    total: int | None,
    write: Callable[[str], Any],
    progress: Progress,
) -> None:
    """Answer the rows behind those that are kept."""
    if isinstance(file, LineFile):
        for row in file.rows():
            summary.add(row["id"], row["error"], row["error_kind"])
    start = summary.before = summary.answers
    began = time.perf_counter()

    def on_done(count: int) -> None:
        summary.seconds = time.perf_counter() - began
        info = {"errors": summary.errors} if summary.errors else {}
        bar.update(start + count, items_per_minute=f"{60 * count / summary.seconds:,.0f}", **info)

    with progress.task("analyze", total=total, unit="item", start=start) as bar:
        # Of a pipe a batch at a time: its rows may come slowly.
        size = None if rows.path is not None else analyzer.batch_size
        for predictions in analyzer.iter_chunks(islice(rows.read(), start, None), on_done, size):
            lines = [answer_line(prediction) for prediction in predictions]
            if file is not None:
                file.append(lines)
            else:
                for line in lines:
                    write(line)
            for prediction in predictions:
                summary.add(prediction.id, prediction.error, prediction.error_kind)
            on_done(summary.answers - start)


def _destination(out: Path | None, key: Any, batch_size: int, progress: Progress) -> Any:
    """The file that the answers are appended to, or nothing."""
    if out is None:
        return nullcontext()
    if out.exists() and not out.is_file() and not out.is_dir():
        return _Pipe(out)
    file = LineFile(out, key, chunk_size(batch_size))
    if file.other:
        reasons = " and ".join(_OTHER.get(name, name) for name in file.other)
        progress.note(f"{out}: the unfinished answers there are {reasons}: all rows are answered anew")
    return file


class _Pipe:
    """A pipe or a device, which is written to as the answers come."""

    def __init__(self, path: Path) -> None:
        with os_errors(path):
            self._file = open(path, "w", encoding="utf-8")

    def append(self, lines: Iterable[str]) -> None:
        self._file.writelines(f"{line}\n" for line in lines)
        self._file.flush()

    def finish(self, facts: Any) -> None:
        pass

    def __enter__(self) -> _Pipe:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _key(folder: Path, task: Task, rows: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """All that the answers depend on."""
    return {
        "format": _FORMAT,
        "model": model_digest(folder),
        "task": digest(to_mapping(task)),
        "settings": settings,
        "input": digest([rows.name, fingerprint(str(rows))]),
    }


def model_digest(folder: Path) -> str:
    """A hash of a model's folder, and of the base of an adapter. Of large files that no manifest has the hash
    of, size and time stand for the content.
    """
    manifest = read_manifest(folder)
    if manifest is not None and check_folder(folder, manifest) is None:
        own: Any = manifest.content
    else:
        stats = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
        large = [[name, s.st_size, s.st_mtime_ns] for name, s in stats if s.st_size > _HASHED_WHOLE]
        own = [fingerprint(str(folder), _HASHED_WHOLE), large]
    return digest([own, model_digest(adapter_base(folder)) if is_adapter(folder) else None])
