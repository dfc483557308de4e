"""What a curve says against its training."""

from __future__ import annotations

from mlx_distill.train.hindsight import doubts


def curve(losses: list[float], looks: dict[int, float] | None = None) -> list[dict[str, float]]:
    rows = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    for step, loss in (looks or {}).items():
        rows[step - 1]["valid_loss"] = loss
    return rows


def test_a_curve_that_falls_raises_no_doubt():
    assert doubts(curve([3.0, 2.0, 1.0], {2: 2.0, 3: 1.5})) == []


def test_the_tenths_at_both_ends_are_compared_not_single_steps():
    falling = [5.0 - 0.1 * i for i in range(40)]
    assert doubts(curve([*falling[:-1], 9.0])) == []  # one bad batch at the end


def test_a_loss_that_rose_asks_for_a_lower_rate():
    (doubt,) = doubts(curve([1.0] * 10 + [2.0] * 10))
    assert "2, above the 1" in doubt and "learning rate" in doubt


def test_a_validation_loss_that_rose_names_the_best_step():
    (doubt,) = doubts(curve([3.0, 2.0, 1.0], {1: 2.0, 2: 1.0, 3: 1.5}))
    assert "1 at step 2" in doubt and "1.5" in doubt and "use_best" in doubt


def test_the_best_weights_are_what_use_best_gives():
    assert doubts(curve([3.0, 2.0, 1.0], {2: 1.0, 3: 1.5}), use_best=True) == []


def test_one_step_says_nothing():
    assert doubts(curve([3.0])) == []


def test_an_accident_of_the_last_look_is_no_doubt():
    assert doubts(curve([3.0, 2.0, 1.0], {2: 1.0, 3: 1.04})) == []
