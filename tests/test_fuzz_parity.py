"""Mutated configs, adapters and chats beside transformers and PEFT: the same result, or an error with a fix.

Seeds are fixed. ``FUZZ_COUNT`` sets the mutations of each kind, as in ``test_fuzz.py``; each test prints how
many ended in which way.
"""

from __future__ import annotations

import copy
import json
import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.chat_families import FAMILIES
from helpers.chat_oracle import ANSWER, decode, is_dropped, make_tokenizer, own
from helpers.checkpoints import GOLDEN
from helpers.fuzzing import (
    adapter_folder,
    check_each,
    difference,
    mutations,
    outcome,
    plain_adapter,
    write_json_loosely,
)
from helpers.mutations import mutate

from mlx_distill.data.chat import render
from mlx_distill.data.messages import OPENAI_ROLES, parse_turns, with_tools
from mlx_distill.errors import DataError, DistillError
from mlx_distill.models.architectures.registry import ARCHITECTURES
from mlx_distill.models.config_fields import ANY
from mlx_distill.models.load import load_model
from mlx_distill.models.peft import from_peft
from mlx_distill.records import Message

# The references warn of their own futures, and our notes are warnings.
pytestmark = [pytest.mark.parity, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
COUNT = int(os.environ.get("FUZZ_COUNT", "10"))
# Longer than the sliding windows, and than the original length of the ropes.
PROMPT = np.random.default_rng(0).integers(0, 64, (1, 48))
_LARGEST = 1000  # of numbers that the references are asked about: they allocate or loop without a check


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda handle: None)


@pytest.fixture
def ways() -> Iterator[Counter[str]]:
    """How many cases ended in which way."""
    counted: Counter[str] = Counter()
    yield counted
    print("\n" + ", ".join(f"{way} {number}" for way, number in sorted(counted.items())))


def varied(
    value: dict[str, Any], kind: str, plausible: dict[str, Sequence[Any]]
) -> Iterator[tuple[int, Any]]:
    """Mutations of a configuration, and as many with keys set to values that others have."""
    yield from mutations(value, kind, COUNT)
    for seed in range(COUNT, 2 * COUNT):
        rng, changed = random.Random(f"{kind} {seed}"), copy.deepcopy(value)
        for _ in range(rng.randint(1, 3)):
            path = rng.choice(list(plausible))
            inner, key = changed, path
            if "." in path:
                outer, _, key = path.partition(".")
                inner = changed.get(outer)
            if not isinstance(inner, dict):
                continue
            if rng.random() < 0.1:
                inner.pop(key, None)
            else:
                inner[key] = copy.deepcopy(rng.choice(plausible[path]))
        yield seed, changed


def numbers_in(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from numbers_in(item)
    elif isinstance(value, int | float):
        yield value


def result_or_error(work: Callable[[], Any]) -> Any:
    """What a reference gives, or its error, which may be of any type."""
    try:
        return work()
    except Exception as error:
        return error


def compare(
    what: str,
    ours: Any,
    theirs: Callable[[], np.ndarray],
    ways: Counter[str],
    reasons: Callable[[Exception], str | None],
    *,
    is_safe: bool = True,
) -> None:
    """Hold our logits, or our error, against what a reference computes."""
    if isinstance(ours, DistillError) and not is_safe:
        ways["refused by us, oracle not asked"] += 1
        return
    wanted = result_or_error(theirs)
    if isinstance(wanted, Exception):
        if isinstance(ours, DistillError):
            ways["refused by both"] += 1
            return
        reason = reasons(wanted)
        ways[f"refused by the oracle only ({reason})"] += 1
        refusal = f"computed, and the oracle refuses: {type(wanted).__name__}: {wanted}"
        assert reason, f"{what}: {refusal}"[:600]
        return
    if isinstance(ours, DistillError):
        ways["refused by us only"] += 1
        return
    is_equal = ours.shape == wanted.shape and bool(
        np.abs(ours - wanted).max() < 1e-4 * max(1.0, float(np.abs(wanted).max()))
    )
    ways["equal" if is_equal else "different"] += 1
    assert is_equal, f"{what}: different by {np.abs(ours - wanted).max():g}"


def our_logits(folder: Path) -> np.ndarray:
    model, _ = load_model(folder, dtype="float32")
    return np.array(model(mx.array(PROMPT)).astype(mx.float32))


def torch_logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return np.asarray(model.eval()(torch.tensor(PROMPT)).logits)


def torch_model(folder: Path) -> Any:
    import torch
    import transformers as tf

    tf.logging.set_verbosity_error()
    tf.logging.disable_progress_bar()
    return tf.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).float()


