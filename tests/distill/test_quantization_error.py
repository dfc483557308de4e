"""The distance of a quantized model from its reference against plain float64 numpy: a row at a time, no
padding, the whole vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.labels import one_node
from helpers.tiny_model import VOCABULARY, TinyModel, make_model

from mlx_distill.distill.quantization_error import quantization_error, reference_outputs
from mlx_distill.distill.teacher import TokenizedAnswer
from mlx_distill.errors import DataError, ModelError
from mlx_distill.models.load import load_model

LABELS = one_node(("yes", "no", "maybe"), ((0, 3), (1,), (2, 5)))
GOLDEN = Path(__file__).parents[1] / "golden"


def make_answers(count: int = 9) -> list[TokenizedAnswer]:
    random = np.random.default_rng(0)
    tokens = [random.integers(0, VOCABULARY, size=int(random.integers(5, 30))).tolist() for _ in range(count)]
    starts = [int(random.integers(1, len(row) - 1)) for row in tokens]
    return [
        TokenizedAnswer(row, start, start + 1 if i % 3 else None)
        for i, (row, start) in enumerate(zip(tokens, starts, strict=True))
    ]


ANSWERS = make_answers()


def quantized_copy(seed: int = 0) -> TinyModel:
    model = make_model(seed, width=32)
    nn.quantize(model, group_size=32, bits=2)
    return model


def plain(p: TinyModel, q: TinyModel) -> tuple[float, float, int]:
    every, answered, flips = [], [], 0
    for answer in ANSWERS:
        z = [np.array(model(mx.array([answer.tokens])))[0].astype(np.float64) for model in (p, q)]
        log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in z)
        kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)[:-1]
        every += kl.tolist()
        answered += kl[answer.start - 1 :].tolist()
        if answer.label_start is not None:
            best = [
                np.argmax([np.exp(x[answer.label_start - 1, list(ids)]).sum() for ids in LABELS.nodes[0].ids])
                for x in (log_p, log_q)
            ]
            flips += int(best[0] != best[1])
    return float(np.mean(every)), float(np.mean(answered)), flips


@pytest.mark.parametrize("batch_size", [1, 4, 16])
@pytest.mark.parametrize("on_disk", [False, True])
def test_it_equals_the_plain_sums_in_any_batch(batch_size: int, on_disk: bool, tmp_path: Path) -> None:
    p, q = make_model(width=32), quantized_copy()
    expected = plain(p, q)
    assert expected[2] > 0  # so that flips are tested
    folder = tmp_path / "reference" if on_disk else None
    kept = reference_outputs(p, ANSWERS, labels=LABELS, batch_size=3, folder=folder)
    error = quantization_error(kept, q, ANSWERS, labels=LABELS, batch_size=batch_size)
    assert error.kl == pytest.approx(expected[0], rel=1e-4)
    assert error.answer_kl == pytest.approx(expected[1], rel=1e-4)
    assert error.flips == expected[2]
    assert error.tokens == sum(len(a.tokens) - 1 for a in ANSWERS)
    assert error.answer_tokens == sum(len(a.tokens) - a.start for a in ANSWERS)
    assert (error.rows, error.labelled) == (9, 6)


def test_a_few_positions_at_a_time_give_the_same() -> None:
    p, q = make_model(width=32), quantized_copy()
    whole = quantization_error(p, q, ANSWERS, labels=LABELS)
    few = quantization_error(p, q, ANSWERS, labels=LABELS, max_logits=3 * VOCABULARY)
    assert few.kl == pytest.approx(whole.kl, rel=1e-5)


def test_the_reference_stays_what_it_was_when_its_model_is_changed() -> None:
    model = make_model(width=32)
    kept = reference_outputs(model, ANSWERS)
    before = quantization_error(kept, quantized_copy(), ANSWERS).kl
    model.lm_head.weight = mx.zeros_like(model.lm_head.weight)
    assert quantization_error(kept, quantized_copy(), ANSWERS).kl == before
    assert quantization_error(kept, model, ANSWERS).kl > before


def test_a_model_against_itself_has_no_divergence() -> None:
    model = make_model(width=32)
    error = quantization_error(model, model, ANSWERS, labels=LABELS)
    assert abs(error.kl) < 1e-6 and abs(error.answer_kl) < 1e-6 and error.flips == 0


def test_a_tied_bfloat16_model_with_a_reference_on_disk(tmp_path: Path) -> None:
    model, _ = load_model(GOLDEN / "models_qwen3", dtype="bfloat16")
    in_memory = reference_outputs(model, ANSWERS)
    on_disk = reference_outputs(model, ANSWERS, folder=tmp_path / "reference")
    other, _ = load_model(GOLDEN / "models_qwen3", dtype="float32")
    nn.quantize(other, group_size=32, bits=4, class_predicate=lambda path, m: _fits(m))
    values = [quantization_error(kept, other, ANSWERS).kl for kept in (in_memory, on_disk)]
    assert values[0] == values[1] > 0


def _fits(module: nn.Module) -> bool:
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0


def test_no_rows_and_tokens_beyond_the_embedding_are_errors() -> None:
    model = make_model()
    with pytest.raises(DataError, match="no rows"):
        quantization_error(model, model, [])
    with pytest.raises(ModelError):
        quantization_error(model, model, [TokenizedAnswer([1, VOCABULARY, 2], 1)])
