"""Checkpoints that other tools quantized and models without a language-model head, recognised by their files.

This is read from config.json before any tensor, since the tensors of such a checkpoint have other names,
types and shapes, of which no message about a single tensor says what is the matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlx_distill.errors import ModelError
from mlx_distill.models.checkpoint.layout import Architecture

FP8 = "fp8"  # blocks with a scale each: dequantized by checkpoint.fp8
# What such checkpoints are usually called beside the unquantized one, by quant_method.
_SUFFIXES = {
    FP8: "-FP8",
    "fbgemm_fp8": "-FP8",
    "compressed-tensors": "-FP8-dynamic or -quantized.w4a16",
    "bitsandbytes": "-bnb-4bit",
    "gptq": "-GPTQ-Int4 or -GPTQ-Int8",
    "awq": "-AWQ",
    "aqlm": "-AQLM",
    "auto-round": "-AutoRound",
    "hqq": "-HQQ",
    "ModelOpt": "-NVFP4 or -FP8",
    "nvfp4": "-NVFP4",
    "mxfp8": "-MXFP8",
    "torchao": "-INT4 or -FP8",
}
# Ends of tensor names that only such checkpoints have, where config.json does not say so.
_TENSORS = {
    ".qweight": "gptq or awq",
    ".qzeros": "gptq or awq",
    ".g_idx": "gptq",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "compressed-tensors",
    ".weight_scale_inv": "fp8 without quantization_config",
    ".input_scale": "ModelOpt",
}
# The same for what was added to a model by training.
_ADDED = {
    ".base_layer.weight": (
        "an adapter that is not merged (PEFT)",
        "merge it (merge_and_unload) and save the result",
    ),
    ".lora_A.default.weight": (
        "an adapter that is not merged (PEFT)",
        "merge it (merge_and_unload) and save it",
    ),
    "score.weight": ("the head of a classifier", "take the checkpoint of the causal language model"),
    "v_head.summary.weight": ("the value head of reinforcement learning", "save the policy alone"),
}
_HEADS = {
    "ForSequenceClassification": "a classifier",
    "ForTokenClassification": "a classifier of tokens",
    "ForQuestionAnswering": "a model with a head for spans",
    "ForRewardModel": "a reward model",
    "ForProcessRewardModel": "a reward model",
    "ForConditionalGeneration": "a model of several modalities",
    "Model": "a model without a head, as embedding models are",
}


def check_supported(config: Mapping[str, Any], folder: Path, architecture: Architecture) -> None:
    """Raise for weights that another tool quantized, and for a model without a language-model head.

    Raises:
        ModelError: with the method or the class, the file and the key.
    """
    where = folder / "config.json"
    _check_head(config.get("architectures"), where)
    key, method = _method(config, folder)
    native = architecture.native_quantization
    if method not in (None, FP8, native.mode if native else None):
        raise unsupported_quantization(key, str(method))


def check_tensor_names(names: Iterable[str], listing: Path) -> None:
    """Raise for tensors that tell of another tool's quantization, an adapter or another head.

    Raises:
        ModelError: with file and tensor.
    """
    for name in names:
        if method := next((method for end, method in _TENSORS.items() if name.endswith(end)), None):
            raise unsupported_quantization(f"{listing}: tensor {name!r}", method)
        for end, (what, fix) in _ADDED.items():
            if name.endswith(end):
                raise ModelError(f"{listing}: tensor {name!r} is of {what}", fix=fix)


def unsupported_quantization(what: str, method: str) -> ModelError:
    """The error for a checkpoint that another tool quantized.

    Args:
        what: File, key and value.
        method: ``quant_method``.
    """
    suffix = _SUFFIXES.get(method)
    named = f" (its name has no {suffix})" if suffix else ""
    return ModelError(
        f"{what}: weights quantized by {method} cannot be read",
        fix=f"take the unquantized checkpoint{named}; quantize it here",
    )


def _method(config: Mapping[str, Any], folder: Path) -> tuple[str, str | None]:
    """Where the method is written, and the method; None if no other tool quantized the weights."""
    where = folder / "config.json"
    if config.get("quantization"):  # mlx-lm's own key
        return "", None
    if config.get("compression_config"):
        return f"{where}: compression_config", "compressed-tensors"
    if quantization := config.get("quantization_config"):
        key = f"{where}: quantization_config"
        if method := quantization.get("quant_method"):
            return f"{key}.quant_method", str(method)
        if loaded := next((k for k in ("load_in_4bit", "load_in_8bit") if quantization.get(k)), None):
            return f"{key}.{loaded}", "bitsandbytes"
        if not {"bits", "group_size"} <= set(quantization):  # these two alone are mlx-lm's
            return key, "a tool that it does not name"
    if (folder / "hf_quant_config.json").is_file():
        return f"{folder / 'hf_quant_config.json'}", "ModelOpt"
    return "", None


def _check_head(architectures: object, where: Path) -> None:
    names = [architectures] if isinstance(architectures, str) else architectures
    if not isinstance(names, list) or not names:
        return
    if any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        return
    name = str(names[0])
    kind = next((kind for end, kind in _HEADS.items() if name.endswith(end)), "no causal language model")
    raise ModelError(
        f"{where}: architectures: {name} is {kind}: it has no head that predicts tokens",
        fix="take the checkpoint of the causal language model (...ForCausalLM)",
    )