_ROPE = {
    "rope_type": ["yarn", "linear", "default"],
    "type": ["yarn", "linear"],
    "rope_theta": [1e4, 5e5, None],
    "factor": [4.0, 2, 1, 0.5, None],
    "original_max_position_embeddings": [16, 32, 64, None],
    "beta_fast": [32, 8, 0, None],
    "beta_slow": [1, 2, 0, None],
    "attention_factor": [1.0, 1.2, 0.0, None],
    "mscale": [1.0, 0.7, 0, None],
    "mscale_all_dim": [1.0, 0.5, 0, None],
    "truncate": [True, False, None],
    "partial_rotary_factor": [1.0, 0.5, None],
}
CONFIG_VALUES: dict[str, Sequence[Any]] = {
    **{f"rope_parameters.{key}": values for key, values in _ROPE.items()},
    **{f"rope_scaling.{key}": values for key, values in _ROPE.items()},
    "rope_scaling": [None, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}],
    "rope_theta": [1e4, 1e6, None],
    "tie_word_embeddings": [True, False, None],
    "use_sliding_window": [True, False],
    "sliding_window": [4, 8, 16, None],
    "max_window_layers": [0, 1, 28],
    "layer_types": [
        ["full_attention"] * 2,
        ["sliding_attention", "full_attention"],
        ["full_attention", "sliding_attention"],
        None,
    ],
    "attention_bias": [True, False, None],
    "rms_norm_eps": [1e-6, 1e-2, 0],
    "num_key_value_heads": [1, 2, None],
    "head_dim": [16, 8, None],
    "num_attention_heads": [2, 4],
    "hidden_act": ["silu", "swish", "gelu", None],
    "max_position_embeddings": [64, 128, None],
    "norm_topk_prob": [True, False],
    "num_experts_per_tok": [1, 2, 3],
    "decoder_sparse_step": [1, 2],
    "mlp_only_layers": [[], [0]],
    "swiglu_limit": [7.0, 1.0, None],
    "swiglu_alpha": [1.702, 1.0],
    "num_hidden_layers": [1, 2, 3],
    "vocab_size": [64, 60],
    "logits_scaling": [2.0],
    "final_logit_softcapping": [5.0],
    "use_qk_norm": [True, False],
    "mlp_bias": [True],
    "is_decoder": [True],
    "pretraining_tp": [2],
    "chunk_size_feed_forward": [1],
}


def config_reason(error: Exception, changed: dict[str, Any]) -> str | None:
    """Why transformers may refuse a config that we compute."""
    fields = ARCHITECTURES[changed["model_type"]].fields
    named = re.search(r"Field '(\w+)'", str(error))
    if named and fields.get(named[1], ANY) == ANY:
        return "type of a field that computes nothing"
    if named and changed.get(named[1]) is None:
        return "null means the default"
    ropes = [changed.get(name) or {} for name in ("rope_parameters", "rope_scaling")]
    if isinstance(error, TypeError) and any(None in rope.values() for rope in ropes):
        return "null in a rope means the default"
    if not is_names((changed.get("quantization_config") or {}).get("modules_to_not_convert")):
        return "modules that are not quantized are known by their tensors"
    return None


def is_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "qwen3_moe", "qwen3_yarn", "gpt_oss", "gpt_oss_mxfp4"])
def test_configs_beside_transformers(name: str, ways: Counter[str], tmp_path: Path) -> None:
    golden = GOLDEN / f"models_{name}"
    config = json.loads((golden / "config.json").read_text(encoding="utf-8"))
    source = shutil.copytree(golden, tmp_path / "source")

    def check(seed: int, changed: Any) -> None:
        write_json_loosely(source / "config.json", changed)
        what = f"{name} {seed}: {difference(config, changed)}"
        ours = outcome(what, lambda: our_logits(source))
        is_safe = isinstance(changed, dict) and _is_safe(config, changed)
        reason = partial(config_reason, changed=changed)
        compare(what, ours, lambda: torch_logits(torch_model(source)), ways, reason, is_safe=is_safe)

    check_each(varied(config, name, CONFIG_VALUES), check)


def _is_safe(config: dict[str, Any], changed: dict[str, Any]) -> bool:
    values = [value for key, value in changed.items() if config.get(key) != value]
    return all(abs(number) <= _LARGEST or number == 1e30 for number in numbers_in(values))


