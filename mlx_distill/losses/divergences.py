"""Divergences between two sets of logits over the same tokens, one number per position.

``p`` is the teacher's distribution, ``q`` the student's, both ``softmax(logits / T)``. Every divergence is
multiplied by T², so that its gradient keeps its size when T changes (Hinton et al. 2015,
https://arxiv.org/abs/1503.02531), is zero where the two are equal, and gives no gradient to the teacher.

Each divergence is a sum over the columns of the vocabulary. Its summand is in :data:`DIVERGENCES`, the only
place that knows the formula: the functions below sum it over whole logits, and
:func:`~mlx_distill.losses.tiled.linear_divergence` over tiles, without ever holding the logits. To add one,
add an entry to the registry, a public function here, and a line to the battery in
``tests/losses/test_divergences.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, TypeAlias

import mlx.core as mx
from jaxtyping import Float

from mlx_distill.errors import ConfigError
from mlx_distill.losses.numerics import (
    check_fraction,
    check_temperature,
    check_widths,
    eager_exp,
    eager_logaddexp,
    log_softmax,
    row_sum,
)

# (log q, log p, maths) of some columns -> each column's summand f, or f and its derivative by log q.
Summand: TypeAlias = mx.array | tuple[mx.array, mx.array]
Pointwise: TypeAlias = Callable[..., Summand]


class Maths(NamedTuple):
    """The functions that a summand is computed with: MLX's, through which gradients go, or faster ones."""

    exp: Callable[[mx.array], mx.array]
    logaddexp: Callable[[mx.array, mx.array], mx.array]


TRACED = Maths(mx.exp, mx.logaddexp)
EAGER = Maths(eager_exp, eager_logaddexp)


@dataclass(frozen=True)
class Divergence:
    """A divergence ``Σ_columns f(log q, log p)``, without the factor T².

    Args:
        pointwise: f of ``log q``, ``log p``, ``maths`` and the options, differentiable by ``log q`` with
            :data:`TRACED` as ``maths``. It may return f and its derivative by ``log q`` instead: the tiled
            form then needs no vjp, which keeps some 30 MiB more per block of rows and takes longer.
        options: The options' names and defaults; each is a number from 0 to 1.
        limits: Values of the option at which f is degenerate, and the divergence that is used there instead.
    """

    pointwise: Callable[..., Summand]
    options: Mapping[str, float] = field(default_factory=dict)
    limits: Mapping[float, str] = field(default_factory=dict)


def _forward(log_q: mx.array, log_p: mx.array, maths: Maths = TRACED) -> mx.array:
    return maths.exp(log_p) * (log_p - log_q)


def _reverse(log_q: mx.array, log_p: mx.array, maths: Maths = TRACED) -> mx.array:
    return maths.exp(log_q) * (log_q - log_p)


def _jensen_shannon(
    log_q: mx.array, log_p: mx.array, maths: Maths = TRACED, *, beta: float
) -> tuple[mx.array, mx.array]:
    log_m = maths.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    student = (1 - beta) * maths.exp(log_q) * (log_q - log_m)
    # The derivatives through log m cancel: β p + (1-β) q = m.
    return beta * maths.exp(log_p) * (log_p - log_m) + student, student


def _skew(
    log_q: mx.array, log_p: mx.array, maths: Maths = TRACED, *, lam: float
) -> tuple[mx.array, mx.array]:
    other = log_q + (math.log1p(-lam) if lam < 1 else -math.inf)
    log_m = maths.logaddexp(log_p + math.log(lam), other)
    p = maths.exp(log_p)
    return p * (log_p - log_m), -(1 - lam) * p * maths.exp(log_q - log_m)


def _variation(log_q: mx.array, log_p: mx.array, maths: Maths = TRACED) -> tuple[mx.array, mx.array]:
    q = maths.exp(log_q)
    difference = q - maths.exp(log_p)
    return 0.5 * mx.abs(difference), 0.5 * mx.sign(difference) * q


DIVERGENCES: Mapping[str, Divergence] = {
    "forward_kl": Divergence(_forward),
    "reverse_kl": Divergence(_reverse),
    "js_divergence": Divergence(
        _jensen_shannon, {"beta": 0.5}, limits={0.0: "forward_kl", 1.0: "reverse_kl"}
    ),
    "skew_kl": Divergence(_skew, {"lam": 0.1}, limits={0.0: "forward_kl"}),
    "total_variation": Divergence(_variation),
}


