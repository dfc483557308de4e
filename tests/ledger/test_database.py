"""The ledger's file: transactions of several processes, migrations, refusals, a full disk, backups."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from helpers.small_disk import small_disk

from mlx_distill.errors import FileError
from mlx_distill.jobs import dispatch, get
from mlx_distill.jobs.lease import holder
from mlx_distill.ledger.backups import backup, restore
from mlx_distill.ledger.database import Ledger, from_json, new_id, to_json
from mlx_distill.ledger.migrate import MIGRATIONS, read_migrations
from mlx_distill.ledger.root import Root

_ROW = "INSERT INTO models (name, created_at) VALUES (?, 1.0)"

_NOBODY = 65534  # a user without rights


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(Root.at(tmp_path))


def names(ledger: Ledger) -> list[str]:
    with ledger.read() as db:
        return [row["name"] for row in db.execute("SELECT name FROM models ORDER BY name")]


def add(ledger: Ledger, *models: str) -> None:
    with ledger.write() as db:
        db.executemany(_ROW, [(name,) for name in models])


def script(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A Python process that runs ``code``, with what the tests need imported."""
    begin = (
        "import os, sys, time\nfrom pathlib import Path\n"
        "from mlx_distill.ledger.database import Ledger\nfrom mlx_distill.ledger.root import Root\n"
    )
    command = [sys.executable, "-c", begin + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def outputs(processes: list[subprocess.Popen[str]]) -> list[str]:
    results = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), results
    return [out.strip() for out, _ in results]


# --- transactions -------------------------------------------------------------------------------------------


def test_a_block_is_committed_whole_or_not_at_all(ledger: Ledger) -> None:
    add(ledger, "a")
    with pytest.raises(ZeroDivisionError), ledger.write() as db:
        db.execute(_ROW, ("b",))
        _ = 1 / 0
    assert names(ledger) == ["a"]


def test_a_reader_cannot_write_and_sees_one_state(ledger: Ledger) -> None:
    add(ledger, "a")
    with ledger.read() as db:
        before = db.execute("SELECT count(*) FROM models").fetchone()[0]
        add(ledger, "b")
        assert db.execute("SELECT count(*) FROM models").fetchone()[0] == before
    with pytest.raises(FileError, match="cannot be written"), ledger.read() as db:
        db.execute(_ROW, ("c",))
    assert names(ledger) == ["a", "b"]


def test_several_writers_wait_for_each_other(ledger: Ledger) -> None:
    code = """
        ledger = Ledger(Root.at(sys.argv[1]))
        for number in range(20):
            with ledger.write() as db:  # reads, then writes: what deferred transactions fail at
                count = db.execute("SELECT count(*) FROM models").fetchone()[0]
                db.execute("INSERT INTO models (name, created_at) VALUES (?, ?)", (f"{count:03}", count))
    """
    outputs([script(code, ledger.root.path) for _ in range(3)])
    assert names(ledger) == [f"{number:03}" for number in range(60)]


def test_a_killed_writer_leaves_whole_transactions(ledger: Ledger) -> None:
    code = """
        ledger = Ledger(Root.at(sys.argv[1]))
        for number in range(100000):
            with ledger.write() as db:
                for part in "ab":
                    db.execute("INSERT INTO models (name, created_at) VALUES (?, 0)", (f"{number}{part}",))
            print(number, flush=True)
    """
    process = script(code, ledger.root.path)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    committed = len([line for line in process.communicate()[0].splitlines() if line]) + 1
    found = set(names(ledger))
    whole = {name[:-1] for name in found}
    assert {f"{number}{part}" for number in whole for part in "ab"} == found
    assert whole >= {str(number) for number in range(committed)}


