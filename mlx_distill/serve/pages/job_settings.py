"""The recipe of a job, and what differs in it from where it was started and from the run before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_distill.config import override
from mlx_distill.errors import DistillError
from mlx_distill.jobs import Job, get, list_jobs
from mlx_distill.ledger.database import Ledger
from mlx_distill.ledger.root import Root
from mlx_distill.serve.pages.job_form import recipe_path
from mlx_distill.serve.pages.recipe_checks import read_recipe
from mlx_distill.serve.pages.recipe_form import differences

_LOOKED_AT = 200  # jobs among which the run before is searched


@dataclass(frozen=True)
class Differences:
    """What differs between a job's recipe and another one.

    Attributes:
        source: The other one: ``recipe:NAME``, ``file:PATH`` or ``job:ID``.
        changed: The keys that differ, with the value of the other one and the job's.
        problem: Why they cannot be compared.
        job: The job whose recipe the other one is, where it is one.
    """

    source: str
    changed: Sequence[tuple[str, Any, Any]] = ()
    problem: str | None = None
    job: Job | None = None


def from_source(root: Root, job: Job) -> Differences | None:
    """What differs from the recipe that a job was started from, as that is now; None where it was started
    from none.
    """
    source = _asked(job).get("from")
    if not isinstance(source, str) or not source:
        return None
    try:
        old = read_recipe(root, recipe_path(root, source))
        return Differences(source, differences(old, recipe_of(root, job)))
    except DistillError as error:
        return Differences(source, problem=error.message)


def from_previous(ledger: Ledger, job: Job) -> Differences | None:
    """What differs from the newest earlier job of the same command and recipe that was started; None
    where there is none, or where the job was started from that one.
    """
    source = _asked(job).get("from")
    if not source:
        return None
    origin = _origin(ledger, job)
    earlier = list_jobs(ledger, kind=job.kind, after=job.id, limit=_LOOKED_AT)
    previous = next((one for one in earlier if one.attempt and _origin(ledger, one) == origin), None)
    if previous is None or source == f"job:{previous.id}":
        return None
    name = f"job:{previous.id}"
    try:
        changed = differences(recipe_of(ledger.root, previous), recipe_of(ledger.root, job))
        return Differences(name, changed, job=previous)
    except DistillError as error:
        return Differences(name, problem=error.message, job=previous)


def recipe_of(root: Root, job: Job) -> dict[str, Any]:
    """The recipe of a job in its plain YAML form, with paths relative to the root: that of the form; of the
    command line as it was when the job was submitted.

    Raises:
        DistillError: it cannot be read.
    """
    asked = _asked(job)
    if isinstance(asked.get("recipe"), Mapping):
        return dict(asked["recipe"])
    if isinstance(asked.get("set"), list):  # submitted before recipes were kept
        return override(read_recipe(root, recipe_path(root, str(asked["from"]))), asked["set"])
    return read_recipe(root, root.relative(job.recipe(root)))


def _asked(job: Job) -> Mapping[str, Any]:
    return job.request if isinstance(job.request, Mapping) else {}


def _origin(ledger: Ledger, job: Job) -> str | None:
    """The packaged recipe or the file that a job comes from, also over other jobs."""
    source = _asked(job).get("from")
    for _ in range(_LOOKED_AT):
        if not isinstance(source, str) or not source.startswith("job:"):
            break
        try:
            further = _asked(get(ledger, source[len("job:") :])).get("from")
        except DistillError:  # it is not known any more
            break
        if not further:
            break
        source = further
    return source if isinstance(source, str) else None
