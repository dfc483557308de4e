"""What the evaluate stage measures of a model besides its answers: loading, the first token, throughput."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from mlx_distill.runtime import active_memory
from mlx_distill.stages.context import Context, Facts, check_stop, load_model

_FIRST_TOKENS = 5  # single requests that are measured
# What loading imports the first time in a process: no part of a model's time.
_IMPORTED = ("mlx_distill.models.load", "mlx_lm.tokenizer_utils", "mlx_lm.tuner")


def load_and_measure(context: Context, name: str) -> tuple[Any, Any, Facts]:
    """Load a model of the run as :func:`~mlx_distill.stages.context.load_model` does.

    Returns:
        The model, its tokenizer, and as facts ``load_s``, the seconds until its weights are in memory, and
        ``model_memory_bytes``, what they take there.
    """
    import mlx.core as mx

    for module in _IMPORTED:
        import_module(module)
    before, began = active_memory(), time.perf_counter()
    model, tokenizer = load_model(context, name)
    mx.eval(model.parameters())
    seconds = time.perf_counter() - began
    memory = max(0, active_memory() - before)
    return model, tokenizer, {"load_s": seconds, "model_memory_bytes": memory}


def first_token_seconds(
    context: Context, model: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]]
) -> float | None:
    """The median time from submitting one request to its first token, nothing else being computed.

    Some rows are asked one after the other, behind one that is not counted; what their prompts share is in
    the engine's prefix cache, as it is where many are asked. None for fewer than two rows that the model can
    read.
    """
    from mlx_distill.data.chat import stop_ids
    from mlx_distill.data.rows import to_item
    from mlx_distill.infer.engine import Engine
    from mlx_distill.infer.predict import context_length, item_prompt
    from mlx_distill.infer.requests import Finished, Request

    check_stop(context)
    few = rows[:: max(1, len(rows) // (_FIRST_TOKENS + 1))][: _FIRST_TOKENS + 1]
    prompts = [item_prompt(tokenizer, to_item(row, context.task, n)) for n, row in enumerate(few, 1)]
    limit = context_length(model)
    engine = Engine(model, tokenizer, batch_size=1)
    seconds = []
    for prompt in prompts:
        if limit is not None and len(prompt) > limit:
            continue
        # Two tokens: the first one is read while the second one is computed, as in every longer answer.
        engine.submit(Request(prompt, max_tokens=2, stop=frozenset(stop_ids(tokenizer))))
        while engine.busy:
            for event in engine.step():
                if isinstance(event, Finished):
                    seconds.append(event.generation.first_token_seconds)
    return statistics.median(seconds[1:]) if len(seconds) > 1 else None


class Saturation:
    """Requests a second while as many are decoded together as may be: rows over wall time, of whole chunks.

    A chunk is timed from its rows to its last free answer; making prompts of the rows, reading them and the
    end of the chunk, when fewer are decoded, are part of it, answers under the grammar are not. Chunks of
    fewer than ``batch_size`` rows do not saturate the engine and are left out.

    Args:
        batch_size: Rows that are decoded together.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self._rows = self._count = 0
        self._seconds = self._last = self._began = 0.0

    def begin(self) -> None:
        """A chunk begins."""
        self._count, self._began = 0, time.perf_counter()

    def answered(self, count: int) -> None:
        """So many rows of the chunk have their answer."""
        self._count, self._last = count, time.perf_counter()

    def end(self) -> None:
        """The chunk is finished."""
        if self._count >= self.batch_size:
            self._rows += self._count
            self._seconds += self._last - self._began

    @property
    def requests_per_second(self) -> float | None:
        """None where no chunk was large enough."""
        return self._rows / self._seconds if self._seconds else None
