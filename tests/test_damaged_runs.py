"""A full disk in any stage, and damaged folders: an error of one line, a fix that works, and nothing
half-written.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from helpers.small_chain import STAGES, finished, whole_stages
from helpers.small_disk import small_disk

from mlx_distill import pipeline
from mlx_distill.cli import cli
from mlx_distill.cli.main import COMMANDS
from mlx_distill.errors import DistillError
from mlx_distill.storage import read_jsonl, read_manifest, write_jsonl

pytestmark = pytest.mark.slow

_SHORT = ("distill.steps=2", "distill.evaluate_every=0")


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a finished run that may be damaged; its folder is the working directory."""
    shutil.copytree(finished(), tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def command(runner: Any, copied: Path) -> Callable[..., Any]:
    """``command("distill", "distill.steps=2")`` runs a command of that run with settings."""

    def invoke(name: str, *settings: str, more: tuple[str, ...] = ()) -> Any:
        assert name in COMMANDS
        options = [part for text in settings for part in ("--set", text)]
        return runner.invoke(cli, [name, "recipe.yaml", "--out", "out", *options, *more])

    return invoke


def refusal(result: Any) -> tuple[str, str]:
    """The lines of the error and of its fix, for a command that failed as it should."""
    lines = result.stderr.splitlines()[-2:]
    assert result.exit_code == 1 and result.stdout == "", result.output
    assert [line.partition(": ")[0] for line in lines] == ["error", "fix"], result.stderr
    assert "unexpected" not in lines[0] and "Traceback" not in result.stderr
    return lines[0], lines[1]


# --- the disk -----------------------------------------------------------------------------------------------


# The stage, the limit in bytes, and the file that reaches it: one case for each code that writes files.
_FULL = [
    ("prepare", 4_000, "rows.jsonl: file too large"),
    ("prepare", 4_001, "signatures.bin: file too large"),
    ("teach", 1_000, "scratch/rows/train: file too large"),
    ("distill", 20_000, "scratch/pairs/train: file too large"),
    ("teach", 300, "metrics.jsonl: file too large"),
    ("teach", 9_000, "trainable.safetensors: cannot be written"),
    ("targets", 4_000, "tokens-00000.safetensors: cannot be written"),
    ("distill", 60_000, "optimizer.safetensors: cannot be written"),
    ("quantize", 100_000, "model-00001-of-00001.safetensors: file too large"),
    ("quantize", 100_001, "scratch/reference: file too large"),
    ("evaluate", 1_000, "predictions-00000000.jsonl: file too large"),
    ("evaluate", 6_000, "out/report.json: file too large"),
]


def refused_in_training(stage: str, limit: int, settings: tuple[str, ...]) -> str:
    """The error of a stage whose disk is full from the first training step on: its rows are on it."""
    with ExitStack() as stack, pytest.raises(DistillError) as caught:

        def fill(event: dict[str, Any]) -> None:
            if (event["event"], event.get("unit")) == ("task_started", "step"):
                stack.enter_context(small_disk(limit))

        pipeline.run("recipe.yaml", "out", overrides=settings, only=stage, from_stage=stage, events=fill)
    assert caught.value.fix
    return caught.value.message


@pytest.mark.parametrize(
    ("stage", "limit", "words"), _FULL, ids=[f"{stage}-{limit}" for stage, limit, _ in _FULL]
)
def test_a_full_disk_in_the_middle_of_a_stage(
    copied: Path,
    command: Callable[..., Any],
    stage: str,
    limit: int,
    words: str,
) -> None:
    settings = (
        "teach.steps=2",
        "teach.evaluate_every=0",
        *_SHORT,
        "targets.max_rows=20",
        "targets.text=data",
        "evaluate.max_rows=6",
    )
    settings += ("data.near_duplicates=0",) if words.startswith("rows.jsonl") else ()
    settings += ("quantize.refine=none",) if words.startswith("model-") else ()
    if stage in ("teach", "distill") and "scratch/" not in words:
        error = refused_in_training(stage, limit, settings)
    else:
        with small_disk(limit):
            error, _ = refusal(command(stage, *settings, more=("--from", stage)))
    assert "out/" in error and words in error
    assert whole_stages(copied / "out") == sorted(STAGES)  # the old folder is still whole
    assert not [p for p in (copied / "out").rglob("*") if ".tmp" in p.name]
    again = command(stage, *settings, more=("--from", stage))
    assert again.exit_code == 0, again.output
    assert whole_stages(copied / "out") == sorted(STAGES)


def test_a_full_disk_during_a_conversion(copied: Path, command: Callable[..., Any]) -> None:
    shutil.rmtree(copied / "out" / "student_base")
    with small_disk(100_000):
        error, _ = refusal(command("distill", *_SHORT))
    assert "out/.student_base.partial" in error and "file too large" in error
    assert "student_base" not in whole_stages(copied / "out")
    again = command("distill", *_SHORT)
    assert again.exit_code == 0, again.output


# --- parents ------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


@pytest.mark.parametrize(
    ("stage", "damage", "words"),
    [
        ("prepare", lambda out: truncate(out / "data/train.jsonl"), "out/data/train.jsonl has"),
        ("prepare", lambda out: (out / "data/valid.jsonl").unlink(), "out/data/valid.jsonl is missing"),
        (
            "targets",
            lambda out: truncate(out / "targets/tokens-00000.safetensors"),
            "out/targets/tokens-00000.safetensors has",
        ),
        (
            "targets",
            lambda out: (out / "targets/rows-00001.jsonl").unlink(),
            "out/targets/rows-00001.jsonl is missing",
        ),
        ("targets", lambda out: edit(out / "targets/index.json", rows=3), "out/targets/index.json has"),
    ],
)
def test_one_stage_alone_does_not_read_a_damaged_parent(
    copied: Path, command: Callable[..., Any], stage: str, damage: Callable[[Path], Any], words: str
) -> None:
    before = read_manifest(copied / "out" / "student")
    damage(copied / "out")
    error, fix = refusal(command("distill", *_SHORT))
    assert words in error
    again = f"mlx-distill {stage} recipe.yaml --out out --set {_SHORT[0]} --set {_SHORT[1]}"
    assert fix == f"fix: make it again: {again}"
    assert read_manifest(copied / "out" / "student") == before
    if stage == "prepare":  # the cheaper one is tried
        assert command(stage, *_SHORT).exit_code == 0
        assert command("distill", *_SHORT).exit_code == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda base: truncate(next(base.glob("*.safetensors"))),
        lambda base: next(base.glob("*.safetensors")).unlink(),
        lambda base: edit(base / "config.json", model_type="mystery"),
        lambda base: truncate(base / "tokenizer.json"),
    ],
    ids=["truncated", "missing shard", "wrong model_type", "tokenizer"],
)
def test_a_damaged_base_is_converted_again(
    copied: Path, command: Callable[..., Any], damage: Callable[[Path], Any]
) -> None:
    damage(copied / "out" / "student_base")
    result = command("quantize", "quantize.mode=affine8")
    assert result.exit_code == 0, result.output
    assert whole_stages(copied / "out") == sorted(STAGES)


