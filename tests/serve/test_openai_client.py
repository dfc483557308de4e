"""The client of OpenAI, which refuses every answer that is not as its types say, against a real server."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import pytest

openai = pytest.importorskip("openai")

from helpers.served import TOKEN, served_in_thread, write_root

from mlx_distill.ledger.root import Root


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Root:
    return write_root(tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="module")
def client(root: Root) -> Iterator[Any]:
    with (
        served_in_thread(root) as address,
        openai.OpenAI(
            base_url=f"{address}/v1", api_key=TOKEN, _strict_response_validation=True, max_retries=0
        ) as client,
    ):
        yield client


def chats(count: int = 12) -> bytes:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {number} plus {number}?"},
                {"role": "assistant", "content": f"It is {2 * number}."},
            ]
        }
        for number in range(count)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_files_are_kept_listed_and_deleted(client: Any, root: Root) -> None:
    content = chats()
    first = client.files.create(file=("chats.jsonl", content), purpose="fine-tune")
    expires = {"anchor": "created_at", "seconds": 3600}
    second = client.files.create(file=("b.bin", b"x"), purpose="user_data", expires_after=expires)
    assert (first.bytes, first.filename, first.status) == (len(content), "chats.jsonl", "processed")
    assert second.expires_at - second.created_at == 3600
    assert client.files.wait_for_processing(first.id).id == first.id
    assert client.files.content(first.id).read() == content
    page = client.files.list(limit=1)
    assert [file.id for file in page.data] == [second.id]
    assert [file.id for file in page.get_next_page().data] == [first.id]
    assert [file.id for file in client.files.list(order="asc")] == [first.id, second.id]
    assert [file.id for file in client.files.list(purpose="fine-tune")] == [first.id]
    assert client.files.delete(second.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(second.id)
    assert len(list(root.uploads.iterdir())) == 1


@pytest.mark.parametrize(
    "name", ["../../evil.jsonl", "..", "<script>alert(1)</script>", "a\nb", "/etc/passwd"]
)
def test_the_name_of_an_upload_is_no_path(client: Any, root: Root, name: str) -> None:
    file = client.files.create(file=(name, io.BytesIO(b"{}\n")), purpose="fine-tune")
    kept = [path for path in root.path.rglob("*") if path.is_file() and path.read_bytes() == b"{}\n"]
    assert [path.parent for path in kept] == [root.uploads]
    assert "/" not in file.filename and "\n" not in file.filename and file.filename != ".."
    content = client.files.content(file.id)
    assert content.response.headers["content-type"] == "application/octet-stream"
    client.files.delete(file.id)


@pytest.mark.parametrize(
    ("content", "purpose", "expires", "message"),
    [
        (b"x", "evals", None, "purpose: 'evals' is not one of"),
        (b"", "fine-tune", None, "the file is empty"),
        (b"x", "fine-tune", {"anchor": "created_at", "seconds": 5}, "expires_after.seconds"),
        (b"x", "fine-tune", {"anchor": "last_active_at", "seconds": 3600}, "expires_after.anchor"),
    ],
)
def test_a_wrong_upload_is_refused(
    client: Any, root: Root, content: bytes, purpose: Any, expires: Any, message: str
) -> None:
    before = sorted(root.uploads.glob("*"))
    more = {} if expires is None else {"expires_after": expires}
    with pytest.raises(openai.BadRequestError, match=message):
        client.files.create(file=("a.jsonl", content), purpose=purpose, **more)
    assert sorted(root.uploads.glob("*")) == before


def test_an_expired_file_is_gone(client: Any, root: Root) -> None:
    from mlx_distill.ledger.database import Ledger

    file = client.files.create(
        file=("a", b"x"), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    with Ledger(root).write() as db:
        db.execute("UPDATE files SET expires_at = 1 WHERE id = ?", (file.id,))
    assert file.id not in [one.id for one in client.files.list()]


def test_models_are_listed_and_found(client: Any) -> None:
    assert "models/small" in [model.id for model in client.models.list()]
    for name in ("models/small", "asset:models/tiny-qwen3"):
        assert client.models.retrieve(name).id == name
    for name in ("../etc", "Qwen/Qwen3-8B", "job-000000000000"):
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(name)
    with pytest.raises(openai.PermissionDeniedError, match="registry archive"):
        client.models.delete("models/small")
