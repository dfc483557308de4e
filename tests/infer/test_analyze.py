from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.labels import LABEL_SETS, Counted, tokens_behind, with_labels
from helpers.small_chain import RecordedProgress

import mlx_distill as md
from mlx_distill.data.chat import prompt_ids
from mlx_distill.data.predictions import FORMAT, constrained_rows, read_predictions, write_predictions
from mlx_distill.data.rows import to_item
from mlx_distill.errors import ConfigError, DataError, Interrupted, ModelError
from mlx_distill.infer.analyze import Analyzer, ModelSource, analyze, check_rows
from mlx_distill.infer.engine import Generation
from mlx_distill.infer.label_scoring import label_prefix_tokens, label_probabilities
from mlx_distill.infer.predict import label_distributions, label_hook, predict, to_prediction
from mlx_distill.records import Prediction
from mlx_distill.tasks.task import Task, load_task

ITEMS = [{"id": i, "text": f"Gardeners are kind {i}.", "group": "gardeners"} for i in range(5)]


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task("moderation")


def prepared(task: Task, item: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The row that the prepare stage writes."""
    system, user = task.prompt(item)
    turns = [
        {"role": "system", "content": system},
        {"role": "user", "content": user},
        {"role": "assistant", "content": "{}"},
    ]
    return {
        "id": str(item["id"]),
        "messages": turns,
        "fields": {"group": item["group"]},
        "answer": None,
        "set": "test",
        **more,
    }


def test_answers_are_read_strictly(task: Task) -> None:
    texts = [
        '{"label": "fine", "confidence": 90}',
        '{"label": "nice", "confidence": 90}',
        'Sure: {"label": "fine", "confidence": 90}',
        '{"label": "fine", "confidence": 9',
    ]
    good, unknown, chatty, short = (
        to_prediction(
            to_item(item, task),
            Generation(text, (1, 2), 7, "length" if text.endswith("9") else "stop", 0.5),
            None,
            task,
        )
        for item, text in zip(ITEMS, texts, strict=False)
    )
    assert (good.label, good.score, good.error, good.answer) == (
        "fine",
        90.0,
        None,
        {"label": "fine", "confidence": 90},
    )
    assert (good.latency_s, good.tokens, good.label_probs, good.fields) == (
        0.5,
        2,
        None,
        {"group": "gardeners"},
    )
    assert [p.answer for p in (unknown, chatty, short)] == [None] * 3 and [
        p.label for p in (unknown, chatty, short)
    ] == [None] * 3
    assert (
        "'nice'" in str(unknown.error)
        and "not JSON" in str(chatty.error)
        and "cut after 2 tokens" in str(short.error)
    )
    assert chatty.text == texts[2]


def test_a_prepared_row_a_mapping_and_a_text_give_the_same_prompt(
    model: Any, tokenizer: Any, task: Task
) -> None:
    answers = [
        predict(model, tokenizer, task, [row], max_tokens=4)[0]
        for row in (prepared(task, ITEMS[1]), ITEMS[1], ITEMS[1]["text"])
    ]
    assert (
        len({(p.text, p.prompt_tokens, p.label_probs["fine"] if p.label_probs else None) for p in answers})
        == 1
    )
    messages = prepared(task, ITEMS[1])["messages"]
    assert answers[0].prompt_tokens == len(prompt_ids(tokenizer, messages))
    assert answers[0].id == answers[1].id == "1" and len(answers[2].id) == 16


@pytest.mark.slow
def test_every_row_has_its_distribution_and_batches_do_not_matter(
    model: Any, tokenizer: Any, task: Task
) -> None:
    done: list[int] = []
    one = predict(model, tokenizer, task, ITEMS, max_tokens=3, batch_size=1)
    all_at_once = predict(model, tokenizer, task, ITEMS, max_tokens=3, batch_size=8, on_done=done.append)
    assert [p.text for p in one] == [p.text for p in all_at_once] and done == [1, 2, 3, 4, 5]
    for a, b in zip(one, all_at_once, strict=True):
        assert (
            a.label_probs is not None
            and b.label_probs is not None
            and list(a.label_probs) == list(task.labels)
        )
        assert sum(a.label_probs.values()) == pytest.approx(1, abs=1e-5)
        assert a.label_probs["fine"] == pytest.approx(b.label_probs["fine"], abs=2e-5)


def test_distributions_come_from_the_hook_or_from_one_more_pass(
    model: Any, tokenizer: Any, task: Task
) -> None:
    """Every other answer begins as the schema has it; the hook's output of the others is of another place."""
    prefix = label_prefix_tokens(tokenizer, task)
    assert prefix is not None
    ids, labels = prefix
    hook = label_hook(model, prefix)
    prompts = [prompt_ids(tokenizer, to_item(item, task).messages) for item in ITEMS]
    expected = label_probabilities(model, [[*prompt, *ids] for prompt in prompts], labels)

    def answers(change: float) -> list[Generation]:
        out = []
        for number, prompt in enumerate(prompts):
            tokens = [*ids, 5] if number % 2 else [5, 6, 7, *ids]
            logits = model(mx.array([[*prompt, *tokens[: hook.step]]]))[:, -1]
            output = np.array(hook.read(logits, []))[0] + change
            out.append(Generation("", tuple(tokens), len(prompt), "length", 0.0, output))
        return out

    for change in (0.0, 1.0):
        distributions = label_distributions(model, prompts, answers(change), prefix)
        for number, (distribution, line) in enumerate(zip(distributions, expected, strict=True)):
            wanted = line * np.exp(change) if number % 2 else line
            np.testing.assert_allclose(list(distribution.values()), wanted, atol=1e-5)


def test_an_answer_that_begins_as_the_schema_has_it_costs_no_further_pass(
    model: Any, tokenizer: Any, task: Task
) -> None:
    prefix = label_prefix_tokens(tokenizer, task)
    assert prefix is not None
    prompts = [prompt_ids(tokenizer, to_item(item, task).messages) for item in ITEMS]

    class Forced:
        """The model, made to answer with the prefix. It has no trunk, so a pass that scores labels would
        fail.
        """

        layers = model.layers
        if hasattr(model, "make_cache"):
            make_cache = staticmethod(model.make_cache)

        def __call__(self, tokens: mx.array, cache: Any) -> mx.array:
            logits = model(tokens, cache=cache)
            for last, following in itertools.pairwise([prompts[0][-1], *prefix[0]]):
                logits[..., following] += 1e4 * (tokens == last)
            return logits

    assert len({prompt[-1] for prompt in prompts}) == 1 and len({prompts[0][-1], *prefix[0]}) > len(prefix[0])
    expected = label_probabilities(model, [[*prompt, *prefix[0]] for prompt in prompts], prefix[1])
    predictions = predict(Forced(), tokenizer, task, ITEMS, max_tokens=len(prefix[0]) + 2, batch_size=2)
    for prediction, line in zip(predictions, expected, strict=True):
        assert prediction.text.startswith('{"label": "') and prediction.label_probs is not None
        np.testing.assert_allclose(list(prediction.label_probs.values()), line, atol=2e-5)


def test_labels_that_share_tokens_are_continued_from_the_answers_own_cache(
    model: Any, tokenizer: Any, task: Task
) -> None:
    task = with_labels(task, LABEL_SETS["share more"])
    prefix = label_prefix_tokens(tokenizer, task)
    assert prefix is not None and len(prefix[1].nodes) > 1
    items = [{"text": "Gardeners are kind" + " and so on" * i} for i in range(4)]
    prompts = [prompt_ids(tokenizer, to_item(item, task).messages) for item in items]
    chain = [prompts[0][-1], *prefix[0]]

    class Forced(Counted):
        def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
            logits = super().__call__(inputs, cache)
            for last, following in itertools.pairwise(chain):
                logits[..., following] += 1e4 * (inputs == last)
            return logits

    expected = label_probabilities(model, [[*prompt, *prefix[0]] for prompt in prompts], prefix[1])
    steps = len(prefix[0]) + 5
    plain, forced = Forced(model), Forced(model)
    without = predict(plain, tokenizer, task, items, max_tokens=steps, batch_size=4, label_probs=False)
    predictions = predict(forced, tokenizer, task, items, max_tokens=steps, batch_size=4)
    assert forced.tokens - plain.tokens == 4 * tokens_behind(prefix[1])
    for prediction, other, line in zip(predictions, without, expected, strict=True):
        assert prediction.text == other.text and prediction.text.startswith('{"label": "')
        assert prediction.label_probs is not None
        np.testing.assert_allclose(list(prediction.label_probs.values()), line, atol=2e-5)


def test_analyze_takes_what_load_returns(model: Any, tokenizer: Any) -> None:
    first, second = md.analyze(
        (model, tokenizer), "moderation", [ITEMS[0], "The soup is cold."], max_tokens=5
    )
    assert isinstance(first, Prediction) and first.id == "0" and second.tokens <= 5
    assert md.analyze((model, tokenizer), "moderation", []) == []


def test_a_label_that_is_not_scored_is_noted_once(model: Any, tokenizer: Any, task: Task) -> None:
    properties = task.schema["properties"]
    later = {"confidence": properties["confidence"], "label": properties["label"]}
    progress = RecordedProgress()
    predictions = analyze(
        (model, tokenizer),
        replace(task, schema={**task.schema, "properties": later}),
        ITEMS,
        max_tokens=2,
        batch_size=1,
        progress=progress,
    )
    assert [p.label_probs for p in predictions] == [None] * len(ITEMS)
    assert sum("no distribution over the labels" in note for note in progress.notes) == 1


def test_an_item_that_cannot_be_asked_has_an_error_and_the_others_are_answered(
    model: Any, tokenizer: Any
) -> None:
    items: list[Any] = [ITEMS[0], {"id": "b", "txt": "typo"}, {"text": None}, {"text": ["a"]}, ITEMS[1]]
    answers = md.analyze((model, tokenizer), "moderation", items, max_tokens=3, max_prompt_tokens=500)
    alone = md.analyze((model, tokenizer), "moderation", [ITEMS[0], ITEMS[1]], max_tokens=3)
    assert [answer.id for answer in answers] == ["0", "b", "item 3", "item 4", "1"]
    assert [answers[0].text, answers[4].text] == [answer.text for answer in alone]
    assert [answer.error_kind for answer in answers[1:4]] == ["bad row"] * 3
    for answer, where, words in zip(
        answers[1:4], (2, 3, 4), ("no field 'text'", "is null", "text is needed"), strict=True
    ):
        assert f"item {where}: " in str(answer.error) and words in str(answer.error)


def test_one_analyzer_answers_several_threads(model: Any, tokenizer: Any) -> None:
    analyzer = md.Analyzer((model, tokenizer), "moderation", max_tokens=4, batch_size=2)
    expected = [prediction.text for prediction in analyzer.analyze(ITEMS)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: analyzer.analyze(ITEMS), range(8)))
    assert [[prediction.text for prediction in result] for result in results] == [expected] * 8


