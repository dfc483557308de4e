"""The report: figures from predictions, one page without network, nothing of the data taken for markup."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_distill.errors import ConfigError, DataError, FileError
from mlx_distill.metrics.intervals import wilson
from mlx_distill.report import RunReport, build_report, read_report, render_html, write_report
from mlx_distill.report.charts import bar, line_chart, nice_ticks, smoothed, stacked, strip
from mlx_distill.report.markup import Html, el
from mlx_distill.storage import open_partial, publish, stage_key, write_json, write_jsonl
from mlx_distill.tasks.task import Task, parse_task

MODELS = ("teacher", "student_before", "student", "quantized", "student_labels", "student_text")
SKILL = {
    "teacher": 0.93,
    "student_before": 0.35,
    "student": 0.95,
    "quantized": 0.92,
    "student_labels": 0.7,
    "student_text": 0.85,
}
SHOWN = ("teacher", "student", "quantized")
MACHINE = {
    "system": "Linux 6",
    "processor": "A processor",
    "cores": 2,
    "memory_bytes": 8_000_000_000,
    "device": "Device(cpu, 0)",
    "blas": "loaded",
}
VERSIONS = {"python": "3.11.7", "mlx": "0.32.4", "mlx-distill": "0.1.0"}


def make_task(**changes: Any) -> Task:
    raw = {
        "name": "colours",
        "system": "Say it.",
        "user": "{text}",
        "title": "title",
        "label": "tone",
        "positive": ["dark", "black"],
        "score": "points",
        "slices": ["kind"],
        "group": "group",
        "schema": {
            "type": "object",
            "properties": {
                "tone": {"type": "string", "enum": ["light", "mild", "dark", "black"]},
                "points": {"type": "integer"},
                "themes": {"type": "array", "items": {"type": "string"}},
                "mood": {"type": "string"},
            },
        },
    }
    return parse_task({**raw, **changes}, "task")


def make_predictions(task: Task, model: str, sets: Mapping[str, int], seed: int = 0) -> list[dict[str, Any]]:
    """Rows as evaluate writes them: a header, then one row an item; students follow the teacher, the teacher
    follows the truth.
    """
    labels = task.labels
    index = {name: i for i, name in enumerate(labels)}
    world, own = np.random.default_rng(seed), np.random.default_rng(seed + 1 + MODELS.index(model))
    rows: list[dict[str, Any]] = []
    for set_name, n in sets.items():
        for i in range(n):
            truth = labels[
                world.choice(
                    len(labels), p=np.array([4, 3, 2, 2][: len(labels)]) / sum([4, 3, 2, 2][: len(labels)])
                )
            ]
            slip, shift, points = world.random(), int(world.choice([-1, 1])), int(world.integers(5, 95))
            teacher = truth if slip < SKILL["teacher"] else labels[(index[truth] + shift) % len(labels)]
            kind = ["blues", "chant", "folk", "march", "waltz"][i % 5]
            skill = SKILL[model] - (0.12 if kind == "march" else 0.0)
            said = (
                teacher
                if model == "teacher" or own.random() < skill
                else labels[int(own.integers(len(labels)))]
            )
            broken = own.random() < (0.06 if model == "student_before" else 0.006)
            score = int(np.clip(points + (0 if model == "teacher" else own.normal(0, 3)), 0, 100))
            logits = own.normal(0, 0.6, len(labels)) + 3.5 * np.eye(len(labels))[index[said]]
            probs = np.exp(logits) / np.exp(logits).sum()
            rest = {
                "themes": ["grief", "hope"] if i % 3 else [],
                "mood": "calm" if own.random() < 0.8 else "tense",
            }
            properties = list(task.schema["properties"])
            full = {task.label: said, "points": score, "confidence": score, **rest}
            true = {
                task.label: truth,
                "points": points,
                "confidence": points,
                "themes": ["grief", "hope"] if i % 3 else [],
                "mood": "calm",
            }
            answer = {key: full[key] for key in properties}
            rows.append(
                {
                    "id": f"{set_name}-{i:04d}",
                    "set": set_name,
                    "fields": {
                        "kind": kind,
                        "group": ["north", "south", "east", "islands"][0 if i % 40 else 3]
                        if i % 4 == 0
                        else ["south", "east", "north"][i % 4 - 1],
                    },
                    "title": f"Piece no. {i}",
                    "input": f"Piece no. {i}\n\nA line about the {kind},\nand a second one.",
                    "truth": {key: true[key] for key in properties},
                    "text": json.dumps(answer)[: 25 if broken else None],
                    "answer": None if broken else answer,
                    "error": "the text ends inside a string" if broken else None,
                    "label": None if broken else said,
                    "score": None if broken else float(score),
                    "label_probs": {name: float(p) for name, p in zip(labels, probs, strict=True)},
                    "latency_s": float(own.gamma(9, 0.3 if model == "teacher" else 0.09) / 60),
                    "prompt_tokens": 180,
                    "tokens": 70,
                }
            )
    header = {
        "format": 1,
        "model": model,
        "task": task.name,
        "labels": list(labels),
        "set_counts": dict(sets),
        "settings": {"batch_size": 16},
    }
    return [header, *rows]


def make_run(
    folder: Path,
    task: Task,
    *,
    models: tuple[str, ...] = MODELS[:4],
    sets: Mapping[str, int] | None = None,
    seed: int = 0,
    packed: tuple[str, ...] = (),
) -> dict[str, Path]:
    """A finished run's folder: predictions, weights of some size, training logs, manifests."""
    paths = {}
    for model in models:
        parts = folder / "evaluations" / model
        config = {"model": model, "compute_dtype": "float32", "unpack": model not in packed}
        key = stage_key("evaluate", 1, config, {})
        partial = open_partial(parts, key)
        write_jsonl(
            partial / "predictions.jsonl",
            make_predictions(task, model, sets or {"test": 60, "written": 15}, seed),
        )
        recorded = {
            "seconds": 12.5,
            "peak_memory_bytes": 310_000_000,
            "machine": MACHINE,
            "versions": VERSIONS,
        }
        publish(parts, "evaluate", 1, config, {}, recorded)
        paths[model] = parts / "predictions.jsonl"
    for name, size in (("teacher_base", 640_000), ("student_base", 410_000), ("quantized", 150_000)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "model.safetensors").write_bytes(b"\0" * size)
    for name in ("teacher", "student"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "adapters.safetensors").write_bytes(b"\0" * 30_000)
        write_json(folder / name / "adapter_config.json", {"base": f"../{name}_base"})
        write_jsonl(
            folder / name / "metrics.jsonl",
            make_log(160, ("label", "text", "token") if name == "student" else ("text",), seed),
        )
    return paths


