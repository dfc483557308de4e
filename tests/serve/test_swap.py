"""A name that comes to mean another model while the server runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from helpers.served import MODEL, write_root

from mlx_distill.errors import ModelError
from mlx_distill.serve.loading import load_model
from mlx_distill.serve.pool import Pool
from mlx_distill.serve.settings import ServerSettings


@dataclass(frozen=True)
class Named:
    name: str
    path: Path
    target: str | None = None
    model: str | None = "music"
    version: int | None = 1
    alias: str | None = "production"
    sha: str | None = "one"


def test_a_moved_alias_is_served_and_requests_end_with_the_model_that_they_began_with(tmp_path: Any) -> None:
    root = write_root(tmp_path)
    now = [Named("music", root.path / MODEL)]
    broken = [False]

    def load(resolved: Any) -> Any:
        if broken[0]:
            raise ModelError("damaged")
        return load_model(resolved, batch_size=2)

    pool = Pool(ServerSettings(root, model="music"), lambda name: now[0], load)
    try:
        with pool.get() as first:
            now[0] = replace(now[0], version=2, sha="two")
            pool.tick()
            with pool.get() as second:
                assert (first.resolved.version, second.resolved.version) == (1, 2)
                assert not first.worker.closed
        broken[0] = True
        now[0] = replace(now[0], version=3, sha="three")
        pool.tick()
        with pool.get() as third:
            assert third.resolved.version == 2
        state = pool.state()
        assert state["status"] == "ready" and "damaged" in state["problem"]
    finally:
        pool.close()
