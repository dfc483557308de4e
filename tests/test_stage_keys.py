"""Changes of the code must not change the keys of stages, or users' finished stages would be made again."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).parent / "golden"


def script() -> Any:
    spec = importlib.util.spec_from_file_location("make_stage_keys", GOLDEN / "make_stage_keys.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def committed() -> dict[str, dict[str, str]]:
    keys: dict[str, dict[str, str]] = json.loads((GOLDEN / "stage_keys.json").read_text(encoding="utf-8"))
    return keys


@pytest.mark.slow
def test_stage_keys_of_the_packaged_recipes_are_the_committed_ones() -> None:
    assert script().stage_keys() == committed()


def test_renamed_settings_have_the_keys_that_they_had_under_their_old_names() -> None:
    found = script().stage_keys(script().RENAMED)
    assert len(found) >= 8 and found == {name: committed()[name] for name in found}
