"""Describe what a folder holds: a checkpoint of either layout, an adapter, a stage of a run, or a run."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_distill.distill.teacher_cache import TargetReader
from mlx_distill.errors import DistillError, ModelError
from mlx_distill.evaluate.audit import FOLDER as AUDIT
from mlx_distill.evaluate.audit import audit_texts, read_audit
from mlx_distill.models.adapter_import import check_finite as check_arrays
from mlx_distill.models.adapters import adapter_settings
from mlx_distill.models.checkpoint.layout import TensorPlan, wildcard_name
from mlx_distill.models.checkpoint.plan import CheckpointPlan, plan_checkpoint
from mlx_distill.models.checkpoint.safetensors import TensorInfo, read_header
from mlx_distill.models.checkpoint.tensor_job import check_finite
from mlx_distill.models.config_files import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    PEFT_FILE,
    is_adapter,
    named_base,
    read_object,
)
from mlx_distill.models.convert import plan_notes
from mlx_distill.models.hub import resolve
from mlx_distill.models.peft import is_peft
from mlx_distill.models.peft_config import peft_config
from mlx_distill.storage import Manifest, check_folder, finished_name, partial_folder, read_manifest, sha256
from mlx_distill.text import counted, percent, size
from mlx_distill.thinking import read_thinking

_READ_BYTES = 1 << 22  # how much of a tensor is checked at once


@dataclass(frozen=True)
class InspectRow:
    """The tensors of one name in all layers: how many, of which shape, how stored, and how large in all."""

    name: str
    count: int
    shape: tuple[int, ...]
    stored: str
    parameters: int
    bits: float
    bytes: int

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as texts."""
        shape = "x".join(map(str, self.shape)) or "1"
        parameters, bits = f"{self.parameters:,}", f"{self.bits:.2f}"
        return self.name, str(self.count), shape, self.stored, parameters, bits, size(self.bytes)


@dataclass(frozen=True)
class InspectReport:
    """What a folder holds.

    Attributes:
        path: The folder.
        kind: ``model``, ``adapter``, ``stage`` or ``run``.
        facts: Named values, for people.
        rows: The tensors of a model or an adapter.
        problems: What is wrong; empty for a sound folder.
        verified: Whether files were hashed and weights checked.
        hashed: The number of files whose hash was compared with a recorded one.
    """

    path: str
    kind: str
    facts: Mapping[str, Any]
    rows: tuple[InspectRow, ...] = ()
    problems: tuple[str, ...] = ()
    verified: bool = False
    hashed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return {**asdict(self), "rows": [{**asdict(row), "shape": list(row.shape)} for row in self.rows]}

    def lines(self) -> list[str]:
        """The report for people: facts, a table of tensors, problems."""
        width = max((len(name) for name in self.facts), default=0)
        out = [f"{self.path}: {self.kind}"]
        out += [
            f"  {name.ljust(width)}  {value}" for name, value in self.facts.items() if value not in (None, "")
        ]
        if self.rows:
            cells: list[tuple[str, ...]] = [
                ("tensor", "count", "shape", "stored", "parameters", "bits", "size")
            ]
            cells += [row.cells for row in self.rows]
            widths = [max(len(row[i]) for row in cells) for i in range(7)]
            out += [
                "",
                *("  " + "  ".join(row[i].ljust(widths[i]) for i in range(7)).rstrip() for row in cells),
            ]
        out += [f"problem: {problem}" for problem in self.problems]
        if self.verified and not self.problems:
            had = "has the hash it was" if self.hashed == 1 else "have the hash they were"
            hashes = (
                f"{counted(self.hashed, 'file')} {had} written with"
                if self.hashed
                else "no hashes are recorded for these files"
            )
            out.append(
                f"verified: {hashes}"
                + ("; no weight is NaN or infinite" if self.kind in ("model", "adapter") else "")
            )
        return out


