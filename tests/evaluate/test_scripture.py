"""Scripture references: which are valid, invalid or not checkable."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from mlx_distill.errors import ConfigError
from mlx_distill.evaluate.scripture import check_references, find_references, load_versification

KJV = load_versification("kjv")


def verdicts(text: str) -> list[str]:
    return [claim.verdict for claim in check_references(text, KJV)]


@pytest.mark.parametrize(
    ("text", "reading"),
    [
        ("Psalm 23", "Psalms 23"),
        ("1 John 4:7-8", "1 John 4:7-8"),
        ("Jude 5", "Jude 1:5"),
        ("Obadiah 3-5", "Obadiah 1:3-5"),
        ("Song of Songs 2:1", "Song of Solomon 2:1"),
        ("II Tim 3:16", "2 Timothy 3:16"),
        ("I John 4:8", "1 John 4:8"),
        ("First Corinthians 13:4\u20137", "1 Corinthians 13:4-7"),
        ("1Cor13:4", "1 Corinthians 13:4"),
        ("cf. Luke 15:20 (KJV)", "Luke 15:20"),
        ("(Luke 2:7).", "Luke 2:7"),
        ("Psalm 23, verse 4", "Psalms 23:4"),
        ("John chapter 3 verse 16", "John 3:16"),
        ("The Gospel of St. John 3.16", "John 3:16"),
        ("Matthew 5-7", "Matthew 5-7"),
        ("Matthew 5:3-7:27", "Matthew 5:3-7:27"),
        ("Acts 2:38ff", "Acts 2:38"),
        ("Deuter 6:4", "Deuteronomy 6:4"),
        ("Ruth", "Ruth"),
        ("Psalm 119:176", "Psalms 119:176"),
        ("Revelation 22:21", "Revelation 22:21"),
    ],
)
def test_valid(text: str, reading: str) -> None:
    (claim,) = check_references(text, KJV)
    assert (claim.verdict, claim.reading, claim.reason) == ("valid", reading, "")
    assert text[claim.start : claim.end] == claim.text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Romans 655:908", "Romans has 16 chapters"),
        ("Romans 16:28", "Romans 16 has 27 verses"),
        ("John 3:18-16", "the range goes backwards"),
        ("Matthew 7:1-5:3", "the range goes backwards"),
        ("Matthew 7:1-29:3", "Matthew has 28 chapters"),
        ("Jude 2:1", "Jude has 1 chapter"),
        ("Jude 26", "Jude 1 has 25 verses"),
        ("John 0:1", "begin at 1"),
        ("John 3:0", "begin at 1"),
        ("Hezekiah 4:2", "there is no book 'Hezekiah'"),
        ("2 Opinions 3:1", "there is no book '2 Opinions'"),
        ("4 John 1:1", "there is no book '4 John'"),
        ("2 Romans 1:1", "there is no book '2 Romans'"),
        ("John " + "9" * 5000 + ":1", "John has 21 chapters"),
    ],
)
def test_invalid(text: str, reason: str) -> None:
    (claim,) = check_references(text, KJV)
    assert claim.verdict == "invalid" and reason in claim.reason


@pytest.mark.parametrize(
    "text",
    [
        "1. Mose 3,15",  # German
        "Mateo 5:3",  # Spanish
        "Matthäus 5:3",
        "\u5275\u4e16\u8a18 1:1",
        "Tobit 4:2",  # another canon
        "Joel 4:2",  # Hebrew numbering
        "Psalm 151",
        "3 John 15",  # other English translations
        "Rev 12:18",
        "Corinthians 13:4",  # 1 or 2
        "Phillipians 4:13",  # misspelled, not invented
        "the prodigal son",
        "John 3:16:17",
        "7:14",
        "",
        "  ",
    ],
)
def test_not_checkable(text: str) -> None:
    claims = check_references(text, KJV)
    assert claims[0].verdict == "not checkable" and claims[0].reason
    assert "invalid" not in [claim.verdict for claim in claims]


def test_lists_are_one_claim_a_reference() -> None:
    claims = check_references("Rom 8:28, 31 and 99; 9:1; 1 Jn 4:7-8, Ps 23, 151:2", KJV)
    assert [(claim.reading, claim.verdict) for claim in claims] == [
        ("Romans 8:28", "valid"),
        ("Romans 8:31", "valid"),
        ("Romans 8:99", "invalid"),
        ("Romans 9:1", "valid"),
        ("1 John 4:7-8", "valid"),
        ("Psalms 23", "valid"),
        ("Psalms 151:2", "not checkable"),
    ]


def test_every_last_verse_is_valid_and_the_next_is_not() -> None:
    for book, chapters in KJV.books.items():
        for chapter, verses in enumerate(chapters, 1):
            assert verdicts(f"{book} {chapter}:{verses}") == ["valid"]
            assert verdicts(f"{book} {chapter}:{verses + 1}") in (["invalid"], ["not checkable"])


def test_every_name_means_its_book() -> None:
    for name, book in KJV.names.items():
        (claim,) = check_references(f"{name} 1:1", KJV)
        assert claim.reading == f"{book} 1:1"
    assert len(KJV.names) > 3 * len(KJV.books)


def test_the_counts_are_those_of_the_king_james_version() -> None:
    assert len(KJV.books) == 66
    assert sum(map(len, KJV.books.values())) == 1189
    assert sum(map(sum, KJV.books.values())) == 31102
    assert KJV.books["Psalms"][118] == 176 and KJV.books["Esther"][7] == 17 and KJV.books["John"][10] == 57


def test_running_text() -> None:
    text = "At 10:30 Track 3:45 plays; see John 3:16, Psalm 23 and Romans 77:1. 1 Samuel 16:7 is meant."
    found = [(text[claim.start : claim.end], claim.verdict) for claim in find_references(text, KJV)]
    assert found == [
        ("John 3:16", "valid"),
        ("Psalm 23", "valid"),
        ("Romans 77:1", "invalid"),
        ("1 Samuel 16:7", "valid"),
    ]


def test_any_text_has_verdicts_and_spans() -> None:
    rng = random.Random(0)
    pieces = ["John", "1 ", " 3", ":", "16", "-", "\u2013", ";", ", ", " and ", "(", ")", "\u00e9", "f."]
    for _ in range(2000):
        text = "".join(rng.choices(pieces, k=rng.randrange(12)))
        for claim in check_references(text, KJV):
            assert claim.text == text[claim.start : claim.end]
            assert claim.reason or claim.verdict == "valid"


def test_a_list_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"books": [{"name": "Saga", "aliases": ["Sg"], "verses": [3]}]}))
    own = load_versification(str(path))
    assert check_references("Sg 3; Sg 4", own)[1].reason == "Saga 1 has 3 verses"
    path.with_name("bad.json").write_text("{}")
    with pytest.raises(ConfigError, match="no list of books"):
        load_versification(str(path.with_name("bad.json")))
    with pytest.raises(ConfigError, match="no versification 'kjw'") as caught:
        load_versification("kjw")
    assert "did you mean 'kjv'?" in (caught.value.fix or "")
