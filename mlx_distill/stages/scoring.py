"""A shard of the teacher's soft targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_distill.stages.context import Context


def score_shard(
    context: Context, model: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]]
) -> tuple[list[Any], int]:
    """Targets of some rows; a row whose answer is not valid keeps the data's own text."""
    from mlx_distill.data.chat import answer_ids, render
    from mlx_distill.distill.teacher import label_position, score
    from mlx_distill.distill.teacher_cache import TargetRow
    from mlx_distill.losses.labels import label_tokens
    from mlx_distill.tasks.answer import label_prefix, parse_answer

    task, settings = context.task, context.recipe.targets
    texts = [row["messages"][-1]["content"] for row in rows]
    invalid = 0
    if settings.text == "greedy":
        for i, text in enumerate(_answers(context, model, tokenizer, rows)):
            if parse_answer(text, task.schema)[0] is None:
                invalid += 1
            else:
                texts[i] = text
    answers = [{"role": "assistant", "content": text} for text in texts]
    chats = [
        render(tokenizer, [*row["messages"][:-1], answer]) for row, answer in zip(rows, answers, strict=True)
    ]
    starts = [chat.spans[-1][0] for chat in chats]
    places = []
    for chat, start, text in zip(chats, starts, texts, strict=True):
        answer, _ = parse_answer(text, task.schema)
        places.append(
            label_position(
                chat.tokens.tolist(),
                start,
                answer_ids(tokenizer, label_prefix(task.schema, task.label, answer)),
            )
        )
    scored = score(
        model,
        [chat.tokens.tolist() for chat in chats],
        starts,
        top_k=settings.top_k,
        labels=label_tokens(tokenizer, task.labels),
        label_at=places,
        batch_size=settings.batch_size,
    )
    out = [
        TargetRow(
            row["id"],
            text,
            None if s.label_logprobs is None else tuple(float(x) for x in s.label_logprobs),
            s.ids,
            s.logprobs,
            s.topk_ids,
            s.topk_logprobs,
        )
        for row, text, s in zip(rows, texts, scored, strict=True)
    ]
    return out, invalid


def _answers(context: Context, model: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    from mlx_distill.data.chat import prompt_ids, stop_ids
    from mlx_distill.infer.engine import generate

    prompts = [prompt_ids(tokenizer, row["messages"][:-1]) for row in rows]
    done = generate(
        model,
        tokenizer,
        prompts,
        max_tokens=context.task.max_answer_tokens,
        batch_size=context.recipe.targets.batch_size,
        stop=set(stop_ids(tokenizer)),
    )
    return [g.text for g in done]
