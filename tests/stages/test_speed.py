"""What the evaluate stage measures besides the answers: loading, the first token, throughput, memory."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.small_chain import finished, make_context, manifests
from mlx.utils import tree_flatten

import mlx_distill.infer.engine as engine_module
from mlx_distill.infer.requests import Finished, Generation
from mlx_distill.models.load import load_model
from mlx_distill.stages.context import held_out_rows
from mlx_distill.stages.evaluate import evaluate
from mlx_distill.stages.speed import Saturation, first_token_seconds
from mlx_distill.storage import scratch


def test_requests_a_second_are_rows_over_the_wall_time_of_chunks_large_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([10.0, 11.0, 14.0, 20.0, 26.0, 30.0, 31.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    saturation = Saturation(4)
    assert saturation.requests_per_second is None
    for answers in ((2, 16), (12,), (3,)):  # the last chunk does not fill the engine
        saturation.begin()
        for count in answers:
            saturation.answered(count)
        saturation.end()
    assert saturation.requests_per_second == (16 + 12) / (4.0 + 6.0)


def test_a_chunk_of_which_no_row_was_answered_counts_nothing() -> None:
    saturation = Saturation(1)
    saturation.begin()
    saturation.answered(1)
    saturation.end()
    before = saturation.requests_per_second
    saturation.begin()
    saturation.end()
    assert before and saturation.requests_per_second == before


class _TimedEngine:
    """Answers one request at a time, the first after 9 seconds, the others after 1, 2, 3, ..."""

    def __init__(self, *args: Any, batch_size: int) -> None:
        assert batch_size == 1
        self.asked: list[float] = []
        self.busy = False

    def submit(self, request: Any) -> int:
        assert not self.busy, "one at a time"
        self.busy = True
        self.asked.append(float(len(self.asked)) or 9.0)
        return 0

    def step(self) -> list[Any]:
        self.busy = False
        return [Finished(0, Generation("", (1,), 3, "length", 0.0, first_token_seconds=self.asked[-1]))]


@pytest.mark.slow
@pytest.mark.parametrize(("count", "median"), [(1, None), (2, 1.0), (4, 2.0), (30, 3.0)])
def test_the_first_token_is_the_median_behind_a_request_that_is_not_counted(
    monkeypatch: pytest.MonkeyPatch, count: int, median: float | None
) -> None:
    from mlx_distill.models.load import load_tokenizer

    context = make_context()
    tokenizer = load_tokenizer(context.run / "student_base")
    rows = (held_out_rows(context) * 2)[:count]
    monkeypatch.setattr(engine_module, "Engine", _TimedEngine)
    assert first_token_seconds(context, SimpleNamespace(), tokenizer, rows) == median
    short = SimpleNamespace(args=SimpleNamespace(max_position_embeddings=2))  # reads none of the prompts
    assert first_token_seconds(context, short, tokenizer, rows) is None


@pytest.mark.slow
def test_an_evaluation_records_its_speed_and_memory() -> None:
    found = manifests(finished() / "out")
    for name, folder in (("evaluations/teacher", "teacher"), ("evaluations/student", "student")):
        facts = found[name].recorded
        assert all(facts[key] > 0 for key in ("load_s", "first_token_s", "requests_per_second"))
        model, _ = load_model(finished() / "out" / folder)
        weights = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
        assert weights <= facts["model_memory_bytes"] < facts["peak_memory_bytes"]
        assert facts["model_memory_bytes"] < 1.2 * weights + 1e6


@pytest.mark.slow
def test_a_continued_evaluation_records_only_what_was_measured_now(folder: Path) -> None:
    """Chunks of 16 rows, of which an earlier process finished some: their times are not known."""
    context = make_context("evaluate.max_rows=17", "evaluate.constrain=false")
    size = 4 * context.recipe.evaluate.batch_size
    rows = len(held_out_rows(context))
    assert rows == 17 and size == 16
    first = evaluate(context, folder, "student", "student")
    chunks = sorted(scratch(folder).glob("predictions-*.jsonl"))
    again = evaluate(context, folder, "student", "student")
    assert (again["requests_per_second"], again["peak_memory_bytes"]) == (None, None)
    assert again["load_s"] > 0 and again["first_token_s"] > 0 and again["rows"] == first["rows"] == rows
    chunks[0].unlink()
    began = time.perf_counter()
    last = evaluate(context, folder, "student", "student")
    assert last["requests_per_second"] >= size / (time.perf_counter() - began)
    assert last["peak_memory_bytes"] > last["model_memory_bytes"]
