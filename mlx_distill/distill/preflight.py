"""What is known of a distillation before the student's training: how much of the teacher reaches the
student's tokens, and warnings about settings that are known to harm.

The figures are those of :class:`~mlx_distill.distill.mapped_mass.MappedMass`. The thresholds are about the
size of the effect; where a figure is below, nothing is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mlx_distill.distill.setting_checks import check_settings
from mlx_distill.errors import ConfigError
from mlx_distill.recipe import MAX_TOP_K, DistillConfig, TargetsConfig
from mlx_distill.text import counted, percent

FILE_NAME = "preflight.json"
FORMAT = 2
MAX_TAIL = 0.05
MAX_SOFTENED_TAIL = 0.01  # at another temperature than 1
MAX_UNSURE = 0.5  # tokens an answer
MAX_MANY_TO_ONE = 0.05  # of the student's tokens of digits
MIN_MAPPED = 0.9
MIN_SAME_GROUP = 0.98
_AT_STARTS = ("token_groups", "uld", "gold", "x_token")  # losses that read distributions at common starts

Kinds = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Advice:
    """A warning: what will go wrong, and what to do instead.

    Args:
        what: Is wrong.
        fix: For people.
        settings: Each change of the recipe's settings that the fix names, by their keys; a recipe accepts
            any one of them.
    """

    what: str
    fix: str
    settings: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Distillation:
    """What the warnings depend on.

    Args:
        loss: The token-level loss, with ``auto`` resolved; None: no such term.
        settings: Weights and temperature.
        targets: The text, and what is kept of a distribution.
        kinds: The figures by kind of text.
        may_be_live: Whether the recipe lets the teacher be live.
    """

    loss: str | None
    settings: DistillConfig
    targets: TargetsConfig
    kinds: Kinds
    may_be_live: bool = True

    @property
    def is_live(self) -> bool:
        """Whether the loss reads the teacher's whole distributions."""
        return self.settings.teacher == "live"

    @property
    def all(self) -> Mapping[str, Any]:
        """The figures of all kinds of text together."""
        return self.kinds["all"]

    def accepted(self, *changes: dict[str, Any]) -> list[dict[str, Any]]:
        """Those of some changes of settings that a recipe would not be refused with."""
        return [one for one in changes if self._is_accepted(one)]

    def _is_accepted(self, change: Mapping[str, Any]) -> bool:
        blocks: dict[str, dict[str, Any]] = {"distill": {}, "targets": {}}
        for key, value in change.items():
            block, _, name = key.partition(".")
            blocks[block][name] = value
        distill = replace(self.settings, **blocks["distill"])
        try:
            check_settings(distill, replace(self.targets, **blocks["targets"]))
        except ConfigError:
            return False
        return self.may_be_live or distill.teacher != "live"

    @property
    def spans_instead(self) -> dict[str, Any]:
        """The change to ``token_loss: alm``, which reads no distributions."""
        change: dict[str, Any] = {"distill.token_loss": "alm"}
        if self.is_live:
            change["distill.teacher"] = "cached"
        if self.settings.mid_token_rows:
            change["distill.mid_token_rows"] = False
        return change


def _named(*changes: Mapping[str, Any]) -> str:
    """Changes of settings as alternatives for people.

    >>> _named({"distill.teacher": "live"}, {"distill.token_loss": "alm", "distill.mid_token_rows": False})
    'distill.teacher: live, or distill.token_loss: alm with distill.mid_token_rows: false'
    """
    shown = [
        " with ".join(
            f"{key}: {str(value).lower() if isinstance(value, bool) else value}"
            for key, value in change.items()
        )
        for change in changes
    ]
    return ", or ".join(shown)


def preflight(
    loss: str | None,
    settings: DistillConfig,
    targets: TargetsConfig,
    mapped: Mapping[str, Any],
    mid_token: Mapping[str, Any] | None = None,
    *,
    may_be_live: bool = True,
) -> dict[str, Any]:
    """The figures and the warnings, as JSON.

    Args:
        loss: The token-level loss, with ``auto`` resolved; None: no such term.
        settings: Of the distillation.
        targets: Of the targets.
        mapped: The facts of a :class:`~mlx_distill.distill.mapped_mass.MappedMass`.
        mid_token: Those of :class:`~mlx_distill.losses.mid_token.MidTokens`; None: no targets by context.
        may_be_live: Whether the recipe lets the teacher be live: not where the training moves its base.
    """
    found = Distillation(loss, settings, targets, mapped["kinds"], may_be_live)
    warnings = [advice for rule in RULES if (advice := rule(found)) is not None]
    return {
        "format": FORMAT,
        "token_loss": loss,
        "text": targets.text,
        **mapped,
        **({} if mid_token is None else {"mid_token": mid_token}),
        "warnings": [asdict(one) for one in warnings],
    }


