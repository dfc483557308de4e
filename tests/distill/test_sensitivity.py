"""The loss with one module quantized at a time, against doing it by hand."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.small_chain import RecordedProgress
from helpers.tiny_model import VOCABULARY, TinyModel, make_model

from mlx_distill.distill.quantization_error import quantization_error
from mlx_distill.distill.sensitivity import SensitivityPlan, measure_sensitivity, plan_sensitivity
from mlx_distill.distill.teacher import TokenizedAnswer
from mlx_distill.models.quantization import Quantization, parse_mode

PATHS = ("model.embed_tokens", "model.up_proj", "model.down_proj", "lm_head")
MODES = [parse_mode("affine4", 32), parse_mode("affine2", 32)]
OPTIONS = dict.fromkeys(PATHS, MODES)


def make_answers() -> list[TokenizedAnswer]:
    random = np.random.default_rng(0)
    lengths = random.integers(5, 30, size=8)
    return [TokenizedAnswer(random.integers(0, VOCABULARY, size=n).tolist(), 2) for n in lengths]


ANSWERS = make_answers()


def by_hand(path: str, q: Quantization) -> float:
    model, reference = make_model(width=32), make_model(width=32)
    nn.quantize(model, q.group_size, q.bits, mode=q.mode, class_predicate=lambda name, _: name == path)
    return quantization_error(reference, model, ANSWERS).kl


@pytest.mark.parametrize("dequantize", [False, True])
def test_every_quantization_of_every_module(dequantize: bool) -> None:
    model, progress = make_model(width=32), RecordedProgress()
    before = np.array(model(mx.array([[1, 2, 3]])))
    table = measure_sensitivity(
        model,
        ANSWERS,
        OPTIONS,
        dtypes=dict.fromkeys(PATHS, mx.float32),
        dequantize=dequantize,
        progress=progress,
    )
    assert table.every and table.rows == 8
    for path in PATHS:
        for q in MODES:
            assert table.kl[path][q] == pytest.approx(by_hand(path, q), rel=1e-3, abs=1e-7)
    assert progress.tasks == [("sensitivity", 8, list(range(1, 9)))]
    np.testing.assert_array_equal(np.array(model(mx.array([[1, 2, 3]]))), before)


def test_one_quantization_of_each_module_and_the_others_from_it() -> None:
    model = make_model(width=32)
    plan = SensitivityPlan(rows=8, passes=4, every=False, products=0)
    table = measure_sensitivity(model, ANSWERS, OPTIONS, plan, dtypes=dict.fromkeys(PATHS, mx.float32))
    assert not table.every
    for path in PATHS:
        exact = [by_hand(path, q) for q in MODES]
        assert table.kl[path][MODES[0]] == pytest.approx(exact[0], rel=1e-3)
        assert exact[1] / 3 < table.kl[path][MODES[1]] < exact[1] * 3


def test_the_work_is_bounded() -> None:
    model = TinyModel(32)
    small = plan_sensitivity(model, ANSWERS, OPTIONS)
    assert (small.rows, small.passes, small.every) == (8, 8, True)
    parameters = 2 * 23 * 32 + 2 * 64 * 32 + 32
    assert small.products == 8 * sum(len(a.tokens) for a in ANSWERS) * parameters
    one = plan_sensitivity(model, ANSWERS, OPTIONS, most_for_all=small.products - 1)
    assert (one.rows, one.passes, one.every) == (8, 4, False)
    few = plan_sensitivity(model, ANSWERS, OPTIONS, most_for_all=0, most=one.products - 1)
    assert few.rows == 7 and few.products < one.products
    assert plan_sensitivity(model, ANSWERS, OPTIONS, most_for_all=0, most=0).rows == 4
