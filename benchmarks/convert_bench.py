"""Conversion of a gpt-oss checkpoint: time and peak resident memory, against mlx_lm.convert and cp.

    python benchmarks/convert_bench.py                 # 1.3 GB, in the proportions of gpt-oss-20b
    python benchmarks/convert_bench.py --size full     # 13.8 GB: 24 layers, 32 experts, 201,088 tokens
    python benchmarks/convert_bench.py --quantize affine4

The weights are random; layout, names and shapes are those of the published MXFP4 checkpoint. Each command
runs in its own process, whose peak resident memory the kernel reports; at full size only ours runs. Results
go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
SIZES = {
    "small": {"num_hidden_layers": 5, "num_local_experts": 12, "vocab_size": 20_096},
    "full": {"num_hidden_layers": 24, "num_local_experts": 32, "vocab_size": 201_088},
}
OURS = """
import sys
from mlx_distill import convert

report = convert(sys.argv[1], sys.argv[2], quantize=sys.argv[3] or None)
print(report.lines()[-1])
"""
IMPORT = "import mlx.core, numpy, mlx_distill.models.convert"


def commands(source: str, destination: str, quantize: str) -> dict[str, list[str]]:
    """The commands that are compared; "import alone" is what ours needs before it does anything."""
    theirs = [sys.executable, "-m", "mlx_lm", "convert", "--hf-path", source, "--mlx-path", destination]
    return {
        "ours": [sys.executable, "-c", OURS, source, destination, quantize],
        "mlx_lm.convert": [*theirs, *(["-q"] if quantize else [])],
        "cp": ["cp", "-r", source, destination],
        "import alone": [sys.executable, "-c", IMPORT],
    }


def config(size: str) -> dict[str, Any]:
    """The published config.json with the numbers of this size."""
    layers = SIZES[size]["num_hidden_layers"]
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "head_dim": 64,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "layer_types": ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)],
        "max_position_embeddings": 131072,
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 8,
        "quantization_config": {"quant_method": "mxfp4"},
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **SIZES[size],
    }


def tensors(c: dict[str, Any]) -> Iterator[tuple[str, str, list[int]]]:
    """Name, type and shape of every tensor of the published layout."""
    h, i, e, d = c["hidden_size"], c["intermediate_size"], c["num_local_experts"], c["head_dim"]
    q, kv = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
    yield "model.embed_tokens.weight", "BF16", [c["vocab_size"], h]
    for layer in range(c["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        for name, rows, columns in (("q_proj", q, h), ("k_proj", kv, h), ("v_proj", kv, h), ("o_proj", h, q)):
            yield f"{p}self_attn.{name}.weight", "BF16", [rows, columns]
            yield f"{p}self_attn.{name}.bias", "BF16", [rows]
        yield f"{p}self_attn.sinks", "BF16", [c["num_attention_heads"]]
        yield f"{p}mlp.router.weight", "BF16", [e, h]
        yield f"{p}mlp.router.bias", "BF16", [e]
        for name, rows, columns in (("gate_up_proj", 2 * i, h), ("down_proj", h, i)):
            yield f"{p}mlp.experts.{name}_blocks", "U8", [e, rows, columns // 32, 16]
            yield f"{p}mlp.experts.{name}_scales", "U8", [e, rows, columns // 32]
            yield f"{p}mlp.experts.{name}_bias", "BF16", [e, rows]
        yield f"{p}input_layernorm.weight", "BF16", [h]
        yield f"{p}post_attention_layernorm.weight", "BF16", [h]
    yield "model.norm.weight", "BF16", [h]
    yield "lm_head.weight", "BF16", [c["vocab_size"], h]


def nbytes(dtype: str, shape: list[int]) -> int:
    return int(np.prod(shape)) * (2 if dtype == "BF16" else 1)


def generate(folder: Path, size: str, shards: int = 9) -> int:
    """Write the checkpoint and return its size in bytes."""
    folder.mkdir(parents=True)
    c = config(size)
    entries = list(tensors(c))
    total = sum(nbytes(dtype, shape) for _, dtype, shape in entries)
    groups: list[list[tuple[str, str, list[int]]]] = [[]]
    written = 0
    for entry in entries:
        if written > total * len(groups) / shards:
            groups.append([])
        groups[-1].append(entry)
        written += nbytes(*entry[1:])
    values = random_bytes()
    weight_map = {}
    for number, group in enumerate(groups):
        file = f"model-{number:05d}-of-{len(groups) - 1:05d}.safetensors"
        write_shard(folder / file, group, values)
        weight_map |= {name: file for name, _, _ in group}
    (folder / "config.json").write_text(json.dumps(c, indent=2))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    make_tokenizer(folder)
    return total


def random_bytes() -> dict[str, np.ndarray]:
    """Random contents for each kind of tensor: MXFP4 blocks, bfloat16 floats, MXFP4 scales."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, 32 << 20, np.uint8)
    floats = (0.02 * rng.standard_normal(16 << 20, np.float32)).view(np.uint32) >> 16
    scales = rng.integers(118, 124, 8 << 20, np.uint8)
    return {"blocks": blocks, "floats": floats.astype(np.uint16).view(np.uint8), "scales": scales}


