"""Two files of predictions, compared: figures, verdicts, properties, and what is refused."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.comparison_files import make_answers, make_rows, write_files, write_lines
from helpers.report_runs import make_run, make_task

import mlx_distill as md
from mlx_distill.cli import cli
from mlx_distill.config import to_mapping
from mlx_distill.errors import ConfigError, DataError
from mlx_distill.evaluate.compare import ModelComparison, parse_margin
from mlx_distill.evaluate.comparison_inputs import Side, pair_sides
from mlx_distill.metrics.paired import bonett_price, mcnemar_mid_p


def compare(files: dict[str, Path], **options: Any) -> ModelComparison:
    first, second = options.pop("sides", ("a", "b"))
    return md.compare(files[first], files[second], str(files["task"]), files["rows"], **options)


def test_planted_rows_are_found_exactly(tmp_path: Path) -> None:
    broken, fixed = [3, 14, 15, 92, 65, 35, 89], [50, 51]
    files = write_files(tmp_path, 100, a={"wrong": [7, *fixed]}, b={"wrong": [7, *broken]})
    result = compare(files)
    assert result.to_dict()["cases"] == {
        "fixed": [f"r{i}" for i in sorted(fixed)],
        "broken": [f"r{i}" for i in sorted(broken)],
    }
    facts = result.facts
    assert [facts[key] for key in ("both", "first_only", "second_only", "neither")] == [90, 7, 2, 1]
    assert facts["difference"]["value"] == pytest.approx(-0.05)
    assert (facts["difference"]["low"], facts["difference"]["high"]) == pytest.approx(bonett_price(2, 7, 100))
    assert facts["p"] == pytest.approx(mcnemar_mid_p(2, 7))
    assert facts["churn"] == pytest.approx(0.09)
    assert facts["agreement"]["value"] == pytest.approx(0.91)  # of two labels: both wrong is the same one
    changes = {case["id"]: case["change"] for case in result.cases}
    assert changes["r7"] == "both_wrong" and changes["r0"] == "both_right" and len(changes) == 100


def test_invalid_answers_are_wrong(tmp_path: Path) -> None:
    files = write_files(tmp_path, 40, b={"invalid": [1, 2]})
    facts = compare(files).facts
    assert facts["cases"]["broken"] == ["r1", "r2"]
    assert facts["b"]["json_valid"]["value"] == pytest.approx(0.95)
    assert facts["confusions"]["b"]["counts"] == [[19, 0, 1], [0, 19, 1]]


def test_swapping_negates_and_order_changes_nothing(tmp_path: Path) -> None:
    files = write_files(tmp_path, 80, a={"wrong": range(0, 80, 9)}, b={"wrong": range(0, 80, 7)})
    facts, swapped = compare(files).facts, compare(files, sides=("b", "a")).facts
    for one, other in (("value", "value"), ("low", "high"), ("high", "low")):
        assert facts["difference"][one] == pytest.approx(-swapped["difference"][other], abs=1e-15)
    assert facts["first_only"] == swapped["second_only"] and facts["p"] == swapped["p"]
    assert facts["cases"]["fixed"] == swapped["cases"]["broken"]
    for name in ("rows", "a", "b"):
        lines = files[name].read_text().splitlines(keepends=True)
        random.Random(name).shuffle(lines)
        files[name].write_text("".join(lines))
    again = compare(files).facts
    skipped = ("cases", "created", "id", "a", "b")
    assert {k: v for k, v in again.items() if k not in skipped} == {
        k: v for k, v in facts.items() if k not in skipped
    }
    assert sorted(again["cases"]["broken"]) == sorted(facts["cases"]["broken"])


@pytest.mark.parametrize("metric", [None, "score_error", "exact_match", "points", "json_valid"])
def test_a_model_against_itself_is_never_better(tmp_path: Path, metric: str | None) -> None:
    files = write_files(tmp_path, 60, a={"wrong": [4, 9], "shift": {3: 9}})
    result = compare(files, sides=("a", "a"), metric=metric)
    assert result.facts["difference"]["value"] == 0.0 and result.facts["p"] == 1.0
    assert result.verdict == "inconclusive"


@pytest.mark.parametrize(
    ("n", "a", "b", "margin", "wanted"),
    [
        (120, range(20), (), None, "better"),
        (120, range(20), (), "3pt", "better"),
        (120, range(12), range(1, 13), "8pt", "non_inferior"),
        (120, range(12), range(1, 13), None, "inconclusive"),
        (120, (), range(20), "3pt", "worse"),
        (120, (), range(8), "15pt", "non_inferior"),  # worse by the interval, and within the margin
        (120, (), range(8), None, "worse"),
        (60, range(4), range(2, 6), "3pt", "inconclusive"),
    ],
)
def test_the_verdict_is_the_first_that_holds(
    tmp_path: Path, n: int, a: Any, b: Any, margin: str | None, wanted: str
) -> None:
    files = write_files(tmp_path, n, a={"wrong": a}, b={"wrong": b})
    result = compare(files, margin=margin)
    assert result.verdict == wanted
    assert (result.facts["advice"] is not None) == (wanted in ("inconclusive", "worse"))


def test_a_margin_may_be_a_share_of_the_value_of_a(tmp_path: Path) -> None:
    files = write_files(tmp_path, 100, a={"wrong": range(20)}, b={"wrong": range(20)})
    assert compare(files, margin="5%").facts["margin"] == pytest.approx(0.04)
    assert compare(files, margin="5pt").facts["margin"] == pytest.approx(0.05)
    assert compare(files, margin="5pt", metric="score_error").facts["margin"] == pytest.approx(5.0)
    for text in ("5", "0pt", "-3pt", "3 points", "0.03"):
        with pytest.raises(ConfigError, match="margin"):
            parse_margin(text)


def test_the_advice_names_the_rows_that_are_missing(tmp_path: Path) -> None:
    files = write_files(tmp_path, 60, a={"wrong": range(4)}, b={"wrong": range(2, 6)})
    facts = compare(files, margin="3pt").facts
    assert facts["planned_n"] > 60
    assert f"{facts['planned_n'] - 60:,} more rows ({facts['planned_n']:,} in all)" in facts["advice"]
    assert facts["provable_margin"] > 0.03
    assert "margin (such as 3pt)" in compare(files).facts["advice"]


@pytest.mark.parametrize("metric", [None, "score_error"])
def test_the_advice_for_a_worse_model_names_where_rows_broke(tmp_path: Path, metric: str | None) -> None:
    moved = {i: 40 for i in range(120) if i % 3 == 1} | {0: 40, 2: 40}
    files = write_files(tmp_path, 120, b={"wrong": moved, "shift": moved if metric else None})
    result = compare(files, metric=metric)
    facts, text = result.facts, str(result)
    assert facts["verdict"] == "worse"
    assert "p < 0.001" in text and "100.0 % valid" in text and "95 % interval" in text
    counts = {entry["value"]: (entry["fixed"], entry["broken"]) for entry in facts["slices"]["kind"]}
    assert counts == {"prose": (0, 1), "verse": (0, 40), "note": (0, 1)}
    assert facts["advice"].startswith(
        "Look at the 42 broken rows, first at those with kind verse (40 of its 40 rows broke), and train"
    )
    write_lines(files["rows"], [{**row, "kind": "prose"} for row in make_rows(120)])
    same = compare(files, metric=metric).facts
    assert same["slices"] == {}  # one value says nothing
    assert same["advice"].startswith("Look at the 42 broken rows, and train")


def test_a_lower_error_is_better(tmp_path: Path) -> None:
    files = write_files(tmp_path, 90, a={"shift": dict.fromkeys(range(60), 8)}, b={"shift": {0: 9}})
    result = compare(files, metric="score_error")
    assert result.verdict == "better"
    assert result.facts["difference"]["value"] == pytest.approx((9 - 60 * 8) / 90)
    assert result.facts["score"] == {
        "n": 90,
        "improved": 59,
        "worsened": 1,
        "share_improved": pytest.approx(59 / 90),
        "share_worsened": pytest.approx(1 / 90),
    }
    assert len(result.facts["cases"]["fixed"]) == 59 and result.facts["cases"]["broken"] == ["r0"]


def test_rows_of_one_author_are_a_cluster(tmp_path: Path) -> None:
    wrong = {"wrong": range(0, 120, 4)}
    files = write_files(tmp_path, 120, b=wrong, task="cluster: author\n", authors=24)
    facts = compare(files).facts
    assert (facts["unit"], facts["cluster_key"], facts["clusters"]) == ("cluster", "author", 24)
    plain = write_files(tmp_path, 120, b=wrong, authors=24)
    independent = compare(plain).facts
    assert independent["unit"] == "row" and independent["cluster_key"] is None
    widths = [f["difference"]["high"] - f["difference"]["low"] for f in (facts, independent)]
    assert widths[0] > 1.2 * widths[1]  # every fourth author is wrong throughout
    assert facts["provable_margin"] > independent["provable_margin"]


def test_slices_are_ordered_by_their_rows(tmp_path: Path) -> None:
    rows = make_rows(100)
    for row in rows[:50]:
        row["kind"] = "verse"
    files = write_files(tmp_path, 100)
    write_lines(files["rows"], rows)
    slices = compare(files).facts["slices"]["kind"]
    assert [entry["n"] for entry in slices] == sorted((entry["n"] for entry in slices), reverse=True)
    assert slices[0]["value"] == "verse" and not slices[0]["few"] and slices[-1]["few"]


def test_files_of_other_tools_need_task_and_rows(tmp_path: Path, runner: Any) -> None:
    files = write_files(tmp_path)
    arguments = ["compare", str(files["a"]), str(files["b"])]
    result = runner.invoke(cli, arguments)
    assert result.exit_code == 2 and "--task and --rows" in result.stderr
    result = runner.invoke(cli, [*arguments, "--rows", str(files["rows"])])
    assert result.exit_code == 2 and "--task" in result.stderr


def _edit(path: Path, number: int, **changes: Any) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[number] |= changes
    write_lines(path, lines)


def test_other_rows_are_refused_and_named(tmp_path: Path) -> None:
    files = write_files(tmp_path, 30)
    write_lines(files["b"], make_answers(make_rows(28)))
    with pytest.raises(DataError, match=r"after.jsonl lacks 2 rows of the other: r28, r29"):
        compare(files)
    files = write_files(tmp_path, 30)
    _edit(files["b"], 4, id="r5")
    with pytest.raises(DataError, match=r"after.jsonl: id 'r5' occurs twice"):
        compare(files)
    files = write_files(tmp_path, 30)
    _edit(files["rows"], 4, answer={"colour": "light", "points": 900})
    with pytest.raises(DataError, match=r"rows.jsonl:5: .*points"):
        compare(files)
    files = write_files(tmp_path, 30)
    lines = [json.loads(line) for line in files["a"].read_text().splitlines()]
    write_lines(files["a"], [{"id": line["id"], "output": line["text"]} for line in lines])
    with pytest.raises(DataError, match="no text; the line has id, output"):
        compare(files)


def test_two_models_of_a_run(tmp_path: Path, runner: Any) -> None:
    make_run(tmp_path / "run", make_task())
    path = tmp_path / "colours.yaml"
    path.write_text(json.dumps(to_mapping(make_task())), encoding="utf-8")
    arguments = ["compare", f"{tmp_path}/run:teacher", f"{tmp_path}/run", "--task", str(path)]
    result = runner.invoke(cli, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["a"]["name"] == "Teacher" and facts["b"]["name"] == "Quantized" and facts["n"] == 60
    assert facts["b"]["size_bytes"] == 150_000 and facts["a"]["size_bytes"] == 670_000
    assert facts["a"]["latency_s"] > 0 and facts["split"] == "test"
    assert all(facts["calibration"][side]["nll"] > 0 for side in "ab")
    missing = runner.invoke(cli, [*arguments[:2], f"{tmp_path}/run:student_text", *arguments[3:]])
    assert missing.exit_code == 1 and "no evaluation of student_text" in missing.stderr


def test_another_prompt_is_declared_and_other_data_refused(tmp_path: Path) -> None:
    task, other = make_task(), make_task(user="Read: {text}")
    row = {"id": "x", "truth": {"tone": "dark"}, "fields": {}, "input": "Hello"}

    def side(name: str, row: Any, task: Any) -> Side:
        return Side(name, name, "file", [row], task, name, name)

    paired = pair_sides(side("a", row, task), side("b", {**row, "input": "Read: Hello"}, other), None)
    assert paired.variables == ["the user prompt differs"]
    with pytest.raises(DataError, match="row 'x' has another input in b than in a"):
        pair_sides(side("a", row, task), side("b", {**row, "input": "Bye"}, task), None)
    with pytest.raises(DataError, match="another true answer"):
        pair_sides(side("a", row, task), side("b", {**row, "truth": {"tone": "mild"}}, task), None)


def test_the_gate_is_the_exit_code(tmp_path: Path, runner: Any) -> None:
    def gate(n: int, a: Any, b: Any, *options: str) -> Any:
        files = write_files(tmp_path, n, a={"wrong": a}, b={"wrong": b})
        fixed = ["compare", str(files["a"]), str(files["b"]), "--task", str(files["task"])]
        return runner.invoke(cli, [*fixed, "--rows", str(files["rows"]), "--gate", *options])

    assert gate(90, range(9), range(1, 10), "--margin", "8pt").exit_code == 0
    too_few = gate(40, (), (), "--margin", "3pt")
    assert too_few.exit_code == 3 and "more rows" in too_few.stdout
    assert gate(60, (), range(9), "--margin", "3pt").exit_code == 3
    assert gate(60, range(9), (), "--margin", "3pt", "--json").exit_code == 0
    without = gate(40, (), ())
    assert without.exit_code == 2 and "--margin" in without.stderr


def test_two_files_are_compared_without_mlx(tmp_path: Path) -> None:
    files = write_files(tmp_path, 30, task="cluster: author\n", authors=5)
    arguments = [str(files[name]) for name in ("a", "b", "task", "rows")]
    code = (
        f"import sys, mlx_distill as md; md.compare(*{arguments!r}); "
        "print(*(m for m in sys.modules if m.split('.')[0] in ('mlx', 'mlx_lm', 'transformers')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "\n", done.stderr + done.stdout


def test_a_model_that_answers_nothing_is_no_measure(tmp_path: Path) -> None:
    files = write_files(tmp_path, 40, a={"invalid": range(40)}, b={"invalid": range(40)})
    result = compare(files, margin="30pt")
    assert (
        result.verdict == "inconclusive" and "no answer of before and after fits" in result.facts["sentence"]
    )


def test_metrics_and_error_categories_of_the_task(tmp_path: Path) -> None:
    extra = """
