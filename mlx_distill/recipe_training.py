"""The part of a recipe that says how teacher and student are trained, and what the teacher's targets are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlx_distill.config import option

if TYPE_CHECKING:
    from mlx_distill.tasks.task import Task

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
METHODS = ["lora", "dora", "galore", "apollo", "apollo-mini", "full"]
UNTRAINED = "none"
PROJECTIONS = ["std", "reverse_std", "left", "right", "full"]
MOMENTS = ["keep", "reset", "project"]
VALIDATION_METRICS = {
    "loss": "lower",
    "accuracy": "higher",
    "positive_accuracy": "higher",
    "score_mae": "lower",
    "json_valid": "higher",
    "answer_f1": "higher",
    "perplexity": "lower",
    "token_accuracy": "higher",
}
"""Of a training at its validations, and which values are better: the loss of all validation rows; the others
of the rows that the model answers.
"""
TEXTS = ["greedy", "sampled", "data"]
MAX_TOP_K = 1024
THINKING = ["none", "drop", "keep", "map"]
TOKEN_LOSSES = [
    "auto",
    "kl",
    "reverse_kl",
    "js_divergence",
    "skew_kl",
    "total_variation",
    "token_groups",
    "alm",
    "uld",
    "gold",
    "x_token",
    "none",
]


@dataclass(frozen=True)
class TrainConfig:
    """The settings that every training has."""

    method: str = option("lora", "training method", choices=METHODS)
    lora_rank: int = option(16, "rank of the adapters", low=1)
    lora_alpha: float = option(32.0, "adapters are scaled by alpha / rank", low=0.0)
    use_rslora: bool = option(False, "adapters are scaled by alpha / sqrt(rank) instead")
    lora_dropout: float = option(0.1, "dropout on the adapters' input", low=0.0, high=0.99)
    target_modules: list[str] = option(
        ATTENTION + MLP, "linear layers that get an adapter, or whose gradients are projected"
    )
    modules_to_save: list[str] = option(
        [],
        "modules that are trained fully besides, such as embed_tokens, norm, lm_head; "
        "AdamW needs 8 bytes of state for each of their weights",
    )
    galore_rank: int = option(512, "rank of the gradient projection", low=1)
    galore_update_gap: int = option(400, "steps between updates of the projection", low=1)
    galore_scale: float = option(0.25, "factor on the update of projected weights", low=0.0)
    galore_projection: str = option(
        "std", "side of a weight matrix that is projected; std: the shorter one", choices=PROJECTIONS
    )
    galore_moments: str = option(
        "project",
        "Adam's moments when the projection changes: kept, reset, or projected into the new subspace",
        choices=MOMENTS,
    )
    galore_stagger: bool = option(True, "update the projections of different matrices at different steps")
    galore_refresh_below: float = option(
        0.0,
        "skip an update while the projection captures this share of what it captured when new; 0 never skips",
        low=0.0,
        high=1.0,
    )
    apollo_rank: int = option(256, "rank of the random projection; apollo-mini always has rank 1", low=1)
    apollo_update_gap: int = option(200, "steps between new random projections", low=1)
    apollo_scale: float | None = option(
        None, "factor on the update; none: 1, and sqrt(128) for apollo-mini", low=0.0
    )
    learning_rate: float = option(2e-5, "peak learning rate", low=0.0)
    schedule: str = option(
        "cosine",
        "learning rate schedule after the warmup",
        choices=["cosine", "linear", "constant", "wsd"],
    )
    warmup: float = option(
        0.03, "share of the steps in which the learning rate rises linearly", low=0.0, high=1.0
    )
    warmup_steps: int = option(
        0, "steps in which it rises; 0: the share that warmup says", low=0, default_keyed=False
    )
    weight_decay: float = option(0.0, "decoupled weight decay", low=0.0)
    clip_norm: float = option(1.0, "maximum global gradient norm; 0 turns clipping off", low=0.0)
    batch_size: int = option(
        1,
        "rows in a micro-batch of each rank, on average: micro-batches are balanced by their trained tokens",
        low=1,
    )
    accumulate: int = option(
        8, "gradient accumulation: micro-batches of each rank for an optimizer step", low=1
    )
    epochs: float = option(1.0, "passes over the training rows; steps overrides it", low=0.0)
    steps: int = option(0, "optimizer steps; 0: as epochs says", low=0)
    max_length: int = option(
        512, "maximum length of a row in tokens; longer rows are reported and left out", low=8
    )
    packing: bool = option(
        False,
        "pack several rows into sequences of at most max_length tokens, without attention between rows; "
        "batch_size then counts sequences",
    )
    loss_on: str = option("last", "assistant turns that the loss is computed on", choices=["last", "all"])
    grad_checkpoint: bool = option(
        False,
        "gradient checkpointing: recompute activations in the backward pass to save memory",
        keyed=False,
    )
    compile: bool = option(False, "compile the layers with mx.compile; traced once for each shape of batch")
    seed: int = option(0, "seed of the order of rows, of initialization and of dropout", low=0)
    stream_gradients: bool = option(
        False,
        "do not hold all gradients in memory at once; needs accumulate: 1, and with "
        "clip_norm gradients are computed twice",
        keyed=False,
    )
    checkpoint_every: int = option(50, "steps between checkpoints", low=1, keyed=False)
    checkpoint_minutes: float = option(
        5.0, "and minutes between checkpoints, whichever comes first; 0: steps alone", low=0, keyed=False
    )
    keep_checkpoints: int = option(2, "checkpoints that are kept, besides the best one", low=1, keyed=False)
    evaluate_every: int = option(50, "steps between validations; 0: no validation", low=0)
    evaluate_rows: int = option(
        0,
        "validation rows that the model answers at each validation, the first ones: accuracy, validity, "
        "error of the score, perplexity and others in metrics.jsonl; 0: none",
        low=0,
        default_keyed=False,
    )
    best_metric: str = option(
        "loss",
        "what patience and use_best go by: the validation loss, or a metric of evaluate_rows",
        choices=list(VALIDATION_METRICS),
        default_keyed=False,
    )
    patience: int = option(
        0,
        "early stopping: validations without a better value of best_metric after which the training ends; "
        "0: never",
        low=0,
    )
    use_best: bool = option(
        False, "keep the weights with the best value of best_metric, instead of the last ones"
    )


@dataclass(frozen=True)
class TeachConfig(TrainConfig):
    """Teach: fine-tune the teacher on the labelled rows."""

    method: str = option(
        "lora",
        "training method; none: the teacher stays as it is, for a model that does the task already, or that "
        "targets.system tells how",
        choices=[*METHODS, UNTRAINED],
    )


@dataclass(frozen=True)
class TargetsConfig:
    """Targets: the teacher's answers and distributions on the training rows."""

    text: str = option(
        "sampled",
        "the text that the student learns: the teacher's answer sampled at temperature 1, its greedy answer, "
        "or the row's own (data); where an answer's content varies, greedy text is a one-hot target",
        choices=TEXTS,
    )
    samples: int = option(
        1,
        "answers that the teacher samples for each training row, of text: sampled; the student learns from "
        "all of them",
        low=1,
        high=64,
        default_keyed=False,
    )
    seed: int = option(0, "seed of the sampled answers", low=0, default_keyed=False)
    system: str = option(
        "",
        "what the teacher reads in place of the system prompt of every row, in its training, its targets and "
        "its evaluation: a policy or rubric that the student never sees; empty: what the rows have",
        default_keyed=False,
    )
    system_file: str | None = option(
        None,
        "a text file with targets.system; its content is part of the stages' keys",
        keyed=False,
    )
    thinking: str = option(
        "none",
        "whether the teacher thinks before it answers, in its training, its targets and its evaluation: none "
        "(it answers at once); drop (it thinks, and the student learns its answers alone); keep (the student "
        "learns to think too; both models mark thinking alike); map (so too, in the marks of the student's "
        "chat template, such as harmony's analysis channel)",
        choices=THINKING,
        default_keyed=False,
    )
    max_thinking_tokens: int = option(
        512,
        "tokens of thinking, of either model; a row whose thinking has not ended by then is left out and "
        "counted",
        low=8,
        default_keyed=False,
    )
    top_k: int = option(32, "most probable tokens kept of each distribution", low=1, high=MAX_TOP_K)
    draws: int = option(
        0,
        "samples kept of each distribution instead of the most probable tokens: an unbiased gradient of the "
        "forward KL, with more noise; 0: top_k",
        low=0,
        high=MAX_TOP_K,
        default_keyed=False,
    )
    min_valid: float = option(
        0.5,
        "quality gate: the least share of the teacher's own answers that fit the task; below it the run "
        "stops with exit code 3, unless --force is given; 0 turns it off",
        low=0.0,
        high=1.0,
        keyed=False,
    )
    batch_size: int = option(16, "rows at a time", low=1, keyed=False)
    max_rows: int = option(0, "training rows that the teacher answers; 0: all", low=0)

    @property
    def teacher_thinking(self) -> int:
        """The most tokens that the teacher thinks before an answer; 0 where it answers at once."""
        return 0 if self.thinking == "none" else self.max_thinking_tokens

    @property
    def student_thinking(self) -> int:
        """The same of the student."""
        return self.teacher_thinking if self.thinking in ("keep", "map") else 0


