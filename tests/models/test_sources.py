"""Where models come from: the Hub (its client replaced), folders with tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_distill.models.adapters import LoraSettings, add_lora, save_adapter
from mlx_distill.models.convert import convert
from mlx_distill.models.hub import commit_of, resolve
from mlx_distill.models.load import load, load_tokenizer


def with_tokenizer(folder: Path) -> Path:
    """Add a byte-level tokenizer of 64 tokens and a template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {c: i for i, c in enumerate([*sorted(set("abcdefghijklmnopqrstuvwxyzĠ")), "<|end|>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }} {{ m.content }}<|end|>{% endfor %}")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [27, 5]}))
    return folder


def test_tokenizer_template_and_stop_tokens_go_with_the_model(copy: Any, tmp_path: Path) -> None:
    source = with_tokenizer(copy("qwen3"))
    convert(source, tmp_path / "base")
    model, tokenizer = load(tmp_path / "base")
    assert tokenizer.decode(tokenizer.encode("hello there")) == "hello there"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "user hi<|end|>"
    assert set(tokenizer.eos_token_ids) == {27, 5}
    settings = LoraSettings(2, 4.0, 0.0, ("q_proj",))
    add_lora(model, settings)
    save_adapter(model, tmp_path / "student", settings, tmp_path / "base")
    _, same = load(tmp_path / "student")
    assert same.encode("hello") == tokenizer.encode("hello")
    assert set(load_tokenizer(tmp_path / "student").eos_token_ids) == {27, 5}


def test_a_hub_id_is_fetched_at_its_revision_without_code_or_pickles(copy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fnmatch

    import huggingface_hub

    snapshot = tmp_path / "hub" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    with_tokenizer(copy("qwen3")).rename(snapshot)
    asked: dict[str, Any] = {}

    def download(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model, _ = load("org/name", revision="0123abc")
    assert (asked["repo"], asked["revision"]) == ("org/name", "0123abc")
    assert mx.all(mx.isfinite(model(mx.array([[1, 2, 3]])))).item()

    def taken(name: str) -> bool:
        hit = [any(fnmatch.fnmatch(name, p) for p in asked[key]) for key in ("allow_patterns", "ignore_patterns")]
        return hit[0] and not hit[1]

    assert all(taken(n) for n in ("config.json", "model-00001-of-00002.safetensors", "chat_template.jinja", "tokenizer.json"))
    assert not any(taken(n) for n in ("pytorch_model.bin", "modeling_x.py", "original/model.safetensors", "x.pkl"))
    assert commit_of(snapshot) == "0123abc"


def test_the_commit_of_a_snapshot_is_recorded(copy: Any, tmp_path: Path) -> None:
    from mlx_distill.files import read_manifest

    snapshot = tmp_path / "hub" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    copy("qwen3").rename(snapshot)
    convert(snapshot, tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest.recorded["commit"] == "0123abc"


def test_folders_are_taken_as_they_are(golden: Any) -> None:
    assert resolve(golden("qwen3")) == golden("qwen3")
    assert resolve(str(golden("qwen3"))) == golden("qwen3")
