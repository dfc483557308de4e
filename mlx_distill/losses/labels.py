"""The distribution over the classes of a label, read from a model's logits where the labels part, and its
divergence.

The labels, as the tokenizer writes them in an answer, make a trie (:class:`LabelTrie`). Labels whose first
tokens differ part at its root: one forward pass gives the distribution. Where labels share tokens, a further
node behind these tells them apart. Student and teacher need no common tokenizer: each has a trie of its own.
"""

from __future__ import annotations

import json
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, takewhile
from typing import Any

import mlx.core as mx
import numpy as np
from jaxtyping import Float

from mlx_distill.errors import ConfigError, ModelError
from mlx_distill.losses.divergences import forward_kl
from mlx_distill.losses.numerics import LOWEST
from mlx_distill.losses.token_bytes import vocabulary

# A class of labels, as their numbers.
LabelClass = tuple[int, ...]


@dataclass(frozen=True)
class LabelNode:
    """A place where labels part.

    Args:
        path: The tokens from the root to here.
        branches: The labels of each branch.
        ids: For each branch the tokens that count for it.
        parent: The node before this one and the branch that leads here; None for the root.
    """

    path: tuple[int, ...]
    branches: tuple[LabelClass, ...]
    ids: tuple[tuple[int, ...], ...]
    parent: tuple[int, int] | None = None


@dataclass(frozen=True)
class LabelTrie:
    """The labels as token paths, reduced to the nodes at which they part.

    Args:
        labels: The classes.
        nodes: The root first, each node before those below it.
        cut: So many tokens of the text before the label are not before the root: some label merges with them.
        shared: The tokens between that place and the root, which all labels begin with.
    """

    labels: tuple[str, ...]
    nodes: tuple[LabelNode, ...]
    cut: int = 0
    shared: tuple[int, ...] = ()

    @cached_property
    def children(self) -> Mapping[tuple[int, int], int]:
        """The node behind a branch of a node; labels alone in their branch have none."""
        return {node.parent: n for n, node in enumerate(self.nodes) if node.parent is not None}

    def prompt(self, before: Sequence[int]) -> list[int]:
        """The tokens up to the root, from the tokens of the text before the label."""
        return [*before[: len(before) - self.cut], *self.shared]

    def chain(self, node: int) -> list[int]:
        """The nodes from the root to a node."""
        parent = self.nodes[node].parent
        return [node] if parent is None else [*self.chain(parent[0]), node]

    def classes(self, nodes: Iterable[int]) -> list[tuple[LabelClass, int, int]]:
        """What some nodes tell apart: the branches without a node of theirs behind them, each as its labels,
        its node and its number there; sorted by labels.

        All nodes tell all labels apart. The nodes of one text tell its label from the others, and merge some
        of those.
        """
        nodes = set(nodes)
        return sorted(
            (labels, n, k)
            for n in nodes
            for k, labels in enumerate(self.nodes[n].branches)
            if self.children.get((n, k)) not in nodes
        )


