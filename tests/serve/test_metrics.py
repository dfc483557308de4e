"""What metrics, the log of requests and the costs say of requests that were answered."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers.served import HEADERS, MODEL, client_of, make_app, write_root

from mlx_distill.errors import FileError
from mlx_distill.ledger.database import Ledger
from mlx_distill.ledger.root import Root
from mlx_distill.running_costs import cost_report
from mlx_distill.serve.metrics import Metrics, Names
from mlx_distill.serve.request_log import read_requests
from mlx_distill.serve.served_calls import ServedCallCounts
from mlx_distill.serve.usage import Usage

SECRET = "planted-8c1f"
ROW = {"title": "a", "artist": "b", "lyrics": f"la la {SECRET}", "id": "song-1"}
LABELS = {
    *("method", "route", "status", "type", "model", "outcome", "le", "state", "kind", "version"),
    *("implementation", "major", "minor", "patchlevel"),
}

pytestmark = pytest.mark.slow


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """The values of a page of metrics, by name and labels."""
    from prometheus_client.parser import text_string_to_metric_families

    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@dataclass(frozen=True)
class Served:
    """What was written while some requests were answered."""

    root: Root
    page: str
    statuses: dict[str, int]

    def value(self, name: str, **labels: str) -> float | None:
        """A value of the page of metrics."""
        return samples(self.page).get((name, frozenset(labels.items())))

    def lines(self, route: str) -> list[dict[str, Any]]:
        """The lines of the log, of a route."""
        return [line for line in read_requests(self.root.request_log) if line["route"] == route]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    root = write_root(tmp_path_factory.mktemp("root"))
    app = make_app(root, start_jobs=False)
    chat = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 4}
    bad = {"title": SECRET, "id": "song-2"}  # lacks fields
    with client_of(app, cookie=True) as client:
        asked = {
            "one": client.post("/v1/analyze", json={"item": ROW, "max_tokens": 3}),
            "batch": client.post("/v1/analyze/batch", json={"items": [ROW, bad, ROW], "max_tokens": 3}),
            "classify": client.post("/v1/classify", json={"items": [ROW]}),
            "chat": client.post("/v1/chat/completions", json=chat),
            "stream": client.post("/v1/chat/completions", json={**chat, "stream": True}),
            "bad": client.post("/v1/analyze", json={"item": bad}),
            "no model": client.post("/v1/analyze", json={"item": ROW, "model": SECRET}),
            "no path": client.get(f"/v1/{SECRET}?q={SECRET}", headers={"user-agent": SECRET}),
            "no method": client.request(f"X{SECRET.upper()}", f"/{SECRET}"),
            "refused": client.get("/v1/models", headers={"authorization": f"Bearer {SECRET}"}),
        }
        page = client.get("/metrics", headers={"accept": "text/plain"})
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/plain")
    return Served(root, page.text, {name: answer.status_code for name, answer in asked.items()})


def test_requests_are_counted_by_route_and_status(served: Served) -> None:
    def count(method: str, route: str, status: str) -> float | None:
        return served.value("mlx_distill_http_requests_total", method=method, route=route, status=status)

    assert served.statuses["one"] == served.statuses["stream"] == 200
    assert count("POST", "/v1/analyze", "200") == 1
    assert count("POST", "/v1/analyze", "400") == count("POST", "/v1/analyze", "404") == 1
    assert count("POST", "/v1/chat/completions", "200") == 2
    assert count("GET", "other", "404") == 1  # never the path itself
    assert count("GET", "other", "401") == 1
    assert any(count("other", "other", status) == 1 for status in ("404", "405"))


def test_answers_tokens_and_errors_are_those_of_the_responses(served: Served) -> None:
    assert served.value("gen_ai_server_answers_total", model=MODEL) == 6  # 1 + 2 + 1 + 2, not the bad rows
    # Answers of three tokens are cut; a label needs none.
    assert served.value("gen_ai_server_invalid_answers_total", model=MODEL) == 3
    assert served.value("gen_ai_server_tokens_total", model=MODEL, type="output") == 3 * 3 + 2 * 4
    read = sum(line.get("prompt_tokens", 0) for line in read_requests(served.root.request_log))
    assert served.value("gen_ai_server_tokens_total", model=MODEL, type="input") == read > 0
    assert served.value("mlx_distill_errors_total", route="/v1/analyze/batch", type="bad_row") == 1
    assert served.value("mlx_distill_errors_total", route="/v1/analyze", type="model_not_found") == 1
    assert served.value("gen_ai_server_time_to_first_token_seconds_count", model=MODEL) == 5
    assert served.value("gen_ai_server_time_per_output_token_seconds_count", model=MODEL) == 5
    name = "gen_ai_server_request_duration_seconds_count"
    assert served.value(name, route="/v1/analyze", model=MODEL, outcome="ok") == 1
    assert served.value(name, route="/v1/analyze", model=MODEL, outcome="error") == 1


def test_queue_models_memory_and_jobs_are_told(served: Served) -> None:
    assert served.value("mlx_distill_queue_depth") == 0
    assert served.value("mlx_distill_queue_limit") == 128
    assert served.value("mlx_distill_model_loaded", model=MODEL) == 1
    weights = (served.root.path / MODEL / "model.safetensors").stat().st_size
    assert served.value("mlx_distill_model_memory_bytes", model=MODEL) == weights
    assert served.value("mlx_distill_jobs", state="running") == 0
    assert (served.value("mlx_distill_engine_busy_seconds_total", model=MODEL) or 0) > 0


def test_no_text_and_no_name_of_a_client_is_in_metrics_or_log(served: Served) -> None:
    assert SECRET not in served.page.lower()
    assert SECRET not in served.root.request_log.read_text(encoding="utf-8").lower()
    assert {label for _, labels in samples(served.page) for label, _ in labels} <= LABELS


def test_the_log_has_a_line_for_each_request(served: Served) -> None:
    batch = served.lines("/v1/analyze/batch")[0]
    assert batch["items"] == ["song-1", "song-2", "song-1"] and batch["model"] == MODEL
    assert [error["id"] for error in batch["errors"]] == ["song-1", "song-2", "song-1"]
    assert batch["errors"][1]["type"] == "bad_row" and batch["calls"] == batch["invalid"] == 2
    assert batch["status"] == 200 and batch["error"] is None and batch["latency_ms"] > 0
    chats = served.lines("/v1/chat/completions")
    assert [chat["tokens"] for chat in chats] == [4, 4]
    codes = [line["error"] for line in served.lines("/v1/analyze")]
    assert codes == [None, "bad_row", "model_not_found"]
    every = list(read_requests(served.root.request_log))
    assert len({line["request_id"] for line in every}) == len(every) == len(served.statuses) + 2
    assert served.root.request_log.stat().st_mode & 0o77 == 0


def test_served_calls_are_costs_when_the_server_has_ended(served: Served) -> None:
    ledger = Ledger(served.root)
    calls = cost_report(ledger).kinds["served"]
    assert calls.calls == 6 and calls.tokens == 3 * 3 + 2 * 4 and calls.prompt_tokens > 0
    busy = served.value("mlx_distill_engine_busy_seconds_total", model=MODEL)
    assert calls.seconds == pytest.approx(busy)
    with ledger.read() as db:
        facts = [json.loads(row[0]) for row in db.execute("SELECT facts FROM costs")]
    assert [one["model"] for one in facts] == [MODEL] and facts[0]["errors"] == 3


def test_metrics_need_the_token_or_the_cookie(tmp_path: Path) -> None:
    app = make_app(tmp_path, model=None, start_jobs=False)
    with client_of(app, token=False) as client:
        assert client.get("/metrics").status_code == 401
        assert client.get("/metrics", headers={"authorization": "Bearer no"}).status_code == 401
        answer = client.get(
            "/metrics", headers={**HEADERS, "accept": "application/openmetrics-text; version=1.0.0"}
        )
        assert answer.status_code == 200 and answer.text.endswith("# EOF\n")
    with client_of(app, token=False, cookie=True) as client:
        assert client.get("/metrics").status_code == 200


def test_each_application_has_its_own_numbers(tmp_path: Path) -> None:
    first, second = (make_app(tmp_path, model=None, start_jobs=False) for _ in range(2))
    with client_of(first) as client:
        client.get("/health")
    with client_of(second) as client:
        assert "/health" not in client.get("/metrics").text


def test_a_label_never_has_more_values_than_its_limit() -> None:
    metrics = Metrics(models=3)
    for number in range(20):
        metrics.request("GET", "/x", 200, f"kind {number}", 0.1, Usage(model=f"m:{number}", calls=1))
    found = {
        sample.labels["model"]
        for family in metrics.registry.collect()
        for sample in family.samples
        if "model" in sample.labels
    }
    assert found == {"m:0", "m:1", "m:2", "other"}
    names = Names(2)
    assert [names(name) for name in ("a", "b", "c", "a")] == ["a", "b", "other", "a"]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(Root.at(tmp_path))


def test_calls_that_the_ledger_cannot_take_are_kept_for_the_next_time(ledger: Ledger) -> None:
    full = [True]

    def opened() -> Ledger:
        if full[0]:
            raise FileError("ledger.db: no space left on device")
        return ledger

    counts = ServedCallCounts(opened, every=0.0)
    counts.worked("music:3")(1.5)
    counts.add(Usage(model="music:3", calls=2, tokens=7, invalid=1))
    counts.add(Usage(model=None, calls=1))
    with pytest.raises(FileError):
        counts.tick()
    counts.worked("music:3")(0.5)
    full[0] = False
    counts.tick()
    counts.tick()  # nothing new
    with ledger.read() as db:
        rows = db.execute("SELECT quantity, facts FROM costs").fetchall()
    assert [row["quantity"] for row in rows] == [2.0]
    facts = json.loads(rows[0]["facts"])
    assert (facts["model"], facts["calls"], facts["tokens"], facts["errors"]) == ("music:3", 2, 7, 1)


def test_the_seconds_of_an_external_analyzer_are_not_said_to_be_measured(ledger: Ledger) -> None:
    counts = ServedCallCounts(lambda: ledger, every=0.0)
    counts.add(Usage(model="music@production", calls=3))
    counts.tick()
    with ledger.read() as db:
        row = db.execute("SELECT quantity, basis FROM costs").fetchone()
    assert (row["quantity"], row["basis"]) == (0.0, "estimated")
