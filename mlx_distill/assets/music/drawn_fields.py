"""Songs of which five values of the answer are drawn from known probabilities: policy ``drawn_fields`` of the generator.

Songs and verdict are those of policy ``drawn``. The answer is ``{"verdict": v, "score": 10 * tens + units, "themes": [first, second]}``:

    P(tens)   = softmax(0.9 * (A[stance] + B[subject] + L[verdict]))    digits 2 to 9, given the verdict that was drawn
    P(units)  = softmax(1.2 * E[stance])                                digits 0 to 9
    P(first)  = softmax(1.2 * F[subject])                               8 words
    P(second) = softmax(1.2 * G[stance])                                4 words

with fixed normal random numbers ``A`` (4 x 8), ``B`` (8 x 8), ``L`` (4 x 8), ``E`` (4 x 10), ``F`` (8 x 8), ``G`` (4 x 4), drawn in this order.
The tens depend on what stands earlier in the answer, so a model's greedy text never shows most contexts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from mlx_distill.assets.music import generator as words
from mlx_distill.assets.music.drawn import (
    SUBJECTS,
    VERDICTS,
    check_noise,
    softmax,
    songs,
    table,
    verdict_probabilities,
)

TENS, UNITS = tuple("23456789"), tuple("0123456789")
FIRST = ("faith", "kindness", "gratitude", "intoxication", "revenge", "deceit", "work", "travel")
SECOND = ("nature", "memory", "hope", "joy")
VALUES = {"verdict": VERDICTS, "score[0]": TENS, "score[1]": UNITS, "themes[0]": FIRST, "themes[1]": SECOND}
"""What is drawn: a field, a character of a number, or an item of a list, and its values."""

_random = random.Random(6)
A, B, L = table(_random, words.STANCES, 8), table(_random, SUBJECTS, 8), table(_random, VERDICTS, 8)
E, F, G = table(_random, words.STANCES, 10), table(_random, SUBJECTS, 8), table(_random, words.STANCES, 4)


def probabilities(subject: str, stance: str, verdict: str) -> dict[str, dict[str, float]]:
    """Of each drawn value its distribution, that of the tens given the verdict that stands in the answer."""
    tens = [sum(z) for z in zip(A[stance], B[subject], L[verdict], strict=True)]
    drawn = {
        "score[0]": softmax(tens, 0.9),
        "score[1]": softmax(E[stance], 1.2),
        "themes[0]": softmax(F[subject], 1.2),
        "themes[1]": softmax(G[stance], 1.2),
    }
    out = {"verdict": verdict_probabilities(subject, stance)}
    return out | {name: dict(zip(VALUES[name], p, strict=True)) for name, p in drawn.items()}


def generate(count: int = 1000, seed: int = 0, part: str = "train", noise: float = 0.0) -> Iterator[dict[str, Any]]:
    """Yield ``count`` songs with drawn answers and ``probabilities``, those of the tens given the row's own verdict; the arguments are those
    of policy ``drawn``.
    """
    check_noise(noise)
    draw = random.Random(f"{part}/{seed}/labels/rich")
    for song in songs(count, seed, part):
        p = verdict_probabilities(song["subject"], song["stance"])
        verdict = draw.choices(VERDICTS, list(p.values()))[0]
        known = probabilities(song["subject"], song["stance"], verdict)
        tens, units, first, second = (draw.choices(VALUES[name], list(known[name].values()))[0] for name in list(VALUES)[1:])
        answer = {"verdict": verdict, "score": int(tens + units), "themes": [first, second]}
        yield {**song, "answer": answer, "probabilities": known}
