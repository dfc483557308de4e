"""The examples run as they stand, on fewer rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mlx_distill.recipe import load_recipe
from mlx_distill.tasks.answer import parse_answer

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parent.parent / "examples"
QUICKSTART = EXAMPLES / "01_quickstart" / "quickstart.ipynb"
FEW = [
    "data.sources=[{generator: music, part: train, count: 64, seed: 7}, "
    "{generator: music, part: test, count: 16, seed: 8, split: test}]",
    "teach.steps=2",
    "distill.steps=2",
]


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> dict:
    import nbformat
    from nbclient import NotebookClient

    folder = tmp_path_factory.mktemp("notebook")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUICKSTART_OVERRIDES", json.dumps(FEW))
        patch.setenv("QUICKSTART_OUT", str(folder / "run"))
        notebook = nbformat.read(QUICKSTART, as_version=4)
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return json.loads(nbformat.writes(notebook))


def _printed(notebook: dict, text: str) -> str:
    cells = [c for c in notebook["cells"] if c["cell_type"] == "code" and text in "".join(c["source"])]
    return "".join("".join(o.get("text", "")) for o in cells[0]["outputs"] if o.get("name") == "stdout")


def test_notebook_runs_and_shows_the_report(executed: dict) -> None:
    outputs = [o for c in executed["cells"] for o in c.get("outputs", [])]
    assert not [o for o in outputs if o["output_type"] == "error"]
    tables = ["".join(o["data"]["text/html"]) for o in outputs if "text/html" in o.get("data", {})]
    assert any("Student" in table and "fits the task" in table for table in tables)


def test_notebook_asks_the_quantized_student_and_gets_valid_answers(executed: dict) -> None:
    task = load_recipe("tiny").load_task()
    answers = dict(line.split(" ", 1) for line in _printed(executed, "md.analyze").strip().splitlines())
    assert list(answers) == ["a", "b"]
    for text in answers.values():
        answer, error = parse_answer(text, task.schema)
        assert error is None and answer is not None and set(answer) == set(task.schema["properties"])
    assert json.loads(answers["b"])["verdict"] == "NOT_RECOMMENDED"  # one that praises a rigged bet


def test_notebook_aligns_the_whole_text(executed: dict) -> None:
    lines = _printed(executed, "align_bytes").strip().splitlines()
    assert len(lines) > 10
    assert any(not line.endswith(" 1 student tokens, 1 of the teacher") for line in lines)


def _execute(folder: Path, name: str, few: list[str]) -> dict:
    """An example's notebook, executed in a copy of its folder."""
    import nbformat
    from nbclient import NotebookClient

    shutil.copytree(EXAMPLES / name, folder)
    (path,) = folder.glob("*.ipynb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXAMPLE_OVERRIDES", json.dumps(few))
        patch.setenv("EXAMPLE_FOLDS", "2")
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    executed: dict[str, Any] = json.loads(nbformat.writes(notebook))
    return executed


def test_moderation_compares_the_teacher_before_and_after_by_group(tmp_path: Path) -> None:
    folder = tmp_path / "moderation"
    few = [
        "data.sources=[{generator: moderation, part: train, count: 96, seed: 7}, "
        "{generator: moderation, part: test, count: 48, seed: 8, split: test}]",
        "teach.steps=4",
        "teach.warmup_steps=1",
        "teach.evaluate_every=2",
        "evaluate.constrain=false",
    ]
    notebook = _execute(folder, "02_moderation", few)
    report = json.loads((folder / "moderation-run" / "report.json").read_text("utf-8"))
    assert list(report["metrics"]) == ["teacher_before", "teacher"]
    protocol = dict(line.split() for line in _printed(notebook, "lora_rank").splitlines())
    assert protocol == {
        "lora_rank": "32",
        "lora_alpha": "64.0",
        "lora_dropout": "0.1",
        "epochs": "3.0",
        "batch_size": "4",
        "accumulate": "2",
        "learning_rate": "0.0002",
        "warmup_steps": "100",
        "use_best": "True",
    }
    groups = [line.split()[0] for line in _printed(notebook, "group_changes").splitlines() if "->" in line]
    assert groups == sorted(report["metrics"]["teacher"]["by_group"]["groups"]) and len(groups) == 6
    assert [goal["state"] for goal in report["goals"]] != ["not_measured"] * 2
    goals = _printed(notebook, "goal_text(goal)").splitlines()
    assert [line.split()[0] for line in goals] == [goal["state"] for goal in report["goals"]]
    (change,) = report["group_changes"]
    fixed = int(_printed(notebook, '("fixed", "broken")').split("fixed: ")[1].split()[0])
    compared = report["final_comparison"]
    assert fixed == len(compared["cases"]["fixed"]) and change["field"] == "group"
    assert "<html" in (folder / "moderation.html").read_text("utf-8")


def test_proof_shows_each_step(tmp_path: Path) -> None:
    folder = tmp_path / "proof"
    few = [
        "data.sources=[{generator: music, part: train, count: 64, seed: 7}, "
        "{generator: music, part: test, count: 12, seed: 8, split: test}]",
        "teach.steps=2",
        "distill.steps=2",
        "quantize.refine=none",
        "evaluate.constrain=false",
        "evaluate.repeats=2",
        "evaluate.repeat_rows=4",
    ]
    notebook = _execute(folder, "03_proof", few)
    assert "2 folds; each of 64 rows" in _printed(notebook, "md.validate").replace("\n", " ")
    report = json.loads((folder / "proof-run" / "report.json").read_text("utf-8"))
    assert list(report["metrics"]) == ["teacher", "student", "quantized"]
    steps = _printed(notebook, "attribution").splitlines()
    assert [line.split(":")[0] for line in steps] == [
        "teacher -> student",
        "student -> quantized",
        "teacher -> quantized",
    ]
    assert "scripture_references" in _printed(notebook, "hallucination_rate")
    assert len(_printed(notebook, '"shuffled", "sampled"').splitlines()) == 6
    behaved = _printed(notebook, "found['behaved']").splitlines()
    assert [line.split()[0] for line in behaved if "n = 6" in line] == ["teacher", "student", "quantized"]
    compared = _printed(notebook, "ratings.csv")
    for part in ("cost of B", "errors of B cost", "people: B wins", "kappa"):
        assert part in compared
    judged = _printed(notebook, "goal_text(goal)").splitlines()
    assert [line[:12].strip().replace(" ", "_") for line in judged] == [g["state"] for g in report["goals"]]
    page = (folder / "proof.html").read_text("utf-8")
    assert report["answer"]["sentence"].split(" (")[0] in page
