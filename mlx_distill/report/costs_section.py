"""Section of the report: what calls, trainings and errors cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mlx_distill.evaluate.people_text import error_line
from mlx_distill.report.tables import Report
from mlx_distill.run_models import model_phrase
from mlx_distill.text import NONE, counted, duration, significant

_STAGES = {"data": "Preparation of the rows", "targets": "The teacher's targets", "quantized": "Quantization"}
_COLUMNS = ("Seconds a call", "A call", "A million tokens")


def costs(report: Report) -> dict[str, Any] | None:
    """The section: prices of each model's calls and when they are paid back, fixed costs, and the errors';
    None without prices.
    """
    facts = report.get("costs")
    if not facts:
        return None
    replaced = list(next(iter(facts["models"].values()))["replaced"]) if facts["models"] else []
    return {
        "date": facts["date"],
        "currency": facts["currency"],
        "hardware": facts["hardware"],
        "columns": [
            "Seconds a call",
            "A call",
            "A million tokens",
            *map("Paid back against {}".format, replaced),
        ],
        "models": {name: _model(own, replaced) for name, own in facts["models"].items()},
        "replaced": {name: _replaced(facts, name, len(replaced)) for name in replaced},
        "once": {
            **{_stage(name): _work(entry) for name, entry in facts["stages"].items()},
            f"Labelling of {counted(facts['labelled_rows'], 'row')}": _price(facts["fixed"]["labelling"]),
            "Besides": _price(facts["fixed"]["spent"]),
            "In all": _price(facts["fixed"]["total"]),
        },
        "errors": _errors(facts),
    }


def _stage(name: str) -> str:
    if name in _STAGES:
        return _STAGES[name]
    if name.endswith("_base"):
        return f"Conversion of {model_phrase(name.replace('_base', '_before'))}"
    return f"Training of {model_phrase(name)}"


def _work(entry: Mapping[str, Any]) -> str:
    return f"{_price(entry['total'])} ({duration(entry['seconds'], page=True)})"


def _model(own: Mapping[str, Any], replaced: list[str]) -> list[str]:
    call = own["call"]
    if call is None:
        return [NONE] * (len(_COLUMNS) + len(replaced))
    return [
        duration(call["seconds"], page=True),
        _price(call["total"]),
        _price(call["million_tokens"]),
        *(_paid_back(own, name) for name in replaced),
    ]


def _replaced(facts: Mapping[str, Any], name: str, columns: int) -> list[str]:
    """The row of a system that may be replaced, by the tokens of the last model with known ones."""
    known = [own["replaced"][name] for own in facts["models"].values() if own["replaced"][name] is not None]
    return [NONE, _price(known[-1] if known else None), *[NONE] * (1 + columns)]


def _paid_back(own: Mapping[str, Any], name: str) -> str:
    if name not in own["break_even"]:
        return NONE
    calls, price = own["break_even"][name], _price(own["replaced"][name])
    return (
        f"never ({price} a call)"
        if calls is None
        else f"{counted(math.ceil(calls), 'call')} ({price} a call)"
    )


def _price(value: float | None) -> str:
    return NONE if value is None else significant(value, 3)


def _errors(facts: Mapping[str, Any]) -> str | None:
    if not facts["errors"]:
        return None
    a, b = map(model_phrase, facts["pair"])
    return f"B is {b}, A is {a}: {error_line(facts['errors'])}."
