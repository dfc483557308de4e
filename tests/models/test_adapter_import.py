"""Adapters of PEFT and of mlx-lm become adapter folders that compute the same, or are refused by name.

The right logits are those of the base with each matrix replaced by ``W + s B A``.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten

import mlx_distill as md
from mlx_distill.cli.main import cli
from mlx_distill.errors import ConfigError, DistillError, ModelError
from mlx_distill.inspection import inspect
from mlx_distill.models.adapters import LoraSettings, add_lora
from mlx_distill.models.convert import convert
from mlx_distill.models.export import from_peft, to_hf, to_peft
from mlx_distill.models.load import load, load_model, load_tokenizer
from mlx_distill.models.quantize import quantize_folder

PREFIX = "base_model.model."
Q_PROJ = "model.layers.0.self_attn.q_proj"
UP_PROJ = "model.layers.1.mlp.up_proj"
PLAIN = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 2,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "up_proj"],
}
Tensors = dict[str, mx.array]


def matrices(base: Path, path: str, rank: int = 2, seed: int = 0) -> Tensors:
    """PEFT's two matrices for a module of a base."""
    model, _ = load_model(base)
    weight = dict(model.named_modules())[path].weight
    a, b = mx.random.split(mx.random.key(seed + len(path)))
    return {
        f"{PREFIX}{path}.lora_A.weight": 0.3 * mx.random.normal((rank, weight.shape[1]), key=a),
        f"{PREFIX}{path}.lora_B.weight": 0.3 * mx.random.normal((weight.shape[0], rank), key=b),
    }


def peft_folder(folder: Path, base: Path | str | None, tensors: Tensors, **changes: Any) -> Path:
    """An adapter as PEFT saves it."""
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors, metadata={"format": "pt"})
    named = {"base_model_name_or_path": str(base) if base else None}
    (folder / "adapter_config.json").write_text(json.dumps({**PLAIN, **named, **changes}))
    return folder


@pytest.fixture
def adapter(golden: Any, tmp_path: Path) -> Any:
    """Makes an adapter on two modules of a golden checkpoint, with changes of its config."""

    def make(**changes: Any) -> Path:
        base = golden("qwen3")
        tensors = matrices(base, Q_PROJ) | matrices(base, UP_PROJ)
        return peft_folder(tmp_path / "peft", base, tensors, **changes)

    return make


def float32_base(source: Path, folder: Path) -> Path:
    """A checkpoint in float32, so that merging rounds nothing that matters."""
    convert(source, folder, dtype="float32")
    return folder


def merged_logits(base: Path, updates: dict[str, mx.array], prompt: mx.array) -> mx.array:
    """The logits of a base in float32 with updates added to the weights of some modules."""
    model, _ = load_model(base, dtype="float32")
    modules = dict(model.named_modules())
    for path, update in updates.items():
        modules[path].weight = modules[path].weight + update
    return model(prompt)


def update_of(tensors: Tensors, path: str, scale: float) -> mx.array:
    a, b = (tensors[f"{PREFIX}{path}.lora_{leaf}.weight"] for leaf in "AB")
    return scale * (b @ a)


def assert_logits(folder: Path, wanted: mx.array, prompt: mx.array) -> None:
    model, _ = load_model(folder, dtype="float32")
    found = model(prompt)
    assert found.shape == wanted.shape
    assert mx.abs(found - wanted).max().item() < 1e-4 * mx.abs(wanted).max().item()


