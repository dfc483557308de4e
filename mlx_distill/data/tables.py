"""Rows of Arrow tables: Parquet and Arrow files, saved data sets, and data sets of the Hub, with the names of
their classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from mlx_distill.data.json_values import class_decoder, takes_text
from mlx_distill.errors import DataError

Row = dict[str, Any]
# For a column the schema of the field that it is for, and whether that is required.
Fields = Mapping[str, tuple[Any, bool]]
_MEDIA = ("Image", "Audio", "Video", "Pdf", "Nifti", "Mesh")
_ROWS = 256  # that are Python objects at a time


def arrow_rows(
    batches: Iterable[Any], spec: str, features: Mapping[str, Any], fields: Fields
) -> Iterator[tuple[str, Row]]:
    """Yield ``(where, row)`` of Arrow tables or record batches, a few rows at a time, without images, sound
    and video.

    Args:
        batches: The tables.
        spec: What messages call their file.
        features: The columns' types as ``datasets`` writes them; empty where unknown.
        fields: The schema of the field that each column is for.
    """
    media = media_columns(features)
    names = class_names(features, fields)
    number = 0
    for batch in batches:
        kept = batch.drop_columns(media) if media else batch
        kept.validate(full=True)  # offsets of a damaged file would point outside its memory
        for start in range(0, kept.num_rows, _ROWS):
            for row in kept.slice(start, _ROWS).to_pylist():
                number += 1
                yield f"{spec}:{number}", names(row)


def class_names(features: Mapping[str, Any], fields: Fields) -> Callable[[Row], Row]:
    """A function that replaces the numbers of classes in a row by their names, except where the answer's
    field is a number.
    """
    decoders = {
        name: decoder
        for name, feature in features.items()
        if (decoder := class_decoder(feature)) and (name not in fields or takes_text(fields[name][0]))
    }
    return lambda row: row | {name: decode(row[name]) for name, decode in decoders.items() if name in row}


def media_columns(features: Mapping[str, Any]) -> list[str]:
    """The columns with images, sound or video, which no prompt can hold."""
    return [name for name, feature in features.items() if _is_media(feature)]


def _is_media(feature: Any) -> bool:
    if isinstance(feature, list):
        return any(map(_is_media, feature))
    if not isinstance(feature, Mapping):
        return False
    return feature.get("_type") in _MEDIA or _is_media(feature.get("feature"))


def features_of(schema: Any) -> dict[str, Any]:
    """The columns' types that ``datasets`` wrote into an Arrow schema; empty if it did not write it."""
    with suppress(KeyError, ValueError, TypeError):
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return dict(features) if isinstance(features, dict) else {}
    return {}


def check_names(names: Sequence[str], spec: str, fix: str = "rename one of them") -> None:
    """Refuse two columns of one name: only one of them could be in a row."""
    twice = next((name for name in names if list(names).count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{spec}: two columns are called {twice!r}", fix=fix)
