"""The evaluate stage: a model answers the held-out rows."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mlx_distill.config import to_mapping
from mlx_distill.errors import ConfigError, ModelError
from mlx_distill.records import Prediction
from mlx_distill.run_models import RUN_MODELS
from mlx_distill.runtime import peak_memory, reset_peak_memory
from mlx_distill.stages.context import Context, Facts, as_teacher, check_stop
from mlx_distill.stages.evaluate_more import checked_rows, measure_more
from mlx_distill.stages.speed import Saturation, first_token_seconds, load_and_measure
from mlx_distill.storage import read_jsonl, scratch, write_jsonl
from mlx_distill.tasks.task import Task
from mlx_distill.thinking import thinking_budget


def evaluate(context: Context, folder: Path, model_folder: str, name: str) -> Facts:
    """Let a model answer the held-out rows, freely and under the grammar of the task, in chunks: a killed
    evaluation continues behind its last finished chunk. The facts on speed and memory are those of this
    process, None where it answered nothing.
    """
    from mlx_distill.data.predictions import FILE_NAME, write_predictions
    from mlx_distill.infer.label_scoring import label_prefix_tokens
    from mlx_distill.infer.predict import predict_both

    settings = context.recipe.evaluate
    context = as_teacher(context) if RUN_MODELS[name].role == "teacher" else context
    rows = checked_rows(context)
    model, tokenizer, facts = load_and_measure(context, model_folder)
    scored = label_prefix_tokens(
        tokenizer, context.task, lambda reason: context.progress.note(f"evaluate {name}: {reason}")
    )
    constrain = settings.constrain and _has_grammar(context, tokenizer, name)
    facts["first_token_s"] = first_token_seconds(context, model, tokenizer, rows)
    reset_peak_memory()
    saturation = Saturation(settings.batch_size)
    chunk_size = settings.batch_size * 4
    predictions: list[Prediction] = []
    constrained: list[Prediction | None] = []
    with context.progress.task(f"evaluate {name}", total=len(rows), unit="row") as bar:
        for first in range(0, len(rows), chunk_size):
            path = scratch(folder) / f"predictions-{first:08d}.jsonl"
            if not path.is_file():
                check_stop(context)

                def answered(count: int, first: int = first) -> None:
                    saturation.answered(count)
                    bar.update(first + count)

                saturation.begin()
                answers = predict_both(
                    model,
                    tokenizer,
                    context.task,
                    rows[first : first + chunk_size],
                    batch_size=settings.batch_size,
                    label_probs=scored is not None,
                    constrain=constrain,
                    on_done=answered,
                )
                saturation.end()
                facts["peak_memory_bytes"] = peak_memory()
                write_jsonl(path, map(_pair, answers))
            for _, pair in read_jsonl(path):
                predictions.append(Prediction(**pair["own"]))
                constrained.append(pair["other"] and Prediction(**pair["other"]))
            bar.update(len(predictions))
    write_predictions(
        folder / FILE_NAME,
        name,
        context.task,
        rows,
        predictions,
        constrained=constrained if constrain else None,
        settings=to_mapping(settings) | _asked_how(context, tokenizer),
    )
    facts["requests_per_second"] = saturation.requests_per_second
    _answer_edge_cases(context, folder, (model, tokenizer), name, constrain)
    measure_more(context, folder, name, model, tokenizer, rows, has_labels=scored is not None)
    return {"rows": len(rows), "peak_memory_bytes": None, **facts}


def _answer_edge_cases(
    context: Context, folder: Path, model: tuple[Any, Any], name: str, constrain: bool
) -> None:
    """Let a model answer the task's edge cases as ``analyze`` does, where the recipe says so, and write what
    it did.
    """
    from mlx_distill.evaluate.edge_cases import FILE_NAME, run_edge_cases

    if not context.recipe.evaluate.edge_cases:
        return
    check_stop(context)
    context.progress.note(f"evaluate {name}: edge cases")
    outcomes = run_edge_cases(
        model,
        _asked_task(context),
        batch_size=context.recipe.evaluate.batch_size,
        constrain=constrain,
        progress=context.progress,
    )
    write_jsonl(folder / FILE_NAME, outcomes)


def _asked_how(context: Context, tokenizer: Any) -> dict[str, Any]:
    """What differs from asking for an answer at once with the rows' own prompts."""
    system = {} if context.system is None else {"system": context.system}
    thinking = thinking_budget(tokenizer)
    return {**system, **({"thinking": thinking} if thinking else {})}


def _asked_task(context: Context) -> Task:
    """The task with the context's system prompt, for rows that are not prepared."""
    if context.system is None:
        return context.task
    return replace(context.task, system=context.system.replace("{", "{{").replace("}", "}}"))


def _pair(answers: tuple[Prediction, Prediction | None]) -> dict[str, Any]:
    """The free answer to a row and the one under the grammar, for the file of a chunk."""
    own, other = answers
    return {"own": asdict(own), "other": other and asdict(other)}


def _has_grammar(context: Context, tokenizer: Any, name: str) -> bool:
    """Whether the task and the tokenizer have a grammar; a note says why not."""
    from mlx_distill.infer.constrained import check_tokenizer
    from mlx_distill.tasks.grammar import check_schema

    try:
        check_schema(context.task.schema)
        check_tokenizer(tokenizer)
    except (ConfigError, ModelError) as error:
        context.progress.note(f"evaluate {name}: only free answers are measured: {error.message}")
        return False
    return True