def test_what_happened_is_never_rewritten(ledger: Ledger) -> None:
    with ledger.write() as db:
        db.execute(_ROW, ("music",))
        db.execute(
            "INSERT INTO versions (model, number, sha, path, state, created_at) "
            "VALUES ('music', 1, 'x', 'runs/a', 'READY', 0.0)"
        )
        db.execute(
            "INSERT INTO deployments (model, alias, kind, version, actor, reason, created_at) "
            "VALUES ('music', 'production', 'deploy', 1, 'ada', 'first', 0.0)"
        )
        db.execute("INSERT INTO comparisons (id, a, b, result, created_at) VALUES ('c', '1', '2', '{}', 0.0)")
        db.execute(
            "INSERT INTO costs (kind, quantity, unit, basis, created_at) "
            "VALUES ('training', 2.0, 'second', 'measured', 0.0)"
        )
    for table in ("deployments", "comparisons", "costs"):
        for statement in (f"UPDATE {table} SET created_at = 9.0", f"DELETE FROM {table}"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"), ledger.write() as db:
                db.execute(statement)
    for statement in (
        "UPDATE versions SET sha = 'y'",
        "UPDATE versions SET number = 2",
        "DELETE FROM versions",
    ):
        with pytest.raises(sqlite3.IntegrityError, match="version"), ledger.write() as db:
            db.execute(statement)
    with ledger.write() as db:
        db.execute("UPDATE versions SET state = 'ARCHIVED'")


def test_deployments_of_an_alias_are_one_chain(ledger: Ledger) -> None:
    insert = (
        "INSERT INTO deployments (model, alias, kind, previous, target, actor, reason, created_at) "
        "VALUES ('music', 'production', 'deploy', ?, 'old:analyze', 'ada', 'test', 0.0)"
    )
    add(ledger, "music")
    with ledger.write() as db:
        db.execute(insert, (None,))
        db.execute(insert, (1,))
    for previous in (None, 1):
        with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"), ledger.write() as db:
            db.execute(insert, (previous,))


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO models (name, created_at) VALUES ('m', 'yesterday')",
        "INSERT INTO data_sets (id, name, path, sha256, rows, created_at, facts) "
        "VALUES ('d', 'd', 'd', 'x', 1, 0.0, '{')",
        "INSERT INTO versions (model, number, sha, path, state, created_at) "
        "VALUES ('absent', 1, 'x', 'p', 'READY', 0.0)",
        "INSERT INTO jobs (id, kind, title, arguments, state, created_at) "
        "VALUES ('j', 'run', 't', '[]', 'asleep', 0.0)",
        "INSERT INTO costs (kind, quantity, unit, unit_price, basis, created_at) "
        "VALUES ('training', 1.0, 'second', 0.1, 'measured', 0.0)",
    ],
    ids=["type", "json", "reference", "state", "price-without-currency"],
)
def test_rows_that_mean_nothing_are_refused(ledger: Ledger, statement: str) -> None:
    with pytest.raises(sqlite3.IntegrityError), ledger.write() as db:
        db.execute(statement)


def test_json_columns_hold_any_text() -> None:
    for value in ({"a": [1, 2.5, None, True]}, "\ud800 half a pair", "a\0b", "é"):
        assert from_json(to_json(value)) == value
        to_json(value).encode()
    assert from_json(None) is None
    with pytest.raises(ValueError):
        to_json(float("nan"))
    assert new_id("job") != new_id("job")


# --- migrations ---------------------------------------------------------------------------------------------


def next_version(folder: Path, sql: str) -> Path:
    """The packaged migrations and one more."""
    shutil.copytree(MIGRATIONS, folder)
    number = len(read_migrations(folder)) + 1
    (folder / f"{number:04}_next.sql").write_text(sql)
    return folder


def test_four_processes_migrate_an_old_ledger_at_once(ledger: Ledger, tmp_path: Path) -> None:
    add(ledger, "music")
    # Fails where it is applied twice, and with it whoever does so.
    sql = (
        "ALTER TABLE models ADD COLUMN owner TEXT;\nINSERT INTO models (name, created_at) VALUES ('new', 0);"
    )
    folder = next_version(tmp_path / "migrations", sql)
    start = time.time() + 1.0
    code = """
        time.sleep(max(0.0, float(sys.argv[3]) - time.time()))
        ledger = Ledger(Root.at(sys.argv[1]), migrations=Path(sys.argv[2]))
        with ledger.read() as db:
            print(db.execute("PRAGMA user_version").fetchone()[0], db.execute(
                "SELECT count(owner IS NULL) FROM models").fetchone()[0])
    """
    newest = len(read_migrations(folder))
    told = outputs([script(code, ledger.root.path, folder, start) for _ in range(4)])
    assert told == [f"{newest} 2"] * 4
    kept = list(ledger.root.backups.glob("*.db"))
    assert len(kept) == 1
    with closing(sqlite3.connect(kept[0])) as db:
        assert db.execute("PRAGMA user_version").fetchone()[0] == newest - 1
        assert db.execute("SELECT name FROM models").fetchall() == [("music",)]


