"""The page on which a job is started: a recipe as a form."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response

from mlx_distill.config import override_texts
from mlx_distill.errors import ConfigError, DistillError
from mlx_distill.graph import graph
from mlx_distill.jobs import dispatch, list_jobs, submit
from mlx_distill.jobs.store import RECIPE
from mlx_distill.ledger.database import new_id
from mlx_distill.ledger.root import Root
from mlx_distill.pipeline import check_has_student
from mlx_distill.recipe import Recipe, recipe_names
from mlx_distill.serve.pages.environment import page, see_other
from mlx_distill.serve.pages.recipe_checks import GENERAL, problems, read_recipe, written_recipe
from mlx_distill.serve.pages.recipe_form import differences, groups, read_texts, texts_of
from mlx_distill.status import missing_before
from mlx_distill.storage import write_text
from mlx_distill.tasks.task import task_names
from mlx_distill.text import listed

router = APIRouter(include_in_schema=False)

COMMANDS = ("run", "prepare", "teach", "targets", "distill", "quantize", "evaluate")
# Inputs of the form that are not of the recipe.
_OWN = ("from", "command", "out", "title", "do")
_MAX_TITLE = 200


def recipe_path(root: Root, source: str) -> str:
    """The name or path of the recipe that ``recipe:NAME``, ``file:PATH`` or ``job:ID`` names.

    Raises:
        ConfigError: a source of another kind.
    """
    kind, _, name = source.partition(":")
    if kind == "job" and name and "/" not in name and "\\" not in name and name.strip("."):
        return root.relative(root.jobs / name / RECIPE)
    if kind == "recipe" and name in recipe_names():
        return name
    if kind == "file" and name:
        return root.relative(name)
    raise ConfigError(
        f"{source!r}: no recipe", fix="choose a packaged recipe, a file under the root, or a job"
    )


@router.get("/jobs/new")
def new_job(request: Request) -> HTMLResponse:
    """The form, filled from the recipe that ``from`` names."""
    server = request.app.state.server
    query = request.query_params
    source = f"file:{query['path']}" if query.get("path") else query.get("from", "")
    if not source:
        return _form(request, {}, source="", texts={})
    try:
        raw = read_recipe(server.root, recipe_path(server.root, source))
    except DistillError as error:
        return _form(request, {}, source="", texts={}, errors={GENERAL: [_line(error)]}, status=400)
    out = _free_folder(server.root, f"runs/{raw.get('name', 'run')}")
    return _form(request, {"out": out, "command": "run", "title": ""}, source=source, texts=texts_of(raw))


@router.post("/jobs/new")
async def start_job(request: Request) -> Response:
    """Check the form; start a job of it where it is right and was not only to be checked."""
    from starlette.concurrency import run_in_threadpool

    form = await request.form(max_fields=2000)
    fields = {name: value for name, value in form.multi_items() if isinstance(value, str)}
    return await run_in_threadpool(_start, request, fields)


def _start(request: Request, fields: Mapping[str, str]) -> Response:
    server = request.app.state.server
    root: Root = server.root
    own = {name: fields.get(name, "").strip() for name in _OWN}
    given = {name: text.replace("\r\n", "\n") for name, text in fields.items() if name not in _OWN}
    source = own["from"]
    try:
        raw, texts, unreadable = read_texts(given)
    except ConfigError as error:
        return _form(request, own, source=source, texts={}, errors={GENERAL: [_line(error)]}, status=400)
    recipe, found = problems(raw, root)
    found |= unreadable
    own["out"] = own["out"] or f"runs/{raw.get('name', 'run')}"
    own["command"] = own["command"] if own["command"] in COMMANDS else "run"
    if problem := _bad_folder(root, own["out"]):
        found.setdefault("out", []).append(problem)
    elif recipe is not None and (problem := _bad_command(recipe, own["command"], root.inside(own["out"]))):
        found["command"] = [problem]
    if own["do"] != "start" or found or recipe is None:
        checked = not found and recipe is not None
        return _form(
            request,
            own,
            source=source,
            texts=texts,
            errors=found,
            status=400 if found else 200,
            raw=raw if checked else None,
        )
    job_id = new_id("job")
    folder = root.jobs / job_id
    folder.mkdir(parents=True)
    write_text(folder / RECIPE, written_recipe(raw, root, folder))
    job = submit(
        server.ledger,
        own["command"],
        [root.relative(folder / RECIPE), "--out", root.relative(own["out"])],
        title=own["title"][:_MAX_TITLE] or f"{own['command']} {recipe.name}",
        run_path=own["out"],
        request={"from": source},
        job_id=job_id,
    )
    start_next(server)
    return see_other(f"/jobs/{job.id}")


def start_next(server: Any) -> None:
    """Start the next job of the queue, if the accelerator is free and the server starts jobs."""
    if server.settings.start_jobs:
        with contextlib.suppress(DistillError):  # the end of the running job starts the next one
            dispatch(server.ledger)


def _form(
    request: Request,
    own: Mapping[str, str],
    *,
    source: str,
    texts: Mapping[str, str],
    errors: Mapping[str, list[str]] | None = None,
    status: int = 200,
    raw: Mapping[str, Any] | None = None,
) -> HTMLResponse:
    """The page. With ``raw``, a recipe without problems, it shows what would be started."""
    server = request.app.state.server
    errors = errors or {}
    return page(
        request,
        "job_new.html.j2",
        status=status,
        source=source,
        own={"out": "", "command": "run", "title": "", **own},
        groups=groups(texts, errors) if source or texts else [],
        errors=errors,
        general=errors.get(GENERAL, []),
        recipes=recipe_names(),
        jobs=[job for job in list_jobs(server.ledger, limit=50) if job.recipe(server.root).is_file()],
        commands=COMMANDS,
        tasks=task_names(),
        checked=None if raw is None else _checked(server.root, source, own, raw),
    )


def _checked(root: Root, source: str, own: Mapping[str, str], raw: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe as YAML, what differs from the one that it was made of, and the equal command."""
    import yaml

    changed: list[tuple[str, Any, Any]] = []
    base = None
    with contextlib.suppress(DistillError):
        base = recipe_path(root, source) if source else None
        changed = differences(read_recipe(root, base), raw) if base else []
    sets = [part for name, _, value in changed for part in ("--set", override_texts({name: value})[0])]
    return {
        "yaml": yaml.safe_dump(dict(raw), sort_keys=False, allow_unicode=True, width=100),
        "changed": changed,
        "source": source,
        "arguments": ["jobs", "submit", own["command"], base or RECIPE, "--out", own["out"], *sets],
    }


