"""A change of the code must not make a user's finished stages stale: the keys of the packaged recipes are
committed.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"


def test_stage_keys_of_the_packaged_recipes_are_the_committed_ones() -> None:
    spec = importlib.util.spec_from_file_location("make_stage_keys", GOLDEN / "make_stage_keys.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.stage_keys() == json.loads((GOLDEN / "stage_keys.json").read_text(encoding="utf-8"))
