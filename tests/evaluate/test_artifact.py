"""The artifact that ships: each step from the trained model to the reloaded export gives its answers, a
planted defect is named by its step, and the result stands in the folder, its card, the run and the report.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner
from helpers.report_runs import RECIPE, make_run, make_task
from helpers.small_run import TASK, rows

import mlx_distill as md
from mlx_distill.cli.main import cli
from mlx_distill.config import ASSETS
from mlx_distill.errors import ConfigError, DataError, QualityGateError
from mlx_distill.evaluate.artifact import (
    NEAR_TIE,
    Step,
    check_artifact,
    compare_step,
    read_checks,
    require_same_answers,
)
from mlx_distill.models import convert as converting
from mlx_distill.models import merged as merging
from mlx_distill.models.adapters import LoraSettings, add_lora, save_adapter
from mlx_distill.models.checkpoint.tensor_job import LowRankUpdate
from mlx_distill.models.load import load_model
from mlx_distill.models.quantize import quantize_folder
from mlx_distill.models.trained_on import write_trained_on
from mlx_distill.progress import NullProgress
from mlx_distill.records import Prediction
from mlx_distill.report import build_report
from mlx_distill.report.summary import write_report
from mlx_distill.storage import check_folder, read_json, read_manifest, write_jsonl
from mlx_distill.tasks.task import Task, parse_task


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``run``: a packaged tiny model in float32, an adapter that turns its answers, both quantized, rows and
    a report; beside it the exports ``hf`` and ``peft`` of the adapter.
    """
    folder = tmp_path_factory.mktemp("chain")
    run, task = folder / "run", make_task()
    evaluations = make_run(folder / "other", task, models=("teacher",))
    md.convert(ASSETS / "models" / "tiny-qwen3", run / "student_base", dtype="float32")
    model, _ = load_model(run / "student_base")
    settings = LoraSettings(4, 8.0, 0.0, ("q_proj", "v_proj", "o_proj"))
    add_lora(model, settings)
    mx.random.seed(1)
    for _, module in model.named_modules():
        if "lora_b" in module:
            module["lora_b"] = 0.5 * mx.random.normal(module["lora_b"].shape)
    save_adapter(model, run / "student", settings, run / "student_base")
    write_trained_on(run / "student", parse_task(TASK, "task"), [])
    quantize_folder(run / "student", run / "quantized", "affine8")
    write_trained_on(run / "quantized", parse_task(TASK, "task"), [])
    write_jsonl(run / "data" / "test.jsonl", rows(8))
    write_report(run, build_report(folder / "other", RECIPE, task, evaluations))
    for to in ("hf", "peft"):
        md.export(run / "student", folder / to, to, check=0)
    return folder


def _check(chain: Path, to: str = "hf", destination: Path | None = None, count: int = 2) -> dict[str, Any]:
    asked = [(f"row {n}", row) for n, row in enumerate(rows(count))]
    return check_artifact(
        chain / "run" / "student",
        destination or chain / to,
        asked,
        parse_task(TASK, "task"),
        to=to,
        progress=NullProgress(),
    )


def _spoil(file: Path, part: str, change: Callable[[mx.array], mx.array]) -> None:
    """Change the tensors of a file of weights that have ``part`` in their names."""
    weights = dict(mx.load(str(file)))
    names = [name for name in weights if part in name]
    assert names
    weights |= {name: change(weights[name]) for name in names}
    mx.eval(weights)
    file.unlink()
    mx.save_safetensors(str(file), weights, metadata={"format": "pt"})


@pytest.mark.slow
def test_the_check_of_an_export_stands_in_its_card_in_the_run_and_in_the_report(
    chain: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(chain / "run", run)
    written = md.export(run, tmp_path / "out", check=3)  # the quantized student
    check: Any = written.artifact
    assert [step["step"] for step in check["steps"]] == ["merged", "quantized", "exported", "reloaded"]
    assert [step["must_agree"] for step in check["steps"]] == [True, False, True, True]
    assert check["first"] == "adapter" and check["passed"] and check["rows"] == 3
    by_name = {step["step"]: step["max_label_logprob_difference"] for step in check["steps"]}
    assert by_name["merged"] < 1e-3 and by_name["quantized"] > 0 and by_name["reloaded"] == 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "same answers on 3 of 3 rows" in card.partition("## Checked")[2]
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None and check_folder(tmp_path / "out", manifest, verify=True) is None
    assert "artifact.json" in manifest.files
    assert read_json(run / "artifact.json")["checks"] == [check]
    assert read_json(run / "report.json")["artifact"]["checks"] == [check]
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "same answers on 3 of 3 rows" in page and "was checked" not in page
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]  # nothing of the reloaded model
    older = read_json(run / "artifact.json")
    older["checks"][0]["content"] = "of another training"
    (run / "artifact.json").write_text(json.dumps(older), encoding="utf-8")
    assert read_checks(run) == []


