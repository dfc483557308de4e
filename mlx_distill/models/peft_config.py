"""PEFT's ``adapter_config.json``: which keys change what an adapter computes, and what each of its modules
gets.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

from mlx_distill.errors import ModelError
from mlx_distill.models.adapters import LoraSettings

MERGE = "merge the adapter with PEFT (merge_and_unload) and convert the whole model"

# The keys of PEFT's LoraConfig that this module reads, or that the reading of the tensors honours.
HONOURED = (
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "lora_dropout",
    "bias",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "target_parameters",
    "modules_to_save",
    "ensure_weight_tying",
    "init_lora_weights",
)
# Keys that do not change what a saved adapter computes, whatever their value.
HARMLESS = (
    "inference_mode",
    "auto_mapping",  # the classes of the base; other tools leave marks of their own here
    "peft_version",
    "runtime_config",
    "fan_in_fan_out",  # PEFT itself ignores it for linear layers, and all layers here are linear
    "megatron_core",  # the name of a Python module; megatron_config decides
    "qalora_group_size",  # use_qalora decides
    # How the matrices were initialized; init_lora_weights decides whether the base was changed too.
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    # Training options that ms-swift and Unsloth add.
    "lora_dtype",
    "lorap_lr_ratio",
    "lorap_emb_lr",
    "unsloth_fixed",
)
# Keys that add something that mlx-lm's layers do not compute. A key that is not in any of these lists is
# refused in the same way, since a later version of PEFT can have added it.
NOT_COMPUTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "monteclora_config",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
# Initializations that leave the weights of the base as they are.
_HARMLESS_INIT = ("gaussian", "eva", "orthogonal", "mica")
# Initializations that change them: PEFT changes the base again whenever it loads the adapter.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_PLAIN_TASKS = (None, "", "CAUSAL_LM")


@dataclass(frozen=True)
class ModuleScale:
    """Rank and scale of the adapter of one module."""

    rank: int
    scale: float


@dataclass(frozen=True)
class PeftConfig:
    """A LoRA or DoRA configuration that can be computed.

    Attributes:
        where: The file, for messages.
        values: The keys of the file.
    """

    where: Path
    values: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """``lora`` or ``dora``."""
        return "dora" if self.values.get("use_dora") else "lora"

    @property
    def settings(self) -> LoraSettings:
        """The settings that hold for modules without a pattern."""
        values = self.values
        targets = values.get("target_modules") or ()
        return LoraSettings(
            int(values["r"]),
            float(values["lora_alpha"]),
            float(values.get("lora_dropout") or 0.0),
            (targets,) if isinstance(targets, str) else tuple(targets),  # a string is a regular expression
            self.kind,
            bool(values.get("use_rslora")),
            tuple(values.get("modules_to_save") or ()),
        )

    def module(self, path: str) -> ModuleScale:
        """Rank and scale of a module, with ``rank_pattern`` and ``alpha_pattern``.

        Args:
            path: As transformers names the module, such as ``model.layers.0.mlp.up_proj``.
        """
        rank = int(self._by_pattern("rank_pattern", path, self.values["r"]))
        alpha = float(self._by_pattern("alpha_pattern", path, self.values["lora_alpha"]))
        return ModuleScale(rank, alpha / (sqrt(rank) if self.values.get("use_rslora") else rank))

    def _by_pattern(self, key: str, path: str, default: Any) -> Any:
        for pattern, value in (self.values.get(key) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                return value
        return default

    def is_target(self, path: str, head: str) -> bool:
        """Whether PEFT puts an adapter on a module: it leaves out matrices of others that are in the file.

        Args:
            path: As transformers names the module.
            head: Name of the output head, which ``all-linear`` leaves out.
        """
        values = self.values
        targets = values.get("target_modules")
        if _matches(values.get("exclude_modules") or (), path):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in values.get("modules_to_save") or ()):
            return False
        if not targets:  # PEFT's list for the family of the model
            return not values.get("target_parameters")
        if isinstance(targets, str):
            return path != head if targets.lower() == "all-linear" else _matches(targets, path)
        return _matches(targets, path) and self._is_in_layers(path)

    def is_parameter(self, path: str) -> bool:
        """Whether ``target_parameters`` names a parameter, such as ``layers.0.mlp.experts.down_proj``."""
        return _matches(self.values.get("target_parameters") or [], path)

    def _is_in_layers(self, path: str) -> bool:
        layers = self.values.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        patterns = self.values.get("layers_pattern") or [r"[^.]*"]
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if match := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", path):
                return int(match[1]) in ([layers] if isinstance(layers, int) else layers)
        return False


def _matches(names: str | Sequence[str], path: str) -> bool:
    """Whether a path is named by a regular expression, or ends in one of several names."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def peft_config(where: Path, values: Mapping[str, Any]) -> PeftConfig:
    """Check PEFT's ``adapter_config.json``.

    Every key is honoured, or does not change what is computed, or is an error: a key that is not known is one
    unless it is null, false, empty or 0.

    Raises:
        ModelError: not LoRA, or a key whose value changes the computation in a way that mlx-lm's layers do
            not have: with file and key.
    """
    kind = values.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{where}: peft_type {kind!r}; only LORA can be read", fix=MERGE)
    if values.get("task_type") not in _PLAIN_TASKS:
        raise ModelError(
            f"{where}: task_type {values['task_type']!r} has another head than a language model",
            fix="only CAUSAL_LM can be read",
        )
    _check_initialization(where, values.get("init_lora_weights", True))
    for key, value in values.items():
        if key not in HONOURED and key not in HARMLESS and value:
            raise ModelError(f"{where}: {key} {_short(value)} is not supported", fix=MERGE)
    _check_types(where, values)
    _check_patterns(where, values)
    return PeftConfig(where, values)


