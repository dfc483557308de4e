"""What stands before every route: who may ask, from where, and how much a request may hold.

``/v1`` takes only the Bearer token: a page of another site cannot send that header, while it could send a
form with cookies. Pages take only the cookie of ``POST /login``. Whatever is not named here as public needs
one of the two.
"""

from __future__ import annotations

import ipaddress
import uuid
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_distill.serve.errors import ApiError, response, unexpected
from mlx_distill.serve.settings import ServerSettings
from mlx_distill.serve.tokens import Tokens

PUBLIC = ("/health", "/ready", "/login", "/favicon.ico")
PUBLIC_FOLDERS = ("/static/",)
EITHER = ("/metrics",)  # token or cookie
UPLOADS = ("/v1/files", "/data/upload")  # whose bodies may be as long as an upload
_WRITES = {"POST", "PUT", "PATCH", "DELETE"}
_IN_URL = {"token", "access_token", "api_key", "apikey", "api-key", "authorization"}
_LOOPBACK = ("127.0.0.1", "localhost", "::1")

_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",  # with no-referrer a browser's own forms would have the origin null
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
    # Of what is no page; the pages have their own, with a nonce.
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'",
}


class _TooLarge(Exception):  # noqa: N818 - ends the reading of a body
    """A body without a length was longer than it may be."""