ADAPTER_VALUES: dict[str, Sequence[Any]] = {
    "lora_alpha": [1, 8, 0.5, 0],
    "use_rslora": [True, False, None],
    "lora_dropout": [0.5, 0, None],
    "r": [2, 4, 1],
    "bias": ["none", "all", "lora_only"],
    "target_modules": [
        ["q_proj"],
        ["v_proj", "q_proj", "o_proj"],
        ["self_attn.q_proj", "v_proj"],
        r".*\.(q|v)_proj",
        r".*layers\.1\..*v_proj",
        "all-linear",
        ["model.layers.0.self_attn.q_proj"],
        None,
    ],
    "exclude_modules": [["v_proj"], r".*0.*q_proj", [], None],
    "layers_to_transform": [[0], [1], 1, [0, 1], [], None],
    "layers_pattern": ["layers", ["layers"], None, "blocks"],
    "rank_pattern": [{"q_proj": 2}, {"v_proj": 4}, {}, None],
    "alpha_pattern": [
        {"q_proj": 8},
        {r"layers\.0\..*": 1, "q_proj": 16},
        {"^model.layers.1.self_attn.v_proj": 3},
        {"proj": 5},
        {"q_proj|v_proj": 7},
        None,
    ],
    "init_lora_weights": [True, False, "gaussian", "orthogonal", "pissa", "olora", "eva", None],
    "modules_to_save": [[], None, ["v_proj"], ["lm_head"]],
    "fan_in_fan_out": [True],
    "task_type": ["CAUSAL_LM", None, "SEQ_CLS"],
    "peft_type": ["LORA"],
    "inference_mode": [True, False],
    "use_dora": [True, False],
    "lora_bias": [True, False],
    "target_parameters": [["mlp.up_proj.weight"], [], None],
    "trainable_token_indices": [[1], None],
    "layer_replication": [[[0, 2], [1, 2]], None],
    "alora_invocation_tokens": [[1], None],
    "use_qalora": [True, False],
    "megatron_config": [{}, None],
    "peft_version": ["0.21.0", "9"],
    "some_later_key": [1, None, False],
}


def adapter_reason(error: Exception) -> str | None:
    """Why PEFT may refuse an adapter that we compute."""
    if "`layers_pattern` is specified" in str(error):
        return "layers_pattern without layers_to_transform selects nothing"
    return "null means none" if isinstance(error, AttributeError) and "NoneType" in str(error) else None


class Peft:
    """Logits of PEFT with an adapter over the golden qwen3, which is read once."""

    def __init__(self) -> None:
        self.base = torch_model(GOLDEN / "models_qwen3")

    def __call__(self, adapter: Path) -> np.ndarray:
        import peft

        return torch_logits(peft.PeftModel.from_pretrained(copy.deepcopy(self.base), adapter))


def test_configs_of_adapters_beside_peft(ways: Counter[str], tmp_path: Path) -> None:
    config, tensors = plain_adapter()
    peft_logits = Peft()

    def check(seed: int, changed: Any) -> None:
        source, out = adapter_folder(tmp_path / f"a{seed}", changed, tensors), tmp_path / f"out-{seed}"
        what = f"adapter {seed}: {difference(config, changed)}"
        ours = outcome(what, lambda: from_peft(source, out))
        is_safe = isinstance(changed, dict) and _is_safe(config, changed)
        if not isinstance(ours, DistillError):
            ours = our_logits(out)
        compare(what, ours, lambda: peft_logits(source), ways, adapter_reason, is_safe=is_safe)

    check_each(varied(config, "adapter parity", ADAPTER_VALUES), check)