metrics: [{metric: field_accuracy, name: points_right, field: points}]
error_categories:
  far_off: {points: {over_by: 20}}
"""
    files = write_files(tmp_path, 40, b={"shift": {3: 50, 4: 5}}, task=extra)
    result = compare(files, metric="points_right")
    assert result.facts["cases"]["broken"] and result.facts["metric_title"] == "Points right"
    classes = {case["id"]: case["b"]["error_class"] for case in result.cases}
    assert classes["r3"] == "far off" and classes["r4"] is None
    assert "points_right" in {entry["metric"] for entry in compare(files).facts["metrics"]}
    with pytest.raises(ConfigError, match=r"--metric f1: not one with a value a row"):
        compare(files, metric="f1")


def test_what_a_tool_means_by_odd_values_is_not_guessed(tmp_path: Path) -> None:
    files = write_files(tmp_path, 12, b={"latency_s": "fast", "label_probs": [0.5, 0.5], "tokens": -1})
    facts = compare(files).facts
    assert facts["b"]["latency_s"] is None and facts["b"]["tokens"] is None and facts["calibration"] is None


def test_labels_alone_are_compared_by_label(tmp_path: Path) -> None:
    files = write_files(tmp_path, 12)
    rows = make_rows(12)
    labels = [
        {"id": row["id"], "label": row["answer"]["colour"], "probabilities": {"light": 0.5, "dark": 0.5}}
        for row in rows
    ]
    labels[5]["label"] = "light"
    write_lines(files["b"], labels)
    assert compare(files).facts["cases"]["broken"] == ["r5"]
    with pytest.raises(ConfigError, match="labels alone"):
        compare(files, metric="exact_match")
