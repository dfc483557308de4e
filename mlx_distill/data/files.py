"""Files of rows: JSONL, JSON, CSV, TSV, Parquet, Arrow and Feather, compressed or not; folders of such files;
data sets that the package ``datasets`` saved. Rows come one at a time where the format allows it.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_distill.data.json_values import typed_text
from mlx_distill.data.layouts import listed
from mlx_distill.data.tables import Fields, arrow_rows, check_names, features_of
from mlx_distill.errors import DataError
from mlx_distill.storage import RepeatedKeyError, os_errors, parse_line, unique_keys
from mlx_distill.text import not_an_object

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row]]
RowsAndErrors = Iterator[tuple[str, Row | DataError]]

KINDS = {
    ".jsonl": "JSONL",
    ".ndjson": "JSONL",
    ".json": "JSON",
    ".csv": "CSV",
    ".tsv": "TSV",
    ".parquet": "Parquet",
    ".arrow": "Arrow",
    ".feather": "Arrow",
    ".ipc": "Arrow",
}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_SPLITS = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "test": "test",
    "testing": "test",
    "eval": "test",
}
_SPLIT_NAME = re.compile(rf"(?<![a-z])({'|'.join(_SPLITS)})(?![a-z])")
_BATCH = 256  # rows of a table that are Python objects at a time


@dataclass(frozen=True)
class ReadOptions:
    """How files are read.

    Attributes:
        fields: The schema of the field that each column is for, and whether the answer needs it: cells of
            CSV files and databases are read by it.
        split: The split that is read of a folder that has several.
        note: Is called with what is left out.
    """

    fields: Fields = field(default_factory=dict)
    split: str = "train"
    note: Callable[[str], None] | None = None

    def say(self, text: str) -> None:
        """Note what is left out."""
        if self.note is not None:
            self.note(text)


def read_path(path: Path, spec: str, options: ReadOptions) -> Rows:
    """Yield ``(where, row)`` of a file or a folder.

    Args:
        path: The file, the folder of files of one kind, or the folder of a data set that was saved with
            ``save_to_disk``.
        spec: What messages call it.
        options: How it is read.

    Raises:
        DataError: it is not of a known kind, is damaged, or has several splits and not the one asked for; or
            a line or a cell of it cannot be read.
    """
    for where, row in read_each(path, spec, options):
        if isinstance(row, DataError):
            fix = f"{row.fix}; data.drop_invalid does not cover such a line"
            raise DataError(row.message, fix=fix) from row.__cause__
        yield where, row


def read_each(path: Path, spec: str, options: ReadOptions) -> RowsAndErrors:
    """Like :func:`read_path`, but a row that cannot be read is an error in its place, and the rows behind it
    are read.
    """
    if not path.is_dir():
        yield from _read_file(path, spec, options)
    elif is_saved_dataset(path):
        yield from _read_saved(path, spec, options)
    else:
        for file in _files_of(path, spec, options):
            yield from _read_file(file, f"{spec.rstrip('/')}/{file.relative_to(path).as_posix()}", options)


def is_saved_dataset(path: Path) -> bool:
    """Whether a path is a folder that ``save_to_disk`` wrote."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def kind_of(path: Path) -> str | None:
    """The kind of a file of rows by the ending of its name, that of a compression aside; None if unknown.

    >>> kind_of(Path("songs.CSV.gz")), kind_of(Path("README.md"))
    ('CSV', None)
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return KINDS.get(suffixes[-1]) if suffixes else None


def _read_file(path: Path, spec: str, options: ReadOptions) -> RowsAndErrors:
    kind = kind_of(path)
    start = _start(path)
    if not path.is_file() and kind is None:  # a pipe
        kind = "JSONL"
    if start.startswith(b"SQLite format 3\0"):
        raise DataError(
            f"{spec}: a SQLite database",
            fix=f"write the source as {{sqlite: {spec}, query: SELECT ... FROM ...}}, or export the rows: "
            f"sqlite3 -header -csv {spec} 'SELECT ... FROM ...' > rows.csv",
        )
    if kind is None:
        endings = ", ".join([*KINDS, *COMPRESSIONS])
        raise DataError(
            f"{spec}: {path.suffix or 'no ending'} is not a known file type",
            fix=f"save it as one of {endings}; a spreadsheet as .csv",
        )
    if kind == "Parquet":
        yield from _read_parquet(path, spec, options.fields)
    elif kind == "Arrow":
        yield from _read_arrow(path, spec, start, options.fields)
    elif kind in ("CSV", "TSV"):
        yield from _read_csv(path, spec, "\t" if kind == "TSV" else None, options)
    elif kind == "JSON" and not _is_jsonl(path):
        yield from _read_json(path, spec)
    else:
        yield from read_lines(_lines(path), spec)


def _files_of(folder: Path, spec: str, options: ReadOptions) -> list[Path]:
    """The files of rows in a folder: all of one kind and of one split, in the order of their names."""
    visible = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    kinds = {kind for path in visible if (kind := kind_of(path))}
    if len(kinds) > 1:  # JSON beside another kind describes the data: dataset_infos.json
        kinds.discard("JSON")
    if len(kinds) > 1:
        raise DataError(
            f"{spec}: a folder with files of several kinds: {', '.join(sorted(kinds))}",
            fix="name the file, or put the files of one kind in a folder of their own",
        )
    files = [path for path in visible if kind_of(path) in kinds]
    if not files:
        raise DataError(
            f"{spec}: a folder without files of rows", fix=f"known are {', '.join(KINDS)}, compressed or not"
        )
    files = _of_split(files, folder, spec, options)
    skipped = [path.relative_to(folder).as_posix() for path in visible if path not in files]
    if skipped:
        options.say(f"{spec}: {len(files)} of {len(visible)} files are read; not {listed(skipped, 5)}")
    return files


def _of_split(files: list[Path], folder: Path, spec: str, options: ReadOptions) -> list[Path]:
    """Of files that are named by splits those of the split that is asked for; else all."""
    splits: dict[str, list[Path]] = {}
    for path in files:
        names = _SPLIT_NAME.findall(path.relative_to(folder).as_posix().lower())
        if names:
            splits.setdefault(_SPLITS[names[-1]], []).append(path)
    if not splits:
        return files
    wanted = _SPLITS.get(options.split.lower(), options.split)
    if wanted not in splits:
        raise _no_split(spec, options.split, sorted(splits))
    return splits[wanted]


def _no_split(spec: str, split: str, known: list[str]) -> DataError:
    return DataError(
        f"{spec}: no split {split!r}, it has {', '.join(known)}",
        fix=f"write hub_split: {known[0]} in the source, and another source for each other split",
    )


def _read_saved(path: Path, spec: str, options: ReadOptions) -> Rows:
    """The rows of a folder that ``datasets`` saved: one data set, or one for each split."""
    from datasets import DatasetDict, load_from_disk

    with _damage(spec):
        saved = load_from_disk(str(path))
    if isinstance(saved, DatasetDict):
        if options.split not in saved:
            raise _no_split(spec, options.split, list(saved))
        others = [name for name in saved if name != options.split]
        if others:
            options.say(f"{spec}: the split {options.split} is read, not {listed(others)}")
        saved = saved[options.split]
    batches = (table for table in saved.with_format("arrow").iter(batch_size=_BATCH))
    with _damage(spec):
        yield from arrow_rows(batches, spec, saved.features.to_dict(), options.fields)


def _read_parquet(path: Path, spec: str, fields: Fields) -> Rows:
    import pyarrow.parquet

    with _damage(spec), pyarrow.parquet.ParquetFile(path) as file:
        features = features_of(file.schema_arrow)
        check_names(file.schema_arrow.names, spec)
        yield from arrow_rows(file.iter_batches(batch_size=_BATCH), spec, features, fields)


def _read_arrow(path: Path, spec: str, start: bytes, fields: Fields) -> Rows:
    import pyarrow as pa

    if start.startswith(b"FEA1"):
        raise DataError(f"{spec}: Feather of version 1", fix="write it again with pandas: frame.to_feather")
    with _damage(spec), pa.memory_map(str(path)) as source:
        if start.startswith(b"ARROW1"):
            reader = pa.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            batches = reader = pa.ipc.open_stream(source)
        check_names(reader.schema.names, spec)
        yield from arrow_rows(batches, spec, features_of(reader.schema), fields)


@contextmanager
def _damage(spec: str) -> Iterator[None]:
    """Turn what pyarrow and datasets raise for a file that they cannot read into a :class:`DataError`."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # they raise OSError, ArrowInvalid, ValueError and others
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{spec}: cannot be read: {reason}", fix="it may be damaged or cut off: copy or write it again"
        ) from error