def inspect(path: str | Path, verify: bool = False) -> InspectReport:
    """Describe what a folder holds.

    Args:
        path: A folder of a model, an adapter, a stage or a run, or the id of a downloaded model.
        verify: Hash every file of a manifest (or of a snapshot of the Hub) and check that every weight is
            finite.

    Raises:
        ModelError: the folder holds none of these, or a damaged checkpoint; names the file and the tensor.
    """
    here = Path(path).expanduser()
    if here.is_file():
        raise ModelError(
            f"{path}: a file, not a folder",
            fix="give the folder of a model, an adapter, a stage or a run; "
            "a recipe is shown by: mlx-distill run RECIPE --dry-run",
        )
    if not here.exists() and (partial := partial_folder(here)).is_dir():
        return InspectReport(str(path), "stage", {"state": _unfinished_state(partial)})
    folder = resolve(path)
    manifest = read_manifest(folder)
    problems, hashed = [], 0
    if manifest:
        hashed = len(manifest.files) if verify else 0
        if damage := check_folder(folder, manifest, verify=verify):
            problems.append(damage)
    elif verify:
        hashed = _snapshot_hashes(folder, problems)
    if is_adapter(folder):
        report = _adapter(folder, manifest, problems, verify)
    elif (folder / "config.json").is_file():
        report = _model(folder, manifest, problems, verify)
    elif manifest:
        facts = {**_provenance(manifest), "files": len(manifest.files), "size": size(_bytes(manifest))}
        if manifest.stage == "targets":
            facts |= _targets_facts(folder, manifest, problems)
        if manifest.stage == AUDIT:
            facts |= _audit_facts(folder)
        report = InspectReport(str(path), "stage", facts, problems=tuple(problems), verified=verify)
    else:
        return _run(folder, str(path), verify)
    return replace(report, hashed=hashed)


def _snapshot_hashes(folder: Path, problems: list[str]) -> int:
    """Compare the weights of a downloaded snapshot with the hashes that the Hub's cache names them by, and
    return the number of files that were compared.
    """
    blobs = {path: path.resolve().name for path in sorted(folder.glob("*.safetensors")) if path.is_symlink()}
    hashes = {path: name for path, name in blobs.items() if re.fullmatch("[0-9a-f]{64}", name)}
    problems += [f"{path} is not what the Hub sent" for path, name in hashes.items() if sha256(path) != name]
    return len(hashes)


def _run(folder: Path, path: str, verify: bool) -> InspectReport:
    stages = {
        p.parent.relative_to(folder).as_posix(): p.parent
        for p in sorted(folder.glob("*/manifest.json")) + sorted(folder.glob("*/*/manifest.json"))
    }
    unfinished = {
        p.relative_to(folder).with_name(finished_name(p)).as_posix(): _unfinished_state(p)
        for p in sorted(folder.glob(".*.partial")) + sorted(folder.glob("*/.*.partial"))
    }
    if not stages and not unfinished:
        raise ModelError(
            f"{folder}: neither a model, an adapter, a stage nor a run",
            fix="give a folder with config.json or manifest.json",
        )
    facts, problems, hashed = {}, [], 0
    for name, stage in stages.items():
        try:
            manifest = read_manifest(stage)
            damage = check_folder(stage, manifest, verify=verify) if manifest else None
        except DistillError as error:
            manifest, damage = None, str(error)
        hashed += len(manifest.files) if manifest and verify else 0
        facts[name] = _summary(name, manifest) if manifest else "damaged"
        if damage:
            problems.append(damage)
    for name, state in unfinished.items():
        facts[name] = f"{facts[name]}; started again, {state}" if name in facts else state
    return InspectReport(path, "run", facts, problems=tuple(problems), verified=verify, hashed=hashed)


def _targets_facts(folder: Path, manifest: Manifest, problems: list[str]) -> dict[str, Any]:
    """What a cache of soft targets holds."""
    try:
        reader = TargetReader(folder)
    except DistillError as error:
        problems.append(str(error))
        return {}
    index, tokens = reader.index, max(reader.index["tokens"], 1)
    whole = _bytes(manifest) / tokens
    kept = f"{reader.layout.top_k} samples"
    if not reader.layout.sampled:
        kept = f"top {reader.layout.top_k}, {percent(index['kept_mass'], 2)} of the mass"
    for temperature, mass in index["tail_mass_at"].items():
        kept += f", {percent(1 - mass, 2)} of that at temperature {temperature}"
    return {
        "rows": f"{len(reader):,}",
        "tokens": f"{index['tokens']:,}",
        "bytes a token": f"{whole:.1f}, of which {index['record_bytes']} its distribution",
        "kept": kept,
    }


