"""Warnings about a loss curve."""

from __future__ import annotations

from typing import Any

from mlx_distill.train.diagnostics import diagnose_curve


def curve(
    losses: list[float], looks: dict[int, float] | None = None, norms: list[float] | None = None
) -> list[dict[str, Any]]:
    norms = norms or [1.0] * len(losses)
    rows = [
        {"step": step, "loss": loss, "grad_norm": norm}
        for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), 1)
    ]
    for step, loss in (looks or {}).items():
        rows[step - 1]["valid_loss"] = loss
    return rows


def test_a_falling_curve_gives_no_warning() -> None:
    assert diagnose_curve(curve([3.0, 2.0, 1.0], {2: 2.0, 3: 1.5})) == []


def test_the_first_and_last_tenths_are_compared_not_single_steps() -> None:
    falling = [5.0 - 0.1 * i for i in range(40)]
    assert diagnose_curve(curve([*falling[:-1], 6.0])) == []  # one bad batch at the end


def test_a_loss_that_ended_higher_gives_a_warning() -> None:
    (warning,) = diagnose_curve(curve([1.0] * 10 + [1.5] * 10))
    assert "ended at 1.5, above the 1 of the start" in warning and "learning rate" in warning


def test_a_loss_that_diverged_and_recovered_gives_a_warning() -> None:
    (warning,) = diagnose_curve(curve([7.6, 40.0, 9.0, 7.0, 6.9]))
    assert "rose from 7.6 to 40 at step 2" in warning and "learning rate" in warning


def test_a_vanished_gradient_gives_a_warning_with_its_step() -> None:
    (warning,) = diagnose_curve(curve([7.6, 7.5, 7.0, 7.0, 7.0], norms=[1.0, 2.0, 0.5, 0.0, 0.0]))
    assert "0 since step 4" in warning


def test_a_gradient_that_was_always_zero_gives_a_warning() -> None:
    (warning,) = diagnose_curve(curve([7.0, 7.0], norms=[0.0, 0.0]))
    assert "0 since step 1" in warning


def test_steps_without_trained_tokens_are_ignored() -> None:
    assert diagnose_curve(curve([0.0, 3.0, 2.0, 0.0], norms=[0.0, 1.0, 1.0, 0.0])) == []


def test_a_rising_validation_loss_gives_a_warning_with_the_best_step() -> None:
    (warning,) = diagnose_curve(curve([3.0, 2.0, 1.0], {1: 2.0, 2: 1.0, 3: 1.5}))
    assert "1 at step 2" in warning and "1.5" in warning and "use_best" in warning


def test_use_best_needs_no_warning_about_validation() -> None:
    assert diagnose_curve(curve([3.0, 2.0, 1.0], {2: 1.0, 3: 1.5}), use_best=True) == []


def test_one_step_gives_no_warning() -> None:
    assert diagnose_curve(curve([3.0])) == []


def test_noise_in_the_last_validation_gives_no_warning() -> None:
    assert diagnose_curve(curve([3.0, 2.0, 1.0], {2: 1.0, 3: 1.04})) == []
