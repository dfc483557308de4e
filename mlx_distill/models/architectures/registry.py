"""The supported architectures, by the ``model_type`` of config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mlx_distill.errors import ModelError
from mlx_distill.models.architectures.gpt_oss import GPT_OSS
from mlx_distill.models.architectures.qwen import QWEN2, QWEN3, QWEN3_MOE
from mlx_distill.models.checkpoint.layout import Architecture, ModuleNames

ARCHITECTURES: dict[str, Architecture] = {a.model_type: a for a in (QWEN2, QWEN3, QWEN3_MOE, GPT_OSS)}

_OTHER_MODALITIES = ("vision_config", "audio_config", "text_config", "thinker_config")


def architecture_of(config: Mapping[str, Any], where: str = "config.json") -> Architecture:
    """The architecture of a config.

    Raises:
        ModelError: the config asks for remote code, or its ``model_type`` is missing or unknown.

    >>> architecture_of({"model_type": "qwen3"}).model_type
    'qwen3'
    """
    for key in ("auto_map", "model_file"):
        if config.get(key):
            raise ModelError(
                f"{where}: {key} asks to run code that comes with the checkpoint",
                fix="remote code is never run; use a checkpoint without it",
            )
    name = config.get("model_type")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = f"known: {', '.join(ARCHITECTURES)}"
        if part := next((key for key in _OTHER_MODALITIES if config.get(key)), None):
            raise ModelError(
                f"{where}: model_type {name!r} with {part}: a model of several modalities, not of text alone",
                fix=f"take a checkpoint of a text model; {known}",
            )
        raise ModelError(f"{where}: unknown model_type {name!r}", fix=known)
    return ARCHITECTURES[name]


def architecture_of_model(model: Any) -> Architecture | None:
    """The architecture of a loaded model of mlx-lm; None if it is of another type."""
    return ARCHITECTURES.get(getattr(model, "model_type", ""))


def module_names(model: Any) -> ModuleNames:
    """The module paths of a loaded model; the usual ones if its type is unknown."""
    architecture = architecture_of_model(model)
    return architecture.modules if architecture else ModuleNames()


def expected_shapes(config: Mapping[str, Any], where: str = "config.json") -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of an unquantized model with this config, without importing mlx-lm.

    Raises:
        ModelError: a key is missing or of the wrong type.
    """
    architecture = architecture_of(config, where)
    with _config_errors(architecture, where):
        return architecture.shapes(architecture.arguments(config))


def build_model(config: Mapping[str, Any], where: str = "config.json") -> Any:
    """mlx-lm's model for a config, corrected by ``Architecture.patch``, with random weights that are not
    computed.

    Raises:
        ModelError: a key is missing or of the wrong type.
    """
    architecture = architecture_of(config, where)
    model_class, args_class = architecture.classes()
    with _config_errors(architecture, where):
        model = model_class(args_class.from_dict(architecture.arguments(config)))
        architecture.patch(model, config)
    return model


@contextmanager
def _config_errors(architecture: Architecture, where: str) -> Iterator[None]:
    fix = "take config.json from the original checkpoint"
    try:
        yield
    except KeyError as error:
        raise ModelError(f"{where}: {error.args[0]!r} is missing", fix=fix) from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{where}: not the config of a {architecture.model_type}: {error}", fix=fix
        ) from error
