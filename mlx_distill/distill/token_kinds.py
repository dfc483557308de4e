"""What kind of text a token is: digits, words, another script, punctuation, space, or an answer's end."""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Int

from mlx_distill.errors import ModelError
from mlx_distill.losses.token_bytes import Vocabulary, vocabulary

KINDS = ("digits", "words", "other scripts", "punctuation", "space", "end")
"""In the order of the tables. ``words`` are in Latin letters; ``other scripts`` also has symbols that are not
ASCII, such as emoji, and tokens that hold a part of a character; ``end`` are special tokens.
"""
_END = KINDS.index("end")


def kind_of(token: bytes) -> str:
    """The kind of a token by its bytes.

    >>> [kind_of(t.encode()) for t in ("73", " hope", " Straße", "東京", '":', "\\n ", "")]
    ['digits', 'words', 'words', 'other scripts', 'punctuation', 'space', 'end']
    >>> kind_of("é".encode()[:1])
    'other scripts'
    """
    if not token:
        return "end"
    try:
        text = token.decode().strip()
    except UnicodeDecodeError:
        return "other scripts"
    if not text:
        return "space"
    if any(character.isdigit() for character in text):
        return "digits"
    if any(not character.isascii() and not _is_latin(character) for character in text):
        return "other scripts"
    return "words" if any(character.isalpha() for character in text) else "punctuation"


@lru_cache(maxsize=4096)
def _is_latin(character: str) -> bool:
    return unicodedata.name(character, "").startswith("LATIN ")


class TokenKinds:
    """The kinds of a tokenizer's tokens, found when they are first asked for.

    Args:
        tokenizer: One that does not name the bytes of its tokens has ``words`` alone.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokens: Vocabulary | None = None
        try:
            self._tokens = vocabulary(tokenizer)
        except ModelError:
            self._kinds = np.zeros(0, dtype=np.int8)
        else:
            self._kinds = np.full(len(self._tokens.tokens), -1, dtype=np.int8)

    def of(self, ids: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """The number in :data:`KINDS` of each token."""
        if self._tokens is None:
            return np.full(len(ids), KINDS.index("words"), dtype=np.int8)
        known = np.minimum(ids, len(self._kinds) - 1)
        for i in np.unique(known[self._kinds[known] < 0]).tolist():
            self._kinds[i] = KINDS.index(kind_of(self._tokens.tokens[i]))
        return np.where(ids < len(self._kinds), self._kinds[known], _END).astype(np.int8)
