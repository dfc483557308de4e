from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers import tokenizer_kinds
from helpers.labels import LABEL_SETS, with_labels
from helpers.schemas import random_schema

from mlx_distill.data.chat import answer_ids, prompt_ids, stop_ids
from mlx_distill.data.rows import to_item
from mlx_distill.errors import ConfigError, ModelError
from mlx_distill.infer.analyze import Analyzer
from mlx_distill.infer.constrained import AnswerConstraint, AnswerGrammar, fill_masks
from mlx_distill.infer.engine import generate
from mlx_distill.infer.label_scoring import label_prefix_tokens, label_probabilities
from mlx_distill.infer.predict import item_prompt, label_hook, predict, predict_both, to_predictions
from mlx_distill.infer.sampling import allow_tokens
from mlx_distill.losses.token_bytes import token_bytes
from mlx_distill.models.forward import head_columns
from mlx_distill.records import Message, Prediction
from mlx_distill.tasks.answer import dump_answer, parse_answer
from mlx_distill.tasks.task import load_task

from .conftest import make_model, make_tokenizer

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
    for number in range(40):
        schema = random_schema(random, bounded=number % 3 > 0)
        grammar = AnswerGrammar(chatml, schema, WIDTH)
        for _ in range(2):
            if (tokens := walk(grammar, random)) is not None:
                complete += 1
                text = chatml.decode(tokens)
                _, error = parse_answer(text, schema)
                assert error is None, (error, text, json.dumps(schema))
                assert grammar.allows(tokens)
    assert complete > 70


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
            assert grammar.allows(answer_ids(tokenizer, text)), text
            checked += 1
    assert checked > 7


@pytest.mark.parametrize("kind", ["lower", "word_piece"])
def test_a_tokenizer_whose_tokens_have_no_bytes_is_refused_with_the_way_out(kind: str) -> None:
    with pytest.raises(ModelError, match="no-constrain"):
        AnswerGrammar(chat_tokenizer(kind), SCHEMA, 500)


def prompts_of(tokenizer: Any, count: int) -> list[list[int]]:
    texts = [f"row {number}" + " and more" * (number % 7) for number in range(count)]
    return [prompt_ids(tokenizer, [Message("user", text), Message("assistant", "")]) for text in texts]


def test_a_batch_of_several_schemas_gives_the_answers_of_each_alone(model: Any, tokenizer: Any) -> None:
    random = np.random.default_rng(5)
    grammars = [AnswerGrammar(tokenizer, random_schema(random), head_columns(model)) for _ in range(5)]
    prompts = prompts_of(tokenizer, 7)
    wanted = [constrained_greedy(model, prompts[i], grammars[i], 24) for i in range(5)]
    free = generate(model, tokenizer, prompts[5:], max_tokens=24, stop=set(stop_ids(tokenizer)))
    constraints = [*(grammar.constraint(prompts[i]) for i, grammar in enumerate(grammars)), None, None]
    got = generate(
        model, tokenizer, prompts, max_tokens=24, stop=set(stop_ids(tokenizer)), constraints=constraints
    )
    assert [(list(g.tokens), g.finish) for g in got[:5]] == wanted
    assert [g.tokens for g in got[5:]] == [g.tokens for g in free]
    assert {finish for _, finish in wanted} == {"stop", "length"}


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_all_answers_of_an_untrained_model_parse_but_those_that_are_cut(
    model: Any, tokenizer: Any, temperature: float
) -> None:
    random = np.random.default_rng(11)
    schemas = [random_schema(random) for _ in range(32)]
    grammars = [AnswerGrammar(tokenizer, schema, head_columns(model)) for schema in schemas]
    prompts = prompts_of(tokenizer, len(schemas))
    generations = generate(
        model,
        tokenizer,
        prompts,
        max_tokens=120,
        stop=set(stop_ids(tokenizer)),
        temperature=temperature,
        constraints=[g.constraint(prompt) for g, prompt in zip(grammars, prompts, strict=True)],
    )
    whole = [(g, schema) for g, schema in zip(generations, schemas, strict=True) if g.finish == "stop"]
    assert len(whole) > 20
    errors = [parse_answer(generation.text, schema)[1] for generation, schema in whole]
    assert errors == [None] * len(whole)


