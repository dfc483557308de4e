"""What a run downloads and writes, a stage at a time, as far as that is known before anything is loaded; what
two models at once take of the memory, and what the audit takes."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mlx_distill.config import resolve_asset
from mlx_distill.evaluate.audit import FOLDER as AUDIT
from mlx_distill.graph import Stage
from mlx_distill.models.hub import ALLOWED, IGNORED, is_hub_id
from mlx_distill.recipe import Recipe, TrainConfig
from mlx_distill.recipe_training import UNTRAINED
from mlx_distill.stages.audit import audited_models
from mlx_distill.status import Plan
from mlx_distill.storage import read_json
from mlx_distill.text import size

_TIMEOUT_S = 5.0
_LOGIT_ROWS = 64  # positions whose logits exist at once, of the student and of a live teacher
_QUANTIZED_BYTES = 1.125  # a weight at most: eight bits, and a scale and a bias for each group of 32


@dataclass(frozen=True)
class Resources:
    """What one stage needs.

    Attributes:
        download: Bytes from the Hub; 0 where nothing is, None where the Hub did not say.
        disk: Bytes that it writes at most, checkpoints included; None where that is not known.
        grad_checkpoint: Of a training: whether activations are computed again to save memory.
        model: The Hub model that is downloaded.
        refine: Of the quantization: what is fitted to how many rows.
        memory: Of a training with a live teacher, and of the audit: bytes of what is loaded at once and of a
            tile of logits of each model. The activations and the optimizer come on top, so it is what is
            needed at least.
        loaded: What is loaded at once.
    """

    download: int | None = 0
    disk: int | None = None
    grad_checkpoint: bool | None = None
    model: str | None = None
    refine: str | None = None
    memory: int | None = None
    loaded: str = "student and live teacher"

    @property
    def text(self) -> str:
        """For people; empty where there is nothing to say.

        >>> Resources(16_381_470_720, 16_381_470_720, model="Qwen/Qwen3-8B").text
        'download of Qwen/Qwen3-8B: 16.4 GB; disk: at most 16.4 GB'
        """
        parts = []
        if self.model:
            known = "size unknown (the Hub was not reached)" if self.download is None else size(self.download)
            parts.append(f"download of {self.model}: {known}")
        if self.disk is not None:
            parts.append(f"disk: at most {size(self.disk)}")
        if self.grad_checkpoint is not None:
            parts.append(f"grad_checkpoint: {str(self.grad_checkpoint).lower()}")
        if self.memory is not None:
            parts.append(f"memory: at least {size(self.memory)}, {self.loaded}")
        if self.refine is not None:
            parts.append(self.refine)
        return "; ".join(parts)


def stage_resources(recipe: Recipe, stages: Sequence[Stage], out: Path) -> dict[str, Resources]:
    """What each stage that has to be made needs, by its name.

    A converted model takes at most the bytes of its source, a quantized one those of the student, and while
    it is made its candidates (:func:`_candidate_bytes`); an adapter
    and its checkpoints (weights and two moments each, in float32) are counted from the model's shapes, where
    its config is on this machine. Targets and prepared rows depend on the rows and are not estimated.

    Args:
        recipe: The recipe.
        stages: Of its graph.
        out: The run's folder.
    """
    specs = {"teacher_base": recipe.teacher, "student_base": recipe.student}
    sources = {name: resolve_asset(spec, recipe.base) for name, spec in specs.items() if spec is not None}
    bases = {name: _source_resources(source, recipe) for name, source in sources.items()}
    needs: dict[str, Resources] = {}
    for stage in stages:
        if stage.name in bases:
            needs[stage.name] = bases[stage.name]
        elif stage.command in ("teach", "distill"):
            base = stage.parents[0] if stage.parents[0] in bases else "student_base"
            folder = _folder_of(base, out, sources)
            settings = getattr(recipe, stage.command)
            needs[stage.name] = Resources(
                disk=_training_bytes(folder, settings, bases[base].disk, recipe.dequantize),
                grad_checkpoint=settings.grad_checkpoint,
                memory=_live_memory(recipe, bases, sources, out) if "teacher" in stage.parents else None,
            )
        elif stage.command == "quantize":
            disk = bases["student_base"].disk
            if disk is not None:
                disk += _candidate_bytes(_folder_of("student_base", out, sources), recipe, disk)
            needs[stage.name] = Resources(disk=disk, refine=_refinement(recipe))
        elif stage.name == AUDIT:
            needs[stage.name] = _audit(recipe, bases, sources, out)
    return needs


def _audit(
    recipe: Recipe, bases: Mapping[str, Resources], sources: Mapping[str, str], out: Path
) -> Resources:
    """The memory of the audit, which loads one model after the other, the student beside the teacher's output
    head; and on the disk, until it is done, the teacher's hidden states of the targets.
    """
    from mlx_distill.errors import DistillError
    from mlx_distill.models.forward import head, hidden_size
    from mlx_distill.models.load import empty_model
    from mlx_distill.models.modules import dequantize_model

    def memory(name: str) -> int | None:
        return _model_memory(_folder_of(name, out, sources), bases[name].disk, recipe, name)

    teacher = memory("teacher_base")
    if "student" not in audited_models(recipe):
        return Resources(disk=0, memory=teacher, loaded="teacher")
    student, head_bytes, states = memory("student_base"), 0, None
    folder = _folder_of("teacher_base", out, sources)
    if folder is not None:
        try:
            model = empty_model(folder)
        except DistillError:  # the run itself reports it
            return Resources(disk=0)
        if recipe.dequantizes("teacher_base"):
            dequantize_model(model)
        head_bytes = _loaded_bytes(head(model), recipe, "teacher_base") + _logit_bytes(model)
        rows = recipe.evaluate.audit_rows * recipe.distill.max_length
        states = rows * hidden_size(model) * _number_bytes(recipe)
    if teacher is None or student is None:
        return Resources(disk=states)
    if teacher >= student + head_bytes:
        return Resources(disk=states, memory=teacher, loaded="teacher")
    loaded = "student and the teacher's output head"
    return Resources(disk=states, memory=student + head_bytes, loaded=loaded)


def _live_memory(
    recipe: Recipe, bases: Mapping[str, Resources], sources: Mapping[str, str], out: Path
) -> int | None:
    """The bytes of the student, of a live teacher beside it, and of a tile of logits of each; None where a
    model's size is not known.
    """
    own = recipe.teach.method == UNTRAINED and sources["teacher_base"] == sources["student_base"]
    names = ("student_base",) if own else ("student_base", "teacher_base")
    found = [_model_memory(_folder_of(name, out, sources), bases[name].disk, recipe, name) for name in names]
    known = [one for one in found if one is not None]
    return sum(known) if len(known) == len(found) else None


def _model_memory(folder: Path | None, disk: int | None, recipe: Recipe, name: str) -> int | None:
    """A loaded model with a tile of its logits. Of one whose config is not on this machine, its files."""
    from mlx_distill.errors import DistillError
    from mlx_distill.models.load import empty_model

    if folder is None:
        return disk
    try:
        model = empty_model(folder)
    except DistillError:  # the run itself reports it
        return disk
    return _loaded_bytes(model, recipe, name) + _logit_bytes(model)


def _loaded_bytes(module: Any, recipe: Recipe, name: str) -> int:
    """The weights of a model of a run, or of one of its modules, as they are loaded."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlx_distill.models.modules import dequantize_model

    if recipe.dequantizes(name):
        dequantize_model(module)
    arrays = [array for _, array in tree_flatten(module.parameters())]
    weights = sum(array.size for array in arrays if mx.issubdtype(array.dtype, mx.floating))
    packed = sum(array.nbytes for array in arrays if not mx.issubdtype(array.dtype, mx.floating))
    return weights * _number_bytes(recipe) + packed