def test_items_are_read_as_they_are_answered(model: Any, tokenizer: Any) -> None:
    analyzer = md.Analyzer((model, tokenizer), "moderation", max_tokens=2, batch_size=1, label_probs=False)
    read = itertools.count()
    answers = analyzer.iter({"text": "a", "id": next(read)} for _ in itertools.repeat(None))
    assert [next(answers).id for _ in range(3)] == ["0", "1", "2"]
    assert next(read) == analyzer.chunk_size


def test_a_prompt_that_takes_long_to_read_is_noted_before(model: Any, tokenizer: Any, task: Task) -> None:
    class Stops(RecordedProgress):
        def note(self, text: str) -> None:
            if "takes long to read" in text:
                raise Interrupted(text)

    analyzer = Analyzer((model, tokenizer), task, progress=Stops(), max_prompt_tokens=20_000)
    with pytest.raises(Interrupted, match="item 2: a prompt of "):
        analyzer.analyze([{"id": i, "text": text} for i, text in enumerate(["a", "\u0394" * 6000])])


def test_rows_with_one_id_are_noted_before_a_model_is_loaded(task: Task) -> None:
    progress = RecordedProgress()
    rows = [(f"row {i}", {"id": id, "text": f"text {i}"}) for i, id in enumerate("abbcb")]
    assert check_rows(rows, ModelSource(("model", "tokenizer"), task), progress) == (5, 0)
    assert progress.notes == [
        "note: 2 rows with the id of an earlier row, such as 'b': their answers are told apart by the order "
        "alone"
    ]