@pytest.mark.slow
def test_an_answer_that_the_grammar_allows_is_not_generated_again(model: Any, chatml: Any) -> None:
    """A task whose answers are whatever the untrained model writes freely."""
    task = load_task("moderation")
    rows = [{"text": f"The soup is cold, {number}."} for number in range(3)]
    settings: dict[str, Any] = {"max_tokens": 20, "batch_size": 4}
    both = predict_both(model, chatml, task, rows, **settings)
    free = predict(model, chatml, task, rows, **settings)
    alone = predict(model, chatml, task, rows, constrain=True, **settings)

    def facts(prediction: Prediction) -> tuple[Any, ...]:
        return prediction.text, prediction.answer, prediction.error, prediction.label, prediction.label_probs

    assert [facts(own) for own, _ in both] == [facts(prediction) for prediction in free]
    assert all(own.answer is None for own, _ in both)  # untrained, so each is generated again
    assert [other and facts(other)[:4] for _, other in both] == [facts(p)[:4] for p in alone]
    assert all(p.answer is not None or str(p.error).startswith("cut after 20 tokens") for p in alone)
    assert [other for _, other in predict_both(model, chatml, task, rows, constrain=False, **settings)] == [
        None
    ] * 3
    grammar = AnswerGrammar(chatml, task.schema, head_columns(model))
    prompt = prompts_of(chatml, 1)[0]
    tokens, _ = constrained_greedy(model, prompt, grammar, 20)
    assert grammar.allows(tokens[:3], prompt, whole=False) and not grammar.allows(tokens[:3], prompt)


@pytest.mark.slow
@pytest.mark.parametrize("names", ["differ at once", "begin one another", "many"])
def test_the_grammar_leaves_the_distribution_over_the_labels(model: Any, tokenizer: Any, names: str) -> None:
    task = with_labels(load_task("moderation"), LABEL_SETS[names])
    prefix = label_prefix_tokens(tokenizer, task)
    assert prefix is not None
    ids, labels = prefix
    items = [{"text": f"Gardeners are kind {number}."} for number in range(3)]
    prompts = [item_prompt(tokenizer, to_item(item, task)) for item in items]
    assert len({len(prompt) for prompt in prompts}) == 1
    plain = label_probabilities(model, [[*prompt, *ids] for prompt in prompts], labels)

    class Begins:
        """The model, made to begin with the prefix. It has no trunk, so another pass would fail."""

        layers = model.layers
        if hasattr(model, "make_cache"):
            make_cache = staticmethod(model.make_cache)

        def __call__(self, tokens: mx.array, cache: Any) -> mx.array:
            before = cache[0].offset + mx.zeros((len(tokens),), dtype=mx.int32)  # of each row
            logits = model(tokens, cache=cache)
            for row, place in enumerate(before.tolist() if tokens.shape[1] == 1 else []):
                at = place + 1 - len(prompts[row])
                if 0 <= at < len(ids):
                    logits[row, :, ids[at]] += 1e4
            return logits

    def ask(asked: Any, constrain: bool) -> list[Prediction]:
        if constrain:
            grammar = AnswerGrammar(tokenizer, task.schema, head_columns(model))
            constraints = [grammar.constraint(prompt) for prompt in prompts]
        generations = generate(
            asked,
            tokenizer,
            prompts,
            max_tokens=len(ids) + 2,
            stop=set(stop_ids(tokenizer)),
            constraints=constraints if constrain else None,
            logits_hook=label_hook(model, prefix),
        )
        parsed = [to_item(item, task) for item in items]
        return to_predictions(asked, tokenizer, task, parsed, prompts, generations)

    begun = [ask(Begins(), constrain) for constrain in (True, False)]  # from the hook
    assert all(p.text.startswith('{"label": "') for answers in begun for p in answers)
    others = [ask(model, constrain) for constrain in (True, False)]
    assert all(p.text != q.text for p, q in zip(*others, strict=True))
    for answers in (*begun, *others):
        found = [list(p.label_probs.values()) for p in answers if p.label_probs is not None]
        np.testing.assert_allclose(found, plain, atol=2e-5)


def test_sampled_answers_are_not_taken_for_those_of_the_grammar(model: Any, tokenizer: Any) -> None:
    task, rows = load_task("moderation"), [{"text": "The soup is cold."}]
    with pytest.raises(ConfigError, match=r"temperature 0\.5"):
        predict_both(model, tokenizer, task, rows, max_tokens=2, temperature=0.5)
    ((free, other),) = predict_both(
        model, tokenizer, task, rows, max_tokens=2, temperature=0.5, constrain=False, label_probs=False
    )
    assert other is None and free.tokens == 2


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


class GivesUp(AnswerConstraint):
    """Llguidance's error, where it is asked for the mask of the third token."""

    def accept(self, token: int) -> None:
        super().accept(token)
        self.count = getattr(self, "count", 0) + 1
        if self.count == 2:
            assert not self.matcher.consume_token(self.grammar.table.end) and self.matcher.is_error()


