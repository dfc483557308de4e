"""Calibration: the weights of a model are rounded so that the outputs of its layers on real rows stay.

Block by block, and within a block one group of layers with the same inputs after the other, the inputs are
measured in the unquantized model and in the one whose layers before are rounded already: the Hessian H, the
mean of x x^T over the real tokens of the latter, all tokens alike, and how the former differ. Weights are
corrected for that difference, scales are chosen by the error weighted with the inputs, and the weights are
rounded with error feedback (:mod:`mlx_distill.models.rounding`). Held at a time are, of the rows in both
models, the hidden states and the inputs in one block, and the Hessian of one group.

A stack of experts has a Hessian for each expert, over the tokens that the router sent to it, and is not
corrected, since the routers of the two models choose different experts. A tied embedding has that of the
output head plus the mean of its diagonal times the identity, for its use as an embedding. An embedding that
is not tied has no inputs to measure: it is not calibrated.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
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
from mlx_distill.models.quantization import Quantization
from mlx_distill.models.refined import Refined
from mlx_distill.models.rounding import DEFAULTS, InputMoments, Rounding, round_weight
from mlx_distill.models.token_ids import check_token_ids
from mlx_distill.progress import NullProgress, Progress

_TOKENS = 4096  # of rows of the same length that run at a time
_LEAST_TOKENS_SHARE = 0.25  # an expert with fewer tokens than this share of its columns has the mean Hessian


@dataclass
class _Statistics:
    """The sums of x x^T over the inputs of a module, and of (y - x) x^T with y the inputs in the unquantized
    model; of a stack ``[e, i, i]`` and a count for each expert, without the latter.
    """

    total: mx.array | None = None
    cross: mx.array | None = None
    count: np.ndarray = field(default_factory=lambda: np.zeros(1))

    def add(self, inputs: mx.array, plain: mx.array) -> None:
        """Add inputs ``[..., i]`` and those in the unquantized model."""
        x, y = (part.reshape(-1, part.shape[-1]).astype(mx.float32) for part in (inputs, plain))
        product, cross = x.T @ x, (y - x).T @ x
        self.total = product if self.total is None else self.total + product
        self.cross = cross if self.cross is None else self.cross + cross
        self.count = self.count + len(x)
        mx.eval(self.total, self.cross)

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

    def moments(self, tied: bool = False) -> list[InputMoments]:
        """The means, in float64; of experts with few tokens that of all experts. That of a ``tied`` embedding
        is for both of its uses.
        """
        assert self.total is not None
        totals = np.array(self.total).reshape(len(self.count), *self.total.shape[-2:])
        mean = totals.sum(axis=0, dtype=np.float64) / max(self.count.sum(), 1)
        if len(self.count) > 1:
            least = _LEAST_TOKENS_SHARE * totals.shape[-1]
            return [
                InputMoments(total.astype(np.float64) / count if count >= least else mean)
                for total, count in zip(totals, self.count, strict=True)
            ]
        if tied:
            mean += np.mean(np.diag(mean)) * np.eye(len(mean))
        cross = np.array(self.cross).astype(np.float64) / max(self.count.sum(), 1)
        return [InputMoments(mean, cross)]


def calibrate(
    model: Any,
    rows: Sequence[Sequence[int]],
    quantizations: Mapping[str, Quantization],
    *,
    rounding: Rounding = DEFAULTS,
    finished: Callable[[str], Refined | None] = lambda path: None,
    progress: Progress | None = None,
) -> Iterator[tuple[str, Refined]]:
    """Quantize the modules of a model, calibrated on rows, one block at a time.

    Args:
        model: Unquantized where it is to be quantized, adapters merged
            (:func:`~mlx_distill.models.merged.load_merged`); it is as before when the iterator ends.
        rows: Token ids of whole chats: prompt and answer. 128 of them suffice.
        quantizations: For each path of a module how to quantize it.
        rounding: How each module is rounded.
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
    options = _Options(quantizations, rounding, finished)
    with (progress or NullProgress()).task("calibrate", total=len(blocks.layers) + 1, unit="block") as bar:
        plain = _evaluated(map(blocks.embedded, batches))
        states = list(plain)
        for number, layer in enumerate(blocks.layers):
            inside = _paths_inside(layer, modules, quantizations)
            block = _Block(blocks, number, inside, [{} for _ in states])
            states, plain = yield from _refine_block(block, states, plain, options)
            bar.update(number + 1)
        if head_path in quantizations:
            head = {head_path: modules[head_path]}
            with _weights_restored(head):
                yield from _refine(
                    head, options, partial(_head_statistics, blocks, states, plain), is_tied(model)
                )
        bar.update(len(blocks.layers) + 1)


@dataclass(frozen=True)
class _Options:
    quantizations: Mapping[str, Quantization]
    rounding: Rounding
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


@dataclass(frozen=True)
class _Call:
    """Modules that were called with the same inputs, and of a stack the experts."""

    paths: list[str]
    inputs: mx.array
    indices: mx.array | None


Inputs = dict[str, list[mx.array]]  # of modules by path, one for each call


