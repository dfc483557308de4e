"""Which fields of tokenizer_config.json and tokenizer.json are not used as they stand.

transformers reads both files, here as elsewhere, so chats have the tokens of its ``apply_chat_template``
whatever the other fields say. ``tokenizer_class``, ``add_prefix_space``, ``legacy``, normalizers and flags
of added tokens are honoured. ``add_bos_token``, ``add_eos_token`` and the post-processor have no effect: the
template writes such tokens. Neither have ``model_max_length`` and the sides of padding and truncation: the
tokenizer cuts and pads nothing. The tables below hold the others.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mlx_distill.errors import ModelError
from mlx_distill.models.config_files import read_object
from mlx_distill.models.token_ids import beyond_table
from mlx_distill.text import listed

CONFIG_FILE, TOKENIZER_FILE = "tokenizer_config.json", "tokenizer.json"

# An error where it is set: why, and the fix.
_REFUSED = {
    "auto_map": (
        "asks to run code that comes with the checkpoint",
        "remote code is never run; use a checkpoint without it",
    ),
    "chat_template_type": (
        "names a program of mlx-lm in place of the chat template",
        "remove it, and add chat_template.jinja",
    ),
}
# A note where it is set: what is done instead.
_NOT_USED = {
    "split_special_tokens": "the control tokens of the chat template are read as tokens, not as text",
    "clean_up_tokenization_spaces": "answers keep the spaces that the model writes",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": (
        "answers keep the spaces that the model writes"
    ),
}
_NAMED = ("bos_token", "eos_token", "unk_token")  # a padding token is never read


def check_tokenizer_config(folder: Path) -> None:
    """Raise for a field that cannot be honoured.

    Args:
        folder: Of a tokenizer.

    Raises:
        ModelError: with file, field and fix.
    """
    path = folder / CONFIG_FILE
    config = read_object(path) if path.is_file() else {}
    for name, (problem, fix) in _REFUSED.items():
        if config.get(name):
            raise ModelError(f"{path}: {name} {problem}", fix=fix)


def settle_tokenizer(folder: Path, tokenizer: Any, rows: int | None) -> list[str]:
    """Turn off what would cut, pad or change texts, and refuse added tokens that are not read under their
    own numbers.

    ``tokenizers`` numbers added tokens that are not in the vocabulary one after the other, whatever the files
    say. Behind a gap a model would read other rows than those it was trained with.

    Args:
        folder: Of the tokenizer.
        tokenizer: As loaded from it by transformers, or mlx-lm's wrapper; it is changed.
        rows: Of the model's embedding, where it is known.

    Returns:
        A line of text for each field that changes the result elsewhere and not here.

    Raises:
        ModelError: with the token and both numbers.
    """
    path = folder / CONFIG_FILE
    config = read_object(path) if path.is_file() else {}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    notes = [f"{path}: {name} is not used: {_NOT_USED[name]}" for name in _set_fields(config, backend)]
    tokenizer.split_special_tokens = tokenizer.clean_up_tokenization_spaces = False
    if backend is None:  # written in Python
        return notes
    added = _check_numbers(folder, config, tokenizer, rows)
    backend.encode_special_tokens = False
    backend.no_truncation()  # a call of transformers turns both off, a call of the backend does not
    backend.no_padding()
    if getattr(backend.model, "dropout", None):
        backend.model.dropout = None
        notes.append(f"{folder / TOKENIZER_FILE}: model.dropout is not used: it changes tokens at random")
    known = added | backend.get_vocab(with_added_tokens=False).keys()
    new = {name: token for name in _NAMED if (token := getattr(tokenizer, name, None)) and token not in known}
    if new and (folder / TOKENIZER_FILE).is_file():
        names = [f"{name} {token!r}" for name, token in new.items()]
        notes.append(
            f"{path}: {listed(names)} {'are' if len(names) > 1 else 'is'} not in {TOKENIZER_FILE}, "
            "and as a new token is none that the model was trained with"
        )
    return notes + _read_as_text(folder, tokenizer, backend)


def _set_fields(config: dict[str, Any], backend: Any) -> list[str]:
    """The fields of the table that have an effect in transformers."""
    names = [name for name in _NOT_USED if config.get(name)]
    cleans = "clean_up_tokenization_spaces"
    is_bpe = backend is not None and type(backend.model).__name__ == "BPE"
    if is_bpe and len([name for name in names if name.startswith(cleans)]) < 2:
        names = [name for name in names if not name.startswith(cleans)]
    return names


def _check_numbers(folder: Path, config: dict[str, Any], tokenizer: Any, rows: int | None) -> set[str]:
    """Hold the numbers of added tokens against those that they are read under; the tokens of the files.

    A token of tokenizer.json has the number of that file, whatever the others say.
    """
    path = folder / TOKENIZER_FILE
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    start = re.search(r'"added_tokens"\s*:\s*(?=\[)', text)
    own = json.JSONDecoder().raw_decode(text, start.end())[0] if start else []
    added = {token["content"]: (path, token["id"]) for token in own}
    if text:
        base = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
        for where, content, number in _listed_elsewhere(folder, config):
            if content not in base:
                added.setdefault(content, (where, number))
    numbers = tokenizer.get_vocab() if added else {}
    for content, (where, number) in added.items():
        if number == numbers.get(content, number):
            continue
        if rows is not None and number >= rows:
            raise beyond_table(folder, number, content, rows)
        raise ModelError(
            f"{where}: the added token {content!r} has number {number} and is read as {numbers[content]}",
            fix="number the added tokens one after the other, behind the vocabulary",
        )
    return set(added)


def _listed_elsewhere(folder: Path, config: dict[str, Any]) -> list[tuple[Path, str, int]]:
    """The added tokens of tokenizer_config.json, or of added_tokens.json where that lists none."""
    if "added_tokens_decoder" in config:
        tokens = config["added_tokens_decoder"] or {}
        return [(folder / CONFIG_FILE, token["content"], int(number)) for number, token in tokens.items()]
    path = folder / "added_tokens.json"
    tokens = read_object(path) if path.is_file() else {}
    return [(path, content, int(number)) for content, number in tokens.items()]


def _read_as_text(folder: Path, tokenizer: Any, backend: Any) -> list[str]:
    """A note on tokens of a chat that transformers does not find beside letters, because of their flags."""
    template = str(getattr(tokenizer, "chat_template", None) or "")
    flagged = {
        token.content: number
        for number, token in tokenizer.added_tokens_decoder.items()
        if (token.normalized or token.single_word)
        and (token.content in template or token.content == tokenizer.eos_token)
    }
    encodings = backend.encode_batch([f"a{content}b" for content in flagged], add_special_tokens=False)
    lost = [
        repr(content)
        for (content, number), encoding in zip(flagged.items(), encodings, strict=True)
        if number not in encoding.ids
    ]
    if not lost:
        return []
    return [
        f"{folder / TOKENIZER_FILE}: normalized or single_word of {listed(lost)} is not used: beside letters "
        "transformers reads such a token as text, and here it is a token wherever the chat template writes it"
    ]
