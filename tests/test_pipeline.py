"""Which stages of a run are current: those that no changed setting, input or file has an effect on."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers.small_chain import STAGES, finished, manifests, whole_stages, write_chain

from mlx_distill import pipeline
from mlx_distill.cli.main import cli
from mlx_distill.errors import ConfigError, FileError, Interrupted
from mlx_distill.graph import Stage, graph
from mlx_distill.progress import PlainProgress
from mlx_distill.recipe import load_recipe
from mlx_distill.runtime import StopFlag
from mlx_distill.status import Outcome, Plan
from mlx_distill.storage import Manifest, fingerprint, lock_folder, read_manifest

pytestmark = pytest.mark.slow

TEACHER, STUDENT = "evaluations/teacher", "evaluations/student"


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of a finished run that may be changed."""
    shutil.copytree(finished(), tmp_path / "copy")
    return tmp_path / "copy"


class Counter:
    """Replaces :func:`pipeline.make_stage`: makes nothing and records the names of the stages, so that the
    following stages depend on keys alone.
    """

    def __init__(self) -> None:
        self.made: list[str] = []

    def __call__(self, runner: pipeline.Runner, stage: Stage, context: Any) -> Manifest:
        self.made.append(stage.name)
        manifest = read_manifest(runner.out / stage.name)
        assert manifest is not None
        return manifest

    def run(self, folder: Path, *arguments: Any, **options: Any) -> Any:
        return pipeline.run(folder / "recipe.yaml", folder / "out", *arguments, make_stage=self, **options)


@pytest.fixture
def counter() -> Counter:
    return Counter()


def states(folder: Path, *overrides: str, **options: Any) -> dict[str, str]:
    plan = pipeline.run(folder / "recipe.yaml", folder / "out", dry_run=True, overrides=overrides, **options)
    assert isinstance(plan, Plan)
    out = folder / "out"
    return {
        Path(row["writes"]).relative_to(out).as_posix(): row["state"]
        for row in plan.stages
        if row["command"] != "report"
    }


def test_a_loaded_recipe_runs_as_its_file_does(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe(copied / "recipe.yaml")
    plan = pipeline.run(recipe, copied / "out", dry_run=True)
    assert isinstance(plan, Plan) and {row["status"] for row in plan.stages[:-1]} == {"current"}
    outcome = pipeline.run(recipe, copied / "out", overrides={"data.seed": 1}, only="prepare")
    assert isinstance(outcome, Outcome)
    assert outcome.next == f"md.run(recipe, {str(copied / 'out')!r}, only='teach')"
    assert "data: made again, seed was 0, is 1" in capsys.readouterr().err  # progress is shown by default


def to_do(folder: Path, *overrides: str, **options: Any) -> set[str]:
    return {name for name, state in states(folder, *overrides, **options).items() if state != "current"}


def after(*names: str) -> set[str]:
    """These stages and all that read them, written by hand."""
    children = {
        "data": {"teacher", "targets", "student", TEACHER, STUDENT},
        "teacher_base": {"teacher", TEACHER},
        "student_base": {"student", "quantized", STUDENT},
        "teacher": {"targets", TEACHER},
        "targets": {"student"},
        "student": {"quantized", STUDENT},
    }
    found = set(names)
    for name in names:
        found |= after(*children.get(name, ()))
    return found


@pytest.mark.parametrize(
    ("override", "remade"),
    [
        ("data.valid_fraction=0.06", after("data")),
        ("data.seed=1", after("data")),
        ("convert.dtype=float32", after("teacher_base", "student_base")),
        ("teach.learning_rate=1e-4", after("teacher")),
        ("teach.seed=1", after("teacher")),
        ("targets.top_k=4", after("targets")),
        ("distill.label_weight=0.5", after("student")),
        ("distill.epochs=2", after("student")),
        ("dequantize=true", after("teacher", "student")),
        ("quantize.mode=affine8", after("quantized")),
        ("evaluate.max_rows=3", {TEACHER, STUDENT}),
        ("teacher=asset:models/tiny-gpt-oss", after("teacher_base")),
        ("student=asset:models/tiny-qwen3", after("student_base")),
        ("compute_dtype=bfloat16", {"teacher", "targets", "student", "quantized", TEACHER, STUDENT}),
    ],
)
def test_a_changed_setting_makes_its_stage_and_those_that_read_it_stale(
    override: str, remade: set[str]
) -> None:
    assert to_do(finished(), override) == remade
    assert all(
        state.startswith("to do: ") for name, state in states(finished(), override).items() if name in remade
    )


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "description=else",
        "teach.grad_checkpoint=true",
        "teach.checkpoint_every=7",
        "distill.checkpoint_every=9",
        "targets.batch_size=3",
        "evaluate.confidence=0.9",
        "task.description=words",
    ],
)
def test_settings_that_cannot_change_a_result_make_nothing_stale(override: str) -> None:
    if override.startswith("task."):
        override = "task={name: task.yaml, description: words}"
    assert to_do(finished(), override) == set()