def test_targets_of_rows_that_no_longer_exist_are_named(copied: Path, command: Callable[..., Any]) -> None:
    rows = [row for _, row in read_jsonl(copied / "rows.jsonl")]
    write_jsonl(copied / "rows.jsonl", [{**row, "id": f"new-{row['id']}"} for row in rows])
    assert command("prepare").exit_code == 0
    result = command("distill", *_SHORT)
    error, fix = refusal(result)
    assert "out/targets: targets of another rows" in error
    assert "mlx-distill targets" in fix
    assert "targets: read as it is; data has changed (mlx-distill targets " in result.stderr


# --- damage that sizes and times do not reveal --------------------------------------------------------------


def damage_silently(path: Path, content: bytes) -> None:
    """Overwrite the beginning of a file without changing its size and time, as a failing disk may."""
    stat = path.stat()
    raw = path.read_bytes()
    path.write_bytes(content + raw[len(content) :])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize(
    "file", ["targets/tokens-00000.safetensors", "targets/rows-00000.jsonl", "targets/index.json"]
)
def test_silent_damage_of_the_targets_is_found_when_they_are_read(
    copied: Path, command: Callable[..., Any], file: str
) -> None:
    damage_silently(copied / "out" / file, bytes(40))
    error, _ = refusal(command("distill", *_SHORT))
    assert f"out/{file}" in error


