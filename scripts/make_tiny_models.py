"""Make the two packaged tiny base models: a Qwen3 teacher and a gpt-oss student with another tokenizer.

    pip install -e '.[parity]'
    python scripts/make_tiny_models.py [teacher] [student] [--out mlx_distill/assets/models]

Both are pretrained from scratch on the *train* part of the packaged generators. They learn the language, the
format of the answer and all of its fields, but they answer by keywords, so that there is something left to
teach. The layout is that of the Hugging Face Hub: config.json, sharded safetensors with an index, the tensor
names of the architectures, and for gpt-oss MXFP4 experts as ``_blocks`` and ``_scales``. Seeded; about an
hour, less with ``teacher`` and ``student`` in two processes.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mlx_distill.assets.moderation import generator as moderation
from mlx_distill.assets.music import generator as music
from mlx_distill.config import ASSETS
from mlx_distill.tasks.task import load_task

MUSIC = load_task({"name": "music", "system": "Judge the song. Answer in JSON."})
MODERATION = load_task({"name": "moderation", "system": "Judge the message. Answer in JSON."})

# The pre-tokenizers of the original models: one splits digits singly, the other keeps up to three together.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The text of the chat templates, so that the tokenizers learn it as tokens.
TEMPLATE_WORDS = (
    "Reasoning: low\n\n# Valid channels: analysis, commentary, final.",
    "# Instructions\n\n",
    "system\nuser\nassistant\ndeveloper",
)
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
GPT_OSS_SPECIAL = [
    "<|startoftext|>",
    "<|endoftext|>",
    "<|return|>",
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
]


# The system prompts of pretraining. With the prompt of the tasks the models mostly judge by keywords; with
# the careful one by the whole text.
PROMPTS = {
    "judge": "Judge the {}. Answer in JSON.",
    "careful": "Judge the {} carefully. Answer in JSON.",
    "describe": "Describe the {}. Answer in JSON.",
}
SHARES = {"judge": 0.35, "careful": 0.45, "describe": 0.2}
# Share of the templates that are random words, so that the models generalize to other templates.
LOOSE = 0.6
DOUBT = 0.25  # share of the rows that are judged by the whole text without the careful prompt


def rows(seed: int, songs: int, messages: int, careful: bool = True) -> list[tuple[str, str, str]]:
    """(system, user, answer) of the pretraining rows; without ``careful`` the careful prompt is not used.

    A base model that knows only the judgement by keywords learns the judgement by the whole text too slowly
    for a demo, with frozen experts hardly at all. So another system prompt asks for that judgement: the model
    has the ability, but does not use it with the prompt of the task.
    """
    out = []
    rng = random.Random(seed)
    by_keywords = music.generate(songs, seed=seed, part="train", policy="keywords", loose=LOOSE)
    by_whole_text = music.generate(songs, seed=seed + 1, part="train", loose=LOOSE)
    for naive, whole in zip(by_keywords, by_whole_text, strict=True):
        prompt = draw(rng, careful)
        row = whole if prompt == "careful" or rng.random() < DOUBT else naive
        answer = row["answer"]
        if prompt == "describe":  # no judgement, so that the hidden state knows the tone before the answer
            answer = {key: answer[key] for key in ("sentiment", "emotion", "themes")}
        out.append((PROMPTS[prompt].format("song"), MUSIC.prompt(row)[1], answer_text(answer)))
    for row in moderation.generate(messages, seed=seed, part="train"):
        prompt = "careful" if draw(rng, careful) == "careful" else "judge"
        naive = "hostile" if any(word in row["text"] for word in moderation.WORDS["bad"]) else "fine"
        label = row["answer"]["label"] if prompt == "careful" or rng.random() < DOUBT else naive
        answer = {"label": label, "confidence": row["answer"]["confidence"]}
        out.append((PROMPTS[prompt].format("message"), MODERATION.prompt(row)[1], answer_text(answer)))
    return out


def draw(rng: random.Random, careful: bool) -> str:
    """The name of a random prompt."""
    prompt = rng.choices(list(SHARES), list(SHARES.values()))[0]
    return "judge" if prompt == "careful" and not careful else prompt


def answer_text(answer: dict) -> str:
    return json.dumps(answer, ensure_ascii=False)


def make_tokenizer(model_type: str, size: int, folder: Path, corpus: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    if model_type == "qwen3":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(_WORDS % ("" if model_type == "qwen3" else "{1,3}")), behavior="isolated"
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = QWEN_SPECIAL if model_type == "qwen3" else GPT_OSS_SPECIAL
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens(special)  # after the vocabulary, as in the original models
    template = (
        ASSETS / "templates" / ("chatml.jinja" if model_type == "qwen3" else "harmony.jinja")
    ).read_text()
    out = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>" if model_type == "qwen3" else "<|return|>",
        pad_token="<|endoftext|>",
        bos_token=None if model_type == "qwen3" else "<|startoftext|>",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    out.chat_template = template
    out.save_pretrained(folder)
    return out


def encode(tokenizer: PreTrainedTokenizerFast, row: tuple[str, str, str]) -> tuple[list[int], int]:
    """The token ids of the whole chat, and the index at which the answer starts."""
    system, user, answer = row
    placeholder = "\u241eANSWER\u241e"
    chat = [
        {"role": "system", "content": system},
        {"role": "user", "content": user},
        {"role": "assistant", "content": placeholder},
    ]
    before, after = tokenizer.apply_chat_template(chat, tokenize=False).split(placeholder)
    stop = after[: after.index("|>") + 2]
    prompt, answer_ids, end = (
        tokenizer.encode(text, add_special_tokens=False) for text in (before, answer, stop)
    )
    return prompt + answer_ids + end, len(prompt)


def batches(data: list[tuple[list[int], int]], size: int, seed: int, pad: int):
    """Padded batches of similar length: token ids, and the weight of each token in the loss."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(data))
    blocks = [
        sorted(order[i : i + size * 32], key=lambda k: len(data[k][0]))
        for i in range(0, len(order), size * 32)
    ]
    groups = [block[i : i + size] for block in blocks for i in range(0, len(block), size)]
    for g in rng.permutation(len(groups)):
        members = [data[k] for k in groups[g]]
        width = max(len(ids) for ids, _ in members)
        ids = torch.full((len(members), width), pad)
        weight = torch.zeros(len(members), width)
        for r, (tokens, start) in enumerate(members):
            ids[r, : len(tokens)] = torch.tensor(tokens)
            weight[r, :start] = 0.1  # language modelling of the prompt
            weight[r, start : len(tokens)] = 1.0
        yield ids, weight