class Guard:
    """The outermost middleware, in plain ASGI so that bodies stream through it.

    Each request gets ``request.state.request_id``, ``authenticated`` (``"token"``, ``"cookie"`` or None) and
    ``error`` (the :class:`~mlx_distill.serve.errors.ApiError` that it was answered with, or None).

    Args:
        app: The application.
        settings: The server's.
        tokens: Its token.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, tokens: Tokens) -> None:
        self.app, self.settings, self.tokens = app, settings, tokens
        self.hosts = {name.lower().strip("[]") for name in (*_LOOPBACK, settings.host)}
        self.hosts |= {name.lower().strip("[]") for name in settings.allowed_hosts}
        # No name can be rebound to an address that is asked for as such.
        self.any_address = settings.host not in _LOOPBACK

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or let it through."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # there are no web sockets here
        state = scope.setdefault("state", {})
        state["request_id"] = f"req-{uuid.uuid4().hex[:20]}"
        state["authenticated"] = None
        state["error"] = None
        exchange = _Exchange(scope, receive, send, self._most(scope["path"]))
        refused = self._refused(scope)
        if refused is not None:
            await exchange.refuse(refused)
            return
        try:
            await self.app(scope, exchange.receive, exchange.send)
        except Exception as error:
            if isinstance(error, _TooLarge):
                await exchange.refuse(_too_large(exchange.most))
                return
            failure = unexpected(error, state["request_id"])
            if exchange.started:
                raise  # the response cannot be taken back: the connection is closed
            await exchange.refuse(failure)

    def _most(self, path: str) -> int:
        upload = any(path == name or path.startswith(f"{name}/") for name in UPLOADS)
        return self.settings.max_upload if upload else self.settings.max_body

    def _refused(self, scope: Scope) -> ApiError | Response | None:
        """Why a request is not let through, or None."""
        headers = Headers(scope=scope)
        return (
            self._foreign_host(headers)
            or self._foreign_origin(scope, headers)
            or self._token_in_url(scope)
            or self._unknown(scope, headers)
            or self._long_body(scope, headers)
        )

    def _foreign_host(self, headers: Headers) -> ApiError | None:
        values = headers.getlist("host")
        host = host_name(values[0]) if len(values) == 1 else None
        if host is not None and (host in self.hosts or (self.any_address and _is_address(host))):
            return None
        return ApiError(
            403,
            "the Host header names another host than this server (start it with --allowed-host NAME)",
            code="host_not_allowed",
        )

    def _foreign_origin(self, scope: Scope, headers: Headers) -> ApiError | None:
        """Writes that a browser sends for a page of another origin."""
        if scope["method"] not in _WRITES:
            return None
        site, origin = headers.get("sec-fetch-site"), headers.get("origin")
        if site in (None, "none", "same-origin") and (
            origin is None or self._is_own(origin, headers["host"], trusted=site == "same-origin")
        ):
            return None
        return ApiError(403, "a page of another origin may not write here", code="origin_not_allowed")

    def _is_own(self, origin: str, host: str, trusted: bool) -> bool:
        """Whether an origin is this server's. The port counts, except where the browser itself says that the
        page is ours: a proxy may have changed it.
        """
        try:
            parts = urlsplit(origin)
            port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
            own = urlsplit(f"//{host}")
            own_port = own.port or {"http": 80, "https": 443}.get(parts.scheme)
        except ValueError:
            return False
        if parts.scheme not in ("http", "https") or not parts.hostname:
            return False
        if trusted:
            return parts.hostname in self.hosts or parts.hostname == own.hostname
        return (parts.hostname, port) == (own.hostname, own_port)

    def _token_in_url(self, scope: Scope) -> ApiError | None:
        query = scope.get("query_string", b"").decode("latin-1")
        names = {name.lower() for name, _ in parse_qsl(query, keep_blank_values=True)}
        token = self.tokens.value
        if not names & _IN_URL and token not in query and token not in scope["path"]:
            return None
        return ApiError(
            400,
            "a token in the URL is not accepted, since URLs are logged (send the header Authorization: "
            "Bearer TOKEN; if this was the token, make another: mlx-distill serve --new-token)",
            code="token_in_url",
        )

    def _unknown(self, scope: Scope, headers: Headers) -> ApiError | Response | None:
        """Who asks: the token for ``/v1``, the cookie for pages."""
        path, state = scope["path"], scope["state"]
        api = path == "/v1" or path.startswith("/v1/")
        either = path in EITHER or path in PUBLIC
        if (api or either) and self._has_token(headers):
            state["authenticated"] = "token"
        elif not api and self._has_cookie(headers):
            state["authenticated"] = "cookie"
        if state["authenticated"] or path in PUBLIC or path.startswith(PUBLIC_FOLDERS):
            return None
        if api or path in EITHER:
            given = "authorization" in headers
            return ApiError(
                401,
                f"{'a wrong' if given else 'no'} token (send the header Authorization: Bearer TOKEN)",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return self._to_login(scope, headers)

    def _has_token(self, headers: Headers) -> bool:
        values = headers.getlist("authorization")
        scheme, _, token = values[0].partition(" ") if len(values) == 1 else ("", "", "")
        return scheme.lower() == "bearer" and self.tokens.is_token(token.strip())

    def _has_cookie(self, headers: Headers) -> bool:
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(self.tokens.cookie)
        except CookieError:
            return False
        return cookie is not None and self.tokens.is_session(cookie.value)

    def _to_login(self, scope: Scope, headers: Headers) -> ApiError | Response:
        query = scope.get("query_string", b"").decode("latin-1")
        target = scope["path"] + (f"?{query}" if query else "")
        login = f"/login?next={quote(target, safe='')}"
        if headers.get("hx-request"):
            return ApiError(401, "log in again", code="login_needed", headers={"hx-redirect": "/login"})
        if scope["method"] in ("GET", "HEAD") and "text/html" in headers.get("accept", ""):
            return RedirectResponse(login, 303)
        return ApiError(401, "log in at /login, or use the token under /v1", code="login_needed")

    def _long_body(self, scope: Scope, headers: Headers) -> ApiError | None:
        length, most = headers.get("content-length"), self._most(scope["path"])
        if length is None:
            return None
        if not length.isascii() or not length.isdigit():
            return ApiError(400, "the header Content-Length is no number", code="invalid_header")
        return _too_large(most) if len(length) > 15 or int(length) > most else None


class _Exchange:
    """One request and its response: counts the body, and adds the headers that every response has."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, most: int) -> None:
        self.scope, self.most, self.started, self.finished = scope, most, False, False
        self._receive, self._send, self._read, self._too_large = receive, send, 0, False

    async def receive(self) -> Message:
        """The next part of the body."""
        message = await self._receive()
        self._read += len(message.get("body", b""))
        if self._read > self.most:
            self._too_large = True
            raise _TooLarge
        return message

    async def send(self, message: Message) -> None:
        """Send a part of the response."""
        if self._too_large and not self.started:
            await self.refuse(_too_large(self.most))
        if self.finished:
            return  # it was refused meanwhile
        if message["type"] == "http.response.start":
            self.started = True
            self._add_headers(message)
        await self._send(message)

    async def refuse(self, reason: ApiError | Response) -> None:
        """Answer without reading what is left of the body."""
        if self.started:
            return
        headers = Headers(scope=self.scope)
        if isinstance(reason, ApiError):
            self.scope["state"]["error"] = reason
            reason = response(reason, Request(self.scope))
        if "content-length" in headers or "transfer-encoding" in headers:
            reason.headers["connection"] = "close"

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.started = True
                self._add_headers(message)
            await self._send(message)

        await reason(self.scope, self._receive, send)
        self.finished = True

    def _add_headers(self, message: Message) -> None:
        headers: Any = MutableHeaders(scope=message)
        for name, value in _HEADERS.items():
            headers.setdefault(name, value)
        headers["x-request-id"] = self.scope["state"]["request_id"]


def host_name(value: str) -> str | None:
    """The host in the value of a ``Host`` header, without its port; None where it is none.

    >>> [host_name(value) for value in ("localhost:8000", "[::1]:8000", "A.example", "a@b", "")]
    ['localhost', '::1', 'a.example', None, None]
    """
    if not value or any(c in value for c in "@/\\?# ,"):
        return None
    try:
        parts = urlsplit(f"//{value}")
        _ = parts.port
    except ValueError:
        return None
    return parts.hostname


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is longer than {most:,} bytes", code="body_too_large")


def loopback(host: str) -> bool:
    """Whether a host is this machine alone.

    >>> [loopback(host) for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0")]
    [True, True, True, False]
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def safe_target(target: str) -> str:
    """Where to go after the login: a path of this server, else the first page.

    >>> [safe_target(target) for target in ("/jobs?state=running", "//evil.example", "https://evil.example")]
    ['/jobs?state=running', '/', '/']
    """
    plain = target.startswith("/") and not target.startswith("//") and "\\" not in target
    return target if plain and all(c.isprintable() for c in target) else "/"
