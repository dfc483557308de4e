"""Conversion: every tensor in the report, exact or with its error, in blocks and shards, resumable."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.errors import FileError
from mlx_distill.models.convert import convert, convert_into
from mlx_distill.models.load import load_model
from mlx_distill.models.quantization import MIXED, parse_mode
from mlx_distill.recipe import MODES
from mlx_distill.storage import check_folder, read_manifest

NAMES = ("qwen2", "qwen3", "qwen3_yarn", "qwen3_moe", "gpt_oss", "gpt_oss_mxfp4")


def error(found: mx.array, wanted: mx.array) -> float:
    return (mx.abs(found - wanted).max() / mx.abs(wanted).max()).item()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_converted_logits_equal_transformers_and_every_tensor_is_accounted_for(
    name: str, golden: Any, logits: Any, tmp_path: Path, tools: Any
) -> None:
    report = convert(golden(name), tmp_path / "out", max_shard_bytes=30_000)
    model, _ = load_model(tmp_path / "out", dtype="float32")
    prompt, wanted = logits(name)
    assert error(model(prompt), wanted) < 2e-5
    assert report.largest_error == 0.0
    table = json.loads((tmp_path / "out" / "tensors.json").read_text())
    assert {row["name"] for row in table["tensors"]} == set(tools.all(tmp_path / "out"))
    assert all(row["rule"] and row["source"] and row["file"] for row in table["tensors"])
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) == len(table["shards"]) > 1
    assert all(p.stat().st_size < 32_000 for p in shards)


def test_every_source_byte_comes_out_once(golden: Any, tmp_path: Path, tools: Any) -> None:
    convert(golden("gpt_oss_mxfp4"), tmp_path / "out")
    before, after = tools.all(golden("gpt_oss_mxfp4")), tools.all(tmp_path / "out")
    assert sum(len(d) for _, _, d in before.values()) == sum(len(d) for _, _, d in after.values())
    assert sorted(b"".join(d for _, _, d in before.values())) == sorted(
        b"".join(d for _, _, d in after.values())
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "quantize"), [("gpt_oss", None), ("gpt_oss_mxfp4", "affine4"), ("qwen3_moe", "nvfp4")]
)
def test_the_size_of_blocks_and_shards_changes_no_bit_of_a_tensor(
    name: str, quantize: str | None, golden: Any, tmp_path: Path, tools: Any
) -> None:
    convert(golden(name), tmp_path / "whole", quantize)
    convert(
        golden(name), tmp_path / "rows", quantize, max_shard_bytes=40_000, memory_bytes=2048
    )  # blocks of a few rows
    assert tools.all(tmp_path / "whole") == tools.all(tmp_path / "rows")


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_loads_and_quantizes_no_worse_than_mlx(
    mode: str, golden: Any, logits: Any, tmp_path: Path, tools: Any
) -> None:
    """The twin: mx.quantize of the whole weight at once, except where scales are chosen by their error."""
    report = convert(golden("gpt_oss"), tmp_path / "out", mode)
    model, config = load_model(tmp_path / "out", dtype="float32")
    prompt, _ = logits("gpt_oss")
    assert mx.all(mx.isfinite(model(prompt))).item()
    source, _ = load_model(golden("gpt_oss"))
    quantized = model.model.layers[0].self_attn.o_proj
    weight, terms = source.model.layers[0].self_attn.o_proj.weight, (quantized.group_size, quantized.bits)
    want = mx.quantize(weight, *terms, mode=quantized.mode)
    if quantized.mode in ("mxfp4", "nvfp4"):
        stored = [mx.dequantize(quantized.weight, quantized.scales, None, *terms, quantized.mode)]
        stored.append(mx.dequantize(*want, None, *terms, quantized.mode))
        chosen, rounded = (mx.square(back - weight.astype(mx.float32)).sum().item() for back in stored)
        assert 0 < chosen < rounded
    else:
        assert mx.array_equal(quantized.weight, want[0])
        assert mx.array_equal(quantized.scales, want[1].astype(quantized.scales.dtype))
    assert not hasattr(model.model.layers[0].mlp.router, "bits")
    rows = {row.name: row for row in report.rows}
    assert rows["model.layers.0.mlp.router.weight"].note == "kept by 'router'"
    assert 0 < report.largest_error < (2 if mode == "affine1" else 1)
    assert config["quantization"]["bits"] in (1, 2, 3, 4, 5, 6, 8)


def test_the_errors_in_the_table_are_those_of_the_weights(golden: Any, tmp_path: Path) -> None:
    report = convert(golden("qwen3_yarn"), tmp_path / "out", "affine4")
    before, _ = load_model(golden("qwen3_yarn"))
    after, _ = load_model(tmp_path / "out")
    q = after.model.layers[1].self_attn.o_proj
    w = np.array(before.model.layers[1].self_attn.o_proj.weight.astype(mx.float32), np.float64)
    back = np.array(
        mx.dequantize(q.weight, q.scales, q.biases, q.group_size, q.bits, q.mode).astype(mx.float32),
        np.float64,
    )
    row = next(r for r in report.rows if r.name == "model.layers.1.self_attn.o_proj.weight")
    assert row.error == pytest.approx(np.sqrt(np.square(w - back).sum() / np.square(w).sum()), rel=1e-5)
    assert row.largest == pytest.approx(np.abs(w - back).max(), rel=1e-5)


def test_mxfp4_experts_pass_through_any_mode_bit_for_bit(golden: Any, tmp_path: Path, tools: Any) -> None:
    convert(golden("gpt_oss_mxfp4"), tmp_path / "plain")
    convert(golden("gpt_oss_mxfp4"), tmp_path / "quantized", "affine4", "float32")
    plain, quantized = tools.all(tmp_path / "plain"), tools.all(tmp_path / "quantized")
    experts = [n for n in plain if ".experts." in n and n.endswith((".weight", ".scales"))]
    assert len(experts) == 12
    assert all(plain[n] == quantized[n] for n in experts)


def test_mixed_recipes_keep_head_and_embeddings_higher(golden: Any, tmp_path: Path) -> None:
    convert(golden("gpt_oss_mxfp4"), tmp_path / "out", "mixed4")
    model, config = load_model(tmp_path / "out")
    assert (
        model.lm_head.bits,
        model.model.embed_tokens.bits,
        model.model.layers[0].self_attn.q_proj.bits,
    ) == (8, 8, 4)
    assert config["quantization"]["lm_head"]["bits"] == 8


def test_a_tied_head_in_the_source_is_left_out_with_its_reason(copy: Any, tools: Any, tmp_path: Path) -> None:
    folder = copy("qwen2")
    name = "model.embed_tokens.weight"
    path = tools.file_of(folder, name)
    tensors = tools.read(path)
    tensors["lm_head.weight"] = tensors[name]
    tools.write(path, tensors)
    index = folder / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"]["lm_head.weight"] = path.name
    index.write_text(json.dumps(raw))
    assert convert(folder, tmp_path / "out").left_out == (("lm_head.weight", "tied to the embedding"),)


@pytest.mark.parametrize(("dtype", "exact"), [("float32", True), ("float16", False)])
def test_casts_to_another_type_and_reports_the_error(
    dtype: str, exact: bool, golden: Any, logits: Any, tmp_path: Path
) -> None:
    report = convert(golden("qwen3"), tmp_path / "out", dtype=dtype)
    model, config = load_model(tmp_path / "out")
    assert str(model.model.norm.weight.dtype).endswith(dtype)
    assert config["dtype"] == dtype
    assert (report.largest_error == 0.0) is exact
    prompt, wanted = logits("qwen3")
    assert error(model(prompt).astype(mx.float32), wanted) < (2e-5 if exact else 0.05)


def test_dry_run_writes_nothing_and_tells_the_same_table(golden: Any, tmp_path: Path) -> None:
    plan = convert(golden("gpt_oss_mxfp4"), tmp_path / "out", "affine4", dry_run=True)
    assert not list(tmp_path.iterdir())
    real = convert(golden("gpt_oss_mxfp4"), tmp_path / "out", "affine4")
    assert [(r.name, r.stored, r.bits, r.note) for r in plan.rows] == [
        (r.name, r.stored, r.bits, r.note) for r in real.rows
    ]
    assert plan.stored_bytes == real.stored_bytes
    assert plan.lines()[0].split() == ["tensor", "shape", "from", "to", "bits"]
    table = {line.split()[0]: line.split()[1:] for line in plan.lines()}
    assert table["model.layers.0.self_attn.q_proj.bias"] == ["64", "BF16", "BF16", "16.00"]
    assert table["model.embed_tokens.weight"][:4] == ["64x32", "BF16", "affine", "4"]
    assert "mxfp4" in table["model.layers.0.mlp.experts.up_proj.weight"]


def test_a_second_run_finds_the_work_done_and_another_mode_replaces_it(
    golden: Any, tmp_path: Path, tools: Any
) -> None:
    first = convert(golden("qwen3"), tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    again = convert(golden("qwen3"), tmp_path / "out")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before
    assert (again.rows, again.stored_bytes) == (first.rows, first.stored_bytes)
    convert(golden("qwen3"), tmp_path / "out", "mxfp8")
    assert load_model(tmp_path / "out")[1]["quantization"]["mode"] == "mxfp8"


def test_the_manifest_has_the_hash_of_every_file(golden: Any, tmp_path: Path) -> None:
    convert(golden("qwen3"), tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert check_folder(tmp_path / "out", manifest, verify=True) is None
    assert set(manifest.files) == {p.name for p in (tmp_path / "out").iterdir()} - {"manifest.json"}


def test_converting_what_is_converted_changes_no_weight(golden: Any, tmp_path: Path, tools: Any) -> None:
    convert(golden("gpt_oss_mxfp4"), tmp_path / "one", "affine4")
    convert(tmp_path / "one", tmp_path / "two")
    assert tools.all(tmp_path / "one") == tools.all(tmp_path / "two")


def test_a_stage_folder_is_filled_without_a_manifest(golden: Any, tmp_path: Path) -> None:
    report = convert_into(golden("qwen3"), tmp_path / "partial")
    assert report.resumed == 0
    assert not (tmp_path / "partial" / "manifest.json").exists()
    stamp = next((tmp_path / "partial").glob("*.safetensors")).stat().st_mtime_ns
    assert convert_into(golden("qwen3"), tmp_path / "partial").resumed == 1
    assert next((tmp_path / "partial").glob("*.safetensors")).stat().st_mtime_ns == stamp
    assert convert_into(golden("qwen3"), tmp_path / "partial", dtype="float32").resumed == 0


def test_progress_counts_every_megabyte(golden: Any, tmp_path: Path) -> None:
    import io

    from mlx_distill.progress import PlainProgress

    seen = io.StringIO()
    convert(golden("qwen3"), tmp_path / "out", progress=PlainProgress(seen))
    assert "convert" in seen.getvalue()
    convert_into(golden("gpt_oss"), tmp_path / "stage", progress=PlainProgress(seen))
    assert "convert: computed as transformers does; stock mlx-lm" in seen.getvalue()
    convert_into(
        golden("gpt_oss"), tmp_path / "named", progress=PlainProgress(seen), name="convert student_base"
    )
    lines = seen.getvalue().splitlines()[-3:]
    assert all(line.startswith("convert student_base: ") for line in lines)
    assert lines[-1].endswith("would give other logits (it rounds YaRN's correction range)")


@pytest.mark.slow
def test_killed_at_ten_moments_it_goes_on_and_ends_the_same(golden: Any, tmp_path: Path) -> None:
    """Thirty kills at moments drawn by seeds, ten in each conversion, and one at each of the last moments of
    another.
    """
    command = [
        sys.executable,
        str(Path(__file__).parents[1] / "helpers" / "killed_conversion.py"),
        str(golden("gpt_oss_mxfp4")),
        str(tmp_path),
        "0",
        "1",
        "2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["problems"] for row in found] == [[]] * 11
    assert [row["kills"] for row in found] == [10] * 3 + [1] * 8
    assert all(row["finished"] > 3 for row in found[:3]), "no kill came behind a finished shard"


def test_the_modes_are_all_that_mlx_has() -> None:
    """Fails once mx.quantize has another one."""
    weight = mx.zeros((32, 128))

    def exists(bits: int) -> bool:
        try:
            mx.eval(mx.quantize(weight, 64, bits))
        except ValueError:
            return False
        return True

    assert {f"affine{bits}" for bits in range(1, 17) if exists(bits)} == {
        mode for mode in MODES if mode.startswith("affine")
    }
    named = re.search(r"supported quantization modes are (.*?)\. ", " ".join(mx.quantize.__doc__.split()))
    assert named is not None
    kinds = set(re.findall(r"\w*[a-z]\w*", named[1].replace("and", "")))
    assert kinds == {"affine"} | {mode for mode in MODES if not mode.startswith(("affine", "mixed"))}
    assert set(MIXED) == {mode for mode in MODES if mode.startswith("mixed")}


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 64, 128])
def test_groups_of_a_chosen_size(size: int, golden: Any, tmp_path: Path) -> None:
    report = convert(golden("qwen3"), tmp_path / "out", "affine4", group_size=size)
    by_name = {row.name: row.stored for row in report.rows}
    assert by_name["model.layers.0.mlp.down_proj.weight"] == f"affine 4 bits, groups of {min(size, 64)}"
    assert load_model(tmp_path / "out")[0].model.layers[0].mlp.down_proj.group_size == min(size, 64)


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [None, "affine4"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "gpt_oss_mxfp4"])
def test_no_read_is_larger_than_the_setting_allows(
    name: str, quantize: str | None, golden: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every layout blocks of rows are read, never a tensor.

    A block has an eighth of the memory; gate and up may be read together.
    """
    sizes = []
    preadv = os.preadv

    def recorded(handle: int, buffers: list[memoryview], offset: int) -> int:
        sizes.append(sum(buffer.nbytes for buffer in buffers))
        return preadv(handle, buffers, offset)

    monkeypatch.setattr(os, "preadv", recorded)
    convert(golden(name), tmp_path / "out", quantize, memory_bytes=8 * 512)
    assert max(sizes) <= 2 * 512
    assert len(sizes) > 100


