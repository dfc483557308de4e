"""Parse an HTML page and check that it loads nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html.parser import HTMLParser
from typing import Any

from mlx_distill.report import render_html

VOID = {"br", "col", "hr", "img", "input", "link", "meta", "!doctype"}


class Page(HTMLParser):
    """The tags and the text of a page; every tag must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def assert_loads_nothing(html: str) -> Page:
    page = Page(html)
    assert not page.stack
    assert not {"script", "link", "iframe", "object", "img", "form", "base"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not [
            name
            for name in attributes
            if name.startswith("on") or name in ("src", "srcset", "action", "formaction")
        ]
        assert (attributes.get("href") or "#").startswith("#")
    assert "default-src 'none'" in html
    assert not re.search(r"@import|url\(|https?://", html)
    return page


def page_text(report: Mapping[str, Any]) -> str:
    return Page(render_html(report)).text.replace("\u202f", " ")
