"""Files and folders are whole or absent, whatever the disk, the clock or a kill does."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import crash_points

from mlx_distill import storage as files
from mlx_distill.errors import DataError, FileError


def leftovers(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if ".tmp" in p.name)


def full(*arguments: Any, **options: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")


# --- one file -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["os.fsync", "os.replace", "pathlib.Path.write_text"])
def test_a_full_disk_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    path = tmp_path / "value.json"
    files.write_json(path, {"old": 1})
    with monkeypatch.context() as patch:
        patch.setattr(what, full)
        with pytest.raises(FileError, match="no space left") as caught:
            files.write_json(path, {"new": 2})
    assert "free some space" in (caught.value.fix or "")
    assert files.read_json(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["value.json"]
    files.write_json(path, {"new": 2})  # the same call, once there is room
    assert files.read_json(path) == {"new": 2}


def test_a_disk_that_fills_up_between_two_lines(tmp_path: Path) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield {"text": "x" * 100_000}
        full()

    with pytest.raises(FileError, match="no space left"):
        files.write_jsonl(tmp_path / "rows.jsonl", rows())
    assert os.listdir(tmp_path) == []


def test_any_failure_inside_the_block_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), files.atomic_path(tmp_path / "a" / "b.bin") as path:
        path.write_bytes(b"half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path / "a") == []


def test_the_temporary_name_keeps_the_ending_and_stays_beside(tmp_path: Path) -> None:
    with files.atomic_path(tmp_path / "weights.safetensors") as path:
        assert path.parent == tmp_path and path.suffix == ".safetensors" and path.name.startswith(".")
        path.write_bytes(b"whole")
    assert (tmp_path / "weights.safetensors").read_bytes() == b"whole"


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real" / "rows.jsonl")
    for value in (1, 2):  # the file that the link names is created, then replaced
        files.write_jsonl(tmp_path / "link.jsonl", [{"a": value}])
        assert (tmp_path / "link.jsonl").is_symlink()
        assert [row for _, row in files.read_jsonl(tmp_path / "real" / "rows.jsonl")] == [{"a": value}]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["link.jsonl", "real", "rows.jsonl"]


def test_a_fifo_is_written_to_and_stays(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    received: list[str] = []
    reader = threading.Thread(target=lambda: received.append(fifo.read_text(encoding="utf-8")))
    reader.start()
    files.write_jsonl(fifo, [{"a": 1}])
    reader.join(timeout=10)
    assert received == ['{"a": 1}\n'] and fifo.is_fifo()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_device_is_written_to_and_stays() -> None:
    with pytest.raises(FileError, match="/dev/full"):
        files.write_jsonl("/dev/full", [{"a": 1}])
    assert Path("/dev/full").is_char_device()
    assert files.write_jsonl("/dev/null", [{"a": 1}]) == 1 and Path("/dev/null").is_char_device()


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    keep = ["rows.jsonl", ".lock", ".hidden.json", "a.tmp.json", "sub/.keep"]
    gone = [".rows.123.tmp.jsonl", ".model-00001.safetensors.tmp", ".key.9.tmp"]
    for name in [*keep, *gone, "sub/.one.7.tmp.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    files.remove_leftovers(tmp_path)
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()} == {
        *keep,
        "sub/.one.7.tmp.txt",
    }
    files.remove_leftovers(tmp_path, below=True)
    assert not (tmp_path / "sub/.one.7.tmp.txt").exists()


# --- reading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b'{"a": 1}\n\n{"a": \n', "rows.jsonl:3: not JSON: Expecting value at column "),
        (b'{"a": "\n', "rows.jsonl:1: not JSON: Invalid control character at column 8"),
        (b'\n\xff{"a": 1}\n', "rows.jsonl:2: not UTF-8 (byte 0"),
        (b"7\n", "rows.jsonl:1: a JSON number, not an object"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, content: bytes, part: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(files.read_jsonl(tmp_path / "rows.jsonl"))
    assert part in str(caught.value) and caught.value.fix


def test_jsonl_comes_back_as_it_was_written(tmp_path: Path) -> None:
    rows = [{"text": "Ä\u2028\n日本", "n": 1.5}, {"text": "", "list": [None, True]}]
    assert files.write_jsonl(tmp_path / "rows.jsonl", rows) == 2
    assert [row for _, row in files.read_jsonl(tmp_path / "rows.jsonl")] == rows
    (tmp_path / "mark.jsonl").write_bytes(
        b"\xef\xbb\xbf" + (tmp_path / "rows.jsonl").read_bytes()
    )  # as Windows writes it
    assert [row for _, row in files.read_jsonl(tmp_path / "mark.jsonl")] == rows
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "x.json", float("nan"))
    assert leftovers(tmp_path) == []


def test_a_digest_is_independent_of_the_order_of_keys() -> None:
    assert files.digest({"a": 1, "b": [1, 2]}) == files.digest({"b": [1, 2], "a": 1})
    assert files.digest({"a": 1}) != files.digest({"a": 1.5})
    assert files.digest([1, 2]) != files.digest([2, 1])


# --- folders ------------------------------------------------------------------------------------------------


def publish(folder: Path, text: str = "one", **recorded: Any) -> files.Manifest:
    partial = files.open_partial(folder, text)
    files.write_text(partial / "a.txt", text)
    files.write_text(partial / "sub" / "b.txt", text)
    files.write_text(files.scratch(partial) / "c.txt", "not part of it")
    return files.publish(folder, "stage", 1, {"text": text}, {}, recorded)


@pytest.mark.slow
def test_a_kill_before_any_change_of_publishing_or_recovering_leaves_old_or_new(tmp_path: Path) -> None:
    """Every point, in a process of its own, and every point of the recovery behind it."""
    done = subprocess.run(
        [sys.executable, crash_points.__file__, str(tmp_path)], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["scenario"] for row in rows] == ["fresh", "again"]
    for row in rows:
        assert row["problems"] == []
        assert row["points"] >= 40 and row["kills"] > row["points"]


def test_a_published_folder_has_the_files_of_its_manifest(tmp_path: Path) -> None:
    manifest = publish(tmp_path / "stage", seconds=3)
    assert set(manifest.files) == {"a.txt", "sub/b.txt"}
    assert sorted(os.listdir(tmp_path)) == ["stage"]
    assert files.read_manifest(tmp_path / "stage") == manifest
    assert manifest.key == files.stage_key("stage", 1, {"text": "one"}, {})
    assert files.check_folder(tmp_path / "stage", manifest, verify=True) is None
    assert files.read_manifest(tmp_path / "nothing") is None


def test_the_content_hash_is_of_names_and_bytes_only(tmp_path: Path) -> None:
    first = publish(tmp_path / "first", seconds=3)
    second = publish(tmp_path / "second", seconds=9)
    assert first.content == second.content
    assert publish(tmp_path / "third", "two").content != first.content
    partial = files.open_partial(tmp_path / "fourth", "one")
    for name in ("a.txt", "sub/b.txt"):
        files.write_text(partial / name, "one")
    files.write_text(partial / "metrics.jsonl", "seconds differ")
    assert files.publish(tmp_path / "fourth", "stage", 1, {}, {}, {}).content == first.content


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_text("longer"), "has 6 bytes, not 3"),
        (lambda path: path.write_text("eno"), "has changed"),
    ],
)
def test_damage_is_found_and_named(tmp_path: Path, damage: Callable[[Path], Any], words: str) -> None:
    manifest = publish(tmp_path / "stage")
    damage(tmp_path / "stage" / "a.txt")
    error = files.check_folder(tmp_path / "stage", manifest)
    assert error and "a.txt" in error and words in error


def test_a_copy_with_new_times_is_the_same_and_damage_that_keeps_the_time_needs_verify(
    tmp_path: Path,
) -> None:
    manifest = publish(tmp_path / "stage")
    shutil.copytree(tmp_path / "stage", tmp_path / "copy", copy_function=shutil.copyfile)
    assert files.check_folder(tmp_path / "copy", manifest) is None
    path = tmp_path / "stage" / "a.txt"
    before = path.stat()
    path.write_text("eno")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert files.check_folder(tmp_path / "stage", manifest) is None
    assert "has changed" in (files.check_folder(tmp_path / "stage", manifest, verify=True) or "")


def test_a_partial_folder_is_resumed_only_under_its_own_key(tmp_path: Path) -> None:
    partial = files.open_partial(tmp_path / "stage", "key one")
    files.write_text(files.scratch(partial) / "checkpoint", "1")
    assert (files.scratch(files.open_partial(tmp_path / "stage", "key one")) / "checkpoint").is_file()
    assert not (files.scratch(files.open_partial(tmp_path / "stage", "key two")) / "checkpoint").exists()
    assert not (files.scratch(files.open_partial(tmp_path / "stage", "key one")) / "checkpoint").exists()


def test_a_full_disk_while_publishing_leaves_the_old_folder_and_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = publish(tmp_path / "stage")
    partial = files.open_partial(tmp_path / "stage", "two")
    files.write_text(partial / "a.txt", "two")
    files.write_text(files.scratch(partial) / "checkpoint", "two")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(FileError, match="no space left"):
            files.publish(tmp_path / "stage", "stage", 1, {}, {}, {})
    assert files.read_manifest(tmp_path / "stage") == old
    assert files.check_folder(tmp_path / "stage", old, verify=True) is None
    assert (files.scratch(files.open_partial(tmp_path / "stage", "two")) / "checkpoint").is_file()


def test_a_damaged_manifest_is_an_error_with_a_fix(tmp_path: Path) -> None:
    publish(tmp_path / "stage")
    for text in ("{", "[]", '{"files": {}}', '{"files": {"a": {"size": 1}}}'):
        (tmp_path / "stage" / "manifest.json").write_text(text)
        with pytest.raises(FileError) as caught:
            files.read_manifest(tmp_path / "stage")
        assert "manifest.json" in caught.value.message and "again" in (caught.value.fix or "")


# --- the lock -----------------------------------------------------------------------------------------------


def test_one_run_at_a_time_and_a_kill_leaves_no_lock(tmp_path: Path) -> None:
    code = (
        "from mlx_distill.storage import lock_folder\n"
        "with lock_folder(sys.argv[1]): print('held', flush=True); time.sleep(300)"
    )
    code = f"import sys, time; {code}"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(FileError, match=f"process {holder.pid}") as caught, files.lock_folder(tmp_path):
            pass
        assert "wait" in (caught.value.fix or "")
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with files.lock_folder(tmp_path):
            assert (tmp_path / ".lock").read_text() == str(os.getpid())
