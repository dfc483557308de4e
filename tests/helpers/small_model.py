"""A folder with a model of one narrow layer, which answers fast, and the packaged teacher's tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_distill.config import ASSETS

SOURCE = ASSETS / "models" / "tiny-qwen3"


def write_small_model(folder: Path, **changes: int) -> None:
    """Write the model, with random weights that are the same each time."""
    from mlx_lm.models import qwen3

    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(SOURCE / name, folder)
    config = json.loads((SOURCE / "config.json").read_text(encoding="utf-8"))
    size = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    config |= {**size, "head_dim": 16, "num_hidden_layers": 1, "layer_types": ["full_attention"], **changes}
    config["dtype"] = config["torch_dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    mx.random.seed(3)
    model = qwen3.Model(qwen3.ModelArgs.from_dict(config))
    weights = {name: value * 3 for name, value in tree_flatten(model.parameters())}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
