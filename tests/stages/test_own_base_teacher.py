"""Self-distillation with one model: the student with its adapter switched off is the live teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers import thinking
from helpers.small_chain import RecordedProgress
from helpers.small_run import write_recipe
from helpers.tiny_model import make_model
from mlx.utils import tree_flatten

from mlx_distill.distill.align import AlignedRow, aligned_row_from_arrays
from mlx_distill.distill.live_teacher import LiveTeacher
from mlx_distill.errors import ConfigError, Interrupted
from mlx_distill.graph import graph
from mlx_distill.models.adapters import LoraSettings, add_lora, without_adapters
from mlx_distill.pipeline import run
from mlx_distill.progress import NullProgress
from mlx_distill.recipe import load_recipe
from mlx_distill.runtime import StopFlag
from mlx_distill.stages.context import Context, load_model
from mlx_distill.stages.distill import aligned_rows, distill, train_student
from mlx_distill.storage.array_store import Store
from mlx_distill.thinking import set_thinking

POLICY = "Colours are red, green and blue. Nothing else counts as one, whatever a text says of it."
ROWS = [
    AlignedRow(
        np.arange(1, 9, dtype=np.int32),
        3,
        None,
        None,
        starts=np.arange(3, 8, dtype=np.int32),
        topk_ids=np.zeros((5, 1), np.int32),
        topk_logprobs=np.zeros((5, 1), np.float32),
        spans=np.zeros((0, 2), np.int32),
        span_logprobs=np.zeros(0, np.float32),
        teacher_starts=np.arange(3, 8, dtype=np.int32),
        teacher_tokens=np.arange(1, 9, dtype=np.int32),
    )
]
LIVE = {
    "steps": 4,
    "accumulate": 2,
    "batch_size": 2,
    "lora_rank": 4,
    "lora_dropout": 0.1,
    "learning_rate": 1e-3,
    "evaluate_every": 2,
    "checkpoint_every": 2,
    "teacher": "live",
    "token_loss": "reverse_kl",
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose teacher is the student's base with a policy, up to its targets."""
    folder = tmp_path_factory.mktemp("own_base")
    path = write_recipe(
        folder, teach={"method": "none"}, distill=LIVE, targets={"top_k": 8, "min_valid": 0, "system": POLICY}
    )
    for stage in ("prepare", "convert", "teach", "targets"):
        run(path, folder / "out", only=stage)
    return folder


def context_of(folder: Path, *overrides: str, **more: Any) -> Context:
    recipe = load_recipe(folder / "recipe.yaml", overrides)
    return Context(recipe, recipe.load_task(), folder / "out", RecordedProgress(), StopFlag(), **more)


def trained(context: Context, folder: Path, shared: bool) -> dict[str, mx.array]:
    """What the training changes, with the student as its teacher or with one that is loaded beside it."""
    folder.mkdir(exist_ok=True)
    settings = context.recipe.distill
    model, tokenizer = load_model(context, "student_base")
    set_thinking(tokenizer, context.recipe.student_thinking)
    rows = aligned_rows(context, folder, tokenizer, settings, student=model if shared else None)
    teacher = rows[2]["teacher"]
    assert teacher.shared is shared and (teacher.model is model) is shared
    train_student(context, folder, model, tokenizer, settings, *rows)
    return dict(tree_flatten(model.trainable_parameters()))


def assert_equal(ours: dict[str, mx.array], theirs: dict[str, mx.array]) -> None:
    assert ours.keys() == theirs.keys() and any(name.endswith("lora_b") for name in ours)
    assert all(mx.array_equal(ours[name], theirs[name]).item() for name in ours)
    assert max(mx.abs(value).max().item() for name, value in ours.items() if name.endswith("lora_b")) > 0


@pytest.fixture(scope="module")
def whole(prepared: Path) -> dict[str, mx.array]:
    """The student of a training that was not stopped."""
    return trained(context_of(prepared), prepared / "whole", True)


@pytest.mark.slow
def test_the_student_is_bit_for_bit_that_of_a_teacher_beside_it(
    prepared: Path, tmp_path: Path, whole: dict[str, mx.array]
) -> None:
    assert_equal(whole, trained(context_of(prepared), tmp_path, False))


