"""Alarms of the overview: each is there when its cause is, and gone when that is."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.served import client_of, make_app

from mlx_distill.data_sets import add_data_set, get_data_set
from mlx_distill.jobs import submit
from mlx_distill.jobs.store import update
from mlx_distill.ledger.backups import backup
from mlx_distill.ledger.database import Ledger, to_json
from mlx_distill.ledger.root import Root
from mlx_distill.serve.pages import alarms as module
from mlx_distill.serve.pages.alarms import alarms

READY: dict[str, Any] = {"problem": None, "models": []}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(Root.at(tmp_path))


def texts(ledger: Ledger, state: dict[str, Any] = READY) -> list[str]:
    return [one.text for one in alarms(ledger, state)]


def failed(ledger: Ledger, title: str, *, run: str | None = None, code: str = "data", ago: float = 60) -> str:
    job = submit(ledger, "run", ["tiny"], title=title, run_path=run)
    error = to_json({"code": code, "message": "rows.jsonl:3: no answer", "fix": "drop the row"})
    with ledger.write() as db:
        update(db, job.id, state="failed", attempt=1, finished_at=time.time() - ago, error=error)
    return job.id


def test_jobs_that_failed_until_a_later_one_or_a_week_has_passed(ledger: Ledger) -> None:
    assert texts(ledger) == []
    failed(ledger, "old", ago=8 * 86400)
    orphan = failed(ledger, "killed", code="orphaned", ago=8 * 86400)
    failed(ledger, "first", run="runs/x")
    job = failed(ledger, "second", run="runs/x")
    second, killed = alarms(ledger, READY)
    assert second.text == "“second” failed" and second.command == ("jobs", "show", job)
    assert "no answer (drop the row)" in second.note and second.link == f"/jobs/{job}"
    assert "killed" in killed.text and killed.command == ("jobs", "resume", orphan)
    with ledger.write() as db:
        update(db, orphan, state="running", started_at=1.0)
    assert texts(ledger) == ["“second” failed"]
    stopped = failed(ledger, "third", run="runs/x", code="gpu_watchdog")
    assert [one.command for one in alarms(ledger, READY)] == [("jobs", "resume", stopped)]


def test_data_that_changed_or_is_gone(ledger: Ledger) -> None:
    rows = ledger.root.path / "rows.jsonl"
    row = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    rows.write_text(row, encoding="utf-8")
    add_data_set(ledger, "rows.jsonl")
    later = time.time() + 60
    os.utime(rows, (later, later))
    assert texts(ledger) == []  # written again with the same content
    rows.write_text(row * 2, encoding="utf-8")
    os.utime(rows, (later, later))
    (found,) = alarms(ledger, READY)
    assert found.command == ("data", "add", "rows.jsonl", "--name", "rows")
    assert get_data_set(ledger, "rows").changed
    add_data_set(ledger, "rows.jsonl", name="rows")
    assert texts(ledger) == []
    rows.unlink()
    outside = ledger.root.path.with_suffix(".outside")
    outside.write_text(row * 2, encoding="utf-8")
    rows.symlink_to(outside)  # the same content, outside of the root: not read, and no error of the page
    assert len(texts(ledger)) == 1
    rows.unlink()
    assert len(texts(ledger)) == 1


def test_backups_of_a_ledger_with_deployments(ledger: Ledger) -> None:
    def deployed(days: float, id: int) -> None:
        with ledger.write() as db:
            db.execute("INSERT OR IGNORE INTO models (name, created_at) VALUES ('m', 0)")
            db.execute(
                "INSERT INTO deployments "
                "(id, model, alias, kind, previous, target, actor, reason, created_at) "
                "VALUES (?, 'm', 'production', 'deploy', ?, 'a:b', 'ann', 'x', ?)",
                (id, id - 1 or None, time.time() - days * 86400),
            )

    deployed(6, 1)
    assert texts(ledger) == []
    deployed(9, 2)
    assert texts(ledger) == ["The ledger has no backup"]
    kept = backup(ledger)
    assert texts(ledger) == []
    old = time.time() - 8.5 * 86400
    os.utime(kept, (old, old))
    assert texts(ledger) == ["The newest backup of the ledger is 8 days old"]


def test_the_server_and_the_disk(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"bytes": 3_000_000_000}
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=free["bytes"]))
    assert texts(ledger, {"problem": "m: no such model", "models": []}) == [
        "The served model is not in memory"
    ]
    assert texts(ledger, {"problem": "m stays", "models": [1]}) == ["What serves is not what is deployed"]
    later = {"problem": "m stays", "models": [1], "failed_changes": [{"retry_at": time.time() + 119.5}]}
    assert alarms(ledger, later)[0].note.startswith("m stays (tried again in 1 min 5")
    free["bytes"] = 1_000_000_000
    assert "left" in texts(ledger)[0]


def test_a_title_is_text_in_the_page(ledger: Ledger) -> None:
    job = failed(ledger, "<script>alert(1)</script>")
    app = make_app(ledger.root.path, model=None, start_jobs=False)
    with client_of(app, token=False, cookie=True) as client:
        page = client.get("/").text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;” failed" in page and "<script>alert" not in page
    assert f"mlx-distill jobs show {job}" in page
