"""Deployments and comparisons as JSON, and who has the accelerator while a version is verified."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from click.testing import CliRunner
from helpers.registry_runs import make_run
from helpers.served import TOKEN, client_of, make_app

from mlx_distill.cli import cli
from mlx_distill.errors import ConfigError
from mlx_distill.jobs import cancel, lease, submit
from mlx_distill.jobs.alongside import verifying
from mlx_distill.jobs.store import update
from mlx_distill.ledger.database import Ledger, to_json
from mlx_distill.ledger.root import Root
from mlx_distill.registry import add_version, get_version, history
from mlx_distill.text import interval

WHY = {"reason": "a try"}
VERSIONS = "/v1/mlx/models/music/versions"


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    """A root with two versions: 1 is right, 2 is much worse."""
    root = tmp_path_factory.mktemp("root")
    make_run(root / "runs/one", seed=1, n=60)
    make_run(root / "runs/bad", seed=2, n=60, wrong=range(30))
    ledger = Ledger(Root.at(root))
    for run in ("one", "bad"):
        add_version(ledger, f"runs/{run}", name="music")
    return ledger


@pytest.fixture(scope="module")
def client(ledger: Ledger) -> Iterator[Any]:
    with client_of(make_app(ledger.root, model=None, start_jobs=False)) as client:
        yield client


@pytest.fixture
def job(ledger: Ledger) -> Iterator[str]:
    """A job that waits for the accelerator."""
    job = submit(ledger, "run", ["nothing.yaml"])
    yield job.id
    with suppress(ConfigError):  # the test has done so
        cancel(ledger, job.id)


@pytest.mark.slow
def test_promote_roll_back_archive_and_history(client: Any, ledger: Ledger) -> None:
    assert client.post("/v1/mlx/models/music/rollback", json=WHY).status_code == 400  # nothing before
    settings = {"context_length": 512, "memory_limit_gb": 2.0}
    first = client.post(f"{VERSIONS}/1/promote", json={**WHY, **settings}).json()
    assert (first["serves"], first["settings"]) == ("music:1", settings)
    assert first["gate"]["verified"]["passed"] and first["actor"].endswith("(API)")
    refused = client.post(f"{VERSIONS}/2/promote", json={**WHY, "margin": "3pt"})
    assert refused.status_code == 422 and refused.json()["error"]["code"] == "gate_refused"
    states = {check["name"]: check["state"] for check in refused.json()["gate"]["checks"]}
    assert states["comparison"] == "failed"
    body = {**WHY, "margin": "3pt", "override": "a drill", "actor": "ann"}
    second = client.post(f"{VERSIONS}/2/promote", json=body).json()
    assert (second["serves"], second["actor"], second["gate"]["override"]) == ("music:2", "ann", "a drill")
    assert client.post(f"{VERSIONS}/2/archive").status_code == 400  # an alias serves it
    back = client.post("/v1/mlx/models/music/rollback", json=WHY).json()
    assert (back["kind"], back["serves"], back["settings"]) == ("rollback", "music:1", settings)
    assert client.post(f"{VERSIONS}/2/archive").json()["state"] == "ARCHIVED"
    assert client.post(f"{VERSIONS}/2/promote", json=WHY).status_code == 400
    assert client.post(f"{VERSIONS}/2/restore").json()["state"] == "READY"
    told = client.get("/v1/mlx/models/music/history", params={"alias": "production"}).json()["data"]
    assert [one["id"] for one in told] == [one.id for one in history(ledger, "music")]


def test_no_request_names_code_or_an_address(client: Any) -> None:
    for more in ({"target": "os:system"}, {"external": "http://127.0.0.1/"}, {"against": "/etc/passwd"}):
        assert client.post(f"{VERSIONS}/1/promote", json={**WHY, **more}).status_code == 400
    assert client.post("/v1/mlx/models/music/rollback", json={**WHY, "to": "os:system"}).status_code == 400
    for path in (
        "/v1/mlx/models/none/rollback",
        f"{VERSIONS}/99/promote",
        "/v1/mlx/models/x/versions/1/promote",
    ):
        assert client.post(path, json=WHY).status_code in (400, 404)
    assert client.post(f"{VERSIONS}/1/promote", json={"reason": " "}).status_code == 400
    paths = client.get("/v1/openapi.json").json()["paths"]
    assert "/v1/mlx/models/{name}/versions/{number}/promote" in paths and "/v1/mlx/compare" in paths


def test_endpoints_need_the_token(ledger: Ledger) -> None:
    app = make_app(ledger.root, model=None, start_jobs=False)
    with client_of(app, token=False) as client:
        assert TOKEN not in client.headers.get("authorization", "")
        assert client.post(f"{VERSIONS}/1/promote", json=WHY).status_code == 401
        assert client.post("/v1/mlx/compare", json={"a": "music:1", "b": "music:2"}).status_code == 401


def test_comparisons_are_made_kept_and_listed(client: Any) -> None:
    made = client.post("/v1/mlx/compare", json={"a": "music:1", "b": "music:2", "margin": "3pt"})
    assert made.status_code == 200 and made.json()["verdict"] == "worse"
    kept = made.json()["id"]
    assert client.get(f"/v1/mlx/comparisons/{kept}").json() == made.json()
    assert client.get("/v1/mlx/comparisons").json()["data"][0]["id"] == kept
    again = client.post("/v1/mlx/compare", json={"a": "music:1", "b": "music:2", "margin": "3pt"}).json()
    assert again["id"] == kept  # the same is kept once
    assert client.get("/v1/mlx/comparisons/cmp-0").json()["error"]["code"] == "comparison_not_found"
    outside = client.post("/v1/mlx/compare", json={"a": "../../etc/passwd", "b": "music:2"})
    assert outside.status_code == 400


@pytest.mark.slow
def test_the_overview_has_the_agreement_with_what_was_compared(client: Any, ledger: Ledger) -> None:
    if client.get("/v1/mlx/models/music").json()["aliases"].get("production") != 1:
        assert client.post(f"{VERSIONS}/1/promote", json=WHY).status_code == 200
    made = client.post("/v1/mlx/compare", json={"a": "music:2", "b": "music:1"}).json()
    same = made["facts"]["agreement"]
    assert same["value"] == 0.5 and 0.3 < same["low"] < 0.5 < same["high"] < 0.7  # B is wrong on 30 of 60
    client.post("/login", data={"token": TOKEN})
    page, comparison = client.get("/").text, client.get(f"/compare/{made['id']}").text
    client.cookies.clear()
    assert f"of the labels of music:1 are those of music:2 ({interval(same)})" in page
    assert "give the same label on" in comparison


def test_what_a_job_has_compared_is_not_compared_again(client: Any, ledger: Ledger) -> None:
    kept = client.post("/v1/mlx/compare", json={"a": "music:1", "b": "music:2"}).json()["id"]
    rows = ledger.root.path / "rows.jsonl"
    rows.write_text("", encoding="utf-8")
    os.utime(rows, (1, 1))
    asked = {"a": "music:1", "b": "music:2", "rows": "rows.jsonl"}
    job = client.post("/v1/mlx/compare", json=asked)
    assert job.status_code == 202
    ended = {"state": "succeeded", "finished_at": time.time(), "result": to_json({"comparison": kept})}
    with ledger.write() as db:
        update(db, job.json()["id"], **ended)
    again = client.post("/v1/mlx/compare", json=asked)
    assert again.status_code == 200 and again.json()["id"] == kept
    new = [
        client.post("/v1/mlx/compare", json={**asked, **other})
        for other in ({"margin": "3pt"}, {"a": "music:2", "b": "music:1"})
    ]
    rows.touch()  # other rows, perhaps
    assert client.post("/v1/mlx/compare", json=asked).status_code == 202
    for one in new:
        assert one.status_code == 202
        cancel(ledger, one.json()["id"])


def test_showing_a_version_verifies_it_with_the_accelerator(ledger: Ledger, job: str) -> None:
    lease.release(ledger, "serve")
    command = ["registry", "show", "music:1", "--verify", "--root", str(ledger.root.path)]
    refused = CliRunner().invoke(cli, command)
    assert refused.exit_code == 2 and "a job needs the accelerator" in refused.output + refused.stderr


def test_a_comparison_whose_answers_are_missing_is_a_job(client: Any, ledger: Ledger) -> None:
    asked = client.post("/v1/mlx/compare", json={"a": "asset:models/tiny-qwen3", "b": "music:2"})
    assert asked.status_code == 202 and asked.json()["state"] == "queued"
    cancel(ledger, asked.json()["id"])


def test_a_job_is_a_reason_not_to_load_a_version(client: Any, ledger: Ledger, job: str) -> None:
    refused = client.post(f"{VERSIONS}/1/promote", json=WHY)
    assert refused.status_code == 400 and "accelerator is in use" in refused.json()["error"]["message"]
    lease.release(ledger, "serve")  # which the server in this process may still have from before
    root = str(ledger.root.path)
    command = ["registry", "promote", "music:1", "--reason", "a try", "--root", root]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code != 0 and "a job needs the accelerator" in result.output + result.stderr


def test_verifying_has_the_lease_and_goes_on_where_this_process_has_it(ledger: Ledger) -> None:
    lease.release(ledger, "serve")
    with verifying(ledger, "promote"):
        held = lease.holder(ledger)
        assert held is not None and held.purpose == "promote"
        with verifying(ledger, "promote"):
            pass
        assert lease.holder(ledger) is not None
    assert lease.holder(ledger) is None


def test_a_server_keeps_the_lease_while_it_verifies(ledger: Ledger) -> None:
    server = make_app(ledger.root, model=None, start_jobs=False).state.server
    with server.verifying(get_version(ledger, "music", 1)):
        job = submit(ledger, "run", ["nothing.yaml"])
        server._serve_jobs()
        held = lease.holder(ledger)
        assert held is not None and held.holder == "serve"
    server._serve_jobs()
    assert lease.holder(ledger) is None
    cancel(ledger, job.id)
    server.stop()


def test_wait_goes_on_when_the_jobs_have_ended(
    ledger: Ledger, job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: cancel(ledger, job))
    with verifying(ledger, "promote", wait=True):
        held = lease.holder(ledger)
        assert held is not None and held.purpose == "promote"
    assert job in capsys.readouterr().err
