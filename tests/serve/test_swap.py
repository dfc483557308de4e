"""A name that comes to mean another model while the server runs."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from helpers.registry_runs import make_run, make_task
from helpers.served import MODEL, client_of, make_app, write_root

from mlx_distill.errors import ModelError
from mlx_distill.ledger.database import Ledger
from mlx_distill.ledger.root import Root
from mlx_distill.registry import add_version, get_version, promote, promote_external, rollback
from mlx_distill.serve.errors import ApiError
from mlx_distill.serve.loading import load_model, weight_bytes
from mlx_distill.serve.memory import needed
from mlx_distill.serve.pool import Pool
from mlx_distill.serve.request_log import read_requests
from mlx_distill.serve.settings import ServerSettings

WHO: dict[str, Any] = {"actor": "ann", "reason": "a try", "override": "a test"}
ROW = {"text": "Night."}


@dataclass(frozen=True)
class Named:
    name: str
    path: Path
    target: str | None = None
    model: str | None = "music"
    version: int | None = 1
    alias: str | None = "production"
    sha: str | None = "one"
    deployment: int | None = 1
    settings: Mapping[str, Any] = field(default_factory=dict)


def test_a_moved_alias_is_served_and_requests_end_with_the_model_that_they_began_with(tmp_path: Any) -> None:
    root = write_root(tmp_path)
    now = [Named("music", root.path / MODEL)]
    broken = [False]

    def load(resolved: Any) -> Any:
        if broken[0]:
            raise ModelError("damaged")
        return load_model(resolved, batch_size=2)

    pool = Pool(ServerSettings(root, model="music"), lambda name: now[0], load)
    try:
        with pool.get() as first:
            now[0] = replace(now[0], version=2, sha="two")
            pool.tick()
            with pool.get() as second:
                assert (first.resolved.version, second.resolved.version) == (1, 2)
                assert not first.worker.closed
        broken[0] = True
        now[0] = replace(now[0], version=3, sha="three")
        pool.tick()
        with pool.get() as third:
            assert third.resolved.version == 2
        state = pool.state()
        assert state["status"] == "ready" and "damaged" in state["problem"]
    finally:
        pool.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with two versions of a model."""
    root = tmp_path_factory.mktemp("root")
    for number in (1, 2):
        make_run(root / f"runs/{number}", seed=number, n=8)
        add_version(Ledger(Root.at(root)), f"runs/{number}", name="music")
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Root:
    shutil.copytree(made, tmp_path / "root")
    return Root.at(tmp_path / "root")


@pytest.fixture
def server(root: Root) -> Iterator[Any]:
    """A server whose ticks are made by the test; version 1 serves."""
    promote(Ledger(root), "music", 1, **WHO)
    server = make_app(root, model="music", start_jobs=False).state.server
    server.pool.tick()
    yield server
    server.stop()


def version_of(server: Any) -> int:
    with server.pool.get("music") as served:
        version: int = served.resolved.version
        return version


def weights(root: Root, number: int) -> Path:
    return next(root.inside(get_version(Ledger(root), "music", number).path).glob("*.safetensors"))


def damage(file: Path) -> bytes:
    """Change one byte of a file; the bytes that it had."""
    content = file.read_bytes()
    file.unlink()  # it is a link to the run's
    file.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    return content


@pytest.mark.slow
def test_a_damaged_version_is_not_served_and_the_old_one_goes_on(server: Any, root: Root) -> None:
    promote(server.ledger, "music", 2, **WHO)
    content = damage(weights(root, 2))
    server.pool.tick()
    assert version_of(server) == 1
    state = server.pool.state()
    assert state["status"] == "ready" and "music stays with music:1, not music:2" in state["problem"]
    (failed,) = state["failed_changes"]
    assert failed["wanted"] == "music:2" and "hash differs" in failed["error"]
    server.pool.tick()  # not tried again at once
    assert server.pool.state()["failed_changes"] == [failed]
    (line,) = [one for one in read_requests(root.request_log) if one.get("event")]
    assert (line["event"], line["from"], line["to"]) == ("model_change_failed", "music:1", "music:2")
    # It is whole again, and deployed again.
    weights(root, 2).write_bytes(content)
    promote(server.ledger, "music", 2, **WHO)
    server.pool.tick()
    state = server.pool.state()
    assert version_of(server) == 2 and state["problem"] is None and not state["failed_changes"]


def test_what_is_damaged_is_not_served_by_a_server_that_starts(root: Root) -> None:
    damage(weights(root, 1))
    server = make_app(root, model=None, start_jobs=False).state.server
    with pytest.raises(ApiError, match="hash differs") as caught, server.pool.get("music:1"):
        pass
    assert caught.value.status == 503
    server.stop()


