"""Look at anything on disk: a checkpoint of either layout, an adapter, a stage's folder, a run."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from mlx_distill.errors import DistillError, ModelError
from mlx_distill.models.adapters import adapter_settings
from mlx_distill.models.architectures.rope import rope_settings
from mlx_distill.models.checkpoint.layout import TensorPlan, wildcard_name
from mlx_distill.models.checkpoint.plan import CheckpointPlan, plan_checkpoint
from mlx_distill.models.checkpoint.safetensors import TensorInfo, read_header
from mlx_distill.models.checkpoint.tensor_job import check_finite
from mlx_distill.models.config_files import ADAPTER_CONFIG, ADAPTER_FILE, adapter_base, read_object
from mlx_distill.models.hub import resolve
from mlx_distill.models.peft import PEFT_FILE, is_peft, peft_settings
from mlx_distill.storage import Manifest, check_folder, finished_name, partial_folder, read_manifest, sha256
from mlx_distill.text import counted, size

_SLAB = 1 << 22


@dataclass(frozen=True)
class InspectRow:
    """One kind of module (layer numbers folded together): how many, of which shape, how stored."""

    name: str
    count: int
    shape: tuple[int, ...]
    stored: str
    parameters: int
    bits: float
    bytes: int


@dataclass(frozen=True)
class InspectReport:
    """What lies at a path.

    ``kind`` is ``model``, ``adapter``, ``stage`` or ``run``; ``facts`` are named values; ``problems`` is
    empty when all is well; ``hashed`` counts the files whose hash was compared with the one that they were
    written with.
    """

    path: str
    kind: str
    facts: Mapping[str, Any]
    rows: tuple[InspectRow, ...] = ()
    problems: tuple[str, ...] = ()
    verified: bool = False
    hashed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "rows": [{**asdict(row), "shape": list(row.shape)} for row in self.rows]}

    def lines(self) -> list[str]:
        """Facts, table, problems."""
        width = max((len(name) for name in self.facts), default=0)
        out = [f"{self.path}: {self.kind}"]
        out += [
            f"  {name.ljust(width)}  {value}" for name, value in self.facts.items() if value not in (None, "")
        ]
        if self.rows:
            cells = [("tensor", "count", "shape", "stored", "parameters", "bits", "size")]
            cells += [
                (
                    r.name,
                    str(r.count),
                    "x".join(map(str, r.shape)) or "1",
                    r.stored,
                    f"{r.parameters:,}",
                    f"{r.bits:.2f}",
                    size(r.bytes),
                )
                for r in self.rows
            ]
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
                else "no hashes stand beside these files"
            )
            out.append(
                f"verified: {hashes}" + ("; no weight is NaN or infinite" if self.kind == "model" else "")
            )
        return out


def inspect(path: str | Path, verify: bool = False) -> InspectReport:
    """Say what lies at ``path``; with ``verify`` hash every file of a manifest (or of a snapshot of the Hub)
    and look at every weight.

    Raises:
        ModelError: nothing that this package knows, or a damaged checkpoint: with file and tensor.
    """
    here = Path(path).expanduser()
    if here.is_file():
        fix = "give the folder of a model, an adapter, a stage or a run; a recipe is shown by: mlx-distill run RECIPE --dry-run"
        raise ModelError(f"{path}: a file, not a folder", fix=fix)
    if not here.exists() and (partial := partial_folder(here)).is_dir():
        return InspectReport(str(path), "stage", {"state": _how_far(partial)})
    folder = resolve(path)
    manifest = read_manifest(folder)
    problems, hashed = [], 0
    if manifest:
        hashed = len(manifest.files) if verify else 0
        if wrong := check_folder(folder, manifest, verify=verify):
            problems.append(wrong)
    elif verify:
        hashed = _snapshot_hashes(folder, problems)
    if (folder / "config.json").is_file():
        report = _model(folder, manifest, problems, verify)
    elif (folder / ADAPTER_CONFIG).is_file():
        report = _adapter(folder, manifest, problems, verify)
    elif manifest:
        facts = {**_provenance(manifest), "files": len(manifest.files), "size": size(_bytes(manifest))}
        report = InspectReport(str(path), "stage", facts, problems=tuple(problems), verified=verify)
    else:
        return _run(folder, str(path), verify)
    return replace(report, hashed=hashed)


def _snapshot_hashes(folder: Path, problems: list[str]) -> int:
    """Compare the weights of a downloaded snapshot with the hashes that the Hub's cache names them by; how
    many there were.
    """
    found = {p: p.resolve().name for p in sorted(folder.glob("*.safetensors")) if p.is_symlink()}
    found = {p: name for p, name in found.items() if re.fullmatch("[0-9a-f]{64}", name)}
    problems += [f"{p} is not what the Hub sent" for p, name in found.items() if sha256(p) != name]
    return len(found)


def _run(folder: Path, path: str, verify: bool) -> InspectReport:
    stages = {
        p.parent.relative_to(folder).as_posix(): p.parent
        for p in sorted(folder.glob("*/manifest.json")) + sorted(folder.glob("*/*/manifest.json"))
    }
    unfinished = {
        p.relative_to(folder).with_name(finished_name(p)).as_posix(): _how_far(p)
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
            wrong = check_folder(stage, manifest, verify=verify) if manifest else None
        except DistillError as error:
            manifest, wrong = None, str(error)
        hashed += len(manifest.files) if manifest and verify else 0
        facts[name] = _summary(name, manifest) if manifest else "damaged"
        if wrong:
            problems.append(wrong)
    for name, far in unfinished.items():
        facts[name] = f"{facts[name]}; begun anew, {far}" if name in facts else far
    return InspectReport(path, "run", facts, problems=tuple(problems), verified=verify, hashed=hashed)


def _how_far(partial: Path) -> str:
    """What a killed or interrupted stage left, in a word or two."""
    saved = sorted(partial.glob("scratch/checkpoints/step-*/state.json"))
    state = read_object(saved[-1]) if saved else {}
    far = f": step {state.get('step')} of {state.get('steps')} saved" if saved else ""
    return f"not finished{far}; the same command goes on from there"


def _summary(name: str, manifest: Manifest) -> str:
    """A folder of a run in a line; which stage made it is said where its name does not."""
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
    rope = rope_settings(config, 150_000.0 if config["model_type"] == "gpt_oss" else 10_000.0)
    parameters, stored = sum(r.parameters for r in rows), sum(r.bytes for r in rows)
    facts = {
        "model type": config["model_type"],
        "layers": config["num_hidden_layers"],
        "hidden size": config["hidden_size"],
        "vocabulary": _vocabulary(folder, config),
        "parameters": f"{parameters:,}",
        "bits per weight": round(8 * stored / max(parameters, 1), 3),
        "size": f"{size(stored)} in {counted(len(plan.checkpoint.files), 'file')}",
        "layout": "Hugging Face"
        if any(p.rule != "same" for p in plan.tensors)
        else "the same in both"
        if _neutral(plan)
        else "MLX",
        "rope": _rope_text(rope.kind, rope.theta, rope.scaling),
        "head": "tied to the embedding" if config.get("tie_word_embeddings") else "its own",
        "template": _template(folder),
        "note": plan.architecture.stock_differs(config),
        **_provenance(manifest),
    }
    return InspectReport(str(folder), "model", facts, tuple(rows), tuple(problems), verify)


def _neutral(plan: CheckpointPlan) -> bool:
    return not plan.architecture.rules and "quantization" not in plan.config


def _vocabulary(folder: Path, config: Mapping[str, Any]) -> str:
    path = folder / "tokenizer.json"
    if not path.is_file():
        return f"{config['vocab_size']} columns, no tokenizer"
    try:
        raw = json.loads(path.read_bytes())
        ids = {*raw["model"]["vocab"].values(), *(token["id"] for token in raw.get("added_tokens", ()))}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{config['vocab_size']} columns, a tokenizer of another kind"
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
    kind = (
        "harmony"
        if "<|channel|>" in text
        else "ChatML"
        if "<|im_start|>" in text
        else "another"
        if text
        else "none"
    )
    return f"{kind}, {len(text)} characters" if text else kind


def _rows(plan: CheckpointPlan) -> list[InspectRow]:
    groups: dict[tuple[str, tuple[int, ...], str], list[tuple[int, int]]] = defaultdict(list)
    for p in plan.tensors:
        path, _, leaf = p.name.rpartition(".")
        packing = plan.quantization.get(path)
        if packing and leaf in ("scales", "biases"):
            continue
        shape, stored, nbytes = p.shape, p.dtype, p.nbytes
        if packing and leaf == "weight":
            shape = (*shape[:-1], shape[-1] * 32 // packing.bits)
            stored, nbytes = f"{packing.mode} {packing.bits}/{packing.group_size}", plan.quantized_bytes(path)
        count = plan.parameters(p)
        groups[wildcard_name(p.name), shape, stored].append((count, nbytes))
    rows = []
    for (name, shape, stored), members in groups.items():
        count, nbytes = sum(c for c, _ in members), sum(s for _, s in members)
        rows.append(
            InspectRow(name, len(members), shape, stored, count, round(8 * nbytes / max(count, 1), 4), nbytes)
        )
    return rows


def _not_finite(planned: list[TensorPlan]) -> list[str]:
    out = []
    for p in planned:
        step = max(_SLAB // max(p.columns * 4, 1), 1)
        try:
            for start in range(0, p.rows, step):
                check_finite(p.read(start, min(start + step, p.rows)), p)
        except ModelError as error:
            out.append(error.message)
    return out


def _adapter(folder: Path, manifest: Manifest | None, problems: list[str], verify: bool) -> InspectReport:
    config, theirs = read_object(folder / ADAPTER_CONFIG), is_peft(folder)
    settings = peft_settings(folder / ADAPTER_CONFIG, config) if theirs else adapter_settings(folder)
    file = folder / (PEFT_FILE if theirs else ADAPTER_FILE)
    infos: dict[str, TensorInfo] = read_header(file)[0] if file.is_file() else {}
    if not infos:
        problems.append(f"{file} is missing")
    groups: dict[tuple[str, tuple[int, ...], str], int] = defaultdict(int)
    for name, info in infos.items():
        groups[wildcard_name(name), info.shape, info.dtype] += 1
    rows = tuple(
        InspectRow(name, n, shape, dtype, n * prod(shape), 8.0 * i.nbytes / max(prod(shape), 1), n * i.nbytes)
        for (name, shape, dtype), n in groups.items()
        for i in [
            next(
                i
                for full, i in infos.items()
                if wildcard_name(full) == name and i.shape == shape and i.dtype == dtype
            )
        ]
    )
    try:
        base = str(config.get("base_model_name_or_path") if theirs else adapter_base(folder))
    except ModelError as error:
        base = "missing"
        problems.append(error.message)
    facts = {
        "kind": settings.kind + (" in PEFT's format" if theirs else ""),
        "rank": settings.rank,
        "alpha": settings.alpha,
        "dropout": settings.dropout,
        "targets": ", ".join(settings.target_modules),
        **({"whole": ", ".join(settings.modules_to_save)} if settings.modules_to_save else {}),
        "base": base,
        "parameters": f"{sum(r.parameters for r in rows):,}",
        "size": size(sum(r.bytes for r in rows)),
        "template": _template(folder),
        **_provenance(manifest),
    }
    return InspectReport(str(folder), "adapter", facts, rows, tuple(problems), verify)
