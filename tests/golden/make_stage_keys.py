"""Stage keys of the packaged recipes with empty parents, for tests/test_stage_keys.py: ``stage_keys.json``.

A key decides whether a finished stage of a user is run again, so a change of the code must not change one by
accident. Run this script only for an intended change, and list the stages that run again in CHANGELOG.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlx_distill.graph import graph
from mlx_distill.recipe import load_recipe, recipe_names
from mlx_distill.storage import stage_key

# Settings that are off in the packaged recipes, and that add stages or change the spelling of a key.
VARIANTS = {
    "": [],
    "controls": ["controls.labels=true", "controls.text=true"],
    "unpack": ["unpack=true"],
    "cells": ["distill.token_loss=cells"],
}
# The same settings under their current names.
RENAMED = {"unpack": ["dequantize=true"], "cells": ["distill.token_loss=token_groups"]}


def stage_keys(variants: Mapping[str, Sequence[str]] = VARIANTS) -> dict[str, dict[str, str]]:
    """For each packaged recipe and variant, the key of every stage with empty parents."""
    keys: dict[str, dict[str, str]] = {}
    for name in recipe_names():
        for variant, overrides in variants.items():
            recipe = load_recipe(name, overrides)
            stages = graph(recipe, recipe.load_task())
            keys[f"{name} {variant}".strip()] = {
                s.name: stage_key(s.name, s.format, s.config, {}) for s in stages
            }
    return keys


if __name__ == "__main__":
    path = Path(__file__).with_name("stage_keys.json")
    path.write_text(json.dumps(stage_keys(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
