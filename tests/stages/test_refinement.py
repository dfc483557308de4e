"""The quantize stage with rows: which weights are kept, that they are what is written, and continuing."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from helpers import killed_run
from helpers.small_chain import RecordedProgress, finished, make_context
from helpers.small_model import write_small_model

from mlx_distill.distill.quantization_error import QuantizationError, quantization_error
from mlx_distill.errors import ConfigError
from mlx_distill.graph import graph
from mlx_distill.models.convert import convert
from mlx_distill.models.load import load_model
from mlx_distill.models.quantize import quantize_into
from mlx_distill.models.quantized_modules import quantized_layer, replaced_layers
from mlx_distill.models.refined import Refined
from mlx_distill.pipeline import run
from mlx_distill.progress import NullProgress
from mlx_distill.recipe import load_recipe
from mlx_distill.runtime import StopFlag
from mlx_distill.stages import refined_candidates
from mlx_distill.stages.context import Context
from mlx_distill.stages.quantize import quantize
from mlx_distill.stages.refined_candidates import best_candidate, passes, read_refined
from mlx_distill.stages.refinement import _open_bench, refine_student
from mlx_distill.storage import check_folder, read_manifest, scratch, sha256, write_json

GOOD, BAD_ANSWERS, WORSE = (0.01, 0.001, 0), (0.01, 0.0041, 0), (0.03, 0.001, 0)
DIVERGING = (
    "quantize.mode=mxfp4",
    "quantize.refine=distill",
    "quantize.refine_steps=3",
    "quantize.refine_learning_rate=3e38",
)
BEFORE, FLIPPED = (0.02, 0.002, 1), (0.01, 0.001, 2)


def error(figures: tuple[float, float, int]) -> QuantizationError:
    return QuantizationError(*figures, tokens=100, answer_tokens=10, rows=4, labelled=4)


@pytest.mark.parametrize(
    ("after", "passed"),
    [(GOOD, True), (BAD_ANSWERS, False), (WORSE, False), (FLIPPED, False), (BEFORE, False)],
)
def test_the_gate(after: tuple[float, float, int], passed: bool) -> None:
    assert passes(error(BEFORE), error(after)) is passed


def tiny_context(run: Path, *overrides: str) -> Context:
    recipe = load_recipe("tiny", overrides)
    return Context(recipe, recipe.load_task(), run, RecordedProgress(), StopFlag())


@dataclass
class StandIn:
    """Of the student and the rows: each candidate has a given error."""

    context: Any
    errors: Mapping[str, tuple[float, float, int]]
    calibration: tuple[int, ...] = (1, 2)

    def error(self, quantizations: Any, refined: Any = None) -> QuantizationError:
        return error(self.errors[refined["m"].name if refined else "rounding"])


@dataclass(frozen=True)
class Named:
    name: str


@pytest.mark.parametrize(
    ("asked", "distill", "calibrate", "weighted", "kept"),
    [
        ("distill", GOOD, GOOD, None, "distill"),
        ("distill", BAD_ANSWERS, GOOD, None, "calibrate"),
        ("distill", FLIPPED, WORSE, GOOD, "weighted scales"),
        ("distill", "diverged", GOOD, None, "calibrate"),
        ("distill", "diverged", WORSE, WORSE, "rounding"),
        ("calibrate", None, GOOD, None, "calibrate"),
        ("calibrate", None, WORSE, GOOD, "weighted scales"),
        ("calibrate", None, WORSE, FLIPPED, "rounding"),
        ("none", None, None, None, "rounding"),
    ],
)
def test_the_first_of_the_candidates_that_passes_is_kept(
    asked: str, distill: Any, calibrate: Any, weighted: Any, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = {"rounding": BEFORE, "distill": distill, "calibrate": calibrate, "weighted scales": weighted}
    monkeypatch.setattr(
        refined_candidates,
        "_candidate",
        lambda bench, name, *_: refined_candidates.Candidate(
            name,
            {"m": Named(name)},  # type: ignore[dict-item]
            error(errors[name]) if isinstance(errors[name], tuple) else None,
            1.0,
            errors[name] if isinstance(errors[name], str) else None,
        ),
    )
    bench: Any = StandIn(tiny_context(Path(), f"quantize.refine={asked}"), errors)
    refined, facts = best_candidate(bench, Path(), {})
    assert facts["kept"] == kept
    assert (refined["m"].name if refined else "rounding") == kept  # type: ignore[union-attr]
    tried = {one["name"]: one for one in facts["candidates"]}
    assert set(tried) == {name for name, figures in errors.items() if figures is not None}
    assert tried["rounding"]["kl"] == BEFORE[0]
    assert tried.get("distill", {}).get("failed") == (distill if isinstance(distill, str) else None)
    notes = bench.context.progress.notes
    assert len(notes) == len(tried) and sum(note.endswith(", kept") for note in notes) == 1


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose student is a model of one narrow layer."""
    folder = tmp_path_factory.mktemp("small")
    size = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32}
    write_small_model(folder / "model", **size)
    convert(folder / "model", folder / "run" / "student", progress=NullProgress())
    shutil.copytree(finished() / "out" / "data", folder / "run" / "data")
    return folder / "run"