def lines(facts: Mapping[str, Any]) -> list[str]:
    """What is printed of :func:`preflight`."""
    vocabulary, whole = facts["vocabulary"], facts["kinds"]["all"]
    if vocabulary["same"]:
        first = "student and teacher have one vocabulary"
    else:
        smaller = min(vocabulary["student"], vocabulary["teacher"])
        first = (
            f"{vocabulary['shared']:,} tokens are in both vocabularies, "
            f"{percent(vocabulary['shared'] / smaller)} of the smaller one"
        )
    out = [
        f"{first}; in {counted(facts['rows'], 'answer')} {percent(whole['one_to_one'])} of the teacher's "
        f"{counted(whole['tokens'], 'token')} are one token of the student"
    ]
    if whole["mapped"] is not None:
        lost = [
            f"at {kind} {percent(rates['lost'])}"
            for kind, rates in facts["kinds"].items()
            if kind != "all" and rates["lost"] is not None and rates["lost"] >= 0.001
        ]
        out.append(
            f"of the teacher's probability mass {percent(whole['mapped'])} has a place in the student's "
            f"tokens, {percent(whole['tail'])} is outside of its top k, {percent(whole['lost'])} is lost"
            + (f" ({', '.join(lost)})" if lost else "")
        )
    if "mid_token" in facts:
        out += _mid_token_lines(facts["mid_token"])
    return out + [f"warning: {one['what']} (to fix: {one['fix']})" for one in facts["warnings"]]


def _mid_token_lines(facts: Mapping[str, Any]) -> list[str]:
    left_out, by_context = sum(facts["left_out"].values()), facts["by_context"]
    inside, across, mass = facts["inside"] - by_context, facts["across"], facts["unplaced_mass"]
    out = []
    if by_context:
        out.append(
            f"at {counted(by_context, 'common start')} the two tokens are in different groups: the "
            "distributions there are compared by the text around"
        )
    if inside or across:
        out.append(
            f"in the middle of tokens {counted(inside, 'place')} inside the teacher's and "
            f"{counted(across, 'place')} inside the student's have targets"
            + ("" if mass is None else f", of whose mass {percent(mass)} has no known outcome")
        )
    return out + ([f"{counted(left_out, 'such place')} left out"] if left_out else [])


def _greedy_text(found: Distillation) -> Advice | None:
    unsure, settings = found.all["unsure"], found.settings
    if found.targets.text != "greedy" or unsure < MAX_UNSURE:
        return None
    if not settings.text_weight and found.loss is None:
        return None
    return Advice(
        f"targets.text: greedy shows one text where the teacher has several: sampled answers would differ in "
        f"about {unsure:.1f} tokens each, and the student learns these as certain",
        "set targets.text: sampled"
        + ("" if found.loss is None else ", and a distill.token_weight of about 10 where such tokens matter"),
        found.accepted({"targets.text": "sampled"}),
    )


def _merged_digits(found: Distillation) -> Advice | None:
    merged = (found.kinds.get("digits") or {}).get("many_to_one")
    has_targets = found.loss not in _AT_STARTS or found.settings.mid_token_rows
    if has_targets or merged is None or merged < MAX_MANY_TO_ONE:
        return None
    change: dict[str, Any] = {"distill.mid_token_rows": True}
    if found.loss != "token_groups":
        change["distill.token_loss"] = "token_groups"
    settings = found.accepted(change)
    text = "use targets.text: sampled, " if found.targets.text != "sampled" else ""
    return Advice(
        f"{percent(merged)} of the student's tokens of digits hold several of the teacher's: "
        f"token_loss: {found.loss} trains the first digit of each by the teacher's probabilities, the others "
        "by text alone",
        (f"set {_named(*settings)}; or " if settings else "")
        + f"keep distill.text_weight at least as high as token_weight, {text}and hold the error of scores "
        "against controls.text",
        settings,
    )


