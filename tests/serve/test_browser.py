"""The dashboard as a person uses it, in a real Chromium: a job from the form to its end, over a lost
connection too; comparisons, deployments; every page at two widths.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from helpers.browser import Seen, Wire, chromium
from helpers.registry_runs import LABELS, make_run
from helpers.served import TOKEN, served_in_thread
from helpers.small_run import write_recipe

from mlx_distill.jobs import get
from mlx_distill.jobs.store import events
from mlx_distill.ledger.database import Ledger
from mlx_distill.ledger.root import Root
from mlx_distill.pipeline import run
from mlx_distill.progress import NullProgress
from mlx_distill.registry import add_version, current_deployment

pytestmark = pytest.mark.slow
CUT_S = 3.0
OUT = "runs/colours"
PATIENCE_MS = 60_000
DESK: dict[str, Any] = {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"}
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Root:
    """A recipe whose rows are prepared, two finished runs whose models are two versions, and a few rows."""
    root = Root.at(tmp_path_factory.mktemp("root"))
    run(write_recipe(root.path), root.path / OUT, only="prepare", progress=NullProgress())
    for seed, wrong in enumerate(({0, 1, 2}, {2})):
        make_run(root.path / f"run{seed}", seed=seed, wrong=wrong)
        add_version(Ledger(root), f"run{seed}", name="colours")
    rows = [{"id": f"n{i}", "text": f"Text {i}.", "answer": {"colour": LABELS[i % 2]}} for i in range(4)]
    (root.path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def wire(root: Root) -> Iterator[Wire]:
    with served_in_thread(root, model=None) as address:
        made = Wire(address)
        yield made
        made.cut()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as made:
        yield made


@pytest.fixture(scope="module")
def seen() -> Seen:
    return Seen()


@pytest.fixture(scope="module")
def desk(browser: Any, wire: Wire, seen: Seen) -> Any:
    """A context of the browser that has logged in."""
    context = browser.new_context(**DESK, base_url=wire.address)
    context.set_default_timeout(PATIENCE_MS)
    seen.watch(context)
    page = context.new_page()
    page.goto("/jobs")
    assert page.url.endswith("/login?next=%2Fjobs")
    page.fill("input[name=token]", TOKEN)
    page.keyboard.press("Enter")
    page.wait_for_url("**/jobs")
    page.close()
    return context


@pytest.fixture
def page(desk: Any) -> Iterator[Any]:
    made = desk.new_page()
    yield made
    made.close()


def shown_events(page: Any) -> list[int]:
    """The identifiers of the events in the page, the newest first."""
    return page.eval_on_selector_all("#events li", "all => all.map(one => +one.dataset.id)")  # type: ignore[no-any-return]


def last_step(page: Any) -> int:
    return int(page.get_attribute("#curves figure", "data-last"))


def wait_for_step(page: Any, step: int) -> None:
    page.wait_for_function("n => +document.querySelector('#curves figure')?.dataset.last >= n", arg=step)


def test_a_job_from_the_form_to_its_end_with_a_lost_connection(
    page: Any, root: Root, wire: Wire, seen: Seen
) -> None:
    ledger = Ledger(root)
    page.goto("/jobs/new?path=recipe.yaml")
    page.fill("[name='teach.epochs']", "400")  # longer than this test
    page.select_option("[name=command]", "teach")
    page.fill("[name=out]", OUT)
    page.fill("[name=title]", "watched")
    page.click("button[value=start]")
    page.wait_for_url("**/jobs/job-*")
    job_id = page.url.rpartition("/")[2]
    page.wait_for_selector("#curves .uplot, #actions .alarm.bad")
    wait_for_step(page, last_step(page) + 1)  # it grows without a reload
    page.reload()
    page.wait_for_selector("#curves .uplot")
    before = last_step(page)

    quiet = list(seen.messages)
    wire.cut()
    page.wait_for_selector("#connection:visible")
    time.sleep(CUT_S)
    wire.mend()
    page.wait_for_selector("#connection", state="hidden")
    seen.messages[:] = quiet  # that nothing could be loaded meanwhile
    wait_for_step(page, before + 1)
    drawn = page.eval_on_selector("#curves figure", "one => [one.dataset.points, one.dataset.last]")
    assert drawn[0] == drawn[1]  # each step once

    before = last_step(page)
    page.evaluate("document.getElementById('live').dataset.silent = '1.5'")
    wire.silence()
    page.wait_for_selector("#connection:visible")  # though nothing was closed and nothing refused
    wire.resume()
    page.wait_for_selector("#connection", state="hidden")
    wait_for_step(page, before + 1)
    page.evaluate("document.getElementById('live').dataset.silent = '15'")
    drawn = page.eval_on_selector("#curves figure", "one => [one.dataset.points, one.dataset.last]")
    assert drawn[0] == drawn[1]

    page.click("text=Stop and save")
    page.wait_for_selector("button:has-text('Resume')")
    reached = last_step(page)
    page.click("button:has-text('Resume')")
    wait_for_step(page, reached + 1)  # it went on from its checkpoint
    page.click("summary:has-text('Discard')")
    page.click("text=Discard what is not finished")
    page.wait_for_selector(".chip-state:has-text('cancelled')")
    page.wait_for_selector("button:has-text('Resume')")
    assert get(ledger, job_id).state == "cancelled"
    # The last event follows the new state, so it may come after the button.
    page.wait_for_timeout(1500)
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while (shown := shown_events(page))[0] < events(ledger, job_id, newest=1)[0].id:
        assert time.monotonic() < deadline
        page.wait_for_timeout(200)
    assert len(shown) > 10
    assert shown == [event.id for event in events(ledger, job_id, newest=len(shown))][::-1]
    assert [event.type for event in events(ledger, job_id)].count("started") == 2


def test_two_versions_are_compared_at_once_and_by_a_job(page: Any, root: Root) -> None:
    page.goto("/models/colours/2")
    page.click("text=Compare >> nth=-1")
    page.fill("[name=a]", "colours:1")
    page.fill("[name=margin]", "10pt")
    line = "mlx-distill compare colours:1 colours:2 --margin 10pt --keep"
    assert page.inner_text("form.panel .command code").startswith(line)
    page.click("form.panel button.primary")
    page.wait_for_url("**/compare/cmp-*")
    assert "colours:2" in page.inner_text("h1, header")

    page.goto("/compare?a=colours:1&b=colours:2&rows=few.jsonl")
    page.click("form.panel button.primary")
    page.wait_for_url("**/jobs/job-*")
    page.click("text=The comparison")
    page.wait_for_url("**/compare/cmp-*")
    assert "4" in page.inner_text("main")


def test_deploy_and_roll_back(page: Any, root: Root) -> None:
    ledger = Ledger(root)

    def serves() -> int | None:
        now = current_deployment(ledger, "colours")
        return None if now is None else now.version

    for number in (1, 2):
        page.goto(f"/models/colours/{number}")
        page.click("summary:has-text('Deploy')")
        page.fill("details[open] [name=reason]", f"number {number} is ready")
        assert f"--reason 'number {number} is ready'" in page.inner_text("details[open] .command code")
        page.click("details[open] button.primary")
        page.wait_for_url("**/models/colours")
        assert serves() == number
    page.goto("/")
    assert "number 2 is ready" in page.inner_text("main")
    page.click("summary:has-text('Roll production back')")
    page.fill("details[open] [name=reason]", "complaints")
    page.click("details[open] button.primary")
    page.wait_for_url("**/models/colours")
    assert serves() == 1
    assert "complaints" in page.inner_text(".timeline")


@pytest.mark.parametrize("look", [DESK, PHONE], ids=["desk", "phone"])
def test_no_page_is_wider_than_the_window(
    browser: Any, desk: Any, seen: Seen, wire: Wire, look: dict[str, Any]
) -> None:
    context = browser.new_context(**look, base_url=wire.address, storage_state=desk.storage_state())
    seen.watch(context)
    page = context.new_page()
    for address in addresses(page):
        assert page.goto(address).ok, address
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), address
    context.close()


def addresses(page: Any) -> list[str]:
    """The pages of the navigation, and the first page of each kind that they lead to."""
    page.goto("/")
    found = page.eval_on_selector_all(".rail nav a", "all => all.map(one => one.getAttribute('href'))")
    kinds: dict[str, str] = {}
    for address in list(found):
        page.goto(address)
        links = page.eval_on_selector_all("main a", "all => all.map(one => one.getAttribute('href'))")
        for link in links:
            if re.match(r"/(jobs/job-|jobs/new|compare/cmp-|models/)", link) and "comparison." not in link:
                kinds.setdefault(re.sub(r"(job|cmp)-\w+|\d+|\?.*", "", link), link)
    return [*found, *kinds.values()]


def test_nothing_left_this_machine_and_no_page_complained(browser: Any, seen: Seen, wire: Wire) -> None:
    assert len(seen.requests) > 100
    assert seen.hosts == {wire.address.removeprefix("http://")}
    assert seen.messages == []
