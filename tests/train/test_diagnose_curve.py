"""What a curve says against its training."""

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


def test_a_curve_that_falls_raises_no_doubt() -> None:
    assert diagnose_curve(curve([3.0, 2.0, 1.0], {2: 2.0, 3: 1.5})) == []


def test_the_tenths_at_both_ends_are_compared_not_single_steps() -> None:
    falling = [5.0 - 0.1 * i for i in range(40)]
    assert diagnose_curve(curve([*falling[:-1], 6.0])) == []  # one bad batch at the end


def test_a_loss_that_ended_higher_asks_for_a_lower_rate() -> None:
    (doubt,) = diagnose_curve(curve([1.0] * 10 + [1.5] * 10))
    assert "ended at 1.5, above the 1 of the start" in doubt and "learning rate" in doubt


def test_a_loss_that_leapt_is_told_although_it_came_down_again() -> None:
    (doubt,) = diagnose_curve(curve([7.6, 40.0, 9.0, 7.0, 6.9]))
    assert "rose from 7.6 to 40 at step 2" in doubt and "learning rate" in doubt


def test_a_gradient_that_died_is_told_with_its_step() -> None:
    (doubt,) = diagnose_curve(curve([7.6, 7.5, 7.0, 7.0, 7.0], norms=[1.0, 2.0, 0.5, 0.0, 0.0]))
    assert "0 since step 4" in doubt


def test_a_gradient_that_never_was_is_told() -> None:
    (doubt,) = diagnose_curve(curve([7.0, 7.0], norms=[0.0, 0.0]))
    assert "0 since step 1" in doubt


def test_steps_with_nothing_to_train_on_say_nothing() -> None:
    assert diagnose_curve(curve([0.0, 3.0, 2.0, 0.0], norms=[0.0, 1.0, 1.0, 0.0])) == []


def test_a_validation_loss_that_rose_names_the_best_step() -> None:
    (doubt,) = diagnose_curve(curve([3.0, 2.0, 1.0], {1: 2.0, 2: 1.0, 3: 1.5}))
    assert "1 at step 2" in doubt and "1.5" in doubt and "use_best" in doubt


def test_the_best_weights_are_what_use_best_gives() -> None:
    assert diagnose_curve(curve([3.0, 2.0, 1.0], {2: 1.0, 3: 1.5}), use_best=True) == []


def test_one_step_says_nothing() -> None:
    assert diagnose_curve(curve([3.0])) == []


def test_an_accident_of_the_last_look_is_no_doubt() -> None:
    assert diagnose_curve(curve([3.0, 2.0, 1.0], {2: 1.0, 3: 1.04})) == []
