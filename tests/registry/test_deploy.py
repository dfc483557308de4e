"""What serves: gates, promote, rollback, archive, analyzers outside of the registry."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from click.testing import CliRunner
from helpers.registry_runs import make_run, make_task

from mlx_distill.cli import cli
from mlx_distill.errors import ConfigError, ModelError, QualityGateError
from mlx_distill.ledger.database import Ledger
from mlx_distill.ledger.root import Root
from mlx_distill.registry import (
    GateLimits,
    add_version,
    archive,
    call_external,
    current_deployment,
    delete_files,
    get_version,
    history,
    promote,
    promote_external,
    resolve_model,
    rollback,
    verify_version,
)
from mlx_distill.registry.verify import compare_golden

WHO = {"actor": "ann", "reason": "a try"}
ROWS = [{"id": "a", "text": "Night."}, {"id": "b", "text": "Day."}]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with three versions: 1 is right, 2 has a wrong answer, 3 is much worse, leaks, and often answers
    no JSON.
    """
    root = tmp_path_factory.mktemp("root")
    goal = {"model": "quantized", "metric": "accuracy", "at_least": 0.9, "unit": "share", "measured": None}
    missed = {**goal, "state": "missed", "met": False}
    make_run(root / "runs/one", seed=1, n=120)
    make_run(root / "runs/two", seed=2, n=120, wrong=[0])
    bad = {"n": 120, "wrong": range(40), "invalid": range(40, 60), "leaked": [1, 2], "latency_s": 9.0}
    make_run(root / "runs/bad", seed=3, goals=[missed], **bad)  # type: ignore[arg-type]
    ledger = Ledger(Root.at(root))
    for run in ("one", "two", "bad"):
        add_version(ledger, f"runs/{run}", name="music")
    return root


@pytest.fixture
def ledger(made: Path, tmp_path: Path) -> Ledger:
    shutil.copytree(made, tmp_path / "root")
    return Ledger(Root.at(tmp_path / "root"))


def states(gate: Mapping[str, Any]) -> dict[str, str]:
    return {check["name"]: check["state"] for check in gate["checks"]}


def test_promote_roll_back_and_archive(ledger: Ledger) -> None:
    first = promote(ledger, "music", 1, **WHO, settings={"context_length": 512})
    assert (first.serves, first.previous, first.gate["against"]) == ("music:1", None, None)
    assert first.gate["passed"] and first.gate["verified"]["passed"]
    second = promote(ledger, "music", 2, **WHO, limits=GateLimits(margin="10pt"))
    assert (second.previous, dict(second.settings)) == (first.id, {"context_length": 512})
    assert states(second.gate)["comparison"] == "passed"
    assert resolve_model(ledger, "music").version == 2
    with pytest.raises(ModelError, match="production serves"):
        archive(ledger, "music", 2)
    back = rollback(ledger, "music", actor="bob", reason="complaints")
    assert (back.kind, back.version, back.previous, back.actor) == ("rollback", 1, second.id, "bob")
    assert resolve_model(ledger, "music@production").version == 1
    with pytest.raises(ModelError, match="nothing served before"):
        rollback(ledger, "music", **WHO)
    with pytest.raises(ModelError, match="never served 3"):
        rollback(ledger, "music", to=3, **WHO)
    assert archive(ledger, "music", 2).state == "ARCHIVED"
    with pytest.raises(ModelError, match="archived"):
        promote(ledger, "music", 2, **WHO)
    with pytest.raises(ModelError, match="archived"):
        rollback(ledger, "music", to=2, **WHO)
    assert archive(ledger, "music", 2, restore=True).state == "READY"
    assert rollback(ledger, "music", to=2, **WHO).version == 2
    assert [done.id for done in history(ledger, "music")] == [4, 3, 2, 1]
    assert [done.previous for done in history(ledger, "music")] == [3, 2, 1, None]


def test_a_number_is_not_given_again_after_archive(ledger: Ledger) -> None:
    archive(ledger, "music", 3)
    make_run(ledger.root.path / "runs/new", seed=8)
    assert add_version(ledger, "runs/new", name="music").number == 4
    assert add_version(ledger, "runs/bad", name="music").state == "ARCHIVED"


