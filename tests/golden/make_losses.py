"""Values and gradients of the reference losses, for tests/losses.

    pip install --no-deps trl==1.16.0          (Apache-2.0)
    pip install --no-deps torchtune==0.6.1     (BSD-3-Clause; one file is loaded, which needs torch alone)
    python tests/golden/make_losses.py

Also needs the parity extra (torch) and accelerate. Computed in float64 where the reference allows it (its
chunked divergence is float32 inside). The reference has no T² factor; it is applied here.
"""

from __future__ import annotations

import os
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
from trl.experimental.gkd.gkd_trainer import GKDTrainer
from trl.experimental.gold.gold_config import GOLDConfig
from trl.experimental.gold.gold_trainer import ULDLoss
from trl.experimental.server_distillation.server_distillation_trainer import _add_tail_bucket
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

N, V, D, E, K = 6, 37, 8, 12, 5
STUDENT_TOKENS = 31
SETTINGS = [(beta, t) for beta in (0.0, 0.1, 0.5, 0.9, 1.0) for t in (1.0, 2.0)]


def with_gradient(loss: torch.Tensor, *inputs: torch.Tensor) -> list[np.ndarray]:
    """The loss of each row, and the gradient of their sum with respect to each input."""
    gradients = torch.autograd.grad(loss.sum(), inputs, retain_graph=True)
    return [loss.detach().numpy(), *(g.numpy() for g in gradients)]


def divergences(out: dict[str, np.ndarray]) -> None:
    """Generalized Jensen-Shannon divergence from trl; total variation and skew KL from torch functions."""
    teacher = torch.tensor(out["teacher_logits"], dtype=torch.float64)
    for beta, t in SETTINGS:
        student = torch.tensor(out["student_logits"], dtype=torch.float64, requires_grad=True)
        jsd = GKDTrainer.generalized_jsd_loss(
            student[None], teacher[None], beta=beta, temperature=t, reduction="none"
        )
        key = f"jsd.{beta}.{t}"
        out[f"{key}.value"], out[f"{key}.grad"] = with_gradient(t**2 * jsd[0].sum(-1), student)
    for t in (1.0, 2.0):
        student = torch.tensor(out["student_logits"], dtype=torch.float64, requires_grad=True)
        p, q = F.softmax(teacher / t, -1), F.softmax(student / t, -1)
        out[f"tv.{t}.value"], out[f"tv.{t}.grad"] = with_gradient(t**2 * (p - q).abs().sum(-1) / 2, student)
        q = F.softmax(student / t, -1)
        skew = F.kl_div((0.1 * p + 0.9 * q).log(), p, reduction="none").sum(-1)
        out[f"skew.{t}.value"], out[f"skew.{t}.grad"] = with_gradient(t**2 * skew, student)


def bucket(out: dict[str, np.ndarray]) -> None:
    """Forward KL over the top-k tokens and the reference's tail bucket."""
    teacher = torch.tensor(out["teacher_logits"], dtype=torch.float64).log_softmax(-1)
    student = torch.tensor(out["student_logits"], dtype=torch.float64, requires_grad=True)
    top = teacher.topk(K, dim=-1)
    valid = torch.ones_like(top.indices, dtype=torch.bool)
    p, _ = _add_tail_bucket(top.values, valid)
    q, _ = _add_tail_bucket(student.log_softmax(-1).gather(-1, top.indices), valid)
    out["bucket.value"], out["bucket.grad"] = with_gradient(
        F.kl_div(q, p, reduction="none", log_target=True).sum(-1), student
    )


def fused(out: dict[str, np.ndarray], rng: np.random.Generator) -> None:
    """Divergence from hidden states and heads, with gradients of the student's hidden state and head."""
    for name, shape in {"h_s": (N, D), "w_s": (V, D), "h_t": (N, E), "w_t": (V, E)}.items():
        out[name] = rng.normal(size=shape).astype(np.float32)
    h_t, w_t = torch.tensor(out["h_t"]), torch.tensor(out["w_t"])
    for beta, t in SETTINGS:
        h_s, w_s = torch.tensor(out["h_s"], requires_grad=True), torch.tensor(out["w_s"], requires_grad=True)
        value, _ = ChunkedDivergenceFunction.apply(
            h_s, w_s, None, h_t, w_t, None, beta, t, 1.0, None, 1.0, None
        )
        key = f"fused.{beta}.{t}"
        out[f"{key}.value"], out[f"{key}.grad_h"], out[f"{key}.grad_w"] = with_gradient(
            t**2 * value, h_s, w_s
        )


def alignment(out: dict[str, np.ndarray], rng: np.random.Generator) -> None:
    """Spans of tokens between common byte boundaries."""
    for case in range(5):
        lengths = []
        for mean in (2, 3):
            ends = np.cumsum(rng.integers(1, 2 * mean, size=40))
            ends = np.append(ends[ends < 60], 60)
            lengths.append(np.diff(ends, prepend=0))
        offsets = [
            [(int(end - size), int(end)) for size, end in zip(sizes, np.cumsum(sizes), strict=True)]
            for sizes in lengths
        ]
        groups = zip(*ULDLoss._align_by_byte_offsets(*offsets), strict=True)
        out[f"align.{case}.student"], out[f"align.{case}.teacher"] = lengths
        out[f"align.{case}.spans"] = np.array([[s[0], s[-1] + 1, t[0], t[-1] + 1] for s, t in groups])