def test_modes_by_name() -> None:
    assert parse_mode("affine4", 32).config == {"group_size": 32, "bits": 4, "mode": "affine"}
    assert parse_mode("mxfp4").config == {"group_size": 32, "bits": 4, "mode": "mxfp4"}


def test_the_notes_of_tensors_json_keep_the_words_of_the_first_version(golden: Any, tmp_path: Path) -> None:
    """The file is part of the content that keys later stages; reports say it in today's words."""
    first = convert(golden("gpt_oss_mxfp4"), tmp_path / "ours")
    text = (tmp_path / "ours" / "tensors.json").read_text(encoding="utf-8")
    assert '"packed already"' in text
    assert "already quantized" not in text
    again = convert(golden("gpt_oss_mxfp4"), tmp_path / "ours")
    assert [row.note for row in again.rows] == [row.note for row in first.rows]
    assert "already quantized" in {row.note for row in again.rows}


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "link to nothing", "file"])
def test_what_is_not_a_folder_is_never_replaced(golden: Any, tmp_path: Path, kind: str) -> None:
    destination, pipe = tmp_path / "out", tmp_path / "pipe"
    if kind == "pipe":
        os.mkfifo(destination)
    elif kind == "file":
        destination.write_text("mine", encoding="utf-8")
    else:
        if kind == "link to a pipe":
            os.mkfifo(pipe)
        destination.symlink_to(pipe)
    before = destination.lstat().st_ino
    with pytest.raises(FileError, match=r"out: (a file, )?not a folder"):
        convert(golden("qwen3"), destination)
    assert destination.lstat().st_ino == before
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "pipe"}