def test_a_finished_run_stays_current_under_the_old_spelling_of_its_recipe(copied: Path) -> None:
    recipe = copied / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "unpack: false\n")
    stream = io.StringIO()
    plan = pipeline.run(recipe, copied / "out", dry_run=True, progress=PlainProgress(stream))
    assert isinstance(plan, Plan)
    assert {row["state"] for row in plan.stages if row["command"] != "report"} == {"current"}
    assert stream.getvalue() == f"{recipe}: unpack is now called dequantize\n"


def test_the_task_is_in_the_key_of_every_stage_that_uses_it() -> None:
    changed = "task={name: task.yaml, system: Look for a colour.}"
    assert to_do(finished(), changed) == set(STAGES) - {"teacher_base", "student_base"}


def test_a_new_model_to_measure_or_a_control_adds_stages_and_leaves_the_others() -> None:
    assert to_do(finished(), "evaluate.models=[student, quantized]") == {"evaluations/quantized"}
    assert to_do(finished(), "controls.text=true") == {"student_text", "evaluations/student_text"}
    recipe = load_recipe(finished() / "recipe.yaml", ["controls.labels=true"])
    control = next(stage for stage in graph(recipe, recipe.load_task()) if stage.name == "student_labels")
    assert "targets" not in control.parents  # it is not trained on the teacher
    with pytest.raises(ConfigError, match=r"evaluate\.models: 'teecher'") as caught:
        to_do(finished(), "evaluate.models=[teecher]")
    assert "teacher_before" in caught.value.message


def test_an_edited_input_makes_stages_stale_and_a_touched_one_does_not(copied: Path) -> None:
    rows = copied / "rows.jsonl"
    os.utime(rows, ns=(1, 1))
    assert to_do(copied) == set()
    rows.write_text(rows.read_text(encoding="utf-8").replace("heron", "stork", 1), encoding="utf-8")
    assert to_do(copied) == after("data")
    assert states(copied)["data"] == f"to do: {rows} has changed"


def test_a_run_that_was_copied_without_its_times_is_current(
    copied: Path, tmp_path: Path, counter: Counter
) -> None:
    moved = tmp_path / "elsewhere" / "run"
    shutil.copytree(copied, moved, copy_function=shutil.copyfile)
    assert to_do(moved) == set()
    counter.run(moved)
    assert counter.made == []


@pytest.mark.parametrize(
    ("stage", "file"),
    [("data", "train.jsonl"), ("targets", "rows-00000.jsonl"), ("student", "adapters.safetensors")],
)
def test_a_damaged_file_makes_its_stage_stale(copied: Path, stage: str, file: str) -> None:
    path = copied / "out" / stage / file
    raw = path.read_bytes()
    path.write_bytes(raw[:100] + b"?" + raw[101:])
    assert states(copied)[stage] == f"to do: {path} has changed since it was written"
    path.unlink()
    assert states(copied)[stage] == f"to do: {path} is missing"


def test_a_damaged_stage_is_made_again_alone_if_it_comes_out_the_same(
    copied: Path,
) -> None:
    before = manifests(copied / "out")
    (copied / "out" / "data" / "test.jsonl").unlink()
    (copied / "out" / "student_base" / "config.json").write_text("{}")
    pipeline.run(copied / "recipe.yaml", copied / "out")
    found = manifests(copied / "out")
    assert {
        name for name in STAGES if found[name].recorded["finished"] != before[name].recorded["finished"]
    } == {"data", "student_base"}
    assert all(found[name].content == before[name].content for name in ("data", "student_base"))
    assert whole_stages(copied / "out") == sorted(STAGES)


