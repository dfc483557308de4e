"""A task's prompts: ``{field}`` stands for a field of the row, ``{field:options}`` for the values that the
schema allows in a field of the answer, ``{{`` and ``}}`` for braces.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from mlx_distill.errors import ConfigError, DataError

_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_NOT_A_NAME = re.compile(r"""["'\n]|^\s|^$""")  # what JSON, or an empty pair of braces, has behind its brace
_BRACES = "braces that are text are written {{ and }}"


class Field(NamedTuple):
    """The place of a row's field in a prompt, with a format such as ``.2f`` for a number."""

    name: str
    format: str = ""


class Options(NamedTuple):
    """The place of the list of a field's values in a prompt; the field is one of the answer, with an enum."""

    name: str


_OPTIONS = "options"  # no value can be written in this format, so no prompt means a row's field by it


@functools.lru_cache(maxsize=256)
def parse_prompt(prompt: str, where: str = "the prompt") -> tuple[str | Field | Options, ...]:
    """The parts of a prompt: texts, and the fields and lists of options between them.

    Args:
        prompt: The prompt.
        where: The file and key, the beginning of every error message.

    Raises:
        ConfigError: a single brace, or a pair with something else than a field's name; with its line and
            character, and the corrected line.

    >>> parse_prompt("Write {{}} about {text}: {score:.1f}")
    ('Write {} about ', Field(name='text', format=''), ': ', Field(name='score', format='.1f'))
    >>> parse_prompt('Answer like {"label": "ham"}.', "task.yaml: system")
    Traceback (most recent call last):
    mlx_distill.errors.ConfigError: task.yaml: system: line 1, character 13: '{"label": "ham"}' is not a field
    of the row (braces that are text are written {{ and }}, so the line is: Answer like {{"label": "ham"}}.)
    """
    parts: list[str | Field | Options] = []
    text, end = "", 0
    for match in _TOKEN.finditer(prompt):
        text, end = text + prompt[end : match.start()], match.end()
        if match.group() in ("{{", "}}"):
            text += match.group()[0]
            continue
        field, problem, fix = _parse_field(match)
        if problem:
            line = prompt.count("\n", 0, match.start()) + 1
            column = match.start() - prompt.rfind("\n", 0, match.start())
            raise ConfigError(
                f"{where}: line {line}, character {column}: {problem}",
                fix=fix or _corrected(prompt, line - 1),
            )
        part = Options(field.name) if field.format == _OPTIONS else field
        parts += [text, part] if text else [part]
        text = ""
    text += prompt[end:]
    return (*parts, text) if text else tuple(parts)


def render_prompt(prompt: str, row: Mapping[str, Any], options: Mapping[str, str]) -> str:
    """The prompt of one row, which has all of its fields.

    Args:
        prompt: The prompt.
        row: The row.
        options: The text of each list of options that the prompt has.

    Raises:
        ConfigError: see :func:`parse_prompt`.
        DataError: a value that cannot be written in the format that the prompt asks for.

    >>> render_prompt("{text}: {mood:options}?", {"text": "Hello"}, {"mood": "joy, fear"})
    'Hello: joy, fear?'
    """

    def write(part: str | Field | Options) -> str:
        if isinstance(part, Options):
            return options[part.name]
        return part if isinstance(part, str) else _write(row[part.name], part)

    return "".join(map(write, parse_prompt(prompt)))


def _write(value: Any, field: Field) -> str:
    try:
        return format(value, field.format)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{field.name}: {value!r} cannot be written as {{{field.name}:{field.format}}}",
            fix=f"correct the value, or write {{{field.name}}} in the task's prompt",
        ) from error


def _parse_field(match: re.Match[str]) -> tuple[Field, str, str | None]:
    """The field of a pair of braces, or what is wrong with it and, where it is known, the fix."""
    inside = match.group(1)
    if inside is None:
        return Field(""), f"a single {match.group()}", None
    shown = _short(match.group())
    if inside != inside.strip() and inside.strip().isidentifier():
        return Field(""), f"{shown} is not a field of the row", f"write {{{inside.strip()}}}; {_BRACES}"
    if _NOT_A_NAME.search(inside) or inside.isdigit():
        return Field(""), f"{shown} is not a field of the row", None
    name, _, spec = inside.partition(":")
    if "!" in name:
        return (
            Field(""),
            f"{shown}: conversions are not known",
            f"write {{{name.partition('!')[0]}}}; {_BRACES}",
        )
    if "." in name or "[" in name:
        short = re.split(r"[.\[]", name)[0]
        return (
            Field(""),
            f"{shown} looks inside of a field",
            f"give the value a column of its own and name that, such as {{{short or 'text'}}}; {_BRACES}",
        )
    if not name.strip() or "," in name or not _is_format(spec):
        return Field(""), f"{shown} is not a field of the row", None
    return Field(name, spec), "", None


def _is_format(spec: str) -> bool:
    if spec == _OPTIONS:
        return True
    # White space is a format of numbers, but means JSON; a width of five digits would fill the memory.
    if spec != spec.strip() or re.search(r"\d{5}", spec):
        return False
    for value in ("", 1, 1.0):
        try:
            format(value, spec)
        except ValueError:
            continue
        return True
    return False


def _corrected(prompt: str, number: int) -> str:
    """The fix: the line in which the braces around something else than a field are doubled."""
    escaped = "{{" in prompt  # the author knows of it, so double braces are meant
    pattern = re.compile(r"\{\{|\}\}|(\{[^{}\"'\n]+\})|[{}]" if escaped else r"(\{[^{}\"'\n]+\})|[{}]")

    def double(match: re.Match[str]) -> str:
        is_field = match.group(1) and not _parse_field(_TOKEN.fullmatch(match.group()))[1]  # type: ignore[arg-type]
        return match.group() if is_field or len(match.group()) == 2 else _doubled(match.group())

    line = prompt.split("\n")[number].strip()
    corrected = pattern.sub(double, line)
    try:
        parse_prompt(corrected)
    except (ConfigError, RecursionError):
        return _BRACES
    return f"{_BRACES}, so the line is: {corrected}" if len(corrected) <= 200 else _BRACES


def _doubled(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _short(text: str) -> str:
    text = repr(text)
    return text if len(text) <= 40 else text[:37] + "..."
