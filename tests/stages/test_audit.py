"""The audit of a distillation: every figure against a plain float64 computation, killed and continued."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.small_chain import RecordedProgress, finished, make_context

from mlx_distill.data.chat import render
from mlx_distill.data.general_text import PACKAGED, read_general_text
from mlx_distill.distill.objective import kd
from mlx_distill.distill.token_kinds import kind_of
from mlx_distill.errors import DataError, Interrupted
from mlx_distill.evaluate.audit import read_audit
from mlx_distill.graph import graph
from mlx_distill.losses.token_bytes import vocabulary
from mlx_distill.models.load import load
from mlx_distill.recipe import load_recipe
from mlx_distill.runtime import StopFlag
from mlx_distill.stages.audit import audit
from mlx_distill.stages.audited_pair import AuditedPair as Pair
from mlx_distill.stages.context import Context, read_rows
from mlx_distill.storage import read_jsonl

FILES = ("audit.json", "losses.jsonl", "parts.json", "divergences.jsonl")
ROWS = 3


def write_text(folder: Path) -> Path:
    path = folder / "general.txt"
    paragraphs = read_general_text(PACKAGED).paragraphs
    short = [text[: 40 + n] for n, text in enumerate((*paragraphs[:5], *paragraphs[18:23]))]
    path.write_text("\n\n".join(text.strip() for text in short), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> tuple[Context, Path]:
    """The context and the folder of an audit of the small chain: two tokenizers."""
    folder = tmp_path_factory.mktemp("audit")
    context = make_context(f"evaluate.audit_rows={ROWS}", f"evaluate.general_text={write_text(folder)}")
    (folder / "run" / "audit").mkdir(parents=True)
    audit(context, folder / "run" / "audit")
    return context, folder / "run"


@pytest.fixture(scope="module")
def same_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Context, Path]:
    """An audit in which the student before is the teacher's base with another norm, and the student is the
    teacher.
    """
    folder = tmp_path_factory.mktemp("same")
    out = finished() / "out"
    for name in ("data", "targets", "teacher", "teacher_base"):
        (folder / name).symlink_to(out / name)
    shutil.copytree(out / "teacher_base", folder / "student_base")
    weights = mx.load(str(next((folder / "student_base").glob("*.safetensors"))))
    norm = "model.norm.weight"
    mx.save_safetensors(
        str(next((folder / "student_base").glob("*.safetensors"))),
        {**weights, norm: weights[norm] * 1.5},
        metadata={"format": "mlx"},
    )
    (folder / "student").symlink_to(out / "teacher")
    (folder / "audit").mkdir()
    context = make_context(
        f"evaluate.audit_rows={ROWS}", f"evaluate.general_text={write_text(folder)}", run=folder
    )
    audit(context, folder / "audit")
    return context, folder


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [line for _, line in read_jsonl(folder / "audit" / name)]


def log_softmax(z: Any) -> np.ndarray:
    z = np.array(z.astype(mx.float32), dtype=np.float64)
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def logprobs(model: Any, tokens: Any) -> np.ndarray:
    """The distributions that each token but the first is drawn from, a row alone."""
    return log_softmax(model(mx.array(np.asarray(tokens)[None].astype(np.int32))))[0, :-1]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "folder"), [("teacher", "teacher"), ("student_before", "student_base")])
def test_bits_per_byte_are_those_of_each_row_alone(audited: Any, name: str, folder: str) -> None:
    context, run = audited
    model, tokenizer = load(context.run / folder, dtype="float32")
    model.eval()
    found = {(line["set"], line["id"]): line for line in lines(run, "losses.jsonl") if line["model"] == name}
    assert len(found) == ROWS + min(ROWS, 6) + 10
    for split in ("train", "valid"):
        rows = {row["id"]: row for row in read_rows(context, split)}
        for (which, id_), line in found.items():
            if which == split:
                chat = render(tokenizer, rows[id_]["messages"])
                start = chat.spans[-1][0]
                every = logprobs(model, chat.tokens)
                nats = -sum(every[j - 1, chat.tokens[j]] for j in range(start, len(chat.tokens)))
                assert line["nats"] == pytest.approx(nats, rel=1e-5)
                assert line["bytes"] == len(rows[id_]["messages"][-1]["content"].encode())
    texts = read_general_text(context.recipe.evaluate.general_text).paragraphs
    total = 0.0
    for n, text in enumerate(texts):
        tokens = tokenizer.encode(text, add_special_tokens=False)
        begin = tokenizer.bos_token_id  # gpt-oss begins with a token of its own, Qwen with the text
        size = len(text.encode()) - (len(vocabulary(tokenizer).tokens[tokens[0]]) if begin is None else 0)
        tokens = tokens if begin is None else [begin, *tokens]
        every = logprobs(model, tokens)
        nats = -sum(every[j - 1, token] for j, token in enumerate(tokens) if j)
        line = found["general", str(n)]
        assert (line["nats"], line["bytes"]) == (pytest.approx(nats, rel=1e-5), size)
        total += nats
    figures = read_audit(run / "audit")
    assert figures is not None
    sizes = sum(line["bytes"] for (which, _), line in found.items() if which == "general")
    assert figures["bits_per_byte"][name]["general"]["value"] == pytest.approx(
        total / math.log(2) / sizes, rel=1e-5
    )


@pytest.mark.slow
def test_the_parts_of_the_loss_add_up_to_what_is_trained_and_have_the_kinds_of_their_tokens(
    audited: Any,
) -> None:
    context, run = audited
    pair = Pair(context)
    model, tokenizer = load(context.run / "student", dtype="float32")
    model.eval()
    parts = json.loads((run / "audit" / "parts.json").read_text())
    objective = kd(context.recipe.distill, pair.labels, pair.groups)
    from mlx_distill.distill.align import collate_aligned_rows

    batch = collate_aligned_rows(pair.aligned, list(range(len(pair.aligned))), 0, 3)
    weights, sums = objective.weights(batch), objective.sums(model, batch)
    for term, kinds in parts["student"].items():
        events, total = np.array(list(kinds.values())).sum(axis=0)
        assert events == weights[term]
        assert total == pytest.approx(sums[term].item(), rel=1e-5)
    text: dict[str, list[float]] = {}
    spelled = vocabulary(tokenizer).tokens
    for row in pair.aligned:
        every = logprobs(model, row.tokens)
        for j in range(row.start, len(row.tokens)):
            kind = kind_of(spelled[row.tokens[j]])
            text.setdefault(kind, []).append(-every[j - 1, row.tokens[j]])
    own = parts["student"]["text"]
    assert {kind: events for kind, (events, _) in own.items()} == {k: len(v) for k, v in text.items()}
    for kind, values in text.items():
        assert own[kind][1] == pytest.approx(sum(values), rel=1e-5, abs=1e-4)
    figures = read_audit(run / "audit")
    assert figures is not None
    whole = figures["parts"]["student"]
    coefficients = objective.coefficients
    expected = sum(coefficients[term] * sums[term].item() / weights[term] for term in coefficients)
    assert whole["loss"] == pytest.approx(expected, rel=1e-5)
    shares = [kind["share"] for term in whole["terms"].values() for kind in term["kinds"].values()]
    assert sum(shares) == pytest.approx(1)


def expected_divergences(context: Context, students: str, by_group: bool) -> list[dict[str, Any]]:
    """Exact divergences and those of the stored top k, in float64, row by row."""
    pair = Pair(context)
    teacher, teacher_tokenizer = load(context.run / "teacher", dtype="float32")
    student, _ = load(context.run / students, dtype="float32")
    used = sorted(set(teacher_tokenizer.get_vocab().values()))
    out = []
    for row in pair.aligned:
        p = logprobs(teacher, row.teacher_tokens)[row.teacher_starts - 1]
        unused = np.delete(np.arange(p.shape[1]), used)  # columns without a token take no part
        p[:, unused] = -1e30
        p -= np.log(np.exp(p).sum(axis=1, keepdims=True))
        q = logprobs(student, row.tokens)[row.starts - 1]
        exact, cached, tails = [], [], []
        for i in range(len(p)):
            ids, logs = row.topk_ids[i], row.topk_logprobs[i].astype(np.float64)
            tails.append(1 - np.exp(logs).sum())
            if by_group:
                groups = pair.groups
                mass_p = np.bincount(groups.teacher, np.exp(p[i])[: len(groups.teacher)], groups.count)
                mass_q = np.bincount(groups.student, np.exp(q[i])[: len(groups.student)], groups.count)
                inside = [g for g in range(groups.count) if g != groups.outside and mass_p[g] > 0]
                a = np.append(mass_p[inside], max(mass_p.sum() - mass_p[inside].sum(), 0))
                b = np.append(mass_q[inside], 1 - mass_q[inside].sum())
                some = a > 1e-12
                exact.append((a[some] * np.log(a[some] / b[some])).sum())
            else:
                exact.append((np.exp(p[i]) * (p[i] - q[i])).sum())
                rest = np.log(np.exp(np.delete(q[i], ids)).sum())
                tail = tails[-1] * (np.log(max(tails[-1], 1e-300)) - rest) if tails[-1] > 1e-9 else 0.0
                cached.append((np.exp(logs) * (logs - q[i][ids])).sum() + tail)
        kept = np.array(tails) <= 0.005
        out.append(
            {
                "positions": len(exact),
                "exact": sum(exact),
                "cached": sum(cached),
                "tail": sum(tails),
                "kept": int(kept.sum()),
                "kept_exact": float(np.array(exact)[kept].sum()),
            }
        )
    return out


@pytest.mark.slow
def test_cached_and_exact_divergence_of_one_tokenizer(same_tokenizer: Any) -> None:
    context, run = same_tokenizer
    found = [line for line in lines(run, "divergences.jsonl") if line["model"] == "student_before"]
    for line, plain in zip(found, expected_divergences(context, "student_base", by_group=False), strict=True):
        assert (line["positions"], line["kept"]["positions"]) == (plain["positions"], plain["kept"])
        assert line["exact"] == pytest.approx(plain["exact"], rel=1e-3)
        assert line["cached"] == pytest.approx(plain["cached"], rel=1e-3)
        assert line["tail"] == pytest.approx(plain["tail"], abs=1e-4)
        assert line["exact"] > 0.05 * line["positions"]
        assert line["kept"]["exact"] == pytest.approx(plain["kept_exact"], rel=1e-3, abs=1e-4)
        assert line["cached"] <= line["exact"] + 1e-4  # a lower bound
    # The teacher itself as the student: nothing diverges.
    for line in lines(run, "divergences.jsonl"):
        if line["model"] == "student":
            assert line["exact"] == pytest.approx(0, abs=1e-3)
    figures = read_audit(run / "audit")
    assert figures is not None and figures["facts"]["compared"] == "kl"
    entry = figures["divergence"]["student_before"]
    totals = [sum(line[key] for line in found) for key in ("cached", "exact", "positions")]
    assert entry["lost"] == pytest.approx(1 - totals[0] / totals[1])
    assert entry["exact"] == pytest.approx(totals[1] / totals[2])


@pytest.mark.slow
def test_exact_divergence_of_two_tokenizers_and_the_cache_is_a_lower_bound(audited: Any) -> None:
    context, run = audited
    found = [line for line in lines(run, "divergences.jsonl") if line["model"] == "student"]
    for line, plain in zip(found, expected_divergences(context, "student", by_group=True), strict=True):
        assert line["exact"] == pytest.approx(plain["exact"], rel=1e-4)
        assert line["tail"] == pytest.approx(plain["tail"], abs=1e-4)
        assert 0 < line["cached"] <= line["exact"] * (1 + 1e-4)
        worst = line["worst"]
        assert worst["exact"] - worst["cached"] >= (line["exact"] - line["cached"]) / line["positions"] - 1e-4


class StopAt(RecordedProgress):
    """Sets a flag when a task begins."""

    def __init__(self, name: str, flag: StopFlag) -> None:
        super().__init__()
        self.name, self.flag = name, flag

    @contextmanager
    def task(self, name: str, total: float | None = None, unit: str = "", start: float = 0) -> Iterator[Any]:
        if name == self.name:
            self.flag.set = True
        with super().task(name, total, unit, start) as bar:
            yield bar


@pytest.mark.slow
def test_a_stopped_audit_goes_on_behind_the_last_model_to_the_same_bytes(audited: Any, folder: Path) -> None:
    context, run = audited
    flag = StopFlag()
    with pytest.raises(Interrupted):
        audit(replace(context, stop=flag, progress=StopAt("audit student before", flag)), folder)
    assert {path.name for path in (folder / "scratch").glob("*.json")} == {
        "teacher_before.json",
        "teacher.json",
    }
    progress = RecordedProgress()
    audit(replace(context, progress=progress), folder)
    assert [name for name, _, _ in progress.tasks] == ["audit student before", "audit student"]
    for name in FILES:
        assert (folder / name).read_bytes() == (run / "audit" / name).read_bytes()


@pytest.mark.slow
def test_progress_and_notes_say_what_is_read(audited: Any) -> None:
    context, _ = audited
    notes, tasks = context.progress.notes, context.progress.tasks
    assert any("9 answers and 736 bytes of general.txt in 4 models" in note for note in notes), notes
    for _, total, seen in tasks[-4:]:
        assert seen == sorted(seen) and seen[-1] == total


def stage_of(*overrides: str) -> Any:
    recipe = load_recipe("tiny", overrides)
    return next((s for s in graph(recipe, recipe.load_task()) if s.name == "audit"), None)


def test_the_audit_is_a_stage_of_its_own_that_changes_no_other_key() -> None:
    assert stage_of("evaluate.audit_rows=0") is None
    stage = stage_of()
    assert stage.command == "evaluate" and stage.inputs == (str(PACKAGED),)
    folders = ("teacher_base", "teacher", "student_base", "student")
    assert set(stage.parents) == {*folders, "targets", "data"}
    recipes = [load_recipe("tiny", [f"evaluate.audit_rows={rows}"]) for rows in (0, 9)]
    configs = [
        {stage.name: stage.config for stage in graph(recipe, recipe.load_task()) if stage.name != "audit"}
        for recipe in recipes
    ]
    assert configs[0] == configs[1]
    assert stage_of("evaluate.audit_rows=9").config != stage.config


@pytest.mark.slow
def test_a_teacher_that_is_not_trained_is_measured_once(audited: Any, folder: Path) -> None:
    context, _ = audited
    recipe = replace(context.recipe, teach=replace(context.recipe.teach, method="none"))
    recipe = replace(recipe, evaluate=replace(recipe.evaluate, audit_rows=1))
    audit(replace(context, recipe=recipe), folder)
    found = read_audit(folder)
    assert found is not None
    assert list(found["bits_per_byte"]) == ["teacher", "student_before", "student"]
    assert list(found["changes"]) == ["student"]


@pytest.mark.slow
def test_without_a_student_the_teacher_alone_is_measured(audited: Any, folder: Path) -> None:
    context, run = audited
    for name in ("data", "teacher", "teacher_base"):  # nothing else is there yet
        (folder / name).symlink_to(context.run / name)
    (folder / "audit").mkdir()
    recipe = replace(context.recipe, evaluate=replace(context.recipe.evaluate, models=["teacher"]))
    audit(replace(context, run=folder, recipe=recipe), folder / "audit")
    assert lines(folder, "losses.jsonl") == [
        line for line in lines(run, "losses.jsonl") if line["model"].startswith("teacher")
    ]
    found = read_audit(folder / "audit")
    assert found is not None
    assert list(found["bits_per_byte"]) == ["teacher_before", "teacher"]
    assert list(found["changes"]) == ["teacher"] and found["changes"]["teacher"]["general"]["n"] == 10
    assert found["parts"] == found["divergence"] == {}


@pytest.mark.slow
def test_a_live_teacher_gives_the_parts_and_a_text_of_single_letters_is_measured(
    audited: Any, folder: Path
) -> None:
    """Qwen has no token that begins a text, so of a single letter nothing is left to count."""
    context, run = audited
    (folder / "letters.txt").write_text("\n\n".join("abcdefghijkl"), encoding="utf-8")
    recipe = context.recipe
    recipe = replace(
        recipe,
        distill=replace(recipe.distill, teacher="live", label_weight=0.0),
        evaluate=replace(recipe.evaluate, general_text=str(folder / "letters.txt")),
    )
    (folder / "live").mkdir()
    audit(replace(context, recipe=recipe), folder / "live")
    parts = json.loads((folder / "live" / "parts.json").read_text())
    cached = json.loads((run / "audit" / "parts.json").read_text())
    assert list(parts["student"]) == ["text", "token"]
    assert parts["student"]["text"] == cached["student"]["text"]
    compared = [line for _, line in read_jsonl(folder / "live" / "divergences.jsonl")]
    for model in ("student_before", "student"):
        total = sum(value for _, value in parts[model]["token"].values())
        assert total == pytest.approx(sum(line["exact"] for line in compared if line["model"] == model))
    found = read_audit(folder / "live")
    assert found is not None and not found["warnings"] and found["facts"]["reads_cache"] is False
    assert found["bits_per_byte"]["teacher"]["general"] == {"value": None, "low": None, "high": None, "n": 0}
    assert found["bits_per_byte"]["student"]["general"]["n"] == 12


def test_a_general_text_that_cannot_be_measured_is_said_before_anything_is_made(folder: Path) -> None:
    from mlx_distill.pipeline import run

    (folder / "short.txt").write_text("Only this.", encoding="utf-8")
    with pytest.raises(DataError, match="1 paragraphs of general text"):
        run("tiny", folder / "out", overrides=[f"evaluate.general_text={folder / 'short.txt'}"])
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("models", "audited"),
    [("[teacher_before, teacher]", False), ("[teacher, student]", True), ("[quantized]", True)],
)
def test_who_evaluates_the_teacher_alone_needs_no_student_for_an_audit(models: str, audited: bool) -> None:
    stage = stage_of(f"evaluate.models={models}")
    assert {"teacher_base", "teacher", "data"} <= set(stage.parents)
    assert ({"student_base", "student", "targets"} <= set(stage.parents)) == audited
    assert audited or not {"student_base", "student", "targets"} & set(stage.parents)
    # A teacher that is not trained has forgotten nothing.
    assert (stage_of(f"evaluate.models={models}", "teach.method=none") is not None) == audited