@pytest.mark.parametrize(
    ("stage", "made"),
    [
        ("prepare", [name for name in STAGES if not name.endswith("_base")]),
        ("distill", ["student", "quantized", STUDENT]),
        ("quantize", ["quantized"]),
        ("evaluate", [TEACHER, STUDENT]),
    ],
)
def test_from_makes_the_stage_and_all_that_follow(
    copied: Path, counter: Counter, stage: str, made: list[str]
) -> None:
    assert to_do(copied, from_stage=stage) == set(made)
    counter.run(copied, from_stage=stage)
    assert counter.made == made


def test_one_stage_alone(copied: Path, counter: Counter) -> None:
    outcome = counter.run(copied, only="targets")
    assert isinstance(outcome, Outcome)
    first, last = outcome.lines
    assert first.startswith(f"targets: {copied / 'out' / 'targets'}: current, nothing was to do; ")
    assert last == "next: nothing, every stage is current"
    assert counter.made == []
    outcome = counter.run(copied, only="targets", overrides=["targets.top_k=4"])
    assert outcome.lines[0].startswith(f"targets: {copied / 'out' / 'targets'}: made in ")
    assert counter.made == ["targets"]
    counter.run(copied, False, only="quantize")
    assert counter.made == ["targets", "quantized"]
    counter.run(copied, only="distill", from_stage="distill")
    assert counter.made[2:] == ["student"]
    assert counter.run(copied, only="evaluate").to_dict()["metrics"].keys() == {"teacher", "student"}
    assert counter.made[3:] == []


def test_the_outcome_of_one_stage_alone_names_the_next_command(tmp_path: Path) -> None:
    recipe, out = write_chain(tmp_path), tmp_path / "out"
    outcome = pipeline.run(recipe, out, only="prepare", overrides=["data.seed=1"])
    assert isinstance(outcome, Outcome)
    (made, following), (row,) = outcome.lines, outcome.stages
    counts = read_manifest(out / "data").recorded["rows"]  # type: ignore[union-attr]
    assert sum(counts.values()) == 110
    assert re.fullmatch(
        re.escape(f"prepare: {out / 'data'}: made in ")
        + r"[\d.]+ s; "
        + ", ".join(f"{n} {name}" for name, n in counts.items())
        + r" rows, .* kB",
        made,
    )
    assert (
        following
        == f"next: mlx-distill teach {recipe} --out {out} --set data.seed=1 (or run, for all that is left)"
    )
    assert (row["command"], row["writes"], row["state"], row["recorded"]["rows"]) == (
        "prepare",
        str(out / "data"),
        "made",
        counts,
    )
    json.dumps(outcome.to_dict())


def test_a_dry_run_marks_inputs_that_do_not_exist(tmp_path: Path) -> None:
    recipe = write_chain(tmp_path, teacher="Org/model", student="models/of/mine")
    sources = "data.sources=[{path: rows.jsonl}, {path: songs.jsonl}, {hub: org/rows}]"
    plan = pipeline.run(recipe, tmp_path / "out", dry_run=True, overrides=[sources])
    assert isinstance(plan, Plan)
    marked = {
        line.split()[1]: line.endswith("  (not there yet)")
        for line in plan.lines
        if line.startswith("          reads")
    }
    assert [name for name, there in marked.items() if there] == ["songs.jsonl", "models/of/mine"]
    assert {"org/rows@main", "Org/model", str(tmp_path / "rows.jsonl")} < set(marked)
    (taught,) = [stage["settings"] for stage in plan.stages if stage["command"] == "teach"]
    assert "lora_rank" in taught and not [name for name in taught if name.startswith(("galore", "apollo"))]


def test_the_quantized_model_is_never_dequantized() -> None:
    overrides = ["dequantize=true", "evaluate.models=[student, quantized]"]
    recipe = load_recipe(finished() / "recipe.yaml", overrides)
    found = {stage.name: stage.config.get("unpack") for stage in graph(recipe, recipe.load_task())}
    assert found["evaluations/quantized"] is recipe.dequantizes("quantized") is False
    assert all(
        found[name] is True
        for name in ("teacher", "targets", "student", "evaluations/teacher", "evaluations/student")
    )


def test_one_stage_alone_without_its_parents_names_the_command_to_run(tmp_path: Path) -> None:
    recipe = write_chain(tmp_path)
    with pytest.raises(FileError, match=r"out/data and .*out/teacher are not there yet") as caught:
        pipeline.run(recipe, tmp_path / "out", only="targets")
    assert f"mlx-distill prepare {recipe}" in (caught.value.fix or "")


