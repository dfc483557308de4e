"""The packaged music data: held-out songs share no line, template or title with any training data."""

from __future__ import annotations

import functools
import itertools
import random
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest

from mlx_distill.assets.moderation import generator as moderation
from mlx_distill.assets.music import generator as music
from mlx_distill.config import ASSETS
from mlx_distill.recipe import load_recipe
from mlx_distill.storage import read_jsonl
from mlx_distill.tasks.answer import check_answer
from mlx_distill.tasks.task import load_task


def lines(songs: Iterable[dict[str, Any]]) -> set[str]:
    return {line.strip().lower() for song in songs for line in song["lyrics"].splitlines() if line.strip()}


def titles(songs: Iterable[dict[str, Any]]) -> set[str]:
    return {song["title"].lower() for song in songs}


@functools.cache
def pretraining() -> list[dict[str, Any]]:
    """The songs of scripts/make_tiny_models.py."""
    return [
        song
        for seed, policy in ((1000, "keywords"), (1001, "whole"))
        for song in music.generate(32000, seed=seed, part="train", policy=policy, loose=0.6)
    ]


def sources(split: str | None) -> list[dict[str, Any]]:
    """The generated songs of the demo's recipe."""
    configs = [s for s in load_recipe("tiny").data.sources if s.generator and s.split == split]
    assert configs
    return [song for s in configs for song in music.generate(s.count, s.seed, s.part or "train", s.noise)]


@functools.cache
def written() -> list[dict[str, Any]]:
    """The hand-written songs."""
    return [row for _, row in read_jsonl(ASSETS / "music" / "songs.jsonl")]


@pytest.mark.slow
def test_held_out_songs_share_no_line_title_or_template_with_training_data() -> None:
    held_out = [*sources("test"), *music.generate(2000, seed=5, part="test")]
    learned = [*pretraining(), *sources(None)]
    messages = {row["text"].lower() for row in moderation.generate(6000, seed=1000, part="train")}
    assert len(sources("test")) >= 300
    assert not lines(held_out) & (lines(learned) | lines(written()) | messages)
    assert not titles(held_out) & (titles(learned) | titles(written()) | messages)
    used = [{t for song in songs for t in song["templates"]} for songs in (held_out, learned)]
    assert not used[0] & used[1]


@pytest.mark.slow
def test_hand_written_songs_share_no_line_or_title_with_generated_ones() -> None:
    learned = [*pretraining(), *sources(None)]
    assert not lines(written()) & lines(learned)
    assert not titles(written()) & titles(learned)


def filled(templates: Iterable[str], **slots: Iterable[str]) -> set[str]:
    """Every text that the templates can render to."""
    out = set()
    for template in templates:
        names = [name for name in slots if "{" + name + "}" in template]
        for words in itertools.product(*(slots[name] for name in names)):
            text = template
            for name, word in zip(names, words, strict=True):
                text = text.replace("{" + name + "}", word)
            out.add(text)
    return out


@pytest.mark.slow
def test_no_template_of_one_part_can_render_to_a_text_of_the_other() -> None:
    """Exact, not sampled: every rendering of every template."""
    times = [t.lower() for t in music.TIMES]
    words = [word for scene in music.SCENES.values() for word in scene]
    nouns = [music._title_case(noun) for group in music.NOUNS.values() for noun in group]
    made = {}
    for part in ("train", "test"):
        scenes = {
            f"{o}|{c}" for o, c in itertools.product(music.SCENE_OPENINGS[part], music.SCENE_CLOSINGS[part])
        }
        made[part] = {
            "openings": filled(music.OPENINGS[part], t=times),
            "closings": filled(music.CLOSINGS[part], t=times),
            "scenes": {text.replace("|", " ").strip().lower() for text in filled(scenes, s=words, t=times)},
            "references": filled(music.REFERENCE_LINES[part], r=music.REFERENCES),
            "titles": filled(music.TITLES[part], N=nouns, T=[t.title() for t in music.TIMES]),
        }
    train, test = made["train"], made["test"]
    # An opening or a closing may be empty, but in the test part never both; so no line about a subject is
    # shared either.
    assert train["openings"] & test["openings"] == train["closings"] & test["closings"] == {""}
    for kind in ("scenes", "references", "titles"):
        assert not train[kind] & test[kind], kind
    verbs = [verb for group in music.VERBS.values() for verb in group]
    middle = [text for part in made.values() for kind in ("openings", "closings") for text in part[kind]]
    # A line can be split into opening, subject and closing in one way only.
    assert not [text for text in middle if any(f"I {verb} " in f" {text} " for verb in verbs)]
    assert not any("|" in song["templates"] for song in music.generate(5000, seed=1, part="test"))