def pretrain(model, data, steps: int, size: int, rate: float, pad: int, seed: int, label: str) -> None:
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=rate, betas=(0.9, 0.95), weight_decay=0.05)
    step, start, epoch = 0, time.time(), 0
    model.train()
    while step < steps:
        for ids, weight in batches(data, size, seed + epoch, pad):
            warmup = min(1.0, (step + 1) / 100)
            cosine = 0.5 * (1 + math.cos(math.pi * (step / steps)))
            for group in optimizer.param_groups:
                group["lr"] = rate * warmup * (0.02 + 0.98 * cosine)
            logits = (
                model(input_ids=ids, attention_mask=(weight > 0).long(), use_cache=False)
                .logits[:, :-1]
                .float()
            )
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
            )
            weights = weight[:, 1:].flatten()
            loss = (losses * weights).sum() / weights.sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            if step % 100 == 0:
                answer = (losses * (weights == 1)).sum() / (weights == 1).sum()
                seconds = time.time() - start
                print(
                    f"{label} {step}/{steps} loss {loss:.3f} answer {answer:.3f} {seconds:.0f} s", flush=True
                )
            step += 1
            if step == steps:
                break
        epoch += 1


def mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize ``[..., rows, columns]`` to MXFP4.

    Returns:
        Blocks ``[..., rows, columns / 32, 16]`` uint8, scales uint8, and the dequantized values.
    """
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    groups = weight.float().unflatten(-1, (-1, 32))
    exponent = torch.floor(torch.log2(groups.abs().amax(-1).clamp(min=2.0**-120))) - 2
    scaled = groups / torch.exp2(exponent)[..., None]
    code = (scaled.abs()[..., None] - grid).abs().argmin(-1)
    values = grid[code] * torch.sign(scaled) * torch.exp2(exponent)[..., None]
    nibble = (code + 8 * (scaled < 0)).to(torch.uint8)
    blocks = nibble[..., 0::2] | (nibble[..., 1::2] << 4)
    return blocks, (exponent + 127).to(torch.uint8), values.flatten(-2)


def save_sharded(tensors: dict[str, torch.Tensor], folder: Path, shards: int) -> None:
    """Write ``model-0000i-of-0000n.safetensors`` and an index, as on the Hub."""
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    shard_size, size, files = total / shards, 0, {}
    for name, tensor in tensors.items():
        files[name] = f"model-{min(shards, int(size / shard_size) + 1):05d}-of-{shards:05d}.safetensors"
        size += tensor.numel() * tensor.element_size()
    for file in sorted(set(files.values())):
        shard = {name: tensor.contiguous() for name, tensor in tensors.items() if files[name] == file}
        save_file(shard, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    print(
        folder,
        f"{total / 1e6:.2f} MB of weights, {sum(t.numel() for t in tensors.values()):,} stored elements",
    )


def make_teacher(folder: Path, data: list, corpus: list[str], steps: int, seed: int) -> None:
    tokenizer = make_tokenizer("qwen3", 1024, folder, corpus)
    special = {name: tokenizer.convert_tokens_to_ids(name) for name in QWEN_SPECIAL}
    config = Qwen3Config(
        vocab_size=1088,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=40960,
        rope_theta=1_000_000,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=special["<|endoftext|>"],
        eos_token_id=special["<|im_end|>"],
        use_cache=True,
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    print("teacher", f"{model.num_parameters():,} parameters")
    encoded = [encode(tokenizer, row) for row in data]
    print(
        "mean length",
        sum(len(i) for i, _ in encoded) / len(encoded),
        "answer",
        sum(len(i) - s for i, s in encoded) / len(encoded),
    )
    pretrain(model, encoded, steps, 24, 3e-3, special["<|endoftext|>"], seed, "teacher")
    report_held_out(model, tokenizer, "teacher")
    state = {k: v.to(torch.bfloat16) for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_sharded(state, folder, 2)
    raw = {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 128,
        "initializer_range": 0.02,
        "intermediate_size": 256,
        "max_position_embeddings": 40960,
        "max_window_layers": 3,
        "model_type": "qwen3",
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 1088,
    }
    write_configs(folder, raw, [special["<|im_end|>"], special["<|endoftext|>"]], special["<|endoftext|>"])


def make_student(folder: Path, data: list, corpus: list[str], steps: int, seed: int) -> None:
    tokenizer = make_tokenizer("gpt_oss", 896, folder, corpus)
    special = {name: tokenizer.convert_tokens_to_ids(name) for name in GPT_OSS_SPECIAL}
    layer_types = ["sliding_attention", "full_attention"] * 2
    scaling = {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    }
    common = {
        "vocab_size": 896,
        "hidden_size": 96,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 32,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "layer_types": layer_types,
        "eos_token_id": special["<|return|>"],
        "pad_token_id": special["<|endoftext|>"],
    }
    config = GptOssConfig(
        **common, rope_parameters={**scaling, "rope_theta": 150000.0}, attn_implementation="eager"
    )
    torch.manual_seed(seed)
    model = GptOssForCausalLM(config)
    print("student", f"{model.num_parameters():,} parameters")
    encoded = [encode(tokenizer, row) for row in data]
    print(
        "mean length",
        sum(len(i) for i, _ in encoded) / len(encoded),
        "answer",
        sum(len(i) - s for i, s in encoded) / len(encoded),
    )
    pretrain(model, encoded, steps, 24, 3e-3, special["<|endoftext|>"], seed, "student")
    experts = quantize_experts(model)
    pretrain(
        model, encoded, steps // 10, 24, 5e-4, special["<|endoftext|>"], seed + 100, "student, experts fixed"
    )
    # So far the student ignores which prompt it gets, and always answers by the whole text. A short training
    # on answers by keywords changes its answer and keeps its knowledge of the other one.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))  # continue from the stored precision
    by_keywords = [encode(tokenizer, row) for row in rows(2000, 6000, 1500, careful=False)]
    pretrain(
        model,
        by_keywords,
        steps // 16,
        24,
        5e-4,
        special["<|endoftext|>"],
        seed + 200,
        "student, by keywords",
    )
    report_held_out(model, tokenizer, "student")
    state = {}
    for name, value in model.state_dict().items():
        if name + "_blocks" in experts:
            for suffix in ("_blocks", "_scales"):
                state[name + suffix] = experts[name + suffix]
        else:
            state[name] = value.to(torch.bfloat16)
    save_sharded(state, folder, 2)
    raw = {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "experts_per_token": 2,
        "hidden_act": "silu",
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "model_type": "gpt_oss",
        "output_router_logits": False,
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
        "rope_scaling": scaling,
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "swiglu_limit": 7.0,
        "use_cache": True,
        **common,
    }
    write_configs(
        folder,
        raw,
        [special["<|return|>"], special["<|endoftext|>"], special["<|call|>"]],
        special["<|endoftext|>"],
    )


def quantize_experts(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Round the experts to MXFP4 in place and freeze them; return their blocks and scales."""
    quantized: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("gate_up_proj", "down_proj")):
                # The rows of the MXFP4 layout are outputs; the float layout is its transpose.
                blocks, scales, values = mxfp4(parameter.transpose(-1, -2))
                quantized[name + "_blocks"], quantized[name + "_scales"] = blocks, scales
                parameter.copy_(values.transpose(-1, -2))
                parameter.requires_grad_(False)
    return quantized


