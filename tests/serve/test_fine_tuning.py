"""Fine-tuning jobs, driven by OpenAI's own client in its strict mode."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import yaml

openai = pytest.importorskip("openai")

from helpers.served import HEADERS, TOKEN, client_of, make_app, served_in_thread, write_root

from mlx_distill import jobs
from mlx_distill.ledger.database import Ledger
from mlx_distill.ledger.root import Root
from mlx_distill.models.load import load
from mlx_distill.recipe import load_recipe

TINY = "asset:models/tiny-qwen3"


def chats(count: int = 12, first: int = 0) -> bytes:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {number} plus {number}?"},
                {"role": "assistant", "content": f"It is {2 * number}."},
            ]
        }
        for number in range(first, first + count)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Root:
    return write_root(tmp_path_factory.mktemp("root"))


def strict_client(address: str, **options: Any) -> Any:
    return openai.OpenAI(
        base_url=f"{address}/v1",
        api_key=TOKEN,
        _strict_response_validation=True,
        **{"max_retries": 0, **options},
    )


@pytest.fixture(scope="module")
def client(root: Root) -> Iterator[Any]:
    """A client of a server that starts no jobs: what is asked for stays in the queue."""
    with served_in_thread(root, start_jobs=False) as address, strict_client(address) as client:
        yield client


@pytest.fixture(scope="module")
def files(client: Any) -> dict[str, str]:
    return {
        "training_file": client.files.create(file=("chats.jsonl", chats()), purpose="fine-tune").id,
        "validation_file": client.files.create(file=("more.jsonl", chats(4, 90)), purpose="fine-tune").id,
    }


def recipe_of(root: Root, job_id: str) -> dict[str, Any]:
    path = root.jobs / job_id / "recipe.yaml"
    load_recipe(path)
    raw: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return raw


def test_a_job_is_a_recipe_in_the_queue(client: Any, root: Root, files: dict[str, str]) -> None:
    settings = {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 10}
    made = client.fine_tuning.jobs.create(
        model=TINY,
        **files,
        method={"type": "supervised", "supervised": {"hyperparameters": settings}},
        seed=7,
        suffix="sums",
        metadata={"team": "a b", "x[y]": "1"},
    )
    assert (made.status, made.fine_tuned_model, made.error) == ("queued", None, None)
    assert made.hyperparameters.model_dump() == settings
    assert made.method.supervised.hyperparameters.batch_size == 4
    assert (made.seed, made.metadata["team"], made.organization_id) == (7, "a b", "local")
    assert made.model_extra["mlx_distill"]["run"].startswith("runs/sums-")
    assert client.fine_tuning.jobs.retrieve(made.id) == made
    recipe = recipe_of(root, made.id)
    assert recipe["teach"] == {
        "epochs": 2,
        "batch_size": 1,
        "accumulate": 4,
        "learning_rate": pytest.approx(2e-4),
        "seed": 7,
        "loss_on": "all",
    }
    sources = recipe["data"]["sources"]
    assert [(source["path"], source["split"]) for source in sources] == [
        ("training.jsonl", "train"),
        ("validation.jsonl", "valid"),
    ]
    assert "task" not in recipe and recipe["teacher"] == TINY
    # Deleting the upload takes nothing from the job.
    assert (root.jobs / made.id / "training.jsonl").read_bytes() == chats()


def test_a_repeated_request_is_the_same_job(client: Any, root: Root, files: dict[str, str]) -> None:
    body = {"model": TINY, "training_file": files["training_file"], "suffix": "twice"}
    first, second = (client.fine_tuning.jobs.create(**body) for _ in range(2))
    other = client.fine_tuning.jobs.create(**body, seed=1)
    assert first.id == second.id != other.id
    known = {job.id for job in jobs.list_jobs(Ledger(root), limit=1000)}
    assert {folder.name for folder in root.jobs.iterdir()} <= known


def test_lists_are_paged_and_filtered(client: Any, root: Root, files: dict[str, str]) -> None:
    made = [
        client.fine_tuning.jobs.create(model=TINY, **files, suffix=f"page {n}", metadata={"part": "lists"}).id
        for n in range(3)
    ]
    jobs.submit(Ledger(root), "run", ["other.yaml"])  # not of this interface
    page = client.fine_tuning.jobs.list(limit=2)
    assert [job.id for job in page.data] == made[:0:-1]
    assert made[0] in [job.id for job in page.get_next_page().data]
    found = client.fine_tuning.jobs.list(metadata={"part": "lists"}, limit=1)
    assert [job.id for job in found] == made[::-1]
    assert list(client.fine_tuning.jobs.list(metadata={"part": "other"})) == []
    assert all(job.id.startswith("job-") for job in client.fine_tuning.jobs.list())


def test_a_queued_job_is_paused_resumed_and_cancelled(client: Any, root: Root, files: dict[str, str]) -> None:
    api = client.fine_tuning.jobs
    made = api.create(model=TINY, **files, suffix="states")
    paused = api.pause(made.id)
    assert (paused.status, paused.model_extra["mlx_distill"]["state"]) == ("queued", "paused")
    assert api.pause(made.id).id == made.id
    assert api.resume(made.id).model_extra["mlx_distill"]["state"] == "queued"
    cancelled = api.cancel(made.id)
    assert (cancelled.status, cancelled.fine_tuned_model) == ("cancelled", None)
    assert cancelled.finished_at >= made.created_at
    for call in (api.cancel, api.pause):
        with pytest.raises(openai.BadRequestError, match="is cancelled, so it cannot be") as refused:
            call(made.id)
        assert refused.value.code == "job_finished"
    assert list(api.checkpoints.list(made.id)) == []
    events = list(api.list_events(made.id, limit=1))
    assert [event.data["event"] for event in events] == [
        "cancelled",
        "resumed",
        "paused",
        "submitted",
    ]
    assert all(event.type == "message" and event.level == "info" for event in events)


def test_what_is_not_there_is_not_found(client: Any) -> None:
    api = client.fine_tuning.jobs
    for call in (api.retrieve, api.cancel, api.pause, api.resume, api.list_events, api.checkpoints.list):
        with pytest.raises(openai.NotFoundError, match="no fine-tuning job 'job-0'"):
            call("job-0")


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"model": "nobody/model"}, "model", "no model 'nobody/model'"),
        ({"model": "../secret"}, "model", "no model"),
        ({"training_file": "file-0"}, "training_file", "no file 'file-0'"),
        ({"method": {"type": "dpo"}}, "method.type", "only supervised"),
        ({"method": {"type": "reinforcement"}}, "method.type", "only supervised"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "0 is not from 1"),
        ({"hyperparameters": {"batch_size": -1}}, "hyperparameters.batch_size", "-1 is not from 1"),
        ({"hyperparameters": {"beta": 1}}, "hyperparameters.beta", "not permitted"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations", "none is there"),
        ({"suffix": "s" * 65}, "suffix", "at most 64"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"metadata": {str(n): "v" for n in range(17)}}, "metadata", "more than 16 pairs"),
        ({"extra_body": {"colour": "red"}}, "colour", "not permitted"),
        ({"mlx": {"trust_remote_code": True}}, "mlx_distill", "trust_remote_code"),
        ({"mlx": {"teach": {"trust_remote_code": True}}}, "mlx_distill", "trust_remote_code"),
        ({"mlx": {"data": {"sources": [{"path": "/etc/passwd"}]}}}, "mlx_distill.data.sources", "the rows"),
        ({"mlx": {"evaluate": {"costs": "x.yaml"}}}, "mlx_distill.evaluate.costs", "not read over HTTP"),
        ({"mlx": {"task": {"name": "music"}}}, "mlx_distill.task", "the name of a packaged task"),
        ({"mlx": {"task": "os:system"}}, "mlx_distill.task", "os:system"),
        ({"mlx": {"task": "../../etc/task.yaml"}}, "mlx_distill.task", "not under the root"),
        ({"mlx": {"teacher": "a/b"}}, "mlx_distill.teacher", "what model says"),
        ({"mlx": {"task": "music", "student": "a/b"}}, "mlx_distill.student", "no model 'a/b'"),
        ({"mlx": {"teach": {"learning_rate": -1}}}, "mlx_distill.teach.learning_rate", "below"),
        (
            {"hyperparameters": {"n_epochs": 2}, "mlx": {"teach": {"steps": 4}}},
            "mlx_distill.teach.steps",
            "n_epochs says that too",
        ),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_by_its_parameter(
    client: Any, root: Root, files: dict[str, str], changes: dict[str, Any], param: str, message: str
) -> None:
    changes = dict(changes)
    if "mlx" in changes:
        changes["extra_body"] = {"mlx_distill": changes.pop("mlx")}
    before = {folder.name for folder in root.jobs.iterdir()} if root.jobs.exists() else set()
    with pytest.raises(openai.BadRequestError, match=message) as refused:
        client.fine_tuning.jobs.create(**({"model": TINY, **files} | changes))
    assert refused.value.param is not None and refused.value.param.endswith(param)
    assert {folder.name for folder in root.jobs.iterdir()} == before


def test_a_distillation_stands_under_a_key_of_ours(client: Any, root: Root, files: dict[str, str]) -> None:
    extra = {
        "task": "music",
        "student": "asset:models/tiny-gpt-oss",
        "distill": {"label_weight": 1.0},
        "targets": {"top_k": 8},
    }
    made = client.fine_tuning.jobs.create(
        model=TINY,
        training_file=files["training_file"],
        hyperparameters={"n_epochs": 3},
        extra_body={"mlx_distill": extra},
    )
    assert made.method.type == "supervised"
    recipe = recipe_of(root, made.id)
    assert (recipe["task"], recipe["student"]) == ("music", "asset:models/tiny-gpt-oss")
    assert recipe["distill"] == {"epochs": 3, "label_weight": 1.0}
    assert recipe["teach"] == {"epochs": 3}
    assert recipe["targets"] == {"top_k": 8}
    assert recipe["data"] == {"sources": [{"path": "training.jsonl"}]}


def wait_for(client: Any, job_id: str, seconds: float = 240) -> Any:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.status in ("succeeded", "failed", "cancelled"):
            return job
        time.sleep(0.2)
    raise AssertionError(f"{job_id}: {job.status} after {seconds} s")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any, Root]]:
    """A client of a server that runs jobs, a job that has succeeded, and the root."""
    root = write_root(tmp_path_factory.mktemp("trained"))
    with served_in_thread(root) as address, strict_client(address, timeout=120) as client:
        training = client.files.create(file=("a.jsonl", chats(8)), purpose="fine-tune")
        validation = client.files.create(file=("b.jsonl", chats(3, 50)), purpose="fine-tune")
        made = client.fine_tuning.jobs.create(
            model=TINY,
            training_file=training.id,
            validation_file=validation.id,
            hyperparameters={"n_epochs": 1, "batch_size": 4, "learning_rate_multiplier": 100},
            suffix="sums",
            extra_body={"mlx_distill": {"teach": {"evaluate_rows": 3}}},
        )
        client.files.delete(training.id)
        yield client, wait_for(client, made.id), root


@pytest.mark.slow
def test_a_job_makes_a_model_that_answers(trained: tuple[Any, Any, Root]) -> None:
    client, job, _ = trained
    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model == f"ft:tiny-qwen3:local:sums:{job.id}"
    assert job.trained_tokens > 50 and job.finished_at > job.created_at
    listed = {model.id for model in client.models.list()}
    version = job.model_extra["mlx_distill"]["version"]
    assert {job.fine_tuned_model, version} <= listed
    assert client.models.retrieve(job.fine_tuned_model).id == job.fine_tuned_model
    answers = [
        client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": "What is 3 plus 3?"}], max_tokens=8
        )
        for name in (job.fine_tuned_model, version)
    ]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content
    assert answers[0].model == job.fine_tuned_model


@pytest.mark.slow
def test_its_events_and_its_checkpoint_have_its_metrics(trained: tuple[Any, Any, Root]) -> None:
    client, job, root = trained
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=3))
    messages = [event.data["event"] for event in events if event.type == "message"]
    assert (messages[0], messages[-1]) == ("succeeded", "submitted")
    numbers = [int(event.id.rpartition("-")[2]) for event in events]
    assert numbers == sorted(set(numbers), reverse=True)
    metrics = [event for event in events if event.type == "metrics"]
    rows = (root.path / job.model_extra["mlx_distill"]["run"] / "teacher" / "metrics.jsonl").read_text()
    last = json.loads(rows.splitlines()[-1])
    assert metrics[0].data["train_loss"] == last["loss"]
    assert metrics[0].data["valid_mean_token_accuracy"] == last["valid_token_accuracy"]
    assert ", perplexity " in metrics[0].message
    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(job.id)
    assert checkpoint.fine_tuned_model_checkpoint == job.fine_tuned_model
    assert checkpoint.step_number == last["step"] == 2
    assert checkpoint.metrics.train_loss == last["loss"]
    assert checkpoint.metrics.full_valid_loss == last["valid_loss"]
    with pytest.raises(openai.BadRequestError, match="is succeeded, so it cannot be resumed"):
        client.fine_tuning.jobs.resume(job.id)


@pytest.mark.slow
def test_a_fine_tuned_model_is_fine_tuned_further_and_bad_rows_fail_with_their_line(
    trained: tuple[Any, Any, Root],
) -> None:
    client, job, root = trained
    rows = chats(3, 20) + b'{"messages": [{"role": "user", "content": "alone"}]}\n'
    bad = client.files.create(file=("bad.jsonl", rows), purpose="fine-tune")
    made = client.fine_tuning.jobs.create(model=job.fine_tuned_model, training_file=bad.id)
    assert recipe_of(root, made.id)["teacher"].startswith("../../versions/")
    failed = wait_for(client, made.id)
    assert failed.status == "failed"
    assert "training.jsonl:4: no assistant turn" in failed.error.message
    good = client.files.create(file=("good.jsonl", chats(4, 20)), purpose="fine-tune")
    further = client.fine_tuning.jobs.create(model=job.fine_tuned_model, training_file=good.id)
    done = wait_for(client, further.id)
    assert done.status == "succeeded", done.error
    assert done.fine_tuned_model == f"ft:tiny-qwen3:local::{done.id}"
    base = load(root.path / job.model_extra["mlx_distill"]["run"] / "teacher")[0]
    merged = load(root.path / done.model_extra["mlx_distill"]["run"] / "teacher_base")[0]
    tokens = mx.array([[1, 5, 9, 20]])
    assert mx.allclose(base(tokens), merged(tokens), rtol=0.02, atol=0.1)  # bfloat16 is merged into bfloat16


def test_an_answer_that_was_lost_does_no_harm(root: Root) -> None:
    """The client repeats a request whose connection broke, with nothing that says so."""
    app = make_app(root, start_jobs=False)
    with client_of(app) as client:
        upload = client.post(
            "/v1/files", files={"file": ("c.jsonl", chats())}, data={"purpose": "fine-tune"}
        ).json()
        body = {"model": TINY, "training_file": upload["id"], "suffix": "lost"}
        ids = {client.post("/v1/fine_tuning/jobs", json=body, headers=HEADERS).json()["id"] for _ in range(3)}
        assert len(ids) == 1
        job_id = ids.pop()
        first = client.post(f"/v1/fine_tuning/jobs/{job_id}/cancel")
        again = client.post(f"/v1/fine_tuning/jobs/{job_id}/cancel")
        assert (first.status_code, again.status_code) == (200, 400)
        assert Path(root.jobs / job_id / "recipe.yaml").is_file()
