"""Scoring the labels of a task, beside scoring pairs alone, mlx-lm's ``evaluate`` and whole answers.

    python benchmarks/labels_bench.py              # about 3 minutes on two cores
    python benchmarks/labels_bench.py --prompts 40

200 songs of the packaged generator with the system prompt of the packaged task ``music``, whose four labels
are scored by a random qwen3 (float32) with the tokenizer of the packaged tiny teacher. The routes take turns,
chunk by chunk, in one process:

    labels     md.classify's scores, normalize: none   (infer/label_scoring.py, label_probabilities)
    strings    the same, normalize: string             (label_string_logprobs)
    alone      each (prompt, label) pair in a pass of its own, one at a time
    mlx_lm     mlx_lm.evaluate.MLXLM.loglikelihood itself: the prompt of each item is read once, each label is
               scored behind a copy of its cache. lm_eval, of which only names are needed, is replaced by an
               empty module, and the tokens are given, so that all routes score the same ones
    answers    whole answers to the first 40 prompts, constrained to the schema, up to max_answer_tokens

Agreement is that of ``strings`` with ``alone``: the largest difference of a log-probability and the share of
prompts with the same most probable label. Results go to benchmarks/results/labels.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "mlx_distill" / "assets" / "models" / "tiny-qwen3"
CHUNK, BATCH = 40, 16
SIZES = {"hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 384}
ANSWERS = 40  # whole answers are generated for so many prompts


class Request(NamedTuple):
    """What lm-eval calls an instance: a context and a continuation, here as keys of their tokens."""

    args: tuple[str, str]


def make_model(columns: int) -> Any:
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm.models import qwen3

    mx.random.seed(0)
    settings = qwen3.ModelArgs(
        model_type="qwen3",
        **SIZES,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rms_norm_eps=1e-6,
        vocab_size=columns,
        max_position_embeddings=4096,
        rope_theta=10000.0,
        tie_word_embeddings=False,
    )
    model = qwen3.Model(settings)
    # Larger weights than those of an initialisation: else all labels have nearly the same probability.
    model.update(tree_map(lambda p: p * 2 if p.ndim > 1 else p, model.parameters()))
    mx.eval(model.parameters())
    return model.eval()


def score_alone(model: Any, prompt: Sequence[int], path: Sequence[int]) -> float:
    """The log-probability of some tokens behind a prompt, by one pass over both."""
    import mlx.core as mx
    import mlx.nn as nn

    logits = model(mx.array([[*prompt, *path]]))[0, len(prompt) - 1 : -1]
    logprobs = nn.log_softmax(logits.astype(mx.float32))
    return float(logprobs[mx.arange(len(path)), mx.array(path)].sum().item())


def make_mlx_lm(model: Any, tokens: dict[str, tuple[int, ...]]) -> Any:
    """mlx-lm's own scorer, which reads the tokens of a text from ``tokens``."""
    modules = {name: types.ModuleType(name) for name in ("lm_eval", "lm_eval.api")}
    modules["lm_eval.api.model"] = types.ModuleType("lm_eval.api.model")
    modules["lm_eval.api.registry"] = types.ModuleType("lm_eval.api.registry")
    modules["lm_eval.api.model"].LM = object  # type: ignore[attr-defined]
    modules["lm_eval.api.registry"].register_model = lambda name: lambda kind: kind  # type: ignore[attr-defined]
    sys.modules.update(modules)
    from mlx_lm import evaluate

    evaluate.tqdm = lambda rows, **_: rows
    scorer = evaluate.MLXLM.__new__(evaluate.MLXLM)
    scorer._model, scorer._max_tokens, scorer._batch_size = model, None, BATCH
    scorer._tokenize = lambda texts: [tokens[text] for text in texts]
    return scorer


