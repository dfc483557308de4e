"""Settings that cannot work are refused before a weight is loaded, each with a fix."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import pytest
from helpers.list_batches import ListBatches
from helpers.tiny_model import make_batches, make_model, make_rows, settings

from mlx_distill.errors import ConfigError, DistillError
from mlx_distill.optim import make_optimizer, make_schedule
from mlx_distill.recipe import TrainConfig
from mlx_distill.train import make_trainable, sft, train
from mlx_distill.train.preflight import check_leftover, check_model, check_settings

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "wsd", "warmup": 0.9}, "schedule: wsd with warmup: 0.9 is longer than the run"),
        ({"schedule": "cosine", "warmup": 1.0}, "longer than the run"),
        ({"stream_gradients": True}, "stream_gradients with accumulate: 8"),
        ({"patience": 2, "evaluate_every": 0}, "patience with evaluate_every: 0"),
        ({"use_best": True, "evaluate_every": 0}, "use_best with evaluate_every: 0"),
        ({"evaluate_rows": 5, "evaluate_every": 0}, "evaluate_rows with evaluate_every: 0"),
        ({"best_metric": "accuracy"}, "best_metric: accuracy with evaluate_rows: 0"),
        (
            {"method": "full", "modules_to_save": ["norm"]},
            "modules_to_save with method: full, which trains everything",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_settings(TrainConfig(**changes))
    assert caught.value.fix


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("qwen3", {"lora_rank": 33}, "rank 33"),
        ("qwen3", {"method": "dora", "lora_rank": 1000}, "rank 1000"),
        ("qwen3", {"method": "galore"}, "galore_rank 512 for a matrix of"),
        ("qwen3", {"method": "apollo"}, "apollo_rank 256 for a matrix of"),
        ("qwen3", {"target_modules": ["q_proj", "qq_proj"]}, "'qq_proj' matches nothing"),
        (
            "qwen3",
            {"method": "galore", "galore_rank": 2, "target_modules": ["gate"]},
            "'gate' matches nothing",
        ),
        (
            "gpt_oss_mxfp4",
            {"method": "apollo-mini", "target_modules": ["up_proj"]},
            "these are quantized",
        ),
        (
            "gpt_oss_mxfp4",
            {"target_modules": ["q_proj"], "lora_rank": 2, "modules_to_save": ["up_proj"]},
            "cannot train quantized weights",
        ),
        (
            "qwen3",
            {"lora_rank": 2, "modules_to_save": ["lm_head"]},
            "module to save 'lm_head' matches nothing",
        ),
    ],
)
def test_settings_that_a_model_does_not_fit_are_refused_without_its_weights(
    tmp_path: Path, model: str, changes: dict[str, Any], message: str
) -> None:
    """The files hold headers, and NaN instead of weights."""
    folder = Path(shutil.copytree(GOLDEN / f"models_{model}", tmp_path / model))
    for shard in folder.glob("*.safetensors"):
        shard.write_bytes(hollow(shard.read_bytes()))
    mx.clear_cache()
    before = mx.get_active_memory()
    with pytest.raises(DistillError, match=message) as caught:
        check_model(folder, TrainConfig(**changes))
    assert caught.value.fix
    assert mx.get_active_memory() - before < 1 << 16


def hollow(shard: bytes) -> bytes:
    """A shard whose numbers are all NaN."""
    head = 8 + int.from_bytes(shard[:8], "little")
    return shard[:head] + b"\xff" * (len(shard) - head)


@pytest.mark.parametrize(
    ("model", "method"),
    [("qwen3", "lora"), ("gpt_oss", "galore"), ("gpt_oss_mxfp4", "dora"), ("qwen3_moe", "apollo")],
)
def test_settings_that_fit_return_the_trainable_modules(model: str, method: str) -> None:
    config = TrainConfig(
        method=method,
        lora_rank=4,
        galore_rank=4,
        apollo_rank=4,
        target_modules=["q_proj"],
        modules_to_save=["norm"],
    )
    assert check_model(GOLDEN / f"models_{model}", config) == [
        *(f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)),
        "model.norm",
    ]


def test_quantized_weights_can_be_trained_if_they_will_be_dequantized() -> None:
    config = TrainConfig(method="galore", galore_rank=4, target_modules=["up_proj"])
    assert len(check_model(GOLDEN / "models_gpt_oss_mxfp4", config, dequantize=True)) == 2


def test_a_schedule_of_another_length_than_the_run_is_refused(tmp_path: Path) -> None:
    config, source = settings(steps=6), ListBatches(make_batches(make_rows(8), 4))
    with pytest.raises(ConfigError, match="a schedule over 600 steps for a run of 6") as caught:
        train(make_model(), source, sft(), make_optimizer(config, 600), config, folder=tmp_path)
    assert caught.value.fix
    plain = optim.SGD(optim.cosine_decay(0.1, 600))  # not ours: nothing is known of it
    assert train(make_model(), source, sft(), plain, config, folder=tmp_path).steps == 6
    assert make_schedule("constant", 1.0, 5, warmup=1.0)(0).item() > 0


@pytest.mark.parametrize("changes", [{"patience": 2}, {"use_best": True}])
def test_patience_and_use_best_need_validation_rows(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = settings(evaluate_every=1, **changes)
    with pytest.raises(ConfigError, match="without a validation row") as caught:
        train(
            make_model(),
            ListBatches(make_batches(make_rows(8), 4)),
            sft(),
            make_optimizer(config, 6),
            config,
            folder=tmp_path,
        )
    assert caught.value.fix


def _train_in(folder: Path) -> Any:
    """Train a small model for its six steps, with checkpoints in ``folder``; the settings."""
    config = settings()
    model = make_model()
    make_trainable(model, config)
    train(
        model,
        ListBatches(make_batches(make_rows(8), 4)),
        sft(),
        make_optimizer(config, 6),
        config,
        folder=folder,
    )
    return config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"learning_rate": 3e-3},
            r"6 steps of an unfinished teach with other settings \(learning_rate was 0.01, is 0.003\)",
        ),
        ({"evaluate_rows": 9}, r"\(evaluate_rows was 0, is 9\)"),
        ({}, "with other data or another model"),
        (None, "another version"),
    ],
)
def test_checkpoints_of_an_unfinished_training_are_not_overwritten(
    tmp_path: Path, change: dict[str, Any] | None, message: str
) -> None:
    config = _train_in(tmp_path)
    if change is None:
        path = tmp_path / "checkpoints" / "step-00000006" / "state.json"
        state = json.loads(path.read_text())
        del state["settings"]["packing"]
        path.write_text(json.dumps(state))
    with pytest.raises(ConfigError, match=message) as caught:
        check_leftover(tmp_path / "checkpoints", settings(**(change or {})), "teach", False)
    assert "--from teach" in (caught.value.fix or "")
    check_leftover(tmp_path / "nothing", config, "teach", False)


def test_an_unfinished_training_of_more_ranks_is_not_resumed(tmp_path: Path) -> None:
    config = _train_in(tmp_path)
    check_leftover(tmp_path / "checkpoints", config, "teach", True)
    path = tmp_path / "checkpoints" / "step-00000006" / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "random": state["random"] * 2}))
    with pytest.raises(ConfigError, match="6 steps of an unfinished teach on 2 ranks, not 1") as caught:
        check_leftover(tmp_path / "checkpoints", config, "teach", True)
    assert "--from teach" in (caught.value.fix or "")
