"""convert, inspect, export and analyze through the entry point, on the packaged tiny models: good ones and
broken ones.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_distill.cli import cli
from mlx_distill.config import ASSETS
from mlx_distill.models.adapters import LoraSettings, add_lora, save_adapter
from mlx_distill.models.load import load_model
from mlx_distill.recipe import load_recipe
from mlx_distill.storage import read_manifest

SOURCE = ASSETS / "models" / "tiny-qwen3"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SOURCE, tmp_path / "source"))


@pytest.fixture
def converted(runner: Any, tmp_path: Path) -> Path:
    result = runner.invoke(cli, ["convert", str(SOURCE), str(tmp_path / "converted")])
    assert result.exit_code == 0, result.output
    return tmp_path / "converted"


def test_convert_with_and_without_dry_run(runner: Any, tmp_path: Path) -> None:
    arguments = ["convert", str(SOURCE), str(tmp_path / "out"), "--quantize", "affine4"]
    plan = runner.invoke(cli, [*arguments, "--dry-run"])
    assert plan.exit_code == 0, plan.output
    assert "would be" in plan.stdout
    assert not (tmp_path / "out").exists()
    result = runner.invoke(cli, [*arguments, "--json"])
    report = json.loads(result.stdout)
    assert report["bits_per_weight"] < 32
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["quantization"]["bits"]
        == 4
    )


def test_inspect_fails_for_a_damaged_model(runner: Any, converted: Path) -> None:
    good = runner.invoke(cli, ["inspect", str(converted), "--verify"])
    assert good.exit_code == 0, good.output
    assert "verified" in good.stdout
    report = json.loads(runner.invoke(cli, ["inspect", str(converted), "--json"]).stdout)
    assert report["kind"] == "model"
    assert report["problems"] == []
    shard = sorted(converted.glob("*.safetensors"))[0]
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    bad = runner.invoke(cli, ["inspect", str(converted), "--verify"])
    assert bad.exit_code == 1
    assert shard.name in bad.output


def test_export_equals_the_source_of_the_conversion(runner: Any, converted: Path, tmp_path: Path) -> None:
    result = runner.invoke(cli, ["export", str(converted), str(tmp_path / "back"), "--to", "hf"])
    assert result.exit_code == 0, result.output
    before, after = _tensors(SOURCE), _tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(
        before[name].dtype == after[name].dtype and mx.array_equal(before[name], after[name])
        for name in before
    )


def _tensors(folder: Path) -> dict[str, mx.array]:
    return {
        name: tensor for file in folder.glob("*.safetensors") for name, tensor in mx.load(str(file)).items()
    }


@pytest.mark.parametrize("made_again", [False, True])
def test_figures_of_an_earlier_model_are_not_on_the_card(
    runner: Any, tmp_path: Path, made_again: bool
) -> None:
    run, rate = tmp_path / "run", {"value": 0.5, "low": 0.25, "high": 0.75, "n": 8}
    assert runner.invoke(cli, ["convert", str(SOURCE), str(run / "student")]).exit_code == 0
    manifest = read_manifest(run / "student")
    assert manifest is not None
    key = "of another training" if made_again else manifest.key
    stages = {"provenance": {"stages": [{"folder": "student", "key": key}]}}
    report = {"format": 1, "name": "run", "metrics": {"student": {"accuracy": rate}}, **stages}
    (run / "report.json").write_text(json.dumps(report), encoding="utf-8")
    result = runner.invoke(cli, ["export", str(run / "student"), str(tmp_path / "out"), "--to", "hf"])
    assert result.exit_code == 0, result.output
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert ("50.0\u202f%" in card) is not made_again
    assert ("is not of student as it is now" in result.output) is made_again


def test_the_model_card_has_the_figures_of_the_models_run_or_of_a_named_one(
    runner: Any, tmp_path: Path
) -> None:
    run, rate = tmp_path / "run", {"value": 0.5, "low": 0.25, "high": 0.75, "n": 8}
    assert runner.invoke(cli, ["convert", str(SOURCE), str(run / "student_base")]).exit_code == 0
    for folder, model in ((run, "student_base"), (tmp_path, "another")):
        report = {"format": 1, "name": folder.name, "metrics": {model: {"accuracy": rate}}}
        (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
    for options, model in (([], "student_base"), (["--report", str(tmp_path / "report.json")], "another")):
        result = runner.invoke(
            cli, ["export", str(run / "student_base"), str(tmp_path / "out"), "--to", "hf", *options]
        )
        assert result.exit_code == 0, result.output
        assert f"| {model} | 50.0\u202f% [25.0–75.0] |" in (tmp_path / "out" / "README.md").read_text(
            encoding="utf-8"
        )
    bad = runner.invoke(
        cli,
        [
            "export",
            str(run / "student_base"),
            str(tmp_path / "new"),
            "--to",
            "hf",
            "--report",
            str(tmp_path / "none"),
        ],
    )
    assert bad.exit_code == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_an_adapter_is_exported_to_peft_and_converted_back(
    runner: Any, converted: Path, tmp_path: Path
) -> None:
    model, _ = load_model(converted)
    settings = LoraSettings(2, 4.0, 0.0, ("q_proj",))
    paths = add_lora(model, settings)
    save_adapter(model, tmp_path / "student", settings, converted)
    kept = runner.invoke(
        cli, ["export", str(tmp_path / "student"), str(tmp_path / "hf"), "--to", "hf", "--adapter", "keep"]
    )
    assert kept.exit_code == 0, kept.output
    assert (tmp_path / "hf" / "adapter" / "adapter_model.safetensors").is_file()
    out = runner.invoke(
        cli, ["export", str(tmp_path / "student"), str(tmp_path / "peft"), "--to", "peft", "--json"]
    )
    assert json.loads(out.stdout)["modules"] == paths
    back = runner.invoke(
        cli, ["convert", str(tmp_path / "peft"), str(tmp_path / "again"), "--base", str(converted)]
    )
    assert back.exit_code == 0, back.output
    assert f"adapters of {len(paths)} modules" in back.stdout
    assert back.stdout.splitlines()[-1] == f"the base model that it expects: {converted}"
    first, second = (mx.load(str(tmp_path / name / "adapters.safetensors")) for name in ("student", "again"))
    assert first.keys() == second.keys()
    assert all(mx.array_equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["affine1", "mixed-mxfp4"])
def test_options_of_convert_have_an_effect(runner: Any, tmp_path: Path, mode: str) -> None:
    sizes = [
        "--group-size",
        "0",
        "--max-shard-bytes",
        "50000",
        "--memory-bytes",
        "100000",
        "--dtype",
        "bfloat16",
    ]
    result = runner.invoke(
        cli, ["convert", str(SOURCE), str(tmp_path / "out"), "--quantize", mode, *sizes, "--json"]
    )
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert {row["stored"] for row in json.loads(result.stdout)["rows"]} >= {"BF16"}
    assert load_recipe("tiny", [f"convert.quantize={mode}", f"quantize.mode={mode}"]).convert.quantize == mode


def test_export_to_peft_needs_an_adapter(runner: Any, converted: Path, tmp_path: Path) -> None:
    result = runner.invoke(cli, ["export", str(converted), str(tmp_path / "peft"), "--to", "peft"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error:")
    assert not (tmp_path / "peft").exists()


def _truncate(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1000])


def _lose_a_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[-1].unlink()


def _edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | changes
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


_BROKEN = {
    "truncated": (_truncate, "model-00002-of-00002.safetensors"),
    "missing shard": (_lose_a_shard, "model-00002-of-00002.safetensors"),
    "wrong model_type": (lambda folder: _edit_config(folder, model_type="mystery"), "mystery"),
    "wrong shape": (lambda folder: _edit_config(folder, hidden_size=96), ""),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "config not JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
}


@pytest.mark.parametrize("case", _BROKEN)
def test_a_broken_checkpoint_is_refused_by_name(runner: Any, source: Path, tmp_path: Path, case: str) -> None:
    break_it, named = _BROKEN[case]
    break_it(source)
    result = runner.invoke(cli, ["convert", str(source), str(tmp_path / "out")])
    lines = [line for line in result.stderr.splitlines() if line.startswith(("error:", "fix:"))]
    assert result.exit_code == 1, result.output
    assert [line.split(":")[0] for line in lines] == ["error", "fix"], result.stderr
    assert "unexpected" not in lines[0]
    assert named in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("option", "value"), [("--quantize", "int3"), ("--dtype", "float64")])
def test_an_unknown_mode_is_refused(runner: Any, tmp_path: Path, option: str, value: str) -> None:
    result = runner.invoke(cli, ["convert", str(SOURCE), str(tmp_path / "out"), option, value])
    assert result.exit_code == 2, result.output
    assert value in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command",
    [
        ["convert", "{here}/nope", "{here}/out"],
        ["inspect", "{here}/nope"],
        ["export", "{here}/nope", "{here}/out", "--to", "hf"],
    ],
)
def test_a_path_that_does_not_exist(runner: Any, tmp_path: Path, command: list[str]) -> None:
    result = runner.invoke(cli, [part.format(here=tmp_path) for part in command])
    assert result.exit_code == 1, result.output
    assert "nope" in result.stderr.splitlines()[0]
    assert "unexpected" not in result.stderr


@pytest.mark.parametrize("content", [None, ""])
def test_analyze_says_nothing_of_recipes_about_its_input(
    runner: Any, tmp_path: Path, content: str | None
) -> None:
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    result = runner.invoke(cli, ["analyze", "any/model", str(path), "--task", "music"])
    assert result.exit_code == 1
    assert ("no such file" if content is None else "no rows") in result.stderr
    assert "data.sources" not in result.stderr


def test_analyze_answers_every_row(runner: Any, converted: Path, tmp_path: Path) -> None:
    rows = [{"id": f"s{i}", "title": "Rain", "lyrics": f"Line {i}", "genre": "folk"} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = runner.invoke(cli, ["analyze", str(converted), str(tmp_path / "rows.jsonl"), "--task", "music"])
    assert result.exit_code == 0, result.output
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer["id"] for answer in answers] == ["s0", "s1", "s2"]
    assert all((answer["answer"] is None) == (answer["error"] is not None) for answer in answers)
    assert sum(answers[0]["label_probs"].values()) == pytest.approx(1.0, abs=1e-5)


def test_analyze_names_the_missing_field_of_a_row_and_writes_nothing(
    runner: Any, converted: Path, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"title": "Rain"}\n', encoding="utf-8")
    arguments = [
        "analyze",
        str(converted),
        str(tmp_path / "rows.jsonl"),
        "--task",
        "music",
        "--out",
        str(tmp_path / "answers.jsonl"),
    ]
    result = runner.invoke(cli, arguments)
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "lyrics" in line and "rows.jsonl:1" in line
    assert not (tmp_path / "answers.jsonl").exists()