def _audit_facts(folder: Path) -> dict[str, Any]:
    """What an audit has found."""
    figures = read_audit(folder)
    if figures is None:
        return {}
    return audit_texts(figures) | {"warnings": "; ".join(one["what"] for one in figures["warnings"])}


def _unfinished_state(partial: Path) -> str:
    """How far a killed or interrupted stage came."""
    saved = sorted(partial.glob("scratch/checkpoints/step-*/state.json"))
    state = read_object(saved[-1]) if saved else {}
    step = f": step {state.get('step')} of {state.get('steps')} saved" if saved else ""
    return f"not finished{step}; the same command continues from there"


def _summary(name: str, manifest: Manifest) -> str:
    """A folder of a run in one line; with the stage that made it, where the folder has another name."""
    stage = [manifest.stage] if manifest.stage != name else []
    return ", ".join(
        [*stage, f"key {manifest.key[:12]}", counted(len(manifest.files), "file"), size(_bytes(manifest))]
    )


def _bytes(manifest: Manifest) -> int:
    return sum(entry.size for entry in manifest.files.values())


def _provenance(manifest: Manifest | None) -> dict[str, Any]:
    if manifest is None:
        return {}
    out: dict[str, Any] = {"stage": f"{manifest.stage}, key {manifest.key[:12]}"}
    return out | {key: manifest.recorded[key] for key in ("source", "commit") if manifest.recorded.get(key)}


def _model(folder: Path, manifest: Manifest | None, problems: list[str], verify: bool) -> InspectReport:
    plan = plan_checkpoint(folder)
    rows = _rows(plan)
    if verify:
        problems += _not_finite(plan.tensors)
    config = plan.config
    rope = plan.architecture.rope(config)
    parameters, stored = sum(r.parameters for r in rows), sum(r.bytes for r in rows)
    facts = {
        "model type": config["model_type"],
        "layers": config["num_hidden_layers"],
        "hidden size": config["hidden_size"],
        "vocabulary": _vocabulary(folder, config),
        "parameters": f"{parameters:,}",
        "bits per weight": round(8 * stored / max(parameters, 1), 3),
        "size": f"{size(stored)} in {counted(len(plan.checkpoint.files), 'file')}",
        "layout": _layout(plan),
        "rope": _rope_text(rope.kind, rope.theta, rope.scaling),
        "head": "tied to the embedding" if config.get("tie_word_embeddings") else "not tied",
        "template": _template(folder),
        "note": "; ".join(plan_notes(plan)) or None,
        **_provenance(manifest),
    }
    return InspectReport(str(folder), "model", facts, tuple(rows), tuple(problems), verify)


def _layout(plan: CheckpointPlan) -> str:
    if any(tensor.rule != "same" for tensor in plan.tensors):
        return "Hugging Face"
    same_in_both = not plan.architecture.rules and "quantization" not in plan.config
    return "the same in both" if same_in_both else "MLX"


def _vocabulary(folder: Path, config: Mapping[str, Any]) -> str:
    path = folder / "tokenizer.json"
    if not path.is_file():
        return f"{config['vocab_size']} columns, no tokenizer"
    try:
        raw = json.loads(path.read_bytes())
        ids = {*raw["model"]["vocab"].values(), *(token["id"] for token in raw.get("added_tokens", ()))}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{config['vocab_size']} columns, a tokenizer of an unknown format"
    return f"{config['vocab_size']} columns, {len(ids)} tokens"


def _rope_text(kind: str, theta: float, scaling: Mapping[str, Any]) -> str:
    keys = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate")
    return ", ".join([kind, f"theta {theta:g}", *(f"{key} {scaling[key]}" for key in keys if key in scaling)])


def _template(folder: Path) -> str:
    path = folder / "chat_template.jinja"
    if path.is_file():
        text = path.read_text(encoding="utf-8", errors="replace")
    else:
        config = folder / "tokenizer_config.json"
        text = str((read_object(config) if config.is_file() else {}).get("chat_template") or "")
    if not text:
        return "none"
    formats = {"<|channel|>": "harmony", "<|im_start|>": "ChatML"}
    name = next((name for token, name in formats.items() if token in text), "another")
    most = read_thinking(folder)
    thinks = f"; the model thinks before it answers, in at most {counted(most, 'token')}" if most else ""
    return f"{name}, {len(text)} characters{thinks}"


