"""Downloads, disk and memory of a run, stated before anything is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from helpers.small_chain import finished
from helpers.small_run import write_recipe
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3

from mlx_distill import pipeline
from mlx_distill.config import ASSETS
from mlx_distill.doctor import diagnose
from mlx_distill.graph import graph
from mlx_distill.models.forward import head_columns
from mlx_distill.progress import NullProgress
from mlx_distill.recipe import Recipe, load_recipe
from mlx_distill.resources import Resources, stage_resources, total, total_disk
from mlx_distill.runtime import StopFlag
from mlx_distill.stages.audit import audit
from mlx_distill.stages.context import Context
from mlx_distill.stages.prepare import prepare
from mlx_distill.stages.targets import targets
from mlx_distill.status import Plan
from mlx_distill.text import size

FLAGSHIP = "qwen3-8b-to-gpt-oss-20b"
FILES = {
    "config.json": 700,
    "model-00001-of-00002.safetensors": 9_000_000_000,
    "model-00002-of-00002.safetensors": 7_000_000_000,
    "original/model.safetensors": 5,  # never downloaded
    "pytorch_model.bin": 5,
}


def needs_of(recipe: Recipe, out: Path) -> dict[str, Resources]:
    return stage_resources(recipe, graph(recipe, recipe.load_task()), out)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub that has the same files under every name."""
    import huggingface_hub

    def model_info(self: Any, repo: str, **options: Any) -> Any:
        assert options["files_metadata"] and options["timeout"] > 0
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=n, size=b) for n, b in FILES.items()])

    def nothing_cached(repo: str, **options: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError(repo)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", nothing_cached)


def test_models_of_the_hub_state_their_download(hub: None, tmp_path: Path) -> None:
    needs = needs_of(load_recipe(FLAGSHIP), tmp_path)
    weights = 16_000_000_700  # what a conversion downloads
    assert needs["teacher_base"] == Resources(weights, weights, model="Qwen/Qwen3-8B")
    assert needs["teacher"].grad_checkpoint is True
    assert "download of Qwen/Qwen3-8B: 16.0 GB" in needs["teacher_base"].text
    assert total(needs).startswith("in all: download 32.0 GB, disk at most 66.0 GB")


def test_a_hub_that_does_not_answer_is_said(
    hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def offline(self: Any, repo: str, **options: Any) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", offline)
    needs = needs_of(load_recipe(FLAGSHIP), tmp_path)
    assert needs["teacher_base"].download is None and "size unknown" in needs["teacher_base"].text
    assert total(needs).startswith("in all: download of unknown size, disk not known yet for teacher_base")


@pytest.mark.slow
def test_the_disk_that_is_stated_is_enough(tmp_path: Path) -> None:
    """Each stage of a finished run is at most as large as stated, and the statement is no wild guess."""
    recipe = load_recipe(finished() / "recipe.yaml")
    needs = needs_of(recipe, tmp_path)
    assert total_disk(needs) > 0
    for name, need in needs.items():
        files = list((finished() / "out" / name).rglob("*.safetensors"))
        written = sum(path.stat().st_size for path in files)
        assert need.disk is not None and written <= need.disk * 1.01, name
        assert need.disk <= 12 * written, name


def test_the_plan_of_a_run_states_them_for_stages_to_make(tmp_path: Path) -> None:
    plan = pipeline.run("tiny", tmp_path / "run", dry_run=True)
    assert isinstance(plan, Plan)
    lines = "\n".join(plan.lines)
    stored = (ASSETS / "models" / "tiny-qwen3").glob("*.safetensors")
    assert plan.stages[1]["resources"]["disk"] == sum(path.stat().st_size for path in stored)
    assert "needs  disk: at most" in lines and "grad_checkpoint: false" in lines
    assert plan.lines[-1].startswith("in all: download 0 bytes, disk at most ")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_finished_stages_need_nothing() -> None:
    plan = pipeline.run(finished() / "recipe.yaml", finished() / "out", dry_run=True)
    assert isinstance(plan, Plan) and plan.total is None
    assert not any("needs" in row for row in plan.stages)


def test_a_live_teacher_states_the_memory_of_both_models(hub: None, tmp_path: Path) -> None:
    from mlx_distill.models.load import load

    live = load_recipe("tiny", {"distill.teacher": "live", "compute_dtype": "float32", "dequantize": False})
    expected = 0
    for name in ("tiny-qwen3", "tiny-gpt-oss"):
        model, _ = load(ASSETS / "models" / name, dtype="float32")
        expected += sum(array.nbytes for _, array in tree_flatten(model.parameters()))
        expected += 64 * head_columns(model) * 4
    needs = needs_of(live, tmp_path)
    assert needs["student"].memory == expected
    assert "memory: at least" in needs["student"].text and needs["teacher"].memory is None
    assert needs_of(load_recipe("tiny"), tmp_path)["student"].memory is None
    own = {"distill.teacher": "live", "teach.method": "none", "student": "asset:models/tiny-qwen3"}
    beside = needs_of(load_recipe("tiny", {**own, "teach.method": "lora"}), tmp_path)["student"].memory
    shared = needs_of(load_recipe("tiny", own), tmp_path)["student"].memory
    assert shared is not None and beside == 2 * shared  # its own base, the adapter switched off
    flagship = needs_of(load_recipe(FLAGSHIP, {"distill.teacher": "live"}), tmp_path)
    assert flagship["student"].memory == 2 * 16_000_000_700


def test_doctor_refuses_a_live_teacher_that_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recipe(tmp_path, distill={"teacher": "live"}, student="asset:models/tiny-gpt-oss")
    checks = {c.name: c for c in diagnose(tmp_path, tmp_path / "recipe.yaml").checks}
    assert checks["student"].state == "ok" and "student and live teacher" in checks["student"].detail
    monkeypatch.setattr("mlx_distill.doctor.total_memory", lambda: 1000)
    student = {c.name: c for c in diagnose(tmp_path, tmp_path / "recipe.yaml").checks}["student"]
    assert student.state == "bad" and "distill.teacher: cached" in (student.fix or "")


def test_doctor_holds_a_recipe_against_the_free_disk(
    hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000_000_000))
    checks = {check.name: check for check in diagnose(tmp_path, FLAGSHIP).checks}
    assert checks[FLAGSHIP].state == "ok" and "100.0 GB free" in checks[FLAGSHIP].detail
    assert checks["teacher"].detail == "grad_checkpoint: true"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=70_000_000_000))
    diagnosis = diagnose(tmp_path, FLAGSHIP)
    assert not diagnosis.healthy and diagnosis.checks[-1].state == "bad" and diagnosis.checks[-1].fix


