"""Finished runs as the report reads them: predictions, weights, training logs, manifests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_distill.storage import open_partial, publish, stage_key, write_json, write_jsonl
from mlx_distill.tasks.task import Task, parse_task

MODELS = ("teacher", "student_before", "student", "quantized", "student_labels", "student_text")
# How often the teacher gives the true label, and the others the teacher's.
SKILL = {
    "teacher": 0.93,
    "student_before": 0.35,
    "student": 0.95,
    "quantized": 0.92,
    "student_labels": 0.7,
    "student_text": 0.85,
}
MACHINE = {
    "system": "Linux 6",
    "processor": "A processor",
    "cores": 2,
    "memory_bytes": 8_000_000_000,
    "device": "Device(cpu, 0)",
    "blas": "loaded",
}
VERSIONS = {"python": "3.11.7", "mlx": "0.32.4", "mlx-distill": "0.1.0"}
SPEED = {
    "load_s": 1.25,
    "model_memory_bytes": 64_000_000,
    "first_token_s": 0.0421,
    "requests_per_second": 7319.0,
}


def make_task(**changes: Any) -> Task:
    raw = {
        "name": "colours",
        "system": "Say it.",
        "user": "{text}",
        "title": "title",
        "label": "tone",
        "positive": ["dark", "black"],
        "score": "points",
        "slices": ["kind"],
        "group": "group",
        "schema": {
            "type": "object",
            "properties": {
                "tone": {"type": "string", "enum": ["light", "mild", "dark", "black"]},
                "points": {"type": "integer"},
                "themes": {"type": "array", "items": {"type": "string"}},
                "mood": {"type": "string"},
            },
        },
    }
    return parse_task({**raw, **changes}, "task")


def make_predictions(task: Task, model: str, sets: Mapping[str, int], seed: int = 0) -> list[dict[str, Any]]:
    """Predictions as ``evaluate`` writes them: a header, then one row per item.

    The teacher gives the true label at its rate in SKILL, the other models give the teacher's at theirs.
    """
    labels = task.labels
    index = {name: i for i, name in enumerate(labels)}
    shared, own = np.random.default_rng(seed), np.random.default_rng(seed + 1 + MODELS.index(model))
    weights = np.array([4, 3, 2, 2][: len(labels)])
    rows: list[dict[str, Any]] = []
    for set_name, n in sets.items():
        for i in range(n):
            truth = labels[shared.choice(len(labels), p=weights / weights.sum())]
            draw, shift, points = shared.random(), int(shared.choice([-1, 1])), int(shared.integers(5, 95))
            teacher = truth if draw < SKILL["teacher"] else labels[(index[truth] + shift) % len(labels)]
            kind = ["blues", "chant", "folk", "march", "waltz"][i % 5]
            skill = SKILL[model] - (0.12 if kind == "march" else 0.0)
            predicted = (
                teacher
                if model == "teacher" or own.random() < skill
                else labels[int(own.integers(len(labels)))]
            )
            invalid = own.random() < (0.06 if model == "student_before" else 0.006)
            score = int(np.clip(points + (0 if model == "teacher" else own.normal(0, 3)), 0, 100))
            logits = own.normal(0, 0.6, len(labels)) + 3.5 * np.eye(len(labels))[index[predicted]]
            probs = np.exp(logits) / np.exp(logits).sum()
            others = {
                "themes": ["grief", "hope"] if i % 3 else [],
                "mood": "calm" if own.random() < 0.8 else "tense",
            }
            properties = list(task.schema["properties"])
            full = {task.label: predicted, "points": score, "confidence": score, **others}
            true = {
                task.label: truth,
                "points": points,
                "confidence": points,
                "themes": ["grief", "hope"] if i % 3 else [],
                "mood": "calm",
            }
            answer = {key: full[key] for key in properties}
            rows.append(
                {
                    "id": f"{set_name}-{i:04d}",
                    "set": set_name,
                    "fields": {
                        "kind": kind,
                        "group": ["north", "south", "east", "islands"][0 if i % 40 else 3]
                        if i % 4 == 0
                        else ["south", "east", "north"][i % 4 - 1],
                    },
                    "title": f"Piece no. {i}",
                    "input": f"Piece no. {i}\n\nA line about the {kind},\nand a second one.",
                    "truth": {key: true[key] for key in properties},
                    "text": json.dumps(answer)[: 25 if invalid else None],
                    "answer": None if invalid else answer,
                    "error": "the text ends inside a string" if invalid else None,
                    "label": None if invalid else predicted,
                    "score": None if invalid else float(score),
                    "label_probs": {name: float(p) for name, p in zip(labels, probs, strict=True)},
                    "latency_s": float(own.gamma(9, 0.3 if model == "teacher" else 0.09) / 60),
                    "prompt_tokens": 180,
                    "tokens": 70,
                }
            )
    header = {
        "format": 1,
        "model": model,
        "task": task.name,
        "labels": list(labels),
        "set_counts": dict(sets),
        "settings": {"batch_size": 16},
    }
    return [header, *rows]


def make_run(
    folder: Path,
    task: Task,
    *,
    models: tuple[str, ...] = MODELS[:4],
    sets: Mapping[str, int] | None = None,
    seed: int = 0,
    quantized: tuple[str, ...] = (),
) -> dict[str, Path]:
    """Write the folder of a finished run: predictions, weight files, training logs, manifests.

    Args:
        folder: The run's folder.
        task: The task of the run.
        models: The models that were evaluated.
        sets: The number of rows of each set.
        seed: Seed of the predictions and logs.
        quantized: Models that were evaluated with quantized weights.

    Returns:
        Model name to its ``predictions.jsonl``.
    """
    paths = {}
    for model in models:
        lines = make_predictions(task, model, sets or {"test": 60, "written": 15}, seed)
        config = {"model": model, "compute_dtype": "float32", "unpack": model not in quantized}
        paths[model] = write_evaluation(folder / "evaluations" / model, lines, config)
    for name, size in (("teacher_base", 640_000), ("student_base", 410_000), ("quantized", 150_000)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "model.safetensors").write_bytes(b"\0" * size)
    for name in ("teacher", "student"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "adapters.safetensors").write_bytes(b"\0" * 30_000)
        write_json(folder / name / "adapter_config.json", {"base": f"../{name}_base"})
        write_jsonl(
            folder / name / "metrics.jsonl",
            make_log(160, ("label", "text", "token") if name == "student" else ("text",), seed),
        )
    return paths


def write_evaluation(
    folder: Path,
    lines: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    machine: Mapping[str, Any] = MACHINE,
    versions: Mapping[str, str] = VERSIONS,
    speed: Mapping[str, float | None] = SPEED,
) -> Path:
    """Write an evaluation's folder with its manifest; return its ``predictions.jsonl``."""
    partial = open_partial(folder, stage_key("evaluate", 1, config, {}))
    write_jsonl(partial / "predictions.jsonl", lines)
    recorded = {
        "seconds": 12.5,
        "peak_memory_bytes": 310_000_000,
        **speed,
        "machine": dict(machine),
        "versions": dict(versions),
    }
    publish(folder, "evaluate", 1, config, {}, recorded)
    return folder / "predictions.jsonl"


def make_log(steps: int, terms: tuple[str, ...], seed: int) -> list[dict[str, Any]]:
    rng, rows = np.random.default_rng(seed), []
    for step in range(1, steps + 1):
        values = {
            term: (3 + i) * float(np.exp(-step / 40 * (1 + i / 2)) + 0.08 + 0.03 * rng.random())
            for i, term in enumerate(terms)
        }
        row = {
            "step": step,
            "loss": sum(values.values()),
            **values,
            "learning_rate": 1e-4,
            "grad_norm": 1.0,
            "tokens": 900,
        }
        row |= {"tokens_per_second": 4000.0, "seconds": step * 0.22, "peak_memory_bytes": 260_000_000}
        if step % 40 == 0:
            row |= {
                "valid_loss": row["loss"] * 1.06,
                **{f"valid_{term}": value * 1.06 for term, value in values.items()},
            }
        rows.append(row)
    return rows


RECIPE = {
    "name": "try",
    "description": "A run of tests.",
    "task": "colours",
    "data": {"seed": 3, "sources": [{"path": "x", "seed": 5}]},
    "distill": {"seed": 1},
}
