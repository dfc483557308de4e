"""Make mlx_distill/assets/references/kjv.json: books, chapters and numbers of verses.

    sudo apt-get install bible-kjv
    python scripts/make_references.py

The numbers of verses are counted in what Debian's program ``bible`` prints, which is one line a verse; no
text of a verse is written. Names and abbreviations are the table below.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from pathlib import Path

OUT = Path(__file__).parent.parent / "mlx_distill" / "assets" / "references" / "kjv.json"

# In the order of the program's output: its own abbreviation, the name, other names and abbreviations.
# Upper and lower case, dots and spaces do not matter, beginnings of at least three letters that only one
# name has are understood without being listed, and so are I, II, III, First, 1st ... for 1, 2, 3.
BOOKS = """
Ge: Genesis: Gen, Ge, Gn
Exo: Exodus: Exod, Exo, Ex
Lev: Leviticus: Lev, Le, Lv
Num: Numbers: Num, Nu, Nm, Nb
Deu: Deuteronomy: Deut, Deu, Dt
Josh: Joshua: Josh, Jos, Jsh
Jdgs: Judges: Judg, Jdg, Jdgs, Jg
Ruth: Ruth: Rut, Rth, Ru
1Sm: 1 Samuel: 1 Sam, 1 Sa, 1 Sm, 1 S
2Sm: 2 Samuel: 2 Sam, 2 Sa, 2 Sm, 2 S
1Ki: 1 Kings: 1 Kgs, 1 Ki, 1 Kin, 1 K
2Ki: 2 Kings: 2 Kgs, 2 Ki, 2 Kin, 2 K
1Chr: 1 Chronicles: 1 Chron, 1 Chr, 1 Ch
2Chr: 2 Chronicles: 2 Chron, 2 Chr, 2 Ch
Ezra: Ezra: Ezr
Neh: Nehemiah: Neh, Ne
Est: Esther: Esth, Est, Es
Job: Job: Jb
Psa: Psalms: Psalm, Pslm, Psa, Ps, Pss, Psm
Prv: Proverbs: Proverb, Prov, Prv, Pro, Pr
Eccl: Ecclesiastes: Eccles, Eccl, Ecc, Ec, Qoheleth, Qoh
SSol: Song of Solomon: Song of Songs, Song, Songs, Canticles, Canticle of Canticles, Cant, SoS, SS, Sg
Isa: Isaiah: Isa, Is
Jer: Jeremiah: Jer, Je
Lam: Lamentations: Lam, La
Eze: Ezekiel: Ezek, Eze, Ezk
Dan: Daniel: Dan, Da, Dn
Hos: Hosea: Hos, Ho
Joel: Joel: Jl
Amos: Amos: Am
Obad: Obadiah: Obad, Ob
Jonah: Jonah: Jon, Jnh
Mic: Micah: Mic, Mi
Nahum: Nahum: Nah, Na
Hab: Habakkuk: Hab, Hb
Zep: Zephaniah: Zeph, Zep, Zp
Hag: Haggai: Hag, Hg
Zec: Zechariah: Zech, Zec, Zc
Mal: Malachi: Mal, Ml
Mat: Matthew: Matt, Mat, Mt
Mark: Mark: Mrk, Mk, Mr
Luke: Luke: Luk, Lk, Lu
John: John: Joh, Jhn, Jn
Acts: Acts: Acts of the Apostles, Act, Ac
Rom: Romans: Rom, Ro, Rm
1Cor: 1 Corinthians: 1 Cor, 1 Co
2Cor: 2 Corinthians: 2 Cor, 2 Co
Gal: Galatians: Gal, Ga
Eph: Ephesians: Ephes, Eph
Phi: Philippians: Phil, Php, Pp
Col: Colossians: Col
1Th: 1 Thessalonians: 1 Thess, 1 Thes, 1 Th
2Th: 2 Thessalonians: 2 Thess, 2 Thes, 2 Th
1Tim: 1 Timothy: 1 Tim, 1 Ti, 1 Tm
2Tim: 2 Timothy: 2 Tim, 2 Ti, 2 Tm
Titus: Titus: Tit, Ti
Phmn: Philemon: Philem, Phlm, Phm, Phmn, Pm
Heb: Hebrews: Heb
Jas: James: Jas, Jam, Jm
1Pet: 1 Peter: 1 Pet, 1 Pe, 1 Pt
2Pet: 2 Peter: 2 Pet, 2 Pe, 2 Pt
1Jn: 1 John: 1 Jhn, 1 Jn, 1 Jo
2Jn: 2 John: 2 Jhn, 2 Jn, 2 Jo
3Jn: 3 John: 3 Jhn, 3 Jn, 3 Jo
Jude: Jude: Jud, Jd
Rev: Revelation: Revelations, Revelation to John, Apocalypse, Rev, Rv, Re
"""
# References that other Bibles have and this versification lacks; not complete.
NUMBERED_ELSEWHERE = ["Psalms 151", "Daniel 3:31-100", "Daniel 13", "Daniel 14", "Joel 4", "Malachi 3:19-24"]
NUMBERED_ELSEWHERE += ["Esther 10:4-13", "Esther 11-16", "3 John 1:15", "Revelation 12:18"]
# Names of books that are real and that this list cannot check: other canons and scriptures, other languages.
NAMED_ELSEWHERE = """
Tobit, Judith, Wisdom, Wisdom of Solomon, Sirach, Ecclesiasticus, Ben Sira, Baruch, Letter of Jeremiah,
Susanna, Bel and the Dragon, Prayer of Azariah, Prayer of Manasseh, 1 Maccabees, 2 Maccabees, 3 Maccabees, 4
Maccabees, 1 Esdras, 2 Esdras, 3 Esdras, 4 Esdras, 4 Ezra, 1 Macc, 2 Macc, 1 Enoch, Enoch, Jubilees, 1
Clement, 2 Clement, Didache, Gospel of Thomas, Quran, Koran, Qur'an, Surah, Sura, 1 Nephi, 2 Nephi, 3 Nephi,
4 Nephi, Jacob, Enos, Jarom, Omni, Mosiah, Alma, Helaman, Mormon, Ether, Moroni, Doctrine and Covenants,
D&C, Moses, Abraham, Bhagavad Gita, Gita, Rigveda, Dhammapada, Talmud, Mishnah, 1 Mose, 2 Mose, 3 Mose, 4
Mose, 5 Mose, Josua, Richter, Rut, 1 Könige, 2 Könige, Hiob, Ijob, Psalmen, Sprüche, Sprichwörter, Prediger,
Kohelet, Hoheslied, Hohelied, Jesaja, Jeremia, Klagelieder, Hesekiel, Ezechiel, Sacharja, Maleachi,
Matthäus, Markus, Lukas, Johannes, Apostelgeschichte, Römer, Korinther, Galater, Epheser, Philipper,
Kolosser, Thessalonicher, Timotheus, Hebräer, Jakobus, Petrus, Judas, Offenbarung, 1 Korinther, 2 Korinther,
1 Thessalonicher, 2 Thessalonicher, 1 Timotheus, 2 Timotheus, 1 Petrus, 2 Petrus, 1 Johannes, 2 Johannes, 3
Johannes, Genèse, Exode, Lévitique, Nombres, Deutéronome, Psaume, Psaumes, Proverbes, Esaïe, Isaïe,
Matthieu, Marc, Luc, Jean, Actes, Romains, Galates, Ephésiens, Philippiens, Colossiens, Hébreux, Jacques, 1
Corinthiens, 2 Corinthiens, 1 Jean, 2 Jean, 3 Jean, 1 Pierre, 2 Pierre, Génesis, Éxodo, Exodo, Levítico,
Números, Deuteronomio, Salmo, Salmos, Proverbios, Eclesiastés, Cantares, Isaías, Jeremías, Mateo, Marcos,
Lucas, Juan, Hechos, Romanos, Gálatas, Efesios, Filipenses, Colosenses, Hebreos, Santiago, Apocalipsis, 1
Corintios, 2 Corintios, 1 Juan, 2 Juan, 3 Juan, 1 Pedro, 2 Pedro, João, Mateus, Atos, Apocalipse, Genesi,
Esodo, Salmi, Matteo, Marco, Luca, Giovanni, Atti, Romani, Apocalisse, 1 Giovanni, 1 Corinzi, 2 Corinzi
"""


def verse_counts() -> dict[str, list[int]]:
    """Numbers of verses by chapter, by the program's own abbreviation of the book."""
    printed = subprocess.run(
        ["bible", "-f", "Genesis1:1-Revelation22:21"], capture_output=True, check=True, text=True
    ).stdout
    places = [re.match(r"(\d?[A-Za-z]+)(\d+):(\d+) ", line) for line in printed.splitlines()]
    counts: Counter[tuple[str, int]] = Counter()
    for place in places:
        assert place is not None
        book, chapter, verse = place[1], int(place[2]), int(place[3])
        counts[book, chapter] += 1
        assert counts[book, chapter] == verse, "verses out of order"
    books: dict[str, list[int]] = {}
    for (book, chapter), verses in counts.items():
        books.setdefault(book, []).append(verses)
        assert len(books[book]) == chapter, "chapters out of order"
    return books


def main() -> None:
    """Write the list."""
    counts = verse_counts()
    books = []
    for line in BOOKS.strip().splitlines():
        short, name, aliases = (part.strip() for part in line.split(":"))
        books.append({"name": name, "aliases": aliases.split(", "), "verses": counts.pop(short)})
    assert not counts, f"books without a name: {list(counts)}"
    lines = [json.dumps(book, ensure_ascii=False) for book in books]
    elsewhere = [name.strip() for name in NAMED_ELSEWHERE.replace("\n", " ").split(",")]
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(
        '{\n"versification": "kjv",\n'
        '"title": "King James Version",\n'
        f'"numbered_elsewhere": {json.dumps(NUMBERED_ELSEWHERE)},\n'
        f'"named_elsewhere": {json.dumps(elsewhere, ensure_ascii=False)},\n'
        '"books": [\n' + ",\n".join(lines) + "\n]\n}\n",
        encoding="utf-8",
    )
    print(f"{len(books)} books, {sum(sum(book['verses']) for book in books):,} verses: {OUT}")


if __name__ == "__main__":
    main()
