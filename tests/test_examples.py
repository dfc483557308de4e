"""The examples run as they stand, on fewer rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_distill.recipe import load_recipe
from mlx_distill.tasks.answer import parse_answer

pytestmark = pytest.mark.slow

QUICKSTART = Path(__file__).parent.parent / "examples" / "01_quickstart" / "quickstart.ipynb"
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
