"""HTML elements from Python. Text is escaped, so text from data cannot become markup, and control
characters, which a page cannot hold, are shown as escapes.
"""

from __future__ import annotations

from html import escape
from typing import Any

from markupsafe import Markup as Html

from mlx_distill.text import visible

_VOID = {"br", "col", "hr", "img", "meta", "path", "line", "rect", "circle", "polyline"}


def el(tag: str, *children: Any, **attributes: Any) -> Html:
    """An HTML element. Children other than :class:`Html` are escaped.

    Args:
        tag: The element's name.
        children: Text, numbers, elements, nested lists of them; None is skipped.
        attributes: ``class_`` is ``class``; an underscore becomes a hyphen. None and False skip the
            attribute, True writes it without a value.

    >>> el("p", "a < b", class_="x", data_n=1)
    '<p class="x" data-n="1">a &lt; b</p>'
    """
    text = "".join(
        _attribute(name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items()
    )
    inner = join(children)
    return Html(f"<{tag}{text}/>" if tag in _VOID and not inner else f"<{tag}{text}>{inner}</{tag}>")


def _attribute(name: str, value: Any) -> str:
    if value is None or value is False:
        return ""
    return f" {name}" if value is True else f' {name}="{escape(visible(str(value)), quote=True)}"'


def join(children: Any) -> Html:
    """Concatenate children, escaping those that are not markup.

    >>> join(["<b>", el("i", "x"), None, 3])
    '&lt;b&gt;<i>x</i>3'
    """
    if children is None or children is False:
        return Html("")
    if isinstance(children, Html):
        return children
    if isinstance(children, list | tuple):
        return Html("".join(join(child) for child in children))
    return Html(escape(visible(str(children)), quote=False))