def make_routes(model: Any, tokenizer: Any, task: Any, rows: Sequence[dict[str, Any]]) -> Any:
    """Each route: from the numbers of some rows to their scores; and facts about the tokens."""
    import numpy as np

    from mlx_distill.data.rows import to_item
    from mlx_distill.infer.label_scoring import (
        label_probabilities,
        label_string_logprobs,
        scored_labels,
        task_label_strings,
    )
    from mlx_distill.infer.predict import item_prompt, predict
    from mlx_distill.infer.shared_prefix import SharedPrefix

    prompts = [item_prompt(tokenizer, to_item(row, task)) for row in rows]
    before, trie = scored_labels(tokenizer, task)
    strings = task_label_strings(tokenizer, task)
    whole = [[*prompt, *strings.before] for prompt in prompts]
    texts: dict[str, tuple[int, ...]] = {}
    for i, prompt in enumerate(whole):
        texts[f"{i} "] = tuple(prompt)
        texts |= {
            f"{i} {name}": (*prompt, *path) for name, path in zip(task.labels, strings.paths, strict=True)
        }
    theirs = make_mlx_lm(model, texts)
    prefixes = {name: SharedPrefix(model) for name in ("labels", "strings")}

    def labels(chunk: Sequence[int]) -> Any:
        own = [[*prompts[i], *before] for i in chunk]
        return np.log(label_probabilities(model, own, trie, batch_size=BATCH, prefix=prefixes["labels"]))

    def in_strings(chunk: Sequence[int]) -> Any:
        own = [whole[i] for i in chunk]
        return label_string_logprobs(model, own, strings, batch_size=BATCH, prefix=prefixes["strings"])

    def alone(chunk: Sequence[int]) -> Any:
        return np.array([[score_alone(model, whole[i], path) for path in strings.paths] for i in chunk])

    def mlx_lm(chunk: Sequence[int]) -> Any:
        requests = [Request((f"{i} ", name)) for i in chunk for name in task.labels]
        return np.array([score for score, _ in theirs.loglikelihood(requests)]).reshape(len(chunk), -1)

    def answers(chunk: Sequence[int]) -> Any:
        own = [rows[i] for i in chunk]
        found = predict(model, tokenizer, task, own, batch_size=BATCH, label_probs=False, constrain=True)
        tokens.append(sum(p.tokens for p in found) / len(found))
        return np.array([task.labels.index(p.label) if p.label else -1 for p in found])

    tokens: list[float] = []
    facts = {
        "prompt_tokens": float(np.mean([len(prompt) for prompt in whole])),
        "label_tokens": [len(path) for path in strings.paths],
        "nodes": len(trie.nodes),
    }
    routes = {"labels": labels, "strings": in_strings, "alone": alone, "mlx_lm": mlx_lm, "answers": answers}
    return routes, facts, prefixes["strings"], tokens


def measure(routes: dict[str, Callable[[Sequence[int]], Any]], count: int) -> tuple[dict[str, Any], Any]:
    import numpy as np

    for name, route in routes.items():
        if name != "answers":
            route(range(2))  # compiles kernels
    seconds, scores = dict.fromkeys(routes, 0.0), {name: [] for name in routes}
    for start in range(0, count, CHUNK):
        chunk = range(start, min(start + CHUNK, count))
        for name, route in routes.items():
            if name == "answers" and start >= ANSWERS:
                continue
            began = time.perf_counter()
            scores[name].append(route(chunk))
            seconds[name] += time.perf_counter() - began
    return seconds, {name: np.concatenate(parts) for name, parts in scores.items()}


def compare(seconds: dict[str, float], scores: dict[str, Any]) -> dict[str, Any]:
    rates = {name: len(scores[name]) / value for name, value in seconds.items()}
    top = {name: table if name == "answers" else table.argmax(1) for name, table in scores.items()}
    agreement = {
        name: {
            "largest_difference_of_log_p": float(abs(scores[name] - scores["alone"]).max()),
            "same_label": float((top[name] == top["alone"]).mean()),
        }
        for name in ("strings", "mlx_lm")
    }
    agreement["labels"] = {"same_label": float((top["labels"] == top["alone"]).mean())}
    own = top["labels"][: len(top["answers"])]
    agreement["answers"] = {"same_label_as_labels": float((top["answers"] == own).mean())}
    return {
        "items_per_second": rates,
        "labels_times_faster_than": {n: rates["labels"] / rates[n] for n in rates if n != "labels"},
        "strings_times_faster_than": {n: rates["strings"] / rates[n] for n in ("alone", "mlx_lm", "answers")},
        "agreement": agreement,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=200)
    options = parser.parse_args()
    from mlx_distill.assets.music.generator import generate
    from mlx_distill.models.load import load_tokenizer
    from mlx_distill.runtime import load_blas, machine, versions
    from mlx_distill.tasks.task import load_task

    load_blas()
    start, task, tokenizer = time.perf_counter(), load_task("music"), load_tokenizer(MODEL)
    rows = list(generate(count=options.prompts, seed=7, noise=0.0, part="test"))
    model = make_model(len(tokenizer.get_vocab()))
    routes, facts, prefix, tokens = make_routes(model, tokenizer, task, rows)
    seconds, scores = measure(routes, options.prompts)
    out = {
        "settings": {
            "prompts": options.prompts,
            "answers": ANSWERS,
            "batch": BATCH,
            "labels": list(task.labels),
            "model": SIZES,
        },
        "tokens": {**facts, "shared_prefix": len(prefix.tokens), "answer": sum(tokens) / len(tokens)},
        "seconds": seconds,
        **compare(seconds, scores),
    }
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    out |= {
        "total_seconds": time.perf_counter() - start,
        "machine": machine(),
        "versions": versions(),
        "commit": commit,
    }
    for title in ("tokens", "items_per_second", "labels_times_faster_than", "agreement"):
        print(f"{title.replace('_', ' ')}: {json.dumps(out[title])}")
    path = ROOT / "benchmarks" / "results" / "labels.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(out, indent=2) + "\n")


if __name__ == "__main__":
    main()
