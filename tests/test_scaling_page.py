"""The configurations of docs/scaling.md, as far as they can be checked without their tools."""

from __future__ import annotations

import ast
import json
import re
import shlex
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import click
import pytest
import yaml

from mlx_distill.cli import cli
from mlx_distill.ledger.database import Ledger
from mlx_distill.ledger.root import Root

_PAGE = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", _PAGE, re.DOTALL)


def commands(program: str) -> list[list[str]]:
    lines = [shlex.split(line) for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line[0] == program]


def our_commands() -> list[list[str]]:
    launched = [line[line.index("--") + 1 :] for line in commands("mlx.launch")]
    return [line[1:] for line in (*commands("mlx-distill"), *launched)]


def test_the_services_are_whole() -> None:
    [text] = blocks("yaml")
    compose = yaml.safe_load(text)
    mlflow = compose["services"]["mlflow"]
    assert set(mlflow["depends_on"]) <= set(compose["services"])
    assert all(port.startswith("127.0.0.1:") for port in mlflow["ports"])
    words = shlex.split(mlflow["command"])
    assert words[:2] == ["mlflow", "server"]
    assert all(word.startswith("--") for word in words[2::2]) and len(words) % 2 == 0
    assert {volume.partition(":")[0] for volume in compose["services"]["postgres"]["volumes"]} == {"postgres"}
    assert set(compose["volumes"]) == {"postgres"}


def test_the_queries_fit_the_ledger(tmp_path: Path) -> None:
    [script] = blocks("python")
    ledger = Ledger(Root.at(tmp_path))
    assigned = [node for node in ast.walk(ast.parse(script)) if isinstance(node, ast.Assign)]
    queries = [
        node.value.value
        for node in assigned
        if isinstance(node.value, ast.Constant) and str(node.value.value).startswith("SELECT")
    ]
    assert len(queries) == 2
    with closing(sqlite3.connect(f"file:{ledger.path}?mode=ro", uri=True)) as db:
        columns = [len(db.execute(query).description) for query in queries]
    assert columns == [5, 3]


def test_the_hosts_are_those_of_mlx_launch() -> None:
    [text] = blocks("json")
    assert all(set(host) == {"ssh", "ips"} and isinstance(host["ips"], list) for host in json.loads(text))


@pytest.mark.slow
def test_the_options_are_those_of_mlx_launch() -> None:
    program = Path(sys.executable).with_name("mlx.launch")
    if not program.exists():
        pytest.skip("mlx.launch is not beside this Python")
    known = subprocess.run([program, "--help"], capture_output=True, text=True, check=True).stdout
    used = [word for line in commands("mlx.launch") for word in line[1 : line.index("--")] if word[0] == "-"]
    assert used and all(re.search(rf"(?<![\w-]){word}(?![\w-])", known) for word in used)


@pytest.mark.parametrize("words", our_commands(), ids=" ".join)
def test_our_own_commands_are_parsed(words: list[str]) -> None:
    context = click.Context(cli)
    command = cli.get_command(context, words[0])
    assert command is not None
    command.make_context(words[0], words[1:], parent=context)