def test_bad_items_are_found_before_a_model_is_loaded() -> None:
    with pytest.raises(DataError, match="item 1: no field 'text'") as caught:
        analyze("/no/such/model", "moderation", [{"body": "The soup is cold."}, {"text": None}])
    assert "rename the column of the row, such as body to text" in str(caught.value.fix)
    assert "columns:" not in str(caught.value.fix)
    with pytest.raises(DataError, match="item 1: a text alone"):
        analyze("/no/such/model", "music", ["la la la"])
    with pytest.raises(DataError, match="one item alone"):
        analyze("/no/such/model", "moderation", "The soup is cold.")
    for model in ("runs/nothere", "/no/such/model", "nothere"):
        with pytest.raises(ModelError, match=f"{model}: no such folder"):
            analyze(model, None, ITEMS)
    with pytest.raises(ConfigError, match="no task"):
        analyze("/no/such/model", "astrology", [])


def test_predictions_come_back_as_they_were_written(
    tmp_path: Path, model: Any, tokenizer: Any, task: Task
) -> None:
    truth = {"label": "fine", "confidence": 95}
    rows = [prepared(task, item, answer=truth, set="test" if item["id"] < 3 else "hand") for item in ITEMS]
    predictions = predict(model, tokenizer, task, rows, max_tokens=3)
    path = tmp_path / "predictions.jsonl"
    assert write_predictions(path, "student", task, rows, predictions, settings={"batch_size": 16}) == 5
    header, lines = read_predictions(path)
    assert header == {
        "format": FORMAT,
        "model": "student",
        "task": "moderation",
        "labels": ["hostile", "fine"],
        "set_counts": {"test": 3, "hand": 2},
        "constrained": False,
        "settings": {"batch_size": 16},
    }
    for line, row, prediction in zip(lines, rows, predictions, strict=True):
        assert (line["id"], line["set"], line["truth"], line["input"]) == (
            row["id"],
            row["set"],
            truth,
            row["messages"][1]["content"],
        )
        assert (line["text"], line["label_probs"], line["error"]) == (
            prediction.text,
            prediction.label_probs,
            prediction.error,
        )
        assert line["fields"] == {"group": "gardeners"} and line["title"] is None