def hybrid_loss(pairs: dict[int, int], beta: float) -> ULDLoss:
    """The reference's loss for equal tokens (teacher to student) that are given instead of tokenizers."""
    loss = ULDLoss(GOLDConfig(output_dir="", beta=beta, bf16=False, use_cpu=True))
    loss._teacher_matched_ids, loss._student_matched_ids = set(pairs), set(pairs.values())
    loss.mapping_tensor = torch.tensor([pairs.get(i, -1) for i in range(V)])
    return loss


def gold(out: dict[str, np.ndarray], rng: np.random.Generator) -> None:
    """The parts of the hybrid loss at positions that need no merging: the divergence over the tokens of both
    vocabularies, which is over masses that do not sum to one, and the distance of the others, sorted.
    """
    same = np.full(V, -1)
    same[rng.permutation(V)[:20]] = rng.permutation(STUDENT_TOKENS)[:20]
    out["gold.same"] = same.astype(np.int32)
    teacher = torch.tensor(out["teacher_logits"], dtype=torch.float64)
    for name, width, pairs in (
        ("gold", STUDENT_TOKENS, {t: s for t, s in enumerate(same.tolist()) if s >= 0}),
        ("gold_one", V, {i: i for i in range(V)}),
    ):
        for beta, t in SETTINGS:
            loss = hybrid_loss(pairs, beta)
            student = torch.tensor(out["student_logits"][:, :width], dtype=torch.float64, requires_grad=True)
            parts: dict[str, list[torch.Tensor]] = {"matched": [], "unmatched": []}
            for z, p in zip(student, teacher, strict=True):
                loss._compute_hybrid_uld_loss(F.softmax(z[None] / t, -1), F.softmax(p[None] / t, -1))
                parts["matched"].append(t**2 * loss.last_matched_loss)
                parts["unmatched"].append(loss.last_unmatched_loss)
            for part, values in parts.items():
                if name == "gold_one" and part == "unmatched":
                    continue
                value, grad = with_gradient(torch.stack(values), student)
                out[f"{name}.{beta}.{t}.{part}"], out[f"{name}.{beta}.{t}.{part}_grad"] = value, grad
    # A student with more mass on the equal tokens than the teacher: the reference's loss is below zero.
    pairs = {t: s for t, s in enumerate(same.tolist()) if s >= 0}
    loss, z = hybrid_loss(pairs, 0.0), out["student_logits"][:, :STUDENT_TOKENS].astype(np.float64)
    z = np.where(np.isin(np.arange(STUDENT_TOKENS), same), 2.0, z - 9)
    values = []
    for row, p in zip(torch.tensor(z), teacher, strict=True):
        loss._compute_hybrid_uld_loss(F.softmax(row[None], -1), F.softmax(p[None] / 4, -1))
        values.append(loss.last_matched_loss.item())
    out["gold_below_zero.student"], out["gold_below_zero.matched"] = z.astype(np.float32), np.array(values)


def torchtune_losses() -> Any:
    """torchtune's module of divergences, without its package."""
    package = find_spec("torchtune")
    assert package is not None and package.submodule_search_locations
    path = Path(package.submodule_search_locations[0]) / "modules" / "loss" / "kd_losses.py"
    spec = spec_from_file_location("kd_losses", path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def torchtune(out: dict[str, np.ndarray]) -> None:
    """torchtune's divergences of each row: the reverse is a KL, the forward one a cross-entropy, whose value
    is too large by the teacher's entropy, and whose gradient is that of the KL.
    """
    module, teacher = torchtune_losses(), torch.tensor(out["teacher_logits"])
    for name, loss in (("forward", module.ForwardKLLoss()), ("reverse", module.ReverseKLLoss())):
        student = torch.tensor(out["student_logits"], requires_grad=True)
        one = torch.zeros(1, dtype=torch.long)
        rows = [loss(z[None], p[None], one) for z, p in zip(student, teacher, strict=True)]
        value, grad = with_gradient(torch.stack(rows), student)
        out[f"torchtune.{name}.values"], out[f"torchtune.{name}.grad"] = value, grad


def main() -> None:
    """Write losses.npz into the folder of this script."""
    rng = np.random.default_rng(0)
    out = {
        name: (2 * rng.normal(size=(N, V))).astype(np.float32)
        for name in ("student_logits", "teacher_logits")
    }
    divergences(out)
    bucket(out)
    fused(out, rng)
    alignment(out, rng)
    gold(out, rng)
    torchtune(out)
    np.savez_compressed(Path(__file__).parent / "losses.npz", **out)


if __name__ == "__main__":
    main()