def test_the_files_of_an_archived_version_are_deleted_and_come_back(ledger: Ledger) -> None:
    root = ledger.root.path
    promote(ledger, "music", 1, **WHO)
    with pytest.raises(ModelError, match="production serves"):
        delete_files(ledger, "music", 1)
    before = get_version(ledger, "music", 2)
    source, kept = str(before.info["source"]), root / before.kept
    deleted = delete_files(ledger, "music", 2)
    assert deleted.files > 0 and deleted.freed > 1e5 and not kept.exists()  # copies, see the fixture
    version = get_version(ledger, "music", 2)
    assert (version.state, version.sha) == ("ARCHIVED", before.sha) and version.files_deleted is not None
    assert version.info["files"] == before.info["files"]
    assert json.loads((kept.parent / "version_info.json").read_text())["files_deleted"]
    assert delete_files(ledger, "music", 2).files == 0  # again: nothing is left to do
    assert not verify_version(ledger, version).passed
    assert get_version(ledger, "music", 2).state == "ARCHIVED"
    with pytest.raises(ModelError, match="its files were deleted"):
        archive(ledger, "music", 2, restore=True)
    with pytest.raises(ModelError, match=r"its files were deleted.*registry add .* --name music"):
        resolve_model(ledger, "music:2")
    again = add_version(ledger, source.partition("/quantized")[0], name="music")
    assert (again.number, again.state, again.files_deleted) == (2, "ARCHIVED", None)
    assert archive(ledger, "music", 2, restore=True).state == "READY"
    assert verify_version(ledger, again).passed
    linked = delete_files(ledger, "music", 2)
    assert (linked.files, linked.freed) == (deleted.files, 0)  # the run has the same files


def test_a_gate_refuses_what_is_shown_to_be_bad(ledger: Ledger) -> None:
    promote(ledger, "music", 1, **WHO)
    with pytest.raises(QualityGateError) as caught:
        promote(ledger, "music", 3, **WHO)
    gate = caught.value.facts["gate"]
    assert states(gate) == {
        "goals": "failed",
        "comparison": "failed",
        "groups": "failed",
        "invalid": "failed",
        "latency": "no_limit",
        "leaks": "failed",
    }
    assert resolve_model(ledger, "music").version == 1
    with pytest.raises(ConfigError, match="no override"):
        promote(ledger, "music", 3, **WHO, override=" ")
    done = promote(ledger, "music", 3, **WHO, override="the only one that loads")
    assert (done.gate["passed"], done.gate["override"]) == (False, "the only one that loads")


@pytest.mark.parametrize(
    ("limits", "check", "state"),
    [
        ({"margin": "1pt"}, "comparison", "undecided"),
        ({"max_false_positive_rate": 0.05}, "groups", "undecided"),
        ({"max_invalid": 0.001}, "invalid", "undecided"),
        ({"max_p95_s": 0.01}, "latency", "failed"),
        ({"require": ("goals",)}, "goals", "not_measured"),
        ({"metric": "accurcy"}, "comparison", "not_measured"),
    ],
)
def test_what_was_asked_for_has_to_hold(
    ledger: Ledger, limits: Mapping[str, Any], check: str, state: str
) -> None:
    promote(ledger, "music", 1, **WHO)
    with pytest.raises(QualityGateError) as caught:
        promote(ledger, "music", 2, **WHO, limits=GateLimits(**limits))
    gate = caught.value.facts["gate"]
    assert [(c["name"], c["state"]) for c in gate["checks"] if c["refuses"]] == [(check, state)]


def test_a_version_without_an_evaluation_is_not_measured(ledger: Ledger) -> None:
    add_version(ledger, "asset:models/tiny-qwen3", name="base")
    with pytest.raises(QualityGateError, match="no evaluation"):
        promote(ledger, "base", 1, **WHO, limits=GateLimits(max_invalid=0.5))
    done = promote(ledger, "base", 1, **WHO)
    assert set(states(done.gate).values()) == {"not_measured"}
    assert (done.gate_text, done.gate_held) == ("no condition was set; nothing was checked", False)


