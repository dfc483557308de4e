"""Random tiny models of the two architectures, and tokenizers with the packaged chat templates."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from helpers.cache_kinds import CONFIGS, make_cached_model
from helpers.chat_families import FAMILIES, template
from mlx.utils import tree_map

import mlx_distill

TEMPLATES = Path(mlx_distill.__file__).parent / "assets" / "templates"
TEXT = [
    'You moderate messages. {"label": "hostile", "confidence": 95} {"label": "fine", "confidence": 80} '
    "the weather is lovely."
] * 4
SPECIALS = {
    "chatml": ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<think>", "</think>"],
    "harmony": ["<|return|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|endoftext|>"],
}
WINDOW = 6


def make_model(kind: str, vocabulary: int = 400) -> Any:
    """Weights large enough that greedy answers wander instead of repeating one token."""
    mx.random.seed(11)
    if kind == "chatml":
        from mlx_lm.models import qwen3

        model: Any = qwen3.Model(
            qwen3.ModelArgs(
                model_type="qwen3",
                hidden_size=32,
                num_hidden_layers=2,
                intermediate_size=48,
                num_attention_heads=4,
                rms_norm_eps=1e-6,
                vocab_size=vocabulary,
                num_key_value_heads=2,
                max_position_embeddings=512,
                head_dim=8,
                tie_word_embeddings=False,
                rope_theta=10000.0,
            )
        )
    else:
        from mlx_lm.models import gpt_oss

        model = gpt_oss.Model(
            gpt_oss.ModelArgs(
                num_hidden_layers=2,
                num_local_experts=4,
                num_experts_per_tok=2,
                vocab_size=vocabulary,
                hidden_size=32,
                intermediate_size=32,
                head_dim=8,
                num_attention_heads=4,
                num_key_value_heads=2,
                sliding_window=WINDOW,
                rope_theta=10000,
            )
        )
        for layer in model.layers:
            layer.self_attn.sinks = mx.random.normal(layer.self_attn.sinks.shape)
    model.update(tree_map(lambda p: p * 3 if p.ndim > 1 else p, model.parameters()))
    mx.eval(model.parameters())
    return model.eval()


def make_tokenizer(kind: str, family: str | None = None) -> Any:
    """A byte-level BPE that splits words, as the genuine ones do; with the tokens and the chat template of a
    family in tests/helpers, or the packaged ones.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    specials = SPECIALS[kind]
    if family is not None:
        tokens = FAMILIES[family]
        specials = list(dict.fromkeys([tokens.eos, *tokens.special, "<|endoftext|>", "<|constrain|>"]))
        core.add_tokens([AddedToken(text, normalized=False) for text in tokens.ordinary])
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=specials[0], pad_token="<|endoftext|>"
    )
    packaged = TEMPLATES / f"{kind}.jinja"
    tokenizer.chat_template = packaged.read_text() if family is None else template(family)
    return tokenizer


@pytest.fixture(scope="session", params=["chatml", "harmony"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def model(kind: str) -> Any:
    return make_model(kind)


@pytest.fixture(scope="session")
def tokenizer(kind: str) -> Any:
    return make_tokenizer(kind)


@pytest.fixture(scope="session")
def chatml() -> Any:
    return make_tokenizer("chatml")


@pytest.fixture(scope="session", params=[kind for kind in CONFIGS if not kind.endswith("_wide")])
def any_model(request: pytest.FixtureRequest) -> Any:
    """Of every architecture, and of others with other kinds of caches."""
    return make_cached_model(str(request.param))
