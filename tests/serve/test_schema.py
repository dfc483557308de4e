"""Requests that are made from the server's own OpenAPI schema: whatever comes in, no answer is a 500, and
every answer is one that the schema describes.

``EXAMPLES=60 pytest tests/serve/test_schema.py`` makes sixty requests of each operation.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

schemathesis = pytest.importorskip("schemathesis")

from helpers.registry_runs import make_run
from helpers.served import HEADERS, MODEL, client_of, make_app, write_root
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from mlx_distill.data_sets import add_data_set
from mlx_distill.ledger.database import Ledger
from mlx_distill.ledger.root import Root
from mlx_distill.registry import add_version, promote
from mlx_distill.registry.comparisons import keep_comparison

EXAMPLES = int(os.environ.get("EXAMPLES", "6"))  # of an operation
CHAT = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Root:
    """A model that serves, two versions of which one is deployed, their comparison, a data set."""
    root = write_root(tmp_path_factory.mktemp("root"), max_position_embeddings=200)
    ledger = Ledger(root)
    for other, wrong in enumerate(({0, 1, 2}, {2})):
        make_run(root.path / f"run{other}", seed=other, wrong=wrong)
        add_version(ledger, f"run{other}", name="colours")
    keep_comparison(ledger, "colours:1", "colours:2", margin="10pt")
    promote(ledger, "colours", 1, "staging", actor="test", reason="first", override="no gate here")
    (root.path / "rows.jsonl").write_bytes(CHAT)
    add_data_set(ledger, "rows.jsonl", name="chats")
    return root


@pytest.fixture(scope="module")
def client(root: Root) -> Iterator[Any]:
    with client_of(make_app(root, start_jobs=False, share_accelerator=True)) as client:
        yield client


def known_values(client: Any) -> dict[str, list[Any]]:
    """Names and identifiers that exist, by the parameter or the key that takes them, so that requests reach
    what is behind the search for them.
    """
    upload = client.post("/v1/files", files={"file": ("a.jsonl", CHAT)}, data={"purpose": "fine-tune"})
    body = {"model": "asset:models/tiny-qwen3", "training_file": upload.json()["id"]}
    made = client.post("/v1/fine_tuning/jobs", json=body)
    assert made.status_code == 200, made.text
    compared = client.get("/v1/mlx/comparisons").json()["data"][0]["id"]
    sides = ["colours:1", "colours:2", "run0", MODEL]
    return {
        "job_id": [made.json()["id"]],
        "file_id": [upload.json()["id"]],
        "training_file": [upload.json()["id"]],
        "id": [compared],
        "name": ["colours", "chats"],
        "number": [1, 2],
        "alias": ["staging", "production"],
        "model": ["colours:1", MODEL, "asset:models/tiny-qwen3"],
        "path": ["rows.jsonl", "run0"],
        "a": sides,
        "b": sides,
        "margin": ["3pt", "5%"],
        "rows": ["", "rows.jsonl"],
        "layout": ["openai", "alpaca", "chatml"],
    }


def with_known(values: Any, known: dict[str, list[Any]], number: int) -> Any:
    """A body or parameters in which known values stand for every second of those that were made up."""
    if not isinstance(values, dict):
        return values
    changed = {
        name: known[name][number // 2 % len(known[name])] for name in values if name in known and number % 2
    }
    return values | changed


@pytest.mark.slow
def test_no_request_of_the_schema_ends_in_a_500_or_in_what_it_does_not_describe(
    client: Any, root: Root
) -> None:
    schema = schemathesis.openapi.from_dict(client.get("/v1/openapi.json").json())
    known, statuses = known_values(client), Counter[int]()
    reached: dict[str, set[int]] = {}
    operations = [result.ok() for result in schema.get_all_operations()]
    operations.sort(key=lambda one: one.method == "delete")  # what they find is needed by the others
    for number, operation in enumerate(operations):
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
            count = sum(statuses.values())
            case.path_parameters = with_known(case.path_parameters, known, count)
            case.body = with_known(case.body, known, count)
            sent = case.as_transport_kwargs(base_url="http://127.0.0.1:8000")
            sent["headers"] = {**dict(sent.get("headers") or {}), **HEADERS}
            sent.pop("cookies", None)
            answer = client.request(**sent)
            statuses[answer.status_code] += 1
            reached.setdefault(case.operation.label, set()).add(answer.status_code)
            assert answer.status_code < 500 or answer.status_code == 503, (sent, answer.text)
            asked = answer.request  # its body may be a stream that is used up, which no check needs
            answer.request = type(asked)(asked.method, asked.url)
            case.validate_response(
                answer,
                checks=[status_code_conformance, content_type_conformance, response_schema_conformance],
            )

        check()
    if EXAMPLES > 6:
        print(sum(statuses.values()), dict(statuses), json.dumps({k: sorted(v) for k, v in reached.items()}))
    assert sum(statuses.values()) > 60
    assert statuses[200] > 10 and statuses[400] > 10 and statuses[404] > 10