def summand(pointwise: Pointwise, log_q: mx.array, log_p: mx.array) -> mx.array:
    """Each column's summand f."""
    out = pointwise(log_q, log_p)
    return out[0] if isinstance(out, tuple) else out


def summand_and_derivative(
    pointwise: Pointwise, log_q: mx.array, log_p: mx.array
) -> tuple[mx.array, mx.array]:
    """Each column's summand f and its derivative by ``log q``, by the chain rule where the entry has none; no
    gradient goes through the two.
    """
    out = pointwise(log_q, log_p, EAGER)
    if isinstance(out, tuple):
        return out
    (f,), (derivative,) = mx.vjp(lambda x: summand(pointwise, x, log_p), [log_q], [mx.ones_like(log_q)])
    return f, derivative


def pointwise_form(name: str, options: Mapping[str, float]) -> tuple[str, Pointwise]:
    """The divergence that a name and its options mean, and its summand with the options filled in.

    Args:
        name: A key of :data:`DIVERGENCES`.
        options: Options by name; those of other divergences are ignored, missing ones have their defaults.

    Returns:
        The name (another one than given where an option is at a limit) and f(log q, log p).

    Raises:
        ConfigError: An unknown divergence or option, or an option outside [0, 1].

    >>> pointwise_form("js_divergence", {"beta": 0.0})[0]
    'forward_kl'
    """
    if name not in DIVERGENCES:
        raise ConfigError(f"unknown divergence {name!r}", fix=f"one of {', '.join(DIVERGENCES)}")
    known = {option for entry in DIVERGENCES.values() for option in entry.options}
    for option, value in options.items():
        if option not in known:
            raise ConfigError(f"unknown option {option!r}", fix=f"one of {', '.join(sorted(known))}")
        check_fraction(option, value)
    divergence = DIVERGENCES[name]
    values = {option: options.get(option, default) for option, default in divergence.options.items()}
    for value in values.values():
        if value in divergence.limits:
            return pointwise_form(divergence.limits[value], {})
    return name, partial(divergence.pointwise, **values)


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
    return _on_logits("forward_kl", student_logits, teacher_logits, temperature)


def reverse_kl(
    student_logits: Float[mx.array, "*b v"],
    teacher_logits: Float[mx.array, "*b w"],
    *,
    temperature: float = 1.0,
) -> Float[mx.array, "*b"]:
    """Reverse KL divergence: the student must avoid what the teacher finds unlikely, and may leave modes out.

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
    return _on_logits("reverse_kl", student_logits, teacher_logits, temperature)


def js_divergence(
    student_logits: Float[mx.array, "*b v"],
    teacher_logits: Float[mx.array, "*b w"],
    *,
    temperature: float = 1.0,
    beta: float = 0.5,
) -> Float[mx.array, "*b"]:
    """Generalised Jensen-Shannon divergence: bounded, between forward and reverse KL.

    ``T² (β KL(p‖m) + (1-β) KL(q‖m))`` with ``m = β p + (1-β) q``. As β goes to 0 or 1 this goes to zero; at
    exactly 0 and 1 the forward and the reverse KL are used instead, as in GKD. Source: Agarwal et al. 2024,
    https://arxiv.org/abs/2306.13649.

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
    return _on_logits("js_divergence", student_logits, teacher_logits, temperature, beta=beta)


def skew_kl(
    student_logits: Float[mx.array, "*b v"],
    teacher_logits: Float[mx.array, "*b w"],
    *,
    temperature: float = 1.0,
    lam: float = 0.1,
) -> Float[mx.array, "*b"]:
    """Skew KL divergence: forward KL against a mixture of the student and a little of the teacher, which
    bounds the gradient.

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
    return _on_logits("skew_kl", student_logits, teacher_logits, temperature, lam=lam)


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
    return _on_logits("total_variation", student_logits, teacher_logits, temperature)


def _on_logits(
    name: str, student: mx.array, teacher: mx.array, temperature: float, **options: float
) -> mx.array:
    _, pointwise = pointwise_form(name, options)
    check_temperature(temperature)
    check_widths(student.shape[-1], teacher.shape[-1])
    log_q, log_p = log_softmax(student, temperature), log_softmax(mx.stop_gradient(teacher), temperature)
    return temperature**2 * row_sum(summand(pointwise, log_q, log_p))
