"""Texts of others that are markup, on every page of the dashboard, in a real Chromium: they are shown, and
nothing of them becomes an element, an attribute or a script.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
import yaml
from helpers.browser import Seen, chromium
from helpers.comparison_files import make_answers, make_rows, write_lines, write_task
from helpers.registry_runs import make_run
from helpers.served import TOKEN, served_in_thread
from helpers.small_run import write_recipe

from mlx_distill.data_sets import add_data_set
from mlx_distill.jobs import submit
from mlx_distill.jobs.store import add_event, update
from mlx_distill.ledger.database import Ledger, to_json
from mlx_distill.ledger.root import Root
from mlx_distill.registry import add_version, promote
from mlx_distill.registry.comparisons import keep_comparison

pytestmark = pytest.mark.slow
IN_A_NAME = "\"'><x-evil onclick=evil()><img src=x onerror=evil()>"  # of a file: without a slash
EVIL = (
    IN_A_NAME
    + "</script><script>evil()</script><svg onload=evil()></textarea></title><a href=javascript:evil()>"
)
INJECTED = """() => [...document.querySelectorAll(
    "x-evil, [onclick], [onerror], [onload], img[src=x], a[href^='javascript' i], script")]
  .filter(one => one.tagName !== "SCRIPT" || one.textContent.trimStart().startsWith("evil"))
  .map(one => one.outerHTML.slice(0, 300))"""
TRAP = "window.evil = () => { window.evilRan = true; }"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Root:
    """A root in whose every text that people choose stands markup; its own name is markup, too."""
    folder = tmp_path_factory.mktemp("root") / f"root {IN_A_NAME}"
    folder.mkdir()
    root = Root.at(folder)
    ledger = Ledger(root)
    recipe = yaml.safe_load(write_recipe(folder).read_text())
    recipe["name"] = IN_A_NAME
    (folder / f"{IN_A_NAME}.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    add_jobs(ledger)
    add_models(ledger)
    add_rows(ledger)
    return root


def add_jobs(ledger: Ledger) -> None:
    """A job in each state, with events, an error, and what it printed."""
    for state in ("queued", "paused", "failed", "cancelled", "succeeded"):
        asked = {"from": f"file:{IN_A_NAME}.yaml", "set": [f"name={EVIL}"]}
        job = submit(
            ledger, "run", [EVIL, "--out", "x"], title=EVIL, run_path=f"runs/{IN_A_NAME}", request=asked
        )
        with ledger.write() as db:
            add_event(db, job.id, "note", EVIL, level="warn")
            error = to_json({"code": EVIL, "message": EVIL, "fix": EVIL})
            result = to_json({"version": f"colours:{EVIL}", "comparison": EVIL})
            update(db, job.id, state=state, attempt=1, error=error if state == "failed" else None)
            update(db, job.id, result=result if state == "succeeded" else None)
        job.log(ledger.root).parent.mkdir(parents=True, exist_ok=True)
        job.log(ledger.root).write_text(EVIL, encoding="utf-8")
    curve = ledger.root.path / "runs" / IN_A_NAME / IN_A_NAME / "metrics.jsonl"
    curve.parent.mkdir(parents=True)
    curve.write_text("".join(json.dumps({"step": n, "loss": 1 / n}) + "\n" for n in range(1, 5)))


def add_models(ledger: Ledger) -> None:
    """Two versions with their facts, one of them deployed."""
    for number in range(2):
        run = f"run {number} {IN_A_NAME}"
        goal = {"model": "quantized", "metric": EVIL, "at_least": 0.5, "unit": EVIL, "measured": 0.1}
        goal |= {"met": False, "state": "missed"}
        make_run(ledger.root.path / run, seed=number, wrong={number}, goals=[goal])
        add_version(ledger, run, name="colours", description=EVIL)
    promote(ledger, "colours", 1, override=EVIL, actor=EVIL, reason=EVIL)
    with ledger.write() as db:
        for id, info in db.execute("SELECT rowid, info FROM versions").fetchall():
            changed = json.loads(info) | {"base_model": EVIL, "recipe": EVIL, "task": EVIL}
            changed["metrics"] = {EVIL: {"value": 0.5}, **(changed.get("metrics") or {})}
            db.execute("UPDATE versions SET info = ? WHERE rowid = ?", (to_json(changed), id))


def add_rows(ledger: Ledger) -> None:
    """A data set with problems, and a comparison with titles, texts, groups and answers."""
    folder = ledger.root.path
    rows = [
        row | {"id": f"{row['id']}{EVIL}", "kind": f"{row['kind']}{EVIL}"} for row in make_rows(9, title=EVIL)
    ]
    rows = [row | {"text": EVIL} for row in rows]
    given = write_lines(folder / f"rows {IN_A_NAME}.jsonl", rows)
    sides = []
    for number, wrong in enumerate(({1}, {2, 3})):
        answers = make_answers(rows, wrong=wrong, invalid={5})
        answers = [row | ({"text": EVIL} if row["text"] == "no JSON" else {}) for row in answers]
        sides.append(write_lines(folder / f"{number} {IN_A_NAME}.jsonl", answers).name)
    keep_comparison(ledger, *sides, task=str(write_task(folder)), rows=given, margin="10pt")
    turn = {"role": "assistant", "content": EVIL}
    chats = [{"messages": [{"role": "user", "content": EVIL}, turn]}] * 2 + [{"messages": EVIL}]
    write_lines(folder / f"chats {IN_A_NAME}.jsonl", chats)
    add_data_set(ledger, f"chats {IN_A_NAME}.jsonl", name="chats")


@pytest.fixture(scope="module")
def context(root: Root) -> Iterator[Any]:
    """A browser that has logged in, and knows whether a script of a text ran."""
    with served_in_thread(root, model=None, start_jobs=False) as address, chromium() as browser:
        made = browser.new_context(base_url=address)
        made.set_default_timeout(60_000)
        made.add_init_script(TRAP)
        page = made.new_page()
        page.goto(f"/login?next={quote(EVIL)}")
        check(page)
        page.fill("input[name=token]", TOKEN)
        page.keyboard.press("Enter")
        page.wait_for_selector(".rail nav")
        page.close()
        yield made


def check(page: Any) -> str:
    """Check that a page took no text for markup.

    Returns:
        What it shows.
    """
    page.wait_for_load_state("load")
    found = page.evaluate(INJECTED)
    assert found == [], page.url
    assert not page.evaluate("window.evilRan"), page.url
    return f"{page.title()} {page.inner_text('body')}"


def all_pages(page: Any) -> dict[str, str]:
    """What is shown by every page that the pages lead to, and by addresses whose parameters are markup."""
    text = quote(EVIL)
    waiting = [
        *(one.format(text) for one in ("/jobs/new?from={}", "/costs?prices={}", "/jobs?state={0}&kind={0}")),
        *(one.format(text) for one in ("/compare?a={0}&b={0}&margin={0}", "/models/{}", "/data/{}", "/{}")),
        f"/jobs/new?path={quote(IN_A_NAME)}.yaml",
        "/",
    ]
    shown, links = dict[str, str](), "all => all.map(one => one.getAttribute('href'))"
    while waiting:
        address = waiting.pop()
        page.goto(address)
        shown[address.partition("?")[0]] = check(page)
        found = page.eval_on_selector_all("a[href^='/']:not([download])", links)
        paths = {link.partition("#")[0].partition("?")[0] for link in found}
        waiting += paths - shown.keys() - set(waiting)
    return shown


def test_no_text_becomes_markup_on_any_page(context: Any) -> None:
    page, seen = context.new_page(), Seen()
    page.on("pageerror", lambda error: seen.messages.append(str(error)))
    shown = all_pages(page)
    having = {address for address, text in shown.items() if "<x-evil" in text}
    kinds = {address.strip("/").partition("/")[0] for address in having}
    assert kinds >= {"", "jobs", "models", "compare", "data", "costs"}, having
    assert len(shown) > 15
    assert seen.messages == []