def changed_tensors(tensors: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Tensors of an adapter with other names, types, shapes and values, or without some."""
    out = dict(tensors)
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(list(out))
        dtype, shape, data = out.pop(name)
        kind = rng.choice(
            ("gone", "module gone", "prefix", "name", "shape", "rank", "type", "extra", "scaled")
        )
        values = np.frombuffer(data, {"F32": np.float32, "F16": np.float16, "F64": np.float64}[dtype])
        if kind == "module gone":
            stem = name.partition(".lora_")[0]
            out = {key: value for key, value in out.items() if not key.startswith(stem)}
        elif kind == "prefix":
            prefix = rng.choice(("", "base_model.", "base_model.model.model.", "model."))
            out[prefix + name.removeprefix("base_model.model.")] = (dtype, shape, data)
        elif kind == "name":
            new = rng.choice(("q_proj", "k_proj", "o_proj", "up_proj"))
            out[name.replace("q_proj", new).replace("v_proj", new)] = (dtype, shape, data)
        elif kind == "shape":
            out[name] = (dtype, shape[::-1], data)
        elif kind == "rank":
            rank = shape.index(2)
            cut = np.take(values.reshape(shape), [0], axis=rank)
            out[name] = (dtype, list(cut.shape), cut.tobytes())
        elif kind == "type":
            new_type, of = rng.choice((("F16", np.float16), ("F32", np.float32), ("F64", np.float64)))
            out[name] = (new_type, shape, values.astype(of).tobytes())
        elif kind == "extra":
            out[name] = (dtype, shape, data)
            where = rng.choice(
                ("model.layers.0.self_attn.q_proj.weight", "lm_head.weight", "model.norm.weight")
            )
            out[f"base_model.model.{where}"] = (dtype, shape, data)
        elif kind == "scaled":
            out[name] = (dtype, shape, (values * 3).astype(values.dtype).tobytes())
        if not out:
            return dict(tensors)
    return out


def test_tensors_of_adapters_beside_peft(ways: Counter[str], tmp_path: Path) -> None:
    config, tensors = plain_adapter()
    peft_logits = Peft()

    def check(seed: int) -> None:
        changed = changed_tensors(tensors, random.Random(f"tensors parity {seed}"))
        source, out = adapter_folder(tmp_path / f"t{seed}", config, changed), tmp_path / f"out-{seed}"
        names = sorted(set(changed) ^ set(tensors)) or [n for n in changed if changed[n] != tensors[n]]
        what = f"tensors {seed}: {', '.join(names)}"
        ours = outcome(what, lambda: from_peft(source, out))
        if not isinstance(ours, DistillError):
            ours = our_logits(out)
        compare(what, ours, lambda: peft_logits(source), ways, adapter_reason)

    check_each(((seed,) for seed in range(2 * COUNT)), check)


CALL = {"id": "c12345678", "type": "function", "function": {"name": "look_up", "arguments": {"q": "<rain>"}}}
TOOLS = [{"type": "function", "function": {"name": "look_up", "description": "finds all"}}]
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "what a nice day"}],
    [{"role": "system", "content": "You judge days."}, {"role": "user", "content": "a hen"}],
    [
        {"role": "user", "content": "what a nice day"},
        {"role": "assistant", "content": "<think>\nkind words\n</think>\n\nfine"},
        {"role": "user", "content": "and this one?"},
    ],
    [
        {"role": "user", "content": "what a nice day"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "42 °C", "tool_call_id": "c12345678", "name": "look_up"},
    ],
]
WORDS = (
    "a",
    " ",
    "\n",
    "\n\n",
    "fine",
    "<think>",
    "</think>",
    "{{ x }}",
    "{% raise %}",
    "\u65e5",
    "'",
    "/think",
)


def mutated_chat(rng: random.Random, spellings: Sequence[str]) -> tuple[Any, Any]:
    """Turns as rows have them, whose last one is an answer, and the row's tools."""
    turns = copy.deepcopy(rng.choice(CHATS))
    tools = copy.deepcopy(TOOLS) if rng.random() < 0.3 else None
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(turns))
        turn = turns[at]
        kind = rng.randrange(7)
        known = [*WORDS, *(spellings if rng.random() < 0.4 else ())]
        words = [rng.choice(("", "a")), *rng.choices(known, k=rng.randint(0, 6)), rng.choice(("", "a"))]
        role = rng.choice(("system", "developer", "user", "user", "assistant", "assistant", "tool", "tool"))
        if kind <= 1:
            turn["content"] = "".join(words)
        elif kind == 2:
            turn["role"] = role
        elif kind == 3:
            turns.insert(at, {"role": role, "content": "".join(words)})
        elif kind == 4 and len(turns) > 1:
            del turns[at]
        elif kind == 5:
            key = "reasoning_content" if turn["role"] == "assistant" or rng.random() < 0.1 else "name"
            turn[key] = "".join(words)
        elif turn["role"] == "assistant" or rng.random() < 0.1:
            turn["tool_calls"] = [mutate(CALL, rng) if rng.random() < 0.3 else copy.deepcopy(CALL)]
    if rng.random() < 0.15:
        turns, tools = mutate(turns, rng), mutate(tools, rng) if tools else None
    answer = {"role": "assistant", "content": ANSWER}
    if rng.random() < 0.2:
        answer["reasoning_content"] = "kind words"
    return [*turns, answer] if isinstance(turns, list) else turns, tools


def masked(chat: list[Message], spellings: Sequence[str]) -> tuple[list[Message], dict[str, str]]:
    """The chat with a private-use character for each special token that it spells."""
    characters = {text: chr(0x100000 + n) for n, text in enumerate(sorted(spellings, key=len, reverse=True))}

    def mask(value: Any) -> Any:
        if isinstance(value, str):
            for text, character in characters.items():
                value = value.replace(text, character)
            return value
        if isinstance(value, dict):
            return {mask(key): mask(item) for key, item in value.items()}
        return [mask(item) for item in value] if isinstance(value, list) else value

    masked_chat = [Message(m.role, mask(m.content), m.trained, mask(dict(m.extra))) for m in chat]
    return masked_chat, characters