_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def _open(path: Path) -> io.BufferedIOBase:
    """Open a file for reading; one that is compressed, whatever its name says, is decompressed."""
    start = _start(path)
    method = next((name for magic, name in _MAGIC.items() if start.startswith(magic)), None)
    if method == "gzip":
        return gzip.GzipFile(path)
    if method == "bzip2":
        return bz2.BZ2File(path)
    if method == "xz":
        return lzma.LZMAFile(path)
    if method == "zstd":
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return open(path, "rb")


def _start(path: Path) -> bytes:
    """The first bytes of a file; of a pipe nothing, since it can be read only once."""
    if not path.is_file():
        return b""
    with os_errors(), open(path, "rb") as file:
        return file.read(16)


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, decompressed."""
    with os_errors():
        file = _open(path)
    with file:
        try:
            yield from file
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise DataError(
                f"{path}: cannot be read to its end: {error}",
                fix="it may be damaged or cut off: copy or compress it again",
            ) from error


def read_lines(lines: Iterable[bytes], spec: str) -> RowsAndErrors:
    """Yield ``(where, row)`` of lines of JSON; ``spec`` is what messages call their file."""
    for number, raw in enumerate(lines, 1):
        try:
            row: Row | DataError | None = parse_line(raw, spec, number)
        except DataError as error:
            row = error
        if row is not None:
            yield f"{spec}:{number}", row


def _is_jsonl(path: Path) -> bool:
    """Whether the first line that is not blank is a whole JSON object: many JSONL files are named .json."""
    lines = _lines(path)
    first = next((line for line in lines if line.strip()), b"")
    more = any(line.strip() for line in lines)
    try:
        value = json.loads(first)
        return isinstance(value, dict) and (more or not _row_list(value))
    except (ValueError, RecursionError):
        return False


def _row_list(value: Mapping[str, Any]) -> list[Any]:
    """The list of rows inside an object such as ``{"data": [...]}``."""
    lists = [
        item
        for item in value.values()
        if isinstance(item, list) and item and all(isinstance(row, dict) for row in item)
    ]
    return lists[0] if len(lists) == 1 and len(value) == 1 else []


def _read_json(path: Path, spec: str) -> RowsAndErrors:
    raw = b"".join(_lines(path))
    try:
        text = raw.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=unique_keys) if text.strip() else []
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}:{line}: not UTF-8 (byte {error.start} of the file)", fix="save the file as UTF-8"
        ) from error
    except RepeatedKeyError as error:
        raise DataError(f"{path}: in one of the objects {error}", fix=error.fix) from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not JSON: {error}", fix="one list of objects is needed, or JSONL: one object a line"
        ) from error
    if isinstance(value, dict):
        value = _row_list(value) or [value]
    if not isinstance(value, list):
        raise DataError(
            f"{path}: no list of objects", fix="write [{...}, {...}], or JSONL: one object a line"
        )
    for index, row in enumerate(value):
        if not isinstance(row, dict):
            row = DataError(
                f"{spec}[{index}]: {not_an_object(row)}",
                fix="one JSON object a row is needed",
            )
        yield f"{spec}[{index}]", row


def _read_csv(path: Path, spec: str, delimiter: str | None, options: ReadOptions) -> RowsAndErrors:
    errors: list[DataError] = []  # of the lines of the row that is being read
    lines = _text_lines(_lines(path), spec, errors)
    first = next(lines, "")
    csv.field_size_limit(1 << 30)
    reader = csv.reader(
        (line for part in ([first], lines) for line in part),
        delimiter=delimiter or _delimiter(first),
        strict=True,  # a stray quote would else swallow the rows behind it
    )
    header: list[str] = []
    while True:
        start, cells, ended = reader.line_num + 1, list[str](), False
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            ended = reader.line_num > start and "unexpected end" in str(error)
            errors.append(_not_csv(f"{spec}:{start}", error))
        if errors and (ended or not header):
            raise errors[0]
        if errors:
            yield f"{spec}:{start}", errors[0]
            errors.clear()
        elif cells and not header:
            header = [name.strip() for name in cells]
            check_names([name for name in header if name], spec)
        elif cells:
            yield f"{spec}:{start}", _csv_row(header, cells, f"{spec}:{start}", options)


def _not_csv(where: str, error: csv.Error) -> DataError:
    return DataError(
        f"{where}: not CSV: {error}",
        fix='put texts with commas, quotes or line ends in quotes, and write a quote inside as ""',
    )


def _text_lines(lines: Iterable[bytes], spec: str, errors: list[DataError]) -> Iterator[str]:
    """The lines as text; of one that is not UTF-8 the error is added to ``errors``."""
    for number, raw in enumerate(lines, 1):
        encoding = "utf-8-sig" if number == 1 else "utf-8"
        try:
            yield raw.decode(encoding)
        except UnicodeDecodeError as error:
            errors.append(
                DataError(
                    f"{spec}:{number}: not UTF-8 (byte {error.start} of the line)",
                    fix="save the file as UTF-8, for example with: iconv -f latin1 -t utf-8",
                )
            )
            yield raw.decode(encoding, "replace")


def _delimiter(header: str) -> str:
    """The comma, or what separates the names of a header without one: spreadsheets of many countries write
    semicolons.
    """
    return max(",;\t|", key=header.count) if "," not in header else ","


def _csv_row(header: list[str], cells: list[str], where: str, options: ReadOptions) -> Row | DataError:
    if len(cells) < len(header) or any(cells[len(header) :]):
        return DataError(
            f"{where}: {len(cells)} cells, and the header has {len(header)}: {listed(header, 5)}",
            fix="put texts with commas in quotes; the first line has the names of the columns",
        )
    row: Row = {}
    for name, cell in zip(header, cells, strict=False):
        if name and name in options.fields:
            schema, required = options.fields[name]
            row[name] = typed_text(cell, schema, required=required)
        elif name:  # pandas writes the index as a column without a name
            row[name] = cell
    return row
