"""The records that packages pass to each other: frozen dataclasses without behaviour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.core as mx


@dataclass(frozen=True)
class Message:
    """One turn of a chat.

    ``role`` is ``system``, ``user``, ``assistant`` or ``tool``; ``trained`` is False for a turn of the
    assistant that is shown to the model and never trained; ``extra`` holds what a chat template reads
    besides: ``tool_calls`` and ``reasoning_content`` of the assistant, ``tool_call_id`` and ``name`` of a
    tool, and in the first turn the ``tools`` of the whole chat.
    """

    role: str
    content: str
    trained: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Example:
    """One row of prepared data: a chat whose last turn is the assistant's, with its other columns.

    ``fields`` holds the row's other columns (slices such as genre or group); ``answer`` is the last assistant
    turn parsed as JSON.
    """

    id: str
    messages: tuple[Message, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)
    answer: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Batch:
    """One micro-batch, right-padded, labels already shifted.

    ``inputs [b, l]`` int32; ``labels [b, l]`` int32 (the token after each input); ``mask [b, l]`` float32, 1
    where the label is trained on; ``rows`` indices into the data set, sequence by sequence; ``extra`` further
    inputs of the objective; ``segments [b, l]`` int32 the row of a packed sequence that an input belongs to,
    0 for padding, or None where each sequence is one row.
    """

    inputs: mx.array
    labels: mx.array
    mask: mx.array
    rows: tuple[int, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    segments: mx.array | None = None


@dataclass(frozen=True)
class TopK:
    """The k most probable tokens of a distribution, for many positions.

    ``ids [..., k]`` int32; ``logprobs [..., k]`` float32, natural logarithms at temperature 1 over the
    *whole* vocabulary, so the mass outside is ``1 - sum(exp(logprobs))``; descending.
    """

    ids: mx.array
    logprobs: mx.array


@dataclass(frozen=True)
class Prediction:
    """A model's answer to one item.

    ``text`` is the generated text; ``answer`` the valid answer in it or None; ``error`` the reason why it is
    None; ``error_kind`` the kind of that reason, for counts; ``label`` the value of the task's label field in
    the answer; ``label_probs`` the model's distribution over the labels before it generates one;
    ``latency_s`` its share of the wall time, divided among those that were computed at the same time;
    ``tokens`` the number of generated tokens; ``cut`` what was left out of a prompt that was too long
    (``field``, ``removed_characters``, ``removed_tokens``), or None.
    """

    id: str
    text: str
    answer: Mapping[str, Any] | None
    label: str | None
    score: float | None
    label_probs: Mapping[str, float] | None = None
    error: str | None = None
    error_kind: str | None = None
    latency_s: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0
    fields: Mapping[str, Any] = field(default_factory=dict)
    cut: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Classification:
    """A model's label of one item, without a generated answer.

    ``label`` is the most probable one; ``probabilities`` are of all labels and sum to 1; ``calibrated`` says
    whether they are scaled by the temperature that was fitted to validation rows; ``error`` is the reason why
    ``label`` and ``probabilities`` are None, ``error_kind`` its kind; ``cut`` says what was left out of a
    long item.
    """

    id: str
    label: str | None
    probabilities: Mapping[str, float] | None
    calibrated: bool = False
    error: str | None = None
    error_kind: str | None = None
    prompt_tokens: int = 0
    fields: Mapping[str, Any] = field(default_factory=dict)
    cut: Mapping[str, Any] | None = None
