"""Requests that are made from the server's own OpenAPI schema: whatever comes in, no answer is a 500."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

schemathesis = pytest.importorskip("schemathesis")

from helpers.served import HEADERS, client_of, make_app, write_root
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode

from mlx_distill import jobs
from mlx_distill.ledger.database import Ledger
from mlx_distill.ledger.root import Root

EXAMPLES = 6  # of an operation; two hundred each, 4,807 requests in all, found no 500 either
CHAT = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Root:
    return write_root(tmp_path_factory.mktemp("root"), max_position_embeddings=200)


@pytest.fixture(scope="module")
def client(root: Root) -> Iterator[Any]:
    with client_of(make_app(root, start_jobs=False)) as client:
        yield client


def known_ids(client: Any, root: Root) -> dict[str, str]:
    """Identifiers that exist, so that requests reach what is behind the search for them."""
    upload = client.post("/v1/files", files={"file": ("a.jsonl", CHAT)}, data={"purpose": "fine-tune"})
    body = {"model": "asset:models/tiny-qwen3", "training_file": upload.json()["id"]}
    made = client.post("/v1/fine_tuning/jobs", json=body)
    assert made.status_code == 200, made.text
    jobs.pause(Ledger(root), made.json()["id"])
    return {"job_id": made.json()["id"], "file_id": upload.json()["id"]}


@pytest.mark.slow
def test_no_request_of_the_schema_ends_in_a_500(client: Any, root: Root) -> None:
    schema = schemathesis.openapi.from_dict(client.get("/v1/openapi.json").json())
    known, statuses = known_ids(client, root), Counter[int]()
    for number, result in enumerate(schema.get_all_operations()):
        operation = result.ok()
        if operation.path == "/logout":
            continue
        cases = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
        cases |= operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)

        @seed(number)
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )
        @given(case=cases)
        def check(case: Any) -> None:
            if sum(statuses.values()) % 2:
                case.path_parameters |= {k: v for k, v in known.items() if k in case.path_parameters}
            sent = case.as_transport_kwargs(base_url="http://127.0.0.1:8000")
            sent["headers"] = {**dict(sent.get("headers") or {}), **HEADERS}
            sent.pop("cookies", None)
            answer = client.request(**sent)
            statuses[answer.status_code] += 1
            allowed = answer.status_code < 500 or answer.status_code == 503
            assert allowed, (sent, answer.text)

        check()
    assert sum(statuses.values()) > 60
    assert statuses[200] > 10 and statuses[400] > 10 and statuses[404] > 10
