"""The example that replaces an analyzer: its class in this process and over the server; its Dockerfile."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import click
import pytest
from helpers.served import MODEL, TOKEN, served_in_thread, write_root

from mlx_distill.cli import cli
from mlx_distill.serve.security import PUBLIC

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "04_replace_analyzer"
SONGS = [
    {"title": f"Song {number}", "artist": "A", "lyrics": "grace and rivers " * (number + 1)}
    for number in range(5)
]
UNUSUAL = [
    {"title": "Only a title", "artist": "", "lyrics": ""},
    {"title": "", "artist": "", "lyrics": ""},
    {"title": "Long", "artist": "", "lyrics": "on and on " * 4000},
]


@pytest.fixture(scope="module")
def module() -> Any:
    spec = spec_from_file_location("replaced_analyzer", EXAMPLE / "analyzer.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("analyzer")
    write_root(folder, max_position_embeddings=1024)
    return folder


@pytest.fixture(scope="module")
def local(module: Any, root: Path) -> Any:
    return module.SongAnalyzer(root / MODEL)


@pytest.fixture(scope="module")
def remote(module: Any, root: Path) -> Iterator[Any]:
    with served_in_thread(root, start_jobs=False) as address:
        yield module.SongAnalyzer(MODEL, base_url=address, token=TOKEN)


def test_the_server_answers_as_the_process_in_the_order_of_the_songs(local: Any, remote: Any) -> None:
    here, there = local.analyze_songs_batch(SONGS), remote.analyze_songs_batch(SONGS)
    assert [one.title for one in here] == [song["title"] for song in SONGS] and here == there
    assert [local.analyze_song(**song) for song in SONGS[:2]] == here[:2]
    for one in here:
        assert one.error is None and one.concern_level == local.level(one.score)
        assert one.biblical_themes and isinstance(one.supporting_scripture, tuple)


def test_empty_and_very_long_lyrics_are_answered(local: Any, remote: Any) -> None:
    for analyzer in (local, remote):
        assert [one.error for one in analyzer.analyze_songs_batch(UNUSUAL)] == [None] * 3
        assert analyzer.analyze_songs_batch([]) == []


def test_none_is_an_error_that_names_song_and_field(local: Any) -> None:
    with pytest.raises(TypeError, match="song 2: lyrics is None"):
        local.analyze_songs_batch([SONGS[0], {**SONGS[1], "lyrics": None}])


def test_scores_have_five_levels(local: Any) -> None:
    levels = [local.level(score) for score in (100, 85, 84.9, 65, 45, 25, 24, 0)]
    assert levels == ["Very Low", "Very Low", "Low", "Low", "Medium", "High", "Very High", "Very High"]


def test_what_the_server_refuses_is_raised(module: Any, remote: Any) -> None:
    with pytest.raises(RuntimeError, match="401"):
        module.SongAnalyzer(MODEL, base_url=remote.base_url, token="wrong").analyze_song("a", "b", "c")
    with pytest.raises(RuntimeError, match="no answer"):
        module.SongAnalyzer(MODEL, base_url="http://127.0.0.1:9", token=TOKEN).analyze_song("a", "b", "c")
    with pytest.raises(ValueError, match="neither"):
        module.SongAnalyzer()


def test_the_dockerfile_keeps_its_rules() -> None:
    text = re.sub(r"^#.*\n", "", (EXAMPLE / "Dockerfile").read_text("utf-8"), flags=re.MULTILINE)
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    steps = [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines]
    for name, rest in steps:
        if name == "COPY":
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists() and source not in (".", "converted_models"), source
    names = [name for name, _ in steps]
    assert names[0] == "FROM" and names[-1] == "CMD" and "USER" in names
    assert dict(steps)["USER"] not in ("root", "0") and names.index("USER") > names.index("RUN")
    command = json.loads(steps[-1][1])
    serve = cli.get_command(click.Context(cli), "serve")
    assert serve is not None
    options = {name for option in serve.params for name in option.opts}
    assert command[:2] == ["mlx-distill", "serve"]
    assert {part for part in command if part.startswith("--")} <= options
    check = dict(steps)["HEALTHCHECK"]
    port = command[command.index("--port") + 1]
    assert f"http://127.0.0.1:{port}/health" in check and "/health" in PUBLIC
    assert dict(steps)["EXPOSE"] == port
