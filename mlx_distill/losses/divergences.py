"""Divergences between two sets of logits over the same tokens, one number a position.

``p`` is the teacher's distribution, ``q`` the student's, both ``softmax(logits / T)``. Every divergence is
multiplied by T², so that its gradient keeps its size when T changes (Hinton et al. 2015,
https://arxiv.org/abs/1503.02531), is zero where the two are equal, and gives no gradient to the teacher.
These are the plain forms; :mod:`mlx_distill.losses.tiled` gives the same values without ever holding the
logits.
"""

from __future__ import annotations

import math

import mlx.core as mx
from jaxtyping import Float

from mlx_distill.losses.numerics import check_fraction, check_temperature, check_widths, log_softmax, row_sum


def forward_kl(
    student_logits: Float[mx.array, "*b v"],
    teacher_logits: Float[mx.array, "*b w"],
    *,
    temperature: float = 1.0,
) -> Float[mx.array, "*b"]:
    """Forward KL divergence, the classic distillation loss: the student must cover all that the teacher finds
    likely.

    ``T² Σ p (log p - log q)``. Source: Hinton, Vinyals and Dean 2015, https://arxiv.org/abs/1503.02531.

    Args:
        student_logits: Unnormalised, any float type; computed in float32.
        teacher_logits: The same width.
        temperature: T, by which both are divided.

    Returns:
        Nats (times T²) a position, not averaged.

    Raises:
        ModelError: The widths differ.
        ConfigError: The temperature is not positive.

    >>> forward_kl(mx.array([[0.0, 0.0]]), mx.array([[0.0, 0.0]])).item()
    0.0
    """
    log_q, log_p = _log_probs(student_logits, teacher_logits, temperature)
    return temperature**2 * row_sum(mx.exp(log_p) * (log_p - log_q))


def reverse_kl(
    student_logits: Float[mx.array, "*b v"],
    teacher_logits: Float[mx.array, "*b w"],
    *,
    temperature: float = 1.0,
) -> Float[mx.array, "*b"]:
    """Reverse KL divergence: the student must stay where the teacher finds it likely, and may leave modes
    out.

    ``T² Σ q (log q - log p)``. Source: Gu et al. 2024 (MiniLLM), https://arxiv.org/abs/2306.08543.

    Args:
        student_logits: Unnormalised, any float type; computed in float32.
        teacher_logits: The same width.
        temperature: T, by which both are divided.

    Returns:
        Nats (times T²) a position, not averaged.

    Raises:
        ModelError: The widths differ.
        ConfigError: The temperature is not positive.

    >>> reverse_kl(mx.array([[0.0, 0.0]]), mx.array([[0.0, 0.0]])).item()
    0.0
    """
    log_q, log_p = _log_probs(student_logits, teacher_logits, temperature)
    return temperature**2 * row_sum(mx.exp(log_q) * (log_q - log_p))


def js_divergence(
    student_logits: Float[mx.array, "*b v"],
    teacher_logits: Float[mx.array, "*b w"],
    *,
    temperature: float = 1.0,
    beta: float = 0.5,
) -> Float[mx.array, "*b"]:
    """Generalised Jensen-Shannon divergence, bounded, between forward and reverse KL.

    ``T² (β KL(p‖m) + (1-β) KL(q‖m))`` with ``m = β p + (1-β) q``. As β goes to 0 or 1 this goes to zero; at
    exactly 0 and 1 the forward and the reverse KL stand in its place, as users of GKD expect. Source: Agarwal
    et al. 2024, https://arxiv.org/abs/2306.13649.

    Args:
        student_logits: Unnormalised, any float type; computed in float32.
        teacher_logits: The same width.
        temperature: T, by which both are divided.
        beta: The teacher's weight in the mixture, from 0 to 1.

    Returns:
        Nats (times T²) a position, not averaged.

    Raises:
        ModelError: The widths differ.
        ConfigError: The temperature is not positive, or beta is outside [0, 1].

    >>> round(js_divergence(mx.array([[99.0, 0.0]]), mx.array([[0.0, 99.0]])).item(), 4)
    0.6931
    """
    check_fraction("beta", beta)
    if beta in (0, 1):
        kl = forward_kl if beta == 0 else reverse_kl
        return kl(student_logits, teacher_logits, temperature=temperature)
    log_q, log_p = _log_probs(student_logits, teacher_logits, temperature)
    log_m = mx.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    terms = beta * mx.exp(log_p) * (log_p - log_m) + (1 - beta) * mx.exp(log_q) * (log_q - log_m)
    return temperature**2 * row_sum(terms)


def skew_kl(
    student_logits: Float[mx.array, "*b v"],
    teacher_logits: Float[mx.array, "*b w"],
    *,
    temperature: float = 1.0,
    lam: float = 0.1,
) -> Float[mx.array, "*b"]:
    """Skew KL divergence: forward KL against a student mixed with a little of the teacher, so that no
    gradient explodes.

    ``T² KL(p ‖ λ p + (1-λ) q)``. Source: Ko et al. 2024 (DistiLLM), https://arxiv.org/abs/2402.03898.

    Args:
        student_logits: Unnormalised, any float type; computed in float32.
        teacher_logits: The same width.
        temperature: T, by which both are divided.
        lam: λ, the teacher's weight in the mixture: 0 is forward KL, 1 is zero everywhere.

    Returns:
        Nats (times T²) a position, not averaged.

    Raises:
        ModelError: The widths differ.
        ConfigError: The temperature is not positive, or lam is outside [0, 1].

    >>> round(skew_kl(mx.array([[99.0, 0.0]]), mx.array([[0.0, 99.0]]), lam=0.5).item(), 4)
    0.6931
    """
    check_fraction("lam", lam)
    if lam == 0:
        return forward_kl(student_logits, teacher_logits, temperature=temperature)
    log_q, log_p = _log_probs(student_logits, teacher_logits, temperature)
    log_m = mx.logaddexp(log_p + math.log(lam), log_q + (math.log1p(-lam) if lam < 1 else -math.inf))
    return temperature**2 * row_sum(mx.exp(log_p) * (log_p - log_m))


def total_variation(
    student_logits: Float[mx.array, "*b v"],
    teacher_logits: Float[mx.array, "*b w"],
    *,
    temperature: float = 1.0,
) -> Float[mx.array, "*b"]:
    """Total variation distance: the largest difference of the two probabilities of any event.

    ``T² ½ Σ |p - q|``. Source: Wen et al. 2023 (f-DISTILL), https://arxiv.org/abs/2307.15190.

    Args:
        student_logits: Unnormalised, any float type; computed in float32.
        teacher_logits: The same width.
        temperature: T, by which both are divided.

    Returns:
        A number from 0 to T² a position, not averaged.

    Raises:
        ModelError: The widths differ.
        ConfigError: The temperature is not positive.

    >>> total_variation(mx.array([[99.0, 0.0]]), mx.array([[0.0, 99.0]])).item()
    1.0
    """
    log_q, log_p = _log_probs(student_logits, teacher_logits, temperature)
    return temperature**2 * 0.5 * row_sum(mx.abs(mx.exp(log_p) - mx.exp(log_q)))


def _log_probs(student: mx.array, teacher: mx.array, temperature: float) -> tuple[mx.array, mx.array]:
    check_temperature(temperature)
    check_widths(student.shape[-1], teacher.shape[-1])
    return log_softmax(student, temperature), log_softmax(mx.stop_gradient(teacher), temperature)
