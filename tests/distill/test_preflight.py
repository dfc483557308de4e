"""What is measured and said before a distillation: against counting token by token, and by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from helpers.small_chain import finished
from helpers.tokenizer_kinds import make
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_distill.config import to_mapping
from mlx_distill.distill.mapped_mass import MappedMass
from mlx_distill.distill.preflight import FILE_NAME, lines, preflight
from mlx_distill.distill.teacher_cache import TeacherTargets
from mlx_distill.distill.token_kinds import KINDS, TokenKinds, kind_of
from mlx_distill.distill.token_losses import token_loss_name
from mlx_distill.errors import ConfigError
from mlx_distill.graph import graph
from mlx_distill.losses import align_bytes, build_token_groups, token_bytes
from mlx_distill.losses.numerics import LOWEST
from mlx_distill.recipe import DistillConfig, Recipe, TargetsConfig, load_recipe
from mlx_distill.storage import read_manifest

STUDENT, TEACHER = make("llama3"), make("qwen")  # digits by three, and one by one
STOP = 4
TEXTS = [
    'The answer is {"label": "fine", "score": 731, "themes": ["hope", "grace"]}',
    "In 1984 there were 12345 houses",
    "naïve café, Straße 東京 🎵",
]
GROUPS = build_token_groups(STUDENT, TEACHER, student_stop=STOP, teacher_stop=STOP)


def ids(tokenizer: Any, text: str) -> list[int]:
    return [*tokenizer.encode(text, add_special_tokens=False).ids, STOP]


def targets(text: str, k: int = 5, seed: int = 0) -> TeacherTargets:
    """Random distributions over the teacher's tokens, whose top k is kept."""
    tokens = np.array(ids(TEACHER, text), dtype=np.int32)
    width = TEACHER.get_vocab_size()
    random = np.random.default_rng(seed)
    z = 4 * random.normal(size=(len(tokens), width))
    logs = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    top = np.argsort(-logs, axis=1)[:, :k]
    return TeacherTargets(
        "r",
        text,
        None,
        tokens,
        logs[np.arange(len(tokens)), tokens].astype(np.float32),
        top.astype(np.int32),
        np.take_along_axis(logs, top, axis=1).astype(np.float32),
    )


def by_hand(texts: list[str]) -> dict[str, dict[str, float]]:
    """The same sums, one token after the other."""
    sums: dict[str, dict[str, float]] = {}

    def count(kind: str, name: str, by: float = 1.0) -> None:
        for key in (kind, "all"):
            sums.setdefault(key, {}).setdefault(name, 0.0)
            sums[key][name] += by

    ours, theirs = token_bytes(STUDENT), token_bytes(TEACHER)
    members = np.bincount(GROUPS.student, minlength=GROUPS.count)
    for text in texts:
        row, student = targets(text), ids(STUDENT, text)
        spans = align_bytes(student, row.ids, STUDENT, TEACHER).tolist()
        spans.append([len(student) - 1, len(student), len(row.ids) - 1, len(row.ids)])
        for i in student:
            count(kind_of(ours[i]), "student_tokens")
        for j, i in enumerate(row.ids.tolist()):
            count(kind_of(theirs[i]), "tokens")
            count(kind_of(theirs[i]), "unsure", 1 - np.exp(float(row.topk_logprobs[j].max())))
        for a, b, c, d in spans:
            kind = kind_of(theirs[int(row.ids[c])])
            count(kind, "aligned")
            count(kind_of(ours[student[a]]), "soft_target")
            if (b - a, d - c) == (1, 1):
                count(kind, "one_to_one")
            if b - a == 1 and d - c > 1:
                count(kind_of(ours[student[a]]), "many_to_one")
            if GROUPS.student[student[a]] == GROUPS.teacher[row.ids[c]]:
                count(kind, "same_group")
            left = 1.0
            for i, logprob in zip(row.topk_ids[c].tolist(), row.topk_logprobs[c].tolist(), strict=True):
                left -= np.exp(logprob)
                if GROUPS.teacher[i] != GROUPS.outside:
                    count(kind, "mapped", np.exp(logprob))
                    if members[GROUPS.teacher[i]] > 1:
                        count(kind, "ambiguous", np.exp(logprob))
            count(kind, "tail", left)
    return sums