def _number_bytes(recipe: Recipe) -> int:
    return 4 if recipe.compute_dtype == "float32" else 2


def _logit_bytes(model: Any) -> int:
    """A tile of a model's logits."""
    from mlx_distill.models.forward import head_columns

    return _LOGIT_ROWS * head_columns(model) * 4


def _folder_of(base: str, out: Path, sources: Mapping[str, str]) -> Path | None:
    """The folder with a base model's config, converted or not, where it is on this machine."""
    folders = (out / base, Path(sources[base]))
    return next((path for path in folders if (path / "config.json").is_file()), None)


def total(needs: Mapping[str, Resources]) -> str:
    """The sum of all stages for people.

    >>> total({"a": Resources(2_000_000_000, 1_000_000_000, model="m"), "b": Resources(disk=500_000_000)})
    'in all: download 2.0 GB, disk at most 1.5 GB'
    """
    downloads = {need.model: need.download for need in needs.values() if need.model}
    known = [value for value in downloads.values() if value is not None]
    parts = [f"download {size(sum(known)) if len(known) == len(downloads) else 'of unknown size'}"]
    if disk := sum(need.disk or 0 for need in needs.values()):
        parts.append(f"disk at most {size(disk)}")
    if unknown := [name for name, need in needs.items() if need.disk is None]:
        parts.append(f"disk not known yet for {', '.join(unknown)}")
    return f"in all: {', '.join(parts)}"


def total_disk(needs: Mapping[str, Resources]) -> int:
    """The bytes that all stages write and download, as far as known. Downloads stay in the Hub's cache."""
    return sum((need.disk or 0) + (need.download or 0) for need in needs.values())


def _refinement(recipe: Recipe) -> str:
    """What the quantize stage does with rows. Time and memory depend on them and are shown when it begins."""
    settings = recipe.quantize
    parts = [f"{settings.bits_per_weight:g} bits per weight"] if settings.bits_per_weight else []
    merged = settings.adapter == "merge"
    rows = f" on at most {settings.refine_rows} rows" if settings.refine != "none" and merged else ""
    return ", ".join([*parts, f"refine: {settings.refine if merged else 'none'}{rows}"])


