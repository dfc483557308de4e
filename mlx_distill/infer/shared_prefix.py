"""The tokens that many prompts begin with, such as a task's system prompt, are read once for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from jaxtyping import Float

from mlx_distill.infer.kv_cache import Caches, merge, read, row_cache, split


class SharedPrefix:
    """The cache of the tokens that prompts begin with, kept from one batch to the next.

    Args:
        model: An mlx-lm model.
        least: Fewer common tokens are read with each prompt.
    """

    def __init__(self, model: Any, least: int = 8) -> None:
        self.model, self.least = model, least
        self.tokens: list[int] = []
        self._caches = row_cache(model)

    def prepare(self, prompts: Sequence[Sequence[int]]) -> int:
        """Read the tokens that some prompts share, unless they are in the cache, and return their number. One
        token of each prompt, at least, is left to read.

        Call it with all prompts before the first of their batches is read: a small batch may share more than
        its system prompt, by chance.
        """
        length, kept = _common(prompts), len(self.tokens)
        if kept <= length < 2 * kept and list(prompts[0][:kept]) == self.tokens:
            return kept
        if length < self.least:
            return 0
        self.tokens, caches = list(prompts[0][:length]), merge([row_cache(self.model)])
        read(self.model, caches, [self.tokens])
        self._caches = split(caches, [0])[0]
        return length

    def read(self, prompts: Sequence[Sequence[int]]) -> tuple[Float[mx.array, "b d"], Caches]:
        """The hidden states at the ends of some prompts, none of them empty, and a batch cache of them."""
        start = self.prepare(prompts)
        caches = self.caches(len(prompts)) if start else merge([row_cache(self.model)] * len(prompts))
        return read(self.model, caches, [prompt[start:] for prompt in prompts]), caches

    def caches(self, rows: int) -> Caches:
        """A batch cache of so many rows, each of which holds the tokens of :meth:`prepare`."""
        return merge([self._caches] * rows)


def _common(prompts: Sequence[Sequence[int]]) -> int:
    """The number of tokens that all prompts begin with, without the last token of the shortest one."""
    first, last = min(map(list, prompts)), max(map(list, prompts))  # what these two share, all share
    limit = min(map(len, prompts)) - 1
    return next((i for i in range(limit) if first[i] != last[i]), max(limit, 0))