def test_a_gate_without_a_condition_is_not_told_as_passed(ledger: Ledger) -> None:
    first = promote(ledger, "music", 1, **WHO)
    assert (first.gate_text, first.gate_held) == (
        "no condition was set; passed by default: invalid and leaks",
        False,
    )
    second = promote(ledger, "music", 2, **WHO, limits=GateLimits(margin="10pt", max_invalid=0.05))
    assert (second.gate_text, second.gate_held) == ("the gate passed: comparison and invalid", True)
    # A margin against nothing: the comparison has nothing to judge.
    other = promote(ledger, "music", 1, "staging", **WHO, limits=GateLimits(margin="1pt"))
    assert other.gate_text == "comparison did not apply; passed by default: invalid and leaks"
    assert not other.gate_held


def test_a_corrupted_byte_refuses_and_the_alias_stays(ledger: Ledger) -> None:
    promote(ledger, "music", 1, **WHO)
    promote(ledger, "music", 2, **WHO)
    weights = sorted((ledger.root.path / get_version(ledger, "music", 1).path).glob("*.safetensors"))[0]
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(ModelError, match="its hash differs"):
        rollback(ledger, "music", **WHO)
    with pytest.raises(ModelError, match="its hash differs"):
        promote(ledger, "music", 1, **WHO, override="in a hurry")
    assert resolve_model(ledger, "music").version == 2
    assert get_version(ledger, "music", 1).state == "FAILED"
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert rollback(ledger, "music", **WHO).version == 1
    assert get_version(ledger, "music", 1).state == "READY"


def test_answers_of_another_machine_are_compared_by_their_labels() -> None:
    old = [{"id": "a", "text": '{"colour": "dark"}', "answer": {"colour": "dark"}, "label": "dark"}]
    spaced = [{**old[0], "text": '{"colour":"dark"}'}]
    other = [{**old[0], "text": "x", "answer": {"colour": "dark", "more": 1}}]
    wrong = [{**old[0], "text": "y", "answer": {"colour": "light"}, "label": "light"}]
    for answers, same, passed in (
        (old, "text", True),
        (spaced, "answer", True),
        (other, "label", True),
        (wrong, "different", False),
    ):
        rows, result, _ = compare_golden(old, answers, make_task(), False)
        assert (rows, result) == ([{"id": "a", "same": same}], passed)
    chat = [{"id": "a", "text": "Hello", "answer": None, "label": None}]
    answers = [{**chat[0], "text": "Hullo"}]
    assert compare_golden(chat, answers, None, False)[1]
    assert not compare_golden(chat, answers, None, True)[1]


