"""The part of a recipe that says where rows come from, and how they are filtered and split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_distill.config import option


@dataclass(frozen=True)
class ValueConfig:
    """What is done with the values of one field of the answer, in this order."""

    field: str | None = option(None, "its name in the rows, where that is another one")
    split: str | None = option(None, "split a text at each of these into a list, such as ','")
    wrap: bool = option(False, "make a list of one item of a value that is no list")
    map: Mapping[str, Any] | None = option(None, "value in the rows: value in the answer, also within lists")
    others: str = option("error", "values that the map does not have", choices=["error", "keep"])
    scale: float | None = option(None, "multiply numbers by this; a number that is written as text is read")
    round: bool = option(False, "round to whole numbers, halves away from zero")
    default: Any = option(None, "the value in the answer where a row has none")
    drop: bool = option(False, "leave the field out of the answer")


@dataclass(frozen=True)
class SourceConfig:
    """One source of rows: files, a SQLite query, a Hub data set or a packaged generator."""

    path: str | None = option(
        None,
        "a file, or a folder of files: JSONL, JSON, CSV, TSV, Parquet, Arrow, compressed or not, or what "
        "save_to_disk wrote (asset:NAME for a packaged one)",
    )
    sqlite: str | None = option(None, "a SQLite database, with query", default_keyed=False)
    query: str | None = option(None, "the SELECT that gives the rows of sqlite", default_keyed=False)
    hub: str | None = option(None, "a data set of the Hugging Face Hub: org/name, or org/name:configuration")
    generator: str | None = option(None, "a packaged generator of rows")
    revision: str | None = option(None, "commit of the Hub data set")
    hub_split: str = option("train", "split of the Hub data set, or of a folder that has several")
    count: int = option(
        0,
        "rows to take: of a generator (0: its own default), or the first of a file or data set (0: all)",
        low=0,
    )
    seed: int = option(0, "seed of the generator", low=0)
    noise: float = option(
        0.0, "share of the generator's labels that are replaced by random ones", low=0.0, high=1.0
    )
    part: str | None = option(None, "part of the generator's templates: train or test")
    policy: str | None = option(
        None,
        "how the generator labels its rows; of music: drawn (task music_drawn) or drawn_fields "
        "(music_drawn_fields), which draw from known probabilities that the rows carry",
        default_keyed=False,
    )
    format: str = option(
        "auto",
        "format of the rows",
        choices=["auto", "messages", "sharegpt", "alpaca", "openai", "chatml", "plain"],
    )
    columns: Mapping[str, str] = option({}, "field of the task: column of the file")
    values: Mapping[str, ValueConfig] = option(
        {}, "field of the answer: how its values become those of the task's schema", default_keyed=False
    )
    answer_after: str | None = option(
        None,
        "a marker within the prompts, such as '### Classification:', behind which the answer stands: the "
        "prompt ends before it, and what is behind it is the answer of a row that has no other",
        default_keyed=False,
    )
    where: Mapping[str, Any] = option({}, "keep only rows whose fields have these values")
    split: str | None = option(
        None, "put every row of this source in this split", choices=["train", "valid", "test"]
    )
    set: str | None = option(None, "name under which results on its test rows are reported; default: 'test'")


@dataclass(frozen=True)
class DataConfig:
    """Prepare: rows to validated chats, filtered, deduplicated and split."""

    sources: list[SourceConfig] = option([], "where the rows come from")
    valid_fraction: float = option(
        0.05, "share of the rows without a split of their own that becomes validation rows", low=0.0, high=0.5
    )
    test_fraction: float = option(
        0.1, "share of the rows without a split of their own that becomes test rows", low=0.0, high=0.9
    )
    stratify: list[str] = option([], "fields to stratify the splits by, besides the label")
    min_chars: int = option(1, "drop rows with fewer characters of text", low=0)
    max_chars: int = option(100_000, "drop rows with more characters of text", low=1)
    min_prompt_chars: int = option(
        0,
        "drop rows with fewer characters before the answer, the system prompt included",
        low=0,
        default_keyed=False,
    )
    min_answer_chars: int = option(
        0, "drop rows with fewer characters of the answer, as JSON", low=0, default_keyed=False
    )
    min_share: Mapping[str, float] = option(
        {},
        "field: the smallest share of the training rows that each of its values may have; less is an error",
        default_keyed=False,
    )
    min_rating: float | None = option(None, "drop rows with a lower rating")
    rating_field: str = option("rating", "the field that holds the rating")
    domains: list[str] = option([], "keep only rows of these domains; empty keeps all")
    domain_field: str = option("domain", "the field that holds the domain")
    near_duplicates: float = option(
        0.85,
        "rows with this Jaccard similarity of word shingles or more are duplicates; 0 turns it off",
        low=0.0,
        high=1.0,
    )
    split_field: str = option("split", "the field that holds a row's own split")
    drop_invalid: bool = option(False, "drop and count rows that do not fit the task, instead of failing")
    seed: int = option(0, "seed of the split", low=0)
    folds: int = option(
        0,
        "cross-validation: divide the rows that do not ask for test into so many folds; mlx-distill validate "
        "sets it; 0: no folds",
        low=0,
        default_keyed=False,
    )
    fold: int = option(1, "the fold whose rows are the test rows, from 1", low=1, default_keyed=False)
    train_share: float = option(
        1.0,
        "share of the training rows that is kept, stratified, for a learning curve; rows of a smaller share "
        "are among those of a larger one",
        low=0.001,
        high=1.0,
        default_keyed=False,
    )
