"""Sources of models: the Hub (with a mock client), folders with tokenizers."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import mlx.core as mx
import pytest

from mlx_distill.errors import ModelError
from mlx_distill.inspection import inspect
from mlx_distill.models.adapters import LoraSettings, add_lora, save_adapter
from mlx_distill.models.convert import convert
from mlx_distill.models.export import to_hf
from mlx_distill.models.hub import commit_of, resolve
from mlx_distill.models.load import load, load_tokenizer


def with_tokenizer(folder: Path) -> Path:
    """Add a byte-level tokenizer of 64 tokens and a template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {c: i for i, c in enumerate([*sorted(set("abcdefghijklmnopqrstuvwxyzĠ")), "<|end|>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"})
    )
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }} {{ m.content }}<|end|>{% endfor %}"
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [27, 5]}))
    return folder


def test_tokenizer_template_and_stop_tokens_go_with_the_model(copy: Any, tmp_path: Path) -> None:
    source = with_tokenizer(copy("qwen3"))
    convert(source, tmp_path / "base")
    model, tokenizer = load(tmp_path / "base")
    assert tokenizer.decode(tokenizer.encode("hello there")) == "hello there"
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "user hi<|end|>"
    )
    assert set(tokenizer.eos_token_ids) == {27, 5}
    settings = LoraSettings(2, 4.0, 0.0, ("q_proj",))
    add_lora(model, settings)
    save_adapter(model, tmp_path / "student", settings, tmp_path / "base")
    _, same = load(tmp_path / "student")
    assert same.encode("hello") == tokenizer.encode("hello")
    assert set(load_tokenizer(tmp_path / "student").eos_token_ids) == {27, 5}


def test_a_hub_id_is_fetched_at_its_revision_without_code_or_pickles(
    copy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        hit = [
            any(fnmatch.fnmatch(name, p) for p in asked[key]) for key in ("allow_patterns", "ignore_patterns")
        ]
        return hit[0] and not hit[1]

    assert all(
        taken(n)
        for n in ("config.json", "model-00001-of-00002.safetensors", "chat_template.jinja", "tokenizer.json")
    )
    assert not any(
        taken(n) for n in ("pytorch_model.bin", "modeling_x.py", "original/model.safetensors", "x.pkl")
    )
    assert commit_of(snapshot) == "0123abc"


def test_the_commit_of_a_snapshot_is_recorded(
    copy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    from mlx_distill.storage import read_manifest

    snapshot = tmp_path / "hub" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    copy("qwen3").rename(snapshot)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **options: str(snapshot))
    for source, revision in ((snapshot, None), ("org/name", "main")):
        convert(source, tmp_path / "out", revision=revision)
        manifest = read_manifest(tmp_path / "out")
        assert manifest is not None
        assert manifest.recorded["commit"] == "0123abc", "a branch moves, the commit does not"


def test_a_download_that_broke_off_goes_on_and_a_wrong_revision_is_named(
    copy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub's client keeps what has come; what is ours is to leave it, and to say so."""
    import huggingface_hub
    from huggingface_hub.errors import RevisionNotFoundError

    snapshot, files = (
        tmp_path / "hub" / "snapshots" / "0123abc",
        sorted(with_tokenizer(copy("qwen3")).iterdir()),
    )
    snapshot.mkdir(parents=True)
    fetched: list[str] = []

    def download(repo: str, **options: Any) -> str:
        if options["revision"] == "v9":
            raise RevisionNotFoundError("404", response=Mock())
        for number, file in enumerate(f for f in files if not (snapshot / f.name).exists()):
            if number == 3:
                raise ConnectionError("the line is dead")
            shutil.copyfile(file, snapshot / file.name)
            fetched.append(file.name)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    attempts = 0
    while len(fetched) < len(files):
        attempts += 1
        with (
            pytest.raises(ModelError, match="the line is dead")
            if len(files) - len(fetched) > 3
            else nullcontext() as caught
        ):
            load("org/name")
        if caught:
            assert "resumes the download" in (caught.value.fix or "")
    assert attempts > 1
    assert sorted(fetched) == sorted(set(fetched)), "no file twice"
    with pytest.raises(ModelError, match="v9"):
        load("org/name", "v9")


def test_a_hub_model_with_pickles_alone_is_refused(
    copy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    folder = copy("qwen3")
    for path in folder.glob("model*"):
        path.unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **options: str(folder))
    with pytest.raises(ModelError, match="safetensors"):
        load("org/name")


@pytest.mark.slow
def test_a_vocabulary_padded_beyond_the_tokenizer_keeps_its_columns(
    copy: Any, tmp_path: Path, tools: Any
) -> None:
    """28 tokens, 64 columns: converted, quantized and exported."""
    source = with_tokenizer(copy("qwen3_yarn"))
    convert(source, tmp_path / "ours")
    convert(source, tmp_path / "quantized", "mixed4")
    to_hf(tmp_path / "ours", tmp_path / "back")
    for folder in (source, tmp_path / "ours", tmp_path / "quantized", tmp_path / "back"):
        model, tokenizer = load(folder)
        assert len(tokenizer.get_vocab()) == 28
        assert model(mx.array([tokenizer.encode("hello")])).shape[-1] == 64
        assert inspect(folder).facts["vocabulary"] == "64 columns, 28 tokens"
    assert tools.all(tmp_path / "back") == tools.all(source)


def test_folders_are_taken_as_they_are(golden: Any) -> None:
    assert resolve(golden("qwen3")) == golden("qwen3")
    assert resolve(str(golden("qwen3"))) == golden("qwen3")