def measured(texts: list[str]) -> dict[str, Any]:
    mapped = MappedMass(STUDENT, TEACHER, lambda: GROUPS)
    for text in texts:
        mapped.add(np.array(ids(STUDENT, text)), targets(text))
    return mapped.facts()


def test_every_figure_equals_counting_token_by_token() -> None:
    facts, sums = measured(TEXTS), by_hand(TEXTS)
    assert facts["rows"] == 3 and set(facts["kinds"]) == set(sums)
    whole = {"tokens", "student_tokens"}
    over = {"ambiguous": "mapped", "same_group": "aligned", "soft_target": "student_tokens"}
    over |= {"many_to_one": "student_tokens", "unsure": None}
    for kind, want in sums.items():
        got = facts["kinds"][kind]
        for name in {*got} - {"lost", "unaligned"}:
            base = over.get(name, "tokens")
            by = 3 if base is None else want.get(base, 0)
            if name in whole:
                assert got[name] == want.get(name, 0)
            elif by:
                assert got[name] == pytest.approx(want.get(name, 0) / by, abs=1e-6), (kind, name)
        assert got["mapped"] + got["tail"] + got["lost"] == pytest.approx(1, abs=1e-6)
    assert facts["kinds"]["digits"]["many_to_one"] > 0.4 and facts["kinds"]["digits"]["unaligned"] > 0.4
    assert facts["kinds"]["all"]["ambiguous"] > 0


@settings(max_examples=40, deadline=None)
@given(text=st.text(min_size=1, max_size=30))
def test_any_text_gives_shares(text: str) -> None:
    from unicodedata import normalize

    kinds = measured([normalize("NFC", text)])["kinds"]
    for rates in kinds.values():
        for name in ("aligned", "one_to_one", "mapped", "tail", "lost", "soft_target", "many_to_one"):
            assert rates[name] is None or -1e-6 <= rates[name] <= 1 + 1e-6
    assert sum(rates["tokens"] for kind, rates in kinds.items() if kind != "all") == kinds["all"]["tokens"]
    assert kinds["end"]["same_group"] == 1


def test_one_tokenizer_maps_all_but_what_the_student_has_no_column_for() -> None:
    text, width = TEXTS[0], TEACHER.get_vocab_size()
    row = targets(text, k=width)
    for columns, lost in ((0, 0.0), (300, None)):
        mapped = MappedMass(TEACHER, TEACHER, None, columns=columns)
        mapped.add(row.ids, row)
        whole = mapped.facts()["kinds"]["all"]
        assert whole["aligned"] == whole["one_to_one"] == 1 and whole["many_to_one"] == 0
        beyond = np.exp(row.topk_logprobs.astype(np.float64))[row.topk_ids >= columns].sum() / len(row.ids)
        assert whole["lost"] == pytest.approx(beyond if lost is None else lost, abs=1e-5)


def test_unused_slots_have_no_mass_and_later_answers_are_not_counted() -> None:
    row = targets(TEXTS[1])
    unused = replace(row, topk_logprobs=np.where(np.arange(5) < 4, row.topk_logprobs, LOWEST))
    mapped = MappedMass(STUDENT, TEACHER, lambda: GROUPS, max_rows=1)
    for _ in range(2):
        mapped.add(np.array(ids(STUDENT, row.text)), unused)
    facts = mapped.facts()
    assert facts["rows"] == 1 and facts["kinds"]["all"]["tail"] > measured([row.text])["kinds"]["all"]["tail"]


def test_kinds_of_a_vocabulary_and_of_one_without_bytes() -> None:
    tokens = np.array(ids(TEACHER, "hope 7, 東"))
    names = [KINDS[i] for i in TokenKinds(TEACHER).of(tokens)]
    assert {"words", "digits", "punctuation", "other scripts"} <= set(names) and names[-1] == "end"
    assert KINDS[TokenKinds(TEACHER).of(np.array([10**6]))[0]] == "end"
    assert set(TokenKinds({}).of(tokens)) == {KINDS.index("words")}
    assert kind_of("②".encode()) == "digits" and kind_of("👩‍👧".encode()) == "other scripts"


