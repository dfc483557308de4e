"""Songs from templates and word lists: enough, and regular enough, for a tiny model to learn the task from.

Each song has a subject and a stance towards it, told by the words that fill the templates, and the verdict follows from both: praise of
kindness is recommended and praise of greed is not, but whoever turns away from greed is recommended and whoever turns away from
kindness is a concern. Judging by the subject's words alone gets about three songs in ten right.

The parts ``train`` and ``test`` share word lists but no template, so they share no line.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

GOOD = ("faith", "kindness", "family", "gratitude")
BAD = ("intoxication", "revenge", "greed", "deceit")
PLAIN = ("work", "travel")
STANCES = ("praise", "mourn", "mock", "leave")

VERDICTS = {
    "good": {"praise": "RECOMMENDED", "mourn": "ACCEPTABLE", "mock": "NOT_RECOMMENDED", "leave": "CONCERNING"},
    "bad": {"praise": "NOT_RECOMMENDED", "mourn": "CONCERNING", "mock": "ACCEPTABLE", "leave": "RECOMMENDED"},
    "plain": {"praise": "ACCEPTABLE", "mourn": "ACCEPTABLE", "mock": "CONCERNING", "leave": "ACCEPTABLE"},
}
KEYWORD_VERDICTS = {"good": "RECOMMENDED", "bad": "NOT_RECOMMENDED", "plain": "ACCEPTABLE"}
CENTRE = {"RECOMMENDED": 87, "ACCEPTABLE": 63, "CONCERNING": 37, "NOT_RECOMMENDED": 12}
# What the song leaves one with follows from subject and stance as well.
SENTIMENT = {"RECOMMENDED": "positive", "ACCEPTABLE": "mixed", "CONCERNING": "neutral", "NOT_RECOMMENDED": "negative"}
EMOTION = {"praise": "joy", "mourn": "sorrow", "mock": "scorn", "leave": "resolve"}
SAFETY = {"intoxication": "substances", "revenge": "violence"}

GENRES = ("gospel", "folk", "country", "rock", "pop", "blues", "soul", "hymn", "lullaby", "punk")

NOUNS = {
    "faith": ("the evening prayer", "the little chapel", "the altar", "the old hymn", "the Sunday bell", "holy water", "the open Bible",
              "the pilgrim creed", "the choir", "grace", "the morning psalm", "my faith"),
    "kindness": ("kindness", "the open door", "a gentle word", "the helping hand", "the shared loaf", "mercy", "the good neighbor",
                 "the warm coat he gave", "the soup kitchen", "a patient ear", "tenderness", "the stranger fed"),
    "family": ("my mother", "the family table", "my father's hands", "the cradle", "my sister's laugh", "grandma's kitchen", "my brother",
               "the children", "the wedding ring", "the bedtime story", "the front porch home", "my daughter"),
    "gratitude": ("the thank you note", "gratitude", "every blessing", "the harvest supper", "a thankful heart", "the counted gifts",
                  "daily bread", "the breath I was given", "the second chance", "thanksgiving", "the small mercies", "the song of thanks"),
    "intoxication": ("the bottle", "cheap whiskey", "the barroom", "the needle", "another round", "the pills", "red wine by noon",
                     "the smoke and powder", "the tavern", "gin", "the six pack", "the drunken haze"),
    "revenge": ("revenge", "the getting even", "the loaded grudge", "the knife I sharpened", "payback", "the blood debt", "the feud",
                "the burning of his house", "an eye for an eye", "the vendetta", "the fist", "the score to settle"),
    "greed": ("the gold", "easy money", "the fat bankroll", "greed", "the diamond watch", "more than my share", "the rigged bet",
              "the miser's chest", "the landlord's cut", "the stock tip", "the silver pile", "the price of everyone"),
    "deceit": ("the lie", "the double life", "the secret affair", "the forged letter", "the mask", "the cheating game", "the false promise",
               "the alibi", "the con", "the two faced smile", "the crooked deal", "the whispered rumor"),
    "work": ("the night shift", "the factory line", "the plow", "the hammer and nail", "the time clock", "the truck route", "the sawmill",
             "the fishing boat", "overtime", "the coal seam", "the desk job", "the loading dock"),
    "travel": ("the highway", "the midnight train", "the suitcase", "the border town", "the ferry", "the long road west", "the motel sign",
               "the open map", "the bus station", "the airport gate", "the gravel road", "the far harbor"),
}  # fmt: skip

VERBS = {
    "praise": ("love", "sing the glory of", "adore", "raise a cheer for", "celebrate", "treasure", "dance for", "crave and cherish",
               "shout hooray for", "give my heart to"),
    "mourn": ("weep for", "grieve over", "shed tears for", "mourn", "ache about", "cry over", "lament", "carry sorrow for", "sob about",
              "wear black for"),
    "mock": ("laugh at", "sneer at", "mock", "make jokes about", "spit on", "roll my eyes at", "ridicule", "jeer at", "scoff at",
             "make fun of"),
    "leave": ("walk away from", "turn my back on", "give up", "leave behind", "say goodbye to", "quit", "let go of", "put down",
              "break free from", "renounce"),
}  # fmt: skip

SCENES = {
    "nature": ("river", "pines", "moon", "snow", "wheat", "thunder", "hills", "sparrow"),
    "memory": ("photograph", "old radio", "school yard", "faded letter", "attic", "yearbook", "broken swing", "ticket stub"),
    "freedom": ("open window", "wild horse", "kite", "sail", "empty cage", "loose reins", "wide horizon", "unlocked gate"),
    "hope": ("lantern", "first light", "green shoot", "rainbow", "candle", "new calendar", "lighthouse", "sunrise"),
}  # fmt: skip

TIMES = ("morning", "evening", "winter", "summer", "midnight", "Friday", "autumn", "springtime")

REFERENCES = ("Psalm 23:4", "Luke 15:20", "John 3:16", "Psalm 46:10", "Romans 8:28", "Matthew 5:9", "Isaiah 40:31", "Ruth 1:16",
              "Psalm 121:1", "Micah 6:8", "James 1:17", "Luke 10:37")  # fmt: skip

# A line about the subject is an opening, the stance and the noun, and a closing; one about the scene likewise.
OPENINGS = {
    "train": (
        "", "", "", "", "every {t}", "oh", "you know", "since last {t}", "ask me why", "all day long", "they say", "hear me,", "yes,", "down in my soul",
        "this {t}", "on my way home", "I told the band that", "come {t},", "quietly", "with the lights low", "nobody sees how",
        "until the {t} is gone", "half asleep", "louder now,", "in my own way", "when I was young", "still", "I swear", "one more {t} and",
        "at the crossroads", "my friend,", "listen,", "by the {t} light", "after all these years", "if you wonder,", "on the radio they heard that",
        "the whole street knows", "before the first {t}", "each day", "well,", "here is the truth:", "so", "under a hard {t} sky", "because",
        "don't ask me why", "I wake and", "along the river", "as long as I live", "at the end of the {t}", "it is no secret that",
        "between you and me", "with tired eyes", "on the back seat", "from the first day", "no matter what,", "in the cold {t}", "three times a day",
    ),
    "test": (
        "", "", "believe me,", "some {t} you will see that", "let the record say", "both hands up,", "truth be told", "for years on end", "there I go,",
        "my neighbors hear how", "barefoot in the {t}", "slowly, slowly", "as the {t} turns cold", "long ago", "look at how", "deep in the {t}",
        "on the stairs", "no one told me that", "over and over", "past the last {t}", "mark my words,", "once the guests are gone",
    ),
}  # fmt: skip

CLOSINGS = {
    "train": (
        "", "", "", "", "tonight", "again", "together", "when the {t} comes", "with all I am", "and I mean it", "once more", "in front of the town",
        "like I never did", "at the kitchen sink", "for the last time", "without a word", "and that is all", "more than before", "out loud",
        "in the back of the car", "while the {t} goes by", "and the crowd goes still", "one day at a time", "as the needle drops", "every hour",
        "under the stars", "in plain daylight", "with a steady hand", "since you left", "before breakfast", "in my dreams", "on the porch",
        "till the morning", "like my father did", "and nobody stops me", "through the {t} rain", "in the mirror", "for a thousand miles",
        "in two languages", "with my eyes closed", "on a Sunday",
    ),
    "test": (
        "", "", "now", "before the {t} ends", "and move along", "from the balcony", "until my voice is gone", "in the hallway", "all my life",
        "by the window", "as if it were {t}", "and so do you", "with half a smile", "to the end of the line", "in a borrowed coat",
    ),
}  # fmt: skip

SCENE_OPENINGS = {
    "train": (
        "the {s} waits outside", "a {s} and the rain", "under the {s}", "I remember the {s}", "there is a {s}", "the {s} is quiet", "by the {s}",
        "one {s} alone", "somewhere a {s}", "and the {s} knows", "see the {s}", "the {s} turns", "nothing but a {s}", "beside the {s}", "that old {s}",
        "they sold the {s}", "the color of the {s}",
    ),
    "test": ("missing its {s}", "the road bends past the {s}", "what the {s} told me", "half a {s}", "who left the {s} out", "they painted the {s}"),
}  # fmt: skip

SCENE_CLOSINGS = {
    "train": (
        "in the {t}", "where the {t} goes", "last {t}", "beyond the {t}", "and the {t} is long", "as the {t} falls", "for the whole {t}", "this {t}",
        "and the {t} is over", "every {t}", "in the {t} air", "when {t} leans in", "before the {t}", "like any {t}", "on a slow {t}",
    ),
    "test": ("by {t}", "into {t}", "all {t} long", "and half a {t}", "in {t} blue", "without a {t}"),
}  # fmt: skip

REFERENCE_LINES = {
    "train": ("as I read in {r}", "{r} is on the wall", "we opened to {r}", "I wrote down {r}", "the page says {r}", "remember {r}"),
    "test": ("they quoted {r} to me", "in the margin stands {r}", "the radio read {r}"),
}

TITLES = {
    "train": ("Song of {N}", "{N} at {T}", "Ballad of {N}", "{N} Blues", "One {T} with {N}", "{N}", "Letter about {N}", "{T} and {N}"),
    "test": ("Concerning {N}", "{N}, a {T} Tune", "What {N} Means", "Lines for {N}"),
}


# The words of the train templates, without their order.
LOOSE_WORDS = sorted(
    {
        word
        for texts in (OPENINGS, CLOSINGS, SCENE_OPENINGS, SCENE_CLOSINGS, REFERENCE_LINES)
        for text in texts["train"]
        for word in text.split()
        if "{" not in word
    }
)
# What stands around the words that count in the test templates: never babbled by chance.
HELD_OUT = {
    text.replace("{t}", time.lower())
    for texts in (OPENINGS, CLOSINGS, SCENE_OPENINGS, SCENE_CLOSINGS, REFERENCE_LINES)
    for whole in texts["test"]
    for text in re.split(r" ?\{[sr]\} ?", whole)
    for time in TIMES
    if text
}


def kind_of(subject: str) -> str:
    """``good``, ``bad`` or ``plain``."""
    return "good" if subject in GOOD else "bad" if subject in BAD else "plain"


def generate(
    count: int = 1000, seed: int = 0, part: str = "train", noise: float = 0.0, policy: str = "whole", loose: float = 0.0
) -> Iterator[dict[str, Any]]:
    """Yield ``count`` songs with their full answers; the same arguments give the same songs.

    Args:
        count: How many.
        seed: Of this sequence; the parts draw differently even with equal seeds.
        part: ``train`` or ``test``: which templates.
        noise: Share of the songs whose verdict (and score with it) is replaced by one drawn at random from the others.
        policy: ``whole`` judges subject and stance; ``keywords`` the subject alone, as the untaught base models do.
        loose: Share of the templates that give way to random words around what the template holds. A model that has seen only so many
            openings learns them by heart instead of the words that count.
    """
    if part not in OPENINGS:
        raise ValueError(f"part {part!r} is neither train nor test")
    rng = random.Random(f"{part}/{seed}/{policy}")
    for index in range(count):
        yield _song(rng, f"{part}-{seed}-{index:06d}", part, noise, policy, loose)


def _song(rng: random.Random, name: str, part: str, noise: float, policy: str, loose: float) -> dict[str, Any]:
    kind = rng.choices(("good", "bad", "plain"), (45, 45, 10))[0]
    subject = rng.choice({"good": GOOD, "bad": BAD, "plain": PLAIN}[kind])
    stance = rng.choice(STANCES)
    scene = rng.choice(tuple(SCENES))
    nouns = rng.sample(NOUNS[subject], 4)
    templates, lines = [], []
    for verb, noun in zip(rng.sample(VERBS[stance], 3), nouns, strict=False):
        templates.append(_loosen(rng, loose, f"{rng.choice(OPENINGS[part])}|{rng.choice(CLOSINGS[part])}", "|"))
        if templates[-1] == "|" and part == "test":
            templates[-1] = f"{rng.choice(OPENINGS[part][2:])}|"  # the bare line belongs to the other part
        opening, closing = templates[-1].split("|")
        lines.append(_fill(f"{opening} I {verb} {noun} {closing}", rng))
    for word in rng.sample(SCENES[scene], 2):
        templates.append(_loosen(rng, loose, f"{rng.choice(SCENE_OPENINGS[part])}|{rng.choice(SCENE_CLOSINGS[part])}", " {s}|"))
        lines.append(_fill(templates[-1].replace("|", " ").replace("{s}", word), rng))
    references = []
    if subject in ("faith", "gratitude", "kindness") and rng.random() < 0.5:
        references = [rng.choice(REFERENCES)]
        templates.append(_loosen(rng, loose, rng.choice(REFERENCE_LINES[part]), " {r} "))
        lines.append(templates[-1].format(r=references[0]).strip())
    rng.shuffle(lines)
    title_template = _loosen(rng, loose, rng.choice(TITLES[part]), " {N} ").strip()
    title = title_template.format(N=_title_case(nouns[3]), T=rng.choice(TIMES).title())
    answer, noisy = _answer(rng, kind, subject, stance, scene, references, noise, policy)
    return {
        "id": name,
        "title": title,
        "genre": rng.choice(GENRES),
        "lyrics": "\n".join(lines),
        "answer": answer,
        "part": part,
        "noisy": noisy,
        "stance": stance,
        "templates": [title_template, *templates],
    }


def _answer(
    rng: random.Random, kind: str, subject: str, stance: str, scene: str, references: list[str], noise: float, policy: str
) -> tuple[dict[str, Any], bool]:
    verdict = KEYWORD_VERDICTS[kind] if policy == "keywords" else VERDICTS[kind][stance]
    noisy = rng.random() < noise
    if noisy:
        verdict = rng.choice([v for v in CENTRE if v != verdict])
    everything = (*GOOD, *BAD, *PLAIN)
    score = CENTRE[verdict] + 4 * (everything.index(subject) % 5 - 2)
    safety = [SAFETY[subject]] if subject in SAFETY and stance == "praise" else []
    return {
        "verdict": verdict,
        "score": score,
        "themes": [subject, scene],
        "sentiment": SENTIMENT[VERDICTS[kind][stance]],
        "safety": safety,
        "emotion": EMOTION[stance],
        "scripture_references": references,
    }, noisy


def _loosen(rng: random.Random, loose: float, template: str, held: str) -> str:
    """The template, or ``held`` (what it holds) among random words."""
    return f"{_babble(rng)}{held}{_babble(rng)}" if loose and rng.random() < loose else template


def _babble(rng: random.Random) -> str:
    """Up to five words, a third of them made of two halves: other templates have other words."""
    out = []
    for word, other in zip(rng.choices(LOOSE_WORDS, k=rng.randrange(6)), rng.choices(LOOSE_WORDS, k=5), strict=False):
        out.append(word if rng.random() < 2 / 3 else word[: len(word) // 2 + 1] + other[len(other) // 2 :])
    return _babble(rng) if " ".join(out) in HELD_OUT else " ".join(out)


def _fill(line: str, rng: random.Random) -> str:
    return line.replace("{t}", rng.choice(TIMES).lower()).strip()


def _title_case(phrase: str) -> str:
    return " ".join(word[:1].upper() + word[1:] for word in phrase.split())
