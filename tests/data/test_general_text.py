"""General text: paragraphs of text files and JSONL, limits, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_distill.data.general_text import MAX_BYTES, MAX_PARAGRAPH, PACKAGED, read_general_text
from mlx_distill.errors import DataError, FileError

TEXTS = [f"Paragraph {n} of a text." for n in range(12)]


def test_the_packaged_text_has_paragraphs_of_many_kinds() -> None:
    text = read_general_text(PACKAGED)
    assert len(text.paragraphs) == 49 and text.bytes == 12_257 and not text.left_out
    assert len(set(text.paragraphs)) == 49 and all(len(p) <= MAX_PARAGRAPH for p in text.paragraphs)


@pytest.mark.parametrize("between", ["\n\n", "\r\n\r\n", "\n \t\n\n\n"])
def test_empty_lines_separate_paragraphs(folder: Path, between: str) -> None:
    (folder / "a.txt").write_bytes(f"\n{between.join(TEXTS)}\n\n".encode())
    assert list(read_general_text(folder / "a.txt").paragraphs) == TEXTS


def test_each_line_of_a_jsonl_file_is_a_text_of_its_own(folder: Path) -> None:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{text}\n\nMore."}) + "\n" for text in TEXTS))
    assert list(read_general_text(path).paragraphs[:3]) == [TEXTS[0], "More.", TEXTS[1]]
    path.write_text('{"text": "a"}\n{"content": "b"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: no text"):
        read_general_text(path)


def test_long_paragraphs_are_cut_without_loss_and_long_texts_behind_a_limit(folder: Path) -> None:
    long = "word " * 1000
    (folder / "a.txt").write_text("\n\n".join([*TEXTS, long.strip()]))
    found = read_general_text(folder / "a.txt").paragraphs
    assert "".join(found[12:]) == long.strip() and max(map(len, found)) <= MAX_PARAGRAPH
    (folder / "b.txt").write_text("\n\n".join(["a" * 900] * 200))
    text = read_general_text(folder / "b.txt")
    assert len(text.paragraphs) == MAX_BYTES // 900 and text.left_out == 200 - MAX_BYTES // 900


def test_too_little_text_and_other_encodings_are_refused(folder: Path) -> None:
    (folder / "a.txt").write_text("\n\n".join(TEXTS[:9]))
    with pytest.raises(DataError, match="9 paragraphs"):
        read_general_text(folder / "a.txt")
    (folder / "a.txt").write_bytes(b"\xff\xfe a")
    with pytest.raises(DataError, match="not UTF-8"):
        read_general_text(folder / "a.txt")
    with pytest.raises(FileError):
        read_general_text(folder / "none.txt")
