"""The dashboard's pages over a root with a run, two versions and a comparison, and over an empty one."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner
from helpers.html_page import Page
from helpers.served import client_of, make_app
from helpers.small_chain import finished

from mlx_distill.cli.main import cli
from mlx_distill.ledger.database import Ledger
from mlx_distill.ledger.root import Root
from mlx_distill.registry import add_version
from mlx_distill.registry.comparisons import add_comparison, keep_comparison, list_comparisons, rows_file

PAGES = ("/", "/models", "/compare", "/costs")
ATTACK = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Root:
    """A folder with a finished run, its teacher and its student as two versions, and their comparison."""
    root = Root.at(tmp_path_factory.mktemp("root"))
    shutil.copytree(finished() / "out", root.path / "demo")
    ledger = Ledger(root)
    for model in ("teacher", "student"):
        add_version(ledger, f"demo:{model}", name="music", description=f"songs {ATTACK}")
    keep_comparison(ledger, "music:1", "music:2", margin="3pt")
    return root


@pytest.fixture(scope="module")
def client(root: Root) -> Iterator[Any]:
    with client_of(make_app(root, model=None, start_jobs=False), token=False, cookie=True) as client:
        yield client


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    app = make_app(tmp_path_factory.mktemp("empty"), model=None, start_jobs=False)
    with client_of(app, token=False, cookie=True) as client:
        yield client


def read_page(response: Any, status: int = 200) -> Page:
    """Check what every page must be: whole, without a script of its own, loading nothing from elsewhere."""
    assert response.status_code == status, response.text
    page = Page(response.text)
    assert not page.stack
    assert ATTACK not in response.text
    assert not re.search(r"(?:src|href|action)=\"(?:https?:)?//", response.text)
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        if tag == "label":
            continue
        if tag in ("input", "select", "textarea") and attributes.get("type") != "hidden":
            assert "name" in attributes
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    assert [tag for tag, _ in page.tags].count("h1") == 1
    return page


@pytest.mark.parametrize("path", PAGES)
def test_pages_of_an_empty_root_say_what_to_do_first(empty: Any, path: str) -> None:
    assert "mlx-distill " in read_page(empty.get(path)).text


@pytest.mark.slow
@pytest.mark.parametrize("path", [*PAGES, "/models/music", "/models/music/2"])
def test_pages_of_a_full_root(client: Any, path: str) -> None:
    read_page(client.get(path))


@pytest.mark.slow
def test_figures_of_a_version_are_percent_only_where_they_are_rates(client: Any) -> None:
    rows = client.get("/models/music/2").text.replace("\u202f", " ").split("<dt>")
    shown = {name: rest for name, _, rest in (row.partition("</dt>") for row in rows)}
    assert "%" in shown["accuracy"]
    assert "%" not in shown["items per minute"] and "%" not in shown["latency"]


def test_unknown_pages_are_pages(empty: Any) -> None:
    for path in (
        "/nothing",
        "/models/none",
        "/models/none/1",
        "/compare/cmp-0",
        "/compare/cmp-0/comparison.csv",
    ):
        answer = empty.get(path, headers={"accept": "text/html"})
        assert 'class="rail"' in answer.text
        read_page(answer, 404)


@pytest.mark.slow
def test_compare_page_makes_what_the_command_makes(client: Any, root: Root) -> None:
    form = {"a": "demo:teacher", "b": "music:2", "margin": "5pt", "metric": "", "rows": ""}
    made = client.post("/compare", data=form)
    assert made.status_code == 303
    id = made.headers["location"].rpartition("/")[2]
    arguments = ["compare", "demo:teacher", "music:2", "--margin", "5pt", "--keep", "--root", str(root.path)]
    printed = CliRunner().invoke(cli, arguments)
    assert printed.exit_code == 0 and f"kept as {id}" in printed.stderr
    page = read_page(client.get(made.headers["location"]))
    assert "music:2 in place of demo:teacher" in page.text
    for kind in ("json", "csv", "html"):
        assert client.get(f"/compare/{id}/comparison.{kind}").status_code == 200


@pytest.mark.slow
def test_comparison_whose_rows_are_gone_still_has_its_figures(client: Any, root: Root) -> None:
    ledger = Ledger(root)
    kept, result = keep_comparison(ledger, "music:2", "music:1", margin="7pt")
    of_a_gate = add_comparison(ledger, result, {"name": "music:2"}, {"name": "music:1"})
    read_page(client.get(f"/compare/{of_a_gate}"))
    rows_file(ledger, kept.id).write_text("{", encoding="utf-8")
    page = read_page(client.get(f"/compare/{kept.id}"))
    assert "gone or damaged" in page.text and kept.facts["sentence"] in page.text
    assert client.get(f"/compare/{kept.id}/comparison.csv").status_code == 404
    assert kept.id in {one.id for one in list_comparisons(ledger)}


@pytest.mark.parametrize(
    ("form", "problem"),
    [
        ({"a": "", "b": "x"}, "two models are needed"),
        ({"a": ATTACK, "b": "demo"}, "no model"),
        ({"a": "none", "b": "none:3"}, "no model"),
    ],
)
def test_compare_page_says_what_is_wrong(empty: Any, form: dict[str, str], problem: str) -> None:
    page = read_page(empty.post("/compare", data=form), 400)
    assert problem in page.text
    values = [a.get("value") for tag, a in page.tags if tag == "input" and a.get("name") == "a"]
    assert values == [form["a"]]
