"""What was spent so far: the work of runs and served calls, recorded in the ledger and never rewritten, and
their sums.

What is recorded are seconds of the machine and tokens. Money comes from a user's file of prices alone, at the
time of the record (the recipe's ``evaluate.costs``) or of the question (``--prices``); see docs/costs.md.
"""

from __future__ import annotations

import sqlite3
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlx_distill.errors import ConfigError, DistillError
from mlx_distill.evaluate.audit import FOLDER as AUDIT
from mlx_distill.evaluate.costs import NEEDS, HardwarePrice, Prices, call_cost, costs_of, stage_seconds
from mlx_distill.ledger.database import Ledger, from_json, to_json
from mlx_distill.ledger.runs import list_runs, read_run, run_files, scan_runs
from mlx_distill.run_models import RUN_MODELS, validation_of
from mlx_distill.storage import read_json, read_manifest
from mlx_distill.text import counted, duration

SERVED = "served"
SECOND = "second"
_KINDS = {"data": "preparation", "targets": "targets", "quantized": "quantization"}


def _kind(stage: str) -> str:
    if stage.startswith("evaluations/") or stage == AUDIT:
        return "evaluation"
    if stage.endswith("_base"):
        return "conversion"
    return _KINDS.get(stage, "training")


# --- recording ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ServedCalls:
    """Calls that a model answered within some time, such as a minute.

    Attributes:
        calls: How many.
        seconds: For which the machine worked for them; where calls are computed together, their own latencies
            add up to more than that.
        prompt_tokens: Of all of them.
        tokens: That were generated.
        errors: Calls without a valid answer.
        measured: Whether the seconds were measured, or estimated.
    """

    calls: int
    seconds: float
    prompt_tokens: int = 0
    tokens: int = 0
    errors: int = 0
    measured: bool = True


def record_served(
    ledger: Ledger, model: str, served: ServedCalls, *, run: str | None = None, prices: Prices | None = None
) -> None:
    """Add one row for calls that a model answered. Call it seldom: once a minute for each model, not once a
    call.

    Args:
        ledger: The ledger.
        model: ``NAME:VERSION`` of the registry, or the run or folder under the root.
        served: The calls.
        run: The run that made the model.  [default: the one that the registry or the path says]
        prices: Of :func:`mlx_distill.evaluate.costs.read_prices`; None: seconds and tokens alone.
    """
    if served.calls <= 0:
        return
    facts = {"model": model, **{key: value for key, value in asdict(served).items() if key != "seconds"}}
    with ledger.write() as db:
        run = run or _run_of(db, ledger, model)
        price = _price(prices.hardware, prices.currency, prices.date) if prices else _NO_PRICE
        _insert(db, SERVED, served.seconds, price, served.measured, run, None, facts, time.time())


def record_training(ledger: Ledger, run_path: str | Path) -> int:
    """Add a row for the work of each finished stage of a run that has none yet; return how many were added.

    A stage that is linked from another run, or looked at twice, counts once; one that was made again counts
    again. The seconds of a training are those of all its parts, also before an interruption.

    Args:
        ledger: The ledger.
        run_path: The run's folder, under the root.
    """
    folder = ledger.root.inside(run_path)
    rows = _stage_rows(folder, ledger.root.relative(folder))
    if not rows:
        return 0
    with ledger.read() as db:
        known = {row["source"] for row in db.execute("SELECT source FROM costs WHERE source IS NOT NULL")}
    added = 0
    if any(row["source"] not in known for row in rows):
        with ledger.write() as db:
            for row in rows:
                with suppress(sqlite3.IntegrityError):  # another process has just added it
                    _insert(db, **row)
                    added += 1
    return added


def record_runs(ledger: Ledger) -> int:
    """Add the work of all runs under the root that is not recorded yet; return how many rows were added."""
    scan_runs(ledger)
    added = 0
    for entry in list_runs(ledger):
        with suppress(DistillError):  # the index says that it is damaged
            added += record_training(ledger, entry.path)
    return added