@dataclass(frozen=True)
class _Block:
    """A block whose modules are measured and rounded one group after the other.

    ``known`` has for each batch the inputs that were measured in the quantized model. They do not change any
    more, so a later pass begins with them: MLX does not compute what was before.
    """

    blocks: Blocks
    number: int
    modules: Mapping[str, Any]
    known: list[dict[str, mx.array]]

    def groups(self, states: mx.array) -> list[list[str]]:
        """The modules that have the same inputs, in the order in which the block calls them."""
        groups: dict[str, list[str]] = {}
        for call in self._calls(states, {})[0]:
            groups.setdefault(call.paths[0], call.paths)
        return list(groups.values())

    def whole(self, states: Sequence[mx.array]) -> tuple[list[Inputs], list[mx.array]]:
        """The inputs of the modules but of stacks, and the output of the block, of each batch."""
        found, outputs = [], []
        for x, known in zip(states, self.known, strict=True):
            calls, output = self._calls(x, known)
            inputs: Inputs = {}
            for call in calls:
                if call.indices is None:
                    inputs.setdefault(call.paths[0], []).append(call.inputs)
            mx.eval(output, inputs)
            found.append(inputs)
            outputs.append(output)
        return found, outputs

    def measured(self, path: str, states: Sequence[mx.array], unquantized: Sequence[Inputs]) -> _Statistics:
        """The inputs of a group with the first module ``path``; what is behind it is not computed."""
        statistics, module = _Statistics(), self.modules[path]
        for x, plain, known in zip(states, unquantized, self.known, strict=True):
            calls = [call for call in self._calls(x, known)[0] if call.paths[0] == path]
            if module.weight.ndim == 3:
                for call in calls:
                    statistics.add_experts(call.inputs, call.indices, module.weight.shape[0])
                continue
            for call, inputs in zip(calls, plain[path], strict=True):
                statistics.add(call.inputs, inputs)
            if len(calls) == 1:
                known.update(dict.fromkeys(calls[0].paths, calls[0].inputs))
        return statistics

    def _calls(self, states: mx.array, known: Mapping[str, mx.array]) -> tuple[list[_Call], mx.array]:
        """The calls of modules when the block runs, in order, and its output; nothing is computed yet.

        Each module gets a subclass of its own type for the time, so a model keeps its structure.
        """
        calls: list[_Call] = []

        def record(path: str, x: mx.array, indices: Any) -> mx.array:
            x = known.get(path, x)
            same = next((call for call in calls if call.inputs is x and call.indices is indices), None)
            if same is None:
                calls.append(_Call([path], x, indices))
            else:
                same.paths.append(path)
            return x

        with ExitStack() as stack:
            for path, module in self.modules.items():
                stack.enter_context(_subclassed(path, module, record))
            output = self.blocks.run(self.number, states)
        return calls, output


def _refine_block(
    block: _Block, states: Sequence[mx.array], plain: Sequence[mx.array], options: _Options
) -> Generator[tuple[str, Refined], None, tuple[list[mx.array], list[mx.array]]]:
    """Round the modules of a block; its outputs in the quantized and in the unquantized model."""
    unquantized, plain_outputs = block.whole(plain)
    with _weights_restored(block.modules):
        for group in block.groups(states[0]):
            measure = partial(block.measured, group[0], states, unquantized)
            yield from _refine({path: block.modules[path] for path in group}, options, measure)
        return block.whole(states)[1], plain_outputs


def _head_statistics(blocks: Blocks, states: Sequence[mx.array], plain: Sequence[mx.array]) -> _Statistics:
    """The inputs of the output head."""
    statistics = _Statistics()
    for x, y in zip(states, plain, strict=True):
        statistics.add(blocks.finished(x), blocks.finished(y))
    return statistics


def _evaluated(states: Iterable[mx.array]) -> list[mx.array]:
    """One batch after the other, so that no more than one is worked on at a time."""
    out = []
    for x in states:
        mx.eval(x)
        out.append(x)
    return out


def _refine(
    modules: Mapping[str, Any], options: _Options, measure: Callable[[], _Statistics], tied: bool = False
) -> Iterator[tuple[str, Refined]]:
    """Measure the inputs that some modules share, quantize them, and put the rounded weights in."""
    made = {path: options.finished(path) for path in modules}
    statistics = measure() if None in made.values() else _Statistics()
    moments = statistics.moments(tied) if statistics.total is not None else []
    for path, module in modules.items():
        q, refined = options.quantizations[path], made[path]
        if refined is None and moments:
            refined = round_weight(module.weight, moments, q, options.rounding)
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


@contextmanager
def _weights_restored(modules: Mapping[str, Any]) -> Iterator[None]:
    before = {path: module.weight for path, module in modules.items()}
    try:
        yield
    finally:
        for path, weight in before.items():
            modules[path].weight = weight


@contextmanager
def _subclassed(path: str, module: Any, record: Callable[..., mx.array]) -> Iterator[None]:
    plain = type(module)
    is_stack = module.weight.ndim == 3

    class Recording(plain):  # type: ignore[misc, valid-type]
        """A module that tells its inputs, and may get others."""

        def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
            x = record(path, x, args[0] if is_stack else None)
            return plain.__call__(self, x, *args, **kwargs)

    module.__class__ = Recording
    try:
        yield
    finally:
        module.__class__ = plain