def _rows(plan: CheckpointPlan) -> list[InspectRow]:
    groups: dict[tuple[str, tuple[int, ...], str], list[tuple[int, int]]] = defaultdict(list)
    for tensor in plan.tensors:
        path, _, leaf = tensor.name.rpartition(".")
        spec = plan.quantization.get(path)
        if spec and leaf in ("scales", "biases"):
            continue
        shape, stored, num_bytes = tensor.shape, tensor.dtype, tensor.nbytes
        if spec and leaf == "weight":
            shape = (*shape[:-1], shape[-1] * 32 // spec.bits)
            stored, num_bytes = f"{spec.mode} {spec.bits}/{spec.group_size}", plan.quantized_bytes(path)
        groups[wildcard_name(tensor.name), shape, stored].append((plan.parameters(tensor), num_bytes))
    rows = []
    for (name, shape, stored), members in groups.items():
        parameters, num_bytes = (sum(column) for column in zip(*members, strict=True))
        bits = round(8 * num_bytes / max(parameters, 1), 4)
        rows.append(InspectRow(name, len(members), shape, stored, parameters, bits, num_bytes))
    return rows


def _adapter_rows(tensors: Mapping[str, TensorInfo]) -> tuple[InspectRow, ...]:
    first: dict[tuple[str, tuple[int, ...], str], TensorInfo] = {}
    counts: Counter[tuple[str, tuple[int, ...], str]] = Counter()
    for name, info in tensors.items():
        group = wildcard_name(name), info.shape, info.dtype
        first.setdefault(group, info)
        counts[group] += 1
    rows = []
    for (name, shape, dtype), info in first.items():
        count, parameters = counts[name, shape, dtype], prod(shape)
        bits = 8.0 * info.nbytes / max(parameters, 1)
        rows.append(InspectRow(name, count, shape, dtype, count * parameters, bits, count * info.nbytes))
    return tuple(rows)


def _not_finite(tensors: list[TensorPlan]) -> list[str]:
    """A problem for each tensor with a weight that is NaN or infinite."""
    problems = []
    for tensor in tensors:
        step = max(_READ_BYTES // max(tensor.columns * 4, 1), 1)
        try:
            for start in range(0, tensor.rows, step):
                check_finite(tensor.read(start, min(start + step, tensor.rows)), tensor)
        except ModelError as error:
            problems.append(error.message)
    return problems


def _adapter(folder: Path, manifest: Manifest | None, problems: list[str], verify: bool) -> InspectReport:
    config, from_peft = read_object(folder / ADAPTER_CONFIG), is_peft(folder)
    file = folder / (PEFT_FILE if from_peft else ADAPTER_FILE)
    infos: dict[str, TensorInfo] = read_header(file)[0] if file.is_file() else {}
    if not infos:
        problems.append(f"{file} is missing")
    facts: dict[str, Any] = {}
    try:
        facts = _settings_facts(folder, config, from_peft)
        if verify and infos:
            check_arrays(mx.load(str(file)), infos)
    except ModelError as error:
        problems.append(error.message)
    base, revision = str(config.get("base_model_name_or_path")), config.get("revision")
    try:
        if not from_peft:
            base, revision = named_base(folder)
    except ModelError as error:
        base, revision = "missing", None
        problems.append(error.message)
    rows = _adapter_rows(infos)
    facts |= {
        "base": base,
        **({"revision": revision} if revision else {}),
        "parameters": f"{sum(r.parameters for r in rows):,}",
        "size": size(sum(r.bytes for r in rows)),
        "template": _template(folder),
        **_provenance(manifest),
    }
    return InspectReport(str(folder), "adapter", facts, rows, tuple(problems), verify)


def _settings_facts(folder: Path, config: Mapping[str, Any], from_peft: bool) -> dict[str, Any]:
    where = folder / ADAPTER_CONFIG
    settings = peft_config(where, config).settings if from_peft else adapter_settings(folder)
    return {
        "kind": settings.kind + (" in PEFT's format" if from_peft else ""),
        "rank": settings.rank,
        "alpha": settings.alpha,
        "dropout": settings.dropout,
        "targets": ", ".join(map(str, settings.target_modules)),
        **({"whole": ", ".join(settings.modules_to_save)} if settings.modules_to_save else {}),
    }
