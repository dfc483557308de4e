"""Alignment of two genuine vocabularies: speed, and how often the tokens of a text are in the same group.

    python benchmarks/alignment_bench.py --tokenizers FOLDER   # FOLDER/qwen3 and gpt-oss: tokenizer.json

Texts are those of this machine: English prose and sources of the Python that runs (``pydoc_data``, the
standard library), C headers of the system, and translated messages (gettext catalogues of /usr/share/locale)
by language, each up to --bytes, in pieces of 2,000 characters, normalized to NFC as Qwen does. For each, in
both directions (``teacher > student``):

    same_group   of the bytes where both begin a token: how often the two tokens are in one group
    right        how often ``token_groups`` compares them as one outcome: they are in one group, or the start
                 is compared by context; the others have no target
    middle       the share of the places where one model alone begins a token that have a target with
                 ``distill.mid_token_rows``
    aligned, one_to_one, packed, kinds   as ``preflight.json`` has them (docs/training.md)
    seconds      of ``build_token_groups``; ``mb_per_second``: of ``align_bytes``, processor time, without
                 tokenization

Results go to benchmarks/results/alignment.json; exit code 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import gettext
import json
import platform
import subprocess
import sys
import sysconfig
import time
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]
RESULTS = ROOT / "benchmarks" / "results" / "alignment.json"
LOCALES = Path("/usr/share/locale")
LANGUAGES = {
    "Chinese": ["zh_CN", "zh_TW"],
    "Japanese": ["ja"],
    "Korean": ["ko"],
    "Cyrillic": ["ru", "uk", "bg"],
    "Greek": ["el"],
    "Arabic": ["ar"],
    "Hebrew": ["he"],
    "Hindi": ["hi"],
    "Thai": ["th"],
    "Georgian": ["ka"],
    "Tamil": ["ta"],
    "Latin (de, fr, es, tr, vi)": ["de", "fr", "es", "tr", "vi"],
}
TARGETS = {"English": 0.995, "Python": 0.995, "C": 0.99}
SCRIPT_TARGET, MB_TARGET = 0.98, 1.0
PIECE = 2000  # characters
STOPS = {"qwen3": "<|im_end|>", "gpt-oss": "<|return|>"}


def read(paths: Iterable[Path]) -> Iterator[str]:
    for path in paths:
        try:
            yield path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue


def messages(language: str) -> Iterator[str]:
    """The translations in a language, catalogue by catalogue."""
    for path in sorted(LOCALES.glob(f"{language}/LC_MESSAGES/*.mo")):
        try:
            with path.open("rb") as file:
                catalogue = gettext.GNUTranslations(file)._catalog
        except (OSError, UnicodeDecodeError, ValueError):
            continue
        yield "\n".join(text for key, text in catalogue.items() if key and isinstance(text, str))


def texts() -> dict[str, Iterator[str]]:
    from pydoc_data import topics

    library = Path(sysconfig.get_path("stdlib"))
    headers = [*Path(sysconfig.get_path("include")).rglob("*.h"), *Path("/usr/include").glob("*.h")]
    out: dict[str, Iterator[str]] = {
        "English": iter(topics.topics.values()),
        "Python": read(sorted(library.glob("*.py"))),
        "C": read(sorted(headers)),
        "tables of numbers": tables(),
    }
    for name, languages in LANGUAGES.items():
        out[name] = (text for language in languages for text in messages(language))
    return out


def tables() -> Iterator[str]:
    random = np.random.default_rng(0)
    while True:
        yield "\n".join(",".join(f"{value:.4g}" for value in random.normal(0, 1e3, 8)) for _ in range(50))


def pieces(parts: Iterator[str], limit: int) -> list[str]:
    """Up to so many bytes of text, in pieces."""
    out, size = [], 0
    for part in parts:
        text = unicodedata.normalize("NFC", part)
        for first in range(0, len(text), PIECE):
            piece = text[first : first + PIECE]
            if len(piece) > 20:
                out.append(piece)
                size += len(piece.encode())
            if size >= limit:
                return out
    return out


def measure(
    student: Any,
    teacher: Any,
    groups: Any,
    encoded: list[tuple[str, list[int], list[int]]],
    stops: tuple[int, int],
) -> dict[str, Any]:
    from mlx_distill.distill.mapped_mass import MappedMass
    from mlx_distill.distill.teacher_cache import TeacherTargets
    from mlx_distill.losses import align_bytes
    from mlx_distill.losses.mid_token import MidTokens

    mapped = MappedMass(student, teacher, lambda: groups, max_rows=len(encoded))
    began = time.process_time()
    for _, ours, theirs in encoded:
        align_bytes(ours, theirs, student, teacher)
    seconds = time.process_time() - began
    for text, ours, theirs in encoded:
        ids = np.array([*theirs, stops[1]], dtype=np.int32)
        certain = np.zeros((len(ids), 1), dtype=np.float32)
        targets = TeacherTargets("", text, None, ids, certain[:, 0], ids[:, None], certain)
        mapped.add(np.array([*ours, stops[0]]), targets)
    kinds = mapped.facts()["kinds"]
    kept = ("tokens", "aligned", "one_to_one", "same_group", "many_to_one", "soft_target")
    middle = MidTokens(student, teacher, groups)
    places = others = 0
    began = time.perf_counter()
    for _, ours, theirs in encoded:
        spans = align_bytes(ours, theirs, student, teacher)
        places += len(ours) + len(theirs) - 2 * len(spans)
        others += int(middle.in_other_groups(np.array(ours), np.array(theirs), spans).sum())
        ids = np.array(theirs, dtype=np.int32)[:, None]
        middle.targets(np.array(ours), ids[:, 0], spans, ids, np.zeros(ids.shape, np.float32))
    middle_seconds, found = time.perf_counter() - began, middle.facts()
    by_context = found["by_context"]
    size = sum(len(text.encode()) for text, _, _ in encoded)
    figures = {name: kinds["all"][name] for name in kept}
    # Without the stop tokens, which are always in one group.
    starts, ends = figures["aligned"] * figures["tokens"], kinds["end"]["tokens"]
    figures["same_group"] = (figures["same_group"] * starts - ends) / (starts - ends)
    return {
        "bytes": size,
        "mb_per_second": size / 1e6 / seconds,
        **figures,
        "right": figures["same_group"] + by_context / (starts - ends),
        "by_context": by_context,
        "middle": (found["inside"] - by_context + found["across"]) / max(places, 1),
        "places": places,
        "left_out": {**found["left_out"], "starts": others - by_context},
        "middle_seconds": middle_seconds,
        "kinds": {k: {name: v[name] for name in kept} for k, v in kinds.items() if k not in ("all", "end")},
    }


def missed(name: str, figures: dict[str, Any]) -> list[str]:
    target = TARGETS.get(name, SCRIPT_TARGET)
    out = [] if figures["right"] >= target else [f"{figures['right']:.4f} below {target}"]
    if figures["mb_per_second"] < MB_TARGET:
        out.append(f"{figures['mb_per_second']:.2f} MB a second")
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizers", type=Path, required=True)
    parser.add_argument("--bytes", type=int, default=120_000, help="of each kind of text")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    from tokenizers import Tokenizer

    from mlx_distill.losses import build_token_groups
    from mlx_distill.losses.token_bytes import vocabulary
    from mlx_distill.runtime import machine, versions

    names = ("qwen3", "gpt-oss")
    loaded = {
        name: Tokenizer.from_file(str(arguments.tokenizers / name / "tokenizer.json")) for name in names
    }
    for tokenizer in loaded.values():
        vocabulary(tokenizer)
    corpora = {name: pieces(islice(parts, 10_000), arguments.bytes) for name, parts in texts().items()}
    results: dict[str, Any] = {}
    failed = False
    for teacher, student in (names, names[::-1]):
        began = time.perf_counter()
        stops = tuple(loaded[name].token_to_id(STOPS[name]) for name in (student, teacher))
        groups = build_token_groups(
            loaded[student], loaded[teacher], student_stop=stops[0], teacher_stop=stops[1]
        )
        seconds = time.perf_counter() - began
        entry: dict[str, Any] = {"groups_seconds": seconds, "shared": groups.shared, "texts": {}}
        for name, corpus in corpora.items():
            if not corpus:
                continue
            ids = [
                [encoding.ids for encoding in loaded[one].encode_batch(corpus, add_special_tokens=False)]
                for one in (student, teacher)
            ]
            encoded = list(zip(corpus, *ids, strict=True))
            figures = measure(loaded[student], loaded[teacher], groups, encoded, stops)
            entry["texts"][name] = {**figures, "missed": missed(name, figures)}
            failed |= bool(entry["texts"][name]["missed"])
            print(
                f"{teacher} > {student} {name:28s} {figures['bytes']:8,} bytes  same group "
                f"{figures['same_group']:.4f}  right {figures['right']:.4f}  middle "
                f"{figures['middle']:.3f}  aligned {figures['aligned']:.3f}  one to one "
                f"{figures['one_to_one']:.3f}  many to one {figures['many_to_one']:.3f}  "
                f"{figures['mb_per_second']:.1f} MB/s  {', '.join(entry['texts'][name]['missed'])}",
                flush=True,
            )
        results[f"{teacher} > {student}"] = entry
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    about = {"machine": machine(), "versions": versions(), "commit": commit, "platform": platform.platform()}
    arguments.out.write_text(json.dumps({**about, "bytes": arguments.bytes, **results}, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
