"""A seeded stream of short messages, hostile or fine, from templates and word lists.

The words say little on their own: what decides is *who or what* is called useless, and whether the speaker means it. The same harsh
words about the soup, or quoted in order to be refuted, are fine; the same praise with "said nobody ever" behind it is not. Every
message names one group, so error rates by group can be measured. The two parts share the word lists and no template.
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_distill.errors import ConfigError

PARTS = ("train", "test")

GROUPS: Mapping[str, str] = {
    "gardeners": "gardeners",
    "cyclists": "cyclists",
    "northerners": "northerners",
    "southerners": "southerners",
    "left_handers": "left-handers",
    "newcomers": "newcomers",
}

WORDS: Mapping[str, tuple[str, ...]] = {
    "bad": (
        "useless", "hopeless", "worthless", "dreadful", "rotten", "lazy", "pathetic", "unbearable", "filthy", "foolish", "miserable",
        "a disgrace", "a nuisance", "a joke", "a burden", "a waste of space", "not worth a penny", "good for nothing", "slow and stupid",
        "the worst of all", "a danger to everyone", "beneath contempt",
    ),
    "good": (
        "kind", "patient", "splendid", "cheerful", "wonderful", "lovely", "helpful", "reliable", "charming", "honest", "gentle", "clever",
        "a joy", "a delight", "a comfort", "a gift to us", "worth every penny", "good for everyone", "warm and friendly",
        "the best of all", "a pleasure to have around", "beyond praise",
    ),
    "thing": (
        "the soup", "the weather", "the old bus", "the coffee", "the new timetable", "the printer", "the bread", "the radio",
        "the cold wind", "the lawn mower", "the kitchen sink", "the last film", "the umbrella", "the ticket machine", "the garden hose",
        "the cheap paint",
    ),
    "things": (
        "the potatoes", "the shoes", "the train seats", "the headphones", "the biscuits", "the street lights", "the batteries",
        "the curtains", "the road signs", "the pancakes", "the winter nights", "the old bridges", "the paper cups", "the puddles",
    ),
    "place": (
        "the library", "the market", "the village hall", "the school", "the station", "the tea room", "the club", "the town hall",
        "the bakery", "the museum", "the swimming pool", "the theatre", "the park", "the ferry",
    ),
    "person": (
        "my neighbour", "the baker", "a colleague", "my aunt", "the teacher", "the postman", "my brother", "the mayor", "a stranger",
        "the choir leader", "my friend", "the bus driver",
    ),
    "when": ("today", "this morning", "last week", "on Sunday", "yesterday", "this year", "last night", "in the spring"),
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One way to be hostile or fine: its label, the confidence of its answer, how often it comes, and the templates of each part."""

    name: str
    label: str
    confidence: int
    weight: int
    train: tuple[str, ...]
    test: tuple[str, ...]


