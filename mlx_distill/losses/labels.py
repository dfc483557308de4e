"""The distribution over the classes of a label at the position where its value starts, and its divergence.

One forward pass gives it: the mass of all tokens that can only begin one class. Student and teacher need no
common tokenizer, and most of what the teacher knows about a row's class is in this distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import Float

from mlx_distill.errors import ConfigError, ModelError
from mlx_distill.losses.divergences import forward_kl
from mlx_distill.losses.numerics import LOWEST
from mlx_distill.losses.token_bytes import vocabulary


@dataclass(frozen=True)
class LabelTokens:
    """For each label the ids of the tokens that can only begin it: ``ids[i]`` belongs to ``labels[i]``."""

    labels: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]


def label_tokens(tokenizer: Any, labels: Sequence[str], *, terminator: str = '"') -> LabelTokens:
    """The tokens that can only begin one label, for each label.

    A token with bytes ``u`` belongs to label L if ``u`` is a prefix of ``L + terminator``, or
    ``L + terminator`` a prefix of ``u``. Since the labels differ in their first byte, no token can belong to
    two of them.

    Args:
        tokenizer: A byte-level BPE from ``transformers``, ``mlx_lm`` or ``tokenizers``.
        labels: The classes, as they are written; their first bytes must differ.
        terminator: What follows the value: the closing quote of a JSON string.

    Raises:
        ConfigError: Fewer than two labels, an empty one, or two with the same first byte.
        ModelError: The tokenizer is not byte-level, or has no token for a label.

    >>> from tokenizers import Tokenizer, decoders, models
    >>> tokenizer = Tokenizer(models.BPE({"y": 0, "n": 1, "ye": 2, "no": 3, "x": 4}, []))
    >>> tokenizer.decoder = decoders.ByteLevel()
    >>> label_tokens(tokenizer, ["yes", "no"]).ids
    ((0, 2), (1, 3))
    """
    texts = [label.encode("utf-8") for label in labels]
    _check_labels(labels, texts)
    ends = [text + terminator.encode("utf-8") for text in texts]
    ids_of: list[list[int]] = [[] for _ in labels]
    label_of_byte = {text[0]: i for i, text in enumerate(texts)}
    for i, token in enumerate(vocabulary(tokenizer).tokens):
        label = label_of_byte.get(token[0]) if token else None
        if label is not None and (ends[label].startswith(token) or token.startswith(ends[label])):
            ids_of[label].append(i)
    for name, ids in zip(labels, ids_of, strict=True):
        if not ids:
            raise ModelError(
                f"the tokenizer has no token that begins {name!r}",
                fix="use a label whose first character the tokenizer knows",
            )
    return LabelTokens(tuple(labels), tuple(tuple(ids) for ids in ids_of))


def label_logprobs(
    logits: Float[mx.array, "*b v"], tokens: LabelTokens, *, rest: bool = False
) -> Float[mx.array, "*b c"]:
    """Log-probabilities of the labels: the mass of each label's tokens, renormalised over the labels, or with
    one more class for all other tokens.

    ``log Σ_{t∈L} exp z_t - log Z``, where Z sums over all labels' tokens (``rest=False``) or over the whole
    vocabulary (``rest=True``). Train with ``rest=True``: without it a loss does not see the student's mass
    outside the labels.

    Args:
        logits: At the position that predicts the first token of the label's value; computed in float32.
        tokens: From :func:`label_tokens` with this model's tokenizer.
        rest: Add a last class for all tokens that begin no label.

    Returns:
        One log-probability a label, in the order of ``tokens.labels``, and with ``rest`` one more.

    Raises:
        ModelError: The logits are narrower than the tokenizer.

    >>> tokens = LabelTokens(("yes", "no"), ((0, 2), (1,)))
    >>> mx.exp(label_logprobs(mx.zeros((1, 4)), tokens)).tolist()
    [[0.666..., 0.333...]]
    """
    widest = max(map(len, tokens.ids))
    ids = np.zeros((len(tokens.ids), widest), dtype=np.int32)
    used = np.zeros(ids.shape, dtype=bool)
    for row, label_ids in enumerate(tokens.ids):
        ids[row, : len(label_ids)], used[row, : len(label_ids)] = label_ids, True
    if ids.max() >= logits.shape[-1]:
        raise ModelError(
            f"label token {ids.max()} for logits of {logits.shape[-1]} columns",
            fix="build the label tokens with this model's own tokenizer",
        )
    z = mx.take(logits, mx.array(ids.reshape(-1)), axis=-1).astype(mx.float32)
    z = z.reshape(*logits.shape[:-1], *ids.shape)
    mass = mx.logsumexp(mx.where(mx.array(used), z, LOWEST), axis=-1)
    if rest:
        begins_label = np.zeros(logits.shape[-1], dtype=bool)
        begins_label[ids[used]] = True
        others = mx.logsumexp(
            mx.where(mx.array(begins_label), LOWEST, logits.astype(mx.float32)), axis=-1, keepdims=True
        )
        mass = mx.concatenate([mass, others], axis=-1)
    return mass - mx.logsumexp(mass, axis=-1, keepdims=True)


def label_kl(
    student_logprobs: Float[mx.array, "*b c"],
    teacher_logprobs: Float[mx.array, "*b d"],
    *,
    temperature: float = 4.0,
) -> Float[mx.array, "*b"]:
    """Forward KL over the labels (and the class of all other tokens, if both have it), softened: Hinton's
    loss over classes.

    ``T² KL(softmax(log p / T) ‖ softmax(log q / T))``. Source: Hinton et al. 2015,
    https://arxiv.org/abs/1503.02531.

    Args:
        student_logprobs: From :func:`label_logprobs`.
        teacher_logprobs: From the teacher's own logits and tokens, the same labels in the same order.
        temperature: T.

    Returns:
        Nats (times T²) a row, not averaged.

    Raises:
        ModelError: Different numbers of labels.
        ConfigError: The temperature is not positive.

    >>> label_kl(mx.array([[-0.7, -0.7]]), mx.array([[-0.7, -0.7]])).item()
    0.0
    """
    return forward_kl(student_logprobs, teacher_logprobs, temperature=temperature)


def _check_labels(labels: Sequence[str], texts: list[bytes]) -> None:
    if len(labels) < 2 or not all(texts):
        raise ConfigError(f"labels {list(labels)}", fix="give at least two labels, none of them empty")
    seen: dict[int, str] = {}
    for label, text in zip(labels, texts, strict=True):
        if text[0] in seen:
            raise ConfigError(
                f"the labels {seen[text[0]]!r} and {label!r} begin with the same byte: no single token tells "
                "them apart",
                fix="give the labels different first characters",
            )
        seen[text[0]] = label