GOOD = {
    "tokens": 100,
    "aligned": 1.0,
    "one_to_one": 0.99,
    "same_group": 1.0,
    "mapped": 0.99,
    "ambiguous": 0.0,
    "tail": 0.005,
    "lost": 0.005,
    "unaligned": 0.0,
    "unsure": 0.1,
    "student_tokens": 100,
    "soft_target": 1.0,
    "many_to_one": 0.0,
}


# As bad as can be: every warning that the settings allow stands there.
BAD = GOOD | {"same_group": 0.5, "mapped": 0.5, "ambiguous": 0.3, "tail": 0.2, "lost": 0.3, "unsure": 3.0}
BAD |= {"soft_target": 0.5, "many_to_one": 0.5}


def named(warning: dict[str, Any]) -> list[tuple[str, Any]]:
    return [item for change in warning["settings"] for item in change.items()]


def said(
    loss: str | None, distill: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **rates: Any
) -> list[str]:
    kinds = {"words": GOOD, "digits": {**GOOD, **rates}, "all": {**GOOD, **rates}}
    vocabulary = {"student": 80, "teacher": 100, "shared": 60, "same": False}
    facts = preflight(
        loss,
        DistillConfig(**distill or {}),
        TargetsConfig(**text or {}),
        {"rows": 4, "vocabulary": vocabulary, "kinds": kinds},
    )
    json.dumps(facts)
    printed = lines(facts)
    assert all(
        f"{key}: {str(value).lower()}" in one["fix"] for one in facts["warnings"] for key, value in named(one)
    )
    assert "75.0\u202f% of the smaller one" in printed[0]
    assert all(one["what"] in " ".join(printed) and one["fix"] for one in facts["warnings"])
    return [one["what"] for one in facts["warnings"]]


@pytest.mark.parametrize("loss", ["kl", "token_groups", "alm", "reverse_kl", None])
def test_a_good_setting_says_nothing(loss: str | None) -> None:
    assert said(loss) == []


@pytest.mark.parametrize(
    ("loss", "distill", "text", "rates", "pattern"),
    [
        (
            "kl",
            {},
            {"text": "greedy"},
            {"unsure": 2.5},
            "greedy shows one text .* differ in about 2.5 tokens",
        ),
        (None, {}, {"text": "greedy"}, {"unsure": 2.5}, "greedy shows one text"),
        ("uld", {}, {}, {}, "uld compares sorted"),
        ("token_groups", {"text_weight": 0.0}, {}, {"ambiguous": 0.25}, r"25.0.% of the mass.*nothing"),
        ("token_groups", {}, {}, {"many_to_one": 0.4}, r"40.0.% of the student's tokens of digits"),
        ("token_groups", {}, {}, {"mapped": 0.7, "lost": 0.295}, r"29.5.% of .* no place .* in digits"),
        ("token_groups", {}, {"draws": 8}, {"same_group": 0.9}, r"at 10.0.% of the common starts"),
        ("token_groups", {"temperature": 4.0}, {}, {"tail": 0.02}, r"softens the listed 32 .* 2.0.%"),
        ("alm", {"temperature": 4.0}, {}, {}, "no effect on token_loss: alm"),
        ("kl", {}, {}, {"tail": 0.2}, r"20.0.% .* outside of its top 32.* lower bound"),
    ],
)
def test_each_harm_is_said_with_its_figure(
    loss: str | None, distill: dict[str, Any], text: dict[str, Any], rates: dict[str, Any], pattern: str
) -> None:
    import re

    (one,) = said(loss, distill, text, **rates)
    assert re.search(pattern, one), one


@pytest.mark.parametrize(
    ("loss", "distill", "text", "rates"),
    [
        ("kl", {}, {}, {"unsure": 2.5}),
        ("alm", {"text_weight": 0.0}, {}, {"ambiguous": 0.25}),
        ("token_groups", {"text_weight": 0.0}, {}, {}),
        ("token_groups", {}, {}, {"same_group": 0.9}),  # compared by context
        ("alm", {}, {}, {"many_to_one": 0.4, "mapped": 0.7, "lost": 0.295, "same_group": 0.9}),
        ("reverse_kl", {"temperature": 4.0}, {}, {"tail": 0.02}),
        ("token_groups", {"temperature": 4.0, "teacher": "live"}, {}, {"tail": 0.2}),
        ("kl", {}, {"draws": 12}, {"tail": 0.2}),
        (None, {}, {}, {"tail": 0.2, "many_to_one": 0.4}),
    ],
)
def test_nothing_is_said_where_it_does_no_harm(
    loss: str | None, distill: dict[str, Any], text: dict[str, Any], rates: dict[str, Any]
) -> None:
    assert said(loss, distill, text, **rates) == []