def label_trie(
    tokenizer: Any,
    labels: Sequence[str],
    encode: Callable[[str], list[int]],
    *,
    before: str = '{"label": "',
    after: str = '"}',
) -> LabelTrie:
    r"""The trie of some labels, as a tokenizer writes them in an answer.

    At a node, a token with bytes ``u`` counts for a branch if it can only begin what is left of the labels of
    that branch: ``u`` is a prefix of the rest of a label with its closing quote, or that rest a prefix of
    ``u``. A token that can begin labels of several branches counts for the branch that has it as its own next
    token, else for none.

    Args:
        tokenizer: A tokenizer from ``transformers``, ``mlx_lm`` or ``tokenizers`` whose tokens name their
            bytes.
        labels: The classes; they are written as JSON has them.
        encode: From a text to its tokens, as in an answer.
        before: What precedes the label, with the opening quote.
        after: What follows it; its first character is the closing quote.

    Raises:
        ConfigError: Fewer than two labels, an empty one, or two equal ones.
        ModelError: The tokens do not name their bytes, or cannot write a label.

    >>> from tokenizers import Tokenizer, decoders, models
    >>> words = ['{"label":', ' "', '"}', "s", "p", "a", "sp", "am", "fe", "m", "f", "e"]
    >>> tokenizer = Tokenizer(models.BPE({w.replace(" ", "Ġ"): i for i, w in enumerate(words)}, []))
    >>> tokenizer.decoder = decoders.ByteLevel()
    >>> tokens = {'{"label": "spam"}': [0, 1, 3, 4, 7, 2], '{"label": "safe"}': [0, 1, 3, 5, 8, 2]}
    >>> trie = label_trie(tokenizer, ["spam", "safe"], lambda text: tokens.get(text, [0, 1]))
    >>> trie.prompt([0, 1]), trie.nodes[0].ids
    ([0, 1, 3], ((4,), (5,)))
    """
    if len(labels) < 2 or not all(labels) or len(set(labels)) < len(labels):
        raise ConfigError(
            f"labels {list(labels)}", fix="give at least two different labels, none of them empty"
        )
    spelled = vocabulary(tokenizer).tokens
    paths, ends = _paths(spelled, labels, encode, before, after)
    prefix, root = encode(before), _common(paths)
    kept = min(root, _common([prefix, paths[0]]))
    branchings = _branchings(paths)
    # What is left of each label at each place where some of them part.
    rests = [
        {i: ends[i][_length(paths[i][:depth], spelled) :] for i in chain(*groups.values())}
        for _, depth, groups in branchings
    ]
    begins: dict[int, list[int]] = {text[0]: [] for rest in rests for text in rest.values()}
    for token, text in enumerate(spelled):
        if text and text[0] in begins:
            begins[text[0]].append(token)
    nodes = []
    for (parent, depth, groups), rest in zip(branchings, rests, strict=True):
        candidates = sorted(chain(*(begins[byte] for byte in {text[0] for text in rest.values()})))
        ids = _branch_ids(rest, groups, candidates, spelled)
        path = paths[next(iter(rest))][root:depth]
        nodes.append(LabelNode(tuple(path), tuple(map(tuple, groups.values())), ids, parent))
    return LabelTrie(tuple(labels), tuple(nodes), len(prefix) - kept, tuple(paths[0][kept:root]))


@dataclass(frozen=True)
class LabelStrings:
    """The labels as whole sequences of tokens, with their closing quotes.

    Attributes:
        labels: The classes.
        before: The tokens of the text before the label, without those that some label merges with.
        paths: The tokens of each label behind these.
        bytes: The length of each label with its closing quote, as JSON has it.
    """

    labels: tuple[str, ...]
    before: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]
    bytes: tuple[int, ...]


def label_strings(
    tokenizer: Any,
    labels: Sequence[str],
    encode: Callable[[str], list[int]],
    *,
    before: str = '{"label": "',
    after: str = '"}',
) -> LabelStrings:
    """The tokens of whole labels, for the sum of their log-probabilities. The last token of a label is the
    one with its closing quote, whatever else is in it.

    The arguments and errors are those of :func:`label_trie`.
    """
    spelled = vocabulary(tokenizer).tokens
    paths, ends = _paths(spelled, labels, encode, before, after)
    kept = min(_common([path, encode(before)]) for path in paths)
    closed = []
    for path, end in zip(paths, ends, strict=True):
        lengths = list(accumulate(len(spelled[token]) for token in path))
        closed.append(tuple(path[kept : bisect_left(lengths, len(end)) + 1]))
    sizes = tuple(len(_escaped(label).encode()) + 1 for label in labels)
    return LabelStrings(tuple(labels), tuple(paths[0][:kept]), tuple(closed), sizes)


