"""One request at work in an engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
from jaxtyping import Float

from mlx_distill.infer.channels import AnswerStart
from mlx_distill.infer.prefill import PromptRow
from mlx_distill.infer.requests import Request, TokenLogprobs


@dataclass(eq=False)
class EngineRow:
    """A request at work: what was read of its tokens, and what was submitted."""

    id: int
    request: Request
    prompt: PromptRow
    place: AnswerStart
    uniforms: Float[np.ndarray, " n"] | None
    began: float = field(default_factory=time.perf_counter)
    tokens: list[int] = field(default_factory=list)
    chosen: int = 0
    seconds: float = 0.0
    first_token_seconds: float = 0.0
    hook_output: tuple[mx.array, int] | None = None
    ended: bool = False

    @property
    def leaves(self) -> bool:
        """Whether no further token of it is to be chosen."""
        return self.ended or self.chosen >= self.request.limit

    @property
    def full(self) -> bool:
        """Whether it has as many tokens as it may have, of its thinking or of its answer."""
        request, start = self.request, self.place.start
        if not request.max_thinking:
            return len(self.tokens) == request.max_tokens
        if start is None:  # what the template has between thinking and answer is not counted
            return len(self.tokens) >= request.max_thinking and not self.place.forced
        return len(self.tokens) - start >= request.max_tokens

    @property
    def at_hook(self) -> bool:
        """Whether its next token is the one that its hook reads."""
        hook, start = self.request.logits_hook, self.place.start
        return hook is not None and start is not None and len(self.tokens) - start == hook.step


def row_logprobs(table: Sequence[np.ndarray] | None, place: int, count: int | None) -> TokenLogprobs | None:
    """The log-probabilities of the token of one row, where it asked for them."""
    if table is None or count is None:
        return None
    own, ids, values = (part[place] for part in table)
    best = sorted(zip(ids.tolist(), values.tolist(), strict=True), key=lambda pair: (-pair[1], pair[0]))
    return TokenLogprobs(float(own), tuple(pair for pair in best[:count] if np.isfinite(pair[1])))
