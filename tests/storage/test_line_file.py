"""Files of lines that are written over several runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mlx_distill.errors import FileError
from mlx_distill.storage import LineFile, finished_lines

KEY = {"model": "a", "settings": {"size": 2, "long": None}}


def lines(*numbers: int) -> list[str]:
    return [json.dumps({"n": number}) for number in numbers]


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(".*"))


def test_the_file_appears_when_it_is_whole_and_remembers_its_key(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.jsonl"
    with LineFile(path, KEY, 2) as file:
        file.append(lines(1, 2))
        file.append(lines(3))
        assert not path.exists() and file.kept == 0
        file.finish({"count": 3})
    assert path.read_text(encoding="utf-8") == '{"n": 1}\n{"n": 2}\n{"n": 3}\n'
    assert finished_lines(path, KEY) == {"count": 3}
    assert finished_lines(path, {**KEY, "model": "b"}) is None
    assert hidden(path.parent) == [".out.jsonl.json"]
    path.write_text("changed", encoding="utf-8")
    assert finished_lines(path, KEY) is None


@pytest.mark.parametrize(
    ("tail", "kept"),
    [
        (b"", 4),
        (b'{"n": 5}\n', 4),  # half a group
        (b'{"n": 5}\n{"n": 6}\n', 6),
        (b'{"n": 5}\n{"n": 6}', 4),  # the line end is missing
        (b'{"n": 5}\n{"n"', 4),
        (b"\0" * 20, 4),  # blocks that a power cut left empty
        (b'{"n": 5}\n\0\0\0\n{"n": 7}\n{"n": 8}\n', 4),
        (b'{"n": 5}\n[6]\n', 4),
        (b"\xff\xfe\n", 4),
    ],
)
def test_whole_groups_of_lines_are_kept(tmp_path: Path, tail: bytes, kept: int) -> None:
    path = tmp_path / "out.jsonl"
    with LineFile(path, KEY, 2) as file:
        file.append(lines(1, 2, 3, 4))
    with open(tmp_path / ".out.jsonl.partial", "ab") as partial:
        partial.write(tail)
    with LineFile(path, KEY, 2) as file:
        assert file.kept == kept and not file.other
        assert [row["n"] for row in file.rows()] == list(range(1, kept + 1))
        file.append(lines(*range(kept + 1, 9)))
        file.finish()
    assert [json.loads(line)["n"] for line in path.open(encoding="utf-8")] == list(range(1, 9))


def test_lines_of_another_key_are_never_kept(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with LineFile(path, KEY) as file:
        file.append(lines(1, 2))
    other: dict[str, Any] = {"model": "b", "settings": {"size": 2, "long": None}}
    with LineFile(path, other) as file:
        assert file.kept == 0 and file.other == ["model"]
        file.append(lines(7))
    with LineFile(path, KEY) as file:  # the first key again: its lines are gone
        assert file.kept == 0 and file.other == ["model"]
    (tmp_path / ".out.jsonl.partial").write_bytes(b'{"n": 1}\n')
    (tmp_path / ".out.jsonl.partial.json").unlink()  # whose lines these are is not known
    with LineFile(path, KEY) as file:
        assert file.kept == 0
        file.append(lines(5))
        file.finish()
    assert path.read_text(encoding="utf-8") == '{"n": 5}\n'


def test_a_finished_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with LineFile(path, KEY) as file:
        file.append(lines(1))
        file.finish()
    with LineFile(path, {"model": "b"}) as file:
        file.append(lines(2))
    assert path.read_text(encoding="utf-8") == '{"n": 1}\n' and finished_lines(path, KEY) == {}
    with LineFile(path, {"model": "b"}) as file:
        assert file.kept == 1
        file.finish()
    assert path.read_text(encoding="utf-8") == '{"n": 2}\n' and finished_lines(path, KEY) is None


def test_a_kill_before_the_last_rename_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rename = tmp_path / "out.jsonl", os.replace

    def killed(source: Any, target: Any) -> None:
        if str(source).endswith(".partial"):
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), LineFile(path, KEY) as file:
        file.append(lines(1, 2))
        patch.setattr(os, "replace", killed)
        file.finish({"count": 2})
    assert finished_lines(path, KEY) is None
    with LineFile(path, KEY) as file:
        assert file.kept == 2
        file.finish({"count": 2})
    assert finished_lines(path, KEY) == {"count": 2}


def test_without_a_key_nothing_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with LineFile(path, KEY) as file:
        file.append(lines(1))
        file.finish()
    with LineFile(path, None) as file:
        file.append(lines(2))
    assert hidden(tmp_path) == [".out.jsonl.json"]
    with LineFile(path, None) as file:
        assert file.kept == 0
        file.append(lines(3))
        file.finish()
    assert path.read_text(encoding="utf-8") == '{"n": 3}\n' and hidden(tmp_path) == []


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with LineFile(path, KEY) as file:
        file.append(lines(1))
        with pytest.raises(FileError, match="another process is writing"), LineFile(path, KEY):
            pass
        file.finish()
        with LineFile(path, {"model": "b"}) as other:  # the first file is still open, under its final name
            other.append(lines(2))
        assert path.read_text(encoding="utf-8") == '{"n": 1}\n'


def test_a_folder_is_no_file_and_a_link_is_followed(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="a folder"):
        LineFile(tmp_path, KEY)
    (tmp_path / "real").mkdir()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real" / "out.jsonl")
    with LineFile(tmp_path / "link.jsonl", KEY) as file:
        file.append(lines(1))
        file.finish()
    assert (tmp_path / "link.jsonl").is_symlink() and finished_lines(tmp_path / "link.jsonl", KEY) == {}
