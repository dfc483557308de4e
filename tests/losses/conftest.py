"""Two small byte-level tokenizers that split the same text differently, as Qwen3 and gpt-oss do."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

CORPUS = [
    'The answer is {"label": "fine", "score": 73, "themes": ["hope", "grace"]}',
    "In 1984 there were 12345 houses, 678 gardens and 90 wells; the river was 3.14159 miles away.",
    "the theory of the weather, whether or not they gather together another feather",
    "naïve café, Straße, 東京 is big, привет мир, 👩‍👩‍👧 and 🎵🎶 too",
    "hostile fine RECOMMENDED ACCEPTABLE CONCERNING NOT_RECOMMENDED",
] * 3


class TokenizerPair(NamedTuple):
    """A student (digits in groups of up to three) and a teacher (digits one by one)."""

    student: Any
    teacher: Any


def train(pattern: str, size: int, stop: str) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|pad|>", stop],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def tokenizers() -> TokenizerPair:
    return TokenizerPair(
        student=train(r"\p{N}{1,3}", 420, "<|return|>"), teacher=train(r"\p{N}", 480, "<|im_end|>")
    )
