"""The frame of the dashboard's pages: vendored files, static files, the policy, macros."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse
from fastapi.testclient import TestClient

from mlx_distill.config import ASSETS
from mlx_distill.ledger.root import Root
from mlx_distill.serve.pages import login, static
from mlx_distill.serve.pages.environment import (
    CommandLine,
    command_line,
    environment,
    error_page,
    page,
    wants_fragment,
)

FOLDER = ASSETS / "serve"


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    app = FastAPI()
    app.state.server = SimpleNamespace(root=Root.at(tmp_path))
    for module in (static, login):
        app.include_router(module.router)

    @app.get("/error")
    def error(request: Request, text: str) -> HTMLResponse:
        return error_page(request, 404, text, "look again")

    return TestClient(app)


def test_vendored_files_are_those_that_the_list_names() -> None:
    listed = dict(
        re.findall(r"^\| `([^`]+)` .* ([0-9a-f]{64}) \|$", (FOLDER / "vendor/README.md").read_text(), re.M)
    )
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (FOLDER / "vendor").iterdir()
        if path.suffix in (".js", ".css")
    }
    assert listed == found


def test_static_files_are_kept_by_browsers_only_under_their_hash(client: TestClient) -> None:
    url = static.static_url("dashboard.css")
    answer = client.get(url)
    assert answer.status_code == 200 and "immutable" in answer.headers["cache-control"]
    assert answer.headers["content-type"] == "text/css; charset=utf-8"
    plain = client.get("/static/dashboard.css")
    assert plain.headers["cache-control"] == "no-cache"
    again = client.get("/static/dashboard.css", headers={"if-none-match": plain.headers["etag"]})
    assert again.status_code == 304 and again.content == b""


@pytest.mark.parametrize("name", ["../base.html.j2", "%2e%2e/base.html.j2", "vendor/README.md", "x", ""])
def test_only_listed_files_are_served(client: TestClient, name: str) -> None:
    assert client.get(f"/static/{name}").status_code == 404


def test_policy_allows_scripts_only_with_the_pages_nonce(client: TestClient) -> None:
    first, second = client.get("/login"), client.get("/login")
    nonces = [re.findall(r'nonce="([^"]+)"', answer.text) for answer in (first, second)]
    assert nonces[0] and len(set(nonces[0])) == 1 and nonces[0] != nonces[1]
    rules = first.headers["content-security-policy"]
    assert f"script-src 'nonce-{nonces[0][0]}';" in rules and "default-src 'none'" in rules
    assert len(re.findall("<script", first.text)) == len(nonces[0])


def test_text_is_escaped_and_the_next_page_too(client: TestClient) -> None:
    attack = "<script>alert(1)</script>\"'"
    for answer in (
        client.get("/error", params={"text": attack}),
        client.get("/login", params={"next": attack}),
    ):
        assert attack not in answer.text and "&lt;script&gt;alert(1)" in answer.text
    assert client.get("/error", params={"text": attack}).status_code == 404


def test_command_stands_for_fields_of_the_form_and_names_the_root() -> None:
    line = command_line(Path("/a b"), "registry", "archive", "music:3", None, "--reason", "{reason}")
    assert line.text == "mlx-distill registry archive music:3 --reason REASON --root '/a b'"
    assert line.fields and not CommandLine(("{not a field}",)).fields
    assert command_line(Path.cwd(), "serve").text == "mlx-distill serve"


def test_templates_have_no_inline_script_handler_or_style() -> None:
    for path in FOLDER.glob("**/*.j2"):
        text = path.read_text(encoding="utf-8")
        environment().get_template(path.relative_to(FOLDER).as_posix())
        assert not re.search(r"\son[a-z]+=|javascript:|<style|https?://", text), path
        for tag in re.findall(r"<script[^>]*>", text):
            assert 'nonce="{{ nonce }}"' in tag and "src=" in tag, (path, tag)
        for tag in re.findall(r"<\w+[^<]*\shx-(?!nonce)[\w:-]+=[^<]*>", text):
            assert "hx-nonce" in tag, (path, tag)


def test_htmx_gets_a_block(client: TestClient) -> None:
    @client.app.get("/part")  # type: ignore[attr-defined]
    def part(request: Request) -> HTMLResponse:
        block = "main" if wants_fragment(request) else None
        return page(request, "error.html.j2", block=block, heading="Part", message="x", fix=None)

    assert "<html" in client.get("/part").text
    asked = client.get("/part", headers={"HX-Request": "true", "HX-Request-Type": "partial"})
    assert "<html" not in asked.text and 'role="alert"' in asked.text
    assert "<html" in client.get("/part", headers={"HX-Request": "true", "HX-Request-Type": "full"}).text
