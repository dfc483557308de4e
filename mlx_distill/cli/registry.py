"""The commands registry."""

from __future__ import annotations

import getpass
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_distill.cli.options import find_ledger, json_option, open_ledger, root_option

if TYPE_CHECKING:
    from mlx_distill.ledger.database import Ledger
    from mlx_distill.registry.records import Version
    from mlx_distill.registry.verify import Verification


def _share(ctx: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """A share written as ``5%`` or ``0.05``."""
    if value is None:
        return None
    try:
        share = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except ValueError as error:
        raise click.BadParameter(f"{value!r}: write 5% or 0.05", ctx, parameter) from error
    if not 0 <= share <= 1:
        raise click.BadParameter(f"{value!r}: not from 0 to 100 %", ctx, parameter)
    return share


actor_option = click.option(
    "--actor", default=getpass.getuser, show_default="the login name", help="Who does it; kept."
)
wait_option = click.option(
    "--wait", is_flag=True, help="Wait for running jobs; else they are a reason not to load the version."
)
reason_option = click.option("--reason", required=True, help="Why; kept.")


@click.group()
def registry() -> None:
    """Versions of models: add them, let one serve, roll back."""


@registry.command()
@click.argument("path")
@click.option("--name", help="The model's name.  [default: that of the folder]")
@click.option("--description", default="", help="One line for the list of models.")
@root_option
@json_option
def add(path: str, name: str | None, description: str, root: Path, as_json: bool) -> None:
    """Add a run's last trained model, RUN:model, or the folder of a model, as a new version.

    PATH is relative to the root. The same content is the same version. Its files stay when the run is made
    again or deleted.
    """
    from mlx_distill.registry import add_version

    version = add_version(open_ledger(root), path, name=name, description=description)
    _echo(
        _version_facts(version),
        [f"{version.name}  {version.state}  {version.sha[:12]}  {version.path}"],
        as_json,
    )


@registry.command("list")
@click.argument("model", required=False)
@root_option
@json_option
def list_(model: str | None, root: Path, as_json: bool) -> None:
    """List models and their versions, the newest first."""
    from mlx_distill.registry import list_models
    from mlx_distill.registry.figures import main_figure
    from mlx_distill.registry.versions import check_model
    from mlx_distill.text import size

    ledger = find_ledger(root)
    models = [] if ledger is None else list_models(ledger)
    if model is not None:
        check_model(model, [known.name for known in models])
        models = [known for known in models if known.name == model]
    lines = [] if models else ["no models yet; add one: mlx-distill registry add RUN"]
    for known in models:
        aliases = ", ".join(f"{alias} -> {serves}" for alias, serves in known.aliases.items())
        lines.append(
            f"{known.name}  {aliases or 'nothing serves'}{f'  {known.description}' * bool(known.description)}"
        )
        for version in known.versions:
            source = version.source_run or version.info.get("source")
            parts = [version.name, version.state, main_figure(version.info), size(version.info["bytes"])]
            lines.append("  " + "  ".join([*parts, f"from {source}", *version.aliases]))
    facts = [
        {
            "name": known.name,
            "description": known.description,
            "aliases": dict(known.aliases),
            "versions": [_version_facts(version) for version in known.versions],
        }
        for known in models
    ]
    _echo(facts, lines, as_json)


@registry.command()
@click.argument("version")
@click.option("--verify", is_flag=True, help="Hash every file, load it and ask it its golden rows.")
@wait_option
@root_option
@json_option
@click.pass_context
def show(ctx: click.Context, version: str, verify: bool, wait: bool, root: Path, as_json: bool) -> None:
    """Show a version: NAME:3, NAME@alias, or NAME for the newest one."""
    from mlx_distill.registry import get_version, lineage, parse_version
    from mlx_distill.registry.figures import figure_text, figure_title, figures_of
    from mlx_distill.text import size

    ledger = open_ledger(root, create=False)
    found = parse_version(ledger, version)
    verification = _verify(ledger, found, wait) if verify else None
    found = get_version(ledger, found.model, found.number)
    info, steps, rows = found.info, lineage(ledger, found), found.info.get("rows") or {}
    figures = figures_of(info)
    lines = [
        f"{found.name}  {found.state}  {' '.join(found.aliases)}".rstrip(),
        f"  content     {found.sha}",
        f"  files       {'deleted' if found.files_deleted else root / found.path}, {size(info['bytes'])}",
        f"  base model  {info.get('base_model') or 'not known'}",
        f"  recipe      {info.get('recipe') or 'none'}; task {info.get('task') or 'none'}",
        f"  rows        {', '.join(f'{split} {count:,}' for split, count in rows.items()) or 'not known'}",
        *(f"  {figure_title(name):<22}  {figure_text(figure)}" for name, figure in figures.items()),
        *([] if figures else ["  figures     not measured"]),
        *(
            f"  from        {step['folder']} {step['content'][:12]} {' '.join(step['versions'])}".rstrip()
            for step in steps
        ),
    ]
    facts = {**_version_facts(found), "info": dict(info), "lineage": steps}
    if verification is not None:
        lines.append(f"  {'verified' if verification.passed else 'problem'}    {verification.sentence}")
        facts["verification"] = verification.to_dict()
    _echo(facts, lines, as_json)
    ctx.exit(0 if verification is None or verification.passed else 1)


@registry.command()
@click.argument("version")
@click.option("--alias", default="production", show_default=True, help="What shall serve it.")
@reason_option
@actor_option
@click.option("--override", metavar="REASON", help="Deploy although a gate refuses; the reason is kept.")
@click.option("--margin", metavar="3pt|5%", help="How much worse than what serves it may be.")
@click.option("--metric", metavar="NAME", help="Of the comparison.  [default: whether the label is right]")
@click.option("--set", "set_name", metavar="NAME", help="The set of held-out rows.  [default: test]")
@click.option("--against", metavar="PATH", help="Compare with this run or file instead of what serves.")
@click.option("--constrained", is_flag=True, help="Judge the answers under the grammar of the task.")
@click.option("--max-fpr", "max_false_positive_rate", callback=_share, metavar="35%", help="Of each group.")
@click.option("--max-fnr", "max_false_negative_rate", callback=_share, metavar="20%", help="Of each group.")
@click.option(
    "--max-invalid", callback=_share, metavar="2%", help="Share of answers that do not fit the task."
)
@click.option(
    "--max-p95", "max_p95_s", type=float, metavar="SECONDS", help="95th percentile of a row's time."
)
@click.option(
    "--require",
    multiple=True,
    metavar="CHECK",
    help="A check that has to be measured and hold: goals, comparison, groups, invalid, latency, leaks.",
)
@click.option("--context-length", type=click.IntRange(1), help="Tokens; kept with the deployment.")
@click.option("--memory-limit-gb", type=float, help="Kept with the deployment.")
@click.option(
    "--external", metavar="TARGET", help="Serve module:function or a URL; VERSION is the model's name."
)
@click.option("--task", help="The task of --external.")
@click.option("--rows", metavar="FILE", help="Rows that --external is asked first: the first three.")
@wait_option
@root_option
@json_option
def promote(version: str, wait: bool, root: Path, as_json: bool, **options: Any) -> None:
    """Let an alias serve a version, after its gates were judged and it was verified.

    Exit code 3 where a gate refuses. What is asked for by an option or by the goals of the recipe refuses
    also where it is undecided or was not measured; the rest only where it is shown to be bad.
    """
    from mlx_distill.jobs.alongside import verifying
    from mlx_distill.registry import GateLimits, parse_version
    from mlx_distill.registry import promote as deploy

    ledger = open_ledger(root, create=options["external"] is not None)
    names = ("context_length", "memory_limit_gb")
    settings = {name: options.pop(name) for name in names}
    settings = {name: value for name, value in settings.items() if value is not None}
    external, task, rows = (options.pop(name) for name in ("external", "task", "rows"))
    words = {name: options.pop(name) for name in ("actor", "reason", "override", "alias")}
    if external is not None:
        _promote_external(ledger, version, external, task, rows, words, settings, as_json)
        return
    if task or rows:
        raise click.UsageError("--task and --rows go with --external")
    found = parse_version(ledger, version)
    done = deploy(
        ledger,
        found.model,
        found.number,
        settings=settings or None,
        limits=GateLimits(**options),
        verifying=lambda _: verifying(ledger, f"mlx-distill registry promote {found.name}", wait=wait),
        **words,
    )
    _echo_deployment(done, as_json)


def _promote_external(
    ledger: Any,
    model: str,
    target: str,
    task: str | None,
    rows: str | None,
    words: dict[str, Any],
    settings: Mapping[str, Any],
    as_json: bool,
) -> None:
    from mlx_distill.data.files import ReadOptions, read_path
    from mlx_distill.registry import promote_external
    from mlx_distill.registry.golden import GOLDEN_ROWS
    from mlx_distill.tasks.task import load_task

    if not task or not rows:
        raise click.UsageError("--external needs --task TASK and --rows FILE, by which it is checked")
    if words.pop("override") is not None:
        raise click.UsageError("--override: --external has no gates")
    read = read_path(Path(rows), rows, ReadOptions())
    asked = [dict(row) for (_, row), _ in zip(read, range(GOLDEN_ROWS), strict=False)]
    done = promote_external(
        ledger, model, target, task=load_task(task), rows=asked, settings=settings or None, **words
    )
    _echo_deployment(done, as_json)


@registry.command()
@click.argument("model")
@click.option("--alias", default="production", show_default=True, help="What is rolled back.")
@click.option("--to", metavar="NUMBER|TARGET", help="What it has served.  [default: what served before]")
@reason_option
@actor_option
@wait_option
@root_option
@json_option
def rollback(
    model: str, alias: str, to: str | None, wait: bool, root: Path, as_json: bool, **words: str
) -> None:
    """Let an alias serve again what it served before, after it was verified."""
    from mlx_distill.jobs.alongside import verifying
    from mlx_distill.registry import rollback as roll_back

    wanted = int(to) if to is not None and to.isdigit() else to
    ledger, purpose = open_ledger(root, create=False), f"mlx-distill registry rollback {model}"
    done = roll_back(
        ledger, model, alias, to=wanted, verifying=lambda _: verifying(ledger, purpose, wait=wait), **words
    )
    _echo_deployment(done, as_json)


@registry.command()
@click.argument("version")
@click.option("--restore", is_flag=True, help="Take it back into use.")
@click.option(
    "--delete-files", "delete", is_flag=True, help="Delete its files; its number and their hashes stay."
)
@root_option
@json_option
def archive(version: str, restore: bool, delete: bool, root: Path, as_json: bool) -> None:
    """Take a version out of use; it keeps its number and its files. What an alias serves is refused.

    With --delete-files it cannot be restored until the same content is added again. Space is freed where no
    run or other version has the same files.
    """
    from mlx_distill.registry import archive as put_away
    from mlx_distill.registry import delete_files, get_version, parse_version
    from mlx_distill.text import counted, size

    if restore and delete:
        raise click.UsageError("--restore and --delete-files exclude each other")
    ledger = open_ledger(root, create=False)
    found = parse_version(ledger, version)
    lines, facts = [], {}
    if delete:
        deleted = delete_files(ledger, found.model, found.number)
        facts = {"files_deleted": deleted.files, "bytes_freed": deleted.freed}
        lines = [f"  {counted(deleted.files, 'file')} deleted, {size(deleted.freed)} freed"]
    else:
        put_away(ledger, found.model, found.number, restore=restore)
    done = get_version(ledger, found.model, found.number)
    _echo({**_version_facts(done), **facts}, [f"{done.name}  {done.state}", *lines], as_json)


@registry.command()
@click.argument("model")
@click.option("--alias", help="Of this alias alone.")
@root_option
@json_option
def history(model: str, alias: str | None, root: Path, as_json: bool) -> None:
    """Show who let what serve, when and why; the newest first."""
    from datetime import datetime

    from mlx_distill.registry import history as deployments
    from mlx_distill.registry import list_models
    from mlx_distill.registry.versions import check_model

    ledger = open_ledger(root, create=False)
    check_model(model, [known.name for known in list_models(ledger)])
    found = deployments(ledger, model, alias)
    lines = [] if found else [f"nothing of {model!r} was deployed" + (f" as {alias}" if alias else "")]
    for done in found:
        when = datetime.fromtimestamp(done.created_at).astimezone().isoformat(" ", "minutes")
        gate = f"  ({done.gate_text})" if done.gate["checks"] else ""
        lines.append(
            f"{done.id}  {when}  {done.kind} {done.serves} as {done.alias}  {done.actor}: {done.reason}{gate}"
        )
    _echo([_deployment_facts(done) for done in found], lines, as_json)


def _version_facts(version: Any) -> dict[str, Any]:
    from mlx_distill.registry.figures import figures_of

    names = ("model", "number", "name", "state", "sha", "path", "source_run", "created_at", "aliases")
    facts = {name: getattr(version, name) for name in names}
    return {**facts, "metrics": figures_of(version.info)}


def _deployment_facts(deployment: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(deployment), "serves": deployment.serves}


def _echo_deployment(done: Any, as_json: bool) -> None:
    lines = [f"{done.model}@{done.alias} serves {done.serves} (deployment {done.id})"]
    for check in done.gate["checks"]:
        lines.append(
            f"  {check['name'].ljust(10)}  {check['state'].replace('_', ' ').ljust(14)}  {check['sentence']}"
        )
    lines.append(f"  verified    {done.gate['verified']['sentence']}")
    if done.gate["checks"]:
        lines.append(f"  gate        {done.gate_text}")
    _echo(_deployment_facts(done), lines, as_json)


def _echo(facts: Any, lines: list[str], as_json: bool) -> None:
    import json

    from mlx_distill.cli.output import plain

    click.echo(json.dumps(plain(facts), ensure_ascii=False, indent=2) if as_json else "\n".join(lines))


def _verify(ledger: Ledger, version: Version, wait: bool) -> Verification:
    from mlx_distill.jobs.alongside import verifying
    from mlx_distill.registry import verify_version

    with verifying(ledger, f"mlx-distill registry show --verify {version.name}", wait=wait):
        return verify_version(ledger, version)