def _check_initialization(where: Path, value: Any) -> None:
    if value is None or isinstance(value, bool):
        return
    name = str(value)
    if name.lower() in _HARMLESS_INIT:
        return
    if not name.lower().startswith(_CHANGED_BASE):
        raise ModelError(f"{where}: init_lora_weights {name!r} is not known", fix=MERGE)
    raise ModelError(
        f"{where}: init_lora_weights {name!r} changes the weights of the base model whenever PEFT loads the "
        "adapter",
        fix="save it as plain LoRA, which save_pretrained(..., path_initial_model_for_weight_conversion=...) "
        "does, or " + MERGE,
    )


def _check_types(where: Path, values: Mapping[str, Any]) -> None:
    """Raise for a rank, alpha, pattern or list of names that is of the wrong type."""
    saved_again = "save the adapter with PEFT again"

    def is_number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)

    def is_rank(value: Any) -> bool:
        return is_number(value) and value >= 1 and int(value) == value

    checks = (
        ("r", is_rank, "a whole number from 1 on"),
        ("lora_alpha", is_number, "a number"),
        ("rank_pattern", lambda v: v is None or _is_mapping_of(v, is_rank), "names with whole numbers"),
        ("alpha_pattern", lambda v: v is None or _is_mapping_of(v, is_number), "names with numbers"),
        ("lora_dropout", lambda v: v is None or (is_number(v) and 0 <= v < 1), "a number from 0 to below 1"),
        ("target_modules", _is_names, "a list of names, or a regular expression"),
        ("exclude_modules", _is_names, "a list of names, or a regular expression"),
        ("modules_to_save", lambda v: _is_names(v) and not isinstance(v, str), "a list of names"),
        ("layers_pattern", _is_names, "a name or a list of names"),
        ("target_parameters", lambda v: _is_names(v) and not isinstance(v, str), "a list of names"),
        ("bias", lambda v: v in (None, "none", "all", "lora_only"), "none, all or lora_only"),
    )
    for key, is_right, needed in checks:
        value = values.get(key)
        if not is_right(value):
            what = "is missing" if value is None else f"is {_short(value)}"
            raise ModelError(f"{where}: {key} {what}; it has to be {needed}", fix=saved_again)


def _is_mapping_of(value: Any, is_right: Any) -> bool:
    return isinstance(value, Mapping) and all(is_right(item) for item in value.values())


def _is_names(value: Any) -> bool:
    is_list = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return value is None or isinstance(value, str) or is_list


def _check_patterns(where: Path, values: Mapping[str, Any]) -> None:
    """Raise for a name that is not a regular expression where PEFT reads it as one, and for wrong layers."""
    texts = {key: values.get(key) for key in ("target_modules", "exclude_modules")}
    patterns = [(key, text) for key, text in texts.items() if isinstance(text, str)]
    keys = ("rank_pattern", "alpha_pattern", "modules_to_save")
    patterns += [(key, name) for key in keys for name in values.get(key) or ()]
    layers = values.get("layers_pattern") or []
    patterns += [("layers_pattern", name) for name in ([layers] if isinstance(layers, str) else layers)]
    again = "save the adapter with PEFT again"
    for key, pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ModelError(
                f"{where}: {key} {_short(pattern)} is not a regular expression: {error}", fix=again
            ) from error
    numbers = values.get("layers_to_transform")
    if not isinstance(numbers, int | None) and not (
        isinstance(numbers, list) and all(isinstance(number, int) for number in numbers)
    ):
        raise ModelError(f"{where}: layers_to_transform {_short(numbers)} is no list of numbers", fix=again)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
