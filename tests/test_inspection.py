"""What ``inspect`` says about models, adapters, stages and runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_distill.errors import ModelError
from mlx_distill.inspection import inspect
from mlx_distill.models.adapters import LoraSettings, add_lora, save_adapter
from mlx_distill.models.convert import convert
from mlx_distill.models.load import load_model
from mlx_distill.models.peft import to_peft
from mlx_distill.storage import sha256


def test_checkpoints_of_both_layouts_have_the_same_number_of_parameters(golden: Any, tmp_path: Path) -> None:
    convert(golden("gpt_oss_mxfp4"), tmp_path / "ours")
    theirs, ours = inspect(golden("gpt_oss_mxfp4")), inspect(tmp_path / "ours", verify=True)
    assert theirs.facts["parameters"] == ours.facts["parameters"]
    assert (theirs.facts["layout"], ours.facts["layout"]) == ("Hugging Face", "MLX")
    assert ours.facts["layers"] == 2
    assert "truncate False" in ours.facts["rope"]
    assert "stage" in ours.facts
    assert ours.problems == ()
    experts = next(r for r in ours.rows if r.name == "model.layers.*.mlp.experts.up_proj.weight")
    assert (experts.count, experts.shape, experts.stored, experts.bits) == (
        2,
        (4, 32, 32),
        "mxfp4 4/32",
        4.25,
    )
    assert sum(r.parameters for r in ours.rows) == int(str(ours.facts["parameters"]).replace(",", ""))
    assert any(line.startswith("verified") for line in ours.lines())


def test_verify_finds_a_flipped_bit_and_a_nan(golden: Any, copy: Any, tools: Any, tmp_path: Path) -> None:
    convert(golden("qwen3"), tmp_path / "ours")
    path = next((tmp_path / "ours").glob("*.safetensors"))
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert any("has changed" in problem for problem in inspect(tmp_path / "ours", verify=True).problems)
    folder, name = copy("qwen3"), "model.layers.0.self_attn.k_proj.weight"
    tools.edit(folder, name, lambda t: (t[0], t[1], tools.bf16(np.array([np.nan])) + t[2][2:]))
    assert inspect(folder).problems == ()
    problems = inspect(folder, verify=True).problems
    assert len(problems) == 1
    assert name in problems[0]


def test_an_adapter_is_shown_with_its_settings_and_base(golden: Any, tmp_path: Path) -> None:
    model, _ = load_model(golden("qwen3"))
    settings = LoraSettings(4, 8.0, 0.1, ("q_proj",))
    add_lora(model, settings)
    save_adapter(model, tmp_path / "adapter", settings, golden("qwen3"))
    report = inspect(tmp_path / "adapter")
    assert report.kind == "adapter"
    assert (report.facts["rank"], report.facts["alpha"], report.facts["targets"]) == (4, 8.0, "q_proj")
    assert sum(r.parameters for r in report.rows) == 2 * 4 * (32 + 64)
    assert report.to_dict()["rows"][0]["count"] == 2


def test_a_run_is_shown_as_a_list_of_its_stages(golden: Any, tmp_path: Path) -> None:
    convert(golden("qwen3"), tmp_path / "teacher_base")
    report = inspect(tmp_path)
    assert report.kind == "run"
    assert re.fullmatch(r"convert, key [0-9a-f]{12}, \d files, \d+\.\d kB", report.facts["teacher_base"])
    raw = json.loads((tmp_path / "teacher_base" / "manifest.json").read_text())
    (tmp_path / "teacher_base" / "manifest.json").write_text(json.dumps({**raw, "stage": "teacher_base"}))
    assert inspect(tmp_path).facts["teacher_base"].startswith("key ")  # its name is not said twice
    assert report.problems == ()
    next((tmp_path / "teacher_base").glob("*.safetensors")).unlink()
    assert "is missing" in inspect(tmp_path).problems[0]


def test_verify_says_how_many_hashes_were_compared(
    golden: Any, copy: Any, tools: Any, tmp_path: Path
) -> None:
    """Hashes come from the manifest, from the file names of the Hub's cache, or there are none."""
    convert(golden("qwen3"), tmp_path / "ours")
    files = len(list((tmp_path / "ours").iterdir())) - 1
    assert f"verified: {files} files have the hash" in inspect(tmp_path / "ours", verify=True).lines()[-1]
    assert "no hashes are recorded" in inspect(golden("qwen3"), verify=True).lines()[-1]
    assert not any(line.startswith("verified") for line in inspect(golden("qwen3")).lines())
    snapshot, blobs = copy("qwen3"), tmp_path / "blobs"
    blobs.mkdir()
    for path in sorted(snapshot.glob("*.safetensors")):
        blob = blobs / sha256(path)
        path.rename(blob)
        path.symlink_to(blob)
    assert "verified: 2 files have the hash" in inspect(snapshot, verify=True).lines()[-1]
    blob.write_bytes(blob.read_bytes()[:-1] + b"!")
    assert inspect(snapshot, verify=True).problems == (f"{path} is not what the Hub sent",)


def test_an_adapter_in_the_format_of_peft_is_shown_too(golden: Any, tmp_path: Path) -> None:
    model, _ = load_model(golden("qwen3"))
    settings = LoraSettings(4, 8.0, 0.1, ("q_proj",))
    add_lora(model, settings)
    save_adapter(model, tmp_path / "adapter", settings, golden("qwen3"))
    to_peft(tmp_path / "adapter", tmp_path / "peft", base_model="org/name")
    report = inspect(tmp_path / "peft", verify=True)
    assert (report.facts["kind"], report.facts["rank"], report.facts["base"]) == (
        "lora in PEFT's format",
        4,
        "org/name",
    )
    assert report.problems == ()
    assert sum(r.parameters for r in report.rows) == 2 * 4 * (32 + 64)


def test_sizes_are_shown_in_bytes_and_plurals_are_right(golden: Any, tmp_path: Path) -> None:
    convert(golden("qwen3"), tmp_path / "ours")
    report = inspect(tmp_path / "ours")
    assert re.fullmatch(r"\d+\.\d kB in 1 file", report.facts["size"])
    norm = next(line for line in report.lines() if line.lstrip().startswith("model.norm.weight"))
    assert re.search(r" \d+ bytes$", norm)


def test_an_unfinished_stage_is_shown_with_its_last_saved_step(tmp_path: Path) -> None:
    (tmp_path / ".teacher.partial").mkdir()
    report = inspect(tmp_path / "teacher")
    assert (report.kind, report.facts["state"]) == (
        "stage",
        "not finished; the same command continues from there",
    )
    state = tmp_path / ".teacher.partial" / "scratch" / "checkpoints" / "step-00000117" / "state.json"
    state.parent.mkdir(parents=True)
    state.write_text('{"step": 117, "steps": 400}')
    for path, name in ((tmp_path / "teacher", "state"), (tmp_path, "teacher")):
        assert (
            inspect(path).facts[name]
            == "not finished: step 117 of 400 saved; the same command continues from there"
        )


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("name: my\n")
    with pytest.raises(ModelError, match=r"my\.yaml: a file, not a folder") as caught:
        inspect(tmp_path / "my.yaml")
    assert "a stage or a run" in (caught.value.fix or "") and "--dry-run" in (caught.value.fix or "")


def test_an_unknown_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither"):
        inspect(tmp_path)