@dataclass(frozen=True)
class DistillConfig(TrainConfig):
    """Distill: the student learns the teacher's label distribution, text and token distributions."""

    learning_rate: float = option(1e-5, "peak learning rate", low=0.0)
    target_modules: list[str] = option(ATTENTION, "linear layers that get an adapter")
    loss_on: str = option(
        "last",
        "assistant turns that the loss is computed on: the teacher answers the last one",
        choices=["last"],
    )
    label_weight: float = option(
        0.7, "alpha: weight of the KL divergence of the label's distribution", low=0.0
    )
    label_temperature: float = option(
        4.0, "temperature of that divergence, which is multiplied by T squared", low=0.01
    )
    text_weight: float = option(0.3, "weight of the cross-entropy on the teacher's text", low=0.0)
    token_weight: float = option(1.0, "weight of the token-level loss", low=0.0)
    span_weight: float = option(
        0.0,
        "weight of approximate likelihood matching (token_loss: alm) as a term of its own, beside another "
        "token-level loss",
        low=0.0,
        default_keyed=False,
    )
    max_rows: int = option(
        0,
        "training rows that the student learns from, the first of the prepared ones, whose order is random; "
        "the controls have the same; 0: all",
        low=0,
        default_keyed=False,
    )
    token_loss: str = option(
        "auto",
        "the token-level loss; auto: kl, forward, where the vocabularies are equal, else token_groups",
        choices=TOKEN_LOSSES,
        old_values={"cells": "token_groups"},
    )
    mid_token_rows: bool = option(
        False,
        "token_groups also compares distributions where one model begins a token inside a token of the "
        "other, given the bytes that are written (a teacher of single digits, a student that packs them)",
        default_keyed=False,
    )
    temperature: float = option(1.0, "temperature of the token-level loss", low=0.01)
    teacher: str = option(
        "cached",
        "where the token-level loss has the teacher's distributions from: cached (what targets has kept), or "
        "live (the teacher in memory beside the student: whole distributions, at any temperature)",
        choices=["cached", "live"],
        default_keyed=False,
    )
    js_beta: float = option(
        0.5,
        "beta of token_loss: js_divergence and gold; 0 is the forward, 1 the reverse KL",
        low=0.0,
        high=1.0,
        default_keyed=False,
    )
    skew_lambda: float = option(
        0.1,
        "lambda of token_loss: skew_kl, the teacher's share in the mixture",
        low=0.0,
        high=1.0,
        default_keyed=False,
    )


def validation_metrics(task: Task) -> list[str]:
    """The names of :data:`VALIDATION_METRICS` that a training for a task has; of chats without one the loss,
    the perplexity and the accuracy of the tokens.
    """
    fits = {
        "accuracy": task.label,
        "positive_accuracy": task.label and task.positive,
        "score_mae": task.score,
        "json_valid": not task.is_chats,
        "answer_f1": not task.is_chats and task.label is None,
    }
    return [name for name in VALIDATION_METRICS if fits.get(name, True)]