def test_an_evaluation_without_the_models_says_so_before_anything_is_converted(copied: Path) -> None:
    for name in ("student", "quantized", "student_base", "teacher_base"):
        shutil.rmtree(copied / "out" / name)
    with pytest.raises(FileError, match=r"out/student is not there yet") as caught:
        pipeline.run(copied / "recipe.yaml", copied / "out", only="evaluate")
    assert "mlx-distill distill" in (caught.value.fix or "")
    assert not (copied / "out" / "teacher_base").exists()


def test_all_missing_inputs_and_folders_that_are_no_models_are_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}", encoding="utf-8")
    recipe = write_chain(tmp_path, teacher="empty", student="bare")
    arguments = [str(recipe), "--out", str(tmp_path / "out"), "--set", "data.sources=[{path: songs.jsonl}]"]
    plan = CliRunner().invoke(cli, ["run", *arguments, "--dry-run", "--json"])
    assert plan.exit_code == 1
    problems = json.loads(plan.stdout)["problems"]
    assert [text.split(": ", 1)[1] for text in problems] == [
        "no such file or folder",
        "no model folder: no config.json",
        "no model folder: config.json, but no *.safetensors with weights",
    ]
    for arguments_of in (["run", *arguments], ["run", *arguments, "--dry-run"]):
        result = CliRunner().invoke(cli, arguments_of)
        assert result.exit_code == 1 and "3 paths cannot be used" in result.stderr
        assert all(text in result.stderr for text in problems)
    assert not (tmp_path / "out").exists()


def test_one_stage_alone_converts_a_missing_base(copied: Path) -> None:
    shutil.rmtree(copied / "out" / "student_base")
    shutil.rmtree(copied / "out" / "teacher_base")
    pipeline.run(copied / "recipe.yaml", copied / "out", only="quantize")
    assert whole_stages(copied / "out") == sorted(set(STAGES) - {"teacher_base"})
    assert to_do(copied) == after("teacher_base")  # they cannot be current without the teacher's base


def test_without_resume_everything_is_made_again(copied: Path, counter: Counter) -> None:
    assert to_do(copied, resume=False) == set(STAGES)
    counter.run(copied, resume=False)
    assert counter.made == list(STAGES)


def test_a_dry_run_writes_nothing(copied: Path, tmp_path: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in copied.rglob("*")}
    plan = pipeline.run(copied / "recipe.yaml", copied / "out", dry_run=True, overrides=["teach.steps=9"])
    assert isinstance(plan, Plan)
    assert {p: p.stat().st_mtime_ns for p in copied.rglob("*")} == before
    pipeline.run(copied / "recipe.yaml", tmp_path / "nothing", dry_run=True)
    assert not (tmp_path / "nothing").exists()
    text = "\n".join(plan.lines)
    assert "teach " in text and "steps=9" in text and str(copied / "rows.jsonl") in text
    json.dumps(plan.to_dict())


def test_a_stage_that_fails_leaves_the_old_one(copied: Path) -> None:
    before = manifests(copied / "out")

    def fail(context: Any, folder: Path) -> Any:
        (folder / "half.bin").write_bytes(b"half")
        raise MemoryError

    def make(runner: pipeline.Runner, stage: Stage, context: Any) -> Manifest:
        assert stage.name == "quantized"
        return pipeline.make_stage(runner, replace(stage, work=fail), context)

    overrides = ["quantize.mode=affine8"]
    with pytest.raises(MemoryError):
        pipeline.run(copied / "recipe.yaml", copied / "out", overrides=overrides, make_stage=make)
    assert (copied / "out" / ".quantized.partial" / "half.bin").is_file()
    assert whole_stages(copied / "out") == sorted(STAGES)
    assert manifests(copied / "out") == before


