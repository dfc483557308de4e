"""The pages of jobs over HTTP: a job from the form, its page, its stream, its buttons."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from helpers.served import client_of, make_app
from helpers.small_run import write_recipe

from mlx_distill.cli.jobs import check_command
from mlx_distill.jobs import get, list_jobs, submit
from mlx_distill.jobs.store import add_event, update
from mlx_distill.recipe import load_recipe


@pytest.fixture
def app(tmp_path) -> Any:
    write_recipe(tmp_path)
    return make_app(tmp_path, start_jobs=False)


@pytest.fixture
def client(app: Any) -> Iterator[Any]:
    with client_of(app, cookie=True) as made:
        yield made


def fields_of(page: str) -> dict[str, str]:
    """The fields of the form, as a browser would send them."""
    form = page[page.index('class="recipe"') :]
    out = {}
    for tag in re.findall(r"<input [^>]*>", form):
        values = dict(re.findall(r'(\w+)="([^"]*)"', tag))
        out[values["name"]] = html.unescape(values.get("value", ""))
    for name, options in re.findall(r'<select [^>]*name="([^"]+)"[^>]*>(.*?)</select>', form, re.S):
        chosen = re.search(r'<option(?: value="([^"]*)")? selected>([^<]*)', options)
        out[name] = "" if chosen is None else html.unescape(chosen[1] if chosen[1] is not None else chosen[2])
    for name, text in re.findall(r'<textarea [^>]*name="([^"]+)"[^>]*>(.*?)</textarea>', form, re.S):
        out[name] = html.unescape(text)
    return out


def test_a_job_starts_from_the_form(app: Any, client: Any, tmp_path) -> None:
    server = app.state.server
    page = client.get("/jobs/new?path=recipe.yaml")
    assert page.status_code == 200
    fields = fields_of(page.text) | {"teach.epochs": "2", "title": "<script>alert(1)</script>"}
    assert fields["data.sources.0.path"] == "rows.jsonl"
    checked = client.post("/jobs/new", data=fields | {"do": "check"})
    assert checked.status_code == 200
    assert "mlx-distill jobs submit run recipe.yaml --out runs/colours --set teach.epochs=2.0" in checked.text
    assert list_jobs(server.ledger) == []
    started = client.post("/jobs/new", data=fields | {"do": "start"})
    assert started.status_code == 303
    (job,) = list_jobs(server.ledger)
    assert started.headers["location"] == f"/jobs/{job.id}"
    assert job.run_path == "runs/colours"
    recipe = load_recipe(tmp_path / job.arguments[0])
    assert recipe.teach.epochs == 2
    assert recipe.load_task().name == "colours"
    shown = client.get(f"/jobs/{job.id}")
    assert shown.status_code == 200
    assert "<script>alert(1)" not in shown.text
    assert "teach.epochs" in shown.text  # what differs from the recipe
    again = client.get(f"/jobs/new?from=job:{job.id}")
    assert fields_of(again.text)["teach.epochs"] == "2.0"


def test_a_job_shows_what_differs_from_the_run_before(app: Any, client: Any, tmp_path) -> None:
    ledger = app.state.server.ledger
    fields = fields_of(client.get("/jobs/new?path=recipe.yaml").text) | {"do": "start"}

    def page_after(*change: str) -> str:
        """The page of a job of the form with other epochs, or of one of the command line."""
        if len(change) == 1:
            client.post("/jobs/new", data=fields | {"teach.epochs": change[0]})
        else:
            run_path, asked = check_command("run", ["recipe.yaml", *change], tmp_path)
            submit(ledger, "run", ["recipe.yaml", *change], run_path=run_path, request=asked)
        newest = list_jobs(ledger)[0]
        with ledger.write() as db:
            update(db, newest.id, attempt=1)
        return str(client.get(f"/jobs/{newest.id}").text).partition("The run before of this recipe")[2]

    assert page_after("2") == ""
    differs = page_after("3")
    assert "this differs" in differs and "<code>2.0</code>" in differs and "<code>3.0</code>" in differs
    differs = page_after("--set", "teach.epochs=4")
    assert "<code>3.0</code>" in differs and "<code>4" in differs
    (tmp_path / "recipe.yaml").write_text("name: another\n", encoding="utf-8")
    job = list_jobs(ledger)[0]
    again = client.get(f"/jobs/{job.id}").text
    assert "<code>3.0</code>" in again.partition("The run before of this recipe")[2]  # as it was then


def test_a_stage_whose_rows_are_missing_is_not_started(app: Any, client: Any) -> None:
    fields = fields_of(client.get("/jobs/new?path=recipe.yaml").text) | {"do": "start"}
    refused = client.post("/jobs/new", data=fields | {"command": "teach"})
    assert refused.status_code == 400
    assert "teach reads colours/data, and that is not there yet: run prepare first" in refused.text
    refused = client.post("/jobs/new", data=fields | {"command": "distill", "student": "none"})
    assert refused.status_code == 400 and "no student" in refused.text
    assert list_jobs(app.state.server.ledger) == []
    assert client.post("/jobs/new", data=fields | {"command": "prepare"}).status_code == 303


def test_errors_stand_beside_their_fields(client: Any) -> None:
    fields = fields_of(client.get("/jobs/new?path=recipe.yaml").text)
    answer = client.post(
        "/jobs/new", data=fields | {"do": "start", "distill.label_weight": "-1", "out": "../x"}
    )
    assert answer.status_code == 400
    near = answer.text[answer.text.index('id="f-distill-label_weight"') :]
    assert "is below 0" in near[:600]
    assert "not under the root" in answer.text
    assert fields_of(answer.text)["distill.label_weight"] == "-1"
    remote = client.post("/jobs/new", data=fields | {"do": "start", "trust_remote_code": "true"})
    assert remote.status_code == 400
    assert "no key of a recipe" in remote.text


@pytest.mark.parametrize(
    "source", ["from=recipe:none", "from=job:../..", "path=../../etc/passwd", "from=x", "from=job:."]
)
def test_a_source_that_is_none_is_said(source: str, client: Any) -> None:
    assert client.get(f"/jobs/new?{source}").status_code == 400


def test_htmx_starts_after_its_extensions(app: Any, client: Any) -> None:
    job = submit(app.state.server.ledger, "run", ["tiny"])
    page = client.get(f"/jobs/{job.id}").text
    scripts = re.findall(r'<script src="/static/vendor/(h[tx][^"]*?)\?[^>]*>', page)
    assert [name.split(".")[0] for name in scripts] == ["htmx", "hx-csp", "hx-sse"]
    tags = re.findall(r'<script src="/static/vendor/h[tx][^>]*>', page)
    assert not [tag for tag in tags if "defer" in tag]  # htmx may start before a deferred one is there


def test_a_job_of_the_command_line_shows_what_it_sets(app: Any, client: Any) -> None:
    ledger = app.state.server.ledger
    asked = {"from": "file:recipe.yaml", "set": ["teach.epochs=7"]}
    job = submit(ledger, "run", ["recipe.yaml"], request=asked)
    page = client.get(f"/jobs/{job.id}").text
    assert re.search(r"teach\.epochs.*?1\.0.*?7\.0", page, re.S)
    assert "teach.learning_rate" not in page
    gone = submit(ledger, "run", ["x.yaml"], request={"from": "file:x.yaml", "set": []})
    assert "cannot be read any more" in client.get(f"/jobs/{gone.id}").text


def test_the_overview_has_the_progress_of_the_running_job(app: Any, client: Any) -> None:
    ledger = app.state.server.ledger
    job = submit(ledger, "run", ["tiny"], title="at work")
    with ledger.write() as db:
        update(db, job.id, state="running", attempt=1, started_at=1.0)
    folder = job.folder(ledger.root)
    folder.mkdir(parents=True)
    done = {"attempt": 1, "stage": "teacher", "done": 3, "total": 9, "unit": "step", "eta_s": 61}
    (folder / "progress.json").write_text(json.dumps(done), encoding="utf-8")
    asks = {"hx-request": "true"}
    for page in (client.get("/").text, client.get("/", headers=asks).text):
        assert "at work" in page and re.search(r"3 of 9 steps, about 1\smin 1\ss left", page)
    assert "<html" not in client.get("/", headers=asks).text
    with ledger.write() as db:
        update(db, job.id, state="succeeded")
    assert "No job runs any more" in client.get("/", headers=asks).text
    assert "at work" not in client.get("/").text


def test_the_list_has_filters_and_pages(app: Any, client: Any) -> None:
    ledger = app.state.server.ledger
    assert "No job yet" in client.get("/jobs").text
    for number in range(30):
        submit(ledger, "run", ["tiny"], title=f"number {number} " + "x" * 300)
    page = client.get("/jobs")
    assert page.text.count("/jobs/job-") == 25
    older = html.unescape(re.search(r'href="(/jobs\?after=[^"]+)"', page.text)[1])  # type: ignore[index]
    assert "number 0…" in client.get(older).text
    assert "No job is like that" in client.get("/jobs?state=failed").text
    assert client.get("/jobs?after=job-none").status_code == 404


def test_buttons(app: Any, client: Any) -> None:
    ledger = app.state.server.ledger
    first, second = (submit(ledger, "run", ["tiny"]) for _ in range(2))
    assert client.post(f"/jobs/{second.id}/first").status_code == 303
    assert "Move first" in client.get(f"/jobs/{first.id}").text
    for action, state in (
        ("pause", "paused"),
        ("resume", "queued"),
        ("cancel", "cancelled"),
        ("resume", "queued"),
    ):
        assert client.post(f"/jobs/{first.id}/{action}").status_code == 303
        assert get(ledger, first.id).state == state
    assert client.post(f"/jobs/{first.id}/resume").status_code == 409
    assert client.post(f"/jobs/{first.id}/explode").status_code == 404
    assert client.get("/jobs/job-none").status_code == 404


def test_the_stream_of_a_finished_job_ends_and_continues_from_the_last_identifier(
    app: Any, client: Any
) -> None:
    ledger = app.state.server.ledger
    job = submit(ledger, "run", ["tiny"], title="ended")
    with ledger.write() as db:
        for number in range(450):
            add_event(db, job.id, "note", f"note {number}")
        update(
            db, job.id, state="failed", error='{"code": "x", "message": "<b>broken</b>", "fix": "mend it"}'
        )
    whole = client.get(f"/jobs/{job.id}/events").text
    assert whole.count("event: job-log") == 451
    assert whole.rstrip().endswith("data: failed")
    assert "event: job-end" in whole
    logged = r"^id: (.*)\nevent: job-log$"
    places = re.findall(logged, whole, re.M)
    rest = client.get(f"/jobs/{job.id}/events", headers={"Last-Event-ID": places[400]}).text
    assert re.findall(logged, rest, re.M) == places[401:]
    assert rest.count("event: job-state") == 1  # its buttons may be of any state
    page = client.get(f"/jobs/{job.id}").text
    assert "<b>broken" not in page
    assert page.count("data-id=") == 100
    older = client.get(re.search(r'href="(/jobs/[^"]+\?before=\d+)"', page)[1]).text  # type: ignore[index]
    assert "note 349" in older
    assert "note 350" not in older
    assert client.get(f"/jobs/{job.id}?before=99999999999999999999").status_code == 200


@pytest.mark.parametrize(("kind", "name"), [("run", "report.html"), ("validate", "validation.html")])
def test_the_report_of_a_finished_job_is_a_page_behind_the_login(
    app: Any, client: Any, tmp_path: Any, kind: str, name: str
) -> None:
    ledger = app.state.server.ledger
    job = submit(ledger, kind, ["tiny"], run_path="runs/a")
    link = f'href="/jobs/{job.id}/report"'
    assert client.get(f"/jobs/{job.id}/report").status_code == 404
    with ledger.write() as db:
        update(db, job.id, state="succeeded", finished_at=1.0)
    assert link not in client.get(f"/jobs/{job.id}").text  # the run's folder is gone
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a" / name).write_text("<h1>Größe</h1><script>alert(1)</script>", encoding="utf-8")
    assert link in client.get(f"/jobs/{job.id}").text
    shown = client.get(f"/jobs/{job.id}/report")
    assert shown.status_code == 200 and "Größe" in shown.text
    policy = shown.headers["content-security-policy"]
    assert policy.startswith("sandbox; default-src 'none'") and "script-src" not in policy
    with client_of(app, token=False) as stranger:
        assert stranger.get(f"/jobs/{job.id}/report").status_code in (303, 401)
    (tmp_path / "runs/a" / name).unlink()
    (tmp_path / "runs/a" / name).symlink_to("/etc/hostname")
    assert client.get(f"/jobs/{job.id}/report").status_code == 404
    assert client.get("/jobs/job-none/report").status_code == 404
