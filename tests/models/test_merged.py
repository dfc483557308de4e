"""A model with its adapter merged computes what the adapted model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_distill.models.adapters import LoraSettings, add_lora, save_adapter
from mlx_distill.models.convert import convert
from mlx_distill.models.load import load_model
from mlx_distill.models.merged import load_merged


@pytest.mark.parametrize(
    ("name", "targets", "kind"),
    [
        ("qwen3", ("q_proj", "down_proj"), "dora"),
        ("gpt_oss_mxfp4", ("q_proj",), "lora"),
        ("gpt_oss_mxfp4", ("up_proj", "o_proj"), "lora"),
    ],
)
def test_the_merged_model_computes_what_the_adapted_one_does(
    name: str, targets: tuple[str, ...], kind: str, golden: Any, logits: Any, tmp_path: Path
) -> None:
    convert(golden(name), tmp_path / "base")
    adapted, _ = load_model(tmp_path / "base", dtype="float32")
    settings = LoraSettings(4, 8.0, 0.0, targets, kind)
    add_lora(adapted, settings)
    for path, module in adapted.named_modules():
        if "lora_b" in module:
            module.lora_b = 0.05 * mx.random.normal(module.lora_b.shape, key=mx.random.key(len(path)))
    save_adapter(adapted, tmp_path / "student", settings, tmp_path / "base")
    merged, config = load_merged(tmp_path / "student")
    prompt, plain = logits(name)
    found, wanted = merged(prompt), adapted(prompt)
    assert mx.abs(found - wanted).max().item() < 1e-3 * mx.abs(plain - wanted).max().item()
    paths = dict(merged.named_modules())
    assert not any("lora_a" in module for module in paths.values())
    experts = [m for p, m in paths.items() if ".experts." in p and p.endswith(("up_proj", "down_proj"))]
    quantized = {"scales" in module for module in experts}
    assert quantized == ({True, False} if "up_proj" in targets else {True} if experts else set())
    assert config["vocab_size"] == wanted.shape[-1]
