"""Damaged or hostile checkpoints: the error names file, tensor and fix; the destination is not changed;
nothing half-written stays.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.errors import DistillError, FileError, ModelError
from mlx_distill.models.adapters import LoraSettings, add_lora, save_adapter
from mlx_distill.models.checkpoint import writer
from mlx_distill.models.convert import convert
from mlx_distill.models.export import to_hf
from mlx_distill.models.load import load, load_model, load_tokenizer
from mlx_distill.models.quantize import quantize_folder

Damage = Callable[[Path, Any], Any]
Q, GATE = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.experts.2.gate_proj.weight"
BLOCKS = "model.layers.0.mlp.experts.gate_up_proj_blocks"


def truncated(folder: Path, tools: Any) -> str:
    path = tools.file_of(folder, Q)
    path.write_bytes(path.read_bytes()[:-7])
    return path.name


def cut_in_the_header(folder: Path, tools: Any) -> str:
    path = tools.file_of(folder, Q)
    path.write_bytes(path.read_bytes()[:40])
    return path.name


def not_safetensors(folder: Path, tools: Any) -> str:
    path = tools.file_of(folder, Q)
    path.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00not json at all!")
    return path.name


def missing_shard(folder: Path, tools: Any) -> str:
    path = tools.file_of(folder, Q)
    path.unlink()
    return path.name


def removed_tensor(folder: Path, tools: Any) -> str:
    tools.edit(folder, Q, lambda _: None)
    return Q


def wrong_index(folder: Path, tools: Any) -> str:
    tools.edit(folder, Q, lambda _: None, index=False)
    return Q


def index_without_a_tensor(folder: Path, tools: Any) -> str:
    path = folder / "model.safetensors.index.json"
    raw = json.loads(path.read_text())
    del raw["weight_map"][Q]
    path.write_text(json.dumps(raw))
    return Q


def index_that_leaves_the_folder(folder: Path, tools: Any) -> str:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {Q: "../elsewhere.safetensors"}}))
    return "../elsewhere.safetensors"


def extra_tensor(folder: Path, tools: Any) -> str:
    name = "model.layers.7.self_attn.q_proj.weight"
    path = tools.file_of(folder, Q)
    tensors = tools.read(path)
    tensors[name] = tensors[Q]
    tools.write(path, tensors)
    index = folder / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"][name] = path.name
    index.write_text(json.dumps(raw))
    return name


def wrong_shape(folder: Path, tools: Any) -> str:
    tools.edit(folder, Q, lambda t: (t[0], [t[1][0] // 2, t[1][1] * 2], t[2]))
    return Q


def config_that_disagrees(folder: Path, tools: Any) -> str:
    tools.config(folder, intermediate_size=96)
    return "mlp"


def unknown_type(folder: Path, tools: Any) -> str:
    tools.edit(folder, Q, lambda t: ("F4", t[1], t[2]))
    return Q


def unknown_model_type(folder: Path, tools: Any) -> str:
    tools.config(folder, model_type="llama9")
    return "llama9"


def without_model_type(folder: Path, tools: Any) -> str:
    tools.config(folder, model_type=None)
    return "config.json"


def remote_code(folder: Path, tools: Any) -> str:
    tools.config(folder, auto_map={"AutoModelForCausalLM": "modeling.Model"})
    return "auto_map"


def config_not_json(folder: Path, tools: Any) -> str:
    (folder / "config.json").write_text("{")
    return "config.json"


def config_with_a_key_missing(folder: Path, tools: Any) -> str:
    tools.config(folder, hidden_size=None)
    return "hidden_size"


def another_activation(folder: Path, tools: Any) -> str:
    tools.config(folder, hidden_act="gelu")
    return "hidden_act"


def half_a_rope(folder: Path, tools: Any) -> str:
    tools.config(
        folder, rope_parameters={"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}
    )
    return "partial_rotary_factor"


def sliding_qwen(folder: Path, tools: Any) -> str:
    tools.config(folder, use_sliding_window=True, sliding_window=16, max_window_layers=0, layer_types=None)
    return "use_sliding_window"


DAMAGES: list[Damage] = [
    truncated,
    cut_in_the_header,
    not_safetensors,
    missing_shard,
    removed_tensor,
    wrong_index,
    index_without_a_tensor,
    index_that_leaves_the_folder,
    extra_tensor,
    wrong_shape,
    config_that_disagrees,
    unknown_type,
    unknown_model_type,
    without_model_type,
    remote_code,
    config_not_json,
    config_with_a_key_missing,
    sliding_qwen,
    another_activation,
    half_a_rope,
]


OF_A_TENSOR = (
    truncated,
    removed_tensor,
    wrong_index,
    index_without_a_tensor,
    extra_tensor,
    wrong_shape,
    config_that_disagrees,
    unknown_type,
)


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_a_damaged_checkpoint_is_named_and_nothing_is_written(
    damage: Damage, copy: Any, tools: Any, tmp_path: Path
) -> None:
    folder = copy("qwen3")
    convert(folder, tmp_path / "runs" / "before")
    before = tools.bits(tmp_path / "runs")
    shard = tools.file_of(folder, Q).name
    named = damage(folder, tools)
    actions = [
        lambda: load_model(folder),
        *(lambda out=out: convert(folder, tmp_path / "runs" / out) for out in ("new", "before")),
    ]
    for action in actions:
        with pytest.raises(ModelError) as caught:
            action()
        assert named in caught.value.message
        assert caught.value.fix
        assert "\n" not in caught.value.message
        if damage in OF_A_TENSOR:  # tensor and file
            assert "tensor 'model." in caught.value.message
            assert any(file in caught.value.message for file in (shard, "model.safetensors.index.json"))
    assert tools.bits(tmp_path / "runs") == before
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["before"]


def test_a_missing_expert_is_named(copy: Any, tools: Any) -> None:
    folder = copy("qwen3_moe")
    tools.edit(folder, GATE, lambda _: None)
    with pytest.raises(ModelError, match=rf"\.safetensors.*{GATE}"):
        load_model(folder)


def test_a_missing_mxfp4_block_is_named_as_in_the_source(copy: Any, tools: Any) -> None:
    folder = copy("gpt_oss_mxfp4")
    tools.edit(folder, BLOCKS, lambda _: None)
    with pytest.raises(ModelError, match=rf"index\.json.*{BLOCKS}"):
        load_model(folder)


def test_a_scale_that_is_no_number_stops_the_conversion(copy: Any, tools: Any, tmp_path: Path) -> None:
    """255 is NaN in E8M0; MLX would read it as infinity."""
    folder, name = copy("gpt_oss_mxfp4"), BLOCKS.replace("blocks", "scales")
    shard = tools.edit(folder, name, lambda t: (t[0], t[1], t[2][:9] + b"\xff" + t[2][10:]))
    with pytest.raises(ModelError, match="NaN") as caught:
        convert(folder, tmp_path / "out")
    assert name in caught.value.message
    assert shard.name in caught.value.message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_no_number_stops_the_conversion(
    bad: float, copy: Any, tools: Any, tmp_path: Path
) -> None:
    folder = copy("qwen3")
    shard = tools.edit(
        folder, Q, lambda t: (t[0], t[1], t[2][:100] + tools.bf16(np.array([bad])) + t[2][102:])
    )
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError) as caught:
        convert(folder, tmp_path / "out")
    assert Q in caught.value.message
    assert shard.name in caught.value.message
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("options", [{"dtype": "float16"}, {"dtype": "float16", "quantize": "affine4"}])
def test_a_weight_that_overflows_its_new_type_is_refused(
    options: dict[str, str], copy: Any, tools: Any, tmp_path: Path
) -> None:
    folder = copy("qwen3")
    shard = tools.edit(
        folder, Q, lambda t: (t[0], t[1], t[2][:100] + tools.bf16(np.array([1e6])) + t[2][102:])
    )
    convert(folder, tmp_path / "wide")
    with pytest.raises(ModelError, match="NaN or infinity as") as caught:
        convert(folder, tmp_path / "out", **options)
    assert Q in caught.value.message
    assert shard.name in caught.value.message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("value", "named"), [(np.nan, "NaN or infinite"), (1e38, "with the adapter merged")])
def test_an_adapter_that_is_no_number_is_not_merged(
    value: float, named: str, golden: Any, tmp_path: Path
) -> None:
    model, _ = load_model(golden("qwen3"))
    settings = LoraSettings(2, 4.0, 0.0, ("q_proj",))
    add_lora(model, settings)
    layer = model.model.layers[1].self_attn.q_proj
    layer.lora_a, layer.lora_b = mx.ones_like(layer.lora_a), mx.full(layer.lora_b.shape, value)
    save_adapter(model, tmp_path / "student", settings, golden("qwen3"))
    for write in (to_hf, partial(quantize_folder, mode="affine4")):
        with pytest.raises(ModelError, match=named) as caught:
            write(tmp_path / "student", tmp_path / "out")
        assert Q.removesuffix(".weight") in caught.value.message
        assert not (tmp_path / "out").exists()


def test_a_finished_conversion_survives_a_source_that_got_damaged(
    copy: Any, tools: Any, tmp_path: Path
) -> None:
    folder = copy("qwen3")
    convert(folder, tmp_path / "out")
    before = tools.bits(tmp_path / "out")
    tools.edit(folder, Q, lambda t: (t[0], t[1], tools.bf16(np.array([np.nan])) + t[2][2:]))
    with pytest.raises(ModelError):
        convert(folder, tmp_path / "out", dtype="float32")
    assert tools.bits(tmp_path / "out") == before


def test_pickled_weights_are_never_opened(copy: Any) -> None:
    folder = copy("qwen3")
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin"):
        load_model(folder)


def test_an_overlap_in_a_header_is_refused(copy: Any, tools: Any) -> None:
    folder = copy("qwen3")
    path = tools.file_of(folder, Q)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    first, second = [n for n in header if n.endswith("norm.weight") and "self_attn" not in n][:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    with pytest.raises(ModelError, match="overlap"):
        load_model(folder)


def test_a_name_that_is_neither_folder_nor_hub_model() -> None:
    with pytest.raises(ModelError, match="no such folder"):
        load("./no/such/folder")
    with pytest.raises(ModelError, match="no such folder"):
        load("not-a-model")
    with pytest.raises(ModelError, match="cannot be downloaded"):
        load("nobody/nothing-of-this-name")


def test_a_folder_without_tokenizer_is_named(golden: Any) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        load(golden("qwen3"))


def test_a_tokenizer_with_remote_code_is_refused(copy: Any) -> None:
    folder = copy("qwen3")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["tok.Tok", None]}})
    )
    with pytest.raises(ModelError, match="auto_map"):
        load_tokenizer(folder)


def test_what_the_package_did_not_make_is_not_replaced(golden: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("keep")
    with pytest.raises(FileError, match="not empty and not written by this package"):
        convert(golden("qwen3"), tmp_path / "mine")
    assert (tmp_path / "mine" / "diary.txt").read_text() == "keep"
    with pytest.raises(FileError, match="source itself"):
        convert(golden("qwen3"), golden("qwen3"))


def test_a_full_disk_is_a_file_error_and_the_next_run_goes_on(
    golden: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 40_000

    class FullDisk(FileIO):
        def write(self, data: Any) -> int:
            nonlocal free
            free -= len(data)
            if free < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    def open_on_full_disk(file: Any, *args: Any, **options: Any) -> Any:
        is_shard = str(file).endswith(".safetensors.tmp")
        return FullDisk(file, "w") if is_shard else open(file, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "open", open_on_full_disk, raising=False)
        with pytest.raises(FileError, match="no space left") as caught:
            convert(golden("qwen3"), tmp_path / "out", max_shard_bytes=20_000)
    assert caught.value.fix
    assert not (tmp_path / "out").exists()
    assert convert(golden("qwen3"), tmp_path / "out", max_shard_bytes=20_000).resumed >= 1


def test_unknown_modes_and_types_are_refused_before_anything_is_written(golden: Any, tmp_path: Path) -> None:
    for options in ({"quantize": "affine7"}, {"quantize": "int4"}, {"dtype": "float64"}):
        with pytest.raises(DistillError) as caught:
            convert(golden("qwen3"), tmp_path / "out", **options)
        assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()
