"""Adapters of other tools: held against their base model by name and shape, and written as an adapter folder.

PEFT's are read by :mod:`~mlx_distill.models.peft_import`, mlx-lm's here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_distill.errors import ModelError
from mlx_distill.models.adapters import (
    ADAPTER_LEAVES,
    SAVED_LEAVES,
    LoraSettings,
    adapter_config,
    adapter_settings,
    relative_base,
)
from mlx_distill.models.architectures.registry import architecture_of, expected_shapes
from mlx_distill.models.checkpoint.foreign import check_supported
from mlx_distill.models.checkpoint.layout import Architecture
from mlx_distill.models.checkpoint.plan import CheckpointPlan, planned_config
from mlx_distill.models.checkpoint.safetensors import FLOATS, TensorInfo, read_header
from mlx_distill.models.config_files import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    is_adapter,
    load_config,
    named_base,
)
from mlx_distill.models.folder import check_destination, staged_folder
from mlx_distill.models.hub import commit_of, copy_tokenizer, has_tokenizer, resolve
from mlx_distill.storage import atomic_path, digest, sha256, write_json
from mlx_distill.text import counted

_RIGHT_BASE = "name the model that it was trained on: base in adapter_config.json, or --base of convert"


def check_lines(artifact: Mapping[str, Any] | None) -> list[str]:
    """The check of an exported folder in lines of text: each step, then the result."""
    return [*(step["sentence"] for step in artifact["steps"]), artifact["sentence"]] if artifact else []


@dataclass(frozen=True)
class AdapterReport:
    """An adapter that was written in another format, or with ``dry_run`` would be: its base model, the paths
    of its modules, a note, and the check of the exported folder (:mod:`mlx_distill.evaluate.artifact`).
    """

    destination: str
    base: str
    modules: tuple[str, ...]
    note: str | None = None
    dry_run: bool = False
    artifact: Mapping[str, Any] | None = None

    @property
    def lines(self) -> list[str]:
        """The report in lines of text."""
        verb = "would be written to" if self.dry_run else "written to"
        lines = [
            f"{verb} {self.destination}: adapters of {counted(len(self.modules), 'module')}",
            f"the base model that it expects: {self.base}",
        ]
        lines += [self.note] if self.note else []
        return [*lines, *check_lines(self.artifact)]


@dataclass(frozen=True)
class BaseModel:
    """The base model of an adapter as far as it is known without its weights.

    Attributes:
        name: A folder or a Hub id.
        revision: Commit, tag or branch of a Hub model.
        folder: Where its config and its tokenizer are.
        config: Its config.json.
        architecture: Of that config.
        shapes: Name and shape of each of its unquantized tensors in mlx-lm's layout.
    """

    name: str
    revision: str | None
    folder: Path
    config: Mapping[str, Any]
    architecture: Architecture
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def is_tied(self) -> bool:
        """Whether its head is its embedding."""
        return f"{self.architecture.modules.head}.weight" not in self.shapes

    @property
    def label(self) -> str:
        """Name and revision, for people."""
        return f"{self.name}, revision {self.revision}" if self.revision else self.name


@dataclass(frozen=True)
class ReadAdapter:
    """An adapter in the names and shapes of an adapter folder, which fits its base.

    Attributes:
        weights: Arrays by name.
        settings: Rank, alpha and so on; ``modules_to_save`` are the paths of whole modules.
        paths: The modules with matrices of low rank.
        vocab_size: Rows of its embedding, where the base has another number.
        note: For the report.
    """

    weights: Mapping[str, mx.array]
    settings: LoraSettings
    paths: tuple[str, ...]
    vocab_size: int | None = None
    note: str | None = None


def open_base(adapter: Path, name: str, revision: str | None, chosen: bool) -> BaseModel:
    """The base model of an adapter. Of a Hub model only the config and the tokenizer are downloaded.

    Args:
        adapter: The adapter's folder.
        name: A folder, relative to the working directory or to the adapter, or a Hub id.
        revision: Commit, tag or branch of a Hub model.
        chosen: Whether the user named it, and not the adapter's config.

    Raises:
        ModelError: it cannot be read, or its model type is not known.
    """
    where = adapter / ADAPTER_CONFIG
    if not name:
        raise ModelError(f"{where}: it names no base model", fix="name one with --base: a folder or a Hub id")
    try:
        beside = adapter / name
        is_local = Path(name).expanduser().is_dir()
        use_beside = not chosen and not is_local and beside.is_dir()
        folder = beside if use_beside else resolve(name, revision, weights=False)
        if is_adapter(folder):
            raise ModelError(f"{folder} holds an adapter itself", fix="merge that adapter first")
        has_weights = any(folder.glob("model*.safetensors"))
        config = planned_config(folder) if has_weights else load_config(folder)
        architecture = architecture_of(config, str(folder / "config.json"))
        check_supported(config, folder, architecture)
        shapes = expected_shapes(config, str(folder / "config.json"))
    except ModelError as error:
        if chosen:
            raise
        raise ModelError(
            f"{where}: the base model {name!r} that it names cannot be read, and the adapter is held against "
            f"it: {error.message}",
            fix="name the base with --base: a folder or a Hub id" + (f"; {error.fix}" if error.fix else ""),
        ) from error
    if is_local or use_beside:
        name, revision = str(folder), None
    return BaseModel(name, revision, folder, config, architecture, shapes)


def check_module(
    path: str,
    parts: Mapping[str, TensorInfo],
    needed: Mapping[str, tuple[int, ...]],
    base: BaseModel,
) -> None:
    """Hold the matrices of one module against the shapes that rank and base need.

    Args:
        path: The module.
        parts: Its tensors by leaf: ``lora_a``, ``lora_b``, and ``m`` of DoRA.
        needed: The shape of each of them.
        base: For messages.

    Raises:
        ModelError: one is missing, too many, empty, of another shape, or of integers: with file and tensor.
    """
    for leaf, info in parts.items():
        if leaf not in needed:
            raise ModelError(
                f"{info.where} belongs to DoRA, and the adapter's config says LoRA",
                fix="correct use_dora or fine_tune_type",
            )
        if 0 in info.shape:
            raise ModelError(
                f"{info.where} is empty (shape {list(info.shape)}): it was saved while its weights were "
                "spread over several processes",
                fix="gather them before saving, as DeepSpeed's zero_to_fp32.py does, and save it again",
            )
        if info.shape != needed[leaf]:
            raise ModelError(
                f"{info.where} has the shape {list(info.shape)}; the adapter's rank and {path} of the base "
                f"model {base.label} need {list(needed[leaf])}",
                fix="correct rank or base in adapter_config.json, or convert it with the right --base",
            )
        _check_type(info)
    for leaf in needed:
        if leaf not in parts:
            missing = {"lora_a": "A", "lora_b": "B", "m": "magnitude vector"}[leaf]
            other = next(iter(parts.values()))
            raise ModelError(
                f"{other.where}: the {missing} of the same module is missing", fix="save the adapter again"
            )


def _check_type(info: TensorInfo) -> None:
    if info.dtype not in FLOATS:
        raise ModelError(
            f"{info.where} has the type {info.dtype}", fix="save the adapter in float32, bfloat16 or float16"
        )


def check_finite(arrays: Mapping[str, mx.array], infos: Mapping[str, TensorInfo]) -> None:
    """Raise for NaN and infinity.

    Raises:
        ModelError: with file and tensor.
    """
    for name, info in infos.items():
        if not mx.all(mx.isfinite(arrays[name])).item():
            raise ModelError(
                f"{info.where} has NaN or infinite values",
                fix="train the adapter again with a lower learning rate, or use an earlier checkpoint",
            )


def no_module(info: TensorInfo, path: str, base: BaseModel) -> ModelError:
    """The error for a tensor of a module that the base model does not have."""
    names, layers = base.architecture.modules, int(base.config["num_hidden_layers"])
    layer = re.search(r"\.layers\.(\d+)\.", path)
    if path == names.head and base.is_tied:
        why = "the head of that model is its embedding (tie_word_embeddings)"
    elif layer and int(layer[1]) >= layers:
        why = f"that model has {counted(layers, 'layer')}"
    else:
        why = f"a {base.architecture.model_type} has no such matrix"
    return ModelError(
        f"{info.where} does not fit the base model {base.label}: {why}",
        fix=_RIGHT_BASE,
    )


def check_whole(name: str, info: TensorInfo, base: BaseModel) -> int | None:
    """Hold a whole weight or bias against the base.

    Returns:
        Its number of rows, if it is the embedding or the head with another number than in the base.

    Raises:
        ModelError: the base has no such tensor, or of another shape.
    """
    path, names = name.rpartition(".")[0], base.architecture.modules
    if name not in base.shapes:
        raise no_module(info, path, base)
    _check_type(info)
    shape = base.shapes[name]
    if info.shape == shape:
        return None
    is_resized = (
        path in (names.embedding, names.head) and len(info.shape) == 2 and info.shape[1:] == shape[1:]
    )
    if not is_resized or not info.shape[0]:
        raise ModelError(
            f"{info.where} has the shape {list(info.shape)}; the base model {base.label} needs {list(shape)}",
            fix=_RIGHT_BASE,
        )
    return info.shape[0]


def vocabulary_of(rows: Mapping[str, int | None], base: BaseModel, where: Path) -> int | None:
    """The number of columns that an adapter's embedding and head have, if the base has another.

    Args:
        rows: From :func:`check_whole`, by path of the module.
        base: The base model.
        where: The adapter's file.

    Raises:
        ModelError: embedding and head differ in it.
    """
    names = base.architecture.modules
    sizes = {rows.get(path) for path in (names.embedding, *(() if base.is_tied else (names.head,)))}
    if len(sizes) > 1:
        raise ModelError(
            f"{where}: only one of embedding and head has another number of rows than in the base model",
            fix="save both of them: save_pretrained(..., save_embedding_layers=True)",
        )
    return sizes.pop()


def write_import(
    source: Path,
    files: Sequence[Path],
    destination: Path,
    base: BaseModel,
    adapter: ReadAdapter,
    layout: str,
    dry_run: bool,
) -> AdapterReport:
    """Write an adapter folder, and publish it when it is whole.

    Args:
        source: The folder that was read.
        files: Its files, whose hashes the manifest records.
        destination: The folder to write.
        base: What the adapter was held against.
        adapter: What to write.
        layout: ``peft`` or ``mlx-lm``.
        dry_run: Write nothing.

    Raises:
        FileError: a failed write, or a destination that holds something else.
    """
    check_destination(destination, source)
    notes = [adapter.note] if adapter.note else []
    if adapter.vocab_size:
        notes.append(
            f"its embedding has {adapter.vocab_size} rows, the base's {base.config['vocab_size']}; "
            "the adapter's counts"
        )
    note = "; ".join(notes) or None
    report = AdapterReport(str(destination), base.label, adapter.paths, note, dry_run)
    if dry_run:
        return report
    named = relative_base(base.name, destination)
    layers = int(base.config["num_hidden_layers"])
    config = adapter_config(
        adapter.settings,
        adapter.paths,
        layers,
        named,
        revision=base.revision,
        vocab_size=adapter.vocab_size,
    )
    parents = {"source": digest([sha256(file) for file in files])}
    key = {"layout": layout, "base": named, **({"revision": base.revision} if base.revision else {})}
    with staged_folder(destination, source, "import", key, parents) as staged:
        with atomic_path(staged.folder / ADAPTER_FILE) as temporary:
            mx.save_safetensors(str(temporary), dict(adapter.weights), metadata={"format": "mlx"})
        # The tokenizer that the adapter was trained with can have more tokens, or another template.
        copy_tokenizer(source if has_tokenizer(source) else base.folder, staged.folder)
        write_json(staged.folder / ADAPTER_CONFIG, config)
        staged.recorded.update(source=str(source), commit=commit_of(source), base=base.name)
        if base.revision:
            staged.recorded["revision"] = base.revision
    return report


def from_mlx_lm(
    source: str | Path, destination: str | Path, base: str | Path | None = None, *, dry_run: bool = False
) -> AdapterReport:
    """Convert an adapter of mlx-lm, or one of our own folders, to an adapter folder that names its base.

    Args:
        source: A folder, or the Hub id of one, with ``adapter_config.json`` and ``adapters.safetensors``.
        destination: The adapter folder to write.
        base: The base model; by default that of its config.
        dry_run: Only check it, and write nothing.

    Raises:
        ModelError: an adapter that does not fit its base, or with NaN: with file and tensor.
        FileError: a failed write, or a destination that holds something else.
    """
    source, destination = resolve(source), Path(destination)
    file = source / ADAPTER_FILE
    settings = adapter_settings(source)
    if not file.is_file():
        raise ModelError(f"{file} is missing", fix="give the folder that mlx_lm.lora wrote")
    if base is None:
        named, revision = named_base(source)
        model = open_base(source, named, revision, chosen=False)
    else:
        model = open_base(source, str(base), None, chosen=True)
    adapter = _read_mlx_lm(file, settings, model)
    return write_import(
        source, (file, source / ADAPTER_CONFIG), destination, model, adapter, "mlx-lm", dry_run
    )


def _read_mlx_lm(file: Path, settings: LoraSettings, base: BaseModel) -> ReadAdapter:
    """The arrays of a file in mlx-lm's names, held against the base."""
    infos, _ = read_header(file)
    modules: dict[str, dict[str, TensorInfo]] = {}
    rows: dict[str, int | None] = {}
    for name, info in infos.items():
        path, _, leaf = name.rpartition(".")
        if leaf in ADAPTER_LEAVES:
            modules.setdefault(path, {})[leaf] = info
        elif leaf in SAVED_LEAVES:
            rows[path] = check_whole(name, info, base)
        else:
            raise no_module(info, path, base)
    for path, parts in modules.items():
        shape = base.shapes.get(f"{path}.weight", ())
        if len(shape) < 2 or path == base.architecture.modules.embedding:
            raise no_module(next(iter(parts.values())), path, base)
        check_module(path, parts, needed_shapes(shape, settings), base)
    weights = mx.load(str(file))
    check_finite(weights, infos)
    saved = tuple(sorted(path for path in rows if path not in modules))
    settings = replace(settings, target_modules=(), modules_to_save=saved)
    vocab_size = vocabulary_of(rows, base, file)
    return ReadAdapter(weights, settings, require_modules(modules, file), vocab_size)


