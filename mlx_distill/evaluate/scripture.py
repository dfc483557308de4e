"""Scripture references, checked against a list of books, chapters and numbers of verses."""

from __future__ import annotations

import difflib
import functools
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from mlx_distill.config import ASSETS
from mlx_distill.errors import ConfigError, from_os_error
from mlx_distill.evaluate.claims import Claim, Verdict
from mlx_distill.text import counted, known_names

_SHORTEST_BEGINNING = 3
_ORDINALS = {"1": "1st|first|i", "2": "2nd|second|ii", "3": "3rd|third|iii", "4": "4th|fourth|iv"}
_PREAMBLE = re.compile(
    r"^(?:the\s+)?(?:(?:book|gospel|epistle|letter)\s+(?:according\s+to|of|to)\s+)?"
    r"(?:the\s+)?(?:(?:st\.?|saint)\s+)?",
    re.IGNORECASE,
)
_LEADING = re.compile(r"\s*(?:\(\s*)?(?:cf\.?|see(?:\s+also)?|compare)\s+", re.IGNORECASE)
_TRANSLATION = re.compile(
    r"\s*[,(\[]?\s*\b(?:N?KJV|AV|NIV|ESV|N?RSV|NRSVUE|NASB|NLT|ASV|CSB|NET|WEB)\b\s*[)\]]?\s*$"
)
_WORDS = (
    (re.compile(r",?\s*\b(?:verses?\b|vv?\.)\s*", re.IGNORECASE), ":"),
    (re.compile(r",?\s*\b(?:chapters?|chap|ch)\b\.?\s*", re.IGNORECASE), " "),
)
_SEPARATOR = re.compile(r"\s*(?:[;,\n]|(?<=[0-9abcf])\s*(?:&|\band\b))\s*")
_DASH = "[-\u2010-\u2015]"
_NUMBERS = re.compile(
    rf"(?P<chapter>\d+)(?:\s*[:.]\s*(?P<verse>\d+)(?:[a-c]|ff?\.?)?)?"
    rf"(?:\s*{_DASH}\s*(?:(?P<last_chapter>\d+)\s*[:.]\s*)?(?P<last>\d+)(?:[a-c]|ff?\.?)?)?|(?P<only>\d+)ff?\.?"
)
_PART = re.compile(r"(?P<book>\d?\D*?[^\W\d_]\D*?)?\s*(?P<numbers>\d[\s\S]*)?")
_IN_TEXT = re.compile(
    r"(?<!\w)(?P<book>(?:(?:[1-4]|I{1,3}|First|Second|Third)\.?\s+)?[A-Z][a-z]*\.?(?:\s+of\s+[A-Z][a-z]+)?)"
    rf"\s+(?P<numbers>\d+:\d+(?:\s*{_DASH}\s*(?:\d+:)?\d+)?|(?<=[Pp]salm )\d+)(?![\w:])"
)


class Numbers(NamedTuple):
    """First and last place of a reference; None for a whole chapter."""

    chapter: int
    verse: int | None
    last_chapter: int
    last_verse: int | None


@dataclass(frozen=True)
class Versification:
    """Books with the number of verses of each of their chapters.

    ``names`` maps names without spaces and in lower case to books; ``elsewhere`` has names of books that the
    list does not have, of other canons and languages; ``numbered_elsewhere`` the references that only other
    Bibles have.
    """

    name: str
    title: str
    books: Mapping[str, Sequence[int]]
    names: Mapping[str, str]
    elsewhere: frozenset[str]
    numbered_elsewhere: Mapping[str, Sequence[Numbers]]


def versification_names() -> list[str]:
    """The names of the packaged versifications."""
    return sorted(path.stem for path in (ASSETS / "references").glob("*.json"))


@functools.lru_cache(maxsize=8)
def load_versification(name: str) -> Versification:
    """A packaged versification by its name, or a JSON file of that format by its path.

    Raises:
        ConfigError: no such name or file, or a file of another format.

    >>> kjv = load_versification("kjv")
    >>> len(kjv.books), sum(map(sum, kjv.books.values())), kjv.books["Jude"]
    (66, 31102, [25])
    """
    path = ASSETS / "references" / f"{name}.json"
    if not re.fullmatch(r"\w+", name) or not path.is_file():
        path = Path(name)
        if path.suffix != ".json":
            raise ConfigError(
                f"no versification {name!r}",
                fix=f"{known_names(name, versification_names(), 'packaged are')}; or give a JSON file",
            )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        books = {book["name"]: [int(verses) for verses in book["verses"]] for book in raw["books"]}
        names = {
            _plain(alias): book["name"]
            for book in raw["books"]
            for alias in (book["name"], *book.get("aliases", ()))
        }
    except OSError as error:
        raise from_os_error(error, path) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: no list of books: {error!r}",
            fix='write {"books": [{"name": "Jude", "aliases": ["Jud"], "verses": [25]}]}',
        ) from error
    found = Versification(
        str(raw.get("versification") or path.stem),
        str(raw.get("title") or path.stem),
        books,
        names,
        frozenset(map(_plain, raw.get("named_elsewhere", ()))),
        {},
    )
    elsewhere: dict[str, list[Numbers]] = {}
    for text in raw.get("numbered_elsewhere", ()):
        part = _PART.fullmatch(text)
        place = part and _NUMBERS.fullmatch(part["numbers"] or "")
        book = part and names.get(_plain(part["book"] or ""))
        if not place or not book:
            raise ConfigError(f"{path}: numbered_elsewhere: {text!r}", fix='write "Book 3:19-24"')
        elsewhere.setdefault(book, []).append(_to_numbers(place, books[book]))
    return replace(found, numbered_elsewhere=elsewhere)