def test_a_schema_without_a_grammar_is_refused_before_the_model_is_loaded(task: Task) -> None:
    tags = {"type": "array", "items": {"enum": ["a", "b"]}, "uniqueItems": True}
    properties = {**task.schema["properties"], "tags": tags}
    task = replace(task, schema={**task.schema, "properties": properties})
    source = ModelSource("/no/such/model", task)
    with pytest.raises(
        ConfigError, match=r"schema\.properties\.tags\.uniqueItems: a grammar cannot"
    ) as caught:
        Analyzer(source)
    assert "constrain=False" in str(caught.value.fix)
    for settings in ({"constrain": False}, {"labels_only": True}):
        with pytest.raises(ModelError, match="/no/such/model"):
            Analyzer(source, **settings)


def test_answers_under_the_grammar_stand_beside_the_free_ones(tmp_path: Path, task: Task) -> None:
    rows = [prepared(task, item) for item in ITEMS[:3]]
    free = [Prediction(row["id"], "Fine!", None, None, None, error="not JSON") for row in rows]
    other = Prediction(rows[1]["id"], "{}", {"label": "fine", "confidence": 7}, "fine", 7.0)
    path = tmp_path / "p.jsonl"
    write_predictions(path, "m", task, rows, free, constrained=[None, other, None])
    header, lines = read_predictions(path)
    assert header["constrained"] is True
    assert [line["constrained"] for line in lines] == [
        None,
        {"text": "{}", "answer": other.answer, "error": None, "label": "fine", "score": 7.0},
        None,
    ]
    both = constrained_rows(lines)
    assert [row["label"] for row in both] == [None, "fine", None]
    assert both[1]["input"] == lines[1]["input"] and both[1]["error"] is None
    with pytest.raises(DataError, match="one prediction a row"):
        write_predictions(path, "m", task, rows, free, constrained=[None])


def test_a_file_of_format_1_has_free_answers_alone(tmp_path: Path, task: Task) -> None:
    rows = [prepared(task, item) for item in ITEMS[:2]]
    path = tmp_path / "p.jsonl"
    write_predictions(path, "m", task, rows, [Prediction(row["id"], "", None, None, None) for row in rows])
    old = [json.loads(line) for line in path.read_text().splitlines()]
    old[0] = {**old[0], "format": 1}
    for line in old:
        del line["constrained"]
    path.write_text("\n".join(map(json.dumps, old)))
    header, lines = read_predictions(path)
    assert header["constrained"] is False and [line["constrained"] for line in lines] == [None, None]


def test_a_title_is_taken_from_the_fields(tmp_path: Path) -> None:
    task = load_task("music")
    row = {
        "id": "1",
        "messages": [{"role": "user", "content": "Rain\n\nla"}],
        "fields": {"title": "Rain"},
        "set": "test",
        "answer": None,
    }
    write_predictions(tmp_path / "p.jsonl", "m", task, [row], [Prediction("1", "", None, None, None)])
    line = read_predictions(tmp_path / "p.jsonl")[1][0]
    assert (line["title"], line["input"], line["truth"]) == ("Rain", "Rain\n\nla", None)


def test_predictions_of_other_rows_are_not_written(tmp_path: Path, task: Task) -> None:
    rows = [prepared(task, item) for item in ITEMS[:2]]
    right = [Prediction(row["id"], "", None, None, None) for row in rows]
    for wrong in (right[:1], right[::-1]):
        with pytest.raises(DataError):
            write_predictions(tmp_path / "p.jsonl", "m", task, rows, wrong)
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_format_or_a_damaged_one_is_refused(tmp_path: Path, task: Task) -> None:
    rows = [prepared(task, item) for item in ITEMS[:2]]
    path = tmp_path / "p.jsonl"
    write_predictions(path, "m", task, rows, [Prediction(row["id"], "", None, None, None) for row in rows])
    whole = path.read_text().splitlines()
    for lines, message in (
        ([], "empty"),
        (whole[1:], "no header"),
        ([whole[0].replace('"format": 2', '"format": 3'), *whole[1:]], "format 3"),
        (whole[:2], "1 rows, and the header counts 2"),
        ([whole[0], whole[1].replace('"score"', '"scare"'), whole[2]], ":2: no field 'score'"),
    ):
        path.write_text("\n".join(lines))
        with pytest.raises(DataError, match=message):
            read_predictions(path)
