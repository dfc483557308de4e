"""The old analyzer's interface over a model of one's own: in this process, or on a server of mlx-distill."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

LEVELS = Path(__file__).with_name("concern_levels.yaml")
FIELDS = ("title", "artist", "lyrics")
NO_TEXT = "(no text)"  # in the place of a title and lyrics that are both empty
TOGETHER = 500  # songs a request


@dataclass(frozen=True)
class SongAnalysis:
    """The result of one song. Without a valid answer ``error`` says why, and ``score`` is None."""

    title: str
    artist: str
    score: float | None
    concern_level: str | None
    biblical_themes: tuple[str, ...] = ()
    supporting_scripture: tuple[str, ...] = ()
    verdict: str | None = None
    error: str | None = None


class SongAnalyzer:
    """Analyzes songs as the old class did.

    Args:
        model: A run or a model's folder; on a server its name, such as ``music@production``.
        base_url: Of the server (``http://127.0.0.1:8000``); None answers in this process.
        token: Of the server; ``MLX_DISTILL_TOKEN`` where None.
        levels: The table of levels and the task.
        timeout: Seconds to wait for the server.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        base_url: str | None = None,
        token: str | None = None,
        levels: Path = LEVELS,
        timeout: float = 600,
    ) -> None:
        table = yaml.safe_load(levels.read_text(encoding="utf-8"))
        self.levels = sorted(
            ((float(line["at_least"]), str(line["name"])) for line in table["levels"]), reverse=True
        )
        self.task, self.model, self.timeout = table["task"], model, timeout
        self.base_url = base_url and base_url.rstrip("/")
        self.token = token or os.environ.get("MLX_DISTILL_TOKEN", "")
        self._local: Any = None
        if self.base_url is None:
            if model is None:
                raise ValueError("neither a model nor a base_url: SongAnalyzer('runs/mine')")
            import mlx_distill as md

            self._local = md.Analyzer(model, self.task, long="cut", label_probs=False)

    def analyze_song(self, title: str, artist: str, lyrics: str) -> SongAnalysis:
        """The analysis of one song.

        Raises:
            TypeError: a value is not text, such as None.
            RuntimeError: the server does not answer.
        """
        return self.analyze_songs_batch([{"title": title, "artist": artist, "lyrics": lyrics}])[0]

    def analyze_songs_batch(self, songs: Sequence[Mapping[str, str]]) -> list[SongAnalysis]:
        """The analyses of songs (``title``, ``artist``, ``lyrics``), in their order.

        Raises:
            TypeError, RuntimeError: as :meth:`analyze_song`; nothing is analyzed then.
        """
        rows = [_row(song, f"song {number}") for number, song in enumerate(songs, 1)]
        answers = self._ask(rows) if rows else []
        return [self._analysis(song, *answer) for song, answer in zip(songs, answers, strict=True)]

    def level(self, score: float) -> str:
        """The level of concern of a score."""
        return next((name for low, name in self.levels if score >= low), self.levels[-1][1])

    def _ask(self, rows: list[dict[str, str]]) -> list[tuple[Mapping[str, Any] | None, str | None]]:
        if self.base_url is None:
            return [(one.answer, one.error) for one in self._local.analyze(rows)]
        out: list[tuple[Mapping[str, Any] | None, str | None]] = []
        for start in range(0, len(rows), TOGETHER):
            body = {"items": rows[start : start + TOGETHER], "task": self.task, "long": "cut"}
            body |= {"label_probs": False} | ({} if self.model is None else {"model": str(self.model)})
            out += [
                (one["answer"], one["error"] and one["error"]["message"]) for one in self._post(body)["data"]
            ]
        return out

    def _post(self, body: Mapping[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{self.base_url}/v1/analyze/batch",
            json.dumps(body).encode(),
            {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            raise RuntimeError(f"{self.base_url}: {error.code}: {text[:500]}") from error
        except OSError as error:
            raise RuntimeError(f"{self.base_url}: no answer: {error}") from error

    def _analysis(
        self, song: Mapping[str, str], answer: Mapping[str, Any] | None, error: str | None
    ) -> SongAnalysis:
        if answer is None:
            return SongAnalysis(song["title"], song["artist"], None, None, error=error or "no answer")
        return SongAnalysis(
            song["title"],
            song["artist"],
            float(answer["score"]),
            self.level(answer["score"]),
            tuple(answer["themes"]),
            tuple(answer["scripture_references"]),
            answer["verdict"],
        )


def _row(song: Mapping[str, str], where: str) -> dict[str, str]:
    for name in FIELDS:
        value = song.get(name)
        if not isinstance(value, str):
            raise TypeError(f"{where}: {name} is {value!r}: a text is needed, '' for none")
    row = {name: song[name] for name in FIELDS}
    if not row["title"].strip() and not row["lyrics"].strip():
        row["title"] = NO_TEXT
    return row