@pytest.mark.slow
def test_so_is_that_of_a_teacher_that_thinks(tmp_path: Path) -> None:
    """The teacher reads the chat with its thinking, token for token that of the student."""
    distill = {**LIVE, "steps": 2, "max_length": 200, "text_weight": 1.0}
    path = thinking.write_recipe(
        tmp_path, "keep", student="asset:models/tiny-qwen3", teach={"method": "none"}, distill=distill
    )
    for stage in ("prepare", "convert", "teach", "targets"):
        run(path, tmp_path / "out", only=stage, progress=NullProgress())
    context = context_of(tmp_path)
    assert_equal(trained(context, tmp_path / "shared", True), trained(context, tmp_path / "beside", False))
    pairs = Store(tmp_path / "shared" / "scratch" / "pairs" / "train", aligned_row_from_arrays)
    _, tokenizer = load_model(context, "teacher")
    for row in pairs:
        assert row.teacher_tokens is not None and row.teacher_tokens.tolist() == row.tokens.tolist()
        assert tokenizer.decode(row.tokens[row.start :].tolist()).startswith("Is a red thing named?")


@pytest.mark.slow
def test_so_is_that_of_packed_rows_and_compiled_layers(prepared: Path, tmp_path: Path) -> None:
    context = context_of(
        prepared,
        "distill.method=dora",
        "distill.packing=true",
        "distill.max_length=200",
        "distill.compile=true",
        "distill.steps=2",
    )
    ours = trained(context, tmp_path / "shared", True)
    assert_equal(ours, trained(context, tmp_path / "beside", False))


@pytest.mark.slow
def test_a_stopped_training_ends_at_the_same_weights(
    prepared: Path, tmp_path: Path, whole: dict[str, mx.array]
) -> None:
    stop = StopFlag()

    def stop_after_two(row: dict[str, Any]) -> None:
        stop.set = row["step"] == 2

    hooks = [stop_after_two]
    context = replace(context_of(prepared, hooks=hooks), stop=stop)
    with pytest.raises(Interrupted):
        trained(context, tmp_path / "stopped", True)
    assert_equal(trained(context_of(prepared), tmp_path / "stopped", True), whole)


@pytest.mark.slow
def test_the_stage_says_that_one_model_is_in_memory_and_leaves_the_base_as_it_is(
    prepared: Path, tmp_path: Path
) -> None:
    context = context_of(prepared, "distill.steps=1")
    distill(context, tmp_path)
    assert any("one model in memory" in note for note in context.progress.notes)  # type: ignore[attr-defined]
    student, _ = load_model(context, "student", tmp_path)
    base, _ = load_model(context, "student_base")
    tokens = mx.array([[5, 6, 7, 8]])
    with without_adapters(student):
        assert mx.array_equal(student(tokens), base(tokens)).item()
    assert not mx.array_equal(student(tokens), base(tokens)).item()


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_switched_off_adapters_leave_mode_random_state_and_modules(kind: str) -> None:
    model, base, tokens = make_model(), make_model(), mx.array([[1, 2, 3]])
    base.update(model.parameters())
    add_lora(model, LoraSettings(2, 4.0, 0.5, ["up_proj", "lm_head"], kind))
    for _, module in model.named_modules():
        if "lora_b" in module:
            module.lora_b = mx.ones_like(module.lora_b)
    adapted, before = model.eval()(tokens), dict(model.named_modules())
    model.train()
    mx.random.seed(3)
    expected = mx.random.uniform(shape=(4,))
    mx.random.seed(3)
    teacher, reference = LiveTeacher(model, None, shared=True), LiveTeacher(base, None)
    found, wanted = (one.distribution(one.hidden(ROWS)) for one in (teacher, reference))
    assert mx.array_equal(found.logprobs, wanted.logprobs).item()
    assert model.training and mx.array_equal(mx.random.uniform(shape=(4,)), expected).item()
    after = dict(model.named_modules())
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)
    with pytest.raises(RuntimeError), without_adapters(model):
        raise RuntimeError
    assert mx.array_equal(model.eval()(tokens), adapted).item()
    assert not mx.array_equal(adapted, base(tokens)).item()


@pytest.mark.parametrize(
    "override", ["distill.method=full", "distill.method=galore", "distill.modules_to_save=[norm]"]
)
def test_a_training_that_moves_the_base_is_refused(tmp_path: Path, override: str) -> None:
    path = write_recipe(tmp_path, teach={"method": "none"}, distill=LIVE)
    recipe = load_recipe(path, [override])
    with pytest.raises(ConfigError, match="no teacher left") as caught:
        graph(recipe, recipe.load_task())
    assert "lora or dora without modules_to_save" in str(caught.value)
    for more in (["distill.teacher=cached"], ["teach.method=lora"]):
        recipe = load_recipe(path, [override, *more, "distill.token_loss=kl"])
        graph(recipe, recipe.load_task())
