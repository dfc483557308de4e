"""What the fuzz tests share: numbered mutations, outcomes, and an adapter in PEFT's format."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from helpers.checkpoints import GOLDEN, Tools
from helpers.mutations import mutate
from mlx_distill.errors import DistillError

COUNT = int(os.environ.get("FUZZ_COUNT", "40"))


def mutations(value: Any, kind: str, count: int = COUNT) -> Iterator[tuple[int, Any]]:
    """Numbered mutations of a value, the same ones in every run."""
    for seed in range(count):
        yield seed, mutate(value, random.Random(f"{kind} {seed}"))


def check_each(cases: Iterable[Any], check: Callable[..., None]) -> None:
    """Check all cases, and fail with every one that is wrong."""
    wrong = []
    for case in cases:
        try:
            check(*case)
        except AssertionError as error:
            wrong.append(str(error))
    assert not wrong, f"{len(wrong)} cases:\n" + "\n".join(wrong[:50])


def outcome(what: str, work: Callable[[], Any]) -> Any:
    """The result, or the error where it is one of ours; any other error fails, and one without a fix."""
    try:
        result = work()
    except DistillError as error:
        result = error
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    if isinstance(result, DistillError):
        assert result.message and result.fix, f"{what}: no fix: {result}"
    return result


def write_json_loosely(path: Path, value: Any) -> None:
    """JSON as other tools write it: with NaN and half surrogate pairs."""
    path.write_text(json.dumps(value), encoding="utf-8")


def adapter_folder(folder: Path, config: Any, tensors: Any) -> Path:
    folder.mkdir()
    write_json_loosely(folder / "adapter_config.json", config)
    Tools.write(folder / "adapter_model.safetensors", tensors)
    return folder


def plain_adapter() -> tuple[dict[str, Any], dict[str, Any]]:
    """PEFT's files of an adapter for the golden qwen3."""
    base = GOLDEN / "models_qwen3"
    sizes = {name: shape for name, (_, shape, _) in Tools.all(base).items()}
    rng = np.random.default_rng(0)
    tensors = {}
    for layer in range(2):
        for module in ("q_proj", "v_proj"):
            path = f"model.layers.{layer}.self_attn.{module}"
            out_size, in_size = sizes[f"{path}.weight"]
            for matrix, shape in (("A", (2, in_size)), ("B", (out_size, 2))):
                values = rng.standard_normal(shape).astype(np.float32) * 0.1
                name = f"base_model.model.{path}.lora_{matrix}.weight"
                tensors[name] = ("F32", list(shape), values.tobytes())
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "r": 2,
        "lora_alpha": 4,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "fan_in_fan_out": False,
        "inference_mode": True,
        "revision": None,
        "layers_to_transform": None,
    }
    return config, tensors


def difference(before: Any, after: Any) -> str:
    """The changed keys, for messages."""
    if not isinstance(after, dict):
        return repr(after)[:200]
    keys = [key for key in {**before, **after} if before.get(key, "<none>") != after.get(key, "<none>")]
    return ", ".join(f"{key}: {after.get(key, '<none>')!r}"[:160] for key in keys)
