"""The registry of token-level losses against the recipe's list of names."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.given_logits import GivenLogits

from mlx_distill.distill.align import AlignedRow, align_row, at_temperature, collate_aligned_rows
from mlx_distill.distill.teacher_cache import TeacherTargets
from mlx_distill.distill.token_distributions import Kept, distributions
from mlx_distill.distill.token_losses import TOKEN_LOSSES, TokenLossInput, token_loss_name
from mlx_distill.errors import ConfigError
from mlx_distill.recipe import TOKEN_LOSSES as NAMES
from mlx_distill.recipe import DistillConfig


def test_the_recipe_names_every_loss_of_the_registry() -> None:
    assert set(NAMES) == {"auto", "none", *TOKEN_LOSSES}


@pytest.mark.parametrize("same_tokenizer", [False, True])
def test_auto_depends_on_the_tokenizers(same_tokenizer: bool) -> None:
    name = token_loss_name(DistillConfig(token_loss="auto"), same_tokenizer)
    assert name is not None
    assert TOKEN_LOSSES[name].needs == ("same_tokenizer" if same_tokenizer else "token_groups")
    for explicit in TOKEN_LOSSES:
        assert token_loss_name(DistillConfig(token_loss=explicit), same_tokenizer) == explicit


def test_without_weight_there_is_no_loss() -> None:
    assert token_loss_name(DistillConfig(token_weight=0.0), True) is None
    assert token_loss_name(DistillConfig(token_loss="none"), True) is None


# --- kl at a temperature ------------------------------------------------------------------------------------


def row_at(temperature: float, z: np.ndarray, k: int) -> AlignedRow:
    """A row whose targets are read from logits, through the mass outside of the top k at the temperature."""
    n = len(z)
    p = Kept(k, (temperature,))
    part = distributions(mx.array(z), np.zeros(n, dtype=np.int32), p)
    targets = TeacherTargets(
        "row",
        "",
        None,
        np.zeros(n, np.int32),
        part.logprobs,
        part.topk_ids,
        part.topk_logprobs,
        tempered_tails=part.tempered_tails,
    )
    return align_row(
        np.zeros(n + 1, np.int32),
        1,
        np.array([[i, i + 1, i, i + 1] for i in range(n - 1)]),
        teacher_logprobs=part.logprobs,
        topk_ids=part.topk_ids,
        topk_logprobs=at_temperature(targets, temperature),
        label_start=None,
        label_logprobs=None,
        temperature=temperature,
    )


def test_targets_of_another_temperature_are_refused() -> None:
    z = np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32)
    extra = collate_aligned_rows([row_at(1.0, z, 5)], [0], 0, 1).extra
    data = TokenLossInput(GivenLogits(mx.array(z)), extra, lambda: mx.zeros(3), None, 2.0)
    with pytest.raises(ConfigError, match=r"temperature 2\.0, and the targets are at 1"):
        TOKEN_LOSSES["kl"].loss(data)
