"""The candidates for the quantized weights, the gate that one of them has to pass, and what is kept of them
on disk while the stage runs.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_distill.errors import NotFiniteError
from mlx_distill.stages.context import Facts, check_stop, content_of
from mlx_distill.storage import atomic_path, digest, os_errors, read_json, scratch, write_json
from mlx_distill.text import counted

if TYPE_CHECKING:
    from mlx_distill.distill.quantization_error import QuantizationError
    from mlx_distill.models.quantization import Quantization
    from mlx_distill.models.refined import Refined
    from mlx_distill.stages.refinement import Bench

ANSWER_TOLERANCE = 0.002  # nats a token that the answers' divergence may rise by
ROUNDING, WEIGHTED, CALIBRATE, DISTILL = "rounding", "weighted scales", "calibrate", "distill"

Parts = Mapping[str, "Refined"]
Maker = Callable[["Bench", Path, Mapping[str, "Quantization"]], Iterable[tuple[str, "Refined"]]]


@dataclass(frozen=True)
class Candidate:
    """Quantized weights of every module (None: by rounding), their error, and the seconds that they took.

    A candidate that could not be made or measured has no error; ``failed`` says why.
    """

    name: str
    refined: Parts | None
    error: QuantizationError | None
    seconds: float
    failed: str | None = None

    def to_dict(self, passed: bool) -> Facts:
        """For the manifest."""
        figures = self.error.to_dict() if self.error else {"failed": self.failed}
        return {"name": self.name, **figures, "passed": passed, "seconds": round(self.seconds, 3)}


def passes(before: QuantizationError, after: QuantizationError | None) -> bool:
    """The gate: the divergence falls over all tokens, rises by at most 0.002 nats a token over the answers',
    and no more labels are flipped. What could not be measured does not pass.

    >>> from mlx_distill.distill.quantization_error import QuantizationError
    >>> before, after = (QuantizationError(kl, 0.001, 1, 100, 10, 2, 2) for kl in (0.03, 0.02))
    >>> passes(before, after), passes(after, before)
    (True, False)
    """
    return after is not None and (
        after.kl < before.kl
        and after.answer_kl <= before.answer_kl + ANSWER_TOLERANCE
        and after.flips <= before.flips
    )


def best_candidate(
    bench: Bench, folder: Path, quantizations: Mapping[str, Quantization]
) -> tuple[Parts | None, Facts]:
    """The best weights that pass the gate, and what the report says of all that were made.

    Args:
        bench: The student and the rows.
        folder: Of the stage.
        quantizations: Of each module.
    """
    settings = bench.context.recipe.quantize
    rounded = bench.error(quantizations)
    made = [Candidate(ROUNDING, None, rounded, 0.0)]
    kept = made[0]
    if settings.refine != "none":
        made += _refined(bench, folder, quantizations)
        passed = [one for one in reversed(made[1:]) if passes(rounded, one.error)]
        if not passed and WEIGHTED not in [one.name for one in made]:
            made.append(_weighted(bench, folder, quantizations))
            passed = [made[-1]] if passes(rounded, made[-1].error) else []
        kept = passed[0] if passed else made[0]
    for one in made:
        bench.context.progress.note(f"quantize: {one.name}: {_line(one)}{', kept' if one is kept else ''}")
    facts = {
        "asked": settings.refine,
        "kept": kept.name,
        "calibration_rows": len(bench.calibration) if settings.refine != "none" else 0,
        "answer_tolerance": ANSWER_TOLERANCE,
        "candidates": [one.to_dict(one is not made[0] and passes(rounded, one.error)) for one in made],
    }
    return kept.refined, facts


def _line(one: Candidate) -> str:
    error = one.error
    if error is None:
        return f"not used: {one.failed}"
    flips = f", {error.flips} of {counted(error.labelled, 'label')} flipped" if error.labelled else ""
    return f"KL {error.kl:.5f}, of the answers {error.answer_kl:.5f} nats a token{flips}"


def _refined(bench: Bench, folder: Path, quantizations: Mapping[str, Quantization]) -> list[Candidate]:
    """The candidate that was asked for, behind those that it is made from."""
    calibrated = _candidate(bench, CALIBRATE, folder, quantizations, _calibrated)
    if bench.context.recipe.quantize.refine != DISTILL:
        return [calibrated]
    out = [calibrated]
    if any(q.mode == "affine" for q in quantizations.values()):
        out.insert(0, _weighted(bench, folder, quantizations))
    start, weighted = calibrated.refined or {}, out[0].refined if len(out) > 1 else None
    distilled = partial(_distilled, start=start, weighted=weighted or {})
    return [*out, _candidate(bench, DISTILL, folder, quantizations, distilled)]


def _weighted(bench: Bench, folder: Path, quantizations: Mapping[str, Quantization]) -> Candidate:
    """Weighted scales, and the weights rounded to nearest."""
    return _candidate(bench, WEIGHTED, folder, quantizations, partial(_calibrated, feedback=False))


def _candidate(
    bench: Bench, name: str, folder: Path, quantizations: Mapping[str, Quantization], make: Maker
) -> Candidate:
    """Make a candidate, module by module, or read what an interrupted run has made of it; measure it. One
    whose training diverges has no error.
    """
    place = scratch(folder) / name.replace(" ", "-")
    key = digest({path: q.config for path, q in quantizations.items()})
    index = place / "done.json"
    if not (index.is_file() and read_json(index)["key"] == key):
        began = time.perf_counter()
        # What the weights were rounded from is four bytes a weight, and only distill begins there.
        latent = bench.context.recipe.quantize.refine == DISTILL and name == CALIBRATE
        failed = None
        try:
            for path, one in make(bench, place, quantizations):
                save_refined(place, path, one, latent=latent)
                check_stop(bench.context)
        except NotFiniteError as error:
            failed = f"its training diverged: {error.reason} (lower quantize.refine_learning_rate)"
        write_json(index, {"key": key, "seconds": time.perf_counter() - began, "failed": failed})
    done = read_json(index)
    if done["failed"]:
        return Candidate(name, None, None, done["seconds"], done["failed"])
    refined = {path: _read_refined(place, path) for path in quantizations}
    measured = bench.error(quantizations, refined)
    if not math.isfinite(measured.kl + measured.answer_kl):
        failed = "its divergence from the unquantized student is not a number"
        return Candidate(name, None, None, done["seconds"], failed)
    return Candidate(name, refined, measured, done["seconds"])


def save_refined(folder: Path, path: str, refined: Refined, *, latent: bool = True) -> None:
    """Write the tensors of a module, and with ``latent`` the weights that they were rounded from."""
    import mlx.core as mx

    with os_errors():
        folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / f"{path}.safetensors") as file:
        extra = {"latent": refined.latent} if latent else {}
        mx.save_safetensors(str(file), {**refined.parts, **extra})


def read_refined(folder: Path, path: str) -> Refined | None:
    """What :func:`save_refined` wrote, whose arrays are read when they are used (an empty one for latent
    weights that were not written); None where nothing was.
    """
    file = folder / f"{path}.safetensors"
    return _read_refined(folder, path) if file.is_file() else None


def _read_refined(folder: Path, path: str) -> Refined:
    import mlx.core as mx

    from mlx_distill.models.refined import Refined

    parts: dict[str, Any] = dict(mx.load(str(folder / f"{path}.safetensors")))
    latent = parts.pop("latent", mx.zeros((0,)))
    names = [name for name in ("weight", "scales", "biases") if name in parts]
    return Refined({name: parts[name] for name in names}, latent)


def _calibrated(
    bench: Bench, folder: Path, quantizations: Mapping[str, Quantization], feedback: bool = True
) -> Iterator[tuple[str, Refined]]:
    """Weighted scales, and GPTQ's error feedback unless it is turned off; a module without inputs to measure
    (an embedding that is not tied) is rounded.
    """
    import mlx.core as mx

    from mlx_distill.models.calibrate import calibrate
    from mlx_distill.models.quantized_modules import rounded_parts
    from mlx_distill.models.refined import Refined
    from mlx_distill.models.rounding import Rounding

    rows = [answer.tokens for answer in bench.calibration]
    dtype = Counter(bench.dtypes[path] for path in quantizations).most_common(1)[0][0]
    latents = bench.context.recipe.quantize.refine == DISTILL  # which begins there
    yield from calibrate(
        bench.model,
        rows,
        quantizations,
        rounding=Rounding(dtype=dtype, feedback=feedback, latents=latents),
        finished=partial(read_refined, folder),
        progress=bench.context.progress,
    )
    modules = dict(bench.model.named_modules())
    for path, q in quantizations.items():
        if read_refined(folder, path) is None:
            parts = rounded_parts(modules[path], q, bench.dtypes[path])
            yield path, Refined(parts, modules[path].weight.astype(mx.float32))


def _distilled(
    bench: Bench,
    folder: Path,
    quantizations: Mapping[str, Quantization],
    start: Parts,
    weighted: Parts,
) -> Iterator[tuple[str, Refined]]:
    """Weights trained towards the unquantized student."""
    from mlx_distill.distill.refine import RefineJob, RefineSettings, refine

    context = bench.context
    settings = context.recipe.quantize
    refined = refine(
        RefineJob(
            bench.model,
            quantizations,
            start,
            [answer.tokens for answer in bench.calibration],
            folder=folder / "training",
            identity=content_of(context.run / "student"),
            settings=RefineSettings(steps=settings.refine_steps, learning_rate=settings.refine_learning_rate),
            progress=context.progress,
            stop=context.stop,
            weighted=weighted,
        )
    )
    yield from refined.items()
