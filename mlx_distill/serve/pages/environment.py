"""What all pages share: the Jinja2 environment, the content security policy, and the command that stands
beside a button.
"""

from __future__ import annotations

import json
import re
import secrets
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache, partial
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import Request
from fastapi.responses import HTMLResponse, RedirectResponse

from mlx_distill import text
from mlx_distill.config import ASSETS
from mlx_distill.errors import DistillError
from mlx_distill.registry.figures import figure_text, figure_title, figures_of, main_figure
from mlx_distill.report import environment as report_environment
from mlx_distill.serve.pages.static import static_url

if TYPE_CHECKING:
    from jinja2 import Environment

FOLDER = ASSETS / "serve"
# Address and name of the navigation's entries.
RAIL = (
    ("/", "Overview"),
    ("/data", "Data"),
    ("/jobs", "Jobs"),
    ("/models", "Models"),
    ("/compare", "Compare"),
    ("/costs", "Costs"),
)
# A part of a command that stands for a field: {name}, --option?{name}, --flag?name.
_FIELD = re.compile(
    r"(?:(?P<option>--[\w-]+)\?)?(?:\{(?P<value>[A-Za-z_]\w*)\}|(?<=\?)(?P<flag>[A-Za-z_]\w*))"
)


@dataclass(frozen=True)
class CommandLine:
    """A command of ours as a page shows it beside the button that does the same.

    Attributes:
        parts: The arguments after ``mlx-distill``. Parts with the names of the form's fields follow what is
            typed: ``{reason}`` is the field's value (``REASON`` while it is empty), ``--margin?{margin}`` the
            option with its value, ``--override?override`` a flag; both are left out while the field is empty.
        values: What the fields hold when the page is made.
    """

    parts: tuple[str, ...]
    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def words(self) -> list[str]:
        """The words of the command as the fields stand.

        >>> parts = ("compare", "{a}", "b c", "--margin?{margin}", "--keep?keep")
        >>> CommandLine(parts, {"margin": "3pt"}).words
        ['mlx-distill', 'compare', 'A', 'b c', '--margin', '3pt']
        """
        out = ["mlx-distill"]
        for part in self.parts:
            match = _FIELD.fullmatch(part)
            if match is None:
                out.append(part)
                continue
            value = str(self.values.get(match["value"] or match["flag"]) or "")
            if match["option"] is None:
                out.append(value or match["value"].upper())
            elif value:
                out += [match["option"]] + ([value] if match["value"] else [])
        return out

    @property
    def text(self) -> str:
        """The line for a shell."""
        return shlex.join(self.words)

    @property
    def json(self) -> str:
        """The parts for the page's script, which follows the fields."""
        return json.dumps(["mlx-distill", *self.parts])

    @property
    def fields(self) -> bool:
        """Whether a part stands for a field of the form."""
        return any(_FIELD.fullmatch(part) for part in self.parts)


def command_line(root: Path, *parts: object, values: Mapping[str, Any] | None = None) -> CommandLine:
    """The command with these arguments, and ``--root`` where the root is not the working folder.

    Args:
        root: The folder that is served.
        parts: Arguments; None is left out.
        values: See :class:`CommandLine`.
    """
    shown = tuple(str(part) for part in parts if part is not None)
    whole = shown if root == Path.cwd() else (*shown, "--root", str(root))
    return CommandLine(whole, dict(values or {}))


@cache
def environment() -> Environment:
    """The environment of the pages: templates under ``assets/serve``, then those of the report; its filters,
    and ``when``, ``day`` and ``ago`` for times of the ledger. The macros are there as ``ui`` and ``m``
    without an import, so that a block can be rendered alone.
    """
    made = report_environment.environment(FOLDER)
    made.filters |= {"when": when, "ago": ago, "day": day}
    made.filters |= {"main_figure": main_figure, "figures_of": figures_of}
    made.filters |= {"figure_text": figure_text, "figure_title": figure_title}
    made.globals |= {"static": static_url, "RAIL": RAIL}
    made.globals["m"] = made.get_template("macros.html.j2").module
    made.globals["ui"] = made.get_template("ui.html.j2").module
    return made


def page(
    request: Request,
    template: str,
    *,
    status: int = 200,
    scripts: Sequence[str] = (),
    block: str | None = None,
    **context: Any,
) -> HTMLResponse:
    """A page, with a content security policy that allows its own scripts by a nonce.

    Args:
        request: The request that it answers.
        template: The file's name under ``assets/serve`` or ``assets/report``.
        status: The HTTP status.
        scripts: Further sources of scripts for the policy, such as hashes.
        block: Render only this block of the template, for a part that htmx exchanges; what the template sets
            outside its blocks is not there.
        context: The template's variables. Every template also sees ``request``, ``root``, ``nonce`` and
            ``command(...)``, which makes a :class:`CommandLine`.
    """
    root = request.app.state.server.root.path
    nonce = secrets.token_urlsafe(18)
    shared = {
        "request": request,
        "root": root,
        "nonce": nonce,
        "command": partial(command_line, root),
        "signed_in": True,
    }
    made = environment().get_template(template)
    values = shared | context
    if block is None:
        html = made.render(values)
    else:
        html = "".join(made.blocks[block](made.new_context(values)))
    headers = {
        "Content-Security-Policy": policy(nonce, scripts),
        "Cache-Control": "no-store",
        "Vary": "HX-Request",
        "Referrer-Policy": "same-origin",
    }
    return HTMLResponse(text.visible(html), status, headers)


def policy(nonce: str, scripts: Sequence[str] = ()) -> str:
    """The content security policy: everything from this server; scripts only with the nonce or a hash.

    Style attributes are allowed, since charts and tables carry numbers in them; style elements are not.
    """
    allowed = " ".join([f"'nonce-{nonce}'", *(f"'{source}'" for source in scripts)])
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'self'; style-src-attr 'unsafe-inline'; "
        "img-src 'self' data:; connect-src 'self'; form-action 'self'; base-uri 'none'; "
        "frame-ancestors 'none'"
    )


def wants_fragment(request: Request) -> bool:
    """Whether htmx asks, and exchanges a part of the page with the answer."""
    headers = request.headers
    return headers.get("hx-request") == "true" and headers.get("hx-request-type") != "full"


def see_other(url: str) -> RedirectResponse:
    """The answer to a form: the page that shows what it did, so that a reload posts nothing again."""
    return RedirectResponse(url, HTTPStatus.SEE_OTHER)


def error_page(request: Request, status: int, message: str, fix: str | None = None) -> HTMLResponse:
    """A page that says what went wrong, where, and what to do."""
    return page(request, "error.html.j2", status=status, heading=_phrase(status), message=message, fix=fix)


def error_of(request: Request, error: DistillError, status: int = 400) -> HTMLResponse:
    """The page of an error of ours."""
    return error_page(request, status, error.message, error.fix)


def when(seconds: float | None) -> str:
    """A time of the ledger in the server's time zone, to the minute."""
    return text.NONE if seconds is None else f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M}"


def day(seconds: float | None) -> str:
    """The day of a time of the ledger."""
    return text.NONE if seconds is None else f"{datetime.fromtimestamp(seconds):%Y-%m-%d}"


def ago(seconds: float | None) -> str:
    """How long a time of the ledger is past, in its largest unit.

    >>> ago(time.time() - 7300)
    '2 hours ago'
    """
    if seconds is None:
        return text.NONE
    passed = max(0.0, time.time() - seconds)
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if passed >= length:
            return f"{text.counted(int(passed // length), unit)} ago"
    return "just now"


def _phrase(status: int) -> str:
    return HTTPStatus(status).phrase.capitalize()