def _blind_loss(found: Distillation) -> Advice | None:
    if found.loss != "uld":
        return None
    return Advice(
        "token_loss: uld compares sorted probabilities, whatever tokens they belong to: measured students "
        "agreed less with their teacher than those of its text alone",
        "use distill.token_loss: auto, and uld as a baseline only",
        found.accepted({"distill.token_loss": "auto"}),
    )


def _untrained(found: Distillation) -> Advice | None:
    if found.loss not in _AT_STARTS or found.settings.text_weight or found.settings.span_weight:
        return None
    ambiguous, target = found.all["ambiguous"] or 0.0, found.all["soft_target"]
    without = 0.0 if target is None else 1 - target
    if not ambiguous and not without:
        return None
    return Advice(
        f"distill.text_weight: 0 with token_loss: {found.loss}: {percent(ambiguous)} of the mass that maps "
        f"is in groups of several student tokens, and {percent(without)} of the student's tokens have no "
        "distribution as target: nothing trains either",
        "set distill.text_weight or distill.span_weight above 0",
    )


def _temperature(found: Distillation) -> Advice | None:
    t = found.settings.temperature
    if t == 1 or found.loss not in ("alm", "token_groups"):  # the others are at T over all tokens
        return None
    if found.loss == "alm":
        return Advice(
            f"distill.temperature: {t:g} has no effect on token_loss: alm",
            "set distill.temperature: 1",
            found.accepted({"distill.temperature": 1}),
        )
    tail = found.all["tail"]
    if found.is_live or tail is None or tail < MAX_SOFTENED_TAIL:
        return None
    settings = found.accepted({"distill.temperature": 1}, {"distill.teacher": "live"})
    return Advice(
        f"distill.temperature: {t:g} softens the listed {found.targets.top_k} tokens alone: "
        f"{percent(tail)} of the teacher's mass is outside of them",
        f"set {_named(*settings)}{_or_more_tokens(found)}",
        settings,
    )


def _or_more_tokens(found: Distillation) -> str:
    return ", or raise targets.top_k" if found.targets.top_k < MAX_TOP_K else ""


def _large_tail(found: Distillation) -> Advice | None:
    tail = found.all["tail"]
    if found.loss in (None, "alm") or found.is_live or found.targets.draws:
        return None
    if tail is None or tail < MAX_TAIL:
        return None
    settings = found.accepted({"distill.teacher": "live"})
    fixes = [f"set {_named(*settings)}"] if settings else []
    fixes += ["raise targets.top_k"] if found.targets.top_k < MAX_TOP_K else []
    return Advice(
        f"{percent(tail)} of the teacher's probability mass is outside of its top {found.targets.top_k}: "
        "which tokens have it is not trained, and the divergence is a lower bound",
        ", or ".join(fixes) or "lower distill.token_weight",
        settings,
    )


def _lost_mass(found: Distillation) -> Advice | None:
    mapped, tail = found.all["mapped"], found.all["tail"]
    if found.loss not in _AT_STARTS or mapped is None or mapped + tail >= MIN_MAPPED:
        return None
    lost = {
        kind: rates["lost"] * rates["tokens"]
        for kind, rates in found.kinds.items()
        if kind != "all" and rates["lost"] is not None
    }
    most = max(lost, key=lambda kind: lost[kind])
    settings = found.accepted(found.spans_instead)
    return Advice(
        f"{percent(found.all['lost'])} of the teacher's probability mass has no place in the student's "
        f"tokens, most of it in {most}",
        f"raise distill.text_weight, which trains every token, or use {_named(*settings)}, which uses every "
        "span",
        settings,
    )


def _other_groups(found: Distillation) -> Advice | None:
    same = found.all["same_group"]
    if found.loss != "token_groups" or not found.targets.draws or same is None or same >= MIN_SAME_GROUP:
        return None  # of the top k they are compared by context
    settings = found.accepted({"targets.draws": 0}, found.spans_instead)
    return Advice(
        f"at {percent(1 - same)} of the common starts the student's token is in another group than the "
        "teacher's: there the token-level loss and the text pull apart",
        f"set {_named(*settings)}, or lower distill.token_weight",
        settings,
    )


RULES: tuple[Callable[[Distillation], Advice | None], ...] = (
    _greedy_text,
    _blind_loss,
    _untrained,
    _merged_digits,
    _lost_mass,
    _other_groups,
    _large_tail,
    _temperature,
)
"""One function a warning; None where there is nothing to say. Why each harms: docs/training.md."""