_Price = tuple[float | None, str | None, str | None]  # of a second, currency, date
_NO_PRICE: _Price = (None, None, None)


def _price(hardware: HardwarePrice | None, currency: str, date: str) -> _Price:
    return _NO_PRICE if hardware is None else (sum(hardware.a_second), currency, date)


def _insert(
    db: sqlite3.Connection,
    kind: str,
    quantity: float,
    price: _Price,
    measured: bool,
    run: str | None,
    source: str | None,
    facts: Mapping[str, Any],
    created_at: float,
) -> None:
    db.execute(
        "INSERT INTO costs (kind, quantity, unit, unit_price, currency, price_date, basis, run, source, "
        "facts, created_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            kind,
            quantity,
            SECOND,
            *price,
            "measured" if measured else "estimated",
            run,
            source,
            to_json(facts),
            created_at,
        ),
    )


def _run_of(db: sqlite3.Connection, ledger: Ledger, model: str) -> str | None:
    """The run that made a model, as a path relative to the root."""
    name, _, number = model.rpartition(":")
    if number.isdigit():
        row = db.execute(
            "SELECT source_run FROM versions WHERE model = ? AND number = ?", (name, int(number))
        ).fetchone()
        if row is not None:
            return None if row["source_run"] is None else str(row["source_run"])
    with suppress(ConfigError, OSError):
        folder = ledger.root.inside(model.partition(":")[0])
        for path in (folder, folder.parent):
            if path.is_relative_to(ledger.root.path) and run_files(path):
                return ledger.root.relative(path)
    return None


def _stage_rows(folder: Path, run: str) -> list[dict[str, Any]]:
    from mlx_distill.report.provenance import training

    trainings = training(folder)
    price = _NO_PRICE
    with suppress(DistillError, KeyError, TypeError):
        costs = read_json(folder / "report.json")["costs"]
        price = _price(HardwarePrice(**costs["hardware"]), costs["currency"], costs["date"])
    rows = []
    names = ("data", "targets", *dict.fromkeys(model.folder for model in RUN_MODELS.values()))
    evaluations = sorted(path.parent.name for path in folder.glob("evaluations/*/manifest.json"))
    for stage in (*names, *(f"evaluations/{name}" for name in evaluations), AUDIT):
        manifest = read_manifest(folder / stage)
        if manifest is None or not manifest.recorded.get("finished"):
            continue
        recorded, own = manifest.recorded, trainings.get(stage, {})
        seconds = stage_seconds(own, recorded.get("seconds"))
        if seconds is None:
            continue
        facts = {"stage": stage, "recipe": recorded.get("recipe")}
        facts |= {key: own[key] for key in ("tokens", "steps") if own.get(key) is not None}
        rows.append(
            {
                "kind": _kind(stage),
                "quantity": float(seconds),
                "price": price,
                "measured": True,
                "run": run,
                "source": f"{stage} {manifest.key} {recorded['finished']!r}",
                "facts": facts,
                "created_at": float(recorded["finished"]),
            }
        )
    return rows


# --- sums ---------------------------------------------------------------------------------------------------