def write_shard(path: Path, group: list[tuple[str, str, list[int]]], values: dict[str, np.ndarray]) -> None:
    header, offset = {}, 0
    for name, dtype, shape in group:
        end = offset + nbytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name, dtype, shape in group:
            kind = "floats" if dtype == "BF16" else "scales" if name.endswith("_scales") else "blocks"
            buffer, left = values[kind], nbytes(dtype, shape)
            while left:
                left -= out.write(memoryview(buffer)[: min(left, len(buffer))])


def make_tokenizer(folder: Path) -> None:
    """Write a small tokenizer, because mlx_lm.convert needs one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="b").save_pretrained(folder)


def measure(command: list[str]) -> dict[str, float]:
    """Run a process; return its wall seconds, CPU seconds and peak resident bytes."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command[:4]} failed:\n{errors.decode()[-2000:]}")
    kilobyte = 1 if sys.platform == "darwin" else 1024
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_rss": usage.ru_maxrss * kilobyte,
    }


def main() -> None:
    from mlx_distill.runtime import machine, versions

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--quantize", default="", choices=["", "affine4"])
    parser.add_argument("--repeat", type=int, default=2, help="runs of each command; the fastest is reported")
    parser.add_argument("--work", type=Path, help="a folder for the checkpoints; default: a temporary one")
    parser.add_argument("--generate", type=Path, help="only write the checkpoint, into this folder")
    options = parser.parse_args()
    if options.generate:
        generate(options.generate, options.size)
        return
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=options.work))
    try:
        # In its own process: the peak of a child includes the memory of its parent at the fork.
        subprocess.run(
            [sys.executable, __file__, "--generate", str(work / "source"), "--size", options.size], check=True
        )
        total = sum(p.stat().st_size for p in (work / "source").glob("*.safetensors"))
        print(f"generated {total / 1e9:.2f} GB", flush=True)
        compared = commands(str(work / "source"), str(work / "out"), options.quantize)
        if options.size == "full":
            compared = {name: compared[name] for name in ("ours", "import alone")}
        runs: dict[str, dict[str, float]] = {}
        for _ in range(options.repeat if options.size == "small" else 1):
            for name, command in compared.items():
                shutil.rmtree(work / "out", ignore_errors=True)
                run = measure(command)
                if name not in runs or run["seconds"] < runs[name]["seconds"]:
                    runs[name] = run
                times = f"{run['seconds']:7.2f} s  {run['cpu_seconds']:7.2f} s CPU"
                print(f"{name:16} {times}  {run['peak_rss'] / 1e9:6.3f} GB", flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    out = {
        "bytes": total,
        "size": options.size,
        "quantize": options.quantize or None,
        "runs": runs,
        "machine": machine(),
        "versions": versions(),
        "commit": commit,
    }
    if "mlx_lm.convert" in runs:
        for key in ("seconds", "peak_rss"):
            out[f"{key}_of_mlx_lm"] = runs["ours"][key] / runs["mlx_lm.convert"][key]
            print(f"ours / mlx_lm, {key}: {out[f'{key}_of_mlx_lm']:.2f}")
    suffix = f"_{options.quantize}" if options.quantize else ""
    path = ROOT / "benchmarks" / "results" / f"convert_{options.size}{suffix}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(out, indent=2) + "\n")


if __name__ == "__main__":
    main()
