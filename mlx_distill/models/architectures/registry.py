"""The architectures that this package knows, by the ``model_type`` of their config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mlx_distill.errors import ModelError
from mlx_distill.models.architectures.gpt_oss import GPT_OSS
from mlx_distill.models.architectures.qwen import QWEN2, QWEN3, QWEN3_MOE
from mlx_distill.models.checkpoint.layout import Architecture

ARCHITECTURES = {a.model_type: a for a in (QWEN2, QWEN3, QWEN3_MOE, GPT_OSS)}


def architecture_of(config: Mapping[str, Any], where: str = "config.json") -> Architecture:
    """The architecture of a config.

    Raises:
        ModelError: the config asks for code of its own, or its ``model_type`` is missing or unknown.

    >>> architecture_of({"model_type": "qwen3"}).model_type
    'qwen3'
    """
    for key in ("auto_map", "model_file"):
        if config.get(key):
            raise ModelError(
                f"{where}: {key} asks to run code that comes with the checkpoint",
                fix="remote code is never run; use a checkpoint without it",
            )
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise ModelError(f"{where}: unknown model_type {kind!r}", fix=f"known: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[kind]


def expected_shapes(config: Mapping[str, Any], where: str = "config.json") -> dict[str, tuple[int, ...]]:
    """Name and shape of every plain tensor that a config asks for, in our layout, without importing mlx-lm.

    Raises:
        ModelError: a key is missing or of the wrong kind.
    """
    architecture = architecture_of(config, where)
    with _config_errors(architecture, where):
        return architecture.shapes(architecture.arguments(config))


def build_model(config: Mapping[str, Any], where: str = "config.json") -> Any:
    """mlx-lm's model for a config, mended, with lazy random weights (none is computed).

    Raises:
        ModelError: a key is missing or of the wrong kind.
    """
    architecture = architecture_of(config, where)
    model_class, args_class = architecture.classes()
    with _config_errors(architecture, where):
        model = model_class(args_class.from_dict(architecture.arguments(config)))
        architecture.mend(model, config)
    return model


@contextmanager
def _config_errors(architecture: Architecture, where: str) -> Iterator[None]:
    cure = "take config.json from the original checkpoint"
    try:
        yield
    except KeyError as error:
        raise ModelError(f"{where}: {error.args[0]!r} is missing", fix=cure) from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{where}: not the config of a {architecture.model_type}: {error}", fix=cure
        ) from error