@dataclass
class Sum:
    """The sum of some rows.

    Attributes:
        seconds: Of the machine.
        calls: That were served.
        prompt_tokens: Of served calls.
        tokens: Generated by served calls, or trained.
        money: By currency, of the rows with a price.
        unpriced_seconds: Of the rows without one.
        estimated_seconds: Of those that were not measured.
    """

    seconds: float = 0.0
    calls: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    money: dict[str, float] = field(default_factory=dict)
    unpriced_seconds: float = 0.0
    estimated_seconds: float = 0.0

    def add(self, row: Mapping[str, Any], prices: Prices | None) -> None:
        """Add a row of the ledger; one without a price of its own gets that of ``prices``."""
        facts = row["facts"]
        self.seconds += row["quantity"]
        self.calls += facts.get("calls") or 0
        self.prompt_tokens += facts.get("prompt_tokens") or 0
        self.tokens += facts.get("tokens") or 0
        if row["basis"] != "measured":
            self.estimated_seconds += row["quantity"]
        price, currency = row["unit_price"], row["currency"]
        if price is not None:
            cost = row["quantity"] * price
        elif prices is not None and prices.hardware is not None:
            cost, currency = call_cost(row["quantity"], prices.hardware)["total"], prices.currency
        else:
            self.unpriced_seconds += row["quantity"]
            return
        self.money[currency] = self.money.get(currency, 0.0) + cost

    @property
    def text(self) -> str:
        """The sum for people."""
        calls = [counted(self.calls, "call")] if self.calls else []
        tokens = [counted(self.tokens, "token")] if self.tokens else []
        money = [f"{amount:,.4g} {currency}" for currency, amount in sorted(self.money.items())]
        parts = [duration(self.seconds), *calls, *tokens, *money]
        if self.money and self.unpriced_seconds:
            parts.append(f"{duration(self.unpriced_seconds)} without a price")
        if self.estimated_seconds:
            parts.append(f"{duration(self.estimated_seconds)} estimated")
        return ", ".join(parts)


@dataclass(frozen=True)
class CostReport:
    """Sums of what was spent.

    Attributes:
        total: Of everything.
        kinds: By kind: training, targets, evaluation, served, ...
        months: By month of UTC, ``2026-11``, the newest first.
        models: By model of the registry, else by run.
        paid_back: For each served model the calls after which it has paid for itself against each system that
            ``prices`` names (None: never), with what it cost ``once`` and ``a_call``, and its ``calls`` so
            far.
        currency: Of ``prices``, or None.
        price_date: Of ``prices``, or None.
    """

    total: Sum
    kinds: Mapping[str, Sum]
    months: Mapping[str, Sum]
    models: Mapping[str, Sum]
    paid_back: Mapping[str, Mapping[str, Any]]
    currency: str | None = None
    price_date: str | None = None

    def lines(self) -> list[str]:
        """The sums for people."""
        if not self.total.seconds and not self.total.calls:
            return [
                "nothing was spent under this root yet",
                "start with: mlx-distill run RECIPE, or mlx-distill jobs submit run RECIPE",
            ]
        out = [f"total: {self.total.text}"]
        for title, sums in (("kind", self.kinds), ("month", self.months), ("model", self.models)):
            width = max(map(len, sums))
            out += ["", f"by {title}", *(f"  {name:<{width}}  {one.text}" for name, one in sums.items())]
        for model, entry in self.paid_back.items():
            out += ["", f"{model}: {entry['once']:,.4g} {self.currency} once, {entry['a_call']:.3g} a call"]
            for system, calls in entry["break_even"].items():
                end = "never" if calls is None else f"after {calls:,.0f} calls"
                out.append(f"  paid back against {system}: {end}; {entry['calls']:,} so far")
        if not self.total.money:
            out += ["", "no prices: name a file of prices with --prices (docs/costs.md)"]
        return out