def combinations() -> Iterator[dict[str, Any]]:
    """Settings of which the rules of the warnings read something."""
    choices: dict[str, tuple[Any, ...]] = {
        "distill.token_loss": ("none", "auto", "token_groups", "uld", "gold", "alm"),
        "distill.teacher": ("cached", "live"),
        "distill.mid_token_rows": (False, True),
        "distill.temperature": (1.0, 4.0),
        "distill.text_weight": (0.3, 0.0),
        "targets.draws": (0, 8),
        "targets.thinking": ("none", "keep"),
    }
    for values in product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


def with_settings(change: Mapping[str, Any], of: Recipe) -> Recipe:
    blocks: dict[str, Any] = {}
    for key, value in change.items():
        block, _, name = key.partition(".")
        blocks[block] = replace(blocks.get(block, getattr(of, block)), **{name: value})
    return replace(of, **blocks)


def test_no_recipe_is_refused_with_what_a_warning_recommends() -> None:
    """Of all settings that a recipe accepts, each change that a warning names is accepted too."""
    plain = load_recipe("tiny", {"controls.labels_hard": False, "controls.teacher_hard": False})
    task = plain.load_task()
    known: dict[str, bool] = {}

    def accepted(recipe: Recipe) -> bool:
        key = json.dumps([to_mapping(recipe.distill), to_mapping(recipe.targets)])
        if key not in known:
            try:
                known[key] = bool(graph(recipe, task))
            except ConfigError:
                known[key] = False
        return known[key]

    seen = set()
    for settings_ in combinations():
        recipe = with_settings(settings_, plain)
        if not accepted(recipe):
            continue
        loss = token_loss_name(recipe.distill, same_tokenizer=False)
        kinds = {"digits": BAD, "all": BAD}
        vocabulary = {"student": 80, "teacher": 100, "shared": 60, "same": False}
        measured = {"rows": 4, "vocabulary": vocabulary, "kinds": kinds}
        for warning in preflight(loss, recipe.distill, recipe.targets, measured)["warnings"]:
            for change in warning["settings"]:
                seen.update(change)
                assert accepted(with_settings(change, recipe)), (settings_, warning)
    assert {"distill.mid_token_rows", "distill.teacher", "distill.token_loss", "targets.draws"} <= seen


@pytest.mark.parametrize("may_be_live", [True, False])
@pytest.mark.parametrize("top_k", [32, 1024])
def test_what_cannot_be_raised_or_be_live_is_not_recommended(may_be_live: bool, top_k: int) -> None:
    measured = {"rows": 4, "vocabulary": {}, "kinds": {"all": BAD}}
    text = TargetsConfig(top_k=top_k)
    facts = preflight("kl", DistillConfig(), text, measured, may_be_live=may_be_live)
    (fix,) = [one["fix"] for one in facts["warnings"] if "outside of its top" in one["what"]]
    assert ("distill.teacher: live" in fix) == may_be_live
    assert ("raise targets.top_k" in fix) == (top_k < 1024) and fix


@pytest.mark.slow
def test_a_run_writes_it_shows_it_and_keeps_the_students_hash() -> None:
    out = finished() / "out"
    facts = json.loads((out / "student" / FILE_NAME).read_text())
    assert facts["token_loss"] == "token_groups" and facts["rows"] == 82
    assert facts["kinds"]["all"]["tokens"] > 800
    manifest = read_manifest(out / "student")
    assert manifest is not None and FILE_NAME in manifest.files
    files = {name: entry for name, entry in manifest.files.items() if name != FILE_NAME}
    assert replace(manifest, files=files).content == manifest.content
    report = json.loads((out / "report.json").read_text())
    assert report["distillation"]["preflight"] == facts
    page = (out / "report.html").read_text()
    assert "What of the teacher reaches the student" in page and "886 tokens are in both" in page
