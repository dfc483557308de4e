"""Rows that are answered over HTTP: equal to ``md.analyze``, many clients at once, errors of single rows."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers.served import MODEL, client_of, make_app, write_root

import mlx_distill as md

ROWS = [
    {"id": f"r{i}", "title": f"Song {i}", "lyrics": "la " * (3 + 5 * i) + str(i), "genre": "folk"}
    for i in range(10)
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: Any) -> Any:
    return write_root(tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="module")
def client(root: Any) -> Iterator[Any]:
    with client_of(make_app(root, batch_size=4, max_batch=40)) as client:
        yield client


@pytest.fixture(scope="module")
def expected(root: Any) -> list[Any]:
    return md.analyze(root.path / MODEL, None, ROWS, batch_size=4, max_tokens=40)


def ask(client: Any, path: str, **body: Any) -> dict[str, Any]:
    answer = client.post(path, json={"max_tokens": 40, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def equal(got: dict[str, Any], expected: Any) -> None:
    assert (got["id"], got["text"], got["answer"]) == (expected.id, expected.text, expected.answer)
    assert (got["label"], got["score"]) == (expected.label, expected.score)
    assert (got["error"] or {}).get("message") == expected.error
    assert got["label_probs"] == pytest.approx(expected.label_probs, abs=1e-5)


def test_one_row_is_answered_as_by_analyze(client: Any, expected: list[Any]) -> None:
    got = ask(client, "/v1/analyze", item=ROWS[0])
    equal(got, expected[0])
    assert got["constrained"] is True and got["latency_ms"] > 0
    assert got["model"]["name"] == MODEL and got["model"]["alias"] is None


@pytest.mark.parametrize("options", [{"constrain": False}, {"label_probs": False}])
def test_options_are_those_of_analyze(client: Any, root: Any, options: dict[str, Any]) -> None:
    rows = ROWS[:3]
    expected = md.analyze(root.path / MODEL, None, rows, batch_size=4, max_tokens=12, **options)
    got = ask(client, "/v1/analyze/batch", items=rows, **{"max_tokens": 12, **options})["data"]
    for one, other in zip(got, expected, strict=True):
        if other.label_probs is None:
            assert one.pop("label_probs") is None
            one["label_probs"] = {}
            other = md.Prediction(**{**vars(other), "label_probs": {}})
        equal(one, other)


def test_a_batch_keeps_the_order_and_has_errors_in_their_places(client: Any, expected: list[Any]) -> None:
    items: list[Any] = [*ROWS[:4], {"id": "bad", "lyrics": "no title"}, {**ROWS[5], "lyrics": " "}, ROWS[6]]
    got = ask(client, "/v1/analyze/batch", items=items)
    assert [one["id"] for one in got["data"]] == ["r0", "r1", "r2", "r3", "bad", "r5", "r6"]
    assert got["data"][4]["error"]["type"] == "bad_row" and got["data"][4]["answer"] is None
    for place in (0, 1, 2, 3, 6):
        equal(got["data"][place], expected[place])
    assert got["errors"] == sum(one["error"] is not None for one in got["data"])


def test_clients_share_batches_and_each_gets_its_own_answer(client: Any, expected: list[Any]) -> None:
    with ThreadPoolExecutor(8) as threads:
        got = list(threads.map(lambda row: ask(client, "/v1/analyze", item=row), ROWS * 2))
    for one, other in zip(got, expected * 2, strict=True):
        equal(one, other)
    with client.app.state.server.pool.get() as served:
        assert served.worker.engine.stats.rows > 1


def test_labels_are_those_of_classify(client: Any, root: Any) -> None:
    expected = md.classify(root.path / MODEL, None, ROWS, batch_size=4)
    with ThreadPoolExecutor(3) as threads:
        bodies = [{"items": ROWS}] * 3
        answers = list(threads.map(lambda body: client.post("/v1/classify", json=body).json(), bodies))
    for got in answers:
        assert [one["label"] for one in got["data"]] == [one.label for one in expected]
        for one, other in zip(got["data"], expected, strict=True):
            assert one["label_probs"] == pytest.approx(other.probabilities, abs=1e-5)


def test_a_wrong_request_is_400_and_names_what_is_wrong(client: Any, root: Any) -> None:
    cases = [
        ("/v1/analyze", {}, "item"),
        ("/v1/analyze", {"item": ROWS[0], "temperature": 1}, "temperature"),
        ("/v1/analyze", {"item": ROWS[0], "max_tokens": 0}, "max_tokens"),
        ("/v1/analyze", {"item": {"title": "x"}}, "item"),
        ("/v1/analyze/batch", {"items": []}, "items"),
        ("/v1/analyze/batch", {"items": ["x"] * 41}, "items"),
        ("/v1/classify", {"items": [ROWS[0]], "normalize": "x"}, "normalize"),
        ("/v1/analyze", {"item": ROWS[0], "trust_remote_code": True}, "trust_remote_code"),
    ]
    for path, body, param in cases:
        answer = client.post(path, json=body)
        assert answer.status_code == 400, (body, answer.text)
        assert answer.json()["error"]["param"] == param, answer.text
    for task in ("../music", "absent", str(root.path / "task.yaml")):
        assert client.post("/v1/analyze", json={"item": ROWS[0], "task": task}).status_code == 400
    for text in ("{", "[" * 5000, '{"item": ' + "1" * 5000 + "}"):
        assert client.post("/v1/analyze", content=text).status_code == 400


def test_a_model_that_is_none_is_404(client: Any) -> None:
    for name in ("absent", "../x", "/etc", "Qwen/Qwen3-8B", "asset:../../x", "models/small\x00"):
        answer = client.post("/v1/analyze", json={"item": ROWS[0], "model": name})
        assert answer.status_code == 404, answer.text
        assert answer.json()["error"]["code"] == "model_not_found"


def test_strange_texts_come_back_unharmed(client: Any) -> None:
    row = '{"item": {"id": "\\ud800", "title": "\\u0000<script>", "lyrics": "x"}, "max_tokens": 2}'
    answer = client.post("/v1/analyze", content=row, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400)
    if answer.status_code == 200:
        assert answer.json()["id"] == "\ud800"


def test_a_full_queue_says_when_to_come_again(tmp_path: Path) -> None:
    app = make_app(write_root(tmp_path), max_queue=1)
    with client_of(app) as client, app.state.server.pool.get():
        answer = client.post("/v1/analyze", json={"item": ROWS[0]})
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "queue_full"
        assert int(answer.headers["retry-after"]) >= 1
        assert client.get("/health").status_code == 200


def test_a_model_without_a_task_needs_one(tmp_path: Path) -> None:
    app = make_app(write_root(tmp_path, task=None))
    with client_of(app) as client:
        answer = client.post("/v1/analyze", json={"item": ROWS[0]})
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "task_missing"
        named = client.post("/v1/analyze", json={"item": ROWS[0], "task": "music", "max_tokens": 2})
        assert named.status_code == 200