def make_log(steps: int, terms: tuple[str, ...], seed: int) -> list[dict[str, Any]]:
    rng, rows = np.random.default_rng(seed), []
    for step in range(1, steps + 1):
        values = {
            term: (3 + i) * float(np.exp(-step / 40 * (1 + i / 2)) + 0.08 + 0.03 * rng.random())
            for i, term in enumerate(terms)
        }
        row = {
            "step": step,
            "loss": sum(values.values()),
            **values,
            "learning_rate": 1e-4,
            "grad_norm": 1.0,
            "tokens": 900,
        }
        row |= {"tokens_per_second": 4000.0, "seconds": step * 0.22, "peak_memory_bytes": 260_000_000}
        if step % 40 == 0:
            row |= {
                "valid_loss": row["loss"] * 1.06,
                **{f"valid_{term}": value * 1.06 for term, value in values.items()},
            }
        rows.append(row)
    return rows


RECIPE = {
    "name": "try",
    "description": "A run of tests.",
    "task": "colours",
    "data": {"seed": 3, "sources": [{"path": "x", "seed": 5}]},
    "distill": {"seed": 1},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("run")
    return folder, build_report(folder, RECIPE, make_task(), make_run(folder, make_task(), models=MODELS))


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run whose quantized model computed with quantized weights, the others with dequantized ones."""
    folder = tmp_path_factory.mktemp("apart")
    return build_report(folder, RECIPE, make_task(), make_run(folder, make_task(), packed=("quantized",)))


VOID = {"br", "col", "hr", "img", "meta", "!doctype"}


class Page(HTMLParser):
    """Every tag opened and closed in order; what a browser would load or run."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


# --- report.json --------------------------------------------------------------------------------------------


def test_report_is_plain_json_without_nan(run: tuple[Path, dict[str, Any]]) -> None:
    _, report = run
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_every_model_has_the_promised_figures(run: tuple[Path, dict[str, Any]]) -> None:
    _, report = run
    assert (report["format"], report["name"], report["task"], report["main_set"]) == (
        1,
        "try",
        "colours",
        "test",
    )
    assert report["sets"] == {"test": 60, "written": 15}
    assert list(report["metrics"]) == list(MODELS)
    for name, figures in report["metrics"].items():
        for key in (
            "accuracy",
            "json_valid",
            "macro_f1",
            "precision",
            "recall",
            "f1",
            "false_positive_rate",
            "false_negative_rate",
        ):
            assert set(figures[key]) == {"value", "low", "high", "n"}
            assert figures[key]["low"] <= figures[key]["value"] <= figures[key]["high"]
        for key in ("score_mae", "latency_s", "items_per_minute", "peak_memory_gb"):
            assert isinstance(figures[key], float)
        for key in (
            "verdict_agreement",
            "agreement",
            "score_gap",
            "label_kl",
            "disagreements",
            "teacher_confusion",
        ):
            assert (figures[key] is None) == (name == "teacher")
    assert report["metrics"] == report["by_set"]["test"]
    assert report["metrics"]["student"]["peak_memory_gb"] == 0.31
    assert report["controls"] == ["student_labels", "student_text"]


def test_figures_are_those_of_the_rows(run: tuple[Path, dict[str, Any]]) -> None:
    """A plain count over the file, beside the report."""
    folder, report = run
    lines = {
        m: [
            json.loads(x)
            for x in (folder / "evaluations" / m / "predictions.jsonl").read_text().splitlines()[1:]
        ]
        for m in MODELS
    }
    teacher = {row["id"]: row for row in lines["teacher"]}
    for set_name in ("test", "written"):
        rows = [row for row in lines["student"] if row["set"] == set_name]
        same = near = right = 0
        for row in rows:
            other = teacher[row["id"]]
            both = row["answer"] and other["answer"] and row["label"] == other["label"]
            same += bool(both)
            near += bool(both and abs(row["score"] - other["score"]) <= 5)
            right += bool(row["answer"] and row["label"] == row["truth"]["tone"])
        figures = report["by_set"][set_name]["student"]
        for key, hits in (("verdict_agreement", same), ("agreement", near), ("accuracy", right)):
            low, high = wilson(hits, len(rows))
            assert figures[key] == {"value": hits / len(rows), "low": low, "high": high, "n": len(rows)}
        assert figures["disagreements"] == len(rows) - same


def test_disagreements_are_written_out(run: tuple[Path, dict[str, Any]]) -> None:
    _, report = run
    found = report["disagreements"]["quantized"]
    assert found["of"] == 75
    assert (
        found["count"]
        == len(found["rows"])
        == sum(report["by_set"][s]["quantized"]["disagreements"] for s in report["sets"])
    )
    assert all(
        row["teacher"]["label"] != row["model"]["label"] or row["model"]["label"] is None
        for row in found["rows"]
    )


def test_comparisons_pair_what_the_run_is_about(run: tuple[Path, dict[str, Any]]) -> None:
    _, report = run
    pairs = [(entry["metric"], entry["first"], entry["second"]) for entry in report["comparisons"]]
    assert pairs[:4] == [("verdict_agreement", "student", other) for other in ("student_before",)] + [
        ("verdict_agreement", "quantized", "student"),
        ("verdict_agreement", "student", "student_labels"),
        ("verdict_agreement", "student", "student_text"),
    ]
    assert {pair[1] for pair in pairs[4:]} == set(MODELS) - {"teacher"}
    gain = report["comparisons"][0]
    student, before = (
        report["metrics"][name]["verdict_agreement"]["value"] for name in ("student", "student_before")
    )
    assert gain["difference"]["value"] == pytest.approx(student - before)
    assert gain["p_value"] < 0.001


def test_sizes_count_an_adapter_with_its_base(run: tuple[Path, dict[str, Any]]) -> None:
    _, report = run
    assert report["sizes"]["student"] == {
        "weights_bytes": 30_000,
        "base_bytes": 410_000,
        "total_bytes": 440_000,
        "folder": "student",
    }
    assert report["sizes"]["student_before"]["total_bytes"] == 410_000
    assert report["sizes"]["quantized"]["base_bytes"] == 0
    assert "student_labels" not in report["sizes"]  # nothing on the disk, so no figure


def test_curves_hold_losses_only_and_are_thinned(tmp_path: Path) -> None:
    paths = make_run(tmp_path, make_task(), models=("teacher",))
    write_jsonl(tmp_path / "student" / "metrics.jsonl", make_log(1_000, ("label",), 0))
    report = build_report(tmp_path, RECIPE, make_task(), paths)
    assert list(report["curves"]) == ["teacher", "student"]
    assert set(report["curves"]["student"]) == {"loss", "label", "valid_loss", "valid_label"}
    loss = report["curves"]["student"]["loss"]
    assert len(loss["step"]) == len(loss["value"]) <= 400
    assert loss["step"][-1] == 1_000
    assert len(report["curves"]["student"]["valid_loss"]["step"]) == 25
    assert report["training"]["student"] == {
        "steps": 1_000,
        "seconds": 220.0,
        "tokens": 900_000,
        "peak_memory_gb": 0.26,
    }


def test_provenance_is_that_of_the_evaluations(run: tuple[Path, dict[str, Any]]) -> None:
    _, report = run
    found = report["provenance"]
    assert (found["machine"], found["versions"]) == (MACHINE, VERSIONS)
    assert found["seeds"] == {"data.seed": 3, "data.sources.0.seed": 5, "distill.seed": 1}
    assert {entry["folder"] for entry in found["stages"]} == {f"evaluations/{name}" for name in MODELS}
    assert all(len(entry["key"]) == 64 and entry["seconds"] == 12.5 for entry in found["stages"])


def test_the_recipes_own_path_stays_out(tmp_path: Path) -> None:
    paths = make_run(tmp_path, make_task(), models=("teacher",))
    report = build_report(tmp_path, {**RECIPE, "base": tmp_path / "secret"}, make_task(), paths)
    assert "secret" not in json.dumps(report)


def test_goals_are_judged_on_the_measured_value(run: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = run
    goals = [
        {"model": "student", "metric": "verdict_agreement", "at_least": 0.5},
        {"model": "student", "metric": "verdict_agreement", "at_least": 1.01},
        {"model": "student", "metric": "latency_s", "at_most": 3},
        {"model": "absent", "metric": "latency_s", "at_most": 3},
    ]
    paths = {name: folder / "evaluations" / name for name in MODELS[:4]}  # folders do as well as files
    report = build_report(folder, RECIPE, make_task(), paths, goals=goals)
    assert [goal["met"] for goal in report["goals"]] == [True, False, True, False]
    text = Page(render_html(report)).text
    assert "met Student, same tone as teacher" in text or "metStudent, same tone as teacher" in text
    with pytest.raises(ConfigError, match="a goal needs"):
        build_report(folder, RECIPE, make_task(), paths, goals=[{"model": "student"}])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "not predictions of format 1"),
        ([{"format": 2}], "not predictions of format 1"),
        ([{"format": 1}], "no predictions"),
        ([{"format": 1}, {"id": "a", "set": "test"}], "predictions.jsonl:2: no field 'truth'"),
    ],
)
def test_broken_predictions_are_named_with_their_line(
    tmp_path: Path, lines: list[dict[str, Any]], message: str
) -> None:
    write_jsonl(tmp_path / "predictions.jsonl", lines)
    with pytest.raises(DataError, match=re.escape(message)):
        build_report(tmp_path, RECIPE, make_task(), {"student": tmp_path})


