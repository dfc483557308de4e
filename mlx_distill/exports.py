"""Export of a model with its model card."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from mlx_distill.errors import ConfigError
from mlx_distill.models.export import ExportReport, to_hf
from mlx_distill.models.peft import AdapterReport, to_peft
from mlx_distill.models.trained_on import is_run, newest_model
from mlx_distill.progress import Progress, make_progress
from mlx_distill.report.model_card import card_text
from mlx_distill.report.summary import read_report


def export(
    model: str | Path,
    destination: str | Path,
    to: str = "hf",
    *,
    adapter: str = "merge",
    report: str | Path | None = None,
    progress: Progress | None = None,
) -> ExportReport | AdapterReport:
    """Write a model in the layout of Hugging Face or PEFT, with a model card.

    Args:
        model: The folder of an MLX model or adapter, or of a run: its last trained model.
        destination: The folder to write.
        to: ``hf`` for a whole checkpoint, ``peft`` for an adapter.
        adapter: With ``hf``: ``merge`` the adapter into the weights, or ``keep`` it for PEFT beside the
            unchanged base.
        report: The run, or its ``report.json``, with figures for the card; by default the run that holds the
            model, where it has a report.
        progress: Where progress is shown; on standard error by default.

    Raises:
        ConfigError: ``to`` is none of the two.
        ModelError: not a model or an adapter, or one that the layout has no place for.
        FileError: a failed write, or a destination that holds something else.
    """
    if to not in ("hf", "peft"):
        raise ConfigError(f"to: {to!r} is not one of hf, peft", fix="choose one of them")
    progress = progress or make_progress()
    if is_run(model):
        model = newest_model(model, progress.note)
    path = Path(report) if report else Path(model).resolve().parent / "report.json"
    figures = read_report(path).report if report or path.is_file() else None
    card = partial(card_text, report=figures)
    if to == "peft":
        return to_peft(model, destination, card=partial(card, library="peft"))
    return to_hf(model, destination, adapter=adapter, card=card, progress=progress)
