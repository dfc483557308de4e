"""A newcomer's walk: a task and rows of their own in a copy of the packaged recipe, with too few steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from helpers.html_page import assert_loads_nothing

from mlx_distill.cli.main import cli

TASK = """
name: triage
description: Send a support ticket to the right queue and say how urgent it is.
system: Triage the support ticket. Answer with one JSON object.
user: |
  {subject}

  {body}
title: subject
id: ticket_id
label: queue
score: urgency
slices: [channel]
max_answer_tokens: 24
schema:
  type: object
  additionalProperties: false
  required: [queue, urgency]
  properties:
    queue: {type: string, enum: [billing, technical, account]}
    urgency: {type: integer, minimum: 0, maximum: 100}
"""
TICKETS = {
    "billing": "I was charged twice for my {thing} in week {i}",
    "technical": "The {thing} shows error {i} when it starts",
    "account": "I cannot log in to my {thing} since day {i}",
}


def rows(count: int) -> list[dict[str, Any]]:
    things, channels, out = ["planner", "router", "mailbox", "camera"], ["email", "chat"], []
    for i in range(count):
        queue = list(TICKETS)[i % 3]
        body = TICKETS[queue].format(thing=things[i % 4], i=i)
        answer = {"queue": queue, "urgency": 10 + 7 * i % 80}
        row = {"ticket_id": f"T{i}", "subject": body.split()[1], "body": body, "channel": channels[i % 2]}
        out.append({**row, "answer": answer})
    return out


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli, [*arguments])


@pytest.mark.slow
def test_a_task_of_ones_own_reaches_the_gate_and_with_force_a_report_that_says_what_is_wrong(
    tmp_path: Path,
) -> None:
    recipe, out = tmp_path / "recipe.yaml", str(tmp_path / "out")
    assert call("recipes", "copy", "tiny", str(recipe)).exit_code == 0
    (tmp_path / "task.yaml").write_text(TASK, encoding="utf-8")
    lines = "".join(json.dumps(row) + "\n" for row in rows(30))
    (tmp_path / "tickets.jsonl").write_text(lines, encoding="utf-8")
    raw = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    data = {"sources": [{"path": "tickets.jsonl"}], "valid_fraction": 0.1, "test_fraction": 0.2}
    raw |= {
        "name": "triage",
        "task": "task.yaml",
        "data": data,
        "evaluate": {"models": ["student"], "audit_rows": 4},
    }
    for stage in ("teach", "distill"):
        raw[stage] |= {"steps": 2, "batch_size": 4}
    recipe.write_text(yaml.safe_dump(raw), encoding="utf-8")

    stopped = call("run", str(recipe), "--out", out)
    assert stopped.exit_code == 3, stopped.output
    message, fix = stopped.stderr.splitlines()[-2:]
    assert message.startswith("error: targets: 0 of 24 answers of the teacher fit the task (0 %")
    assert "such as row T" in message and fix.startswith("fix: train the teacher longer (it had 2 steps)")
    assert "--force" in fix

    forced = call("run", str(recipe), "--out", out, "--force")
    assert forced.exit_code == 0, forced.output
    assert "targets: current" in forced.stderr and "going on, as asked" in forced.stderr
    assert "problem: Only 0 of 24 answers of the teacher on training rows fit the task" in forced.stdout
    assert "problem: The answers of the student are mostly invalid: 0 % fit" in forced.stdout.replace(
        "\u202f", " "
    )
    page = assert_loads_nothing((tmp_path / "out" / "report.html").read_text(encoding="utf-8")).text
    assert "Diagnosis" in page[: page.index("Held-out rows")]
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert all(set(entry) == {"problem", "reason", "fix"} for entry in report["diagnosis"])