def test_two_runs_at_once(copied: Path, counter: Counter) -> None:
    code = "import sys; from mlx_distill.pipeline import run; run(sys.argv[1], sys.argv[2])"
    with lock_folder(copied / "out"):
        done = subprocess.run(
            [sys.executable, "-c", code, copied / "recipe.yaml", copied / "out"],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert (
            done.returncode == 1
            and f"another run is using this folder (process {os.getpid()})" in done.stderr
        )
        assert to_do(copied) == set()  # reading is allowed
    counter.run(copied)
    assert counter.made == []


def test_temporary_files_of_a_killed_report_are_removed(copied: Path, counter: Counter) -> None:
    (copied / "out" / ".report.123.tmp.html").write_text("half")
    counter.run(copied)
    assert [p.name for p in (copied / "out").rglob(".*")] == [".lock"]


@pytest.mark.parametrize("options", [{"from_stage": "destill"}, {"only": "report"}])
def test_an_unknown_stage_is_refused(tmp_path: Path, options: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="no stage") as caught:
        pipeline.run(write_chain(tmp_path), tmp_path / "out", **options)  # type: ignore[arg-type]
    assert "prepare, convert, teach" in (caught.value.fix or "")


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({}, {}),
        ({"from_stage": "teach"}, {"teacher": "forced", "targets": "blocked", STUDENT: "blocked"}),
        ({"overrides": ["targets.top_k=4"]}, {"targets": "stale", "student": "blocked", TEACHER: "current"}),
    ],
)
def test_a_plan_has_the_kind_of_each_stages_status(options: dict[str, Any], kinds: dict[str, str]) -> None:
    plan = pipeline.run(finished() / "recipe.yaml", finished() / "out", dry_run=True, **options)
    assert isinstance(plan, Plan)
    found = {row["writes"]: row["status"] for row in plan.stages}
    assert {name: found[str(finished() / "out" / name)] for name in kinds} == kinds
    assert kinds or set(found.values()) == {"current", "missing"}  # the report is always written


def test_a_server_follows_a_run_by_its_events_and_stops_it_by_a_flag(copied: Path) -> None:
    stop, seen, handlers = StopFlag(), [], set()
    before = signal.getsignal(signal.SIGINT)

    def follow(event: dict[str, Any]) -> None:
        seen.append(event)
        handlers.add(signal.getsignal(signal.SIGINT))
        stop.set = event["event"] == "training_row"

    def run(**options: Any) -> Any:
        overrides = ["teach.seed=1"]
        return pipeline.run(
            copied / "recipe.yaml",
            copied / "out",
            only="teach",
            overrides=overrides,
            events=follow,
            **options,
        )

    with pytest.raises(Interrupted):
        run(stop=stop)
    assert handlers == {before}
    assert [event["event"] for event in seen[:3]] == ["note", "stage_started", "task_started"]
    place = {"stage": "teacher", "command": "teach", "run": str(copied / "out")}
    assert seen[1] == {"event": "stage_started", **place}
    rows = [event["row"] for event in seen if event["event"] == "training_row"]
    assert [(row["stage"], row["step"]) for row in rows] == [("teach", 1)]
    json.dumps(seen)
    seen.clear()
    run()
    assert [event["row"]["step"] for event in seen if event["event"] == "training_row"] == [2, 3, 4, 5]
    assert (seen[-1]["event"], seen[-1]["stage"]) == ("stage_made", "teacher")
    seen.clear()
    run()
    assert [event["event"] for event in seen] == ["note", "stage_current"]


# --- fingerprints -------------------------------------------------------------------------------------------


def test_a_fingerprint_depends_on_contents_and_not_on_the_path(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "sub" / "a.bin").write_bytes(b"abc")
    one, two = (str(tmp_path / name) for name in ("one", "two"))
    assert fingerprint(one) == fingerprint(two)
    assert fingerprint(f"{one}/config.json") == fingerprint(f"{two}/config.json") != fingerprint(one)
    (tmp_path / "two" / ".cache").write_text("hidden files do not count")
    assert fingerprint(one) == fingerprint(two)
    (tmp_path / "two" / "sub" / "a.bin").rename(tmp_path / "two" / "sub" / "b.bin")
    assert fingerprint(one) != fingerprint(two)
    assert fingerprint("org/name@main") != fingerprint("org/name@v1")


def test_the_fingerprint_of_a_large_file_covers_its_size_and_beginning(tmp_path: Path) -> None:
    path = tmp_path / "model" / "shard.safetensors"
    path.parent.mkdir()
    raw = bytes(3 << 20)
    found = []
    for content in (raw, raw[:-1] + b"x", b"x" + raw[1:], raw + b"x"):
        path.write_bytes(content)
        found.append(fingerprint(str(path.parent), hashed_whole=2 << 20))
    assert found[0] == found[1] and len(set(found)) == 3