def test_no_evaluations_is_an_error_with_a_cure(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mlx-distill evaluate"):
        build_report(tmp_path, RECIPE, make_task(), {})


# --- report.html --------------------------------------------------------------------------------------------


def assert_page_stands_alone(html: str) -> Page:
    page = Page(html)
    assert not page.stack
    assert not {"script", "link", "iframe", "object", "img", "form", "base"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not [
            name
            for name in attributes
            if name.startswith("on") or name in ("src", "srcset", "action", "formaction")
        ]
        assert (attributes.get("href") or "#").startswith("#")
    assert "default-src 'none'" in html
    assert not re.search(r"@import|url\(|https?://", html)
    return page


def test_page_is_whole_and_loads_nothing(run: tuple[Path, dict[str, Any]]) -> None:
    _, report = run
    page = assert_page_stands_alone(render_html(report))
    ids = [a["id"] for _, a in page.tags if a.get("id")]
    assert len(ids) == len(set(ids))
    assert {a["href"] for t, a in page.tags if t == "a"} == {f"#{name}" for name in ids}
    assert {
        "results",
        "sides",
        "groups",
        "confusion",
        "slices",
        "distributions",
        "sets",
        "training",
        "disagreements",
        "cost",
        "origin",
    } == set(ids)


def test_page_says_in_one_sentence_what_the_run_has_shown(run: tuple[Path, dict[str, Any]]) -> None:
    _, report = run
    agreement = report["metrics"]["quantized"]["verdict_agreement"]
    share = f"{100 * agreement['value']:.1f} %"
    text = Page(render_html(report)).text.replace("\u202f", " ")
    assert f"The quantized student gives the teacher’s tone on {share} of 60 held-out rows [" in text
    assert "Nothing on this page was measured on Metal." in text


def page_text(report: Mapping[str, Any]) -> str:
    return Page(render_html(report)).text.replace("\u202f", " ")


def test_only_models_that_computed_alike_are_compared_in_pace_and_memory(
    run: tuple[Path, dict[str, Any]], apart: dict[str, Any]
) -> None:
    alike = page_text(run[1])
    assert re.search(r"It answers [\d,.]+ rows a minute, [\d.]+ times the teacher’s pace\.", alike)
    assert "do not compare" not in alike
    assert "weights dequantized" not in alike
    assert {name: entry["dequantize"] for name, entry in apart["provenance"]["evaluations"].items()} == {
        "teacher": True,
        "student_before": True,
        "student": True,
        "quantized": False,
    }
    text = page_text(apart)
    assert re.search(r"It answers [\d,.]+ rows a minute\.", text)
    assert "times the teacher’s pace" not in text
    assert (
        "The quantized student computed with quantized weights, all others with dequantized ones: times, speeds"
        in text
    )
    assert (text.count("weights dequantized"), text.count("weights quantized")) == (3, 1)


def test_settings_that_hold_for_all_models_are_listed_once(apart: dict[str, Any]) -> None:
    listed = page_text(apart).split("Settings of the evaluations")[1].split("Recipe")[0]
    assert listed.startswith("All modelsbatch size16compute dtypefloat32Teacherquantized weightsdequantized")
    assert listed.count("batch size") == 1
    assert listed.endswith("Quantizedquantized weightsas on disk")


def test_the_teachers_size_says_what_it_counts(run: tuple[Path, dict[str, Any]]) -> None:
    assert "Its weights take 150 kB on disk, 22 % of the teacher’s 670 kB (base and adapter)." in page_text(
        run[1]
    )


def test_a_difference_that_the_shown_rates_would_not_give_is_explained(tmp_path: Path) -> None:
    """308 and 319 of 320 are shown as 96.2 and 99.7, and differ by 3.4."""
    task = make_task()
    for wrong, explained in (
        ({"teacher": 12, "quantized": 1}, True),
        ({"teacher": 32, "quantized": 16}, False),
    ):
        paths = {}
        for name, count in wrong.items():
            header, *rows = make_predictions(task, "teacher", {"test": 320})
            labels = ["light" if row["truth"]["tone"] != "light" else "mild" for row in rows]
            for i, row in enumerate(rows):
                row["label"] = labels[i] if i < count else row["truth"]["tone"]
                row |= {"answer": {**row["truth"], "tone": row["label"]}}
            paths[name] = tmp_path / f"{name}.jsonl"
            write_jsonl(paths[name], [header, *rows])
        report = build_report(tmp_path, RECIPE, task, paths)
        text = page_text(report)
        assert ("+3.4 points" in text) == explained
        assert ("(rounded from the exact rates)" in text) == explained


@pytest.mark.parametrize(
    ("n", "said"), [(60, "Too few rows in every group to"), (130, "Too few rows in all groups but north to")]
)
def test_groups_of_few_rows_are_said_rightly_and_drawn_whole(tmp_path: Path, n: int, said: str) -> None:
    report = build_report(tmp_path, RECIPE, make_task(), make_run(tmp_path, make_task(), sets={"test": n}))
    html = render_html(report)
    assert said in Page(html).text
    part = html.split('id="groups"')[1].split("</section>")[0].split("False negatives")[0]
    assert part.count("Too few rows") == 1
    ends = [float(x) for x in re.findall(r'x2="([\d.]+)%" y1="\d+" y2="\d+" class="range"', part)]
    found = [
        g["false_positive_rate"] for m in SHOWN for g in report["metrics"][m]["by_group"]["groups"].values()
    ]
    top = max(rate["high"] for rate in found if rate["n"])
    assert max(ends) == pytest.approx(100 * top / min(1.0, nice_ticks(0.0, top)[-1]), abs=0.01)


def test_disagreements_are_counted_by_set(run: tuple[Path, dict[str, Any]]) -> None:
    _, report = run
    main, other = (report["by_set"][name]["quantized"]["disagreements"] for name in ("test", "written"))
    said = f"Quantized: {main} of 60 held-out rows ({100 * main / 60:.1f} %); {other} of 15 rows of the set “written” ("
    assert said.replace("(0.0 %)", "(0 %)") in page_text(report)


def test_rows_without_a_title_are_called_by_their_beginning(tmp_path: Path) -> None:
    paths = make_run(tmp_path, make_task())
    for name, path in paths.items():
        header, *rows = make_predictions(make_task(), name, {"test": 60})
        write_jsonl(path, [header, *({**row, "title": None} for row in rows)])
    report = build_report(tmp_path, RECIPE, make_task(), paths)
    row = report["disagreements"]["quantized"]["rows"][0]
    text = page_text(report)
    assert f"The answers to {' '.join(row['input'].split())}, field by field" in text
    assert f"The answers to {row['id']}" not in text


def test_page_of_report_json_is_the_page_of_the_report(run: tuple[Path, dict[str, Any]]) -> None:
    _, report = run
    assert render_html(json.loads(json.dumps(report))) == render_html(report)


def test_tables_and_charts_can_be_read_without_eyes(run: tuple[Path, dict[str, Any]]) -> None:
    _, report = run
    page = Page(render_html(report))
    assert all(a.get("scope") in ("col", "row") for t, a in page.tags if t == "th")
    assert [t for t, _ in page.tags].count("table") == [t for t, _ in page.tags].count("caption")
    for tag, attributes in page.tags:
        if tag == "svg":
            assert attributes.get("role") == "img" or attributes.get("aria-hidden") == "true"
    assert dict(page.tags)["html"] == {"lang": "en"}


EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;</style></title></pre>"


def test_text_from_data_cannot_become_markup(tmp_path: Path) -> None:
    """The same string in every place that a user, a file or a model fills."""
    labels = ["light", EVIL]
    task = make_task(
        name=EVIL,
        positive=[EVIL],
        group=EVIL,
        slices=[EVIL],
        schema={
            "type": "object",
            "properties": {"tone": {"enum": labels}, "points": {"type": "integer"}, EVIL: {"type": "string"}},
        },
    )
    row = {
        "id": EVIL,
        "set": "test",
        "fields": {EVIL: EVIL},
        "title": EVIL,
        "input": EVIL,
        "truth": {"tone": EVIL, "points": 3, EVIL: EVIL},
        "text": EVIL,
        "answer": None,
        "error": EVIL,
        "label": None,
        "score": None,
        "label_probs": {"light": 0.5, EVIL: 0.5},
        "latency_s": 0.1,
        "tokens": 3,
    }
    whole = {**row, "answer": {"tone": EVIL, "points": 3, EVIL: [EVIL]}, "label": EVIL, "score": 3.0}
    header = {"format": 1, "settings": {EVIL: EVIL}}
    paths = {}
    for name, item in (
        ("teacher", whole),
        ("student", row),
        (EVIL, {**whole, "answer": {**whole["answer"], "tone": "light"}, "label": "light"}),
    ):
        paths[name] = tmp_path / f"{len(paths)}.jsonl"
        write_jsonl(paths[name], [header, item, {**item, "id": "other", "set": EVIL}])
    log = [{"step": i, "loss": 1.0 + i, EVIL: 2.0, "tokens": 1} for i in (1, 2, 3)]
    write_jsonl(tmp_path / "student" / "metrics.jsonl", log)
    recipe = {"name": EVIL, "description": EVIL, EVIL: {"seed": EVIL}, "list": [EVIL, {EVIL: EVIL}]}
    report = build_report(
        tmp_path,
        recipe,
        task,
        paths,
        machine={EVIL: EVIL, "processor": EVIL},
        versions={EVIL: EVIL, "mlx": EVIL},
    )
    page = assert_page_stands_alone(render_html(report))
    assert EVIL in "".join(page.words)
    assert_page_stands_alone(
        f"<meta content=\"default-src 'none'\"/>{RunReport(tmp_path / 'report.json', report)._repr_html_()}"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"positive": [], "group": None},
        {"score": None, "slices": []},
        {"title": None, "group": None},
    ],
)
def test_tasks_of_any_shape_have_a_page(tmp_path: Path, changes: dict[str, Any]) -> None:
    task = make_task(**changes)
    report = build_report(tmp_path, RECIPE, task, make_run(tmp_path, task, sets={"test": 12}))
    page = assert_page_stands_alone(render_html(report))
    assert ("Errors on either side" in page.text) == bool(task.positive)
    assert ("points within 5" in page.text) == bool(task.score)


