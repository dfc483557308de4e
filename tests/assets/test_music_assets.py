"""The generated songs: held-out ones share no line, no template and no title with anything that a model was
trained on.
"""

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
    """What scripts/make_tiny_models.py reads."""
    return [
        song
        for seed, policy in ((1000, "keywords"), (1001, "whole"))
        for song in music.generate(32000, seed=seed, part="train", policy=policy, loose=0.6)
    ]


def sources(split: str | None) -> list[dict[str, Any]]:
    found = [s for s in load_recipe("tiny").data.sources if s.generator and s.split == split]
    assert found
    return [song for s in found for song in music.generate(s.count, s.seed, s.part or "train", s.noise)]


@functools.cache
def written() -> list[dict[str, Any]]:
    """The songs that somebody wrote."""
    return [row for _, row in read_jsonl(ASSETS / "music" / "songs.jsonl")]


def test_the_held_out_songs_share_no_line_no_title_and_no_template_with_any_text_that_was_learned() -> None:
    held_out = [*sources("test"), *music.generate(2000, seed=5, part="test")]
    learned = [*pretraining(), *sources(None)]
    messages = {row["text"].lower() for row in moderation.generate(6000, seed=1000, part="train")}
    assert len(sources("test")) >= 300
    assert not lines(held_out) & (lines(learned) | lines(written()) | messages)
    assert not titles(held_out) & (titles(learned) | titles(written()) | messages)
    used = [{t for song in songs for t in song["templates"]} for songs in (held_out, learned)]
    assert not used[0] & used[1]


def test_the_written_songs_share_nothing_with_the_generated_ones() -> None:
    learned = [*pretraining(), *sources(None)]
    assert not lines(written()) & lines(learned)
    assert not titles(written()) & titles(learned)


def filled(templates: Iterable[str], **slots: Iterable[str]) -> set[str]:
    """Every text that the templates can come to."""
    out = set()
    for template in templates:
        names = [name for name in slots if "{" + name + "}" in template]
        for words in itertools.product(*(slots[name] for name in names)):
            text = template
            for name, word in zip(names, words, strict=True):
                text = text.replace("{" + name + "}", word)
            out.add(text)
    return out


def test_no_template_of_one_part_can_come_to_a_text_of_the_other() -> None:
    """Exact, not sampled: every filling of every template."""
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
    # An opening or a closing may be nothing, but the test part never leaves out both; so no line about a
    # subject is shared either.
    assert train["openings"] & test["openings"] == train["closings"] & test["closings"] == {""}
    for kind in ("scenes", "references", "titles"):
        assert not train[kind] & test[kind], kind
    every = [verb for group in music.VERBS.values() for verb in group]
    middle = [text for part in made.values() for kind in ("openings", "closings") for text in part[kind]]
    assert not [
        text for text in middle if any(f"I {verb} " in f" {text} " for verb in every)
    ]  # a line falls apart in one way only
    assert not any("|" in song["templates"] for song in music.generate(5000, seed=1, part="test"))


def test_loose_songs_never_stumble_on_a_held_out_template() -> None:
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
    around = {frame for s in songs for t in s["templates"] for frame in t.split("|")}
    assert len(around) > 2000 and not around & music.HELD_OUT
    assert {w for text in around for w in text.split()} - set(music.LOOSE_WORDS)  # and words that are none

    class Stubborn(random.Random):
        """Draws a held-out closing first."""

        script = [["now"], ["and"]]

        def choices(self, population: Any, *args: Any, **more: Any) -> Any:
            return self.script.pop(0) if more.get("k") != 5 else list("ab")

        def random(self) -> float:
            return 0.0

    assert "now" in music.HELD_OUT and music._babble(Stubborn()) == "and"


def test_the_same_arguments_are_the_same_songs_and_others_are_others() -> None:
    one = list(music.generate(60, seed=7))
    assert one == list(music.generate(90, seed=7))[:60]
    assert lines(one) != lines(music.generate(60, seed=8))
    assert len({song["id"] for song in one}) == 60
    with pytest.raises(ValueError, match="neither train nor test"):
        next(music.generate(1, part="middle"))


@pytest.mark.parametrize("part", ["train", "test"])
def test_answers_fit_the_task_and_follow_from_subject_and_stance(part: str) -> None:
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


def test_subject_alone_is_right_in_about_three_songs_of_ten() -> None:
    songs = list(music.generate(4000, seed=2, part="test"))
    right = sum(
        s["answer"]["verdict"] == music.KEYWORD_VERDICTS[music.kind_of(s["answer"]["themes"][0])]
        for s in songs
    )
    assert 0.25 < right / len(songs) < 0.36


def test_noise_replaces_the_share_of_verdicts_that_was_asked_for() -> None:
    noisy = list(music.generate(3000, seed=1, noise=0.2))
    wrong = [
        s
        for s in noisy
        if s["answer"]["verdict"] != music.VERDICTS[music.kind_of(s["answer"]["themes"][0])][s["stance"]]
    ]
    assert [s["id"] for s in wrong] == [s["id"] for s in noisy if s["noisy"]] and 500 < len(wrong) < 700


def test_the_written_songs_are_many_and_fit_the_task() -> None:
    task, songs = load_task("music"), written()
    assert len(songs) >= 96 and len({s["id"] for s in songs}) == len(titles(songs)) == len(songs)
    assert all(check_answer(song["answer"], task.schema) is None for song in songs)
    assert {song["answer"]["verdict"] for song in songs} == set(task.labels)
    assert len({song["genre"] for song in songs}) >= 8