def written(context: Any, folder: Path) -> tuple[dict[str, Any], Any]:
    folder.mkdir()
    facts = quantize(context, folder)
    return facts, load_model(folder, dtype="float32")[0]


@pytest.mark.slow
def test_what_is_written_is_what_was_measured(tmp_path: Path) -> None:
    context = make_context()
    facts, model = written(context, tmp_path / "q")
    told = facts["refinement"]
    assert told["asked"] == "calibrate" and told["calibration_rows"] == 8
    assert told["bits_per_weight"] == pytest.approx(facts["bits_per_weight"], abs=1e-3)
    before, after = told["candidates"][0], next(c for c in told["candidates"] if c["name"] == told["kept"])
    bench = _open_bench(context, tmp_path / "q")
    assert bench is not None
    measured = quantization_error(bench.reference, model, bench.held_out, labels=bench.labels)
    assert measured.kl == pytest.approx(after["kl"], rel=1e-3)
    assert measured.answer_kl == pytest.approx(after["answer_kl"], rel=1e-2, abs=1e-6)
    assert after["kl"] <= before["kl"]
    names = [point["mode"] for point in told["curve"]]
    assert names == ["affine3", "affine4", "affine5"]
    assert told["curve"][1]["kl"] == pytest.approx(before["kl"], rel=1e-3)
    assert set(told["sensitivity"]["kl"]) and told["held_out"]["rows"] == len(bench.held_out)
    assert any("calibrate: about" in note for note in context.progress.notes)


@pytest.mark.slow
def test_a_distilled_student_is_written_as_it_was_measured(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refined_candidates, "passes", lambda before, after: True)
    context = make_context("quantize.refine=distill", "quantize.refine_steps=3", run=small)
    folder = tmp_path / "q"
    folder.mkdir()
    made = refine_student(context, folder)
    bench = _open_bench(context, folder)
    assert bench is not None and made.refined is not None and made.quantizations is not None
    told = made.facts["refinement"]
    assert told["kept"] == "distill"
    notes = context.progress.notes
    assert any(note.startswith("quantize: distill: about") for note in notes)
    assert any("weights train" in note for note in notes)
    names = ["rounding", "weighted scales", "calibrate", "distill"]
    assert [one["name"] for one in told["candidates"]] == names
    calibrated, distilled = told["candidates"][2:]
    assert distilled["kl"] != calibrated["kl"]
    # Offsets begin at the unquantized weights, on scales for these and not for corrected ones.
    for path, one in made.refined.items():
        weighted = read_refined(scratch(folder) / "weighted-scales", path)
        assert weighted and mx.array_equal(one.parts["scales"], weighted.parts["scales"]), path
    modules = dict(bench.model.named_modules())
    layers = {
        path: quantized_layer(modules[path], q, made.refined[path].parts)
        for path, q in made.quantizations.items()
    }
    row = mx.array([bench.held_out[0].tokens])
    with replaced_layers(bench.model, layers):
        expected = bench.model(row)
        mx.eval(expected)
    quantize(context, folder)  # goes on from what is in the scratch folder
    model = load_model(folder, dtype="float32")[0]
    assert mx.allclose(model(row), expected, atol=1e-4).item()
    measured = quantization_error(bench.reference, model, bench.held_out, labels=bench.labels)
    assert measured.kl == pytest.approx(distilled["kl"], rel=1e-3)