def cost_report(ledger: Ledger, prices: Prices | None = None) -> CostReport:
    """The sums of all recorded costs.

    Args:
        ledger: The ledger; what :func:`record_runs` has not recorded is not in it.
        prices: For the rows without a price of their own, and for what models are paid back against.
    """
    total = Sum()
    kinds, months, models = (defaultdict[str, Sum](Sum) for _ in range(3))
    served = defaultdict[str, Sum](Sum)
    stages: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    runs: defaultdict[str, set[str]] = defaultdict(set)
    with ledger.read() as db:
        made_by = {
            row["source_run"]: row["model"]
            for row in db.execute("SELECT model, source_run FROM versions WHERE source_run IS NOT NULL")
        }
        folders: defaultdict[str, set[str]] = defaultdict(set)
        for row in db.execute("SELECT model, json_extract(info, '$.folder') AS folder FROM versions"):
            folders[row["model"]].add(row["folder"] or "")
        for raw in db.execute("SELECT * FROM costs ORDER BY created_at DESC, id DESC"):
            row = {**dict(raw), "facts": from_json(raw["facts"])}
            model = _model(row, made_by)
            month = datetime.fromtimestamp(row["created_at"], UTC).strftime("%Y-%m")
            for one in (total, kinds[row["kind"]], months[month], models[model]):
                one.add(row, prices)
            if row["kind"] == SERVED:
                served[model].add(row, prices)
            else:
                stages[model][row["facts"].get("stage") or ""] += row["quantity"]
            if row["run"]:
                runs[model].add(row["run"])
    paid_back = {
        model: entry
        for model, calls in served.items()
        if prices and (entry := _paid_back(ledger, prices, calls, stages[model], folders[model], runs[model]))
    }
    by_cost = sorted(kinds.items(), key=lambda item: -item[1].seconds)
    return CostReport(
        total,
        dict(by_cost),
        dict(months),
        dict(models),
        paid_back,
        prices.currency if prices else None,
        prices.date if prices else None,
    )


def _model(row: Mapping[str, Any], made_by: Mapping[str, str]) -> str:
    """The model of the registry that a row is for, else its run or the cross-validation that this is a fold
    of, else the name that was served.
    """
    name = str(row["facts"].get("model") or "")
    model, _, number = name.rpartition(":")
    if model and number.isdigit():
        return model
    run = row["run"] or ""
    return made_by.get(run) or validation_of(run) or run or name or "other"


def _paid_back(
    ledger: Ledger,
    prices: Prices,
    served: Sum,
    stages: Mapping[str, float],
    folders: Iterable[str],
    runs: Sequence[str] | set[str],
) -> dict[str, Any] | None:
    """What a served model cost once and costs a call, and after how many calls it is paid back, counted as
    the report of its run does (:data:`~mlx_distill.evaluate.costs.NEEDS`), but for stages that were made
    again, each time of which counts. None where no work on it is recorded, or nothing is known of a call.

    Args:
        ledger: The ledger.
        prices: With the systems that may be replaced.
        served: Its calls.
        stages: Seconds of the stages of its runs.
        folders: The folders of the runs in which its versions lay.
        runs: Its runs.
    """
    # A model that is no version is the run's final one.
    needs = {stage for folder in folders for stage in NEEDS.get(folder, ())} or set(NEEDS["quantized"])
    if not needs.intersection(stages) or not served.calls or not served.seconds:
        return None
    figures = {
        "items_per_minute": 60 * served.calls / served.seconds,
        "prompt_tokens": served.prompt_tokens / served.calls or None,
        "tokens": served.tokens / served.calls or None,
    }
    costs = costs_of(
        prices,
        {"model": figures},
        stages=stages,
        needs={"model": sorted(needs)},
        labelled_rows=_labelled_rows(ledger, runs),
    )["models"]["model"]
    if costs["call"] is None:
        return None
    return {
        "once": costs["fixed"],
        "a_call": costs["call"]["total"],
        "calls": served.calls,
        "replaced": costs["replaced"],
        "break_even": costs["break_even"],
    }


def _labelled_rows(ledger: Ledger, runs: Sequence[str] | set[str]) -> int:
    """The rows of the data of some runs; runs on the same data count once."""
    rows: dict[str, int] = {}
    for run in runs:
        facts: Mapping[str, Any] = {}
        with suppress(DistillError):
            facts = read_run(ledger.root, run).facts
        key = facts.get("stages", {}).get("data", {}).get("key", run)
        rows[key] = sum(facts.get("rows", {}).values())
    return sum(rows.values())