@pytest.mark.parametrize("name", ["qwen3", "glm", "llama3", "gemma", "harmony"])
def test_chats_beside_transformers(name: str, ways: Counter[str]) -> None:
    """Tokens are transformers'; where a chat spells special tokens, the text is, with these as text."""
    family = FAMILIES[name]
    tokenizer = make_tokenizer(name, "byte-level")
    tokens = {*family.special, family.eos, *family.ordinary} - {"<think>", "</think>"}
    spellings = sorted(tokens)

    def theirs(chat: list[Message]) -> str:
        hidden, characters = masked(chat, spellings)
        text = decode(tokenizer, own(tokenizer, hidden))
        for spelled, character in characters.items():
            text = text.replace(character, spelled)
        return text

    def check(seed: int) -> None:
        turns, tools = mutated_chat(random.Random(f"{name} {seed}"), spellings)
        what = f"{name} {seed}: {json.dumps(turns)} {json.dumps(tools) if tools else ''}"
        chat = result_or_error(lambda: with_tools(parse_turns(turns, OPENAI_ROLES, True), tools))
        if isinstance(chat, Exception) or not is_text(turns) or not is_text(tools):
            ways["refused by us as a row"] += 1
            assert not isinstance(chat, Exception) or isinstance(chat, DataError), f"{what}: {chat!r}"
            return
        assert not lost(turns, chat), f"{what}: lost {lost(turns, chat)}"
        ours = outcome(what, lambda: render(tokenizer, chat))
        wanted = result_or_error(lambda: theirs(chat))
        if isinstance(wanted, Exception):
            way = "refused by both" if isinstance(ours, DistillError) else "refused by the oracle only"
            ways[way] += 1
            assert isinstance(ours, DistillError), f"{what}: rendered, and transformers refuses: {wanted}"
            return
        if isinstance(ours, DistillError):
            ways["refused by us only"] += 1
            is_right = is_rightly_refused(ours.message, wanted, chat, theirs)
            assert is_right, f"{what}: {ours.message}: {wanted!r}"
            return
        found = decode(tokenizer, ours.tokens)
        if wanted.rstrip().endswith(ANSWER):  # a template that ends no answer
            found = found.removesuffix(family.eos)
        is_equal = wanted.startswith(found) and wanted[len(found) :].strip() in ("", family.eos)
        if is_equal and not any(text in json.dumps(turns, ensure_ascii=False) for text in spellings):
            expected = own(tokenizer, chat)
            found_ids = ours.tokens.tolist()[: len(expected)]
            is_equal = found_ids == expected[: len(found_ids)]
        ways["equal" if is_equal else "different"] += 1
        assert is_equal, f"{what}:\n  ours   {found!r}\n  theirs {wanted!r}"

    check_each(((seed,) for seed in range(5 * COUNT)), check)


def is_rightly_refused(
    reason: str, wanted: str, chat: list[Message], theirs: Callable[[list[Message]], str]
) -> bool:
    """Whether transformers' text lacks what we refuse a chat for."""
    if known := re.search(r"does not know (\w+)", reason):
        without = [
            Message(m.role, m.content, m.trained, {k: v for k, v in m.extra.items() if k != known[1]})
            for m in chat
        ]
        return theirs(without) == wanted
    return is_dropped(reason, wanted, chat)


def is_text(value: Any) -> bool:
    """Whether no text in it has half a surrogate pair, which rows are refused for elsewhere."""
    return not isinstance(result_or_error(json.dumps(value, ensure_ascii=False).encode), Exception)


def lost(turns: list[Any], chat: Sequence[Message]) -> list[str]:
    """Texts of turns, under the keys that a template reads, that the parsed chat does not hold."""
    held = "\n".join(m.content + json.dumps(m.extra, ensure_ascii=False) for m in chat)
    out = []
    for turn in turns:
        for key in ("content", "reasoning_content", "thinking"):
            value = turn.get(key)
            text = value if isinstance(value, str) else ""
            if text.strip() not in held and json.dumps(text, ensure_ascii=False)[1:-1] not in held:
                out.append(f"{key} {text!r}")
        for call in turn.get("tool_calls") or ():
            if str(call.get("function", call).get("name")) not in held:
                out.append(f"call {call}")
    return out
