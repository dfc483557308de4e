"""The bytes of a tokenizer's tokens.

Three ways of writing them are read, told apart by the tokenizer's decoder:

- byte-level (Qwen, gpt-oss, Llama 3, Mistral's Tekken): a token is written in GPT-2's alphabet of 256
  printable characters, one per byte;
- SentencePiece-like (Llama 2, Mistral 7B, Gemma, T5, XLM-R; BPE and Unigram): a token is text with a word
  mark, ``▁``, for the space, and ``<0x0A>`` is a single byte where the decoder falls back to bytes;
- added tokens are their own text, and special ones have none.

Some tokenizers write a space before a text that has none. It is part of the first token's bytes, and
:func:`~mlx_distill.losses.byte_alignment.align_bytes` knows of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mlx_distill.errors import ModelError

# Plain texts that a tokenizer must give back byte by byte.
_SAMPLES = ('The answer is {"label": "fine", "score": 73}, so there.', "a b c", "Straße, naïve café")
_UNKNOWN_TEXT = "\U0010fffd"  # no vocabulary has it
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_ANCHOR = "\n"


class Vocabulary(NamedTuple):
    """A tokenizer's bytes and byte lengths by token id, the text of its special tokens by id, and whether it
    writes a space before a text that has none.
    """

    tokens: tuple[bytes, ...]
    lengths: np.ndarray
    special: dict[int, str]
    backend: Any
    prefix_space: bool = False


# Reading 200,000 tokens takes a fraction of a second, aligning a row microseconds. Keyed by id(); an entry
# holds its tokenizer, so that no other object can get the same id.
_cache: dict[int, Vocabulary] = {}
_CACHE_SIZE = 8


def token_bytes(tokenizer: Any) -> list[bytes]:
    """The bytes of every token, by id.

    Special tokens have no text and give ``b""``, as do unused ids and the token for unknown text. Source of
    the byte alphabet: Radford et al. 2019 (GPT-2); of the word mark: Kudo and Richardson 2018,
    https://arxiv.org/abs/1808.06226.

    Args:
        tokenizer: From ``transformers``, ``mlx_lm`` or ``tokenizers``.

    Returns:
        One ``bytes`` per id, up to the highest id.

    Raises:
        ModelError: The tokens do not name their bytes (WordPiece, a tokenizer without a ``tokenizer.json``),
            or the tokenizer changes plain text (lower case, no accents).

    >>> from tokenizers import Tokenizer, decoders, models
    >>> tokenizer = Tokenizer(models.BPE({"Ġ": 0, "a": 1, "Ã": 2}, []))
    >>> tokenizer.decoder = decoders.ByteLevel()
    >>> token_bytes(tokenizer)
    [b' ', b'a', b'\\xc3']
    """
    return list(vocabulary(tokenizer).tokens)


def vocabulary(tokenizer: Any) -> Vocabulary:
    """Bytes, byte lengths and special tokens of a tokenizer; cached."""
    backend = backend_of(tokenizer)
    cached = _cache.get(id(backend))
    if cached is None or len(cached.tokens) < backend.get_vocab_size():
        while len(_cache) >= _CACHE_SIZE:
            _cache.pop(next(iter(_cache)))
        cached = _cache[id(backend)] = _read(backend)
    return cached


def backend_of(tokenizer: Any) -> Any:
    """The ``tokenizers.Tokenizer`` of a tokenizer from ``transformers`` or ``mlx_lm``, or the argument."""
    for candidate in (
        tokenizer,
        getattr(tokenizer, "backend_tokenizer", None),
        getattr(tokenizer, "_tokenizer", None),
    ):
        if (
            hasattr(candidate, "get_added_tokens_decoder")
            and hasattr(candidate, "encode_batch")
            and hasattr(candidate, "to_str")
        ):
            return candidate
    raise ModelError(
        f"a {type(tokenizer).__name__} does not expose the bytes of its tokens",
        fix="use a fast tokenizer: a model folder with a tokenizer.json",
    )


def continuations(tokens: Vocabulary, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text when it continues another text; none where the tokenizer merges the two."""
    if not tokens.prefix_space:
        return [
            encoding.ids for encoding in tokens.backend.encode_batch(list(texts), add_special_tokens=False)
        ]
    anchored = tokens.backend.encode_batch([_ANCHOR + text for text in texts], add_special_tokens=False)
    spelled = vocabulary(tokens.backend).tokens  # all of them
    return [_behind_anchor(encoding.ids, spelled) for encoding in anchored]


def first_tokens(tokens: Vocabulary, texts: Sequence[str]) -> list[int | None]:
    """The token that each text begins with when it continues another text; None where the tokenizer merges
    the two, or writes nothing.
    """
    return [ids[0] if ids else None for ids in continuations(tokens, texts)]


def written(tokens: Vocabulary, candidates: Iterable[bytes]) -> set[bytes]:
    """Of some tokens' bytes those that the tokenizer writes as one token when they continue a text. A
    vocabulary also holds tokens that are never written, such as those that its own rule for splitting words
    cuts. Bytes that are no text cannot be asked for and count as written.
    """
    out, texts = set(), []
    for token in candidates:
        try:
            texts.append(token.decode())
        except UnicodeDecodeError:
            out.add(token)
    firsts = first_tokens(tokens, texts)
    spelled = vocabulary(tokens.backend).tokens
    return out | {
        text.encode()
        for text, first in zip(texts, firsts, strict=True)
        if first is not None and spelled[first] == text.encode()
    }


