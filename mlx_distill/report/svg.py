"""SVG elements from Python: the charts of the pages, whose coordinates are computed. Text is escaped."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup, escape


def element(tag: str, *children: Any, **attributes: Any) -> Markup:
    """An SVG element. Children other than markup are escaped.

    Args:
        tag: The element's name.
        children: Text, numbers, elements, nested lists of them; None is skipped.
        attributes: ``class_`` is ``class``; an underscore becomes a hyphen. None skips the attribute.

    >>> element("text", "a < b", class_="x", text_anchor="end")
    Markup('<text class="x" text-anchor="end">a &lt; b</text>')
    """
    text = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    inner = _joined(children)
    return Markup(f"<{tag}{text}>{inner}</{tag}>" if inner else f"<{tag}{text}/>")


def _joined(children: Any) -> str:
    if children is None:
        return ""
    if isinstance(children, list | tuple):
        return "".join(_joined(child) for child in children)
    return escape(children)