def check_adapter(folder: Path, plan: CheckpointPlan) -> None:
    """Hold an adapter folder against its base model by name and shape.

    Args:
        folder: The adapter's.
        plan: Of the base model.

    Raises:
        ModelError: it does not fit, or holds NaN: with file and tensor.
    """
    shapes = expected_shapes(plan.config, str(plan.folder / "config.json"))
    base = BaseModel(str(plan.folder), None, plan.folder, plan.config, plan.architecture, shapes)
    if not (folder / ADAPTER_FILE).is_file():
        raise ModelError(f"{folder / ADAPTER_FILE} is missing", fix="train the adapter again")
    _read_mlx_lm(folder / ADAPTER_FILE, adapter_settings(folder), base)


def require_modules(paths: Iterable[str], file: Path) -> tuple[str, ...]:
    """The sorted paths of the adapted modules.

    Raises:
        ModelError: there are none.
    """
    found = tuple(sorted(paths))
    if not found:
        raise ModelError(f"{file} holds no matrices of LoRA", fix="save the adapter again")
    return found


def needed_shapes(shape: Sequence[int], settings: LoraSettings) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter's arrays in mlx-lm's layout, for a weight of a linear layer or of experts.

    >>> needed_shapes((6, 5), LoraSettings(2, 4.0, 0.0, ()))
    {'lora_a': (5, 2), 'lora_b': (2, 6)}
    """
    *experts, outputs, inputs = shape
    rank = settings.rank
    a, b = ((rank, inputs), (outputs, rank)) if experts else ((inputs, rank), (rank, outputs))
    needed = {"lora_a": (*experts, *a), "lora_b": (*experts, *b)}
    return needed | ({"m": (*experts, outputs)} if settings.kind == "dora" else {})
