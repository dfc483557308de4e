"""A request for a fine-tuning job in OpenAI's format, as a recipe of ours."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mlx_distill.config import asset_name
from mlx_distill.errors import ConfigError, ModelError
from mlx_distill.jobs.store import RECIPE
from mlx_distill.jobs.uploads import get_upload, upload_path
from mlx_distill.ledger.database import Ledger
from mlx_distill.ledger.root import Root
from mlx_distill.recipe_training import DistillConfig, TeachConfig
from mlx_distill.registry import resolve_model
from mlx_distill.serve.errors import ApiError
from mlx_distill.serve.pages.recipe_checks import GENERAL, problems, written_recipe
from mlx_distill.storage import os_errors, write_text

_FILES = {"training_file": "training", "validation_file": "validation"}
_MAX_METADATA, _MAX_KEY, _MAX_VALUE = 16, 64, 512
_MAX_SEED = 2**31 - 1
_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# What the request says in a way of its own, and what nobody but the owner of the machine may name.
_OTHERWISE = {"teacher": "model", "name": "suffix"}
_REFUSED = {
    ("data", "sources"): "the rows are those of training_file and validation_file",
    ("evaluate", "costs"): "a file of prices is not read over HTTP: see mlx-distill costs",
}
_HYPERPARAMETERS = {
    "n_epochs": ("epochs", "steps"),
    "batch_size": ("batch_size", "accumulate"),
    "learning_rate_multiplier": ("learning_rate",),
    "seed": ("seed",),
}


class Hyperparameters(BaseModel):
    """What can be said about the trainings; ``auto`` is the recipe's default."""

    model_config = ConfigDict(extra="forbid")

    n_epochs: Literal["auto"] | int = Field(default="auto", description="passes over the training rows")
    batch_size: Literal["auto"] | int = Field(default="auto", description="rows in an optimizer step")
    learning_rate_multiplier: Literal["auto"] | float = Field(
        default="auto", description="factor on the recipe's default learning rate"
    )


class Supervised(BaseModel):
    """The settings of the method ``supervised``."""

    model_config = ConfigDict(extra="forbid")

    hyperparameters: Hyperparameters | None = None


class Method(BaseModel):
    """How the model is trained."""

    model_config = ConfigDict(extra="ignore")

    type: str = Field(max_length=40, description="supervised")
    supervised: Supervised | None = None