def test_four_processes_bring_the_first_version_up_to_this_one(tmp_path: Path) -> None:
    folder = tmp_path / "first"
    folder.mkdir()
    shutil.copy(MIGRATIONS / "0001_first.sql", folder)
    root = Root.at(tmp_path / "root")
    old = Ledger(root, migrations=folder)
    with old.write() as db:
        db.execute(
            "INSERT INTO jobs (id, kind, title, arguments, state, created_at, started_at, pid, pid_started)"
            " VALUES ('job-1', 'run', 'x', '[]', 'running', 1, 2, 3, 4)"
        )
        db.execute("INSERT INTO leases VALUES ('accelerator', 'job-1', 3, 4, 5, 'x')")
    code = """
        with Ledger(Root.at(sys.argv[1])).read() as db:
            print(db.execute("PRAGMA user_version").fetchone()[0])
    """
    assert outputs([script(code, root.path) for _ in range(4)]) == [str(len(read_migrations()))] * 4
    assert len(list(root.backups.glob("*.db"))) == 1
    ledger = Ledger(root)
    assert get(ledger, "job-1").host is None
    dispatch(ledger)  # a job of the older program, whose process is gone
    assert get(ledger, "job-1").state_text() == "failed (orphaned)" and holder(ledger) is None


def test_four_processes_make_a_ledger_at_once(tmp_path: Path) -> None:
    code = """
        ledger = Ledger(Root.at(sys.argv[1]))
        with ledger.write() as db:
            db.execute("INSERT INTO models (name, created_at) VALUES (?, 0.0)", (sys.argv[2],))
    """
    outputs([script(code, tmp_path, name) for name in "abcd"])
    assert names(Ledger(Root.at(tmp_path), create=False)) == list("abcd")


def test_a_migration_that_fails_changes_nothing(ledger: Ledger, tmp_path: Path) -> None:
    add(ledger, "music")
    broken = next_version(
        tmp_path / "broken",
        "CREATE TABLE new (x);\nINSERT INTO models (name, created_at) VALUES ('music', 0);",
    )
    with pytest.raises(sqlite3.IntegrityError):
        Ledger(ledger.root, migrations=broken)
    unrelated = next_version(
        tmp_path / "unrelated",
        "INSERT INTO versions (model, number, sha, path, state, created_at) "
        "VALUES ('absent', 1, 'x', 'p', 'READY', 0.0);",
    )
    with pytest.raises(sqlite3.IntegrityError, match="refers to no row of models"):
        Ledger(ledger.root, migrations=unrelated)
    assert names(Ledger(ledger.root)) == ["music"]
    with ledger.read() as db:
        assert db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'new'").fetchone()[0] == 0


def test_an_older_program_says_that_the_ledger_is_newer(ledger: Ledger, tmp_path: Path) -> None:
    newer = next_version(tmp_path / "migrations", "CREATE TABLE later (x INTEGER) STRICT;")
    Ledger(ledger.root, migrations=newer)
    newest = len(read_migrations())
    with pytest.raises(FileError, match=rf"version {newest + 1} .* up to {newest}.*upgrade the program"):
        Ledger(ledger.root)


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "service"),
    [
        ("Library/Mobile Documents/com~apple~CloudDocs/work", "iCloud Drive"),
        ("Library/CloudStorage/GoogleDrive-ada@example.org/My Drive", "Google Drive"),
        ("Library/CloudStorage/Dropbox", "Dropbox"),
        ("Dropbox (Personal)/work", "Dropbox"),
        ("OneDrive - Example/work", "OneDrive"),
    ],
)
def test_folders_that_a_cloud_synchronizes_are_refused(tmp_path: Path, folder: str, service: str) -> None:
    with pytest.raises(FileError, match=f"synchronized by {service}.*--root"):
        Ledger(Root.at(tmp_path / folder))
    assert not (tmp_path / folder).exists()


def test_a_link_into_a_cloud_folder_is_refused_too(tmp_path: Path) -> None:
    (tmp_path / "Dropbox" / "work").mkdir(parents=True)
    (tmp_path / "work").symlink_to(tmp_path / "Dropbox" / "work")
    with pytest.raises(FileError, match="Dropbox"):
        Ledger(Root.at(tmp_path / "work"))


def test_a_missing_ledger_is_made_only_where_that_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no ledger"):
        Ledger(Root.at(tmp_path), create=False)
    assert not (tmp_path / ".mlx-distill").exists()


def test_another_database_is_no_ledger(tmp_path: Path) -> None:
    root = Root.at(tmp_path)
    root.state.mkdir()
    with closing(sqlite3.connect(root.ledger)) as db:
        db.execute("CREATE TABLE songs (title TEXT)")
    with pytest.raises(FileError, match="no ledger"):
        Ledger(root)