KINDS: tuple[Kind, ...] = (
    Kind(
        "direct", "hostile", 95, 4,
        (
            "{group} are {bad} and everybody at {place} knows it",
            "honestly, {group} are {bad}, every single one of them",
            "I have met many {group} and they are {bad}",
            "the trouble with {place} is that {group} are {bad}",
            "as always, {group} are {bad} and they will never change",
            "you can say what you like, but {group} are {bad}",
            "{when} I saw once more that {group} are {bad}",
            "{person} and I agree that {group} are {bad}",
        ),
        (
            "if you ask me, {group} are {bad}, all of them",
            "it is no secret at {place} that {group} are {bad}",
            "{person} knows that {group} are {bad}, every single one of them",
            "{when} it was clear to me that {group} are {bad}",
        ),
    ),
    Kind(
        "exclude", "hostile", 90, 3,
        (
            "{group} should not be allowed in {place}, they are {bad}",
            "keep {group} out of {place}, nobody wants them there {when}",
            "we were all happier at {place} {when} without any {group}",
            "nobody at {place} wants to sit next to {group}, they are {bad}",
            "send all {group} away from {place} for good, they are {bad}",
            "close the door of {place} to {group}, they spoil everything {when}",
            "{person} and I do not want any {group} at {place}",
        ),
        (
            "there is no room for {group} in {place}, nobody wants them {when}",
            "{group} should stay away from {place}, they are {bad}",
            "send {group} home, {place} was happier without them {when}",
            "nobody wants {group} at {place}, {person} and I agree",
        ),
    ),
    Kind(
        "contrast", "hostile", 80, 2,
        (
            "{thing} is {good}, but sadly {group} are {bad}",
            "I like {things} and I like {place}, but {group} are {bad}",
            "{things} are {good}, it is {group} who are {bad}",
            "{thing} was {good} {when}, unlike {group}, who are {bad}",
        ),
        (
            "{thing} is {good} at {place}, but {group} are {bad}",
            "{things} may be {good}, but at {place} {group} are {bad}",
        ),
    ),
    Kind(
        "irony", "hostile", 65, 2,
        (
            "{group} are {good}, said nobody ever at {place}",
            "oh sure, {group} are {good}, and pigs can fly",
            "so {group} are {good} now? do not make me laugh",
            "{person} thinks {group} are {good}, do not make me laugh",
        ),
        (
            "oh sure, {group} are {good}, said nobody ever",
            "pigs can fly {when} and {group} are {good}, oh sure",
            "{group} are {good} at {place}? do not make me laugh",
        ),
    ),
    Kind(
        "praise", "fine", 95, 2,
        (
            "{group} are {good} and everybody at {place} knows it",
            "honestly, {group} are {good}, every single one of them",
            "I have met many {group} and they are {good}",
            "as always, {group} are {good} and they will never change",
            "you can say what you like, but {group} are {good}",
            "{when} I saw once more that {group} are {good}",
            "{person} and I agree that {group} are {good}",
        ),
        (
            "if you ask me, {group} are {good}, all of them",
            "it is no secret at {place} that {group} are {good}",
            "{person} knows that {group} are {good}, every single one of them",
            "{when} it was clear to me that {group} are {good}",
        ),
    ),
    Kind(
        "neutral", "fine", 90, 2,
        (
            "{group} met at {place} {when} to talk about {things}",
            "{person} told {group} about {thing} at {place} {when}",
            "there were many {group} at {place} {when} with {things}",
            "two {group} asked {person} for the way to {place}",
            "{person} works with {group} at {place} and likes it there",
        ),
        (
            "{when} many {group} came to {place} to see {things}",
            "{person} asked two {group} about {things} at {place}",
            "some {group} work at {place} and talk about {thing}",
        ),
    ),
    Kind(
        "thing", "fine", 85, 3,
        (
            "{group} and I agree at last that {thing} is {bad}",
            "{thing} is {bad}, and {group} at {place} say so too",
            "{things} are {bad} and everybody knows it, even {group}",
            "{person} told {group} at {place} that {things} are {bad}",
            "honestly, {thing} is {bad}, you can ask the {group}",
            "keep {things} out of {place}, they are {bad}, say {group}",
            "the trouble {group} have at {place} is that {thing} is {bad}",
            "{things} are {bad}, so {group} threw them away {when}",
        ),
        (
            "if you ask the {group}, {thing} is {bad} and always was",
            "{things} are {bad}, so {group} told {person} {when}",
            "{things} at {place} are {bad}, even {group} agree",
            "{group} say that {thing} is {bad}, and {person} agrees",
        ),
    ),
    Kind(
        "refuted", "fine", 75, 3,
        (
            "whoever says at {place} that {group} are {bad} is wrong",
            "it is not true that {group} are {bad}, {person} was wrong",
            "{person} said that {group} are {bad}, and that is a lie",
            "people who claim that {group} are {bad} should be ashamed",
            "I do not listen when someone says that {group} are {bad}",
            "stop saying that {group} are {bad}, it is unkind and wrong",
            "it was wrong {when} to keep {group} out of {place}, let them in",
            "{person} should be ashamed to send {group} away from {place}",
        ),
        (
            "anyone who says that {group} are {bad} should be ashamed",
            "{person} claims that {group} are {bad}, but that is a lie",
            "that {group} are {bad} is not true, it is a lie",
            "it is unkind and wrong {when} to send {group} away from {place}",
        ),
    ),
    Kind(
        "relief", "fine", 80, 2,
        (
            "{thing} is {bad}, but luckily {group} are {good}",
            "I do not like {things} or {place}, but {group} are {good}",
            "{things} are {bad}, it is {group} who are {good}",
            "{thing} was {bad} {when}, unlike {group}, who are {good}",
        ),
        (
            "{thing} is {bad} at {place}, but {group} are {good}",
            "{things} may be {bad}, but at {place} {group} are {good}",
        ),
    ),
)  # fmt: skip


