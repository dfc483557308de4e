"""Which folders of a run a report is about: those of its models, and those that they were made from.

A run's folder also holds what an earlier recipe or an earlier training has left: a control that is no longer
asked for, targets of another teacher, the audit of another student. None of it belongs to the report.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_distill.errors import DistillError
from mlx_distill.evaluate.audit import FOLDER as AUDIT
from mlx_distill.run_models import run_model
from mlx_distill.storage import Manifest, read_manifest
from mlx_distill.text import listed

_QUANTIZED, _STUDENT, _TARGETS = "quantized", "student", "targets"
# Also of folders whose manifests do not name their parents.
_MADE_FROM = {_QUANTIZED: (_STUDENT,), _STUDENT: (_TARGETS,)}


def manifest_of(folder: Path) -> Manifest | None:
    """The manifest of a folder; None where there is none, or a damaged one: the pipeline reports that."""
    try:
        return read_manifest(folder)
    except DistillError:
        return None


def changed_parents(run: Path, name: str) -> list[str]:
    """The stages that a folder of a run was made from and that were made again since, with another content.

    Of a folder without a manifest, and of parents that are no longer there, nothing is known.

    Args:
        run: The run's folder.
        name: Of the folder in it.
    """
    manifest = manifest_of(run / name)
    if manifest is None:
        return []
    now = {parent: manifest_of(run / parent) for parent in manifest.parents if _is_stage(parent)}
    return [parent for parent, own in now.items() if own and own.content != manifest.parents[parent]]


def _is_stage(parent: str) -> bool:
    """Whether a parent is a stage of the run, and not an input from outside of it."""
    return not parent.startswith("input ")


def report_folders(run: Path, models: Iterable[str], recipe: Mapping[str, Any]) -> list[str]:
    """The folders of a run that a report is about: of its models, of all that they were made from as far as
    that is still there unchanged, and what was measured of them.

    Args:
        run: The run's folder.
        models: The names of the models that the report measures.
        recipe: The recipe as a plain mapping.
    """
    models = list(models)
    used = ["data", *(f"evaluations/{name}" for name in models)]
    for model in map(run_model, models):
        used += [model.folder, *([model.base] if model.base else [])]
    for name in used:  # it grows while it is read
        manifest = manifest_of(run / name)
        changed = changed_parents(run, name)
        parents = [*filter(_is_stage, manifest.parents if manifest else ()), *_MADE_FROM.get(name, ())]
        used += [parent for parent in parents if parent not in (*used, *changed)]
    later = [_QUANTIZED] if _STUDENT in used else []
    later += [AUDIT] if _asks_for_audit(recipe) else []
    used += [name for name in later if not changed_parents(run, name)]
    return list(dict.fromkeys(used))


def _asks_for_audit(recipe: Mapping[str, Any]) -> bool:
    return (recipe.get("evaluate") or {}).get("audit_rows") != 0


def left_out(run: Path, folders: Sequence[str], recipe: Mapping[str, Any]) -> list[dict[str, str]]:
    """What a report would show and leaves out, since it belongs to other models or is not asked for.

    Args:
        run: The run's folder.
        folders: Of :func:`report_folders`.
        recipe: The recipe as a plain mapping.

    Returns:
        Of each the ``folder``, the ``reason``, and under ``fix`` how to have it in the report, empty where
        the recipe does not ask for it.
    """
    out = []
    for name, command in ((_TARGETS, "targets"), (_QUANTIZED, "quantize"), (AUDIT, "evaluate")):
        changed = changed_parents(run, name)
        if name in folders or manifest_of(run / name) is None:
            continue
        if name != AUDIT and recipe.get("student", "") is None:  # the recipe no longer has one
            continue
        if name == AUDIT and not _asks_for_audit(recipe):
            out.append({"folder": name, "reason": "evaluate.audit_rows is 0", "fix": ""})
        elif changed:
            reason = f"{listed(changed)} {'has' if len(changed) == 1 else 'have'} changed since it was made"
            out.append({"folder": name, "reason": reason, "fix": f"run mlx-distill {command}"})
    return out


def left_out_text(entry: Mapping[str, str]) -> str:
    """An entry of :func:`left_out` for people.

    >>> left_out_text({"folder": "audit", "reason": "student has changed since it was made", "fix": "..."})
    'audit is not shown: student has changed since it was made (to fix: ...)'
    """
    text = f"{entry['folder']} is not shown: {entry['reason']}"
    return f"{text} (to fix: {entry['fix']})" if entry["fix"] else text
