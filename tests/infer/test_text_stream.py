"""Texts piece by piece: what is shown of an answer while its tokens come in."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from helpers import tokenizer_kinds

from mlx_distill.data.chat import prompt_ids
from mlx_distill.errors import ModelError
from mlx_distill.infer.channels import AnswerStart, channels_of
from mlx_distill.infer.requests import Generation, TokenEvent
from mlx_distill.infer.text_stream import AnswerStream, StopStrings, TextStream
from mlx_distill.records import Message

SCRIPTS = [
    'Love is patient. {"label": "fine", "score": 73}',
    "爱是恒久忍耐，又有恩慈；",
    "Ma's café: naïve, Straße; 'tis n't so !",
    "👩‍👩‍👧‍👦 und 🇩🇪, é",
    "사랑은 오래 참고 حب",
]
KINDS = (*tokenizer_kinds.LOSSLESS, "word_piece", "xlm_r")


class Wrapped:
    """A tokenizer of the tokenizers library, as transformers wraps it."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.convert_ids_to_tokens = inner.id_to_token

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.inner.decode(list(tokens), skip_special_tokens=False))


def streamed(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.add([token]) for token in tokens), stream.finish()]


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_the_text_of_all_tokens_at_once(kind: str) -> None:
    tokenizer = Wrapped(tokenizer_kinds.make(kind))
    random = np.random.default_rng(3)
    size = tokenizer.inner.get_vocab_size()
    texts = [tokenizer.inner.encode(text).ids for text in SCRIPTS]
    texts.append([token for ids in texts for token in ids] * 4)  # longer than the window
    texts += [random.integers(0, size, int(random.integers(1, 200))).tolist() for _ in range(40)]
    for tokens in texts:
        assert "".join(streamed(tokenizer, tokens)) == tokenizer.decode(tokens)
        cuts = [0, *sorted(random.integers(0, len(tokens) + 1, 3).tolist()), len(tokens)]
        stream = TextStream(tokenizer)
        parts = [stream.add(tokens[a:b]) for a, b in pairwise(cuts)]  # several at once
        assert "".join([*parts, stream.finish()]) == tokenizer.decode(tokens)


@pytest.mark.parametrize("kind", ["qwen", "llama2"])
def test_no_piece_has_a_part_of_a_character(kind: str) -> None:
    tokenizer = Wrapped(tokenizer_kinds.make(kind))
    for text in SCRIPTS:
        pieces = streamed(tokenizer, tokenizer.inner.encode(text).ids)
        assert not any("\ufffd" in piece for piece in pieces)
        assert sum(map(bool, pieces)) > 1 or kind == "llama2"  # whose run of bytes is known at its end


def test_spaces_that_a_tokenizer_cleans_up_are_held_back() -> None:
    class Cleaning(Wrapped):
        clean_up_tokenization_spaces = True

        def decode(self, tokens: Sequence[int]) -> str:
            text = super().decode(tokens)
            return text.replace(" .", ".").replace(" n't", "n't").replace(" '", "'").replace(" ,", ",")

    tokenizer = Cleaning(tokenizer_kinds.make("qwen"))
    for text in ("it is n't so , he said .", "a ' b ' c n't . . ." * 20):
        tokens = tokenizer.inner.encode(text).ids
        assert "".join(streamed(tokenizer, tokens)) == tokenizer.decode(tokens)


@pytest.mark.parametrize("stops", [["b"], ["END"], ["abc", "b"], ["aab", "ab"], ["\n\n", "}"], []])
def test_a_text_ends_before_the_first_complete_stop_string(stops: list[str]) -> None:
    random = np.random.default_rng(5)
    for text in ("xxENEND y", "aaabcab", "one\n\ntwo}", "E" * 9, "no stop", "abc"):
        ends = sorted((text.find(s) + len(s), text.find(s)) for s in stops if s in text)
        expected = text[: ends[0][1]] if ends else text
        for _ in range(8):
            cuts = sorted(random.integers(0, len(text) + 1, 3).tolist())
            parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
            reader = StopStrings(stops)
            assert "".join([*map(reader.add, parts), reader.finish()]) == expected
            assert reader.hit == bool(ends)


def events(tokenizer: Any, tokens: Sequence[int], prompt: Sequence[int]) -> tuple[list[TokenEvent], int]:
    """The tokens as the engine reports them, and how many precede the answer."""
    place, out = AnswerStart(channels_of(tokenizer), prompt), []
    for number, token in enumerate(tokens, 1):
        place.accept(token)
        out.append(TokenEvent(0, token, place.start is None or number <= place.start))
    return out, len(tokens) if place.start is None else place.start


@pytest.mark.parametrize("answer", ["{}", "\nyes é 爱", ""])
def test_thinking_stands_apart_without_what_marks_it(tokenizer: Any, kind: str, answer: str) -> None:
    thinking = {
        "chatml": "<think>\nlovely 爱\n</think>\n\n",
        "harmony": "<|channel|>analysis<|message|>\nlovely 爱\n<|end|>"
        "<|start|>assistant<|channel|>final<|message|>",
    }[kind]
    prompt = prompt_ids(tokenizer, [Message("user", "hm")])
    channels = channels_of(tokenizer)
    assert channels is not None
    if channels.final:  # leaves the channel to the model
        prompt = prompt[: -len(channels.final)]
    tokens = tokenizer.encode(thinking + answer, add_special_tokens=False)
    reports, start = events(tokenizer, tokens, prompt)
    assert start > 3
    text = tokenizer.decode(tokens[start:]).lstrip("\n")
    whole = Generation(text, tuple(tokens), len(prompt), "stop", 0.0, answer_start=start)
    for parts in ([[event] for event in reports], [reports], [reports[: start + 1], reports[start + 1 :]]):
        stream = AnswerStream(tokenizer, channels, prompt)
        pieces = [stream.add(part) for part in parts]
        pieces.append(stream.end(whole))
        assert "".join(piece.answer for piece in pieces) == text == answer.lstrip("\n")
        assert "".join(piece.thinking for piece in pieces) == "\nlovely 爱\n"
        assert (stream.tokens, stream.thinking_tokens) == (len(tokens), start)


def test_another_text_than_the_engines_is_an_error(chatml: Any) -> None:
    stream = AnswerStream(chatml, None)
    stream.add([TokenEvent(0, 5, False)])
    with pytest.raises(ModelError, match="token by token"):
        stream.end(Generation("another", (5,), 1, "stop", 0.0))