def check_references(text: str, versification: Versification) -> list[Claim]:
    """Check a text that consists of references: ``Luke 15:11-32``, ``1 Jn 4:7, 8; Ps 23``, ``Jude 5``.

    Understood are English names and abbreviations, roman and written ordinals, ranges within and across
    chapters, lists, ``chapter`` and ``verse`` in words, and the name of a translation behind. A book of one
    chapter may be cited without it.

    Args:
        text: The text.
        versification: The list of books.

    Returns:
        One claim a reference. It is ``invalid`` where there is no such book, chapter or verse, or where a
        range goes backwards; ``not checkable`` where the text is no reference, or the book or the verse is
        one of other languages, canons or Bibles, or a name may be a misspelled one.

    >>> kjv = load_versification("kjv")
    >>> for claim in check_references("Romans 655:908; 1 Jn 4:7-8, 99", kjv):
    ...     print(claim.text, claim.verdict, claim.reason)
    Romans 655:908 invalid Romans has 16 chapters
    1 Jn 4:7-8 valid
    99 invalid 1 John 4 has 21 verses
    """
    body = _TRANSLATION.sub("", text)
    start = m.end() if (m := _LEADING.match(body)) else 0
    for pattern, sign in _WORDS:
        body = pattern.sub(lambda match, sign=sign: sign.ljust(len(match[0])), body)  # type: ignore[misc]
    claims: list[Claim] = []
    before: tuple[str, Numbers | None] | None = None
    for begin, end, separator in _parts(body, start):
        claim, before = _judge(body[begin:end], separator, before, versification)
        claims.append(replace(claim, text=text[begin:end], start=begin, end=end))
    return claims or [Claim(text, "not checkable", "empty", 0, len(text))]


def _judge(
    part: str, separator: str, before: tuple[str, Numbers | None] | None, versification: Versification
) -> tuple[Claim, tuple[str, Numbers | None] | None]:
    """The claim of one part of a list, and the book and the numbers that the next part may continue."""
    match = _PART.fullmatch(part)
    if match is None:
        return _claim("not checkable", "not a reference"), before
    numbers = None
    if match["book"]:
        found = _find_book(match["book"], bool(match["numbers"]), versification)
        if isinstance(found, Claim):
            return found, None
        book = found
    elif before is None:
        return _claim("not checkable", "no name of a book"), None
    else:
        book, numbers = before
    if not match["numbers"]:
        return Claim("", "valid", reading=book), (book, None)
    place = _NUMBERS.fullmatch(match["numbers"].strip())
    if place is None:
        return _claim("not checkable", "not chapter:verse"), (book, numbers)
    continued = None if separator == ";" or numbers is None or numbers.verse is None else numbers
    numbers = _to_numbers(place, versification.books[book], continued)
    verdict, reason = _check(book, numbers, versification)
    return Claim("", verdict, reason, reading=_reading(book, numbers)), (book, numbers)


def find_references(text: str, versification: Versification) -> list[Claim]:
    """Find and check references of the form ``John 3:16`` in running text. Names of books that are not known
    are passed over, since ``Track 3:45`` is no reference.

    >>> kjv = load_versification("kjv")
    >>> [(c.text, c.verdict) for c in find_references("As John 3:16 says (see 1 Jn 9:9), at 10:30.", kjv)]
    [('John 3:16', 'valid'), ('1 Jn 9:9', 'invalid')]
    """
    claims = []
    for match in _IN_TEXT.finditer(text):
        if _plain(match["book"]) in versification.names:
            start = match.start()
            for claim in check_references(match[0], versification):
                claims.append(replace(claim, start=claim.start + start, end=claim.end + start))
    return claims


def _parts(body: str, start: int) -> Iterator[tuple[int, int, str]]:
    """Start, end and the separator before each part of a list of references."""
    separator = ";"
    place = start
    for match in [*_SEPARATOR.finditer(body, start), None]:
        begin, end = place, match.start() if match else len(body)
        while begin < end and (body[begin].isspace() or body[begin] in "(["):
            begin += 1
        while end > begin and (body[end - 1].isspace() or body[end - 1] in ".)]"):
            end -= 1
        if begin < end:
            yield begin, end, separator
        if match:
            separator, place = match[0].strip(), match.end()


def _plain(name: str) -> str:
    """A name without case, spaces, dots and accents' forms; ordinals as digits."""
    name = _PREAMBLE.sub("", unicodedata.normalize("NFKC", name).strip()).casefold()
    for digit, words in _ORDINALS.items():
        name = re.sub(rf"^(?:{digit}|{words})(?:[\s.]+|(?<=\d))(?=\D)", digit, name)
    return re.sub(r"[\s.,:'\u2019-]+", "", name)