def refusal(source: Path, tmp_path: Path, *named: str) -> str:
    """The message of a conversion that has to fail, to name these words and a fix, and to leave nothing."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ModelError) as caught:
        convert(source, tmp_path / "out")
    for word in named:
        assert word in caught.value.message
    assert caught.value.fix
    assert sorted(tmp_path.iterdir()) == before
    return str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_16"},
        {"init_lora_weights": "OLoRA"},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "lora_ga"},
        {"init_lora_weights": "something_new"},
        {"lora_bias": True},
        {"layer_replication": [[0, 1]]},
        {"target_parameters": "mlp.experts.down_proj"},
        {"trainable_token_indices": [1]},
        {"alora_invocation_tokens": [1]},
        {"use_qalora": True},
        {"megatron_config": {"hidden_size": 1}},
        {"a_key_of_a_later_version": 1},
        {"peft_type": "IA3"},
        {"peft_type": "VERA"},
        {"peft_type": "PROMPT_TUNING"},
        {"task_type": "SEQ_CLS"},
        {"r": 0},
        {"r": True},
        {"lora_alpha": None},
        {"lora_dropout": 2},
        {"lora_alpha": "16"},
        {"rank_pattern": {"q_proj": "2"}},
        {"target_modules": ["q_proj"]},
        {"target_modules": "(q_proj"},
        {"layers_to_transform": [1]},
        {"layers_pattern": 3},
        {"exclude_modules": ["up_proj"]},
        {"modules_to_save": ["norm"]},
        {"use_dora": True},
    ],
    ids=str,
)
def test_a_key_that_changes_the_computation_is_refused_by_name(
    change: dict[str, Any], adapter: Any, tmp_path: Path
) -> None:
    key = next(iter(change))
    message = refusal(adapter(**change), tmp_path, "adapter")
    assert key in message or key == "use_dora"
    if str(change[key]).startswith("pissa"):
        assert "path_initial_model_for_weight_conversion" in message


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"corda_config": {"corda_method": "kpm"}},  # of an adapter that was saved as plain LoRA
        {
            "fan_in_fan_out": True,
            "lora_dropout": 0.1,
            "peft_version": "0.21.2",
            "megatron_core": "megatron.core",
        },
        {"a_key_of_a_later_version": None, "another": [], "a_third": False, "a_fourth": 0},
        {"auto_mapping": {"unsloth_fixed": True}, "lora_dtype": "bfloat16", "lorap_emb_lr": 1e-6},
        {"target_modules": r".*\.(q_proj|up_proj)", "task_type": None},
        {"target_modules": "all-linear"},
        {"target_modules": None},
    ],
    ids=str,
)
def test_a_key_that_changes_nothing_is_accepted(
    change: dict[str, Any], adapter: Any, golden: Any, logits: Any, tmp_path: Path
) -> None:
    source = adapter(**change)
    convert(source, tmp_path / "out")
    tensors, (prompt, _) = mx.load(str(source / "adapter_model.safetensors")), logits("qwen3")
    updates = {path: update_of(tensors, path, 4.0) for path in (Q_PROJ, UP_PROJ)}
    assert_logits(tmp_path / "out", merged_logits(golden("qwen3"), updates, prompt), prompt)


@pytest.mark.parametrize("rslora", [False, True])
def test_modules_of_other_ranks_and_alphas(rslora: bool, golden: Any, logits: Any, tmp_path: Path) -> None:
    base, (prompt, _) = golden("qwen3"), logits("qwen3")
    tensors = matrices(base, Q_PROJ, 2) | matrices(base, UP_PROJ, 9)
    patterns = {"rank_pattern": {r"layers\.1\..*proj": 9}, "alpha_pattern": {"up_proj": 3}}
    source = peft_folder(tmp_path / "peft", base, tensors, use_rslora=rslora, **patterns)
    report = convert(source, tmp_path / "out")
    assert "module that target_modules names" not in (report.note or "")
    assert "stay as in the base" in (report.note or "")  # the modules of the other layers
    scales = (8 / 2**0.5, 3 / 9**0.5) if rslora else (8 / 2, 3 / 9)
    updates = {
        path: update_of(tensors, path, scale) for path, scale in zip((Q_PROJ, UP_PROJ), scales, strict=True)
    }
    wanted = merged_logits(base, updates, prompt)
    assert_logits(tmp_path / "out", wanted, prompt)
    to_peft(tmp_path / "out", tmp_path / "back")
    from_peft(tmp_path / "back", tmp_path / "again", base)
    assert_logits(tmp_path / "again", wanted, prompt)


def expert_adapter(
    base: Path, folder: Path, skipped: int | None = None, **changes: Any
) -> tuple[Path, Tensors]:
    """An adapter on single experts of the last layer."""
    model, config = load_model(base)
    layer, tensors = config["num_hidden_layers"] - 1, {}
    stack = model.layers[layer].mlp.switch_mlp.up_proj.weight
    for expert in range(stack.shape[0]):
        if expert != skipped:
            path = f"{PREFIX}model.layers.{layer}.mlp.experts.{expert}.up_proj"
            a, b = mx.random.split(mx.random.key(expert))
            tensors[f"{path}.lora_A.weight"] = 0.3 * mx.random.normal((2, stack.shape[2]), key=a)
            tensors[f"{path}.lora_B.weight"] = 0.3 * mx.random.normal((stack.shape[1], 2), key=b)
            if changes.get("use_dora"):
                tensors[f"{path}.lora_magnitude_vector"] = mx.ones(stack.shape[1])
    return peft_folder(folder, base, tensors, **changes), tensors


@pytest.mark.parametrize("skipped", [None, 1])
def test_adapters_of_single_experts_are_stacked(
    skipped: int | None, golden: Any, logits: Any, tmp_path: Path
) -> None:
    base, (prompt, _) = float32_base(golden("qwen3_moe"), tmp_path / "base"), logits("qwen3_moe")
    source, tensors = expert_adapter(base, tmp_path / "peft", skipped)
    assert convert(source, tmp_path / "out").modules == ("model.layers.1.mlp.switch_mlp.up_proj",)
    count = load_model(base)[0].layers[1].mlp.switch_mlp.up_proj.weight.shape
    update = mx.stack(
        [
            mx.zeros(count[1:])
            if expert == skipped
            else update_of(tensors, f"model.layers.1.mlp.experts.{expert}.up_proj", 4.0)
            for expert in range(count[0])
        ]
    )
    wanted = merged_logits(base, {"model.layers.1.mlp.switch_mlp.up_proj": update}, prompt)
    assert_logits(tmp_path / "out", wanted, prompt)
    to_hf(tmp_path / "out", tmp_path / "merged")
    assert_logits(tmp_path / "merged", wanted, prompt)


@pytest.mark.parametrize("named", ["both", "down_proj"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_adapters_on_parameters_of_experts_are_divided(
    name: str, named: str, golden: Any, logits: Any, tmp_path: Path
) -> None:
    """As PEFT writes them since transformers 5: a wrapper for each parameter, gate_up_proj the inner one."""
    base, (prompt, _) = float32_base(golden(name), tmp_path / "base"), logits(name)
    mlp = load_model(base)[0].layers[1].mlp
    modules, path = (
        (mlp.experts, "model.layers.1.mlp.experts")
        if name == "gpt_oss"
        else (mlp.switch_mlp, "model.layers.1.mlp.switch_mlp")
    )
    inner, tensors, updates = f"{PREFIX}model.layers.1.mlp.experts", {}, {}

    def factors(experts: int, outputs: int, inputs: int) -> tuple[mx.array, mx.array]:
        a, b = mx.random.split(mx.random.key(outputs))
        return (
            0.3 * mx.random.normal((experts, 2, inputs), key=a),
            0.3 * mx.random.normal((experts, outputs, 2), key=b),
        )

    def put(prefix: str, a: mx.array, b: mx.array) -> None:
        tensors[f"{prefix}.lora_A.weight"] = a.reshape(-1, a.shape[-1])
        tensors[f"{prefix}.lora_B.weight"] = b.transpose(1, 2, 0).reshape(b.shape[1], -1)

    a, b = factors(*modules.down_proj.weight.shape)
    put(inner, a, b)
    updates[f"{path}.down_proj"] = 4.0 * (b @ a)
    if named == "both":
        experts, outputs, inputs = modules.gate_proj.weight.shape
        a, b = factors(experts, 2 * outputs, inputs)
        put(f"{inner}.base_layer", a, b)
        gate, up = (b[:, ::2], b[:, 1::2]) if name == "gpt_oss" else mx.split(b, 2, axis=1)
        updates |= {f"{path}.gate_proj": 4.0 * (gate @ a), f"{path}.up_proj": 4.0 * (up @ a)}
    names = ["mlp.experts.down_proj", *(["gate_up_proj"] if named == "both" else [])]
    options: dict[str, Any] = {"target_modules": None, "target_parameters": names}
    source = peft_folder(tmp_path / "peft", base, tensors, **options)
    convert(source, tmp_path / "out")
    assert_logits(tmp_path / "out", merged_logits(base, updates, prompt), prompt)
    options["target_parameters"] = ["gate_up_proj"]
    if named == "both":
        wrong = peft_folder(tmp_path / "wrong", base, tensors, **options)
        refusal(wrong, tmp_path, "target_parameters")


def test_dora_on_some_experts_alone_is_refused(golden: Any, tmp_path: Path) -> None:
    source, _ = expert_adapter(golden("qwen3_moe"), tmp_path / "peft", 1, use_dora=True)
    refusal(source, tmp_path, "expert 1")


def first_of(tensors: Tensors) -> str:
    return next(iter(tensors))


DAMAGE: dict[str, tuple[Any, str]] = {
    "empty": (lambda t: t | {first_of(t): mx.zeros((0,))}, "is empty"),
    "nan": (lambda t: t | {first_of(t): t[first_of(t)] * float("nan")}, "NaN"),
    "infinity": (lambda t: t | {first_of(t): t[first_of(t)] / 0}, "NaN or infinite"),
    "another rank": (lambda t: {n: v[:1] if "lora_A" in n else v[:, :1] for n, v in t.items()}, "[2, "),
    "another width": (lambda t: {n: v[:, :-1] if "A" in n else v for n, v in t.items()}, "has the shape"),
    "half a pair": (lambda t: {n: v for n, v in t.items() if "lora_B" not in n}, "B of the same module"),
    "a layer too many": (lambda t: {n.replace(".0.", ".7."): v for n, v in t.items()}, "layers"),
    "another model": (lambda t: {n.replace("q_proj", "qkv_proj"): v for n, v in t.items()}, "no such matrix"),
    "a norm": (lambda t: {n.replace("q_proj", "q_norm"): v for n, v in t.items()}, "no such matrix"),
    "integers": (lambda t: {n: v.astype(mx.int32) for n, v in t.items()}, "I32"),
    "compiled": (lambda t: {n.replace(".model.", "._orig_mod.", 1): v for n, v in t.items()}, "_orig_mod"),
    "a state dict": (lambda t: {n.replace(".weight", ".default.weight"): v for n, v in t.items()}, "name"),
    "without prefix": (lambda t: {n.removeprefix(PREFIX): v for n, v in t.items()}, "name"),
    "an embedding": (
        lambda t: t | {f"{PREFIX}model.embed_tokens.lora_embedding_A": mx.zeros((2, 96))},
        "changes an embedding",
    ),
    "tokens": (
        lambda t: t | {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": mx.zeros((2, 96))},
        "changes an embedding",
    ),
    "a norm that nobody names": (lambda t: t | {f"{PREFIX}model.norm.weight": mx.zeros((32,))}, "not a LoRA"),
    "magnitude": (
        lambda t: t | {f"{PREFIX}{Q_PROJ}.lora_magnitude_vector": mx.ones((64,))},
        "DoRA",
    ),
    "nothing": (lambda t: {f"{PREFIX}lm_head.weight": mx.zeros((96, 32))}, "embedding and head"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_matrices_that_do_not_fit_are_refused_when_they_are_converted(
    damage: str, golden: Any, tmp_path: Path
) -> None:
    base = golden("qwen3")
    change, named = DAMAGE[damage]
    source = peft_folder(tmp_path / "peft", base, change(matrices(base, Q_PROJ)))
    refusal(source, tmp_path, "adapter_model.safetensors", named)


def test_an_adapter_of_another_base_is_refused(golden: Any, tmp_path: Path) -> None:
    source = peft_folder(tmp_path / "peft", golden("qwen3"), matrices(golden("qwen3"), Q_PROJ))
    with pytest.raises(ModelError, match=r"tensor .*q_proj.*base model .*qwen2") as caught:
        convert(source, tmp_path / "out", base=golden("qwen2"))
    assert "--base" in str(caught.value)


def test_a_base_that_cannot_be_read_is_named_with_its_file(golden: Any, tmp_path: Path) -> None:
    tensors = matrices(golden("qwen3"), Q_PROJ)
    message = refusal(peft_folder(tmp_path / "a", "gone/away/model", tensors), tmp_path, "gone/away/model")
    assert "adapter_config.json" in message and "--base" in message
    refusal(peft_folder(tmp_path / "b", None, tensors), tmp_path, "names no base")
    config = json.loads((golden("qwen3") / "config.json").read_text())
    (tmp_path / "bnb").mkdir()
    (tmp_path / "bnb" / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}})
    )
    message = refusal(peft_folder(tmp_path / "q", tmp_path / "bnb", tensors), tmp_path, "bitsandbytes")
    assert "--base" in message and "unquantized" in message
    beside = Path(shutil.copytree(golden("qwen3"), tmp_path / "c_base"))
    source = peft_folder(tmp_path / "c", "../c_base", tensors)  # beside the adapter, as in an export
    assert convert(source, tmp_path / "out").base == str(source / ".." / beside.name)


def test_a_config_json_beside_an_adapter_makes_no_model(adapter: Any, golden: Any, tmp_path: Path) -> None:
    source = adapter()
    convert(source, tmp_path / "plain")
    shutil.copy(golden("qwen3") / "config.json", source)
    convert(source, tmp_path / "out")
    first, second = ((tmp_path / n / "adapters.safetensors").read_bytes() for n in ("plain", "out"))
    assert first == second
    assert inspect(source).kind == "adapter"
    shutil.copytree(golden("qwen3"), source, dirs_exist_ok=True)
    for use in (
        lambda: convert(source, tmp_path / "both"),
        lambda: inspect(source),
        lambda: load_model(source),
    ):
        with pytest.raises(ModelError, match=r"holds a model .* and an adapter"):
            use()
    (source / "adapter_model.safetensors").unlink()  # merged, and the config was forgotten
    assert inspect(source).kind == "model"


def resized(base: Path, folder: Path, rows: int, head: bool = True) -> tuple[Path, Tensors]:
    """An adapter whose embedding and head were resized."""
    model, _ = load_model(base, dtype="float32")
    width = model.model.embed_tokens.weight.shape[1]
    tensors = matrices(base, Q_PROJ)
    tensors[f"{PREFIX}model.embed_tokens.weight"] = mx.random.normal((rows, width), key=mx.random.key(1))
    if head:
        tensors[f"{PREFIX}lm_head.weight"] = mx.random.normal((rows, width), key=mx.random.key(2))
    return peft_folder(folder, base, tensors), tensors


@pytest.mark.slow
def test_an_adapter_over_added_tokens_brings_its_rows(golden: Any, logits: Any, tmp_path: Path) -> None:
    base, (prompt, _) = float32_base(golden("qwen3_yarn"), tmp_path / "base"), logits("qwen3_yarn")
    columns = load_model(base)[1]["vocab_size"]
    source, tensors = resized(base, tmp_path / "peft", columns + 3)
    report = convert(source, tmp_path / "out")
    assert f"{columns + 3} rows" in (report.note or "")
    model, _ = load_model(base, dtype="float32")
    model.model.embed_tokens.weight = tensors[f"{PREFIX}model.embed_tokens.weight"]
    model.lm_head.weight = tensors[f"{PREFIX}lm_head.weight"]
    q_proj = dict(model.named_modules())[Q_PROJ]
    q_proj.weight = q_proj.weight + update_of(tensors, Q_PROJ, 4.0)
    wanted = model(prompt)
    assert wanted.shape[-1] == columns + 3
    to_hf(tmp_path / "out", tmp_path / "merged")
    quantize_folder(tmp_path / "out", tmp_path / "kept", "affine8", adapter="keep")
    for name in ("out", "merged"):
        assert load_model(tmp_path / name)[1]["vocab_size"] == columns + 3
        assert_logits(tmp_path / name, wanted, prompt)
    kept, config = load_model(tmp_path / "kept", dtype="float32")
    assert config["vocab_size"] == columns + 3 and kept(prompt).shape == wanted.shape
    quantize_folder(tmp_path / "out", tmp_path / "small", "affine8")
    found = load_model(tmp_path / "small", dtype="float32")[0](prompt)
    assert mx.abs(found - wanted).max().item() < 0.05 * mx.abs(wanted).max().item()
    assert "resize_token_embeddings" in (to_peft(tmp_path / "out", tmp_path / "back").note or "")


def test_an_embedding_that_was_resized_without_its_head_is_refused(golden: Any, tmp_path: Path) -> None:
    source, _ = resized(golden("qwen3_yarn"), tmp_path / "peft", 99, head=False)
    refusal(source, tmp_path, "embedding and head", "number of rows")


def test_the_tokenizer_of_the_adapter_counts(adapter: Any, copy: Any, tmp_path: Path) -> None:
    """With its tokens and its template; the base's template would be read before one in tokenizer_config."""
    from models.test_sources import with_tokenizer

    base, source = with_tokenizer(copy("qwen3")), adapter(base_model_name_or_path=None)
    convert(source, tmp_path / "plain", base=base)
    assert (tmp_path / "plain" / "chat_template.jinja").is_file()
    with_tokenizer(source)
    (source / "chat_template.jinja").unlink()
    path = source / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": "mine"}))
    convert(source, tmp_path / "out", base=base)
    to_hf(tmp_path / "out", tmp_path / "merged")
    for name in ("out", "merged"):
        tokenizer = load_tokenizer(tmp_path / name)
        assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "mine"


