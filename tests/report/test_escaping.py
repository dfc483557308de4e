"""Text from data cannot become markup."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.html_page import assert_loads_nothing
from helpers.report_runs import (
    make_task,
    write_evaluation,
)
from markupsafe import Markup

from mlx_distill.report import RunReport, build_report, render_html
from mlx_distill.report.svg import element
from mlx_distill.storage import write_jsonl

MARKUP = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;{{ 7 * 7 }}</style></title></pre>"


def test_text_from_data_cannot_become_markup(tmp_path: Path) -> None:
    """The same string in every field that a user, a file or a model fills."""
    labels = ["light", MARKUP]
    task = make_task(
        name=MARKUP,
        positive=[MARKUP],
        group=MARKUP,
        slices=[MARKUP],
        schema={
            "type": "object",
            "properties": {
                "tone": {"enum": labels},
                "points": {"type": "integer"},
                MARKUP: {"type": "string"},
            },
        },
    )
    row = {
        "id": MARKUP,
        "set": "test",
        "fields": {MARKUP: MARKUP},
        "title": MARKUP,
        "input": MARKUP,
        "truth": {"tone": MARKUP, "points": 3, MARKUP: MARKUP},
        "text": MARKUP,
        "answer": None,
        "error": MARKUP,
        "label": None,
        "score": None,
        "label_probs": {"light": 0.5, MARKUP: 0.5},
        "latency_s": 0.1,
        "prompt_tokens": 3,
        "tokens": 3,
    }
    whole = {**row, "answer": {"tone": MARKUP, "points": 3, MARKUP: [MARKUP]}, "label": MARKUP, "score": 3.0}
    header = {"format": 1, "set_counts": {"test": 1, MARKUP: 1}, "settings": {MARKUP: MARKUP}}
    paths = {}
    for name, item in (
        ("teacher", whole),
        ("student", row),
        (MARKUP, {**whole, "answer": {**whole["answer"], "tone": "light"}, "label": "light"}),
    ):
        paths[name] = write_evaluation(
            tmp_path / str(len(paths)),
            [header, item, {**item, "id": "other", "set": MARKUP}],
            {},
            machine={MARKUP: MARKUP, "processor": MARKUP},
            versions={MARKUP: MARKUP, "mlx": MARKUP},
        )
    log = [{"step": i, "loss": 1.0 + i, MARKUP: 2.0, "tokens": 1} for i in (1, 2, 3)]
    write_jsonl(tmp_path / "student" / "metrics.jsonl", log)
    recipe = {
        "name": MARKUP,
        "description": MARKUP,
        MARKUP: {"seed": MARKUP},
        "list": [MARKUP, {MARKUP: MARKUP}],
    }
    report = build_report(tmp_path, recipe, task, paths)
    page = assert_loads_nothing(render_html(report))
    assert MARKUP in "".join(page.words)
    assert f"{MARKUP}: distillation report" in "".join(page.words)
    assert_loads_nothing(
        f"<meta content=\"default-src 'none'\"/>{RunReport(tmp_path / 'report.json', report)._repr_html_()}"
    )


def test_control_characters_are_shown_as_escapes(run: tuple[Path, dict[str, Any]]) -> None:
    """A page cannot hold them."""
    curves = {"a\x0eb": run[1]["curves"]["teacher"]}  # a name in the charts too
    html = render_html({**run[1], "name": "a\x0eb", "curves": curves})
    assert "<title>a\\u000eb: distillation report</title>" in html
    assert "\x0e" not in html and html.count("a\\u000eb") >= 4


def test_svg_escapes_all_but_markup() -> None:
    made = element("text", "<", Markup("<i>"), ["&", None, 0], class_='"<', x=None)
    assert made == '<text class="&#34;&lt;">&lt;<i>&amp;0</text>'
