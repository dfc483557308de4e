"""The registry of token-level losses against the recipe's list of names."""

from __future__ import annotations

import pytest

from mlx_distill.distill.token_losses import TOKEN_LOSSES, token_loss_name
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
