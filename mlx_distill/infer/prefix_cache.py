"""Caches of beginnings that prompts share, such as a task's system prompt: each is computed once."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable

import numpy as np
from jaxtyping import Int

from mlx_distill.infer.kv_cache import Caches, fork

Tokens = Int[np.ndarray, " _"]  # prompts of any length


class PrefixCache:
    """Row caches by the tokens that they hold; the one used longest ago is dropped first.

    Args:
        limit: Tokens kept in all; 0 keeps none.
        shortest: Shorter beginnings are not worth a pass of their own.
        recent: How many prompts that were read a new one is compared with.
    """

    def __init__(self, limit: int, shortest: int = 32, recent: int = 8) -> None:
        self.limit, self.shortest = limit, shortest
        self._entries: OrderedDict[bytes, tuple[int, Caches]] = OrderedDict()
        self._recent: deque[Tokens] = deque(maxlen=recent)

    @property
    def tokens(self) -> int:
        """Kept in all."""
        return sum(length for length, _ in self._entries.values())

    def find(self, prompt: Tokens) -> tuple[int, Caches | None]:
        """The longest beginning of a prompt that is kept, without its last token: its length and its cache,
        which must not be written to; 0 and None where there is none.
        """
        data = prompt.tobytes()
        fitting = [
            (length, key)
            for key, (length, _) in self._entries.items()
            if length < len(prompt) and data.startswith(key)
        ]
        if not fitting:
            return 0, None
        length, key = max(fitting)
        self._entries.move_to_end(key)
        return length, self._entries[key][1]

    def wanted(self, prompt: Tokens, others: Iterable[Tokens]) -> int:
        """The length of the beginning of a prompt that is worth keeping: of those it shares with the others
        and with prompts read before, the one that saves most tokens. 0 where none is.

        Args:
            prompt: About to be read.
            others: Waiting too.
        """
        if not self.limit:
            return 0
        shared = [_common(prompt, other) for other in (*self._recent, *others)]
        long_enough = [min(n, len(prompt) - 1) for n in shared if n >= self.shortest]
        lengths = [n for n in long_enough if self.shortest <= n <= self.limit]
        return max(lengths, key=lambda n: (n * sum(m >= n for m in lengths), n), default=0)

    def seen(self, prompt: Tokens) -> None:
        """Compare later prompts with this one."""
        self._recent.append(prompt)

    def add(self, tokens: Tokens, caches: Caches) -> None:
        """Keep a row cache, which may be written to afterwards."""
        if len(tokens) > self.limit:
            return
        self._entries[tokens.tobytes()] = (len(tokens), fork(caches))
        while self.tokens > self.limit:
            self._entries.popitem(last=False)


def _common(a: Tokens, b: Tokens) -> int:
    """How many tokens two prompts begin with in common."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
