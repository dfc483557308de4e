"""The packaged moderation data: the generator of messages, and the hand-written sentences."""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

import mlx_distill
from mlx_distill.assets.moderation import generator
from mlx_distill.assets.moderation.generator import GROUPS, KINDS, PARTS, WORDS, generate, templates
from mlx_distill.errors import ConfigError
from mlx_distill.storage import read_jsonl
from mlx_distill.tasks.answer import check_answer
from mlx_distill.tasks.task import load_task

SENTENCES = Path(mlx_distill.__file__).parent / "assets" / "moderation" / "sentences.jsonl"


def test_the_parts_share_no_template_and_no_text() -> None:
    texts = {part: {row["text"] for row in generate(5000, 0, part)} for part in PARTS}
    assert not texts["train"] & texts["test"]
    assert not {t for _, _, t in templates("train")} & {t for _, _, t in templates("test")}
    assert len(templates("train")) >= 40 and len(templates("test")) >= 20


def test_no_template_of_one_part_can_render_to_a_text_of_the_other() -> None:
    """Exact, not sampled: with every slot's words as alternatives, no train text matches a test template."""
    slots = {**WORDS, "group": tuple(GROUPS.values())}
    alternatives = {name: "(?:" + "|".join(map(re.escape, words)) + ")" for name, words in slots.items()}

    def pattern(template: str) -> re.Pattern[str]:
        tokens = re.split(r"\{(\w+)\}", template)
        return re.compile(
            "".join(re.escape(p) if i % 2 == 0 else alternatives[p] for i, p in enumerate(tokens))
        )

    patterns = {part: [(pattern(text), text) for _, _, text in templates(part)] for part in PARTS}
    fixed = {"group": GROUPS["cyclists"]} | {name: words[0] for name, words in WORDS.items()}
    for (train_pattern, train), (test_pattern, test) in itertools.product(
        patterns["train"], patterns["test"]
    ):
        assert not test_pattern.fullmatch(train.format_map(fixed)), (train, test)
        assert not train_pattern.fullmatch(test.format_map(fixed)), (train, test)


@pytest.mark.parametrize("part", PARTS)
def test_rows_are_balanced_over_label_and_group_and_short(part: str) -> None:
    rows = list(generate(1200, 3, part))
    counts = Counter((row["group"], row["answer"]["label"]) for row in rows)
    assert set(counts.values()) == {100} and len(counts) == 2 * len(GROUPS)
    assert len({row["text"] for row in rows}) == len({row["id"] for row in rows}) == 1200
    lengths = sorted(len(row["text"].split()) for row in rows)
    assert lengths[0] >= 8 and lengths[600] <= 13 and lengths[1176] <= 17
    schema = load_task("moderation").schema
    assert all(
        check_answer(row["answer"], schema) is None and GROUPS[row["group"]] in row["text"].lower()
        for row in rows
    )


def test_rows_depend_on_the_seed_and_not_on_the_count() -> None:
    assert list(generate(50, 7)) == list(generate(80, 7))[:50]
    assert [row["text"] for row in generate(50, 7)] != [row["text"] for row in generate(50, 8)]


def test_noise_flips_labels_and_nothing_else() -> None:
    clean, noisy = list(generate(1000, 1)), list(generate(1000, 1, noise=0.2))
    flipped = [
        a["id"] for a, b in zip(clean, noisy, strict=True) if a["answer"]["label"] != b["answer"]["label"]
    ]
    assert flipped == [row["id"] for row in noisy if row.get("noisy")] and 150 < len(flipped) < 250
    assert [row["text"] for row in clean] == [row["text"] for row in noisy] and not any(
        "noisy" in row for row in clean
    )


def test_confidence_follows_from_the_kind() -> None:
    seen = defaultdict(set)
    for row in generate(600):
        seen[row["template"].split("-")[1]].add((row["answer"]["label"], row["answer"]["confidence"]))
    assert seen == {kind.name: {(kind.label, kind.confidence)} for kind in KINDS}


def test_no_single_word_decides_the_label() -> None:
    """Harsh and kind words are about as frequent in fine messages as in hostile ones."""
    harsh, kind = Counter(), Counter()
    for row in generate(3000, 5):
        harsh[row["answer"]["label"]] += any(word in row["text"] for word in WORDS["bad"])
        kind[row["answer"]["label"]] += any(word in row["text"] for word in WORDS["good"])
    assert 0.6 < harsh["fine"] / harsh["hostile"] < 1.2 and 0.6 < kind["fine"] / kind["hostile"] < 1.6


@pytest.mark.parametrize("bad", [{"part": "middle"}, {"noise": 1.5}])
def test_an_invalid_argument_is_an_error(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        list(generate(**bad))


def test_more_rows_than_there_are_texts_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "WORDS", {name: words[:1] for name, words in WORDS.items()})
    with pytest.raises(ConfigError, match="fewer rows"):
        list(generate(1000))


def test_the_sentences_are_balanced_unique_and_fit_the_task() -> None:
    rows = [row for _, row in read_jsonl(SENTENCES)]
    counts = Counter((row["group"], row["label"], row["split"]) for row in rows)
    assert len(rows) == len({row["id"] for row in rows}) == len({row["text"] for row in rows}) == 120
    assert counts == {
        (g, label, split): n
        for g in GROUPS
        for label in ("hostile", "fine")
        for split, n in (("train", 6), ("test", 4))
    }
    schema = load_task("moderation").schema
    assert all(
        check_answer({"label": row["label"], "confidence": row["confidence"]}, schema) is None for row in rows
    )
    stem = {g: name.rstrip("s")[:6].lower() for g, name in GROUPS.items()}
    assert all(stem[row["group"]] in row["text"].lower() for row in rows)
