"""Tokens, the login, errors and health of the server."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
from helpers.served import TOKEN, client_of, make_app

from mlx_distill.cli import cli
from mlx_distill.errors import ConfigError, DataError, FileError, QualityGateError
from mlx_distill.ledger.root import Root
from mlx_distill.serve.errors import ApiError
from mlx_distill.serve.settings import ServerSettings
from mlx_distill.serve.tokens import Tokens, find_token, new_token


@pytest.fixture
def app(tmp_path: Path) -> Any:
    return make_app(tmp_path, model=None, start_jobs=False)


def test_health_is_public_and_ready_says_more_with_the_token(app: Any) -> None:
    with client_of(app, token=False) as client:
        assert client.get("/health").json()["status"] == "ok"
        assert client.get("/ready").json() == {"status": "ready"}
        assert client.get("/ready", headers={"authorization": f"Bearer {TOKEN}"}).json()["models"] == []


def test_a_wrong_token_is_refused_in_openais_envelope(app: Any) -> None:
    with client_of(app, token=False) as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {TOKEN}"}):
            answer = client.get("/v1/models", headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["x-request-id"].startswith("req-")


def test_pages_take_the_cookie_of_the_login_and_v1_does_not(app: Any) -> None:
    app.add_api_route("/page", lambda: "a page")
    app.add_api_route("/v1/probe", lambda: "data")
    with client_of(app, token=False) as client:
        there = client.get("/page?x=1", headers={"accept": "text/html"})
        assert (there.status_code, there.headers["location"]) == (303, "/login?next=%2Fpage%3Fx%3D1")
        assert client.get("/page", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 401
        assert client.post("/login", data={"token": "wrong"}).status_code == 401
        login = client.post("/login", data={"token": TOKEN, "next": "/page?x=1"})
        assert (login.status_code, login.headers["location"]) == (303, "/page?x=1")
        cookie = login.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=strict" in cookie and TOKEN not in cookie
        assert client.get("/page").text == '"a page"'
        assert client.get("/v1/probe").status_code == 401
        client.post("/logout")
        assert client.get("/page").status_code == 401


@pytest.mark.parametrize("target", ["//evil.example", "https://evil.example", "/\\evil.example", "x"])
def test_the_login_leads_to_no_other_site(app: Any, target: str) -> None:
    with client_of(app, token=False) as client:
        assert client.post("/login", data={"token": TOKEN, "next": target}).headers["location"] == "/"


def test_errors_have_a_status_and_no_traceback(app: Any, caplog: Any) -> None:
    errors = {
        "config": (ConfigError("a", fix="b"), 400),
        "data": (DataError("a"), 400),
        "file": (FileError("a"), 503),
        "gate": (QualityGateError("a"), 422),
        "api": (ApiError(409, "a", code="finished"), 409),
        "bug": (RuntimeError("secret /etc/passwd"), 500),
    }

    def fail(kind: str, number: int = 0) -> None:
        raise errors[kind][0]

    app.add_api_route("/v1/fail/{kind}", fail)
    with client_of(app) as client:
        for kind, (_, status) in errors.items():
            answer = client.get(f"/v1/fail/{kind}")
            assert answer.status_code == status
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
            assert "secret" not in answer.text and "Traceback" not in answer.text
            if kind == "bug":
                assert answer.headers["x-request-id"] in caplog.text and "secret" in caplog.text
            if kind in ("api", "file", "bug"):
                assert answer.headers["x-should-retry"] == "false"
        wrong = client.get("/v1/fail/api?number=x").json()["error"]
        assert wrong["param"] == "number" and wrong["type"] == "invalid_request_error"
        assert client.get("/v1/absent").status_code == 404
        assert client.put("/health").status_code == 405


def test_a_page_shows_an_error_as_text(app: Any) -> None:
    def fail() -> None:
        raise DataError("<script>alert(1)</script>")

    app.add_api_route("/page", fail)
    with client_of(app, cookie=True) as client:
        page = client.get("/page", headers={"accept": "text/html"})
    assert page.status_code == 400 and "<script>" not in page.text and "&lt;script&gt;" in page.text


def test_the_tokens_file_is_private_and_made_once(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("MLX_DISTILL_TOKEN", raising=False)
    root = Root.at(tmp_path)
    assert find_token(root) == (None, True)
    assert stat.S_IMODE(os.stat(root.token).st_mode) == 0o600
    first = root.token.read_text()
    assert find_token(root) == (None, False)
    assert root.token.read_text() == first
    monkeypatch.setenv("MLX_DISTILL_TOKEN", "a-token-of-the-environment")
    assert find_token(root) == ("a-token-of-the-environment", False)
    monkeypatch.setenv("MLX_DISTILL_TOKEN", "short")
    with pytest.raises(ConfigError, match="characters"):
        find_token(root)
    monkeypatch.delenv("MLX_DISTILL_TOKEN")
    root.token.chmod(0o644)
    with pytest.raises(ConfigError, match="other users may read it"):
        find_token(root)


def test_a_new_token_replaces_the_old_one_in_a_running_server(tmp_path: Path, monkeypatch: Any) -> None:
    root = Root.at(tmp_path)
    old = new_token(root)
    tokens = Tokens(root)
    session = tokens.session
    assert tokens.is_token(old) and tokens.is_session(session)
    new = new_token(root)
    tokens._looked -= 2
    assert tokens.is_token(new) and not tokens.is_token(old) and not tokens.is_session(session)


def test_the_command_rotates_the_token(tmp_path: Path, runner: Any) -> None:
    result = runner.invoke(cli, ["serve", "--root", str(tmp_path), "--new-token"])
    assert result.exit_code == 0
    assert result.output.strip() == (tmp_path / ".mlx-distill" / "token").read_text().strip()


def test_a_port_in_use_and_an_open_host_without_token_are_said(
    tmp_path: Path, runner: Any, monkeypatch: Any
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = runner.invoke(cli, ["serve", "--root", str(tmp_path), "--port", str(port)])
    assert result.exit_code == 2 and f"port {port} of 127.0.0.1 is in use" in result.output
    monkeypatch.delenv("MLX_DISTILL_TOKEN", raising=False)
    result = runner.invoke(cli, ["serve", "--root", str(tmp_path), "--host", "0.0.0.0", "--port", "0"])
    assert result.exit_code == 2 and "MLX_DISTILL_TOKEN" in result.output


def test_settings_have_one_home() -> None:
    """The command's defaults are those of the settings."""
    from mlx_distill.cli.serve import serve

    settings = ServerSettings(Root.at("."))
    for parameter in serve.params:
        if hasattr(settings, parameter.name or "") and parameter.name not in ("root", "allowed_hosts"):
            assert parameter.to_info_dict()["default"] in (getattr(settings, str(parameter.name)), None)