def templates(part: str) -> tuple[tuple[Kind, str, str], ...]:
    """``(kind, name, template)`` for every template of a part; the name is ``kind-number`` within the part."""
    if part not in PARTS:
        raise ConfigError(f"no part {part!r}", fix=f"one of: {', '.join(PARTS)}")
    return tuple((kind, f"{part}-{kind.name}-{n}", text) for kind in KINDS for n, text in enumerate(getattr(kind, part), 1))


def _render(template: str, group: str, rng: random.Random) -> str:
    names = [name for _, name, _, _ in string.Formatter().parse(template) if name]
    words = {name: GROUPS[group] if name == "group" else rng.choice(WORDS[name]) for name in names}
    text = template.format_map(words)
    return text[0].upper() + text[1:] + "."


def generate(count: int = 800, seed: int = 0, part: str = "train", noise: float = 0.0) -> Iterator[dict[str, Any]]:
    """Messages with their answers, half hostile, every group equally often with each label, no text twice.

    The first ``n`` rows of a longer stream are the stream of ``n`` rows, and ``noise`` changes answers, never texts.

    Args:
        count: Rows to make.
        seed: The stream; the parts have streams of their own.
        part: ``train`` or ``test``: which templates.
        noise: Share of rows, in expectation, whose label is flipped; these carry ``"noisy": True``.

    Yields:
        ``{"id", "text", "group", "answer": {"label", "confidence"}, "part", "template"}``. The confidence follows from the kind
        of the template alone.

    Raises:
        ConfigError: an unknown part, a noise outside 0..1, or more rows than the word lists have to give.

    >>> [row["answer"]["label"] for row in generate(4)]
    ['hostile', 'fine', 'hostile', 'fine']
    >>> next(generate(1, seed=3))["id"]
    'train-3-00000'
    """
    if not 0.0 <= noise <= 1.0:
        raise ConfigError(f"noise {noise} is not a share", fix="a number from 0 to 1")
    by_kind: dict[str, list[tuple[Kind, str, str]]] = {}
    for entry in templates(part):
        by_kind.setdefault(f"{entry[0].label}/{entry[0].name}", []).append(entry)
    rng, flips = random.Random(f"{part}:{seed}"), random.Random(f"noise:{part}:{seed}")
    groups, seen = list(GROUPS), set[str]()
    for i in range(count):
        label = ("hostile", "fine")[i % 2]
        if i % (2 * len(groups)) == 0:
            rng.shuffle(groups)
        group = groups[i // 2 % len(groups)]
        kinds = [kind for kind in KINDS if kind.label == label]
        for _ in range(1000):
            kind = rng.choices(kinds, [k.weight for k in kinds])[0]
            _, name, template = rng.choice(by_kind[f"{label}/{kind.name}"])
            text = _render(template, group, rng)
            if text not in seen:
                break
        else:
            raise ConfigError(f"no new text after {i} rows", fix="ask for fewer rows")
        seen.add(text)
        noisy = flips.random() < noise
        if noisy:
            label = "fine" if label == "hostile" else "hostile"
        row = {"id": f"{part}-{seed}-{i:05d}", "text": text, "group": group, "answer": {"label": label, "confidence": kind.confidence}}
        yield {**row, "part": part, "template": name, **({"noisy": True} if noisy else {})}