def _free_folder(root: Root, folder: str) -> str:
    """A folder under the root that does not exist yet: NAME, NAME-2, NAME-3 ..."""
    numbers = (folder if n == 1 else f"{folder}-{n}" for n in range(1, 10_000))
    return next((name for name in numbers if not (root.path / name).exists()), folder)


def _bad_folder(root: Root, folder: str) -> str | None:
    """Why a run cannot be made there; None where it can."""
    try:
        path = root.inside(folder)
    except (ConfigError, ValueError):
        return f"{folder}: not under the root {root.path}"
    if path == root.path or root.state in (path, *path.parents):
        return f"{folder}: kept for the server: name a folder such as runs/mine"
    return f"{folder}: there is a file of that name" if Path(path).is_file() else None


def _bad_command(recipe: Recipe, command: str, out: Path) -> str | None:
    """Why a command cannot run alone in a folder; None where it can."""
    try:
        check_has_student(recipe, command)
    except ConfigError as error:
        return _line(error)
    found = missing_before(graph(recipe, recipe.load_task()), command, out)
    if found is None:
        return None
    missing, first = found
    names = listed([f"{out.name}/{folder.name}" for folder in missing])
    return (
        f"{command} reads {names}, and that is not there yet: run {first} first in this folder, "
        "or all stages, or name the folder of a run that has it"
    )


def _line(error: DistillError) -> str:
    return f"{error.message}: {error.fix}" if error.fix else error.message
