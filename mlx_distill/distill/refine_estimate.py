"""Memory and arithmetic of a refinement, before it starts and for models that are not on this machine."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx.utils import tree_flatten

from mlx_distill.models.architectures.registry import module_names
from mlx_distill.models.calibrate_estimate import model_of_config
from mlx_distill.models.forward import compute_dtype, hidden_size, is_tied
from mlx_distill.models.modules import matrix_shape
from mlx_distill.models.quantization import Quantization
from mlx_distill.text import size
from mlx_distill.train.objective import DENSE_LIMIT

# Latent weight and the two moments of Adam in float32; an offset, which needs none; the gradient.
LATENT_BYTES, OFFSET_BYTES, GRADIENT_BYTES = 12, 4, 4
# While the weights are rounded: in float32 twice, and once as booleans (inside the range of the grid).
ROUNDING_BYTES = 9
LOGIT_ARRAYS = 4  # of the size of the logits, at once
BLOCK_ARRAYS = 2  # activations and their gradients, which end to end exist of one block at a time
_LAYER = re.compile(r".*\.layers\.\d+(?=\.)")


@dataclass(frozen=True)
class RefineEstimate:
    """What a refinement needs.

    Args:
        trained: Weights that train, of all blocks, embedding and head.
        state_bytes: Of what is learned of them, and of its moments.
        largest_block: Weights that train in the block that has most; block by block they are all latent.
        resident_bytes: The model itself, with the weights that train in their own type.
        activation_bytes: Of one step, end to end.
        hidden_bytes: The hidden states of all rows, twice, where blocks are trained one after the other.
        step_flops: Floating-point operations of a step.
        tokens: Of a step.
    """

    trained: int
    state_bytes: int
    largest_block: int
    resident_bytes: int
    activation_bytes: int
    block_activation_bytes: int
    hidden_bytes: int
    step_flops: float
    tokens: int
    compute_bytes: int

    @property
    def end_to_end_bytes(self) -> int:
        """Peak memory where all weights train together."""
        return (
            self.resident_bytes
            + self.state_bytes
            + self.trained * self._transient_bytes
            + self.activation_bytes
        )

    @property
    def block_bytes(self) -> int:
        """Peak memory where blocks are trained one after the other."""
        return (
            self.resident_bytes
            + self.largest_block * (LATENT_BYTES + self._transient_bytes)
            + self.block_activation_bytes
            + self.hidden_bytes
        )

    @property
    def _transient_bytes(self) -> int:
        """Of a weight: its gradient, and while it is rounded."""
        return GRADIENT_BYTES + ROUNDING_BYTES + self.compute_bytes

    def seconds(self, steps: int, flops_per_second: float) -> float:
        """Time of some steps at a rate of arithmetic."""
        return steps * self.step_flops / flops_per_second

    def lines(self, steps: int) -> list[str]:
        """For people."""
        return [
            f"{self.trained:,} weights train ({size(self.state_bytes)} with moments), {steps} steps of "
            f"{self.tokens:,} tokens, {self.step_flops / 1e12:.3g} TFLOP a step",
            f"memory: {size(self.end_to_end_bytes)} end to end, {size(self.block_bytes)} block by block",
        ]


def estimate_refine(
    student: Any, quantizations: Mapping[str, Quantization], lengths: Sequence[int], batch_size: int
) -> RefineEstimate:
    """Memory and arithmetic of refining a model, from shapes alone: none of its arrays is computed.

    Counted are the inputs and outputs of every matrix product, the attention scores, and the logits; for a
    stack of experts those of the experts that a token uses.

    Args:
        student: mlx-lm's model, loaded or of :func:`~mlx_distill.models.architectures.registry.build_model`.
        quantizations: Of the modules that train, by path.
        lengths: Tokens of each row.
        batch_size: Rows a step.
    """
    length = max(lengths)
    tokens = round(batch_size * sum(lengths) / len(lengths))
    padded = batch_size * length
    compute = compute_dtype(student).size
    blocks: dict[str, list[_Matrix]] = {}
    for matrix in _matrices(student, quantizations):
        blocks.setdefault(matrix.block, []).append(matrix)
    per_token = {
        name: sum(m.activations for m in found) * compute + (_scores(student, length) if name else 0)
        for name, found in blocks.items()
    }
    trained = {name: sum(m.weights for m in found if m.trains) for name, found in blocks.items()}
    every = [m for found in blocks.values() for m in found]
    inner = [name for name in blocks if name]
    hidden = hidden_size(student)
    columns = max((m.outputs for m in blocks.get("", [])), default=0)
    logits = 4 * LOGIT_ARRAYS * min(padded * columns, DENSE_LIMIT)
    attention = 12.0 * tokens * length * hidden * len(inner)
    return RefineEstimate(
        trained=sum(trained.values()),
        state_bytes=sum(m.state_bytes for m in every),
        largest_block=max((trained[name] for name in inner), default=0),
        resident_bytes=sum(a.nbytes for _, a in tree_flatten(student.parameters())),
        activation_bytes=padded * sum(per_token[name] for name in inner) + logits,
        block_activation_bytes=BLOCK_ARRAYS * padded * max((per_token[name] for name in inner), default=0),
        hidden_bytes=2 * sum(lengths) * hidden * compute,
        step_flops=attention + tokens * sum(m.flops for m in every),
        tokens=tokens,
        compute_bytes=compute,
    )


def predict_refine(
    config: Mapping[str, Any], lengths: Sequence[int], batch_size: int = 4, mode: str = "mxfp4"
) -> RefineEstimate:
    """The estimate for a checkpoint with a config, which need not be on this machine, in bfloat16.

    Experts that the checkpoint stores in MXFP4 keep their bits; all other linear layers, embeddings and
    stacks of experts train, but the routers.

    Args:
        config: The ``config.json``.
        lengths: Tokens of each row.
        batch_size: Rows a step.
        mode: Of the weights that train.

    >>> config = {"model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128,
    ...           "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 100,
    ...           "rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 512,
    ...           "tie_word_embeddings": True}
    >>> predict_refine(config, [100] * 8).trained
    80128
    """
    model, trained = model_of_config(config, mode)
    return estimate_refine(model, trained, lengths, batch_size)


@dataclass(frozen=True)
class _Matrix:
    """A linear layer, an embedding or a stack of experts, of which a token uses ``used``."""

    block: str  # the path of its layer; empty for embedding and head
    inputs: int
    outputs: int
    used: int
    weights: int
    quantization: Quantization | None  # where it trains
    product: bool  # whether hidden states are multiplied by it: not by an embedding that is not the head

    @property
    def trains(self) -> bool:
        """Whether something of it is learned."""
        return self.quantization is not None

    @property
    def state_bytes(self) -> int:
        """Of what is learned end to end, and of its moments."""
        if self.quantization is None:
            return 0
        return self.weights * (OFFSET_BYTES if self.quantization.mode == "affine" else LATENT_BYTES)

    @property
    def activations(self) -> int:
        """Numbers a token that the backward pass needs."""
        return self.used * (self.inputs + self.outputs)

    @property
    def flops(self) -> float:
        """Of a token: forward, gradient of the input, and where it trains of the weight."""
        return 2.0 * (3 if self.trains else 2) * self.used * self.inputs * self.outputs * self.product


def _matrices(student: Any, quantizations: Mapping[str, Quantization]) -> list[_Matrix]:
    names, tied, out = module_names(student), is_tied(student), []
    experts_used = int(getattr(student.args, "num_experts_per_tok", 0) or 1)
    for path, module in student.named_modules():
        if "weight" not in module or module.weight.ndim < 2:
            continue
        outputs, inputs = matrix_shape(module)
        lead = module.weight.shape[0] if module.weight.ndim == 3 else 1
        layer = _LAYER.match(path)
        out.append(
            _Matrix(
                layer[0] if layer else "",
                inputs,
                outputs,
                min(experts_used, lead) if lead > 1 else 1,
                lead * outputs * inputs,
                quantizations.get(path),
                path != names.embedding or tied,
            )
        )
    return out


def _scores(student: Any, length: int) -> int:
    """Bytes a token of the attention scores and their softmax, in float32."""
    return 8 * length * int(student.args.num_attention_heads)