def write_wide_model(folder: Path) -> Path:
    """A model whose weights take more memory than the activations of a few short rows."""
    shutil.copytree(ASSETS / "models" / "tiny-qwen3", folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model = qwen3.Model(qwen3.ModelArgs.from_dict(config))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "models", "loaded"),
    [("none", "student", "student and the teacher's output head"), ("lora", "teacher", "teacher")],
)
def test_the_memory_of_an_audit_is_what_it_takes(
    tmp_path: Path, method: str, models: str, loaded: str
) -> None:
    """One model is teacher and student, before and after; with the targets of four rows."""
    wide = write_wide_model(tmp_path / "wide")
    (tmp_path / "general.txt").write_text("\n\n".join(["A ferry leaves."] * 10), encoding="utf-8")
    settings = {"audit_rows": 2, "batch_size": 1, "models": [models], "general_text": "general.txt"}
    blocks = {"teach": {"method": method}, "targets": {"max_rows": 4}, "evaluate": settings}
    recipe, run = load_recipe(write_recipe(tmp_path, str(wide), **blocks)), tmp_path / "run"
    need = needs_of(recipe, run)["audit"]
    assert need.memory is not None and need.loaded == loaded
    assert need.text.endswith(f"memory: at least {size(need.memory)}, {loaded}")
    context = Context(recipe, recipe.load_task(), run, NullProgress(), StopFlag())
    for name in ("data", "targets", "audit"):
        (run / name).mkdir(parents=True)
    for name in ("teacher_base", "teacher", "student_base", "student"):
        (run / name).symlink_to(wide)
    prepare(context, run / "data")
    if models == "student":
        targets(context, run / "targets")
    peak = audit(context, run / "audit")["peak_memory_bytes"]
    assert need.memory <= peak <= 1.4 * need.memory
