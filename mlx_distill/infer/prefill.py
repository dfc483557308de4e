"""Reading prompts, a few columns a step, so that rows that are being decoded go on in between."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import Int

from mlx_distill.infer.kv_cache import Caches, forward, merge, pad_right, row_cache, split
from mlx_distill.infer.prefix_cache import PrefixCache

_FEWEST_COLUMNS = 16  # of a pass, however many rows wait for the next token
_COMPARED = 16  # rows that wait, with which a row's beginning is compared


@dataclass(eq=False)
class PromptRow:
    """A prompt that is being read. All but its last token go into the cache: the last one is the input of the
    first step of decoding.

    Args:
        tokens: Of the prompt.
        caches: A row cache with the first ``position`` tokens.
        keep: The length of its beginning that is kept for other prompts; 0 for none.
        owner: Whose prompt it is.
    """

    tokens: Int[np.ndarray, " n"]
    owner: Any = None
    caches: Caches = field(default_factory=list)
    position: int = 0
    keep: int = 0

    @property
    def left(self) -> int:
        """Tokens that are to be read before the next stop."""
        end = self.keep if self.position < self.keep else len(self.tokens) - 1
        return end - self.position

    @property
    def done(self) -> bool:
        """Whether the prompt is read."""
        return self.position == len(self.tokens) - 1


class PromptReader:
    """Reads the prompts that wait, several at a time.

    ``computed`` and ``reused`` count prompt tokens.

    Args:
        model: An mlx-lm model.
        prefixes: Beginnings that prompts share.
        step_size: Tokens of a row in one pass; of all rows together while others are being decoded.
    """

    def __init__(self, model: Any, prefixes: PrefixCache, step_size: int) -> None:
        self.model, self.prefixes, self.step_size = model, prefixes, step_size
        self.waiting: deque[PromptRow] = deque()
        self.reading: list[PromptRow] = []
        self.computed = self.reused = 0
        self._pass: tuple[list[PromptRow], Caches] | None = None
        self._ready: list[tuple[list[PromptRow], Caches]] = []

    def __len__(self) -> int:
        """Rows between waiting and decoding."""
        return len(self.reading) + sum(len(rows) for rows, _ in self._ready)

    @property
    def has_ready(self) -> bool:
        """Whether rows wait to be decoded."""
        return bool(self._ready)

    def owners(self) -> Iterator[Any]:
        """Whose prompts are being read, or are read and wait to be decoded."""
        rows = chain(self.reading, *(rows for rows, _ in self._ready))
        return (row.owner for row in rows)

    def ready(self) -> Iterator[tuple[list[PromptRow], Caches]]:
        """Rows that have been read, each group with its batch cache; they are handed out once."""
        ready, self._ready = self._ready, []
        yield from ready

    def drop(self, owner: Any) -> None:
        """Forget a prompt that waits or is being read."""
        self.waiting = deque(row for row in self.waiting if row.owner is not owner)
        self.reading = [row for row in self.reading if row.owner is not owner]

    def advance(self, capacity: int, decoding: bool) -> None:
        """Submit one pass, without waiting for it.

        Args:
            capacity: Rows that may be read at the same time.
            decoding: Whether other rows wait for their next token.
        """
        self._take_apart()
        self._admit(capacity)
        if not self.reading:
            return
        columns = self.step_size
        if decoding:
            columns = max(_FEWEST_COLUMNS, self.step_size // len(self.reading))
        rows = [row for row in self.reading if row.left]
        if rows:
            parts = [row.tokens[row.position : row.position + min(columns, row.left)] for row in rows]
            caches = merge([row.caches for row in rows])
            lengths = [len(part) for part in parts]
            forward(self.model, caches, pad_right([part.tolist() for part in parts]), lengths)
            mx.async_eval([layer.state for layer in caches])
            for row, length in zip(rows, lengths, strict=True):
                row.position += length
            self.computed += sum(lengths)
            self._pass = rows, caches
        if all(row.done for row in self.reading) and not any(row.keep for row in self.reading):
            self._hand_over(rows)

    def _hand_over(self, rows: list[PromptRow]) -> None:
        """Make everything that is being read ready; the rows of the pass with its cache as it is."""
        others = [row for row in self.reading if row not in rows]
        if self._pass is not None:
            self._ready.append(self._pass)
        if others:
            self._ready.append((others, merge([row.caches for row in others])))
        self.reading, self._pass = [], None

    def _take_apart(self) -> None:
        """Give the rows of the last pass their own caches."""
        if self._pass is None:
            return
        rows, caches = self._pass
        self._pass = None
        mx.eval([layer.state for layer in caches])
        mx.clear_cache()
        for row, own in zip(rows, split(caches, range(len(rows))), strict=True):
            row.caches = own
            if row.position == row.keep:
                self.prefixes.add(row.tokens[: row.keep], own)
                row.keep = 0
        done = [row for row in self.reading if row.done and not row.keep]
        if done:
            self._ready.append((done, merge([row.caches for row in done])))
            self.reading = [row for row in self.reading if row not in done]

    def _admit(self, capacity: int) -> None:
        """Begin to read rows that wait. A row that shares its beginning with one that is being read waits
        until that beginning is there.
        """
        later: deque[PromptRow] = deque()
        while self.waiting and len(self) < capacity:
            row = self.waiting.popleft()
            found, caches = self.prefixes.find(row.tokens)
            beside = islice(chain(later, self.waiting), _COMPARED)
            wanted = self.prefixes.wanted(row.tokens, (other.tokens for other in beside))
            if wanted - found < self.prefixes.shortest:
                wanted = 0
            beginning = row.tokens[:wanted]
            if wanted and any(
                wanted == other.keep and np.array_equal(other.tokens[:wanted], beginning)
                for other in self.reading
            ):
                later.append(row)
                continue
            row.caches = row_cache(self.model) if caches is None else caches
            row.position, row.keep = found, wanted
            self.reused += found
            self.prefixes.seen(row.tokens)
            self.reading.append(row)
        self.waiting.extendleft(reversed(later))