def _find_book(written: str, numbered: bool, versification: Versification) -> str | Claim:
    """The book that a name means; else a claim with verdict and reason."""
    name, names = _plain(written), versification.names
    if name in names:
        return names[name]
    if name in versification.elsewhere:
        return _claim("not checkable", f"of another canon or language than the {versification.title}")
    if len(name) >= _SHORTEST_BEGINNING:
        books = {book for known, book in names.items() if known.startswith(name)}
        if len(books) == 1:
            return books.pop()
        if not books and any(known.startswith(name) for known in versification.elsewhere):
            return _claim("not checkable", f"perhaps of another canon than the {versification.title}")
    if not numbered or len(written.split()) > 5:
        return _claim("not checkable", "not a reference")
    stems = {known[1:]: book[2:] for known, book in names.items() if known[0].isdigit()}
    if name in stems:
        return _claim("not checkable", f"{stems[name]}: 1 or 2 is missing")
    shown = " ".join(written.split())
    if name[:1].isdigit() and (name[1:] in stems or name[1:] in names):
        return _claim("invalid", f"there is no book {shown!r}")
    if not name.isascii():
        return _claim("not checkable", f"{shown!r} is not an English name")
    near = [known for known in difflib.get_close_matches(name, names, n=1, cutoff=0.8) if len(known) > 3]
    if near:
        return _claim("not checkable", f"no book {shown!r}; perhaps {names[near[0]]}")
    return _claim("invalid", f"there is no book {shown!r}")


def _claim(verdict: Verdict, reason: str) -> Claim:
    return Claim("", verdict, reason)


def _to_numbers(match: re.Match[str], verses: Sequence[int], context: Numbers | None = None) -> Numbers:
    """The places that numbers mean: verses of a book of one chapter, or of the chapter named before."""

    def number(key: str) -> int | None:
        return int(match[key][:9]) if match[key] else None

    first = number("chapter") or number("only") or 0
    verse, last_chapter, last = number("verse"), number("last_chapter"), number("last")
    if verse is None and last_chapter is None and (len(verses) == 1 or context):
        chapter = context.last_chapter if context else 1
        return Numbers(chapter, first, chapter, first if last is None else last)
    if verse is None and last_chapter is None:
        return Numbers(first, None, first if last is None else last, None)
    if last_chapter is not None:
        return Numbers(first, verse, last_chapter, last)
    return Numbers(first, verse, first, verse if last is None else last)


def _check(book: str, numbers: Numbers, versification: Versification) -> tuple[Verdict, str]:
    chapters = versification.books[book]
    ends = ((numbers.chapter, numbers.verse), (numbers.last_chapter, numbers.last_verse))
    reason = ""
    for chapter, verse in ends:
        if chapter == 0 or verse == 0:
            reason = reason or "chapters and verses begin at 1"
        elif chapter > len(chapters):
            reason = reason or f"{book} has {counted(len(chapters), 'chapter')}"
        elif verse is not None and verse > chapters[chapter - 1]:
            reason = reason or f"{book} {chapter} has {counted(chapters[chapter - 1], 'verse')}"
    if (ends[0][0], ends[0][1] or 0) > (ends[1][0], ends[1][1] or 0):
        return "invalid", "the range goes backwards"
    if not reason:
        return "valid", ""
    if _is_elsewhere(numbers, versification.numbered_elsewhere.get(book, ())):
        return "not checkable", f"{reason} in the {versification.title}; other Bibles number differently"
    return "invalid", reason


def _is_elsewhere(numbers: Numbers, known: Sequence[Numbers]) -> bool:
    """Whether the last place of a reference is one that only other Bibles have."""
    chapter, verse = numbers.last_chapter, numbers.last_verse
    return any(
        entry.chapter <= chapter <= entry.last_chapter
        and (entry.verse is None or (verse is not None and entry.verse <= verse <= (entry.last_verse or 0)))
        for entry in known
    )


def _reading(book: str, numbers: Numbers) -> str:
    """The canonical form: ``1 John 4:7-8``, ``Psalms 23``, ``Matthew 5:3-7:27``."""
    first = f"{book} {numbers.chapter}" + (f":{numbers.verse}" if numbers.verse is not None else "")
    if numbers.last_chapter != numbers.chapter:
        last = f"{numbers.last_chapter}" + (
            f":{numbers.last_verse}" if numbers.last_verse is not None else ""
        )
    else:
        last = "" if numbers.last_verse in (None, numbers.verse) else str(numbers.last_verse)
    return f"{first}-{last}" if last else first


def check_value(text: str, versification: Versification, *, in_text: bool) -> list[Claim]:
    """The claims of a text: one that consists of references, or with ``in_text`` running text too, which has
    those that are found in it.
    """
    claims = check_references(text, versification)
    if in_text and any(claim.reading is None and claim.verdict == "not checkable" for claim in claims):
        return find_references(text, versification)
    return claims