@pytest.mark.parametrize("damage", ["header", "pages"])
def test_a_damaged_ledger_is_named_with_its_backup(ledger: Ledger, damage: str) -> None:
    add(ledger, *(f"model {number}" for number in range(2000)))
    kept = backup(ledger)
    content = bytearray(ledger.path.read_bytes())
    where = slice(0, 64) if damage == "header" else slice(4096, len(content))
    content[where] = b"\x5a" * len(content[where])
    ledger.path.write_bytes(content)
    with pytest.raises(FileError, match="damaged") as caught:
        names(Ledger(ledger.root))
    assert str(kept) in (caught.value.fix or "")
    restore(ledger.root, kept)
    assert len(names(Ledger(ledger.root))) == 2000


def test_a_lost_ledger_is_not_replaced_by_an_empty_one(ledger: Ledger) -> None:
    add(ledger, "music")
    kept = backup(ledger)
    ledger.path.unlink()
    with pytest.raises(FileError, match=r"missing or empty.*ledger restore"):
        Ledger(ledger.root)
    restore(ledger.root, kept)
    assert names(Ledger(ledger.root)) == ["music"]


@contextmanager
def without_rights_of_root(folder: Path) -> Iterator[None]:
    """Let root, who may write everywhere, be nobody for a while, with this folder as its own."""
    if os.geteuid() != 0:
        yield
        return
    for path in (folder, *folder.rglob("*")):
        os.chown(path, _NOBODY, _NOBODY)
    os.seteuid(_NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_that_cannot_be_written() -> None:
    # Not under pytest's folder, which only its owner may enter.
    with tempfile.TemporaryDirectory() as name:
        root = Root.at(name)
        ledger = Ledger(root)
        add(ledger, "a")
        with without_rights_of_root(Path(name)):
            assert names(ledger) == ["a"]
            ledger.path.chmod(0o400)
            root.state.chmod(0o500)
            try:
                with pytest.raises(FileError, match=r"cannot be (written|opened)|denied|read-?only"):
                    add(ledger, "b")
            finally:
                root.state.chmod(0o700)
                ledger.path.chmod(0o600)
        assert names(ledger) == ["a"]


def test_a_full_disk_loses_nothing_that_was_committed(ledger: Ledger) -> None:
    add(ledger, "a")
    size = ledger.path.stat().st_size
    with small_disk(size + 4096), pytest.raises(FileError, match="nothing that was committed is lost"):
        add(ledger, *(f"{number:06}" for number in range(20_000)))
    assert names(ledger) == ["a"]
    with ledger.read() as db:
        assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    add(ledger, "b")
    assert names(ledger) == ["a", "b"]


@pytest.mark.parametrize("limit", [0, 4096, 20_000])
def test_a_full_disk_when_the_ledger_is_made(tmp_path: Path, limit: int) -> None:
    with small_disk(limit), pytest.raises(FileError):
        Ledger(Root.at(tmp_path))
    add(Ledger(Root.at(tmp_path)), "a")


# --- backups and other programs -----------------------------------------------------------------------------


def test_a_backup_is_one_whole_file(ledger: Ledger, tmp_path: Path) -> None:
    add(ledger, "a")
    with ledger.write() as db:  # not committed, so not in it
        db.execute(_ROW, ("b",))
        kept = backup(ledger, tmp_path / "copy.db")
    with pytest.raises(FileError, match="exists already"):
        backup(ledger, kept)
    assert [path.name for path in tmp_path.glob("copy*")] == ["copy.db"]
    restore(ledger.root, kept)
    assert names(Ledger(ledger.root)) == ["a"]
    # What the restored file took the place of is kept too.
    with closing(sqlite3.connect(next(ledger.root.backups.glob("*replaced*")))) as db:
        assert db.execute("SELECT count(*) FROM models").fetchone()[0] == 2


def test_only_a_ledger_is_restored(ledger: Ledger, tmp_path: Path) -> None:
    add(ledger, "a")
    (tmp_path / "notes.db").write_text("no database, although it is long enough to be taken for one" * 9)
    for name in ("notes.db", "absent.db"):
        with pytest.raises(FileError):
            restore(ledger.root, tmp_path / name)
    assert names(ledger) == ["a"]


def test_other_programs_can_read_while_one_writes(ledger: Ledger) -> None:
    add(ledger, "a")
    # How Datasette opens a file.
    with closing(sqlite3.connect(f"file:{ledger.path}?mode=ro", uri=True)) as other:
        with ledger.write() as db:
            db.execute(_ROW, ("b",))
            assert other.execute("SELECT name FROM models").fetchall() == [("a",)]
        assert other.execute("SELECT name FROM models").fetchall() == [("a",), ("b",)]
        tables = {row[0] for row in other.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        assert tables >= {
            "data_sets",
            "runs",
            "jobs",
            "models",
            "versions",
            "aliases",
            "deployments",
            "costs",
        }