def test_random_templates_are_never_held_out_ones() -> None:
    times = [t.lower() for t in music.TIMES]
    frames = {text for kind in (music.OPENINGS, music.CLOSINGS) for text in filled(kind["test"], t=times)} - {
        ""
    }
    assert frames <= music.HELD_OUT
    songs = list(music.generate(400, seed=3, loose=1.0))
    assert all(
        s["answer"]["verdict"] == music.VERDICTS[music.kind_of(s["answer"]["themes"][0])][s["stance"]]
        for s in songs
    )
    used = {frame for s in songs for t in s["templates"] for frame in t.split("|")}
    assert len(used) > 2000 and not used & music.HELD_OUT
    assert {w for text in used for w in text.split()} - set(music.LOOSE_WORDS)  # also invented words

    class HeldOutFirst(random.Random):
        """Draws a held-out closing first, then another one."""

        script = [["now"], ["and"]]

        def choices(self, population: Any, *args: Any, **more: Any) -> Any:
            return self.script.pop(0) if more.get("k") != 5 else list("ab")

        def random(self) -> float:
            return 0.0

    assert "now" in music.HELD_OUT and music._babble(HeldOutFirst()) == "and"


def test_songs_depend_on_the_seed_and_not_on_the_count() -> None:
    one = list(music.generate(60, seed=7))
    assert one == list(music.generate(90, seed=7))[:60]
    assert lines(one) != lines(music.generate(60, seed=8))
    assert len({song["id"] for song in one}) == 60
    with pytest.raises(ValueError, match="neither train nor test"):
        next(music.generate(1, part="middle"))


@pytest.mark.slow
@pytest.mark.parametrize("part", ["train", "test"])
def test_answers_are_valid_and_follow_from_subject_and_stance(part: str) -> None:
    task = load_task("music")
    seen: Counter[str] = Counter()
    for song in music.generate(1500, seed=3, part=part):
        answer = song["answer"]
        assert check_answer(answer, task.schema) is None
        kind = music.kind_of(answer["themes"][0])
        assert answer["verdict"] == music.VERDICTS[kind][song["stance"]] and not song["noisy"]
        assert abs(answer["score"] - music.CENTRE[answer["verdict"]]) <= 8
        assert all(reference in song["lyrics"] for reference in answer["scripture_references"])
        seen[answer["verdict"]] += 1
    assert set(seen) == set(task.labels) and min(seen.values()) > 250


@pytest.mark.slow
def test_the_subject_alone_is_right_on_about_three_songs_in_ten() -> None:
    songs = list(music.generate(4000, seed=2, part="test"))
    correct = sum(
        s["answer"]["verdict"] == music.KEYWORD_VERDICTS[music.kind_of(s["answer"]["themes"][0])]
        for s in songs
    )
    assert 0.25 < correct / len(songs) < 0.36


def test_noise_replaces_the_given_share_of_verdicts() -> None:
    noisy = list(music.generate(3000, seed=1, noise=0.2))
    wrong = [
        s
        for s in noisy
        if s["answer"]["verdict"] != music.VERDICTS[music.kind_of(s["answer"]["themes"][0])][s["stance"]]
    ]
    assert [s["id"] for s in wrong] == [s["id"] for s in noisy if s["noisy"]] and 500 < len(wrong) < 700


def test_hand_written_songs_are_many_and_valid() -> None:
    task, songs = load_task("music"), written()
    assert len(songs) >= 96 and len({s["id"] for s in songs}) == len(titles(songs)) == len(songs)
    assert all(check_answer(song["answer"], task.schema) is None for song in songs)
    assert {song["answer"]["verdict"] for song in songs} == set(task.labels)
    assert len({song["genre"] for song in songs}) >= 8