class FineTuningRequest(BaseModel):
    """The body of a request for a fine-tuning job."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(
        min_length=1,
        max_length=500,
        description="NAME, NAME@alias or NAME:3 of the registry; a run or a folder under the root; "
        "asset:models/NAME; the ft: name of an earlier job",
    )
    training_file: str = Field(min_length=1, max_length=100)
    validation_file: str | None = Field(None, max_length=100)
    method: Method | None = None
    hyperparameters: Hyperparameters | None = Field(None, description="older form of method")
    seed: int | None = Field(None, ge=0, le=_MAX_SEED)
    suffix: str | None = Field(None, max_length=64)
    metadata: dict[str, str] | None = None
    integrations: list[Any] | None = None
    mlx_distill: dict[str, Any] | None = Field(
        None,
        description="what a recipe can say besides: task, student, and the blocks data, teach, targets, "
        "distill, quantize, evaluate, goals, controls",
    )


@dataclass(frozen=True)
class FineTuning:
    """A request that was found to be right.

    Attributes:
        recipe: The recipe in its plain form, with paths relative to the root.
        base: The model that is trained, in the name of the new one.
        suffix: The part of the new name that the request chose, or an empty text.
        out: The folder of the run, relative to the root.
    """

    recipe: Mapping[str, Any]
    base: str
    suffix: str
    out: str

    def model_name(self, job_id: str) -> str:
        """The name of the new model."""
        return model_name(self.base, self.suffix, job_id)


def model_name(base: str, suffix: str, job_id: str) -> str:
    """The name of the model that a job makes.

    >>> model_name("tiny-qwen3", "calc", "job-3f2a9c41d07e")
    'ft:tiny-qwen3:local:calc:job-3f2a9c41d07e'
    """
    return f"ft:{base}:local:{suffix}:{job_id}"


def base_name(model: str) -> str:
    """A model's name as a part of the name of one that was trained from it.

    >>> [base_name(name) for name in ("asset:models/tiny-qwen3", "music:3", "ft:qwen:local:x:job-1")]
    ['tiny-qwen3', 'music-3', 'qwen']
    """
    if model.startswith("ft:") and model.count(":") == 4:
        return model.split(":")[1]
    return re.sub(r"[^\w.-]+", "-", model.rstrip("/").rpartition("/")[2]).strip("-.") or "model"


def read_request(ledger: Ledger, body: FineTuningRequest, job_id: str) -> FineTuning:
    """Check a request, and make a recipe of it in the folder of the job, with the files that it trains on.

    Args:
        ledger: The ledger.
        body: The request.
        job_id: The identifier that the job will have.

    Raises:
        ApiError: 400 with the parameter that is wrong; nothing is left of the folder then.
    """
    _check_values(body)
    folder = ledger.root.jobs / job_id
    with os_errors(folder):
        folder.mkdir(parents=True)
    try:
        return _written(ledger, body, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _written(ledger: Ledger, body: FineTuningRequest, folder: Path) -> FineTuning:
    root, suffix = ledger.root, (body.suffix or "").strip()
    base = base_name(body.model)
    name = re.sub(r"[^\w.-]+", "-", suffix).strip("-.") or base
    out = f"runs/{name}-{folder.name.rpartition('-')[2][:6]}"
    extra = _extra(body)
    student = extra.get("student")
    raw: dict[str, Any] = {
        "name": name,
        "teacher": _model(ledger, body.model, "model"),
        **_trainings(body, extra, with_student=student is not None),
    }
    raw["data"] = _data(ledger, body, folder, has_task="task" in extra) | raw.pop("data", {})
    if student is not None:
        raw["student"] = _model(ledger, student, "mlx_distill.student")
    _check_recipe(raw, root, {raw["teacher"], raw.get("student")})
    write_text(folder / RECIPE, written_recipe(raw, root, folder))
    return FineTuning(raw, base, suffix, out)


def hyperparameters(body: FineTuningRequest) -> Hyperparameters:
    """Those of the request, in whichever form they came."""
    method = body.method.supervised.hyperparameters if body.method and body.method.supervised else None
    return method or body.hyperparameters or Hyperparameters()


def _refused(param: str, reason: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, f"{param}: {reason}", code=code, param=param)


def _check_values(body: FineTuningRequest) -> None:
    if body.method is not None and body.method.type != "supervised":
        raise _refused("method.type", "only supervised (distillation: mlx_distill.student)")
    if body.method is not None and body.method.supervised is not None and body.hyperparameters is not None:
        raise _refused("hyperparameters", "given twice: leave those out that stand beside method")
    given = hyperparameters(body)
    for name, low, high in (
        ("n_epochs", 1, 1000),
        ("batch_size", 1, 4096),
        ("learning_rate_multiplier", 1e-6, 1e6),
    ):
        value = getattr(given, name)
        if value != "auto" and not low <= value <= high:
            raise _refused(f"hyperparameters.{name}", f"{value} is not from {low:g} to {high:g}")
    if body.integrations:
        raise _refused("integrations", "none is there: what a job measures stays on this machine")
    metadata = body.metadata or {}
    if len(metadata) > _MAX_METADATA:
        raise _refused("metadata", f"more than {_MAX_METADATA} pairs")
    if any(len(key) > _MAX_KEY or len(value) > _MAX_VALUE for key, value in metadata.items()):
        raise _refused("metadata", f"keys up to {_MAX_KEY} characters, values up to {_MAX_VALUE}")
    for text in (body.model, body.suffix or "", *metadata, *metadata.values()):
        if not text.isprintable():
            raise _refused("the request", "a control character, or half a surrogate pair, in a name")


def _extra(body: FineTuningRequest) -> dict[str, Any]:
    """The part of a recipe that our own key has.

    Raises:
        ApiError: a part of it that is said otherwise, or may not come over HTTP.
    """
    extra = dict(body.mlx_distill or {})
    for name, otherwise in _OTHERWISE.items():
        if name in extra:
            raise _refused(f"mlx_distill.{name}", f"that is what {otherwise} says")
    if not isinstance(extra.get("task", ""), str):
        raise _refused("mlx_distill.task", "the name of a packaged task, or a YAML file under the root")
    if not isinstance(extra.get("student", ""), str):
        raise _refused("mlx_distill.student", "the name of a model")
    for (block, key), reason in _REFUSED.items():
        if isinstance(extra.get(block), Mapping) and key in extra[block]:
            raise _refused(f"mlx_distill.{block}.{key}", reason)
    for block in ("data", "teach", "distill"):
        if not isinstance(extra.get(block, {}), Mapping):
            raise _refused(f"mlx_distill.{block}", "a mapping of settings")
    return extra


def _model(ledger: Ledger, name: str, param: str) -> str:
    """A model as a recipe names it: a packaged one, or a folder relative to the root."""
    try:
        resolved = resolve_model(ledger, name)
    except ModelError as error:
        raise ApiError(400, f"{param}: {error}", code="model_not_found", param=param) from error
    if resolved.path is None:
        raise _refused(param, f"{name} is an analyzer outside of the registry, which cannot be trained")
    packaged = asset_name(str(resolved.path))
    return packaged if packaged.startswith("asset:") else ledger.root.relative(resolved.path)


def _data(ledger: Ledger, body: FineTuningRequest, folder: Path, *, has_task: bool) -> dict[str, Any]:
    """The block ``data``. Chats are trained on as they were sent: none of them is held out unless a file says
    so, and similar ones are not dropped. With a task the recipe's own splits hold.
    """
    split = None if has_task and body.validation_file is None else "train"
    sources = [_source(ledger, body.training_file, "training_file", folder, split)]
    if body.validation_file is not None:
        sources.append(_source(ledger, body.validation_file, "validation_file", folder, "valid"))
    plain = {} if has_task else {"test_fraction": 0, "valid_fraction": 0, "near_duplicates": 0}
    return {"sources": sources, **plain}


def _source(ledger: Ledger, file_id: str, param: str, folder: Path, split: str | None) -> dict[str, Any]:
    """A source of rows, whose file is kept with the job whatever becomes of the upload."""
    upload = get_upload(ledger, file_id)
    if upload is None:
        raise ApiError(400, f"{param}: no file {file_id!r}", code="file_not_found", param=param)
    if upload.purpose != "fine-tune":
        raise _refused(param, f"{file_id} was uploaded for {upload.purpose}, not for fine-tune")
    copy = folder / (_FILES[param] + _extension(upload.filename))
    _link(upload_path(ledger, upload), copy, param)
    return {"path": ledger.root.relative(copy), **({"split": split} if split else {})}


def _link(source: Path, copy: Path, param: str) -> None:
    try:
        os.link(source, copy)
        return
    except FileNotFoundError as error:
        raise ApiError(400, f"{param}: its bytes are gone", code="file_not_found", param=param) from error
    except OSError:  # no hard links there
        pass
    with os_errors(copy):
        shutil.copyfile(source, copy)


def _extension(filename: str) -> str:
    """The ending by which the reader of files knows their kind.

    >>> [_extension(name) for name in ("a.CSV", "rows.jsonl.gz", "rows", "x.exe")]
    ['.csv', '.jsonl.gz', '.jsonl', '.jsonl']
    """
    name, packed = filename.lower(), ""
    for ending in _COMPRESSED:
        if name.endswith(ending):
            name, packed = name.removesuffix(ending), ending
    kind = next((ending for ending in _SUFFIXES if name.endswith(ending)), ".jsonl")
    return kind + packed


def _trainings(body: FineTuningRequest, extra: Mapping[str, Any], *, with_student: bool) -> dict[str, Any]:
    """The recipe's blocks with the hyperparameters, which hold for every training of the job."""
    given = hyperparameters(body)
    raw = {name: value for name, value in extra.items() if name != "student"}
    configs = {"teach": TeachConfig} | ({"distill": DistillConfig} if with_student else {})
    for block, config in configs.items():
        settings: dict[str, Any] = {}
        if given.n_epochs != "auto":
            settings["epochs"] = given.n_epochs
        if given.batch_size != "auto":
            settings |= {"batch_size": 1, "accumulate": given.batch_size}
        if given.learning_rate_multiplier != "auto":
            settings["learning_rate"] = config().learning_rate * given.learning_rate_multiplier
        if body.seed is not None:
            settings["seed"] = body.seed
        own = dict(extra.get(block, {}))
        for name, keys in _HYPERPARAMETERS.items():
            twice = [key for key in keys if key in own and settings.keys() & set(keys)]
            if twice:
                raise _refused(f"mlx_distill.{block}.{twice[0]}", f"{name} says that too: give one of them")
        if block == "teach" and "task" not in extra:
            settings["loss_on"] = "all"
        raw[block] = settings | own
    if "seed" not in raw.get("data", {}) and body.seed is not None:
        raw["data"] = {**raw.get("data", {}), "seed": body.seed}
    return raw


def _check_recipe(raw: Mapping[str, Any], root: Root, models: set[str | None]) -> None:
    """Check what the recipe says.

    Args:
        raw: The recipe.
        root: Its root.
        models: Those that were found by name, which may lie among the server's own files.
    """
    try:
        _, found = problems(raw, root, known={name for name in models if name})
    except ConfigError as error:
        raise _refused("mlx_distill", str(error)) from error
    if not found:
        return
    name, texts = next(iter(found.items()))
    raise _refused(_param(name), "; ".join(texts))


def _param(name: str) -> str:
    """The parameter of the request that an input of the recipe came from."""
    known = {
        "teacher": "model",
        "data.sources.0.path": "training_file",
        "data.sources.1.path": "validation_file",
        GENERAL: "mlx_distill",
    }
    return known.get(name, f"mlx_distill.{name}")
