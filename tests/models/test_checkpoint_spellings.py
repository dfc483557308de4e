"""One model spelled in many ways: its head, its files and the names of its tensors.

The right values are those of the plainly spelled checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.errors import ModelError
from mlx_distill.inspection import inspect
from mlx_distill.models.adapters import LoraSettings, add_lora, save_adapter
from mlx_distill.models.convert import convert
from mlx_distill.models.export import to_hf, to_peft
from mlx_distill.models.load import load_model
from mlx_distill.models.quantize import quantize_folder

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # the notes

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
PROMPT = mx.array([[1, 5, 9, 2, 60, 33, 7, 7]])


def rewrite(folder: Path, tensors: dict[str, Any], tools: Any) -> None:
    """Replace all weights of a folder by one file."""
    for path in folder.glob("model*"):
        path.unlink()
    tools.write(folder / SINGLE, tensors)


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def logits_of(folder: Path) -> np.ndarray:
    return np.array(load_model(folder, dtype="float32")[0](PROMPT))


@pytest.fixture
def own_head(copy: Any, tools: Any) -> Path:
    """A tied config with another head in the file: that of the untied model, whose config only differs in
    this.
    """
    folder = Path(copy("qwen3_yarn"))
    assert not config_of(folder)["tie_word_embeddings"]
    tools.config(folder, tie_word_embeddings=True)
    return folder


def test_a_head_that_differs_from_the_embedding_is_kept(
    own_head: Path, golden: Any, logits: Any, tmp_path: Path
) -> None:
    prompt, wanted = logits("qwen3_yarn")
    report = convert(own_head, tmp_path / "ours")
    assert "tie_word_embeddings is true, but" in report.notes[0]
    assert not report.left_out
    to_hf(tmp_path / "ours", tmp_path / "back")
    to_hf(own_head, tmp_path / "direct")
    for folder in (own_head, tmp_path / "ours", tmp_path / "back", tmp_path / "direct"):
        found = load_model(folder, dtype="float32")[0](prompt)
        assert mx.abs(found - wanted).max().item() < 2e-5 * mx.abs(wanted).max().item()
        assert inspect(folder).facts["head"] == "not tied"
        if folder != own_head:
            assert config_of(folder)["tie_word_embeddings"] is False


def test_a_kept_head_is_quantized_trained_and_written_for_peft(own_head: Path, tmp_path: Path) -> None:
    plain = quantize_folder(own_head, tmp_path / "small", "affine8")
    assert HEAD in {row.name for row in plain.rows}
    assert config_of(tmp_path / "small")["tie_word_embeddings"] is False
    model, _ = load_model(own_head)
    settings = LoraSettings(2, 4.0, 0.0, ("q_proj",), modules_to_save=("embed_tokens",))
    add_lora(model, settings)
    save_adapter(model, tmp_path / "student", settings, own_head)
    to_peft(tmp_path / "student", tmp_path / "peft")
    written = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert written["modules_to_save"] == ["model.embed_tokens"]
    assert written["ensure_weight_tying"] is False


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_a_head_that_equals_the_embedding_is_left_out(
    dtype: str, copy: Any, tools: Any, tmp_path: Path
) -> None:
    """Also in another type; and where only the head of the two was written, it is the embedding."""
    folder = copy("qwen3")
    wanted, tensors = logits_of(folder), tools.all(folder)
    kind, shape, data = tensors[EMBEDDING]
    assert kind == "BF16"
    if dtype == "F32":
        data = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).tobytes()
    rewrite(folder, {**tensors, HEAD: (dtype, shape, data)}, tools)
    report = convert(folder, tmp_path / "ours")
    assert report.left_out == ((HEAD, "tied to the embedding"),)
    assert report.notes == ()
    assert np.array_equal(logits_of(tmp_path / "ours"), wanted)
    del tensors[EMBEDDING]
    rewrite(folder, {**tensors, HEAD: (dtype, shape, data)}, tools)
    assert np.array_equal(logits_of(folder), wanted)


def test_a_last_row_that_differs_is_a_difference(copy: Any, tools: Any) -> None:
    folder = copy("qwen3")
    tensors = tools.all(folder)
    kind, shape, data = tensors[EMBEDDING]
    rewrite(folder, {**tensors, HEAD: (kind, shape, data[:-2] + tools.bf16(np.array([3.0])))}, tools)
    assert load_model(folder)[1]["tie_word_embeddings"] is False


@pytest.mark.parametrize("shards", ["kept", "removed"])
def test_a_single_file_beside_the_index_of_another_checkpoint_is_read(
    shards: str, copy: Any, golden: Any, tools: Any, tmp_path: Path
) -> None:
    folder = copy("qwen3")
    tensors = tools.all(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    name = "model.norm.weight"
    kind, shape, _ = tensors[name]
    tuned = {**tensors, name: (kind, shape, tools.bf16(np.full(shape, 0.5)))}
    tools.write(folder / SINGLE, tuned)
    if shards == "removed":
        for path in folder.glob("model-*.safetensors"):
            path.unlink()
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_bytes((folder / "config.json").read_bytes())
    tools.write(plain / SINGLE, tuned)
    report = convert(folder, tmp_path / "ours")
    assert str(folder / SINGLE) in report.notes[0] and INDEX in report.notes[0]
    for found in (folder, tmp_path / "ours"):
        assert np.array_equal(logits_of(found), logits_of(plain))
    assert not np.array_equal(logits_of(plain), logits_of(golden("qwen3")))


def test_a_file_that_the_index_does_not_name_is_not_read_and_said(
    copy: Any, golden: Any, tools: Any, tmp_path: Path
) -> None:
    folder = copy("qwen3")
    stale = folder / "model-00001-of-00009.safetensors"
    tools.write(stale, {"model.norm.weight": ("BF16", [1], b"\0\0")})
    report = convert(folder, tmp_path / "ours")
    assert stale.name in report.notes[0]
    assert np.array_equal(logits_of(tmp_path / "ours"), logits_of(golden("qwen3")))
    next(path for path in folder.glob("model-*.safetensors") if path != stale).unlink()
    with pytest.raises(ModelError, match="is missing") as caught:
        load_model(folder)
    assert stale.name in (caught.value.fix or "")


def test_without_an_index_the_single_file_is_read_where_tensors_are_there_twice(
    copy: Any, golden: Any, tools: Any
) -> None:
    folder = copy("qwen3")
    tensors = tools.all(folder)
    (folder / INDEX).unlink()
    with_nothing_twice = logits_of(folder)
    tools.write(folder / SINGLE, tensors)
    for path in folder.glob("model-*.safetensors"):
        tools.write(path, {n: (t, s, bytes(len(data))) for n, (t, s, data) in tools.read(path).items()})
    assert np.array_equal(logits_of(folder), with_nothing_twice)
    (folder / SINGLE).unlink()
    tools.write(folder / "model_copy.safetensors", tensors)
    with pytest.raises(ModelError, match="is also in"):
        load_model(folder)


def prefixed(name: str) -> str:
    return f"module._orig_mod.{name}"


def compiled_layers(name: str) -> str:
    return name.replace("layers.0.", "layers.0._orig_mod.")


def wrapped(name: str) -> str:
    return "_fsdp_wrapped_module." + name.replace(".mlp.", "._checkpoint_wrapped_module.mlp.")


def trunk_alone(name: str) -> str:
    return name.removeprefix("model.")


@pytest.mark.parametrize(
    ("spell", "said"),
    [
        (prefixed, "DDP"),
        (compiled_layers, "torch.compile"),
        (wrapped, "FSDP"),
        (trunk_alone, "trunk alone"),
    ],
)
@pytest.mark.parametrize("model", ["qwen3", "qwen3_moe"])
def test_names_of_wrappers_are_read(
    model: str, spell: Any, said: str, copy: Any, golden: Any, tools: Any, tmp_path: Path
) -> None:
    folder = copy(model)
    rewrite(folder, {spell(name): value for name, value in tools.all(folder).items()}, tools)
    report = convert(folder, tmp_path / "ours")
    assert said in report.notes[0]
    assert np.array_equal(logits_of(tmp_path / "ours"), logits_of(golden(model)))


@pytest.mark.parametrize(
    ("prefix", "said"),
    [
        ("base_model.model.", "PEFT"),
        ("model.language_model.", "vision-language"),
        ("language_model.", "vision-language"),
        ("module.base_model.model.", "PEFT"),
    ],
)
def test_names_of_other_models_are_refused(prefix: str, said: str, copy: Any, tools: Any) -> None:
    folder = copy("qwen3")
    rewrite(folder, {prefix + name: value for name, value in tools.all(folder).items()}, tools)
    with pytest.raises(ModelError, match=said) as caught:
        load_model(folder)
    assert "tensor '" in caught.value.message and SINGLE in caught.value.message
    assert caught.value.fix


def test_two_tensors_of_one_plain_name_are_refused(copy: Any, tools: Any) -> None:
    folder = copy("qwen3")
    tensors = tools.all(folder)
    rewrite(folder, {**tensors, f"_orig_mod.{EMBEDDING}": tensors[EMBEDDING]}, tools)
    with pytest.raises(ModelError, match="are both"):
        load_model(folder)
