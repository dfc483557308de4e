"""A model that thinks, exported, quantized and converted: the same prompts, the same answers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from helpers import small_run
from helpers.thinking import BUDGET, LEARNED, write_thinking_model

import mlx_distill as md
from mlx_distill.config import ASSETS
from mlx_distill.data.chat import prompt_ids
from mlx_distill.errors import DataError
from mlx_distill.evaluate.artifact import check_artifact
from mlx_distill.inspection import inspect
from mlx_distill.models.adapters import LoraSettings, add_lora, save_adapter
from mlx_distill.models.convert import convert
from mlx_distill.models.export import to_hf, to_peft
from mlx_distill.models.load import load, load_tokenizer
from mlx_distill.models.quantize import quantize_folder
from mlx_distill.models.trained_on import read_trained_on, write_trained_on
from mlx_distill.progress import NullProgress
from mlx_distill.report.card_prompts import prompt_lines
from mlx_distill.report.model_card import card_text
from mlx_distill.tasks.task import parse_task
from mlx_distill.thinking import set_thinking, thinking_budget, write_thinking

TURNS = [{"role": "user", "content": "a red otter"}]
TASK = parse_task(small_run.TASK, "task")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model``; ``base``, the same weights without what it was trained for; ``adapter`` on it, of zeros."""
    folder = tmp_path_factory.mktemp("models")
    write_thinking_model(folder / "hf")
    convert(folder / "hf", folder / "model")
    convert(folder / "hf", folder / "base")
    write_thinking(folder / "base", 0)
    other = parse_task({**small_run.TASK, "name": "other"}, "task")
    write_trained_on(folder / "base", other, [{"messages": [{"role": "user", "content": "a"}]}])
    model, _ = load(folder / "base")
    add_lora(model, LoraSettings(2, 4.0, 0.0, ("q_proj",)))
    save_adapter(model, folder / "adapter", LoraSettings(2, 4.0, 0.0, ("q_proj",)), folder / "base")
    write_thinking(folder / "adapter", BUDGET)
    chats = [{"messages": [{"role": "system", "content": small_run.TASK["system"]}]}]
    write_trained_on(folder / "adapter", TASK, chats)
    return folder


def assert_thinks(model: Path, folder: Path) -> None:
    tokenizer, own = load_tokenizer(model), load_tokenizer(folder / "model")
    assert thinking_budget(tokenizer) == BUDGET
    assert prompt_ids(tokenizer, TURNS) == prompt_ids(own, TURNS)
    answers = md.analyze(str(model), TASK, list(LEARNED), progress=NullProgress())
    assert [answer.text for answer in answers] == [answer for _, answer in LEARNED.values()]


def make(kind: str, folder: Path, to: Path) -> Path:
    source = folder / "adapter"
    if kind == "hf of a model":
        to_hf(folder / "model", to / "out")
    elif kind == "hf":
        to_hf(source, to / "out")
    elif kind == "hf, adapter kept":
        to_hf(source, to / "hf", adapter="keep")
        convert(to / "hf", to / "base")
        convert(to / "hf" / "adapter", to / "out", base=to / "base")
    elif kind == "peft":
        to_peft(source, to / "peft")
        convert(to / "peft", to / "out", base=folder / "base")
    elif kind == "converted again":
        to_hf(source, to / "hf")
        convert(to / "hf", to / "out", quantize="affine8")
    else:
        quantize_folder(source, to / "out", "affine8", adapter=kind)
    return to / "out"


@pytest.mark.parametrize(
    "kind", ["hf of a model", "hf", "hf, adapter kept", "peft", "converted again", "merge", "keep"]
)
def test_it_thinks_as_before(folder: Path, tmp_path: Path, kind: str) -> None:
    made = make(kind, folder, tmp_path)
    assert_thinks(made, folder)
    trained_on = read_trained_on(made)
    if kind not in ("peft", "hf, adapter kept"):  # PEFT's format has the adapter alone
        assert trained_on is not None and trained_on.task is not None
        assert trained_on.task.name == TASK.name
        assert trained_on.system_prompts == (small_run.TASK["system"],)


@pytest.mark.parametrize(
    ("asset", "thinks", "call", "added"),
    [
        ("tiny-qwen3", False, {"enable_thinking": False}, ""),
        ("tiny-qwen3", True, {}, "<think>\n"),
        ("tiny-gpt-oss", False, {"reasoning_effort": "low"}, "<|channel|>final<|message|>"),
        ("tiny-gpt-oss", True, {"reasoning_effort": "low"}, "<|channel|>analysis<|message|>"),
    ],
)
def test_the_card_says_how_transformers_makes_the_prompts(
    asset: str, thinks: bool, call: dict[str, Any], added: str
) -> None:
    tokenizer = load_tokenizer(ASSETS / "models" / asset)
    set_thinking(tokenizer, BUDGET if thinks else 0)
    (line,) = prompt_lines(tokenizer)
    assert line.startswith("It thinks before it answers, in at most 24" if thinks else "It answers at once")
    given = "".join(f", {name}={value!r}" for name, value in call.items())
    wanted = f"`apply_chat_template(messages, add_generation_prompt=True{given})` makes"
    code = added.replace("\n", "\\n")
    assert line.endswith(f"behind what {wanted}, add `{code}`." if added else f"{wanted} them so.")
    text = tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True, **call) + added
    own = tokenizer.decode(prompt_ids(tokenizer, TURNS))
    date = re.compile(r"\d{4}-\d\d-\d\d")  # of harmony's system message
    assert date.sub("", text) == date.sub("", own)


def test_the_card_of_an_export_has_its_prompts(folder: Path, tmp_path: Path) -> None:
    to_hf(folder / "adapter", tmp_path / "hf", card=card_text)
    for model in (tmp_path / "hf", folder / "adapter"):
        assert "thinks before it answers, in at most 24 tokens" in inspect(model).facts["template"]
    assert "think" not in inspect(folder / "base").facts["template"]
    card = (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
    assert "## Prompts\n\nIt thinks before it answers, in at most 24 tokens. " in card


def test_an_adapter_that_does_not_think_on_a_base_that_does(folder: Path, tmp_path: Path) -> None:
    write_thinking(folder / "base", BUDGET)
    write_thinking(folder / "adapter", 0)
    try:
        for kind in ("hf", "peft", "merge", "keep"):
            (tmp_path / kind).mkdir()
            tokenizer = load_tokenizer(make(kind, folder, tmp_path / kind))
            assert thinking_budget(tokenizer) == 0
            assert prompt_ids(tokenizer, TURNS) == prompt_ids(tokenizer, TURNS, thinking=False)
    finally:
        write_thinking(folder / "base", 0)
        write_thinking(folder / "adapter", BUDGET)


def test_answers_that_are_not_reached_are_no_check_of_an_export(folder: Path, tmp_path: Path) -> None:
    to_hf(folder / "adapter", tmp_path / "hf")
    rows: list[tuple[str, Any]] = [(text, {"text": text}) for text in LEARNED]
    check = check_artifact(folder / "adapter", tmp_path / "hf", rows, TASK, progress=NullProgress())
    assert check["passed"] and check["rows"] == 2 and not check["not_asked"]
    write_thinking(folder / "adapter", 3)
    try:
        with pytest.raises(DataError, match="whose thinking it ends"):
            check_artifact(folder / "adapter", tmp_path / "hf", rows, TASK, progress=NullProgress())
    finally:
        write_thinking(folder / "adapter", BUDGET)
