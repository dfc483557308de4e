"""Labels for the tests: a trie of one node by hand, and the scoring of one label alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_distill.losses.labels import LabelNode, LabelTrie
from mlx_distill.tasks.task import Task

# Labels that share beginnings, that begin one another, that are no ASCII, that JSON escapes, and many.
LABEL_SETS: dict[str, tuple[str, ...]] = {
    "differ at once": ("hostile", "fine"),
    "share a byte": ("spam", "safe"),
    "share more": ("positive", "possible", "negative", "neutral", "pos"),
    "begin one another": ("recommended", "recommended_with_caution", "not recommended"),
    "share a byte of a character": ("é", "è", "日本", "日曜"),
    "escaped": ('say "no"', 'say "yes"', "back\\slash", "back\\up", "two\nlines"),
    "with spaces": ("very good", "very bad", "very", " very"),
    "punctuation": ("!!", "!", "?!", "fine!", "fine"),
    "many": tuple(f"class {i:02d}" for i in range(50)),
}


def one_node(labels: Sequence[str], ids: Sequence[Sequence[int]]) -> LabelTrie:
    """Labels that one forward pass tells apart, with the tokens of each."""
    branches = tuple((i,) for i in range(len(labels)))
    return LabelTrie(tuple(labels), (LabelNode((), branches, tuple(map(tuple, ids))),))


def label_alone(
    label: str,
    labels: Sequence[str],
    encode: Callable[[str], list[int]],
    spelled: Sequence[bytes],
    logprobs: Callable[[list[int]], np.ndarray],
    before: str = '{"label": "',
    after: str = '"}',
) -> float:
    """The log-probability of one label, token by token: where the labels that begin with the same tokens go
    on with different ones, that of all tokens that can only begin the label's way, or are its next token.

    ``logprobs(tokens)`` is the distribution behind the answer's first tokens.
    """
    paths = {name: encode(f"{before}{json.dumps(name, ensure_ascii=False)[1:-1]}{after}") for name in labels}
    own, total = paths[label], 0.0
    for depth in range(len(own)):
        beside = [name for name in labels if paths[name][:depth] == own[:depth]]
        if len({paths[name][depth] for name in beside}) == 1:
            continue
        left = {
            name: b"".join(spelled[token] for token in paths[name][depth:]).removesuffix(after[1:].encode())
            for name in beside
        }
        mass = 0.0
        for token, p in enumerate(np.exp(logprobs(own[:depth]))):
            text = spelled[token] if token < len(spelled) else b""
            ways = {
                paths[name][depth]
                for name in beside
                if text and (left[name].startswith(text) or text.startswith(left[name]))
            }
            if ways == {own[depth]} or (own[depth] in ways and token == own[depth]):
                mass += float(p)
        total += float(np.log(mass))
    return total


def with_labels(task: Task, labels: Sequence[str]) -> Task:
    properties = {**task.schema["properties"], "label": {"enum": list(labels)}}
    return replace(task, schema={**task.schema, "properties": properties}, positive=())


def tokens_behind(labels: LabelTrie) -> int:
    """The tokens that lead from the root to the other nodes, each counted once."""
    return sum(len(n.path) - len(labels.nodes[n.parent[0]].path) for n in labels.nodes if n.parent)


class CountedTrunk(nn.Module):
    """A trunk that counts the tokens it reads."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.tokens = inner, 0

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        self.tokens += inputs.size
        return self.inner(inputs, cache)


class Counted(nn.Module):
    """A model that counts the tokens it reads."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.lm_head = CountedTrunk(model.model), model.lm_head
        self.model_type, self.layers = model.model_type, model.layers
        if hasattr(model, "make_cache"):
            self.make_cache = model.make_cache

    @property
    def tokens(self) -> int:
        return self.model.tokens

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        return self.lm_head(self.model(inputs, cache))
