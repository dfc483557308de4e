"""The registry of token-level losses against the recipe's list of names."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.given_logits import GivenLogits
from helpers.top_k_row import top_k_row

from mlx_distill.distill.align import collate_aligned_rows
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


def test_targets_of_another_temperature_are_refused() -> None:
    z = np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32)
    extra = collate_aligned_rows([top_k_row(z, 5)], [0], 0, 1).extra
    data = TokenLossInput(GivenLogits(mx.array(z)), extra, lambda: mx.zeros(3), None, 2.0)
    with pytest.raises(ConfigError, match=r"temperature 2\.0, and the targets are at 1"):
        TOKEN_LOSSES["kl"].loss(data)