def label_logprobs(
    logits: Float[mx.array, "*b v"], node: LabelNode, *, rest: bool = False
) -> Float[mx.array, "*b c"]:
    """Log-probabilities of the branches of a node: the mass of each branch's tokens, renormalised over the
    branches, or with one more class for all other tokens.

    ``log Σ_{t∈B} exp z_t - log Z``, where Z sums over all branches' tokens (``rest=False``) or over the whole
    vocabulary (``rest=True``). Train with ``rest=True``: without it a loss does not see the student's mass
    outside the labels.

    Args:
        logits: At the position that predicts the token behind the node's path; computed in float32.
        node: Of a :func:`label_trie` with this model's tokenizer.
        rest: Add a last class for all tokens that count for no branch.

    Returns:
        One log-probability a branch, and with ``rest`` one more.

    Raises:
        ModelError: The logits are narrower than the tokenizer.

    >>> node = LabelNode((), ((0,), (1,)), ((0, 2), (1,)))
    >>> mx.exp(label_logprobs(mx.zeros((1, 4)), node)).tolist()
    [[0.666..., 0.333...]]
    """
    widest = max(map(len, node.ids))
    ids = np.zeros((len(node.ids), widest), dtype=np.int32)
    used = np.zeros(ids.shape, dtype=bool)
    for row, branch_ids in enumerate(node.ids):
        ids[row, : len(branch_ids)], used[row, : len(branch_ids)] = branch_ids, True
    if ids.max() >= logits.shape[-1]:
        raise ModelError(
            f"label token {ids.max()} for logits of {logits.shape[-1]} columns",
            fix="build the label trie with this model's own tokenizer",
        )
    z = mx.take(logits, mx.array(ids.reshape(-1)), axis=-1).astype(mx.float32)
    z = z.reshape(*logits.shape[:-1], *ids.shape)
    mass = mx.logsumexp(mx.where(mx.array(used), z, LOWEST), axis=-1)
    if rest:
        begins_label = np.zeros(logits.shape[-1], dtype=bool)
        begins_label[ids[used]] = True
        others = mx.logsumexp(
            mx.where(mx.array(begins_label), LOWEST, logits.astype(mx.float32)), axis=-1, keepdims=True
        )
        mass = mx.concatenate([mass, others], axis=-1)
    return mass - mx.logsumexp(mass, axis=-1, keepdims=True)


def class_logprobs(
    trie: LabelTrie, branches: Mapping[int, Float[mx.array, "*b c"]]
) -> Float[mx.array, "*b k"]:
    r"""Log-probabilities of the classes that some nodes tell apart, and of everything else.

    A class has the product of the branches on its path, :math:`\sum_n \log p_n(b_n)`; everything else has the
    mass that leaves the path of every class, summed over the nodes.

    Args:
        trie: The labels.
        branches: For some nodes, with each the node before it, :func:`label_logprobs` with ``rest=True``.

    Returns:
        One log-probability a class of ``trie.classes(branches)``, and a last one for everything else. With
        all nodes the classes are the labels, in their order.

    >>> root = LabelNode((), ((0,), (1, 2)), ((0,), (1,)))
    >>> trie = LabelTrie(("no", "yes", "yeah"), (root, LabelNode((1,), ((1,), (2,)), ((2,), (3,)), (0, 1))))
    >>> at_root, behind = mx.log(mx.array([0.5, 0.4, 0.1])), mx.log(mx.array([0.75, 0.25, 0.0]))
    >>> mx.exp(class_logprobs(trie, {0: at_root, 1: behind})).round(3).tolist()
    [0.5, 0.300..., 0.100..., 0.100...]
    """
    if len(branches) == 1:
        return branches[0]
    reached: dict[int, mx.array] = {}
    for n in sorted(branches):
        parent = trie.nodes[n].parent
        # The log-probability of what leads to the node.
        reached[n] = branches[n] + (reached[parent[0]][..., parent[1], None] if parent else 0)
    others = mx.logsumexp(mx.stack([reached[n][..., -1] for n in reached], axis=-1), axis=-1)
    classes = [reached[n][..., k] for _, n, k in trie.classes(branches)]
    return mx.stack([*classes, others], axis=-1)


def merge_labels(
    logprobs: Float[mx.array, "*b c"], classes: Sequence[tuple[LabelClass, int, int]]
) -> Float[mx.array, "*b k"]:
    """A distribution over the labels and everything else as one over classes of labels and everything else.

    Args:
        logprobs: One log-probability a label, and a last one.
        classes: From :meth:`LabelTrie.classes`.

    >>> merged = merge_labels(mx.log(mx.array([0.5, 0.2, 0.2, 0.1])), [((0,), 0, 0), ((1, 2), 0, 1)])
    >>> mx.exp(merged).round(3).tolist()
    [0.5, 0.400..., 0.100...]
    """
    columns = [mx.logsumexp(logprobs[..., mx.array(labels)], axis=-1) for labels, _, _ in classes]
    return mx.stack([*columns, logprobs[..., -1]], axis=-1)


