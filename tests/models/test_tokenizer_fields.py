"""Fields of tokenizer_config.json and tokenizer.json: as in transformers, named in a note, or refused.

Oracle: transformers' ``apply_chat_template(tokenize=True)`` of the same folder.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.tokenizer_kinds import make

from mlx_distill.data.chat import prompt_ids, render, stop_ids
from mlx_distill.errors import DataError, ModelError
from mlx_distill.losses.token_bytes import token_bytes
from mlx_distill.models.config_files import load_config
from mlx_distill.models.load import load_tokenizer
from mlx_distill.storage import write_json

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_BOS = "{{ bos_token }}" + CHATML
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "<|im_end|>",
    "pad_token": "<unk>",
    "unk_token": "<unk>",
    "chat_template": CHATML,
}
CHAT = [
    {"role": "user", "content": "  The answer is hope, AND  Grace ; a café . "},
    {"role": "assistant", "content": '{"label": "fine", "score": 73}'},
    {"role": "user", "content": "there "},
    {"role": "assistant", "content": "fine"},
]
# Byte-level, Metaspace, and Replace with a Prepend.
KINDS = ("qwen", "mistral", "llama2")
Change = Callable[[dict[str, Any]], Any]


def folder_of(
    folder: Path, kind: str, config: dict[str, Any] | None = None, change: Change | None = None
) -> Path:
    folder.mkdir(exist_ok=True)
    raw = json.loads(make(kind).to_str())
    if change is not None:
        change(raw)
    write_json(folder / "tokenizer.json", raw)
    write_json(folder / "tokenizer_config.json", {**CONFIG, **(config or {})})
    return folder


def flags(content: str, **values: bool) -> Change:
    """Set flags of an added token of tokenizer.json."""

    def change(raw: dict[str, Any]) -> None:
        next(token for token in raw["added_tokens"] if token["content"] == content).update(values)

    return change


def entry(number: int, content: str, **values: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"added_tokens_decoder": {str(number): {"content": content, "special": True, **plain, **values}}}


def add_bos(raw: dict[str, Any]) -> None:
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, text],
        "pair": [bos, text, second],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }


def lower_case(raw: dict[str, Any]) -> None:
    own = [raw["normalizer"]] if raw["normalizer"] else []
    raw["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, *own]}


def truncate(raw: dict[str, Any]) -> None:
    raw["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}


def pad(raw: dict[str, Any]) -> None:
    raw["padding"] = {
        "strategy": {"Fixed": 90},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<unk>",
    }


def is_as_in_transformers(folder: Path, tokenizer: Any) -> bool:
    from transformers import AutoTokenizer

    oracle = AutoTokenizer.from_pretrained(folder)
    whole = oracle.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    prompt = oracle.apply_chat_template(
        CHAT[:-1], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    row = render(tokenizer, CHAT).tokens.tolist()
    return bool(row == whole[: len(row)] and prompt_ids(tokenizer, CHAT) == prompt)


HONOURED: dict[str, tuple[dict[str, Any], Change | None]] = {
    "plain": ({}, None),
    "add_bos_token, the template writes none": ({"add_bos_token": True}, None),
    "add_bos_token, the template writes one": ({"add_bos_token": True, "chat_template": WITH_BOS}, None),
    "add_eos_token": ({"add_eos_token": True}, None),
    "no bos_token": ({"bos_token": None, "chat_template": WITH_BOS}, None),
    "no eos_token": ({"eos_token": None}, None),
    "a pad_token without a number": ({"pad_token": "<pad>"}, None),
    "a token as an object": (
        {"eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "lstrip": True, "normalized": False}},
        None,
    ),
    "add_prefix_space": ({"add_prefix_space": True, "tokenizer_class": "LlamaTokenizer"}, None),
    "no prefix space": ({"add_prefix_space": False, "tokenizer_class": "LlamaTokenizer"}, None),
    "tokenizer_class GPT2": ({"add_prefix_space": True, "tokenizer_class": "GPT2Tokenizer"}, None),
    "tokenizer_class Qwen2": ({"tokenizer_class": "Qwen2Tokenizer"}, None),
    "an unknown tokenizer_class": ({"tokenizer_class": "NewTokenizer"}, None),
    "legacy": ({"legacy": True, "tokenizer_class": "LlamaTokenizer"}, None),
    "do_lower_case": ({"do_lower_case": True}, None),
    "model_max_length": ({"model_max_length": 4}, None),
    "sides": ({"padding_side": "left", "truncation_side": "left"}, None),
    "additional_special_tokens": ({"additional_special_tokens": ["<|im_start|>", "<|img|>"]}, None),
    "extra_special_tokens": ({"extra_special_tokens": {"image_token": "<|img|>"}}, None),
    "named templates": (
        {"chat_template": [{"name": n, "template": t} for n, t in (("rag", "x"), ("default", CHATML))]},
        None,
    ),
    "response_schema": ({"response_schema": {"type": "object"}, "response_template": {"a": "b"}}, None),
    # tokenizer.json says what an added token is; tokenizer_config.json does not change it.
    "an entry with other flags": (entry(4, "<|im_end|>", lstrip=True, rstrip=True), None),
    "an entry with another number": (entry(7, "<|im_end|>"), None),
    "lstrip": ({}, flags("<|im_end|>", lstrip=True)),
    "rstrip": ({}, flags("<|im_end|>", rstrip=True)),
    "both at the beginning": ({}, flags("<|im_start|>", lstrip=True, rstrip=True)),
    "not special": ({}, flags("<|im_end|>", special=False)),
    "post_processor": ({}, add_bos),
    "normalizer": ({}, lower_case),
    "truncation": ({}, truncate),
    "padding": ({}, pad),
}


@pytest.mark.parametrize("name", HONOURED)
def test_a_chat_has_the_tokens_of_transformers(name: str, tmp_path: Path) -> None:
    for kind in KINDS[:2]:
        folder = folder_of(tmp_path / kind, kind, *HONOURED[name])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tokenizer = load_tokenizer(folder)
        assert is_as_in_transformers(folder, tokenizer), kind


def test_a_template_in_a_file_goes_before_that_of_the_config(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", "qwen", {"chat_template": "another {{ messages[0].content }}"})
    (folder / "chat_template.jinja").write_text(CHATML)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("a third one")
    assert is_as_in_transformers(folder, load_tokenizer(folder))


def test_templates_without_a_default_are_refused_by_their_names(tmp_path: Path) -> None:
    named = [{"name": "rag", "template": CHATML}, {"name": "other", "template": CHATML}]
    tokenizer = load_tokenizer(folder_of(tmp_path / "model", "qwen", {"chat_template": named}))
    with pytest.raises(DataError, match=r"no default.*\['other', 'rag'\]"):
        render(tokenizer, CHAT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [truncate, pad])
def test_no_text_is_cut_or_padded_whoever_encodes_it(change: Change, kind: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_of(tmp_path / "model", kind, {"model_max_length": 4}, change))
    text = "the theory of the weather " * 9
    wanted = make(kind).encode(text, add_special_tokens=False).ids
    assert tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids == wanted
    assert tokenizer.encode(text, add_special_tokens=False) == wanted
    assert token_bytes(tokenizer) == token_bytes(load_tokenizer(folder_of(tmp_path / "plain", kind)))


NOTED: list[tuple[str, dict[str, Any], Change | None, str]] = [
    ("qwen", {"split_special_tokens": True}, None, r"tokenizer_config\.json: split_special_tokens is not"),
    ("mistral", {"split_special_tokens": True}, None, r"tokenizer_config\.json: split_special_tokens is not"),
    ("helium", {"clean_up_tokenization_spaces": True}, None, "clean_up_tokenization_spaces is not used"),
    ("qwen", {"eos_token": "<|new|>"}, None, r"eos_token '<\|new\|>' is not in tokenizer\.json"),
    ("qwen", {"bos_token": "<x>", "unk_token": "<y>"}, None, "bos_token '<x>' and unk_token '<y>' are not"),
    ("mistral", {}, lambda raw: raw["model"].update(dropout=0.5), r"tokenizer\.json: model\.dropout is not"),
    ("mistral", {}, flags("<|im_end|>", single_word=True), r"single_word of '<\|im_end\|>' is not used"),
    ("llama2", {}, flags("<|im_start|>", normalized=True), r"normalized or .* of '<\|im_start\|>' is not"),
]


@pytest.mark.parametrize(("kind", "config", "change", "note"), NOTED)
def test_what_is_done_in_another_way_is_noted(
    kind: str, config: dict[str, Any], change: Change | None, note: str, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path / "model", kind, config, change)
    with pytest.warns(UserWarning, match=note) as caught:
        tokenizer = load_tokenizer(folder)
    assert len(caught) == 1
    plain = load_tokenizer(folder_of(tmp_path / "plain", kind))
    assert render(tokenizer, CHAT).tokens.tolist() == render(plain, CHAT).tokens.tolist()
    answer = "hope , grace . it is n't"
    ids = tokenizer.encode(answer, add_special_tokens=False)
    assert tokenizer.decode(ids) == plain.decode(ids)


def test_another_spelling_of_a_control_token_stays_text_or_is_refused(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a <|IM_END|> b"}, CHAT[1]]
    tokenizer = load_tokenizer(folder_of(tmp_path / "model", "qwen", {}, lower_case))
    assert render(tokenizer, chat).prompt.tolist().count(4) == 1
    both = [flags("<|im_end|>", normalized=True), lower_case]
    folder = folder_of(tmp_path / "model", "qwen", {}, lambda raw: [change(raw) for change in both])
    tokenizer = load_tokenizer(folder)
    assert render(tokenizer, CHAT).prompt.tolist().count(4) == 3
    with pytest.raises(DataError, match="another spelling of the control token") as caught:
        render(tokenizer, chat)
    assert "normalized: false" in str(caught.value.fix)


@pytest.mark.parametrize("kind", KINDS)
def test_a_flag_without_an_effect_is_not_noted(kind: str, tmp_path: Path) -> None:
    normalized = flags("<|im_start|>", normalized=kind != "llama2")
    config = {"split_special_tokens": False, "clean_up_tokenization_spaces": True}
    folder = folder_of(tmp_path / "model", kind, config, normalized)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert is_as_in_transformers(folder, load_tokenizer(folder))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"auto_map": {"AutoTokenizer": ["tok.Tok", None]}}, "auto_map asks to run code"),
        ({"chat_template_type": "deepseek_v32"}, "chat_template_type names a program"),
        (entry(500, "<|new|>"), r"'<\|new\|>' has number 500 and is read as"),
        (entry(4, "<|end|>"), r"'<\|end\|>' has number 4 and is read as"),
    ],
)
def test_what_cannot_be_honoured_is_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", "qwen", config)
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: .*" + message) as caught:
        load_tokenizer(folder)
    assert caught.value.fix


def test_numbers_of_added_tokens_json_are_held_against_those_read(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", "qwen")
    next_number = make("qwen").get_vocab_size()
    write_json(folder / "added_tokens.json", {"<|x|>": next_number, "<|im_end|>": 4})
    assert load_tokenizer(folder).get_vocab()["<|x|>"] == next_number
    write_json(folder / "added_tokens.json", {"<|x|>": next_number + 9})
    with pytest.raises(ModelError, match=r"added_tokens\.json: the added token '<\|x\|>' has number"):
        load_tokenizer(folder)


def test_every_files_end_of_text_ends_an_answer(qwen3_config: dict[str, Any], tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", "qwen", {"eos_token": "</s>"})
    write_json(folder / "config.json", {**qwen3_config, "eos_token_id": 0})
    write_json(folder / "generation_config.json", {"eos_token_id": [1, 5]})
    assert load_config(folder)["eos_token_id"] == [1, 5, 0]
    assert stop_ids(load_tokenizer(folder)) == (4, 0, 1, 2, 5)


def test_an_end_of_text_of_config_json_without_a_column_gives_way_to_generation_config(
    qwen3_config: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path
    write_json(folder / "config.json", {**qwen3_config, "eos_token_id": 10**6})
    write_json(folder / "generation_config.json", {"eos_token_id": 1})
    assert load_config(folder)["eos_token_id"] == [1]


@pytest.fixture
def qwen3_config() -> dict[str, Any]:
    from mlx_distill.config import resolve_asset

    return json.loads((Path(resolve_asset("asset:models/tiny-qwen3")) / "config.json").read_text())
