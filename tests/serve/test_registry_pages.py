"""Deploying, rolling back and archiving in the browser; data sets."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.registry_runs import TASK
from helpers.served import MODEL, client_of, make_app, write_root

from mlx_distill.registry import add_version, current_deployment, history


@pytest.fixture(scope="module")
def client(tmp_path_factory: Any) -> Iterator[Any]:
    root = write_root(tmp_path_factory.mktemp("root"))
    shutil.copytree(root.path / MODEL, root.path / "models/other")
    (root.path / "models/other/note.txt").write_text("another", encoding="utf-8")
    config = json.loads((root.path / "models/other/config.json").read_text())
    (root.path / "models/other/config.json").write_text(json.dumps({**config, "transformers_version": "1"}))
    app = make_app(root, model=None, start_jobs=False)
    for path in (MODEL, "models/other"):
        add_version(app.state.server.ledger, path, name="music")
    with client_of(app, token=False, cookie=True) as made:
        yield made


def ledger(client: Any) -> Any:
    return client.app.state.server.ledger


def serves(client: Any) -> int | None:
    now = current_deployment(ledger(client), "music")
    return None if now is None else now.version


def test_deploy_roll_back_and_archive(client: Any) -> None:
    page = client.get("/models/music/1").text
    assert "registry promote music:1" in page and "registry archive music:1" in page
    assert client.post("/models/music/1/promote", data={"reason": ""}).status_code == 400
    assert serves(client) is None
    done = client.post("/models/music/1/promote", data={"reason": "<script>first</script>"})
    assert (done.status_code, done.headers["location"]) == (303, "/models/music")
    page = client.get("/").text
    assert "no condition was set; nothing was checked" in page and "gate passed" not in page
    # A margin was asked for, and these two have no rows to be compared on.
    refused = client.post("/models/music/2/promote", data={"reason": "smaller", "margin": "3pt"})
    assert refused.status_code == 400 and "The gate" in refused.text and serves(client) == 1
    asked = {"reason": "smaller", "margin": "3pt", "override": "tried by hand"}
    assert client.post("/models/music/2/promote", data=asked).status_code == 303 and serves(client) == 2
    page = client.get("/models/music").text
    assert "Roll production back" in page and "the gate was overridden" in page
    assert "<script>first" not in page and "&lt;script&gt;first" in page
    page = client.get("/").text
    assert "the gate was overridden: tried by hand" in page and "registry rollback music" in page
    assert "agreement: not measured" in page
    assert client.post("/models/music/2/archive").status_code == 400
    back = client.post("/models/music/rollback", data={"reason": "complaints", "alias": "production"})
    assert back.status_code == 303 and serves(client) == 1
    assert [one.kind for one in history(ledger(client), "music")] == ["rollback", "deploy", "deploy"]
    assert "verified: " in client.get("/").text  # a rollback is judged by no gate
    assert "(browser)" in history(ledger(client), "music")[0].actor
    assert client.post("/models/music/2/archive").status_code == 303
    assert "registry archive --restore music:2" in client.get("/models/music/2").text
    assert client.post("/models/music/2/restore").status_code == 303
    assert client.post("/models/none/rollback", data={"reason": "x"}).status_code == 404
    for number in ("9" * 20, "-1"):  # the first one is more than SQLite can hold
        assert client.get(f"/models/music/{number}").status_code == 404
        assert client.post(f"/models/music/{number}/promote", data={"reason": "x"}).status_code in (400, 404)
        assert client.post(f"/models/music/{number}/archive").status_code in (400, 404)
    for number in ("9" * 20, "9" * 400, "²"):
        form = {"a": f"music:{number}", "b": "music:1"}
        assert client.post("/compare", data=form).status_code == 400


def test_a_damaged_version_is_not_rolled_back_to(client: Any) -> None:
    root: Path = client.app.state.server.root.path
    if serves(client) != 2:
        assert client.post("/models/music/2/promote", data={"reason": "again"}).status_code == 303
    now = serves(client)
    [weights] = (root / ".mlx-distill/versions/music/1").rglob("*.safetensors")
    whole = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused = client.post("/models/music/rollback", data={"reason": "x"})
    assert refused.status_code == 400 and "safetensors" in refused.text and serves(client) == now


def test_data_sets_are_added_shown_and_exported_or_refused_with_the_rows(client: Any) -> None:
    root: Path = client.app.state.server.root.path
    assert "No data set yet" in client.get("/data").text
    turns = [{"role": "user", "content": "<b>hi</b>"}, {"role": "assistant", "content": "yes"}]
    rows = [{"messages": turns}, {"messages": [*turns, *turns]}]
    (root / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for path in ("", "../etc/passwd", "nothing.jsonl"):
        assert client.post("/data", data={"path": path}).status_code == 400
    assert client.post("/data", data={"path": "chats.jsonl", "task": "evil.yaml"}).status_code == 400
    (root / "code.yaml").write_text("name: x\nmetrics: [os:system]\n", encoding="utf-8")
    refused = client.post("/data", data={"path": "chats.jsonl", "task": "code.yaml"})
    assert refused.status_code == 400 and "not run over HTTP" in refused.text
    (root / "task.yaml").write_text(yaml.safe_dump(TASK), encoding="utf-8")
    (root / "texts.jsonl").write_text('{"text": "so dark", "colour": "dark"}\n', encoding="utf-8")
    assert client.post("/data", data={"path": "texts.jsonl"}).status_code == 303
    assert "data add texts.jsonl --name texts --task TASK" in client.get("/data/texts").text
    assert client.post("/data", data={"path": "texts.jsonl", "task": "task.yaml"}).status_code == 303
    assert "No invalid rows" in client.get("/data/texts").text
    added = client.post("/data", data={"path": "chats.jsonl"})
    assert (added.status_code, added.headers["location"]) == (303, "/data/chats")
    assert "chats.jsonl" in client.get("/data").text
    page = client.get("/data/chats").text
    assert "data export chats chats-openai.jsonl --to openai" in page
    exported = client.post("/data/chats/export", data={"layout": "openai"})
    assert [json.loads(line)["messages"] for line in exported.text.splitlines()] == [
        row["messages"] for row in rows
    ]
    refused = client.post("/data/chats/export", data={"layout": "alpaca"})
    assert refused.status_code == 400 and "2" in refused.text
    assert client.post("/data/chats/export", data={"layout": "x"}).status_code == 400
    assert client.get("/data/none").status_code == 404
