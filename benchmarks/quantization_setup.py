"""Models, rows and seeds of the measurements of quantization: the demo's, trained once and kept in a folder.

The teacher (tiny-qwen3, everything quantized) and the student (tiny-gpt-oss around its published experts) are
those of the packaged recipe ``tiny``, made by ``mlx-distill run tiny``; tiny-qwen3-outliers is the teacher
with some channels of large activations, its function unchanged. Rows are songs of the same generator
with other seeds: calibration and training rows of the part ``train``; held out 144 songs of the part
``test``, whose templates no model has seen, and 96 other songs of the part ``train``.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEEDS = (0, 1, 2)
MODES = ("mxfp4", "nvfp4", "affine4", "affine3")
_FOLDERS = {"tiny-qwen3": "teacher", "tiny-qwen3-outliers": "teacher", "tiny-gpt-oss": "student"}
MODELS = tuple(_FOLDERS)
CALIBRATION_ROWS, TRAINING_ROWS = 128, 200
_HELD_OUT = {"unseen": ("test", 144, 901), "seen": ("train", 96, 902)}  # part, rows, seed
_COMMANDS = ("prepare", "teach", "targets", "distill")
_OUTLIER_SIGMA, _OUTLIER_CHANNELS, _OUTLIER_FACTOR = 0.6, 3, 12.0


@dataclass(frozen=True)
class Setup:
    """A model to quantize, and the task of its rows.

    Attributes:
        name: One of :data:`MODELS`.
        folder: Its adapter folder, whose base is beside it.
        tokenizer: mlx-lm's wrapper.
        task: The task of the demo.
        labels: The task's labels in the model's tokens.
    """

    name: str
    folder: Path
    tokenizer: Any
    task: Any
    labels: Any

    def load(self) -> Any:
        """The unquantized model in float32, with the adapter merged; published experts are dequantized, which
        is faster on a CPU.
        """
        from mlx_distill.models.merged import load_merged
        from mlx_distill.models.modules import dequantize_model

        model = load_merged(self.folder)[0]
        dequantize_model(model)
        if self.name.endswith("outliers"):
            put_outliers(model)
        return model

    def calibration(self, seed: int, count: int = CALIBRATION_ROWS) -> list[Any]:
        """Rendered rows to calibrate or train with, other ones for each seed."""
        return self.rows("train", count, 500 + seed)

    def held_out(self, which: str) -> list[Any]:
        """Rendered rows to measure with: of ``unseen`` or of ``seen`` templates."""
        return self.rows(*_HELD_OUT[which])

    def rows(self, part: str, count: int, seed: int) -> list[Any]:
        """Rendered songs with their answers: ``.tokens``, ``.start`` of the answer."""
        from mlx_distill.data.rows import to_example, to_row
        from mlx_distill.data.sources import read_source
        from mlx_distill.distill.quantization_error import tokenized_answers
        from mlx_distill.recipe import SourceConfig

        source = SourceConfig(generator="music", part=part, count=count, seed=seed)
        examples = [to_example(row, self.task, where) for where, row in read_source(source, self.task)]
        rows = [to_row(example, part) for example in examples]
        return tokenized_answers(self.tokenizer, rows, self.task, self.labels)


def setup(name: str, folder: Path | None = None) -> Setup:
    """One of the models; the demo is trained first where it is not in ``folder``.

    Args:
        name: One of :data:`MODELS`.
        folder: Of the demo's run; by default ``MLX_DISTILL_SETUP``, or a folder for temporary files.
    """
    from mlx_distill.infer.label_scoring import find_label_trie
    from mlx_distill.models.load import load_tokenizer
    from mlx_distill.pipeline import run
    from mlx_distill.recipe import load_recipe

    default = Path(tempfile.gettempdir()) / "mlx-distill-quantization"
    folder = folder or Path(os.environ.get("MLX_DISTILL_SETUP", default))
    model = folder / _FOLDERS[name]
    if not (model / "manifest.json").is_file():  # a finished one stays, whichever version has trained it
        for command in _COMMANDS:
            run("tiny", folder, only=command)
    tokenizer, task = load_tokenizer(model), load_recipe("tiny").load_task()
    return Setup(name, model, tokenizer, task, find_label_trie(tokenizer, task))


def put_outliers(model: Any, seed: int = 0) -> None:
    """Give some channels of a Qwen3 model large activations, in place; its function does not change.

    Each norm before linear layers is multiplied by c, and the columns of those layers are divided by it: c is
    log-normal with sigma 0.6, and twelve times as large in three channels.
    """
    import mlx.core as mx
    import numpy as np

    random = np.random.default_rng(seed)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        groups = [
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ]
        for norm, linears in groups:
            factors = random.lognormal(0.0, _OUTLIER_SIGMA, norm.weight.size)
            factors[random.choice(factors.size, _OUTLIER_CHANNELS, replace=False)] *= _OUTLIER_FACTOR
            c = mx.array(factors.astype(np.float32))
            norm.weight = norm.weight * c
            for linear in linears:
                linear.weight = linear.weight / c
    mx.eval(model.parameters())
