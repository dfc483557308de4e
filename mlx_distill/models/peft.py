"""LoRA adapters in PEFT's format: out and in. The matrices are the same ones, transposed; the scale is made
of alpha and rank alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_distill.errors import ModelError
from mlx_distill.models.adapters import LoraSettings, adapter_config, adapter_settings, relative_base
from mlx_distill.models.architectures.registry import architecture_of
from mlx_distill.models.checkpoint.plan import CheckpointPlan, plan_checkpoint
from mlx_distill.models.checkpoint.safetensors import read_header
from mlx_distill.models.config_files import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    adapter_base,
    is_adapter,
    load_config,
    read_object,
)
from mlx_distill.models.folder import source_key, staged_folder
from mlx_distill.models.hub import commit_of, copy_tokenizer, is_hub_id, resolve
from mlx_distill.storage import atomic_path, digest, read_manifest, sha256, write_json, write_text
from mlx_distill.text import counted

# (title, exported folder, its base, notes of the export) -> README.md
Card = Callable[[str, Path, CheckpointPlan, Sequence[str]], str]

PEFT_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"
_WHOLE = ("weight", "bias")
_OUT = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
_IN = {
    "lora_A.weight": "lora_a",
    "lora_B.weight": "lora_b",
    "lora_magnitude_vector": "m",
    "lora_magnitude_vector.weight": "m",
}


@dataclass(frozen=True)
class AdapterReport:
    """An adapter that was written in another format: the paths of its modules, the ``base`` it names, and
    what is to say of that.
    """

    destination: str
    base: str
    modules: tuple[str, ...]
    note: str | None = None

    @property
    def lines(self) -> list[str]:
        """For people."""
        lines = [
            f"written to {self.destination}: adapters of {counted(len(self.modules), 'module')}",
            f"the base it expects: {self.base}",
        ]
        return [*lines, self.note] if self.note else lines


def original_base(base: Path) -> str:
    """What other tools find a model of ours under: the Hub id or the Hugging Face folder that it was
    converted from.

    Where that is not known any more, the folder's own whole path.
    """
    path, seen = base.resolve(), set[Path]()
    while (
        path not in seen
        and (manifest := read_manifest(path))
        and (source := str(manifest.recorded.get("source") or ""))
    ):
        seen.add(path)
        if (Path(source).expanduser() / "config.json").is_file():
            path = Path(source).expanduser().resolve()
        elif is_hub_id(source):
            return source
    return str(path)


def to_peft(
    model: str | Path, destination: str | Path, *, base_model: str | None = None, card: Card | None = None
) -> AdapterReport:
    """Write an adapter folder of ours as PEFT reads it, whole or not at all.

    Args:
        model: An adapter folder of ours.
        destination: The folder to make.
        base_model: What PEFT will call the base (a Hub id or a folder in the Hugging Face layout); if not
            given, what our base was converted from: see :func:`original_base`.
        card: Writes the model card (README.md); see :func:`~mlx_distill.report.model_card.card_text`.

    Raises:
        ModelError: not an adapter, or an adapter on experts or routers, which PEFT has no place for.
        FileError: the disk refused, or the destination holds something else.
    """
    folder, destination = resolve(model), Path(destination)
    weights = peft_weights(folder)
    plan = plan_checkpoint(adapter_base(folder))
    base = base_model or original_base(plan.folder)
    with staged_folder(
        destination, folder, "export", {"layout": "peft", "base_model": base}, {"source": source_key(folder)}
    ) as work:
        paths = write_peft(folder, work.folder, weights, base)
        notes = [f"the adapter alone, of {counted(len(paths), 'module')}, in PEFT's format"]
        if card is not None:
            write_text(work.folder / "README.md", card(destination.name, folder, plan, notes))
        work.recorded.update(source=str(model), modules=len(paths))
    ours = is_mlx_folder(Path(base))
    note = (
        f"that folder is in the MLX layout, which PEFT cannot load: mlx-distill export {base} FOLDER --to hf"
        if ours
        else None
    )
    return AdapterReport(str(destination), base, tuple(paths), note)


def is_mlx_folder(folder: Path) -> bool:
    """Whether a folder is one that this package made, other than an export."""
    manifest = read_manifest(folder)
    return manifest is not None and manifest.stage != "export"


def peft_weights(folder: Path) -> dict[str, mx.array]:
    """The matrices of an adapter folder of ours under PEFT's names.

    Raises:
        ModelError: not an adapter, or one on modules that are no linear layers in transformers.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(f"{folder} holds no adapter", fix="export the whole model with --to hf")
    routers = tuple(f".{name}" for name in architecture_of(load_config(folder), str(folder)).modules.routers)
    infos, _ = read_header(folder / ADAPTER_FILE)  # says which tensor of a damaged file is cut
    out = {}
    for name, value in mx.load(str(folder / ADAPTER_FILE)).items():
        path, _, leaf = name.rpartition(".")
        if leaf not in (*_OUT, *_WHOLE):
            raise ModelError(f"{infos[name].where} is no matrix of an adapter", fix="train the adapter again")
        if value.ndim == 3 or path.endswith(routers):
            what = "experts" if value.ndim == 3 else "routers"
            kind = "adapters on" if leaf in _OUT else "whole"
            raise ModelError(
                f"{path}: PEFT's format has no place for {kind} {what}",
                fix="merge it instead: export with --to hf",
            )
        turned = value.ndim == 2 and leaf in _OUT
        out[f"{_PREFIX}{path}.{_OUT.get(leaf, leaf)}"] = mx.contiguous(value.T) if turned else value
    embedding = out.get(f"{_PREFIX}{_EMBEDDING}.weight")
    if embedding is not None and _tied(
        folder
    ):  # PEFT takes the head apart from the embedding, and wants both
        out[f"{_PREFIX}{_HEAD}.weight"] = embedding
    return out