@pytest.mark.slow
def test_a_training_that_diverges_is_a_candidate_that_is_not_kept(tmp_path: Path, small: Path) -> None:
    context = make_context(*DIVERGING, run=small)
    facts, model = written(context, tmp_path / "q")
    told = facts["refinement"]
    tried = {one["name"]: one for one in told["candidates"]}
    assert told["kept"] in tried and told["kept"] != "distill"
    assert not tried["distill"]["passed"] and "not a number" in tried["distill"]["failed"]
    assert any(
        note.startswith("quantize: distill: not used: its training diverged")
        for note in context.progress.notes
    )
    # What was measured afterwards was measured on the student as it was before.
    bench = _open_bench(context, tmp_path / "q")
    assert bench is not None
    measured = quantization_error(bench.reference, model, bench.held_out, labels=bench.labels)
    assert measured.kl == pytest.approx(tried[told["kept"]]["kl"], rel=1e-3)
    # An interrupted stage does not train it again.
    again = refine_student(make_context(*DIVERGING, run=small), tmp_path / "q")
    assert again.facts["refinement"]["candidates"] == told["candidates"]


@pytest.mark.slow
def test_none_writes_what_rounding_without_rows_writes(tmp_path: Path, small: Path) -> None:
    context = make_context("quantize.refine=none", run=small)
    (tmp_path / "q").mkdir()
    facts = quantize(context, tmp_path / "q")
    assert "refinement" not in facts
    quantize_into(context.run / "student", tmp_path / "plain", "affine4")
    files = [path.name for path in (tmp_path / "plain").glob("model*.safetensors")]
    assert files and all(sha256(tmp_path / "q" / n) == sha256(tmp_path / "plain" / n) for n in files)


@pytest.mark.slow
def test_a_budget_of_bits_gives_modules_different_modes(tmp_path: Path, small: Path) -> None:
    settings = "quantize.refine=none", "quantize.bits_per_weight=4.7"
    facts, model = written(make_context(*settings, run=small), tmp_path / "q")
    told = facts["refinement"]
    assert told["kept"] == "rounding" and facts["bits_per_weight"] <= 4.7
    assert facts["bits_per_weight"] == pytest.approx(told["chosen_bits_per_weight"], abs=1e-4)
    modules = dict(model.named_modules())
    assert len({modules[path].bits for path in told["chosen"]}) > 1
    for path, mode in told["chosen"].items():
        assert f"affine{modules[path].bits}" == mode
    assert len(told["curve"]) == 5


@pytest.mark.slow
def test_a_stage_that_is_killed_while_it_calibrates_leaves_the_old_folder_and_goes_on(
    run_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9: the model that was there stays, and the same command ends with the bits of one that ran
    through, without calibrating again what was finished.
    """
    recipe, old = finished() / "recipe.yaml", run_copy / "quantized" / "manifest.json"
    manifest = json.loads(old.read_text(encoding="utf-8"))
    old.write_text(json.dumps({**manifest, "key": "0" * 64}), encoding="utf-8")  # of an earlier student
    before = read_manifest(run_copy / "quantized")
    third = r"scratch/calibrate/model\.layers\.2\.self_attn\.k_proj\.safetensors$"
    command = [sys.executable, killed_run.__file__, str(recipe), str(run_copy), third, "quantize"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert before is not None and read_manifest(run_copy / "quantized") == before
    assert check_folder(run_copy / "quantized", before, verify=True) is None
    kept = {path.stem for path in (run_copy / ".quantized.partial/scratch/calibrate").glob("[!.]*")}
    assert len(kept) > 4

    again: list[str] = []
    save = refined_candidates.save_refined

    def counted(folder: Path, path: str, refined: Refined, *, latent: bool) -> None:
        if folder.name == "calibrate":
            again.append(path)
        save(folder, path, refined, latent=latent)

    monkeypatch.setattr(refined_candidates, "save_refined", counted)
    run(recipe, run_copy, only="quantize", progress=NullProgress())
    assert again and not set(again) & kept
    made, undisturbed = read_manifest(run_copy / "quantized"), read_manifest(finished() / "out/quantized")
    assert made is not None and undisturbed is not None and made.content == undisturbed.content


def test_an_adapter_beside_the_base_is_rounded_without_rows_and_says_so(tmp_path: Path) -> None:
    context = tiny_context(tmp_path, "quantize.adapter=keep")
    for name in ("adapter_config.json", "adapters.safetensors"):
        write_json(tmp_path / "student" / name, {})
    assert refine_student(context, tmp_path).refined is None
    assert isinstance(context.progress, RecordedProgress)
    assert "adapter is kept" in context.progress.notes[0]


@pytest.mark.parametrize("override", ["quantize.refine=distill", "quantize.bits_per_weight=4.5"])
def test_what_needs_the_merged_student_is_refused_with_an_adapter_beside_the_base(override: str) -> None:
    recipe = load_recipe("tiny", ["quantize.adapter=keep", override])
    with pytest.raises(ConfigError, match="merged student"):
        graph(recipe, recipe.load_task())