def make_grammar(asked: set[tuple[int, ...]]) -> Any:
    """A function like ``task_grammar``, whose constraints give up behind some prompts."""

    class Grammar(AnswerGrammar):
        def constraint(self, prompt: Sequence[int] = (), *, thinking: bool = False) -> AnswerConstraint:
            constraint = super().constraint(prompt, thinking=thinking)
            if tuple(prompt) in asked:
                constraint.__class__ = GivesUp
            return constraint

    return lambda model, tokenizer, task: Grammar(tokenizer, task.schema, head_columns(model))


@pytest.mark.slow
def test_a_grammar_that_gives_up_is_the_error_of_its_row(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = load_task("moderation")
    items = [{"text": f"The soup is cold, {number}."} for number in range(4)]
    settings: dict[str, Any] = {"max_tokens": 24, "batch_size": 4}
    wanted = predict(model, tokenizer, task, items, constrain=True, **settings)
    bad = tuple(item_prompt(tokenizer, to_item(items[2], task)))
    monkeypatch.setattr("mlx_distill.infer.predict.task_grammar", make_grammar({bad}))
    analyzer = Analyzer((model, tokenizer), task, **settings)
    both = predict_both(model, tokenizer, task, items, **settings)
    got = [other or own for own, other in both]
    for answers in (
        predict(model, tokenizer, task, items, constrain=True, **settings),
        analyzer.analyze(items),
        got,
    ):
        assert [p.answer for p in answers[:2] + answers[3:]] == [p.answer for p in wanted[:2] + wanted[3:]]
        assert answers[2].answer is None and answers[2].error_kind == "generation failed"
        assert "no next token" in str(answers[2].error) and answers[2].id == wanted[2].id
    assert sum(p.answer is not None for p in wanted) > 1
    constraint = make_grammar({bad})(model, tokenizer, task).constraint(bad)
    with pytest.raises(ModelError, match="no next token"):
        generate(
            model,
            tokenizer,
            [list(bad)],
            max_tokens=9,
            stop=set(stop_ids(tokenizer)),
            constraints=[constraint],
        )


def test_thinking_is_free_and_the_answer_behind_it_is_not(chatml: Any) -> None:
    begin, end = (chatml.convert_tokens_to_ids(text) for text in ("<think>", "</think>"))
    grammar = AnswerGrammar(chatml, SCHEMA, WIDTH)
    prompt = answer_ids(chatml, "Which?")
    answer = answer_ids(chatml, '{"label": "fine", "score": 1}')
    stop = list(stop_ids(chatml))
    closed = prompt_ids(chatml, [Message("user", "Which?"), Message("assistant", "")])
    header = closed[closed.index(end) + 1 :]  # white space of the template
    assert grammar.allows(answer, closed) and grammar.allows(answer, [*prompt, begin, end])  # thinking is off
    for constraint in (grammar.constraint([*prompt, begin]), grammar.constraint(prompt, thinking=True)):
        if not constraint.waiting:
            assert set(np.flatnonzero(allowed([constraint])[0])) >= {begin, answer[0]}
            constraint.accept(begin)
        for token in answer_ids(chatml, "Let me see: {{"):
            row = allowed([constraint])[0]
            assert row.sum() == WIDTH - len(stop) and not row[stop].any()
            constraint.accept(token)
        constraint.accept(end)
        for token in header:
            assert set(np.flatnonzero(allowed([constraint])[0])) == {token}
            constraint.accept(token)
        assert not constraint.waiting and constraint.accept_all(answer) and constraint.done
    assert not grammar.allows([begin, end, *answer], prompt)
    with pytest.raises(ModelError):
        grammar.constraint(prompt).accept(begin)


HARMONY_ANALYSIS = "<|channel|>analysis<|message|>lovely {<|end|>"
HARMONY_TOOL = "<|start|>assistant<|channel|>commentary to=functions.a<|message|>lovely<|end|>"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "thinks", "more"),
    [
        ("harmony", HARMONY_ANALYSIS + "<|return|>", ""),  # wants to end at once
        ("harmony", HARMONY_ANALYSIS + HARMONY_TOOL + "<|start|>assistant<|channel|>final<|message|>Hi", ""),
        ("harmony", HARMONY_ANALYSIS, "<|start|>assistant<|channel|>final <|constrain|>json<|message|>Hi"),
        ("harmony", "<|channel|>final <|constrain|>json<|message|>lovely", ""),
        ("qwen3", "<think>\nlovely {\n</think><|im_end|>", ""),
        ("qwen3", "<think>\nlovely {\n</think>\n\nHi", ""),
        ("qwen3.5", "lovely {\n</think>\n\nHi", ""),
        ("glm", "lovely {</think>Hi", ""),
        ("nemotron", "lovely {\n</think><|im_end|>", ""),
    ],
)
def test_a_model_that_thinks_first_goes_on_to_its_answer(family: str, thinks: str, more: str) -> None:
    """A model that is made to write the text, where the grammar lets it."""
    tokenizer = make_tokenizer("chatml", family)
    inner = make_model("chatml", 500)
    asked = [{"role": "user", "content": "hm"}]
    text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    if text.rstrip().endswith("</think>"):  # with thinking on these templates begin the block
        text = text[: text.rindex("<think>") + len("<think>")]
    prompt, said = (tokenizer.encode(part, add_special_tokens=False) for part in (text, thinks + more))

    class Scripted:
        layers, args = inner.layers, inner.args

        def __call__(self, tokens: mx.array, cache: Any) -> mx.array:
            logits = inner(tokens, cache=cache)
            after = cache[0].offset[:, None, None] - len(prompt)
            script = mx.array([*said, 0])[mx.clip(after, 0, len(said))]
            return logits + 1e4 * (mx.arange(logits.shape[-1]) == script)

    stop = stop_ids(tokenizer)
    schema = {"type": "object", "properties": {"label": {"enum": ["hostile", "fine"]}}, "required": ["label"]}
    grammar = AnswerGrammar(tokenizer, schema, 500, stop=stop)
    constraint = grammar.constraint(prompt, thinking=True)
    (answer,) = generate(
        Scripted(), tokenizer, [prompt], max_tokens=120, stop=set(stop), constraints=[constraint]
    )
    assert answer.finish == "stop" and parse_answer(answer.text, schema)[1] is None, answer
    assert "lovely" in answer.thinking or "constrain" in thinks and not answer.text.count("lovely")


