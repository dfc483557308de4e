"""What is refused before any route is asked: foreign hosts and origins, long bodies, tokens in URLs."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.served import HEADERS, TOKEN, client_of, make_app, served_in_thread, write_root

BEARER = HEADERS["authorization"]


@pytest.fixture
def app(tmp_path: Path) -> Any:
    made = make_app(tmp_path, model=None, start_jobs=False, max_body=1000, max_upload=2000)
    made.add_api_route("/v1/probe", lambda: {"reached": True}, methods=["GET", "POST"])
    made.add_api_route("/probe", lambda: {"reached": True}, methods=["GET", "POST"])
    return made


def code(answer: Any) -> tuple[int, str | None]:
    if answer.status_code < 400:
        return answer.status_code, None
    return answer.status_code, answer.json()["error"]["code"]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost:1", 200),
        ("[::1]:8000", 200),
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("127.0.0.1.evil.example", 403),
        ("10.0.0.7:8000", 403),
        ("localhost@evil.example", 403),
        ("", 403),
    ],
)
def test_a_foreign_host_is_refused_whatever_its_port(app: Any, host: str, status: int) -> None:
    with client_of(app) as client:
        assert client.get("/v1/probe", headers={"host": host}).status_code == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": "http://127.0.0.1:8000"}, 200),
        ({"origin": "http://127.0.0.1:8001"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "same-origin", "origin": "http://127.0.0.1:8000"}, 200),
    ],
)
def test_a_page_of_another_origin_cannot_write(app: Any, headers: dict[str, str], status: int) -> None:
    with client_of(app, cookie=True) as client:
        assert client.post("/v1/probe", headers=headers).status_code == status
        assert client.post("/probe", headers=headers).status_code == status
        assert client.get("/probe", headers=headers).status_code == 200


def test_a_form_without_the_token_reaches_nothing(app: Any) -> None:
    with client_of(app, token=False, cookie=True) as client:
        form = client.post("/v1/probe", data={"a": "b"})
        upload = client.post("/v1/files", files={"file": ("x", b"y")}, data={"purpose": "fine-tune"})
        assert code(form) == code(upload) == (401, "invalid_api_key")
    with client_of(app, token=False) as client:
        assert client.post("/probe", data={"a": "b"}).status_code == 401


@pytest.mark.parametrize("query", ["token=x", "access_token=", "API_KEY=x", f"x={TOKEN}"])
def test_a_token_in_the_url_is_refused_with_the_right_header_too(app: Any, query: str) -> None:
    with client_of(app) as client:
        assert code(client.get(f"/v1/probe?{query}")) == (400, "token_in_url")
    with client_of(app, token=False, cookie=True) as client:
        assert client.get(f"/probe?{query}").status_code == 400


def test_a_long_body_is_refused(app: Any) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(100):
            yield b"x" * 100

    with client_of(app) as client:
        assert code(client.post("/v1/analyze", content=b"x" * 1001)) == (413, "body_too_large")
        assert code(client.post("/v1/analyze", content=parts())) == (413, "body_too_large")
        assert client.post("/v1/analyze", content=b"x" * 1000).status_code == 400
        assert code(client.post("/v1/files", content=b"x" * 2001)) == (413, "body_too_large")


@pytest.mark.slow
def test_a_gigabyte_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    with served_in_thread(write_root(tmp_path), model=None, start_jobs=False) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            head = f"POST /v1/analyze HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: {BEARER}\r\n"
            connection.sendall(f"{head}Content-Length: {1 << 30}\r\n\r\n".encode())
            answer = connection.recv(4096).decode()
    assert answer.startswith("HTTP/1.1 413") and "connection: close" in answer.lower()


@pytest.mark.parametrize("path", ["/v1/models/../../etc/passwd", "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd"])
def test_no_path_leads_out_of_the_root(app: Any, path: str) -> None:
    with client_of(app) as client:
        answer = client.get(path)
        assert answer.status_code in (401, 404) and "root:" not in answer.text


def test_every_answer_has_the_headers_that_browsers_need(app: Any) -> None:
    with client_of(app) as client:
        for answer in (client.get("/health"), client.get("/v1/probe"), client.get("/v1/nothing")):
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["x-frame-options"] == "DENY"
            assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
            assert "access-control-allow-origin" not in answer.headers
