"""Versions: content, numbers, names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.registry_runs import make_run

from mlx_distill.errors import ConfigError, FileError, ModelError
from mlx_distill.ledger.database import Ledger
from mlx_distill.ledger.root import Root
from mlx_distill.registry import add_version, get_version, lineage, list_models, list_versions, resolve_model
from mlx_distill.registry.figures import figures_of


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "one", seed=1)
    make_run(folder / "two", seed=2, wrong=[0, 1])
    return folder


@pytest.fixture
def root(tmp_path: Path, runs: Path) -> Path:
    shutil.copytree(runs, tmp_path / "runs")
    return tmp_path


@pytest.fixture
def ledger(root: Path) -> Ledger:
    return Ledger(Root.at(root))


def test_the_same_content_is_the_same_version(root: Path, ledger: Ledger) -> None:
    first = add_version(ledger, "runs/one", name="music", description="songs")
    assert (first.name, first.state, first.source_run) == ("music:1", "READY", "runs/one")
    shutil.copytree(root / "runs" / "one", root / "copy")
    assert add_version(ledger, "copy", name="music") == first
    second = add_version(ledger, "runs/two", name="music")
    assert second.number == 2 and second.sha != first.sha
    assert [version.number for version in list_versions(ledger, "music")] == [2, 1]
    (model,) = list_models(ledger)
    assert (model.name, model.description, model.versions) == ("music", "songs", (second, first))


def test_a_version_stays_when_its_run_is_made_again_or_deleted(root: Path, ledger: Ledger) -> None:
    version = add_version(ledger, "runs/one")
    weights = next((root / version.path).glob("*.safetensors"))
    assert weights.stat().st_ino == (root / "runs/one/quantized" / weights.name).stat().st_ino
    before = weights.read_bytes()
    shutil.rmtree(root / "runs" / "one")
    make_run(root / "runs" / "one", seed=9)
    assert weights.read_bytes() == before
    assert add_version(ledger, "runs/one").number == 2


def test_version_info_beside_the_ledger(root: Path, ledger: Ledger) -> None:
    version = add_version(ledger, "runs/two", name="music")
    info = json.loads((root / ".mlx-distill/versions/music/1/version_info.json").read_text())
    assert info == version.info
    assert (info["task"], info["recipe"], info["rows"]) == ("colours", "colours", {"train": 5})
    assert info["metrics"]["accuracy"] == {
        "value": 58 / 60,
        "low": 0.0,
        "high": 1.0,
        "n": 60,
        "unit": "share",
    }
    # As versions had it before figures had units.
    assert figures_of({"metrics": {"latency_s": 0.5, "old": None}}) == {
        "latency_s": {"value": 0.5, "low": None, "high": None, "n": None, "unit": "s"}
    }
    assert [row["id"] for row in info["golden"]] == ["r1000", "r1001", "r1002"]
    assert all(row["text"] for row in info["golden"])
    steps = lineage(ledger, version)
    assert [step["folder"] for step in steps] == ["quantized", "data"]
    assert steps[0]["versions"] == ["music:1"]
    assert steps[0]["parents"] == {"data": steps[1]["content"]}


def test_numbers_are_not_given_twice_after_the_loss_of_the_ledger(root: Path, ledger: Ledger) -> None:
    first = add_version(ledger, "runs/one", name="music")
    add_version(ledger, "runs/two", name="music")
    for file in (root / ".mlx-distill").glob("ledger.db*"):
        file.unlink()
    again = Ledger(Root.at(root))
    make_run(root / "runs" / "three", seed=3)
    assert add_version(again, "runs/three", name="music").number == 3
    found = add_version(again, "runs/one", name="music")
    assert (found.number, found.sha, found.info) == (1, first.sha, first.info)


def test_figures_of_another_training_are_not_taken(root: Path, ledger: Ledger) -> None:
    other = make_run(root / "other", seed=4)
    shutil.rmtree(root / "runs/one/quantized")
    shutil.copytree(other / "quantized", root / "runs/one/quantized")
    assert add_version(ledger, "runs/one").info["metrics"] == {}


def test_changed_and_foreign_files_are_refused(root: Path, ledger: Ledger) -> None:
    with open(root / "runs/one/quantized/config.json", "a") as file:
        file.write(" ")
    with pytest.raises(ModelError, match="no trained model"):
        add_version(ledger, "runs/one")
    with pytest.raises(FileError, match=r"config\.json has"):
        add_version(ledger, "runs/one/quantized", name="x")
    with pytest.raises(ConfigError, match="not under the root"):
        add_version(ledger, "/etc")
    with pytest.raises(ModelError, match="no such folder"):
        add_version(ledger, "runs/none")
    with pytest.raises(ConfigError, match="no name"):
        add_version(ledger, "runs/two", name="a/b")
    assert not list((root / ".mlx-distill").glob("versions/*/.*"))


def test_names_of_models(root: Path, ledger: Ledger) -> None:
    add_version(ledger, "runs/one", name="music")
    add_version(ledger, "runs/two", name="music")
    newest = resolve_model(ledger, "music")
    assert (newest.model, newest.version, newest.alias) == ("music", 2, None)
    assert newest.task is not None and newest.task.name == "colours"
    assert newest.sha == get_version(ledger, "music", 2).sha
    assert resolve_model(ledger, "music:1").version == 1
    assert resolve_model(ledger, "runs/one").path == root.resolve() / "runs/one/quantized"
    assert resolve_model(ledger, "runs/one:quantized").version is None
    assert resolve_model(ledger, "asset:models/tiny-qwen3").task is None


def test_unknown_names_are_refused(ledger: Ledger) -> None:
    add_version(ledger, "runs/one", name="music")
    names = ["music:7", "music@none", "Qwen/Qwen3-8B", "../runs/one", "/etc", "", ".", "job-1", "asset:../x"]
    for name in names:
        with pytest.raises(ModelError, match=r"no model|no version|no alias"):
            resolve_model(ledger, name)
    with pytest.raises(ModelError, match="did you mean 'music'"):
        resolve_model(ledger, "musik")


def test_the_model_of_a_job(root: Path, ledger: Ledger) -> None:
    with ledger.write() as db:
        db.execute(
            "INSERT INTO jobs (id, kind, title, arguments, run_path, state, created_at, error, request, "
            "result) VALUES ('job-12', 'run', 'one', '[]', 'runs/one', 'succeeded', 0, 'null', '0', '0')"
        )
    assert resolve_model(ledger, "job-12").path == root.resolve() / "runs/one/quantized"
    add_version(ledger, "runs/one", name="music")
    assert resolve_model(ledger, "ft:tiny:local:songs:job-12").version == 1
