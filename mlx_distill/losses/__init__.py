"""Losses: arrays in, one number per token, span or row out; float32, T² inside, never averaged.

- One tokenizer: the divergences, from logits, from the teacher's top k, or from hidden states (``linear_*``),
  where the logits never exist as a whole.
- Two tokenizers: ``token_group_kl``, ``alm``, ``uld``, ``gold``, ``x_token_kl`` and ``label_kl``, over the
  spans and token groups that ``align_bytes`` and ``build_token_groups`` give; in the middle of tokens
  ``inside_token_kl`` and ``across_token_kl``.
"""

from __future__ import annotations

from mlx_distill.losses.byte_alignment import align_bytes, align_lengths
from mlx_distill.losses.cross_tokenizer import (
    TokenGroups,
    across_token_kl,
    alm,
    build_token_groups,
    inside_token_kl,
    span_sums,
    token_group_kl,
)
from mlx_distill.losses.divergences import (
    DIVERGENCES,
    forward_kl,
    js_divergence,
    reverse_kl,
    skew_kl,
    total_variation,
)
from mlx_distill.losses.gold import gold
from mlx_distill.losses.labels import (
    LabelNode,
    LabelTrie,
    class_logprobs,
    label_kl,
    label_logprobs,
    label_trie,
    merge_labels,
)
from mlx_distill.losses.tiled import linear_cross_entropy, linear_divergence, linear_rows
from mlx_distill.losses.token_bytes import token_bytes
from mlx_distill.losses.topk import sparse_forward_kl, sparse_linear_kl
from mlx_distill.losses.topk_divergences import sparse_divergence
from mlx_distill.losses.uld import uld
from mlx_distill.losses.x_token import x_token_kl

__all__ = [
    "DIVERGENCES",
    "TokenGroups",
    "LabelNode",
    "LabelTrie",
    "across_token_kl",
    "align_bytes",
    "align_lengths",
    "alm",
    "token_group_kl",
    "build_token_groups",
    "class_logprobs",
    "forward_kl",
    "gold",
    "inside_token_kl",
    "js_divergence",
    "label_kl",
    "label_logprobs",
    "label_trie",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_rows",
    "merge_labels",
    "reverse_kl",
    "skew_kl",
    "span_sums",
    "sparse_divergence",
    "sparse_forward_kl",
    "sparse_linear_kl",
    "token_bytes",
    "total_variation",
    "uld",
    "x_token_kl",
]