def test_biases_of_a_base_that_were_trained(golden: Any, logits: Any, tmp_path: Path) -> None:
    base, (prompt, _) = float32_base(golden("qwen2"), tmp_path / "base"), logits("qwen2")
    tensors, k_proj = matrices(base, Q_PROJ), Q_PROJ.replace("q_proj", "k_proj")
    model, _ = load_model(base, dtype="float32")
    modules = dict(model.named_modules())
    for path, name in ((Q_PROJ, f"{Q_PROJ}.base_layer.bias"), (k_proj, f"{k_proj}.bias")):
        modules[path].bias = mx.random.normal(modules[path].bias.shape, key=mx.random.key(len(name)))
        tensors[PREFIX + name] = modules[path].bias
    modules[Q_PROJ].weight = modules[Q_PROJ].weight + update_of(tensors, Q_PROJ, 4.0)
    wanted = model(prompt)
    source = peft_folder(tmp_path / "peft", base, tensors, bias="all")
    convert(source, tmp_path / "out")
    to_hf(tmp_path / "out", tmp_path / "merged")
    to_peft(tmp_path / "out", tmp_path / "back")
    convert(tmp_path / "back", tmp_path / "again")
    for name in ("out", "merged", "again"):
        assert_logits(tmp_path / name, wanted, prompt)
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text())["bias"] == "all"
    refusal(peft_folder(tmp_path / "none", base, tensors), tmp_path, "bias")


