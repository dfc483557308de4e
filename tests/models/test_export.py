"""Round trips byte for byte, PEFT there and back, cards."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_distill.errors import ConfigError, FileError, ModelError
from mlx_distill.inspection import inspect
from mlx_distill.models.adapters import LoraSettings, add_lora, load_adapter, save_adapter
from mlx_distill.models.convert import convert
from mlx_distill.models.export import from_peft, to_hf, to_peft
from mlx_distill.models.load import load_model
from mlx_distill.report.model_card import card_text

NAMES = ("qwen2", "qwen3", "qwen3_yarn", "qwen3_moe", "gpt_oss", "gpt_oss_mxfp4")


def adapter(
    folder: Path, base: Path, targets: tuple[str, ...] = ("q_proj", "o_proj"), kind: str = "lora"
) -> Any:
    model, _ = load_model(base, dtype="float32")
    settings = LoraSettings(4, 8.0, 0.0, targets, kind)
    add_lora(model, settings)
    for path, module in sorted(model.named_modules()):
        if "lora_b" in module:
            module.lora_b = 0.1 * mx.random.normal(module.lora_b.shape, key=mx.random.key(len(path)))
    save_adapter(model, folder, settings, base)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("memory", [4096, 1 << 20])
@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_is_byte_identical(
    name: str, memory: int, golden: Any, tmp_path: Path, tools: Any
) -> None:
    convert(golden(name), tmp_path / "ours", max_shard_bytes=20_000)
    report = to_hf(tmp_path / "ours", tmp_path / "theirs", max_shard_bytes=25_000, memory_bytes=memory)
    assert tools.all(tmp_path / "theirs") == tools.all(golden(name))
    assert report.changed == ()
    wanted = json.loads((golden(name) / "config.json").read_text())
    assert json.loads((tmp_path / "theirs" / "config.json").read_text()) == wanted
    index = json.loads((tmp_path / "theirs" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tools.all(golden(name)))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_folder_in_their_layout_comes_out_as_it_is(
    name: str, golden: Any, logits: Any, tmp_path: Path, tools: Any
) -> None:
    """And an adapter that stands on one is merged all the same."""
    assert to_hf(golden(name), tmp_path / "theirs", memory_bytes=4096).changed == ()
    assert tools.all(tmp_path / "theirs") == tools.all(golden(name))
    model = adapter(tmp_path / "student", golden(name))
    to_hf(tmp_path / "student", tmp_path / "out", memory_bytes=4096)
    prompt, _ = logits(name)
    found, wanted = load_model(tmp_path / "out", dtype="float32")[0](prompt), model(prompt)
    assert (
        mx.sqrt(mx.mean(mx.square(found - wanted))).item() < 0.1 * mx.sqrt(mx.mean(mx.square(wanted))).item()
    )
    before, after = tools.all(golden(name)), tools.all(tmp_path / "out")
    assert {n for n in before if before[n] != after[n]} == {
        n for n in before if n.endswith(("q_proj.weight", "o_proj.weight"))
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "gpt_oss_mxfp4"])
def test_an_adapter_is_merged_on_the_way_out(
    name: str, golden: Any, logits: Any, tmp_path: Path, tools: Any
) -> None:
    convert(golden(name), tmp_path / "base", dtype="float32")
    model = adapter(tmp_path / "student", tmp_path / "base")
    report = to_hf(tmp_path / "student", tmp_path / "out")
    prompt, _ = logits(name)
    merged, _ = load_model(tmp_path / "out")
    assert mx.abs(merged(prompt) - model(prompt)).max().item() < 1e-4
    assert len(report.changed) == 4
    assert all(row.note == "adapter merged" and row.error < 1e-6 for row in report.changed)
    before, after = tools.all(golden(name)), tools.all(tmp_path / "out")
    experts = [n for n in before if n.endswith(("_blocks", "_scales"))]
    assert len(experts) == (8 if name == "gpt_oss_mxfp4" else 0)
    assert all(before[n] == after[n] for n in experts)


@pytest.mark.slow
def test_an_adapter_on_quantized_experts_requantizes_them(
    golden: Any, logits: Any, tmp_path: Path, tools: Any
) -> None:
    convert(golden("gpt_oss_mxfp4"), tmp_path / "base")
    adapter(tmp_path / "student", tmp_path / "base", ("down_proj",))
    report = to_hf(tmp_path / "student", tmp_path / "out")
    before, after = tools.all(golden("gpt_oss_mxfp4")), tools.all(tmp_path / "out")
    assert {n for n in before if before[n] != after[n]} == {
        n for n in before if "down_proj_" in n and "bias" not in n
    }
    assert {n: before[n][:2] for n in before} == {n: after[n][:2] for n in after}
    assert {row.note for row in report.changed} == {"requantized; adapter merged"}
    from mlx_distill.models.quantize import quantize_folder

    quantize_folder(
        tmp_path / "student", tmp_path / "ours", "affine8", keep=("proj", "embed", "head", "router")
    )
    assert load_model(tmp_path / "ours")[0](logits("gpt_oss_mxfp4")[0]).shape == (2, 48, 64)
    quantized = load_model(tmp_path / "out")[0].model.layers[0].mlp.experts.down_proj
    same = load_model(tmp_path / "ours")[0].model.layers[0].mlp.experts.down_proj
    assert mx.array_equal(quantized.weight, same.weight)
    assert mx.array_equal(quantized.scales, same.scales)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["affine4", "mxfp4"])
def test_what_the_layout_cannot_hold_is_dequantized_and_reported(
    mode: str, golden: Any, logits: Any, tmp_path: Path, tools: Any
) -> None:
    convert(golden("gpt_oss_mxfp4"), tmp_path / "quantized", mode)
    report = to_hf(tmp_path / "quantized", tmp_path / "out")
    before, after = tools.all(golden("gpt_oss_mxfp4")), tools.all(tmp_path / "out")
    assert {n: v[:2] for n, v in after.items()} == {n: v[:2] for n, v in before.items()}
    assert all(before[n] == after[n] for n in before if n.endswith(("_blocks", "_scales")))
    assert {row.note for row in report.changed} == {
        f"dequantized from {'affine' if mode == 'affine4' else 'mxfp4'}"
    }
    prompt, _ = logits("gpt_oss_mxfp4")
    ours, theirs = (load_model(tmp_path / name, dtype="float32")[0](prompt) for name in ("quantized", "out"))
    assert mx.abs(ours - theirs).mean().item() < 0.2
    if mode == "mxfp4":  # bfloat16 holds every MXFP4 value
        assert all(row.error == 0.0 for row in report.changed)
        assert mx.abs(ours - theirs).max().item() < 1e-4


@pytest.mark.slow
def test_experts_that_were_quantized_here_are_exported_as_mxfp4(
    golden: Any, tmp_path: Path, tools: Any
) -> None:
    convert(golden("gpt_oss"), tmp_path / "quantized", "mxfp4")
    to_hf(tmp_path / "quantized", tmp_path / "out")
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quant_method"]
        == "mxfp4"
    )
    assert "model.layers.0.mlp.experts.gate_up_proj_blocks" in tools.all(tmp_path / "out")
    first, second = (
        load_model(tmp_path / name)[0].model.layers[1].mlp.experts for name in ("quantized", "out")
    )
    assert mx.array_equal(first.gate_proj.weight, second.gate_proj.weight)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_peft_there_and_back_is_the_same_adapter(kind: str, golden: Any, logits: Any, tmp_path: Path) -> None:
    convert(golden("qwen3"), tmp_path / "base")
    model = adapter(tmp_path / "student", tmp_path / "base", kind=kind)
    paths = to_peft(tmp_path / "student", tmp_path / "peft").modules
    weights = mx.load(str(tmp_path / "peft" / "adapter_model.safetensors"))
    assert weights[f"base_model.model.{paths[0]}.lora_A.weight"].shape[0] == 4
    from_peft(tmp_path / "peft", tmp_path / "again", tmp_path / "base")
    back, _ = load_model(tmp_path / "base", dtype="float32")
    load_adapter(back, tmp_path / "again")
    prompt, _ = logits("qwen3")
    assert mx.array_equal(back(prompt), model(prompt))


def test_rank_stabilized_scales_are_understood(golden: Any, tmp_path: Path) -> None:
    adapter(tmp_path / "student", golden("qwen3"))
    to_peft(tmp_path / "student", tmp_path / "peft", card=partial(card_text, library="peft"))
    path = tmp_path / "peft" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_rslora": True}))
    from_peft(tmp_path / "peft", tmp_path / "again", golden("qwen3"))
    assert (
        json.loads((tmp_path / "again" / "adapter_config.json").read_text())["lora_parameters"]["scale"]
        == 4.0
    )
    to_peft(tmp_path / "again", tmp_path / "back")
    back = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert (back["r"], back["lora_alpha"], back["use_rslora"]) == (4, 8.0, True)


def test_what_peft_cannot_hold_and_what_we_cannot_compute_is_refused(golden: Any, tmp_path: Path) -> None:
    adapter(tmp_path / "experts", golden("gpt_oss"), ("gate_proj",))
    with pytest.raises(ModelError, match="experts"):
        to_peft(tmp_path / "experts", tmp_path / "peft")
    with pytest.raises(ModelError, match="experts"):
        to_hf(tmp_path / "experts", tmp_path / "peft", adapter="keep")
    adapter(tmp_path / "router", golden("gpt_oss"), ("router",))
    with pytest.raises(ModelError, match="routers"):
        to_peft(tmp_path / "router", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
    with pytest.raises(ModelError, match="no adapter"):
        to_peft(golden("qwen3"), tmp_path / "peft")
    adapter(tmp_path / "student", golden("qwen3"))
    to_peft(tmp_path / "student", tmp_path / "peft", card=partial(card_text, library="peft"))
    path = tmp_path / "peft" / "adapter_config.json"
    for change in ({"peft_type": "IA3"}, {"modules_to_save": ["norm"]}, {"use_qalora": True}, {"r": None}):
        good = json.loads(path.read_text())
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(ModelError, match=next(iter(change))):
            from_peft(tmp_path / "peft", tmp_path / "again", golden("qwen3"))
        path.write_text(json.dumps(good))


def test_the_card_has_provenance_and_the_reports_figures(golden: Any, tmp_path: Path) -> None:
    convert(golden("gpt_oss_mxfp4"), tmp_path / "ours")
    rate = {"value": 0.875, "low": 0.8, "high": 0.9, "n": 40}
    figures = {
        "name": "first",
        "confidence": 0.95,
        "main_set": "test",
        "sets": {"test": 40},
        "metrics": {
            "ours": {
                "accuracy": rate,
                "verdict_agreement": {"value": 308 / 320, "low": 0.9358, "high": 0.9786, "n": 320},
                "json_valid": {"value": 1.0},
                "score_gap": None,
                "items_per_minute": 1934.564,
                "latency_s": 0.0341,
                "peak_memory_gb": 0.0623,
                "first_token_s": 0.0421,
                "requests_per_second": 32.24,
                "load_s": None,
            },
            "other": {"accuracy": None},
        },
        "task_details": {"label": "first|tone"},
        "answer": {"sentence": "Ours is as good as the teacher within 3 points."},
    }
    to_hf(tmp_path / "ours", tmp_path / "out", card=partial(card_text, report=figures))
    card = (tmp_path / "out" / "README.md").read_text()
    plain = card.replace("\u202f", " ")
    assert (
        "| model | Accuracy | Same first\\|tone as teacher | Fits the task "
        "| First token | Median per row | Requests per second | Rows per minute | Peak memory |" in card
    )
    assert (
        "| ours | 87.5 % [80.0–90.0] | 96.2 % [93.6–97.9] | 100 % | 42 ms | 34 ms | 32.2 | 1,935 | 62.3 MB |"
        in plain
    )
    assert "Of the run `first`, on 40 held-out rows, in brackets 95 % intervals, this is its `ours`." in plain
    assert "## Measured\n\nOurs is as good as the teacher within 3 points.\n\n| model |" in card
    assert "do not compare" not in card
    assert "stage `convert`" in card
    assert "rounds YaRN's correction range" in card
    assert str(tmp_path) not in card, "no machine's paths"


def test_the_card_says_that_speeds_of_quantized_and_dequantized_models_do_not_compare(
    golden: Any, tmp_path: Path
) -> None:
    convert(golden("qwen3"), tmp_path / "quantized")
    figures = {
        "metrics": {"teacher": {"items_per_minute": 900.0}, "quantized": {"items_per_minute": 200.0}},
        "provenance": {"evaluations": {"teacher": {"unpack": True}, "quantized": {"unpack": False}}},
    }
    to_hf(tmp_path / "quantized", tmp_path / "out", card=partial(card_text, report=figures))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "The quantized student computed with quantized weights, the teacher with dequantized ones" in card


def test_the_card_of_a_runs_model_goes_back_to_what_it_was_made_from(golden: Any, tmp_path: Path) -> None:
    """The chain of manifests beside the folder: the base's source, though the student's own manifest does not
    name it.
    """
    from mlx_distill.storage import open_partial, publish, read_manifest, stage_key

    convert(golden("qwen3"), tmp_path / "run" / "base")
    manifest = tmp_path / "run" / "base" / "manifest.json"
    raw = json.loads(manifest.read_text())
    raw["recorded"] |= {"source": "org/name", "commit": "0123abc"}
    manifest.write_text(json.dumps(raw))
    parents = {"base": read_manifest(manifest.parent).content, "data": "f" * 64}
    partial = open_partial(tmp_path / "run" / "student", stage_key("student", 1, {}, parents))
    adapter(partial, tmp_path / "run" / "base")
    publish(tmp_path / "run" / "student", "student", 1, {}, parents, {})
    to_hf(tmp_path / "run" / "student", tmp_path / "out", card=card_text)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: org/name\n" in card
    assert "from org/name, at commit `0123abc`" in card
    assert card.index("`student`: made by") < card.index("`base`: made by")
    assert "model.layers.*.self_attn.q_proj.weight: 2 tensors, adapter merged, relative error at most" in card


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "gpt_oss_mxfp4"])
def test_an_adapter_is_kept_beside_an_untouched_base(
    name: str, golden: Any, logits: Any, tmp_path: Path, tools: Any
) -> None:
    convert(golden(name), tmp_path / "base")
    model = adapter(tmp_path / "student", tmp_path / "base")
    report = to_hf(tmp_path / "student", tmp_path / "out", adapter="keep")
    assert report.changed == ()
    assert report.kept == 4
    assert tools.all(tmp_path / "out") == tools.all(golden(name))
    assert list(
        from_peft(tmp_path / "out" / "adapter", tmp_path / "again", tmp_path / "out").modules
    ) == sorted(f"model.layers.{i}.self_attn.{p}" for i in (0, 1) for p in ("o_proj", "q_proj"))
    prompt, _ = logits(name)
    again, _ = load_model(tmp_path / "again", dtype="float32")
    assert mx.array_equal(again(prompt), model(prompt))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert "adapter/adapter_model.safetensors" in manifest["files"]
    with pytest.raises(ConfigError, match="merge or keep"):
        to_hf(tmp_path / "student", tmp_path / "other", adapter="drop")


def test_a_destination_with_files_is_not_mixed_with_an_adapter(
    golden: Any, tmp_path: Path, tools: Any
) -> None:
    adapter(tmp_path / "student", golden("qwen3"))
    before = tools.bits(tmp_path / "student")
    for destination in ("student", "mine"):
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / "mine" / "diary.txt").write_text("keep")
        with pytest.raises(FileError):
            to_peft(tmp_path / "student", tmp_path / destination)
    assert tools.bits(tmp_path / "student") == before
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["diary.txt"]
    to_peft(tmp_path / "student", tmp_path / "peft", card=partial(card_text, library="peft"))
    assert "library_name: peft" in (tmp_path / "peft" / "README.md").read_text()
    with pytest.raises(FileError):
        from_peft(tmp_path / "peft", tmp_path / "mine", golden("qwen3"))
    with pytest.raises(ModelError, match="PEFT's format"):
        load_model(tmp_path / "peft")


def test_the_base_that_peft_names_is_taken_where_none_is_given(
    golden: Any, logits: Any, tmp_path: Path
) -> None:
    model = adapter(tmp_path / "student", golden("qwen3"))
    to_peft(tmp_path / "student", tmp_path / "peft", base_model=str(golden("qwen3")))
    from_peft(tmp_path / "peft", tmp_path / "again")
    prompt, _ = logits("qwen3")
    assert mx.array_equal(load_model(tmp_path / "again", dtype="float32")[0](prompt), model(prompt))


def test_the_peft_config_names_what_the_base_was_converted_from(golden: Any, tmp_path: Path) -> None:
    """A Hub id, or the folder in the layout that PEFT reads; and back without naming the base again."""
    base = tmp_path / "run" / "student_base"
    convert(golden("qwen3"), base)
    adapter(tmp_path / "run" / "student", base)
    report = to_peft(tmp_path / "run" / "student", tmp_path / "peft")
    named = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == report.base == str(golden("qwen3").resolve())
    assert report.lines[-1] == f"the base model that it expects: {named}"
    from_peft(tmp_path / "peft", tmp_path / "again")
    assert inspect(tmp_path / "again").facts["base"] == named

    recorded = json.loads((base / "manifest.json").read_text())
    for source, expected in (("org/name", "org/name"), (str(tmp_path / "gone"), str(base)), ("", str(base))):
        recorded["recorded"]["source"] = source
        (base / "manifest.json").write_text(json.dumps(recorded))
        report = to_peft(tmp_path / "run" / "student", tmp_path / "peft")
        assert (
            json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"]
            == report.base
            == expected
        )
        assert (report.note is None) == (expected == "org/name")
    assert report.lines[-1].endswith(f"mlx-distill export {base} FOLDER --to hf")


def test_no_path_is_shown_with_dots_in_it(golden: Any, tmp_path: Path) -> None:
    convert(golden("qwen3"), tmp_path / "base")
    adapter(tmp_path / "student", tmp_path / "base")
    assert inspect(tmp_path / "student").facts["base"] == str((tmp_path / "base").resolve())
