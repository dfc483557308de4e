"""The command serve."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import click

from mlx_distill.errors import ConfigError

_EXTRA = ("fastapi", "uvicorn", "multipart", "prometheus_client")


@click.command()
@click.option(
    "--root",
    default=".",
    show_default=True,
    envvar="MLX_DISTILL_ROOT",
    metavar="DIR",
    help="The folder whose models, runs and jobs are served.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one."
)
@click.option("--model", help="The model that answers where a request names none, such as music@production.")
@click.option("--task", help="Its task, where the model does not say: a packaged one, or a YAML file.")
@click.option("--share-accelerator", is_flag=True, help="Keep answering while jobs run; for small models.")
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    metavar="NAME",
    help="A further name that clients may call the server by.",
)
@click.option(
    "--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Requests decoded together."
)
@click.option(
    "--max-queue",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="Requests at work or waiting; a further one is answered with 503.",
)
@click.option(
    "--memory-limit", type=click.FloatRange(0, min_open=True), metavar="GB", help="Memory of all models."
)
@click.option("--new-token", is_flag=True, help="Replace the token, print the new one and exit.")
def serve(**options: Any) -> None:
    """Serve models and the dashboard over HTTP.

    Clients send the header Authorization: Bearer TOKEN; a browser logs in once. The token is that of the
    environment variable MLX_DISTILL_TOKEN, else one is made, kept under the root and printed once.
    """
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"serve needs packages that are not installed: {', '.join(missing)}",
            fix="pip install 'mlx-distill[serve]'",
        )
    from mlx_distill.ledger.root import Root
    from mlx_distill.serve.main import serve as run
    from mlx_distill.serve.settings import ServerSettings
    from mlx_distill.serve.tokens import new_token

    root = Root.at(options.pop("root"))
    if options.pop("new_token"):
        click.echo(new_token(root))
        return
    if (limit := options.pop("memory_limit")) is not None:
        options["memory_limit"] = int(limit * 1e9)
    run(ServerSettings(root, **options), click.echo)