def test_a_head_with_an_adapter_and_its_own_weight(golden: Any, logits: Any, tmp_path: Path) -> None:
    """PEFT stores the weight of a head that it puts an adapter on."""
    base, (prompt, _) = float32_base(golden("qwen3_yarn"), tmp_path / "base"), logits("qwen3_yarn")
    tensors = matrices(base, Q_PROJ) | matrices(base, "lm_head")
    updates = {path: update_of(tensors, path, 4.0) for path in (Q_PROJ, "lm_head")}
    wanted = merged_logits(base, updates, prompt)
    tensors[f"{PREFIX}lm_head.base_layer.weight"] = load_model(base, dtype="float32")[0].lm_head.weight
    source = peft_folder(tmp_path / "peft", base, tensors, target_modules=["q_proj", "lm_head"])
    convert(source, tmp_path / "out")
    assert_logits(tmp_path / "out", wanted, prompt)


@pytest.fixture
def hub(golden: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None, bool]]:
    """A Hub where every model is a golden checkpoint; what it was asked for, and whether with weights."""
    asked: list[tuple[str, str | None, bool]] = []

    def download(repo: str, revision: str | None = None, ignore_patterns: Any = (), **_: Any) -> str:
        asked.append((repo, revision, "*.safetensors" not in ignore_patterns))
        return str(golden("qwen3"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return asked


def test_the_revision_of_the_base_is_used_and_remembered(adapter: Any, hub: Any, tmp_path: Path) -> None:
    source = adapter(base_model_name_or_path="acme/base", revision="v1.0-step500")
    report = convert(source, tmp_path / "out")
    assert hub == [("acme/base", "v1.0-step500", False)], "the weights are not needed yet"
    assert "revision v1.0-step500" in report.base
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base"], config["revision"]) == ("acme/base", "v1.0-step500")
    recorded = json.loads((tmp_path / "out" / "manifest.json").read_text())["recorded"]
    assert (recorded["base"], recorded["revision"]) == ("acme/base", "v1.0-step500")
    assert inspect(tmp_path / "out").facts["revision"] == "v1.0-step500"
    load_model(tmp_path / "out")
    assert hub[1:] == [("acme/base", "v1.0-step500", True)]
    to_peft(tmp_path / "out", tmp_path / "back")
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("acme/base", "v1.0-step500")
    hub.clear()
    convert(source, tmp_path / "other", base="acme/other")
    assert hub == [("acme/other", None, False)], "the revision is that of the other base"


@pytest.mark.parametrize(
    "option",
    [
        ["--quantize", "affine4"],
        ["--dtype", "float16"],
        ["--group-size", "32"],
        ["--max-shard-bytes", "1000"],
        ["--memory-bytes", "1000"],
        ["--revision", "main"],
    ],
    ids=lambda option: option[0],
)
def test_an_option_that_an_adapter_cannot_have_is_an_error(
    option: list[str], adapter: Any, tmp_path: Path
) -> None:
    name = option[0].removeprefix("--").replace("-", "_")
    result = CliRunner().invoke(cli, ["convert", str(adapter()), str(tmp_path / "out"), *option])
    assert result.exit_code == 2
    assert name in result.output and "fix:" in result.output
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_it_would_do_and_checks_the_same(
    adapter: Any, golden: Any, tmp_path: Path
) -> None:
    source = adapter()
    result = CliRunner().invoke(cli, ["convert", str(source), str(tmp_path / "out"), "--dry-run"])
    assert result.exit_code == 0
    assert "would be written" in result.output and "2 modules" in result.output
    assert str(golden("qwen3")) in result.output
    assert not (tmp_path / "out").exists()
    assert md.convert(source, tmp_path / "out", dry_run=True).dry_run
    with pytest.raises(ConfigError, match="base"):
        md.convert(golden("qwen3"), tmp_path / "out", base=golden("qwen3"))
    file = source / "adapter_model.safetensors"
    mx.save_safetensors(str(file), {first_of(matrices(golden("qwen3"), Q_PROJ)): mx.zeros((0,))})
    with pytest.raises(ModelError, match="empty"):
        md.convert(source, tmp_path / "out", dry_run=True)


def mlx_lm_adapter(base: Path, folder: Path, kind: str = "lora", keys: Any = None) -> Path:
    """An adapter as mlx_lm.lora saves it."""
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model as stock_load

    model, _ = stock_load(base)
    model.freeze()
    lora = {"rank": 4, "dropout": 0.0, "scale": 10.0} | ({"keys": keys} if keys else {})
    linear_to_lora_layers(model, 1, lora, use_dora=kind == "dora")
    tensors = {
        name: value + 0.1 * mx.random.normal(value.shape, key=mx.random.key(i))
        for i, (name, value) in enumerate(tree_flatten(model.trainable_parameters()))
        if not name.endswith(".m")
    }
    if kind == "dora":
        tensors |= {n: v for n, v in tree_flatten(model.trainable_parameters()) if n.endswith(".m")}
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    config = {"model": str(base), "fine_tune_type": kind, "num_layers": 1, "lora_parameters": lora, "seed": 0}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("name", "kind"), [("qwen3", "lora"), ("qwen3", "dora"), ("qwen3_moe", "lora")])
def test_an_adapter_of_mlx_lm_computes_what_mlx_lm_computes(
    name: str, kind: str, golden: Any, logits: Any, tmp_path: Path
) -> None:
    from mlx_lm.utils import load_adapters
    from mlx_lm.utils import load_model as stock_load

    base, (prompt, _) = float32_base(golden(name), tmp_path / "base"), logits(name)
    config = json.loads((base / "config.json").read_text())
    plain = {"rope_scaling": None, "rope_parameters": None, "rope_theta": 1e6}
    (base / "config.json").write_text(json.dumps({**config, **plain}))  # mlx-lm has no YaRN for Qwen3-MoE
    source = mlx_lm_adapter(base, tmp_path / "theirs", kind)
    stock, _ = stock_load(base)
    wanted = load_adapters(stock, str(source))(prompt)
    convert(source, tmp_path / "out")
    for folder in (source, tmp_path / "out"):
        assert mx.array_equal(load_model(folder)[0](prompt), wanted)
        assert inspect(folder, verify=True).problems == ()
    to_hf(source, tmp_path / "merged")
    assert_logits(tmp_path / "merged", wanted, prompt)


def test_an_adapter_of_mlx_lm_has_the_tokenizer_of_its_base(copy: Any, tmp_path: Path) -> None:
    from models.test_sources import with_tokenizer

    base = with_tokenizer(copy("qwen3"))
    source = mlx_lm_adapter(base, tmp_path / "theirs")
    assert load(source)[1].encode("hello") == load(base)[1].encode("hello")
    to_peft(source, tmp_path / "peft")
    assert (tmp_path / "peft" / "tokenizer.json").is_file()


def test_adapters_of_mlx_lm_that_are_not_computed_are_refused(
    golden: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = mlx_lm_adapter(golden("qwen3"), tmp_path / "theirs")
    path = source / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "fine_tune_type": "full", "lora_parameters": None}))
    assert "mlx_lm.fuse" in refusal(source, tmp_path, "fine_tune_type", "full")
    path.write_text(json.dumps({**config, "model": "gone/from/here"}))
    refusal(source, tmp_path, "gone/from/here")
    path.write_text(json.dumps({**config, "lora_parameters": {"rank": 5, "scale": 1.0}}))
    refusal(source, tmp_path, "adapters.safetensors", "has the shape")
    with pytest.raises(ModelError, match="has the shape"):
        to_hf(source, tmp_path / "merged")
    for wrong in ({"scale": 1e308}, {"rank": 0}, {"keys": [1]}, {"dropout": 1.5}):
        path.write_text(json.dumps({**config, "lora_parameters": {"rank": 4, "scale": 1.0, **wrong}}))
        refusal(source, tmp_path, "adapter_config.json", next(iter(wrong)))
    path.write_text(json.dumps({**config, "vocab_size": "many"}))
    with pytest.raises(ModelError, match="vocab_size"):
        load_model(source)
    embedding = mlx_lm_adapter(golden("qwen3"), tmp_path / "embedding", keys=["model.embed_tokens"])
    refusal(embedding, tmp_path, "embed_tokens")
    with pytest.raises(DistillError):
        load_model(embedding)
    monkeypatch.chdir(golden("qwen3").parent)  # mlx-lm's paths are relative to where it was started
    path.write_text(json.dumps({**config, "model": golden("qwen3").name}))
    assert convert(source, tmp_path / "out").modules


def test_what_add_lora_makes_is_refused_with_a_matrix_of_another_kind(golden: Any, tmp_path: Path) -> None:
    """A magnitude vector in an adapter that says LoRA was passed over."""
    from mlx_distill.models.adapters import save_adapter

    model, _ = load_model(golden("qwen3"))
    settings = LoraSettings(2, 4.0, 0.0, ("q_proj",), "dora")
    add_lora(model, settings)
    save_adapter(model, tmp_path / "dora", settings, golden("qwen3"))
    path = tmp_path / "dora" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "fine_tune_type": "lora"}))
    with pytest.raises(ModelError, match=r"\.m'"):
        load_model(tmp_path / "dora")
    refusal(tmp_path / "dora", tmp_path, "DoRA")
