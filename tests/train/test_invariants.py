"""What must not change the result: 8 batches of 1, 1 of 8, packed sequences, two ranks, two ranks over packed
lines, however uneven.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from helpers.launch import launched
from helpers.real_models import KINDS, OBJECTIVES, make_model, windows
from helpers.training_cases import PACKED, SEQUENCES, counted_bases, run_case, same, start_of, steps_of
from mlx.utils import tree_flatten

from mlx_distill.train.gradients import WindowGradients, global_norm, window_gradients

# Two ranks take what one takes in windows of twice as many. Packed: one pass over five sequences, so that a
# rank has none at the end.
ONCE: dict[str, Any] = {**PACKED, "accumulate": 1, "steps": 0, "epochs": 1.0}
TRAININGS: list[dict[str, Any]] = [
    {"method": "full", "steps": 8, "accumulate": 2},
    {"method": "galore", "steps": 8, "accumulate": 2, "galore_update_gap": 3},
    {"method": "lora", **ONCE},
    {"method": "galore", **ONCE, "galore_rank": 2, "galore_update_gap": 2},
    {"method": "apollo", "steps": 8, "accumulate": 2},
    {"method": "dora", **ONCE},
]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All trainings and gradients of two ranks, from one launch."""
    folder = tmp_path_factory.mktemp("two")
    said = launched(folder, "shared", *map(json.dumps, TRAININGS))
    assert said.count("finished") == 2, said
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_micro_batching_changes_neither_loss_nor_terms_nor_gradient(kind: str, name: str, two: Path) -> None:
    assert any(len(line) > 1 for line in SEQUENCES.rows) and len(SEQUENCES.rows) % 2
    model = make_model(kind)
    found = {
        form: window_gradients(model, batches, OBJECTIVES[name]) for form, batches in windows(name).items()
    }
    found |= {folder.name: read(folder) for folder in (two / "windows" / kind / name).iterdir()}
    assert len(found) == 8
    plain = found.pop("1x8")
    norm = global_norm(plain.gradients)
    assert plain.loss > 0 and norm > 0
    for form, other in found.items():
        assert other.loss == pytest.approx(plain.loss, rel=1e-5), form
        assert other.terms == pytest.approx(plain.terms, rel=1e-5) and other.weights == plain.weights, form
        assert global_norm(other.gradients) == pytest.approx(norm, rel=1e-5), form
        for path, gradient in plain.gradients.items():
            assert mx.abs(other.gradients[path] - gradient).max().item() < 1e-5 * norm, (form, path)


def read(folder: Path) -> WindowGradients:
    loss, terms, weights = json.loads((folder / "window.json").read_text())
    return WindowGradients(dict(mx.load(str(folder / "gradients.safetensors"))), loss, terms, weights, [])  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(
    "place",
    range(len(TRAININGS)),
    ids=[f"{case['method']} {'packed' * ('packing' in case)}" for case in TRAININGS],
)
def test_two_ranks_train_as_one_rank(tmp_path: Path, two: Path, place: int) -> None:
    """Losses and norms of every step, and the way gone in all; both ranks end with one model, and each
    computed some of the bases, once.
    """
    case = TRAININGS[place]
    with counted_bases() as found:
        alone, _ = run_case(tmp_path, {**case, "accumulate": 2 * case["accumulate"]}, dropout=0.0)
    steps = steps_of(tmp_path)
    assert len(steps) == len(steps_of(two / str(place))) == 3 if "packing" in case else 8
    for a, b in zip(steps, steps_of(two / str(place)), strict=True):
        assert a["tokens"] == b["tokens"]
        for key in {"loss", "grad_norm", "valid_loss"} & set(a):
            assert a[key] == pytest.approx(b[key], rel=1e-5), key
    first, second = (dict(mx.load(str(two / str(place) / f"final-{rank}.safetensors"))) for rank in (0, 1))
    assert same(first, second)  # type: ignore[arg-type]
    # As a whole: where a gradient is rounding alone, Adam makes steps of any length of it.
    start = dict(tree_flatten(start_of(case, 0.0)[0].trainable_parameters()))
    assert start.keys() == alone.keys() == first.keys()
    way, apart = (
        global_norm({path: alone[path] - other[path] for path in alone}) for other in (start, first)
    )
    assert way > 0.05 and apart < 1e-4 * way, (way, apart)
    bases = [json.loads((two / f"bases-{rank}.json").read_text())[place] for rank in (0, 1)]
    assert sum(bases) == len(found) and (min(bases) > 0) == (case["method"] == "galore")