def write_peft(folder: Path, into: Path, weights: dict[str, mx.array], base_model: str) -> list[str]:
    """Write what :func:`peft_weights` gave, with PEFT's config and the tokenizer, into a folder that somebody
    else publishes.

    Whole modules are named by their paths. A head that is tied to one of them PEFT keeps so only when asked
    to.
    """
    settings = adapter_settings(folder)
    endings = tuple(f".{ending}" for ending in _OUT.values())
    paths = sorted(
        {
            name.removeprefix(_PREFIX).removesuffix(ending)
            for name in weights
            for ending in endings
            if name.endswith(ending)
        }
    )
    whole = sorted(
        {name.removeprefix(_PREFIX).rpartition(".")[0] for name in weights if not name.endswith(endings)}
    )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": paths,
        "modules_to_save": whole or None,
        "ensure_weight_tying": _EMBEDDING in whole and _tied(folder),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": settings.rslora,
        "use_dora": settings.kind == "dora",
        "inference_mode": True,
    }
    with atomic_path(into / PEFT_FILE) as temporary:
        mx.save_safetensors(str(temporary), weights, metadata={"format": "pt"})
    copy_tokenizer(folder, into)
    write_json(into / ADAPTER_CONFIG, config)
    return paths


def _tied(folder: Path) -> bool:
    return bool(load_config(folder).get("tie_word_embeddings"))


def is_peft(folder: Path) -> bool:
    """Whether a folder holds an adapter in PEFT's format."""
    return is_adapter(folder) and "peft_type" in read_object(folder / ADAPTER_CONFIG)


def from_peft(source: str | Path, destination: str | Path, base: str | Path | None = None) -> AdapterReport:
    """Read a PEFT LoRA adapter into an adapter folder of ours, whole or not at all.

    Args:
        source: A folder, or the Hub id of one, with PEFT's ``adapter_config.json`` and
            ``adapter_model.safetensors``.
        destination: The adapter folder to make.
        base: The base model: a folder of ours or of the Hugging Face layout, or a Hub id; what PEFT's config
            calls so if not given.

    Raises:
        ModelError: not LoRA, or one of PEFT's options that mlx-lm's layers cannot compute.
        FileError: the disk refused, or the destination holds something else.
    """
    source, destination = resolve(source), Path(destination)
    config = read_object(source / ADAPTER_CONFIG)
    settings = replace(
        peft_settings(source / ADAPTER_CONFIG, config), target_modules=()
    )  # ours are named by what is there
    if not (source / PEFT_FILE).is_file():
        raise ModelError(f"{source / PEFT_FILE} is missing", fix="save the adapter as safetensors")
    out = _renamed(source / PEFT_FILE, settings.modules_to_save, bool(config.get("ensure_weight_tying")))
    base = base or str(config.get("base_model_name_or_path") or "")
    if _tied(resolve(base)):
        _tie(source / PEFT_FILE, out, bool(config.get("ensure_weight_tying")))
    paths = sorted(
        {name.rsplit(".", 1)[0] for name in out if not name.endswith(tuple(f".{leaf}" for leaf in _WHOLE))}
    )
    settings = replace(
        settings, modules_to_save=tuple(sorted({name.rsplit(".", 1)[0] for name in out} - set(paths)))
    )
    layers = int(load_config(resolve(base))["num_hidden_layers"])
    ours = adapter_config(settings, paths, layers, relative_base(base, destination))
    parents = {"source": digest([sha256(source / PEFT_FILE), sha256(source / ADAPTER_CONFIG)])}
    with staged_folder(
        destination, source, "import", {"layout": "peft", "base": ours["base"]}, parents
    ) as work:
        with atomic_path(work.folder / ADAPTER_FILE) as temporary:
            mx.save_safetensors(str(temporary), out, metadata={"format": "mlx"})
        copy_tokenizer(resolve(base), work.folder)
        write_json(work.folder / ADAPTER_CONFIG, ours)
        work.recorded.update(source=str(source), commit=commit_of(source))
    return AdapterReport(str(destination), str(base), tuple(paths))


