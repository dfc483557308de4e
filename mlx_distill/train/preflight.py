"""Checks before any weight is loaded: settings that contradict each other or do not fit the model, and
checkpoints of an unfinished training with other settings.
"""

from __future__ import annotations

from pathlib import Path

from mlx_distill.config import changes, defaults_left_out, keyed
from mlx_distill.errors import ConfigError
from mlx_distill.optim.schedules import check_schedule
from mlx_distill.recipe import TrainConfig, current_settings
from mlx_distill.runtime import rank_and_size
from mlx_distill.storage import read_json
from mlx_distill.text import counted
from mlx_distill.train import checkpoint
from mlx_distill.train.trainable import make_trainable
from mlx_distill.train.updates import check_streaming


def check_settings(settings: TrainConfig, ranks: int = 1) -> None:
    """Refuse settings that contradict each other.

    Raises:
        ConfigError: no length of the run, a schedule longer than the run, streamed gradients with
            accumulation, patience without validation, a best metric of answers without answers,
            modules_to_save where everything is trained.

    >>> check_settings(TrainConfig())
    """
    check_schedule(settings.schedule, settings.warmup)
    check_streaming(settings, ranks)
    if settings.method == "full" and settings.modules_to_save:
        raise ConfigError("modules_to_save with method: full, which trains everything", fix="leave it out")
    if not settings.steps and not settings.epochs:
        raise ConfigError("steps: 0 and epochs: 0", fix="set the length of the run in one of them")
    for name in ("patience", "use_best", "evaluate_rows"):
        if getattr(settings, name) and not settings.evaluate_every:
            raise ConfigError(
                f"{name} with evaluate_every: 0", fix="set how often the validation rows are evaluated"
            )
    if settings.best_metric != "loss" and not settings.evaluate_rows:
        raise ConfigError(
            f"best_metric: {settings.best_metric} with evaluate_rows: 0",
            fix="set evaluate_rows: how many validation rows the model answers, such as 100",
        )


def check_model(folder: str | Path, settings: TrainConfig, *, dequantize: bool = False) -> list[str]:
    """Refuse settings that do not fit a model, by its config and headers alone; the paths of the modules that
    would be trained.

    Args:
        folder: A model in the Hugging Face layout or ours.
        settings: Method, targets and ranks.
        dequantize: Quantized weights will be dequantized.

    Raises:
        ModelError: an unknown target module, one with quantized weights, or a damaged checkpoint.
        ConfigError: a rank above a dimension.
    """
    from mlx_distill.models.load import empty_model
    from mlx_distill.models.modules import dequantize_model

    model = empty_model(folder)
    if dequantize:
        dequantize_model(model)
    return make_trainable(model, settings)


def check_leftover(checkpoints: Path, settings: TrainConfig, command: str, fits: bool) -> None:
    """Refuse to start a new training over the checkpoints of an unfinished one with other settings, data,
    base model or number of ranks.

    Args:
        checkpoints: Of a killed or interrupted stage.
        settings: Of the new training.
        command: The stage's command, for the error message.
        fits: Whether both trainings have the same key.

    Raises:
        ConfigError: there are such checkpoints; it says what differs.
    """
    path = checkpoint.latest(checkpoints)
    if path is None:
        return
    state = read_json(path / checkpoint.STATE)
    unfinished = f"{path}: {state.get('step')} steps of an unfinished {command}"
    ranks = len(state.get("random", []))
    if fits and ranks != rank_and_size()[1]:
        raise ConfigError(
            f"{unfinished} on {counted(ranks, 'rank')}, not {rank_and_size()[1]}",
            fix=f"launch as many as before, or give it up: --from {command}",
        )
    if fits:
        return
    old = current_settings({**defaults_left_out(settings), **state.get("settings", {})})
    new = current_settings({**defaults_left_out(settings), **keyed(settings)})
    common = [name for name in new if name in old]
    changed = changes({name: old[name] for name in common}, {name: new[name] for name in common})
    if changed:
        what = f"other settings ({', '.join(changed)})"
    else:
        what = "other data or another model" if set(new) <= set(old) else "another version of this package"
    raise ConfigError(
        f"{unfinished} with {what}", fix=f"restore them to go on from there, or give it up: --from {command}"
    )