def test_rollback_reaches_the_analyzer_that_was_replaced(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old_analyzer_of_test.py").write_text(
        "def colours(rows):\n    return [{'colour': 'dark'} for row in rows]\n"
        "def broken(rows):\n    return [{'colour': 'blue'} for row in rows]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    task, target = make_task(), "old_analyzer_of_test:colours"
    with pytest.raises(ModelError, match="does not fit the task"):
        promote_external(ledger, "music", "old_analyzer_of_test:broken", task=task, rows=ROWS, **WHO)
    assert current_deployment(ledger, "music") is None
    promote_external(ledger, "music", target, task=task, rows=ROWS, **WHO)
    resolved = resolve_model(ledger, "music")
    assert (resolved.path, resolved.target) == (None, target)
    assert [answer["label"] for answer in call_external(target, ROWS, task)] == ["dark", "dark"]
    with pytest.raises(QualityGateError, match="has no known answers"):
        promote(ledger, "music", 1, **WHO, limits=GateLimits(margin="3pt"))
    promote(ledger, "music", 1, **WHO)
    assert rollback(ledger, "music", **WHO).target == target
    assert resolve_model(ledger, "music").target == target


class _Service(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        items = json.loads(self.rfile.read(int(self.headers["content-length"])))["items"]
        moved = self.path == "/moved"
        self.send_response(307 if moved else 200)
        if moved:
            self.send_header("Location", "http://localhost:1/")
        self.end_headers()
        self.wfile.write(json.dumps({"results": [{"answer": {"colour": "light"}} for _ in items]}).encode())

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def service() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Service)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_analyzer_behind_a_url(service: str) -> None:
    task = make_task()
    answers = call_external(f"{service}/answer", ROWS, task)
    assert [(answer["id"], answer["label"]) for answer in answers] == [("a", "light"), ("b", "light")]
    with pytest.raises(ModelError, match="status 307"):
        call_external(f"{service}/moved", ROWS, task)
    for target in (
        "http://ann:hush@host/x",
        "https://host/x?key=hush",
        "file:///etc/passwd",
        "no target",
    ):
        with pytest.raises(ConfigError) as caught:
            call_external(target, ROWS, task)
        assert "hush" not in str(caught.value)


def _command(root: Path, *arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mlx_distill", "registry", *arguments, "--root", str(root)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **more)


@pytest.mark.slow
def test_two_processes_that_deploy_leave_a_linear_chain(ledger: Ledger) -> None:
    promote(ledger, "music", 1, **WHO)
    jobs: Sequence[tuple[str, ...]] = [("promote", f"music:{n}", "--reason", "at once") for n in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda arguments: _command(ledger.root.path, *arguments), jobs))
    assert [result.returncode for result in done] == [0, 0], [result.stderr for result in done]
    chain = history(ledger, "music")
    assert [entry.previous for entry in chain] == [chain[1].id, chain[2].id, None]
    serving = current_deployment(ledger, "music")
    assert serving is not None and serving.id == chain[0].id
    for entry, before in pairwise(chain):
        assert entry.gate["against"] == before.serves


@pytest.mark.slow
def test_a_process_killed_between_the_check_and_the_move_leaves_what_served(ledger: Ledger) -> None:
    promote(ledger, "music", 1, **WHO)
    code = (
        "import os, signal, sys\n"
        "from mlx_distill.registry import deploy, open_ledger\n"
        "deploy._move = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "deploy.promote(open_ledger(sys.argv[1]), 'music', 2, actor='a', reason='b')\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(ledger.root.path)], check=False, env=os.environ)
    assert result.returncode == -9
    assert resolve_model(ledger, "music").version == 1
    assert len(history(ledger, "music")) == 1
    assert promote(ledger, "music", 2, **WHO).previous == 1


def test_the_commands(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_DISTILL_ROOT", str(ledger.root.path))

    def call(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(cli, ["registry", *arguments])
        return result.exit_code, result.output

    assert call("promote", "music:1")[0] == 2
    code, text = call("promote", "music:1", "--reason", "first", "--actor", "ann")
    assert code == 0 and "music@production serves music:1" in text
    assert "gate        no condition was set; passed by default: invalid and leaks" in text
    assert call("promote", "music:3", "--reason", "x")[0] == 3
    code, text = call("promote", "music:3", "--reason", "x", "--override", "why not", "--json")
    assert code == 0 and json.loads(text)["gate"]["override"] == "why not"
    assert call("rollback", "music", "--reason", "worse", "--json")[0] == 0
    entries = json.loads(call("history", "music", "--json")[1])
    assert [entry["serves"] for entry in entries] == ["music:1", "music:3", "music:1"]
    code, text = call("show", "music:1", "--verify", "--json")
    assert code == 0 and json.loads(text)["verification"]["passed"]
    assert call("archive", "music:1")[0] == 1
    assert "(the gate was overridden: why not)" in call("history", "music")[1]
    assert json.loads(call("archive", "music:2", "--json")[1])["state"] == "ARCHIVED"
    assert "music:2  ARCHIVED" in call("list")[1]
    assert call("list", "musik")[0] == 1
    assert call("add", "runs/one", "--name", "music")[1].startswith("music:1")
    assert call("promote", "music", "--external", "a:b", "--reason", "x")[0] == 2
