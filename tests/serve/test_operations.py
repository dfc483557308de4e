"""The registry, data sets and costs as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.served import MODEL, client_of, make_app, write_root

from mlx_distill.ledger.database import Ledger
from mlx_distill.ledger.root import Root
from mlx_distill.registry import add_version, list_models

ROWS = [
    {"messages": [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": f"a {i}"}]}
    for i in range(4)
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Root:
    folder = tmp_path_factory.mktemp("root")
    root = write_root(folder)
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    return root


@pytest.fixture(scope="module")
def client(root: Root) -> Iterator[Any]:
    with client_of(make_app(root, start_jobs=False)) as client:
        yield client


def test_the_registry_is_listed(client: Any, root: Root) -> None:
    assert client.get("/v1/mlx/models").json()["data"] == []
    ledger = Ledger(root)
    add_version(ledger, MODEL, name="songs")
    (model,) = list_models(ledger)
    answer = client.get("/v1/mlx/models/songs").json()
    assert answer == client.get("/v1/mlx/models").json()["data"][0]
    assert [one["sha"] for one in answer["versions"]] == [one.sha for one in model.versions]
    assert client.get("/v1/mlx/models/other").json()["error"]["code"] == "model_not_found"


def test_data_sets_are_added_listed_and_exported(client: Any, root: Root) -> None:
    added = client.post("/v1/mlx/data", json={"path": "chats.jsonl", "name": "chats"}).json()
    assert added["facts"]["rows"] == 4 and client.get("/v1/mlx/data").json()["data"] == [added]
    assert client.get("/v1/mlx/data/chats").json()["changed"] is False
    export = client.post("/v1/mlx/data/chats/export", json={"layout": "openai"})
    rows = [json.loads(line)["messages"] for line in export.text.splitlines()]
    assert rows == [row["messages"] for row in ROWS]
    assert not list(root.state.glob("export-*"))


@pytest.mark.parametrize("path", ["../outside.jsonl", "/etc/passwd", "none.jsonl"])
def test_paths_that_leave_the_root_are_refused(client: Any, path: str) -> None:
    assert client.post("/v1/mlx/data", json={"path": path}).status_code == 400


def test_names_are_no_paths_and_layouts_are_known(client: Any, tmp_path: Path) -> None:
    client.post("/v1/mlx/data", json={"path": "chats.jsonl", "name": "chats"})
    assert client.post("/v1/mlx/data/chats.jsonl/export", json={"layout": "openai"}).status_code == 404
    assert client.post("/v1/mlx/data/chats/export", json={"layout": "../x"}).status_code == 400
    outside = client.post("/v1/mlx/data", json={"path": "chats.jsonl", "task": str(tmp_path)})
    assert outside.status_code == 400


def test_costs_of_an_empty_root(client: Any) -> None:
    answer = client.get("/v1/mlx/costs").json()
    assert answer["total"]["calls"] == 0 and answer["kinds"] == {}
