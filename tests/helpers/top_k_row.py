"""An aligned row whose targets are read from logits, as a cache keeps them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_distill.distill.align import AlignedRow, align_row, at_temperature
from mlx_distill.distill.teacher_cache import TeacherTargets
from mlx_distill.distill.token_distributions import Kept, distributions


def top_k_row(z: np.ndarray, k: int, temperature: float = 1.0) -> AlignedRow:
    """A row of one token a position, with its mass outside of the top k at the temperature.

    Args:
        z: ``[n, v]`` the teacher's logits.
        k: Ids that are kept of each distribution.
        temperature: That the targets are read at.
    """
    n = len(z)
    kept = Kept(k, (temperature,) if temperature != 1 else ())
    found = distributions(mx.array(z), np.zeros(n, np.int32), kept)
    targets = TeacherTargets(
        "row",
        "",
        None,
        np.zeros(n, np.int32),
        found.logprobs,
        found.topk_ids,
        found.topk_logprobs,
        tempered_tails=found.tempered_tails,
    )
    return align_row(
        np.zeros(n + 1, np.int32),
        1,
        np.array([[i, i + 1, i, i + 1] for i in range(n - 1)]),
        teacher_logprobs=found.logprobs,
        topk_ids=found.topk_ids,
        topk_logprobs=at_temperature(targets, temperature),
        label_start=None,
        label_logprobs=None,
        temperature=temperature,
    )