def label_kl(
    student_logprobs: Float[mx.array, "*b c"],
    teacher_logprobs: Float[mx.array, "*b d"],
    *,
    temperature: float = 4.0,
) -> Float[mx.array, "*b"]:
    """Forward KL over the labels (and the class of everything else, if both have it), softened: Hinton's loss
    over classes.

    ``T² KL(softmax(log p / T) ‖ softmax(log q / T))``. Source: Hinton et al. 2015,
    https://arxiv.org/abs/1503.02531.

    Args:
        student_logprobs: From :func:`class_logprobs`.
        teacher_logprobs: From the teacher's own logits and trie, the same classes in the same order.
        temperature: T.

    Returns:
        Nats (times T²) a row, not averaged.

    Raises:
        ModelError: Different numbers of classes.
        ConfigError: The temperature is not positive.

    >>> label_kl(mx.array([[-0.7, -0.7]]), mx.array([[-0.7, -0.7]])).item()
    0.0
    """
    return forward_kl(student_logprobs, teacher_logprobs, temperature=temperature)


def _escaped(label: str) -> str:
    """A label as it stands in JSON between its quotes."""
    return json.dumps(label, ensure_ascii=False)[1:-1]


def _length(path: Iterable[int], spelled: Sequence[bytes]) -> int:
    return sum(len(spelled[token]) for token in path)


def _end_of_label(
    path: Sequence[int], spelled: Sequence[bytes], label: str, before: str, after: str
) -> bytes:
    """The bytes of the tokens up to the label's closing quote."""
    data = b"".join(spelled[token] for token in path)
    text, wanted = data.decode(errors="replace"), f"{before}{_escaped(label)}{after}"
    # A tokenizer may normalize what it reads.
    if not unicodedata.normalize("NFKC", text).endswith(unicodedata.normalize("NFKC", wanted)):
        raise ModelError(
            f"the tokenizer cannot write the label {label!r}: its tokens say {text!r}",
            fix="use a label of characters that the tokenizer has",
        )
    return data[: len(data) - len(after.encode()) + 1]


def _paths(
    spelled: Sequence[bytes],
    labels: Sequence[str],
    encode: Callable[[str], list[int]],
    before: str,
    after: str,
) -> tuple[list[list[int]], list[bytes]]:
    """The tokens of the text before each label, the label and what follows, and its bytes up to the closing
    quote.
    """
    paths = [encode(f"{before}{_escaped(label)}{after}") for label in labels]
    ends = [
        _end_of_label(path, spelled, label, before, after) for path, label in zip(paths, labels, strict=True)
    ]
    _check_distinct(labels, paths)
    return paths, ends


def _check_distinct(labels: Sequence[str], paths: Sequence[Sequence[int]]) -> None:
    seen: dict[tuple[int, ...], str] = {}
    for label, path in zip(labels, map(tuple, paths), strict=True):
        if path in seen:
            raise ModelError(
                f"the tokenizer writes the labels {seen[path]!r} and {label!r} alike",
                fix="use labels that differ after the tokenizer's normalization",
            )
        seen[path] = label


def _common(paths: Sequence[Sequence[int]]) -> int:
    """The number of tokens that all paths begin with."""
    return len(list(takewhile(lambda tokens: len(set(tokens)) == 1, zip(*paths, strict=False))))


# The node and branch before, the tokens before it in the paths, and the labels behind each next token.
_Branching = tuple[tuple[int, int] | None, int, dict[int, list[int]]]


def _branchings(paths: Sequence[Sequence[int]]) -> list[_Branching]:
    """The places where labels part, each before those below it."""
    out: list[_Branching] = []
    open_: list[tuple[tuple[int, int] | None, list[int]]] = [(None, list(range(len(paths))))]
    for parent, members in open_:
        depth = _common([paths[i] for i in members])
        groups: dict[int, list[int]] = {}
        for i in members:
            groups.setdefault(paths[i][depth], []).append(i)
        open_ += [((len(out), k), group) for k, group in enumerate(groups.values()) if len(group) > 1]
        out.append((parent, depth, groups))
    return out


def _branch_ids(
    rest: Mapping[int, bytes],
    groups: Mapping[int, list[int]],
    candidates: Iterable[int],
    spelled: Sequence[bytes],
) -> tuple[tuple[int, ...], ...]:
    """The tokens that count for each branch; see :func:`label_trie`."""
    branch_of = {i: k for k, group in enumerate(groups.values()) for i in group}
    branch_of_token = {token: k for k, token in enumerate(groups)}
    ids: list[list[int]] = [[] for _ in groups]
    for token in candidates:
        text = spelled[token]
        fitting = {branch_of[i] for i, left in rest.items() if left.startswith(text) or text.startswith(left)}
        branch = next(iter(fitting)) if len(fitting) == 1 else branch_of_token.get(token) if fitting else None
        if branch is not None:
            ids[branch].append(token)
    return tuple(map(tuple, ids))
