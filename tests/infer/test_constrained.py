from __future__ import annotations

import json
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers import tokenizer_kinds
from helpers.schemas import random_schema

from mlx_distill.data.chat import answer_ids, prompt_ids, stop_ids
from mlx_distill.errors import ModelError
from mlx_distill.infer.constrained import AnswerGrammar, allow_tokens, fill_masks
from mlx_distill.losses.token_bytes import token_bytes
from mlx_distill.models.forward import head_columns
from mlx_distill.records import Message
from mlx_distill.tasks.answer import dump_answer, parse_answer
from mlx_distill.tasks.task import load_task

WIDTH = 400
SCHEMA = {
    "type": "object",
    "properties": {
        "label": {"enum": ["hostile", "fine"]},
        "score": {"type": "integer", "minimum": 0, "maximum": 100},
        "note": {"type": "string", "maxLength": 8},
    },
    "required": ["label", "score"],
}


def allowed(constraints: list[Any], width: int = WIDTH) -> np.ndarray:
    mask = np.zeros((len(constraints), -(-width // 32)), dtype=np.int32)
    fill_masks(constraints, mask)
    return np.unpackbits(mask.view(np.uint8), axis=1, bitorder="little")[:, :width].astype(bool)


def walk(grammar: AnswerGrammar, random: np.random.Generator, limit: int = 400) -> list[int] | None:
    """A random text of a grammar: any allowed token at first, later rather one that ends something."""
    ends = np.array([bool(set(token) & set(b'"}],')) for token in grammar.table.tokens])
    constraint = grammar.constraint()
    out: list[int] = []
    while not constraint.done:
        if len(out) == limit:
            return None
        row = allowed([constraint], grammar.table.width)[0]
        if (row & ends).any() and random.random() < 0.1 + len(out) / 100:
            row &= ends
        choices = np.flatnonzero(row)
        out.append(int(random.choice(choices)))
        constraint.accept(out[-1])
    return out


def constrained_greedy(
    model: Any, prompt: list[int], grammar: AnswerGrammar, max_tokens: int
) -> tuple[list[int], str]:
    """The reference: one row, no cache, mask and argmax."""
    constraint = grammar.constraint(prompt)
    out: list[int] = []
    while len(out) < max_tokens:
        logits = model(mx.array([prompt + out]))[:, -1]
        mask = np.zeros((1, -(-logits.shape[1] // 32)), dtype=np.int32)
        fill_masks([constraint], mask)
        token = int(mx.argmax(allow_tokens(logits, mask), axis=-1).item())
        if token in grammar.table.stop:
            return out, "stop"
        constraint.accept(token)
        out.append(token)
    return out, "length"


@pytest.mark.slow
def test_what_a_grammar_accepts_the_strict_parse_accepts(chatml: Any) -> None:
    random = np.random.default_rng(3)
    complete = 0
    for number in range(80):
        schema = random_schema(random, bounded=number % 3 > 0)
        grammar = AnswerGrammar(chatml, schema, WIDTH)
        for _ in range(2):
            if (tokens := walk(grammar, random)) is not None:
                complete += 1
                text = chatml.decode(tokens)
                _, error = parse_answer(text, schema)
                assert error is None, (error, text, json.dumps(schema))
                assert grammar.accepts(tokens)
    assert complete > 140


TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def chat_tokenizer(kind: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_kinds.make(kind),
        eos_token="<|im_end|>",
        pad_token="</s>",
        unk_token="<unk>",
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize("kind", tokenizer_kinds.LOSSLESS)
def test_a_canonical_answer_in_the_tokens_of_training_is_accepted(kind: str) -> None:
    tokenizer = chat_tokenizer(kind)
    random = np.random.default_rng(7)
    width = tokenizer.vocab_size + 37
    checked = 0
    for _ in range(12):
        schema = random_schema(random)
        grammar = AnswerGrammar(tokenizer, schema, width)
        tokens = walk(grammar, random)
        if tokens is None:
            continue
        answer, error = parse_answer(tokenizer.decode(tokens), schema)
        assert answer is not None, error
        text = dump_answer(answer, schema)
        if "e-" not in text:  # a grammar writes small numbers without an exponent
            assert grammar.accepts(answer_ids(tokenizer, text)), text
            checked += 1
    assert checked > 7


@pytest.mark.parametrize("kind", ["lower", "word_piece"])
def test_a_tokenizer_whose_tokens_have_no_bytes_is_refused_with_the_way_out(kind: str) -> None:
    with pytest.raises(ModelError, match="no-constrain"):
        AnswerGrammar(chat_tokenizer(kind), SCHEMA, 500)


@pytest.mark.slow
def test_an_untrained_model_writes_answers_that_parse(model: Any, tokenizer: Any) -> None:
    random = np.random.default_rng(0)
    cut = 0
    for number in range(6):
        schema = random_schema(random)
        grammar = AnswerGrammar(tokenizer, schema, head_columns(model))
        prompt = prompt_ids(tokenizer, [Message("user", f"row {number}"), Message("assistant", "")])
        tokens, finish = constrained_greedy(model, prompt, grammar, 70)
        _, error = parse_answer(tokenizer.decode(tokens), schema)
        assert (error is None) == (finish == "stop"), (error, tokenizer.decode(tokens))
        cut += finish == "length"
    assert cut < 3


def test_masks_of_rows_with_several_schemas_are_those_of_each_alone(chatml: Any) -> None:
    random = np.random.default_rng(1)
    grammars = [AnswerGrammar(chatml, random_schema(random), WIDTH) for _ in range(6)]
    together = [grammar.constraint() for grammar in grammars]
    alone = [grammar.constraint() for grammar in grammars]
    for _ in range(40):
        rows = allowed([None, *together])
        assert rows[0].all()
        assert (rows[1:] == np.concatenate([allowed([constraint]) for constraint in alone])).all()
        for one, other, row in zip(together, alone, rows[1:], strict=True):
            token = int(random.choice(np.flatnonzero(row)))
            one.accept(token)
            other.accept(token)
    assert any(constraint.done for constraint in together)


def test_behind_a_complete_answer_only_stop_tokens_are_allowed(chatml: Any) -> None:
    stop = {*stop_ids(chatml), 5}
    grammar = AnswerGrammar(chatml, SCHEMA, WIDTH, stop=stop)
    constraint = grammar.constraint()
    for token in answer_ids(chatml, '{"label": "fine", "score": 100}'):
        assert not constraint.done
        row = allowed([constraint])[0]
        assert row[token] and not row[list(stop)].any()
        constraint.accept(token)
    assert constraint.done and set(np.flatnonzero(allowed([constraint])[0])) == stop
    for token in (*stop, 17, 17):  # an engine that runs ahead feeds what it has computed
        constraint.accept(token)
    assert constraint.done and set(np.flatnonzero(allowed([constraint])[0])) == stop


def test_tokens_that_end_turns_or_do_not_exist_are_no_part_of_an_answer(chatml: Any) -> None:
    grammar = AnswerGrammar(chatml, SCHEMA, WIDTH)
    constraint = grammar.constraint()
    for token in answer_ids(chatml, '{"label": "fine", "score": 100, "note": "a'):
        constraint.accept(token)
    row = allowed([constraint])[0]
    size = len(token_bytes(chatml))
    assert size < WIDTH and not row[size:].any() and not row[chatml.all_special_ids].any()
    assert not row[[chatml.convert_tokens_to_ids(text) for text in ("<|im_start|>", "<think>")]].any()
    assert row.sum() > 150


@pytest.mark.parametrize(
    "text",
    [
        '{"label":"fine"',
        '{ "label"',
        '{"score"',
        '{"label": "fine", "note"',
        '{"label": "fine", "score": 101',
        '{"label": "fine", "score": 07',
        '{"label": "fine", "score": 7, "note": "123456789',
        "\n{",
        '{"label": "\\u0066',
    ],
)
def test_other_forms_are_not_accepted(chatml: Any, text: str) -> None:
    assert not AnswerGrammar(chatml, SCHEMA, WIDTH).constraint().accept_all(answer_ids(chatml, text))


def test_a_token_that_the_mask_forbids_is_an_error(chatml: Any) -> None:
    constraint = AnswerGrammar(chatml, SCHEMA, WIDTH).constraint()
    with pytest.raises(ModelError, match="does not continue the answer"):
        constraint.accept(answer_ids(chatml, "Sure")[0])


def test_thinking_is_free_and_the_answer_behind_it_is_not(chatml: Any) -> None:
    begin, end = (chatml.convert_tokens_to_ids(text) for text in ("<think>", "</think>"))
    grammar = AnswerGrammar(chatml, SCHEMA, WIDTH)
    prompt = answer_ids(chatml, "Which?")
    answer = answer_ids(chatml, '\n\n{"label": "fine", "score": 1}')
    assert not grammar.constraint([*prompt, begin, end]).waiting  # thinking is off
    for constraint in (grammar.constraint([*prompt, begin]), grammar.constraint(prompt, thinking=True)):
        for token in [begin, *answer_ids(chatml, "Let me see: {{")]:
            row = allowed([constraint])[0]
            assert row.sum() == WIDTH - len(stop_ids(chatml)) and not row[list(stop_ids(chatml))].any()
            constraint.accept(token)
        constraint.accept(end)
        assert constraint.accept_all(answer) and constraint.done
    assert not grammar.constraint().accept_all(answer)


def test_harmony_is_constrained_in_its_final_channel() -> None:
    from .conftest import make_tokenizer

    tokenizer = make_tokenizer("harmony")
    start, channel, message, end = (
        tokenizer.convert_tokens_to_ids(text)
        for text in ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
    )
    grammar = AnswerGrammar(tokenizer, SCHEMA, WIDTH, stop=[tokenizer.convert_tokens_to_ids("<|return|>")])
    prompt = prompt_ids(tokenizer, [Message("user", "Which?"), Message("assistant", "")])
    answer = answer_ids(tokenizer, '{"label": "fine", "score": 1}')
    assert channel in prompt and prompt[-1] == message
    assert grammar.accepts(answer, prompt)
    opened = prompt[: -1 - prompt[::-1].index(start)]
    analysis = [
        start,
        *answer_ids(tokenizer, "assistant"),
        channel,
        *answer_ids(tokenizer, "analysis"),
        message,
    ]
    final = [start, *answer_ids(tokenizer, "assistant"), channel, *answer_ids(tokenizer, "final"), message]
    thought = [*answer_ids(tokenizer, "It says fine."), end]
    assert grammar.accepts([*analysis[2:], *thought, *final, *answer], [*opened, *analysis[:2]])
    assert grammar.accepts([*thought, *final, *answer], [*opened, *analysis])
    assert not grammar.accepts([*thought, *final, *thought], [*opened, *analysis])


def test_logits_without_a_bit_are_minus_infinity() -> None:
    random = np.random.default_rng(2)
    for width in (32, 33, 400):
        mask = random.integers(-(2**31), 2**31, (3, -(-width // 32))).astype(np.int32)
        bits = np.unpackbits(mask.view(np.uint8), axis=1, bitorder="little")[:, :width]
        logits = random.normal(size=(3, width)).astype(np.float32)
        wanted = np.where(bits, logits, -np.inf)
        assert np.array_equal(np.array(allow_tokens(mx.array(logits), mask)), wanted)
        assert np.array_equal(np.array(allow_tokens(mx.array(logits), mx.array(mask))), wanted)


@pytest.mark.parametrize("name", ["music", "moderation"])
def test_the_packaged_tasks_have_grammars(chatml: Any, name: str) -> None:
    task = load_task(name)
    grammar = AnswerGrammar(chatml, task.schema, WIDTH)
    random = np.random.default_rng(0)
    texts = [chatml.decode(tokens) for _ in range(5) if (tokens := walk(grammar, random))]
    assert len(texts) > 3 and all(parse_answer(text, task.schema)[1] is None for text in texts)
