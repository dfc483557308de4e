"""Small tokenizers with the templates' special tokens, and a small task."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

import mlx_distill
from mlx_distill.tasks.task import Task, parse_task

TEMPLATES = Path(mlx_distill.__file__).parent / "assets" / "templates"
TEXT = [
    "You judge songs. A song about rain.\n\nThe rain came down, the river rose.",
    '{"verdict": "yes", "score": 10, "why": "because of the rain"} 2024 300 12',
    "# Instructions\n\nReasoning: low\n\n# Valid channels: analysis, commentary, final. <|im_end|> "
    "<|return|> <think>",
] * 4

CHATML = {
    "specials": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "added": ["<think>", "</think>"],
    "eos": "<|im_end|>",
}
HARMONY = {
    "specials": ["<|return|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|endoftext|>"],
    "added": [],
    "eos": "<|return|>",
}


def make_tokenizer(kind: str) -> Any:
    """A byte-level BPE of 400 tokens with one of the packaged templates."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import PreTrainedTokenizerFast

    spec: Any = {"chatml": CHATML, "harmony": HARMONY}[kind]
    core = Tokenizer(models.BPE())
    digits = r"\p{N}" if kind == "chatml" else r"\p{N}{1,3}"
    pattern = rf" ?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+"
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(TEXT, trainer)
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in spec["specials"]])
    core.add_tokens([AddedToken(text, special=False, normalized=False) for text in spec["added"]])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=spec["eos"], pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = (TEMPLATES / f"{kind}.jinja").read_text()
    return tokenizer


@pytest.fixture(scope="session", params=["chatml", "harmony"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return make_tokenizer(request.param)


@pytest.fixture(scope="session")
def chatml() -> Any:
    return make_tokenizer("chatml")


@pytest.fixture(scope="session")
def harmony() -> Any:
    return make_tokenizer("harmony")


@pytest.fixture
def fresh() -> Any:
    """A tokenizer that a test may change."""
    return make_tokenizer("chatml")


@pytest.fixture(scope="session")
def task() -> Task:
    return parse_task(
        {
            "name": "rain",
            "system": "You judge songs.",
            "user": "{title}\n\n{text}",
            "title": "title",
            "label": "verdict",
            "slices": ["genre"],
            "schema": {
                "type": "object",
                "additionalProperties": False,
                "required": ["verdict", "score"],
                "properties": {
                    "verdict": {"type": "string", "enum": ["yes", "no"]},
                    "score": {"type": "integer", "minimum": 0, "maximum": 100},
                    "why": {"type": "string"},
                },
            },
        },
        "rain.yaml",
    )