def _renamed(file: Path, whole: Sequence[str], tied: bool) -> dict[str, mx.array]:
    """The tensors of a PEFT file under our names; of whole modules those that the config names, and the head
    that is ``tied`` to them.
    """
    infos, _ = read_header(file)
    weights = mx.load(str(file))
    names = (*whole, _HEAD) if whole and tied else tuple(whole)
    out = {}
    for name, info in infos.items():
        ending = next((ending for ending in (*_IN, *_WHOLE) if name.endswith("." + ending)), "")
        path = name.removeprefix(_PREFIX).removesuffix("." + ending)
        if not name.startswith(_PREFIX) or not (ending in _IN or (ending in _WHOLE and path.endswith(names))):
            raise ModelError(
                f"{info.where} is not a LoRA matrix of a linear layer", fix="save a plain LoRA adapter"
            )
        turned = weights[name].ndim == 2 and ending in _IN
        out[f"{path}.{_IN.get(ending, ending)}"] = mx.contiguous(weights[name].T) if turned else weights[name]
    for name in whole:
        if not any(path.endswith((f"{name}.weight", f"{name}.bias")) for path in out):
            raise ModelError(
                f"{file} has no tensor of {name!r}, which modules_to_save names",
                fix="save the adapter with PEFT again",
            )
    return out


def _tie(where: Path, out: dict[str, mx.array], tied: bool) -> None:
    """Where the base's head is its embedding: leave out the head's copy. PEFT keeps the two together only
    when asked to.
    """
    one, two = (out.get(f"{path}.weight") for path in (_EMBEDDING, _HEAD))
    if one is None and two is None:
        return
    if one is None or not (tied if two is None else mx.array_equal(one, two).item()):
        raise ModelError(
            f"{where}: embedding and head differ there, and are one in the base",
            fix="train with ensure_weight_tying: true",
        )
    out.pop(f"{_HEAD}.weight", None)


def peft_settings(where: Path, config: Mapping[str, Any]) -> LoraSettings:
    """The settings in PEFT's ``adapter_config.json``.

    Raises:
        ModelError: not LoRA, or one of PEFT's options that mlx-lm's layers cannot compute.
    """
    if config.get("peft_type") != "LORA":
        raise ModelError(
            f"{where}: peft_type {config.get('peft_type')!r}", fix="only LORA adapters can be read"
        )
    for key in (
        "rank_pattern",
        "alpha_pattern",
        "layer_replication",
        "target_parameters",
        "fan_in_fan_out",
        "lora_bias",
    ):
        if config.get(key):
            raise ModelError(
                f"{where}: {key} is not supported",
                fix="merge the adapter with PEFT and convert the whole model",
            )
    if config.get("bias", "none") != "none":
        raise ModelError(
            f"{where}: bias {config['bias']!r} is not supported",
            fix="merge the adapter with PEFT and convert the whole model",
        )
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), (int, float)):
            raise ModelError(f"{where}: {key} is missing", fix="save the adapter with PEFT again")
    kind, dropout = "dora" if config.get("use_dora") else "lora", float(config.get("lora_dropout") or 0.0)
    targets = config.get("target_modules") or ()
    names = (targets,) if isinstance(targets, str) else tuple(targets)  # a pattern, or names
    whole = tuple(config.get("modules_to_save") or ())
    return LoraSettings(
        int(config["r"]),
        float(config["lora_alpha"]),
        dropout,
        names,
        kind,
        bool(config.get("use_rslora")),
        whole,
    )
