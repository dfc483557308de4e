"""Songs whose verdict is drawn from a probability that is known exactly: policy ``drawn`` of the generator.

Each song has a subject and a stance towards it, told by the words of the packaged generator. The verdict is drawn from

    p = softmax(1.2 * (U[stance] + V[subject]))

where ``U`` (4 x 4) and then ``V`` (8 x 4) are fixed normal random numbers that no base model has seen. So the best that any model can do is
known: the most probable verdict is right on 68 % of many songs. A row has ``probabilities``: of each drawn field of the answer,
the probability of each of its values.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

from mlx_distill.assets.music import generator as words

VERDICTS = ("RECOMMENDED", "ACCEPTABLE", "CONCERNING", "NOT_RECOMMENDED")
SUBJECTS = (*words.GOOD, *words.BAD)
SCORES = dict(zip(VERDICTS, (87, 63, 37, 12), strict=True))  # the centre of the verdict's band
SHARPNESS = 1.2

_random = random.Random(5)


def table(rng: random.Random, rows: Sequence[str], columns: int) -> dict[str, list[float]]:
    """Normal random numbers, ``columns`` for each row."""
    return {row: [rng.gauss(0, 1.0) for _ in range(columns)] for row in rows}


U = table(_random, words.STANCES, 4)
V = table(_random, SUBJECTS, 4)


def softmax(logits: Sequence[float], sharpness: float) -> list[float]:
    """``softmax(sharpness * logits)``."""
    peak = max(logits)
    exps = [math.exp(sharpness * (z - peak)) for z in logits]
    return [e / sum(exps) for e in exps]


def verdict_probabilities(subject: str, stance: str) -> dict[str, float]:
    """The probability of each verdict on a song of this subject and stance."""
    logits = [u + v for u, v in zip(U[stance], V[subject], strict=True)]
    return dict(zip(VERDICTS, softmax(logits, SHARPNESS), strict=True))


def songs(count: int, seed: int, part: str) -> Iterator[dict[str, Any]]:
    """Songs without an answer: ``id``, ``title``, ``lyrics``, ``subject``, ``stance``."""
    if part not in words.OPENINGS:
        raise ValueError(f"part {part!r} is neither train nor test")
    rng = random.Random(f"{part}/{seed}/mixed")
    for index in range(count):
        subject, stance = rng.choice(SUBJECTS), rng.choice(words.STANCES)
        nouns, lines = rng.sample(words.NOUNS[subject], 3), []
        for verb, noun in zip(rng.sample(words.VERBS[stance], 2), nouns, strict=False):
            opening, closing = rng.choice(words.OPENINGS[part]), rng.choice(words.CLOSINGS[part])
            opening, closing = (opening, "") if rng.random() < 0.5 else ("", closing)
            lines.append(words._fill(f"{opening} I {verb} {noun} {closing}", rng))
        rng.shuffle(lines)
        title = rng.choice(words.TITLES[part]).format(N=words._title_case(nouns[2]), T=rng.choice(words.TIMES).title())
        yield {
            "id": f"{part}-{seed}-{index:06d}",
            "title": title,
            "lyrics": "\n".join(lines),
            "subject": subject,
            "stance": stance,
        }


def generate(count: int = 1000, seed: int = 0, part: str = "train", noise: float = 0.0) -> Iterator[dict[str, Any]]:
    """Yield ``count`` songs with a drawn verdict and ``probabilities``; the same arguments give the same songs.

    Args:
        count: How many.
        seed: Of the songs and of the draws.
        part: ``train`` or ``test``: which templates.
        noise: Not for drawn labels, whose probabilities would then be others.
    """
    check_noise(noise)
    draw = random.Random(f"{part}/{seed}/labels/table")
    for song in songs(count, seed, part):
        p = verdict_probabilities(song["subject"], song["stance"])
        verdict = draw.choices(VERDICTS, list(p.values()))[0]
        yield {**song, "answer": {"verdict": verdict, "score": SCORES[verdict]}, "probabilities": {"verdict": p}}


def check_noise(noise: float) -> None:
    """Refuse noise."""
    if noise:
        raise ValueError("noise is not for drawn labels, which have exact probabilities")