def _candidate_bytes(folder: Path | None, recipe: Recipe, base: int) -> int:
    """The bytes of the scratch folder of a quantization with rows: the tensors of each candidate, and with
    ``distill`` the weights that were rounded and two checkpoints with their moments, all in float32; the
    hidden states of the rows.

    Of a model whose config is not on this machine all bytes count as weights of two bytes.
    """
    from math import prod

    from mlx_distill.errors import DistillError
    from mlx_distill.models.forward import hidden_size
    from mlx_distill.models.load import empty_model

    settings = recipe.quantize
    if settings.refine == "none" or settings.adapter != "merge":
        return 0
    weights, hidden = base // 2, 0
    if folder is not None:
        try:
            model = empty_model(folder)
        except DistillError:  # the run itself reports it
            return 0
        modules = [module for _, module in model.named_modules() if "weight" in module]
        weights = sum(prod(m.weight.shape) for m in modules if m.weight.ndim > 1 and "scales" not in m)
        hidden = hidden_size(model)
    distilled = settings.refine == "distill"
    each = (3 * _QUANTIZED_BYTES + 4 + 2 * 12) if distilled else 2 * _QUANTIZED_BYTES
    rows = (2 if distilled else 1) * settings.refine_rows * recipe.distill.max_length
    return int(weights * each) + rows * hidden * 4


def _source_resources(source: str, recipe: Recipe) -> Resources:
    """The download and the disk of a base model's conversion."""
    path = Path(source).expanduser()
    if not path.is_dir() and is_hub_id(source):
        cached = _cached(source, recipe.convert.revision)
        if cached is None:
            weights = _hub_bytes(source, recipe.convert.revision)
            return Resources(weights, weights, model=source)
        path = cached
    if not path.is_dir():
        return Resources()
    return Resources(disk=sum(file.stat().st_size for file in path.glob("*.safetensors")))


def _cached(repo: str, revision: str | None) -> Path | None:
    """The snapshot of a Hub model that is on this machine with all its shards."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError, OSError):
        return None
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = set(read_json(index).get("weight_map", {}).values())
        return folder if all((folder / name).exists() for name in files) else None
    return folder if any(folder.glob("*.safetensors")) else None


def _hub_bytes(repo: str, revision: str | None) -> int | None:
    """The bytes of the files that a download takes, or None where the Hub cannot be asked."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=_TIMEOUT_S)
    except Exception:  # offline, or any of the client's dozens of errors: the run itself reports it
        return None
    return sum(file.size or 0 for file in info.siblings or () if _is_taken(file.rfilename))


def _is_taken(name: str) -> bool:
    taken, left = (any(fnmatch.fnmatch(name, p) for p in patterns) for patterns in (ALLOWED, IGNORED))
    return taken and not left


def _training_bytes(
    folder: Path | None, settings: TrainConfig, base: int | None, dequantize: bool
) -> int | None:
    """The bytes of a training's result and of its checkpoints."""
    if folder is None:
        return None
    from mlx.utils import tree_flatten

    from mlx_distill.errors import DistillError
    from mlx_distill.models.load import empty_model
    from mlx_distill.models.modules import dequantize_model
    from mlx_distill.train.trainable import adapter_settings, make_trainable

    try:
        model = empty_model(folder)
        if dequantize:
            dequantize_model(model)
        make_trainable(model, settings)
    except DistillError:  # the run itself reports it
        return None
    trained = [array for _, array in tree_flatten(model.trainable_parameters())]
    weights = sum(array.nbytes for array in trained)
    result = weights if adapter_settings(settings) is not None else base or weights
    # Low-rank optimizers keep smaller moments than AdamW's two, which is an upper bound.
    moments = 2 * 4 * sum(array.size for array in trained)
    return result + weights + settings.keep_checkpoints * (weights + moments)


def with_resources(plan: Plan, recipe: Recipe, stages: Sequence[Stage], out: Path) -> Plan:
    """The plan of a run with what each stage that has to be made needs, and the sum.

    Args:
        plan: The plan, a row a stage and one for the report.
        recipe: The recipe.
        stages: Of its graph.
        out: The run's folder.
    """
    needs = stage_resources(recipe, stages, out)
    to_make = {
        stage.name: needs[stage.name]
        for stage, row in zip(stages, plan.stages, strict=False)
        if stage.name in needs and row["status"] != "current"
    }
    rows = [dict(row) for row in plan.stages]
    for stage, row in zip(stages, rows, strict=False):
        if stage.name in to_make:
            row["resources"] = asdict(to_make[stage.name])
            row["needs"] = to_make[stage.name].text
    return replace(plan, stages=rows, total=total(to_make) if to_make else None)