def test_little_is_enough_for_a_page(tmp_path: Path) -> None:
    """One model, one row, no truth, no teacher, no training, no weights: figures that were not measured are
    absent, not zero.
    """
    row = {
        "id": "a",
        "set": "odd",
        "fields": {},
        "truth": None,
        "answer": None,
        "label": None,
        "score": None,
        "text": "?",
        "error": "x",
    }
    write_jsonl(tmp_path / "predictions.jsonl", [{"format": 1}, row])
    report = build_report(
        tmp_path, {}, make_task(), {"student": tmp_path}, machine=MACHINE, versions=VERSIONS
    )
    figures = report["metrics"]["student"]
    assert report["main_set"] == "odd"
    assert figures["accuracy"] == {"value": None, "low": None, "high": None, "n": 0}
    assert figures["json_valid"]["value"] == 0.0
    assert (
        figures["latency_s"]
        is figures["score_mae"]
        is figures["peak_memory_gb"]
        is figures["verdict_agreement"]
        is None
    )
    assert_page_stands_alone(render_html(report))
    assert "–" in str(RunReport(tmp_path / "report.json", report))


def test_a_model_that_missed_a_set_is_left_out_of_it(tmp_path: Path) -> None:
    task = make_task()
    paths = make_run(tmp_path, task, models=("teacher", "student"), sets={"test": 10, "more": 5})
    write_jsonl(paths["student"], make_predictions(task, "student", {"more": 5}))
    report = build_report(tmp_path, RECIPE, task, paths)
    assert list(report["metrics"]) == ["teacher"]
    assert list(report["by_set"]["more"]) == ["teacher", "student"]
    assert_page_stands_alone(render_html(report))