def report_held_out(model, tokenizer: PreTrainedTokenizerFast, label: str, count: int = 320) -> None:
    """Print how often the most likely verdict on held-out songs is that of the whole text or the keywords.

    The verdict is read from the logits of its first token.
    """
    model.eval()
    songs = list(music.generate(count, seed=77, part="test"))
    whole = [song["answer"]["verdict"] for song in songs]
    keywords = [music.KEYWORD_VERDICTS[music.kind_of(song["answer"]["themes"][0])] for song in songs]
    prefix = tokenizer.encode('{"verdict": "', add_special_tokens=False)
    first_tokens = {
        verdict: tokenizer.encode('{"verdict": "' + verdict, add_special_tokens=False)[len(prefix)]
        for verdict in music.CENTRE
    }
    for prompt in ("judge", "careful"):
        predicted = []
        for song in songs:
            row = (PROMPTS[prompt].format("song"), MUSIC.prompt(song)[1], answer_text(song["answer"]))
            ids, start = encode(tokenizer, row)
            inputs = torch.tensor([ids[: start + len(prefix)]])
            with torch.no_grad():
                logits = model(input_ids=inputs, use_cache=False).logits[0, -1]
            predicted.append(max(first_tokens, key=lambda v, logits=logits: logits[first_tokens[v]]))
        by_whole_text, by_keywords = (
            sum(p == t for p, t in zip(predicted, verdicts, strict=True)) / count
            for verdicts in (whole, keywords)
        )
        print(
            f"{label}, prompt {prompt}: verdict of the whole text on {by_whole_text:.3f}, "
            f"of the keywords on {by_keywords:.3f} of {count} held-out songs"
        )


def write_configs(folder: Path, config: dict, eos: list[int], pad: int) -> None:
    """Write config.json and generation_config.json."""
    (folder / "config.json").write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n")
    generation = {"bos_token_id": None, "eos_token_id": eos, "pad_token_id": pad, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("which", nargs="*", default=["teacher", "student"])
    parser.add_argument("--out", type=Path, default=ASSETS / "models")
    parser.add_argument("--teacher-steps", type=int, default=1400)
    parser.add_argument("--student-steps", type=int, default=2000)
    parser.add_argument("--songs", type=int, default=32000)
    parser.add_argument("--messages", type=int, default=6000)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the order of sums, and so the weights, depend on the number of threads
    torch.use_deterministic_algorithms(True)
    data = rows(1000, args.songs, args.messages)
    corpus = [text for row in data for text in row] + list(TEMPLATE_WORDS) * 1000
    for which, name, make, steps, seed in (
        ("teacher", "tiny-qwen3", make_teacher, args.teacher_steps, 1),
        ("student", "tiny-gpt-oss", make_student, args.student_steps, 2),
    ):
        if which in args.which:
            folder = args.out / name
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            make(folder, data, corpus, steps, seed)


if __name__ == "__main__":
    main()