@pytest.mark.slow
def test_an_adapter_scaled_wrongly_is_found_at_the_merge(
    chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = merging.adapter_updates

    def wrong(folder: Path) -> dict[str, Any]:
        return {
            name: replace(update, scale=2 * update.scale) if isinstance(update, LowRankUpdate) else update
            for name, update in original(folder).items()
        }

    monkeypatch.setattr(merging, "adapter_updates", wrong)
    assert _check(chain)["parted_at"] == "merged"


@pytest.mark.slow
def test_a_spoiled_export_is_found_at_the_export(chain: Path, tmp_path: Path) -> None:
    copy = tmp_path / "hf"
    shutil.copytree(chain / "hf", copy)
    _spoil(next(copy.glob("model*.safetensors")), "o_proj", lambda value: value[::-1])
    check = _check(chain, destination=copy)
    assert check["parted_at"] == "exported" and not check["passed"]
    step = check["steps"][1]
    assert step["same"] < step["rows"] and step["examples"][0]["id"] and not step["near_ties"]
    assert "they part at the step exported (the exported folder)" in check["sentence"]
    with pytest.raises(QualityGateError, match="step exported"):
        require_same_answers(check)
    (copy / "chat_template.jinja").write_text("{{ messages[0].content[:9] }}", encoding="utf-8")
    lost = _check(chain, destination=copy, count=1)
    assert lost["parted_at"] == "exported" and "chat template does not show" in lost["sentence"]


@pytest.mark.slow
def test_what_a_conversion_spoils_is_found_at_the_reload(
    chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = converting.convert

    def wrong(source: Path, destination: Path, **settings: Any) -> None:
        original(source, destination, **settings)
        _spoil(next(destination.glob("model*.safetensors")), "o_proj", lambda value: value[::-1])

    monkeypatch.setattr(converting, "convert", wrong)
    assert _check(chain)["parted_at"] == "reloaded"


@pytest.mark.slow
def test_an_adapter_for_peft_is_imported_again(chain: Path, tmp_path: Path) -> None:
    check = _check(chain, "peft")
    assert check["passed"] and [step["step"] for step in check["steps"]] == ["reloaded"]
    shutil.copytree(chain / "peft", tmp_path / "peft")
    _spoil(tmp_path / "peft" / "adapter_model.safetensors", "lora_B", lambda value: value * 2)
    assert _check(chain, "peft", tmp_path / "peft")["parted_at"] == "reloaded"


@pytest.mark.slow
def test_the_command_exits_with_3_and_still_prints_the_result(
    chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_distill import exports

    original = exports.to_peft

    def wrong(model: Path, destination: Path, **settings: Any) -> Any:
        report = original(model, destination, **settings)
        _spoil(destination / "adapter_model.safetensors", "lora_B", lambda value: value * 2)
        return report

    monkeypatch.setattr(exports, "to_peft", wrong)
    own = tmp_path / "own.jsonl"
    write_jsonl(own, [{"text": "a red heron"}, {"text": "some otter"}])
    shutil.copytree(chain / "run" / "student", tmp_path / "models" / "student")
    shutil.copytree(chain / "run" / "student_base", tmp_path / "models" / "student_base")
    arguments = ["export", str(tmp_path / "models" / "student"), str(tmp_path / "out"), "--to", "peft"]
    arguments += ["--json", "--rows", str(own)]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 3, result.output
    assert json.loads(result.stdout)["artifact"]["parted_at"] == "reloaded"
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "Not the same answers: they part at the step reloaded" in card
    assert '"answers"' not in (tmp_path / "out" / "artifact.json").read_text(encoding="utf-8")
    assert not (tmp_path / "models" / "artifact.json").exists()  # no run


def test_unknown_rows_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    bad: Any
    for bad in ({"check": 3}, {"task": "music"}, {"check": 0, "rows": "x"}, {"check": -1}):
        with pytest.raises(ConfigError):
            md.export(tmp_path / "student", tmp_path / "out", "peft", **bad)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_rows_that_cannot_be_asked_do_not_count_as_the_same(chain: Path) -> None:
    task = parse_task(TASK, "task")
    arguments = (chain / "run" / "student", chain / "peft")
    bad: list[tuple[str, Any]] = [("row 1", {"other": 1}), ("row 2", {"text": " "})]
    with pytest.raises(DataError, match="no rows that the model can be asked"):
        check_artifact(*arguments, bad, task, to="peft", progress=NullProgress())
    check = check_artifact(
        *arguments, [*bad, ("row 3", {"text": "a red pike"})], task, to="peft", progress=NullProgress()
    )
    assert check["rows"] == 1 and check["not_asked"] == 2 and check["passed"]


def _step(labels: list[str], yes: list[float], name: str = "exported", exact: bool = True) -> Any:
    answers = [
        Prediction(
            f"r{i}",
            json.dumps({"colour": label}),
            {"colour": label},
            label,
            None,
            label_probs={"yes": p, "no": 1 - p},
        )
        for i, (label, p) in enumerate(zip(labels, yes, strict=True))
    ]
    return Step(name, lambda: (None, None), exact), answers


@pytest.fixture
def colours() -> Task:
    return parse_task(TASK, "task")


def test_near_ties_are_told_apart_from_a_defect(colours: Task) -> None:
    before = _step(["yes", "no", "no"], [0.51, 0.01, 0.49], "merged")
    tie = compare_step(before, _step(["no", "no", "no"], [0.49, 0.01, 0.49]), colours)
    assert tie["same"] == 2 and tie["near_ties"] == 1
    assert "near ties, which rounding can turn" in tie["sentence"]
    assert tie["examples"][0]["margin"] == pytest.approx(math.log(0.51 / 0.49)) and NEAR_TIE > 0.04
    assert tie["max_label_logprob_difference"] == pytest.approx(math.log(0.51 / 0.49))
    defect = compare_step(before, _step(["no", "yes", "no"], [0.49, 0.99, 0.49]), colours)
    assert defect["near_ties"] == 1 and "1 of these rows are near ties" in defect["sentence"]
    other = compare_step(before, _step(["yes", "yes", "no"], [0.51, 0.99, 0.49], exact=False), colours)
    assert other["near_ties"] == 0 and "which quantization may do" in other["sentence"]


def test_probabilities_that_are_no_numbers_are_not_the_same(colours: Task) -> None:
    broken = _step(["no"], [math.nan])
    step = compare_step(broken, broken, colours)
    assert step["same"] == 0 and step["not_numbers"] == 1 and step["max_label_logprob_difference"] is None
    json.dumps(step, allow_nan=False)