@pytest.mark.slow
def test_where_memory_is_short_the_old_model_is_drained_first(root: Root) -> None:
    limit = int(1.5 * needed(weight_bytes(weights(root, 1).parent)))
    promote(Ledger(root), "music", 1, **WHO)
    server = make_app(root, model="music", start_jobs=False, memory_limit=limit).state.server
    server.pool.tick()
    promote(server.ledger, "music", 2, **WHO)
    with ThreadPoolExecutor(1) as threads:
        with server.pool.get("music") as under_way:
            ticking = threads.submit(server.pool.tick)
            while server.pool.state()["status"] != "changing":
                time.sleep(0.01)
            with pytest.raises(ApiError) as refused, server.pool.get("music"):
                pass
            assert refused.value.code == "model_changing" and refused.value.headers["retry-after"] == "5"
            assert not under_way.worker.closed and not ticking.done()
        ticking.result(60)
    assert under_way.worker.closed and version_of(server) == 2
    assert len(server.pool.contents()[1]) == 1
    # What is damaged does not interrupt the service.
    promote(server.ledger, "music", 1, **WHO)
    damage(weights(root, 1))
    with server.pool.get("music") as served:
        server.pool.tick()
        assert not served.worker.closed
    assert version_of(server) == 2 and "hash differs" in server.pool.state()["problem"]
    server.stop()


def test_room_for_a_model_that_is_verified_is_kept(tmp_path: Path) -> None:
    root = write_root(tmp_path)
    folders = [root.path / MODEL, *(root.path / "models" / name for name in ("b", "c"))]
    for folder in folders[1:]:
        shutil.copytree(folders[0], folder)
    limit = int(2.5 * needed(weight_bytes(folders[0])))  # two models
    names = {folder.name: Named(folder.name, folder) for folder in folders}
    pool = Pool(ServerSettings(root, model="small", memory_limit=limit), names.__getitem__)
    for name in ("small", "b"):
        with pool.get(name) as served:
            pass

    def ask(name: str) -> str:
        with pool.get(name) as served:
            return served.resolved.name

    def verify() -> list[str]:
        with pool.room_for(folders[2]):
            return [loaded.path.name for loaded in pool.contents()[1]]

    with ThreadPoolExecutor(2) as threads:
        with pool.room_for(folders[2]):  # the one that was unused for longest has left
            assert [loaded.path.name for loaded in pool.contents()[1]] == ["b"]
            assert ask("b") == "b"
            waiting = threads.submit(ask, "small")
            time.sleep(0.05)
            assert not waiting.done()
        assert waiting.result(60) == "small" and not served.worker.closed
        with pool.get("small"), pool.get("b"):  # both are in use: one has to answer first
            verifying = threads.submit(verify)
            time.sleep(0.05)
            assert not verifying.done() and len(pool.contents()[1]) == 2
        assert len(verifying.result(60)) == 1
    pool.close()


def test_a_model_that_is_too_large_is_not_loaded_to_be_verified(tmp_path: Path) -> None:
    root = write_root(tmp_path)
    pool = Pool(ServerSettings(root, memory_limit=1000), lambda name: Named(name, root.path / MODEL))
    with pytest.raises(ApiError, match="models may take 1,000") as caught, pool.room_for(root.path / MODEL):
        pass
    assert caught.value.headers["x-should-retry"] == "false"


def test_a_drained_model_is_loaded_again_where_its_successor_fails(tmp_path: Path) -> None:
    root = write_root(tmp_path)
    other = root.path / "models" / "other"
    shutil.copytree(root.path / MODEL, other)
    now = [Named("music", root.path / MODEL)]

    clock, mended = [time.time()], list[bool]()

    def load(resolved: Any) -> Any:
        if resolved.version == 2 and not mended:
            raise ModelError("wrong answers to golden rows")
        return load_model(resolved, batch_size=2)

    settings = ServerSettings(root, model="music", max_models=1)
    pool = Pool(settings, lambda name: now[0], load, clock=lambda: clock[-1])
    pool.tick()
    with pool.get() as before:
        pass
    now[0] = replace(now[0], version=2, sha="two", path=other, deployment=2)
    pool.tick()
    with pool.get() as after:
        assert after.resolved.version == 1 and after.worker is not before.worker
    (failed,) = pool.state()["failed_changes"]
    assert failed["attempts"] == 1 and failed["retry_at"] > time.time() + 30  # it interrupts the service
    assert pool.state()["status"] == "ready"
    pool.tick()
    assert pool.state()["failed_changes"] == [failed]
    clock.append(clock[-1] + 61)
    pool.tick()  # by itself, as often as it fails
    (failed,) = pool.state()["failed_changes"]
    assert failed["attempts"] == 2 and failed["retry_at"] == clock[-1] + 120
    clock.append(clock[-1] + 121)
    mended.append(True)
    pool.tick()
    with pool.get() as moved:
        assert moved.resolved.version == 2
    assert not pool.state()["failed_changes"]
    now[0] = replace(now[0], version=3, sha="three", deployment=3)
    pool.tick()
    with pool.get() as moved:
        assert moved.resolved.version == 3
    pool.close()