def _behind_anchor(ids: Sequence[int], spelled: Sequence[bytes]) -> list[int]:
    before = b""
    for number, i in enumerate(ids):
        if before.lstrip(b" ") == _ANCHOR.encode():
            return list(ids[number:])
        before += spelled[i]
    return []


def byte_alphabet() -> str:
    """GPT-2's 256 printable characters, in the order of the bytes they stand for."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return "".join(letters[byte] for byte in range(256))


def _read(backend: Any) -> Vocabulary:
    added = backend.get_added_tokens_decoder()
    special = {i: token.content for i, token in added.items() if token.special}
    vocab = backend.get_vocab(with_added_tokens=True)
    texts = {i: text for text, i in vocab.items() if i not in special}
    decoders = list(_flat(backend.decoder))
    marks = {found for decoder in decoders if (found := _word_mark(decoder)) is not None}
    if any(decoder["type"] == "ByteLevel" for decoder in decoders):
        spelled = {i: text.encode() if i in added else _byte_level(i, text) for i, text in texts.items()}
    elif len(marks) == 1:
        mark = marks.pop()
        single_bytes = any(decoder["type"] == "ByteFallback" for decoder in decoders)
        if single_bytes:  # some are marked as special
            special = {i: text for i, text in special.items() if not _BYTE.fullmatch(text)}
            texts |= {i: token.content for i, token in added.items() if _BYTE.fullmatch(token.content)}
        spelled = {i: _marked(text, mark, single_bytes) for i, text in texts.items()}
        spelled |= dict.fromkeys(_unknown(backend, spelled, mark), b"")
    else:
        names = ", ".join(decoder["type"] for decoder in decoders) or "no"
        raise ModelError(
            f"a {type(backend.model).__name__} tokenizer with {names} decoder does not name the bytes of its "
            "tokens",
            fix="between models of one tokenizer none are needed (distill.label_weight: 0); else use models "
            "with a byte-level or SentencePiece-like tokenizer.json (Qwen, gpt-oss, Llama, Mistral, Gemma)",
        )
    tokens = tuple(spelled.get(i, b"") for i in range(max([*vocab.values(), *added, -1]) + 1))
    lengths = np.array([len(token) for token in tokens], dtype=np.int64)
    return Vocabulary(tokens, lengths, special, backend, _writes_prefix_space(backend, tokens))


def _flat(decoder: Any) -> Iterator[Mapping[str, Any]]:
    """The steps of a decoder, as in tokenizer.json."""
    steps = [] if decoder is None else [json.loads(decoder.__getstate__())]
    while steps:
        step = steps.pop(0)
        if step["type"] == "Sequence":
            steps = step["decoders"] + steps
        else:
            yield step


def _word_mark(decoder: Mapping[str, Any]) -> str | None:
    """The character that a step of a decoder turns into a space."""
    if decoder["type"] == "Metaspace":
        return str(decoder["replacement"])
    if decoder["type"] == "Replace" and decoder["content"] == " ":
        return decoder["pattern"].get("String")
    return None


_ALPHABET = {ord(character): byte for byte, character in enumerate(byte_alphabet())}


def _byte_level(number: int, text: str) -> bytes:
    try:
        return text.translate(_ALPHABET).encode("latin-1")
    except UnicodeEncodeError:
        raise ModelError(
            f"token {number} ({text!r}) is not written in the byte alphabet",
            fix="use a tokenizer.json whose decoder fits its vocabulary",
        ) from None


def _marked(text: str, mark: str, single_bytes: bool) -> bytes:
    byte = _BYTE.fullmatch(text) if single_bytes else None
    return bytes([int(byte[1], 16)]) if byte else text.replace(mark, " ").encode()


def _unknown(backend: Any, spelled: Mapping[int, bytes], mark: str) -> Iterable[int]:
    """The tokens that stand for any unknown text: those of a text that no vocabulary has."""
    encoding = backend.encode(_UNKNOWN_TEXT, add_special_tokens=False)
    return {
        i
        for i, text in zip(encoding.ids, encoding.tokens, strict=True)
        if text != mark and not _BYTE.fullmatch(text) and i in spelled
    }


def _writes_prefix_space(backend: Any, tokens: Sequence[bytes]) -> bool:
    """Encode some plain texts: whether they get a space before them.

    Raises:
        ModelError: the tokens say something else than the text.
    """
    known, prefixed = set(tokens), False
    for sample in _SAMPLES:
        if any(c.encode() not in known and not known.issuperset(_single(c)) for c in sample):
            continue  # a small vocabulary, or one without bytes
        ids = backend.encode(sample, add_special_tokens=False).ids
        said, data = b"".join(tokens[i] for i in ids), sample.encode()
        if said not in (data, b" " + data):
            raise ModelError(
                f"the tokenizer changes plain text: {sample!r} becomes {said.decode(errors='replace')!r}",
                fix="between models of one tokenizer this does not matter (distill.label_weight: 0); else "
                "use models whose tokenizers keep the text as it is",
            )
        prefixed |= said != data
    return prefixed


def _single(character: str) -> set[bytes]:
    return {bytes([byte]) for byte in character.encode()}