# --- the run's result ---------------------------------------------------------------------------------------


def test_result_is_written_read_and_shown(run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    _, report = run
    result = write_report(tmp_path, report)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]
    assert read_report(tmp_path).report == read_report(tmp_path / "report.json").report == report
    assert result.metrics["student"]["accuracy"]["n"] == 60
    lines = str(result).splitlines()
    assert lines[-1] == f"report: {tmp_path / 'report.html'}"
    assert len({len(line) for line in lines[2 : 3 + len(MODELS)]}) == 1  # columns stand under each other
    assert max(map(len, lines[:-1])) <= 120
    assert result._repr_html_().count("<tr>") == 1 + len(MODELS)
    short = result.to_dict()
    assert json.loads(json.dumps(short, allow_nan=False))["metrics"]["student"]
    assert "curves" not in short


def test_another_file_is_no_report(tmp_path: Path) -> None:
    write_json(tmp_path / "report.json", {"format": 9})
    with pytest.raises(FileError, match="not a report of format 1"):
        read_report(tmp_path)


# --- drawing ------------------------------------------------------------------------------------------------


def test_markup_escapes_all_but_markup() -> None:
    assert el("b", "<", Html("<i>"), ["&", None, 0], title='"<') == '<b title="&quot;&lt;">&lt;<i>&amp;0</b>'


