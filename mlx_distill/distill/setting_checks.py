"""Which settings of a distillation go together. The recipe is checked by it, and so is the advice of the
preflight: what it recommends is never refused.
"""

from __future__ import annotations

from mlx_distill.errors import ConfigError
from mlx_distill.recipe import DistillConfig, TargetsConfig


def check_settings(distill: DistillConfig, targets: TargetsConfig) -> None:
    """Refuse settings that contradict each other or have no effect.

    Args:
        distill: Of the student's training.
        targets: Of the teacher's targets.

    Raises:
        ConfigError: samples of text that is not sampled; a token-level loss that the targets cannot give; a
            live teacher that no loss reads; thinking that nothing teaches to end.
    """
    if targets.samples > 1 and targets.text != "sampled":
        raise ConfigError(
            f"targets.samples: {targets.samples}, and targets.text is {targets.text}",
            fix="set targets.text: sampled, or leave samples out",
        )
    loss = distill.token_loss if distill.token_weight > 0 else "none"
    if distill.mid_token_rows:
        _check_mid_token_rows(loss, targets)
    if distill.teacher == "live":
        if loss in ("none", "alm"):
            raise ConfigError(
                f"distill.teacher: live, and no loss reads its distributions (token_loss: {loss})",
                fix="set distill.teacher: cached, or another token_loss with a token_weight",
            )
    elif targets.draws and loss not in ("none", "alm"):
        _check_draws(loss, distill.temperature)
    if targets.student_thinking and not distill.text_weight:
        raise ConfigError(
            f"targets.thinking: {targets.thinking}, and distill.text_weight is 0: nothing teaches the "
            "student to end its thinking",
            fix="set distill.text_weight, or targets.thinking: drop",
        )


def _check_mid_token_rows(loss: str, targets: TargetsConfig) -> None:
    """Refuse rows in the middle of tokens where the loss has none, or the targets cannot give them."""
    if loss not in ("auto", "token_groups"):
        raise ConfigError(
            f"distill.mid_token_rows: true, and token_loss is {loss}",
            fix="set distill.token_loss: token_groups, or mid_token_rows: false",
        )
    if targets.draws:
        raise ConfigError(
            "distill.mid_token_rows: true from targets.draws is biased: samples do not give the distribution "
            "behind a part of a token",
            fix="set targets.draws: 0, or distill.mid_token_rows: false",
        )
    if targets.student_thinking:
        raise ConfigError(
            f"targets.thinking: {targets.thinking} and distill.mid_token_rows: targets in the middle "
            "of tokens are made of answers alone",
            fix="set distill.mid_token_rows: false, or targets.thinking: drop",
        )


def _check_draws(loss: str, temperature: float) -> None:
    """Refuse a loss that samples of the distributions do not give without bias."""
    if temperature != 1:
        raise ConfigError(
            f"distill.temperature: {temperature:g}: the samples of targets.draws are of the "
            "distribution at temperature 1",
            fix="set distill.temperature: 1, targets.draws: 0, or distill.teacher: live",
        )
    if loss not in ("auto", "kl", "token_groups"):
        raise ConfigError(
            f"distill.token_loss: {loss} from targets.draws is biased: only the forward KL is not",
            fix="set token_loss: kl or token_groups, targets.draws: 0, or distill.teacher: live",
        )