@pytest.mark.slow
def test_a_swap_under_load_loses_nothing(root: Root) -> None:
    promote(Ledger(root), "music", 1, **WHO)
    app = make_app(root, model="music", start_jobs=False)
    seen: list[tuple[int, int]] = []
    done = threading.Event()
    with client_of(app) as client:

        def ask() -> None:
            while not done.is_set():
                got = client.post("/v1/analyze", json={"item": ROW, "max_tokens": 4})
                seen.append((got.status_code, got.json()["model"]["version"]))

        with ThreadPoolExecutor(3) as threads:
            asking = [threads.submit(ask) for _ in range(3)]
            try:
                while len(seen) < 6:
                    time.sleep(0.01)
                promote(app.state.server.ledger, "music", 2, **WHO)
                for _ in range(3000):
                    if sum(version == 2 for _, version in list(seen)) > 6:
                        break
                    time.sleep(0.01)
            finally:
                done.set()
            for one in asking:
                one.result(60)
    assert {status for status, _ in seen} == {200} and {version for _, version in seen} == {1, 2}


@pytest.mark.slow
def test_the_settings_of_a_deployment_are_applied_and_told(server: Any) -> None:
    promote(server.ledger, "music", 1, **WHO, settings={"context_length": 24, "memory_limit_gb": 2.5})
    server.pool.tick()
    (model,) = server.pool.state()["models"]
    assert model["settings"] == {"context_length": 24, "memory_limit_gb": 2.5}
    with client_of(make_app(server.root, model="music", start_jobs=False)) as client:
        refused = client.post("/v1/analyze", json={"item": {"text": "word " * 40}, "max_tokens": 4})
        assert refused.json()["error"]["code"] == "prompt_too_long"
        chat = {"model": "music", "messages": [{"role": "user", "content": "word " * 40}]}
        refused = client.post("/v1/chat/completions", json=chat)
        assert refused.json()["error"]["code"] == "context_length_exceeded"
        whole = {"item": {"text": "word " * 40}, "model": "music:1", "max_tokens": 4}
        assert client.post("/v1/analyze", json=whole).status_code == 200
    promote(server.ledger, "music", 2, **WHO, settings={"memory_limit_gb": 1e-6})
    server.pool.tick()
    assert "needs" in server.pool.state()["problem"] and version_of(server) == 1


EXTERNAL = """
import json, time
def answer(rows):
    for row in rows:
        if row["text"] == "fails":
            raise ValueError("no")
        if row["text"] == "hangs":
            time.sleep(3)
    return [{"colour": "dark" if row["text"] != "unfit" else "green"} for row in rows]
"""


@pytest.mark.slow
def test_an_external_analyzer_answers_and_a_rollback_reaches_it(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root.path / "old_analyzer.py").write_text(EXTERNAL)
    monkeypatch.syspath_prepend(str(root.path))
    ledger = Ledger(root)
    who = {"actor": "ann", "reason": "what is replaced"}
    promote_external(ledger, "music", "old_analyzer:answer", task=make_task(), rows=[ROW], **who)
    promote(ledger, "music", 1, **WHO)
    app = make_app(root, model="music", start_jobs=False, external_seconds=1.0)
    server = app.state.server
    with client_of(app) as client:
        assert client.post("/v1/analyze", json={"item": ROW}).json()["model"]["version"] == 1
        rollback(ledger, "music", **who)
        server.pool.tick()
        one = client.post("/v1/analyze", json={"item": ROW}).json()
        assert (one["answer"], one["label"], one["constrained"]) == ({"colour": "dark"}, "dark", False)
        assert one["model"]["version"] is None and one["model"]["alias"] == "production"
        assert not server.pool.contents()[1]  # no model takes memory
        texts = ["a", "fails", "unfit", "b"]
        items = [{"id": text, "text": text} for text in texts] + [{"id": "empty"}]
        batch = client.post("/v1/analyze/batch", json={"items": items}).json()
        kinds = [row["error"] and row["error"]["type"] for row in batch["data"]]
        assert kinds == [None, "external_analyzer", "does_not_fit_the_schema", None, "bad_row"]
        assert [row["id"] for row in batch["data"]] == [*texts, "empty"] and batch["errors"] == 3
        hangs = client.post("/v1/analyze", json={"item": {"text": "hangs"}}).json()
        assert "no answer within 1 seconds" in hangs["error"]["message"]
        labels = client.post("/v1/classify", json={"items": [ROW]}).json()["data"]
        assert (labels[0]["label"], labels[0]["label_probs"]) == ("dark", None)
        chat = {"messages": [{"role": "user", "content": "x"}]}
        assert client.post("/v1/chat/completions", json=chat).json()["error"]["code"] == "external_analyzer"
        (state,) = client.get("/ready").json()["models"]
        assert state["external"] == "old_analyzer:answer"
        sent = client.post("/v1/analyze", json={"item": ROW, "model": "old_analyzer:answer"})
        assert sent.status_code == 404