def test_bars_are_as_long_as_their_rates() -> None:
    drawn = bar({"value": 0.25, "low": 0.1, "high": 0.5, "n": 8}, "x") or ""
    assert 'width="25.00%"' in drawn
    assert 'x1="10.00%" x2="50.00%"' in drawn
    assert bar({"value": None, "low": None, "high": None, "n": 0}, "x") is None
    assert bar(None, "x") is None


def test_strips_place_dots_on_their_axis() -> None:
    drawn = strip(
        [("a", "A", {"value": 0.0, "low": -0.5, "high": 9.0}), ("b", "B", None)], -1.0, 1.0, zero=0.0
    )
    assert 'cx="50.00%"' in drawn
    assert 'x1="25.00%" x2="100.00%"' in drawn  # what lies beyond the axis ends at its end
    assert drawn.count("<circle") == 1


def test_stacked_parts_fill_the_whole() -> None:
    drawn = stacked([("a", "A", 1), ("b", "B", 3), ("c", "C", 0)], "all")
    assert re.findall(r'x="([\d.]+)%" y="0" width="([\d.]+)%"', drawn) == [
        ("0.00", "25.00"),
        ("25.00", "75.00"),
    ]


@pytest.mark.parametrize(
    "values", [[0.5], [2.0, 2.0], [0.0, 0.0], [5.0, 0.001, 3.0], [-1.0, 2.0], list(np.linspace(9, 0.01, 300))]
)
def test_any_curve_can_be_drawn_inside_its_frame(values: list[float]) -> None:
    series = {"loss": {"step": list(range(1, len(values) + 1)), "value": [float(v) for v in values]}}
    drawn = line_chart(series, {"loss": "loss"}, "x")
    numbers = [
        tuple(map(float, pair.split(",")))
        for points in re.findall(r'points="([^"]+)"', drawn)
        for pair in points.split()
    ]
    assert len(numbers) >= len(values)
    assert all(0 <= x <= 460 and 0 <= y <= 232 for x, y in numbers)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.0, 0.037), (3.0, 3.0), (1.0, 1234.0), (-2.0, 5.0)])
