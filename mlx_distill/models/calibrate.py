"""Calibration: the weights of a model are rounded so that the outputs of its layers on real rows stay.

Block by block: the inputs of every linear layer are measured (the Hessian H, the mean of x x^T over the real
tokens, all tokens alike), scales are chosen by the error weighted with H's diagonal, and the weights are
rounded with error feedback (:mod:`mlx_distill.models.gptq`). The next block gets what the quantized one
computes. Held at a time are the hidden states of the rows and one block's Hessians.

A stack of experts has a Hessian for each expert, over the tokens that the router sent to it. A tied embedding
has that of the output head plus the mean of its diagonal times the identity, for its use as an embedding. An
embedding that is not tied has no inputs to measure: it is not calibrated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_distill.errors import DataError, ModelError
from mlx_distill.models.architectures.registry import module_names
from mlx_distill.models.blocks import Blocks
from mlx_distill.models.forward import embedding_rows, is_tied
from mlx_distill.models.gptq import DAMPING, gptq
from mlx_distill.models.grids import find_scales, pack
from mlx_distill.models.quantization import Quantization
from mlx_distill.models.refined import Refined
from mlx_distill.models.token_ids import check_token_ids
from mlx_distill.progress import NullProgress, Progress

_TOKENS = 4096  # of rows of the same length that run at a time
_LEAST_TOKENS_SHARE = 0.25  # an expert with fewer tokens than this share of its columns has the mean Hessian


@dataclass
class _Statistics:
    """The sums of x x^T over the inputs of a module; ``[e, i, i]`` and a count for each expert of a stack."""

    total: mx.array | None = None
    count: np.ndarray = field(default_factory=lambda: np.zeros(1))

    def add(self, inputs: mx.array) -> None:
        """Add inputs ``[..., i]``."""
        x = inputs.reshape(-1, inputs.shape[-1]).astype(mx.float32)
        product = x.T @ x
        self.total = product if self.total is None else self.total + product
        self.count = self.count + len(x)
        mx.eval(self.total)

    def add_experts(self, inputs: mx.array, indices: mx.array, experts: int) -> None:
        """Add the inputs of a stack: ``[..., 1, i]`` for ``indices [...]``, or one input for several of
        them.
        """
        x = mx.broadcast_to(inputs.squeeze(-2), (*indices.shape, inputs.shape[-1]))
        x, chosen = x.reshape(-1, x.shape[-1]).astype(mx.float32), np.array(indices).reshape(-1)
        if self.total is None:
            self.total = mx.zeros((experts, x.shape[-1], x.shape[-1]))
            self.count = np.zeros(experts)
        for expert in np.unique(chosen).tolist():
            own = x[mx.array(np.flatnonzero(chosen == expert))]
            self.total[expert] = self.total[expert] + own.T @ own
            self.count[expert] += len(own)
        mx.eval(self.total)

    def hessians(self) -> list[np.ndarray]:
        """The mean of x x^T, in float64; of experts with few tokens that of all experts."""
        assert self.total is not None
        totals = np.array(self.total).reshape(len(self.count), *self.total.shape[-2:])
        mean = totals.sum(axis=0, dtype=np.float64) / max(self.count.sum(), 1)
        least = 1 if len(self.count) == 1 else _LEAST_TOKENS_SHARE * totals.shape[-1]
        return [
            total.astype(np.float64) / count if count >= least else mean
            for total, count in zip(totals, self.count, strict=True)
        ]


def calibrate(
    model: Any,
    rows: Sequence[Sequence[int]],
    quantizations: Mapping[str, Quantization],
    *,
    dtype: mx.Dtype = mx.bfloat16,
    damping: float = DAMPING,
    feedback: bool = True,
    finished: Callable[[str], Refined | None] = lambda path: None,
    progress: Progress | None = None,
) -> Iterator[tuple[str, Refined]]:
    """Quantize the modules of a model, calibrated on rows, one block at a time.

    Args:
        model: Unquantized where it is to be quantized, adapters merged
            (:func:`~mlx_distill.models.merged.load_merged`); it is as before when the iterator ends.
        rows: Token ids of whole chats: prompt and answer. 128 of them suffice.
        quantizations: For each path of a module how to quantize it.
        dtype: In which affine scales and biases are stored.
        damping: Of :func:`~mlx_distill.models.gptq.gptq`.
        feedback: Round with GPTQ's error feedback; False: to nearest, with weighted scales alone.
        finished: What an interrupted call has made of a path, or None.
        progress: Gets a task of one unit a block.

    Yields:
        Path and result of each module whose inputs were measured, in the order of the blocks; the output
        head, or the tied embedding, last.

    Raises:
        DataError: there are no rows.
        ModelError: a path of ``quantizations`` is no linear layer, stack of experts or embedding, or the
            model's blocks do not run one after another, or a token is beyond the embedding.
    """
    rows = [row for row in rows if len(row) > 0]
    if not rows:
        raise DataError("no rows to calibrate the quantization on", fix="give training rows, or refine: none")
    check_token_ids([max(max(row) for row in rows)], embedding_rows(model))
    names, modules = module_names(model), dict(model.named_modules())
    _check(modules, quantizations)
    head_path = names.embedding if is_tied(model) else names.head
    blocks, batches = Blocks(model), _batches(rows)
    blocks.check(batches[0])
    options = _Options(quantizations, dtype, damping, feedback, finished)
    with (progress or NullProgress()).task("calibrate", total=len(blocks.layers) + 1, unit="block") as bar:
        states = _evaluated(map(blocks.embedded, batches))
        for number, layer in enumerate(blocks.layers):
            inside = _paths_inside(layer, modules, quantizations)
            with _weights_restored(inside):
                yield from _refine(inside, options, partial(_measured, blocks, number, states))
                states = _run(blocks, number, states)
            bar.update(number + 1)
        if head_path in quantizations:
            head = {head_path: modules[head_path]}
            with _weights_restored(head):
                yield from _refine(
                    head,
                    options,
                    lambda missing: [(list(missing), _head_statistics(blocks, states))],
                    tied=is_tied(model),
                )
        bar.update(len(blocks.layers) + 1)


@dataclass(frozen=True)
class _Options:
    quantizations: Mapping[str, Quantization]
    dtype: mx.Dtype
    damping: float
    feedback: bool
    finished: Callable[[str], Refined | None]


def _check(modules: Mapping[str, Any], quantizations: Mapping[str, Quantization]) -> None:
    from mlx_lm.models.switch_layers import SwitchLinear

    for path in quantizations:
        module = modules.get(path)
        if not isinstance(module, nn.Linear | SwitchLinear | nn.Embedding):
            what = "is not in this model" if module is None else f"is a {type(module).__name__}"
            raise ModelError(
                f"{path} {what}, so it cannot be calibrated",
                fix="merge the adapter first, and leave out what is quantized already",
            )


def _batches(rows: Sequence[Sequence[int]]) -> list[mx.array]:
    """Rows of the same length together: no padding, so that every position is a real token."""
    by_length: dict[int, list[Sequence[int]]] = {}
    for row in rows:
        by_length.setdefault(len(row), []).append(row)
    batches = []
    for length, equal in sorted(by_length.items()):
        step = max(_TOKENS // length, 1)
        batches += [mx.array(equal[i : i + step]) for i in range(0, len(equal), step)]
    return batches


def _paths_inside(
    layer: Any, modules: Mapping[str, Any], quantizations: Mapping[str, Quantization]
) -> dict[str, Any]:
    own = {id(module) for _, module in layer.named_modules()}
    return {path: modules[path] for path in quantizations if id(modules[path]) in own}


Measured = list[tuple[list[str], "_Statistics"]]  # paths with the same inputs, and their statistics


def _measured(
    blocks: Blocks, number: int, states: Sequence[mx.array], modules: Mapping[str, Any]
) -> Measured:
    with _recorded(modules) as statistics:
        _run(blocks, number, states)
    return statistics


def _head_statistics(blocks: Blocks, states: Sequence[mx.array]) -> _Statistics:
    """The inputs of the output head."""
    statistics = _Statistics()
    for x in states:
        statistics.add(blocks.finished(x))
    return statistics


def _run(blocks: Blocks, number: int, states: Sequence[mx.array]) -> list[mx.array]:
    """The hidden states of all batches after a block."""
    return _evaluated(blocks.run(number, x) for x in states)


def _evaluated(states: Iterable[mx.array]) -> list[mx.array]:
    """One batch after the other, so that no more than one is worked on at a time."""
    out = []
    for x in states:
        mx.eval(x)
        out.append(x)
    return out


def _refine(
    modules: Mapping[str, Any],
    options: _Options,
    measure: Callable[[Mapping[str, Any]], Measured],
    tied: bool = False,
) -> Iterator[tuple[str, Refined]]:
    """Measure the inputs of some modules, quantize them, and put the rounded weights in."""
    made = {path: options.finished(path) for path in modules}
    missing = {path: module for path, module in modules.items() if made[path] is None}
    hessians: dict[str, list[np.ndarray]] = {}
    for members, statistics in measure(missing) if missing else []:
        if statistics.total is not None:
            means = statistics.hessians()
            if tied:
                means = [h + np.mean(np.diag(h)) * np.eye(len(h)) for h in means]
            hessians.update(dict.fromkeys(members, means))
    for path, module in modules.items():
        q, refined = options.quantizations[path], made[path]
        if refined is None and path in hessians:
            refined = _quantized(module.weight, hessians[path], q, options)
            yield path, refined
        if refined is not None:
            module.weight = dequantized(refined, q).astype(module.weight.dtype)


def dequantized(refined: Refined, quantization: Quantization) -> mx.array:
    """The values of a quantized module, in float32."""
    q, parts = quantization, refined.parts
    scales, biases = parts["scales"], parts.get("biases")
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(parts["weight"], scales, biases, q.group_size, q.bits, q.mode, dtype=mx.float32)


def _quantized(
    weight: mx.array, hessians: Sequence[np.ndarray], quantization: Quantization, options: _Options
) -> Refined:
    experts = weight if weight.ndim == 3 else weight[None]
    parts, latents = [], []
    for expert, hessian in zip(experts, hessians, strict=True):
        one = expert.astype(mx.float32)
        importance = mx.array(np.maximum(np.diag(hessian), 0).astype(np.float32))
        scales = find_scales(one, quantization, importance, options.dtype)
        if options.feedback:
            one = mx.array(gptq(np.array(one), hessian, scales, quantization, damping=options.damping))
        parts.append(pack(one, scales, quantization))
        latents.append(one)
    stacked = {name: mx.stack([part[name] for part in parts]) for name in parts[0]}
    latent = mx.stack(latents)
    if weight.ndim == 2:
        stacked, latent = {name: part[0] for name, part in stacked.items()}, latent[0]
    mx.eval(stacked, latent)
    return Refined(stacked, latent)


@contextmanager
def _weights_restored(modules: Mapping[str, Any]) -> Iterator[None]:
    before = {path: module.weight for path, module in modules.items()}
    try:
        yield
    finally:
        for path, weight in before.items():
            modules[path].weight = weight


@contextmanager
def _recorded(modules: Mapping[str, Any]) -> Iterator[Measured]:
    """Record the inputs of modules while they run; those with the same inputs share one entry.

    Each module gets a subclass of its own type for the time, so a model keeps its structure.
    """
    result: Measured = []
    group: dict[str, tuple[list[str], _Statistics]] = {}
    last: list[tuple[Any, Any, str]] = []  # the inputs of the latest calls, kept alive

    def record(path: str, module: Any, x: mx.array, indices: Any) -> None:
        leader = next((p for before, i, p in last if before is x and i is indices), None)
        if path not in group:
            if leader is not None and leader in group:
                group[path] = group[leader]
                group[path][0].append(path)
            else:
                group[path] = ([path], _Statistics())
                result.append(group[path])
        members, statistics = group[path]
        if members[0] != path:
            return
        last.append((x, indices, path))
        del last[:-4]
        if indices is None:
            statistics.add(x)
        else:
            statistics.add_experts(x, indices, module.weight.shape[0])

    with ExitStack() as stack:
        for path, module in modules.items():
            stack.enter_context(_subclassed(path, module, record))
        yield result


@contextmanager
def _subclassed(path: str, module: Any, record: Callable[..., None]) -> Iterator[None]:
    plain = type(module)
    is_stack = module.weight.ndim == 3

    class Recording(plain):  # type: ignore[misc, valid-type]
        """A module that tells its inputs."""

        def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
            record(path, module, x, args[0] if is_stack else None)
            return plain.__call__(self, x, *args, **kwargs)

    module.__class__ = Recording
    try:
        yield
    finally:
        module.__class__ = plain