# --- models of the run --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "damage", "words"),
    [
        (
            ["export", "out/student", "x", "--to", "peft"],
            lambda out: truncate(out / "student/adapters.safetensors"),
            "the file is truncated",
        ),
        (
            ["export", "out/student", "x", "--to", "hf"],
            lambda out: truncate(out / "student/adapters.safetensors"),
            "the file is truncated",
        ),
        (
            ["export", "out/student", "x", "--to", "hf"],
            lambda out: shutil.rmtree(out / "student_base"),
            "out/student_base does not exist",
        ),
        (
            ["export", "out/student", "x", "--to", "hf"],
            lambda out: edit(out / "student/adapter_config.json", base="."),
            "is an adapter",
        ),
        (
            ["inspect", "out/quantized"],
            lambda out: truncate(next((out / "quantized").glob("*.safetensors"))),
            "the file is truncated",
        ),
        (
            ["inspect", "out/quantized"],
            lambda out: edit(out / "quantized/config.json", model_type=["qwen3"]),
            "unknown model_type",
        ),
        (
            ["analyze", "out/quantized", "rows.jsonl", "--task", "task.yaml", "--out", "x"],
            lambda out: (out.parent / "rows.jsonl").write_bytes(b"\n"),
            "rows.jsonl: no rows",
        ),
    ],
)
def test_a_damaged_model_of_a_run_is_named(
    runner: Any, copied: Path, arguments: list[str], damage: Callable[[Path], Any], words: str
) -> None:
    damage(copied / "out")
    error, _ = refusal(runner.invoke(cli, arguments))
    assert words in error
    assert not (copied / "x").exists()


# --- checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["trainable.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named_and_without_it_the_one_before_is_resumed(
    copied: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    settings = ("distill.steps=4", "distill.evaluate_every=0", "distill.checkpoint_every=1")
    with monkeypatch.context() as patch:
        patch.setattr("mlx_distill.models.adapters.save_adapter", _no_space)
        refusal(command("distill", *settings))
    checkpoints = copied / "out" / ".student.partial" / "scratch" / "checkpoints"
    newest = sorted(checkpoints.glob("step-*"))[-1]
    truncate(newest / file)
    error, _ = refusal(command("distill", *settings))
    assert f"{newest.relative_to(copied)}/{file}" in error
    shutil.rmtree(newest)
    result = command("distill", *settings)
    assert result.exit_code == 0, result.output
    manifest = read_manifest(copied / "out" / "student")
    assert manifest is not None and manifest.recorded["resumed"] == 3


def _no_space(*arguments: Any, **options: Any) -> None:
    raise OSError(28, "No space left on device", "adapters.safetensors")


# --- another recipe's folder --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run", "distill", "evaluate"])
def test_the_folder_of_another_recipe_is_not_replaced(
    copied: Path, command: Callable[..., Any], name: str
) -> None:
    settings = ("name=others", "data.seed=5", *_SHORT)
    error, fix = refusal(command(name, *settings))
    assert "made by the recipe 'colours', not by 'others'" in error
    assert "--out" in fix
    assert whole_stages(copied / "out") == sorted(STAGES)
    owners = {
        manifest.recorded["recipe"] for stage in STAGES if (manifest := read_manifest(copied / "out" / stage))
    }
    assert owners == {"colours"}


def test_stages_that_are_current_may_belong_to_a_recipe_of_another_name(command: Callable[..., Any]) -> None:
    result = command("run", "name=others")
    assert result.exit_code == 0, result.output
    assert result.stderr.count(": current") == len(STAGES)
