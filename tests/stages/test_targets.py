"""The stage that writes the teacher's targets: what it says before it starts, what its cache holds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.small_chain import finished, make_context
from helpers.targets import rewrite_targets

from mlx_distill import inspection
from mlx_distill.distill.teacher_cache import TargetReader
from mlx_distill.distill.token_codec import TokenLayout
from mlx_distill.errors import ConfigError, DataError, FileError
from mlx_distill.stages.distill import distill as distill_stage
from mlx_distill.stages.targets import check_tail, estimated_bytes
from mlx_distill.stages.targets import targets as targets_stage
from mlx_distill.text import percent


@pytest.mark.slow
def test_what_is_stated_before_it_starts_is_what_it_takes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows' own answers, with a temperature and labels: within 3 % of the files."""
    context = make_context(
        "targets.text=data", "targets.max_rows=30", "distill.temperature=2", "targets.top_k=200"
    )
    facts = targets_stage(context, folder)
    reader, labels = TargetReader(folder), len(context.task.labels)
    rows = [(row.id, row.text, len(row.ids)) for row in reader]
    assert estimated_bytes(reader.layout, rows, labels) * len(rows) == pytest.approx(facts["bytes"], rel=0.03)
    note = next(note for note in context.progress.notes if "on disk" in note)  # type: ignore[attr-defined]
    assert f"{len(rows)} answers of about" in note and f"{reader.layout.record_bytes} bytes a token" in note
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    (folder / "index.json").unlink()
    for path in folder.glob("*-0*"):
        path.unlink()
    with pytest.raises(FileError, match=r"1\.0 kB are free, and the targets need more"):
        targets_stage(context, folder)
    assert not list(folder.glob("tokens-*"))


def test_the_estimate_of_a_row_counts_records_line_and_labels() -> None:
    layout = TokenLayout(columns=1000, top_k=4)
    line = json.dumps({"id": "a", "sample": 0, "text": "ä", "tokens": 3}, ensure_ascii=False) + "\n"
    assert estimated_bytes(layout, [("a", "ä", 3)], 2) == 3 * layout.record_bytes + len(line.encode()) + 12
    assert estimated_bytes(layout, [("a", "ä", 3)] * 5, 0) == 3 * layout.record_bytes + len(line.encode())


def test_inspect_shows_tokens_bytes_a_token_and_the_mass_that_is_kept() -> None:
    folder = finished() / "out" / "targets"
    reader, facts = TargetReader(folder), inspection.inspect(folder, verify=True).facts
    tokens = sum(len(row.ids) for row in reader)
    mass = np.concatenate([np.exp(row.topk_logprobs.astype(float)).sum(axis=1) for row in reader])
    whole = sum(path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json")
    assert facts["rows"] == str(len(reader)) and facts["tokens"] == f"{tokens:,}"
    assert facts["kept"] == f"top 8, {percent(mass.mean(), 2)} of the mass"
    shown = float(facts["bytes a token"].split(",")[0])
    assert (
        shown == pytest.approx(whole / tokens, abs=0.06)
        and f"which {reader.layout.record_bytes}" in facts["bytes a token"]
    )


@pytest.mark.parametrize("name", ["weights", "adapter", "tokenizer", "template", "rows", "system"])
def test_targets_of_anything_else_are_refused_by_name(run_copy: Path, folder: Path, name: str) -> None:
    rewrite_targets(run_copy, **{name: "other"})
    with pytest.raises(DataError, match=f"targets of another {name} ") as caught:
        distill_stage(make_context(run=run_copy), folder)
    assert "mlx-distill targets" in (caught.value.fix or "")


def test_a_top_k_with_one_percent_or_more_outside_at_a_temperature_is_refused(folder: Path) -> None:
    check_tail({"tail_mass_at": {"2.0": 0.0099}}, 8)
    with pytest.raises(ConfigError, match=r"temperature: 2.0: the 8 most probable tokens hold 99"):
        check_tail({"tail_mass_at": {"2.0": 0.01}}, 8)
    context = make_context(
        "targets.text=data", "distill.temperature=8", "distill.token_loss=uld", "targets.top_k=2"
    )
    with pytest.raises(ConfigError, match=r"temperature: 8.0: the 2 most probable tokens hold") as caught:
        targets_stage(context, folder)
    assert "targets.top_k" in (caught.value.fix or "") and not (folder / "index.json").exists()