def test_harmony_is_constrained_in_its_final_channel() -> None:
    tokenizer = make_tokenizer("harmony")
    start, channel, message, end = (
        tokenizer.convert_tokens_to_ids(text)
        for text in ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
    )
    grammar = AnswerGrammar(tokenizer, SCHEMA, WIDTH)
    prompt = prompt_ids(tokenizer, [Message("user", "Which?"), Message("assistant", "")])
    answer = answer_ids(tokenizer, '{"label": "fine", "score": 1}')
    assert channel in prompt and prompt[-1] == message and end in stop_ids(tokenizer)
    assert grammar.allows(answer, prompt)
    place = len(prompt) - 1 - prompt[::-1].index(start)
    opened, final = prompt[:place], prompt[place:]
    analysis = [*final[: final.index(channel) + 1], *answer_ids(tokenizer, "analysis"), message]
    constraint = grammar.constraint([*opened, *analysis])
    for token in [*answer_ids(tokenizer, "It says fine."), end]:
        row = allowed([constraint])[0]
        assert row[token] and not row[tokenizer.convert_tokens_to_ids("<|return|>")]
        constraint.accept(token)
    for token in final:  # the header of the answer is the template's
        assert set(np.flatnonzero(allowed([constraint])[0])) == {token}
        constraint.accept(token)
    assert constraint.accept_all(answer) and constraint.done
    thought = [*answer_ids(tokenizer, "It says fine."), end]
    assert not grammar.allows([*thought, *final, *thought], [*opened, *analysis])


def test_logits_without_a_bit_are_minus_infinity() -> None:
    random = np.random.default_rng(2)
    for width in (32, 33, 400):
        mask = random.integers(-(2**31), 2**31, (3, -(-width // 32))).astype(np.int32)
        bits = np.unpackbits(mask.view(np.uint8), axis=1, bitorder="little")[:, :width]
        logits = random.normal(size=(3, width)).astype(np.float32)
        wanted = np.where(bits, logits, -np.inf)
        assert np.array_equal(np.array(allow_tokens(mx.array(logits), mask)), wanted)


@pytest.mark.parametrize("name", ["music", "moderation"])
def test_the_packaged_tasks_have_grammars(chatml: Any, name: str) -> None:
    task = load_task(name)
    grammar = AnswerGrammar(chatml, task.schema, WIDTH)
    random = np.random.default_rng(0)
    texts = [chatml.decode(tokens) for _ in range(5) if (tokens := walk(grammar, random))]
    assert len(texts) > 3 and all(parse_answer(text, task.schema)[1] is None for text in texts)