def test_ticks_are_few_and_span_the_range(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 2 <= len(ticks) <= 9


def test_smoothing_keeps_length_and_constants() -> None:
    points = [(float(i), 3.0) for i in range(100)]
    assert smoothed(points) == points
    noisy = smoothed([(float(i), float(i % 2)) for i in range(100)])
    assert all(0.2 < y < 0.8 for _, y in noisy[5:-5])


# --- colours ------------------------------------------------------------------------------------------------


def luminance(rgb: tuple[float, ...]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in rgb)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_are_readable_in_light_and_dark() -> None:
    """WCAG: 4.5 for text, 3 for marks; the shades of the matrices hold their numbers at every share."""
    from mlx_distill.config import ASSETS

    style = (ASSETS / "report" / "style.css").read_text()
    light, dark = style.split("@media (prefers-color-scheme: dark)")[:2]
    for text in (light, light + dark):
        found = {
            name: tuple(int(code[i : i + 2], 16) for i in (0, 2, 4))
            for name, code in re.findall(r"--([\w-]+): #([0-9a-f]{6})", text)
        }
        triples = {
            name: tuple(map(int, values.split(",")))
            for name, values in re.findall(r"--(yes|no): ([\d, ]+);", text)
        }
        for name in ("ink", "soft", "teacher", "student", "quantized", "control", "bad", "good"):
            assert contrast(found[name], found["paper"]) >= 4.5, name
            assert contrast(found[name], found["card"]) >= 4.5, name
        for name in ("before", *(f"t{i}" for i in range(6))):
            assert contrast(found[name], found["paper"]) >= 3, name
        deep = float(re.findall(r"--deep: ([.\d]+)", text)[-1])
        for name, most in (("yes", 0.5), ("no", 0.05 + deep)):
            for share in np.linspace(0.04, most, 9):
                shade = tuple(
                    share * c + (1 - share) * p for c, p in zip(triples[name], found["paper"], strict=True)
                )
                assert contrast(found["ink"], shade) >= 4.5, (name, share)
