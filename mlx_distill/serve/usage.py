"""What one request used: filled in by its route, read by metrics, log and costs when it has been answered."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from fastapi import Request

from mlx_distill.config import ASSETS
from mlx_distill.ledger.root import Root
from mlx_distill.records import Classification, Prediction
from mlx_distill.serve.loading import Resolved

REFUSED = ("bad row", "prompt too long")
"""Kinds of errors that are the row's: the model was not asked."""
_LONGEST_ID = 200


@dataclass
class Usage:
    """What a request used.

    Attributes:
        model: The version that answered, as of :func:`version_name`; None where none did.
        ids: Of the rows, as their owner calls them.
        errors: Of the rows without an answer: ``id`` and ``type``.
        calls: Rows or chats that the model was asked.
        invalid: Those of them without a valid answer.
        prompt_tokens: That it read.
        tokens: That it generated.
    """

    model: str | None = None
    ids: list[str] = field(default_factory=list)
    errors: list[dict[str, str]] = field(default_factory=list)
    calls: int = 0
    invalid: int = 0
    prompt_tokens: int = 0
    tokens: int = 0

    def add(self, answers: Iterable[Prediction | Classification]) -> None:
        """Count the answers to rows."""
        for answer in answers:
            self.ids.append(answer.id[:_LONGEST_ID])
            asked = answer.error_kind not in REFUSED
            self.calls += asked
            if answer.error is not None:
                self.invalid += asked
                self.errors.append({"id": answer.id[:_LONGEST_ID], "type": error_type(answer)})
            if asked:
                self.prompt_tokens += answer.prompt_tokens
                self.tokens += answer.tokens if isinstance(answer, Prediction) else 0


def usage_of(request: Request) -> Usage:
    """What a request used so far."""
    usage: Usage = request.state.usage
    return usage


def error_type(answer: Prediction | Classification) -> str:
    """The kind of a row's error as a word for programs, such as ``not_json``."""
    return (answer.error_kind or "error").replace(" ", "_")


def version_name(resolved: Resolved, root: Root) -> str:
    """What logs, metrics and costs call a model, whichever name a client wrote: ``NAME:VERSION`` of the
    registry, else its folder under the root or among the packaged assets; ``NAME@alias`` of an external
    analyzer.

    >>> from mlx_distill.registry.resolve import ResolvedModel
    >>> root = Root.at("/work")
    >>> version_name(ResolvedModel("music", root.path / "kept", model="music", version=3), root)
    'music:3'
    >>> version_name(ResolvedModel("./runs/x", root.path / "runs" / "x" / "student"), root)
    'runs/x/student'
    """
    if resolved.version is not None:
        return f"{resolved.model}:{resolved.version}"
    path = resolved.path
    if path is None:
        return f"{resolved.model or 'external'}@{resolved.alias or 'external'}"
    if path.is_relative_to(root.path):
        return path.relative_to(root.path).as_posix()
    return f"asset:{path.relative_to(ASSETS).as_posix()}" if path.is_relative_to(ASSETS) else path.name
