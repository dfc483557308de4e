"""The log of requests: bounded files, lines that are whole, a full disk."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
from helpers.served import client_of, make_app

from mlx_distill.ledger.root import Root
from mlx_distill.serve.request_log import RequestLog, read_requests


def numbers(path: Path) -> list[int]:
    return [line["n"] for line in read_requests(path)]


def test_files_are_rotated_and_their_size_and_number_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "new" / "requests.jsonl"
    log = RequestLog(path, max_bytes=100, files=3)
    for n in range(50):
        log.write({"n": n, "x": "y" * 20})
    files = sorted(file.name for file in path.parent.iterdir())
    assert files == ["requests.1.jsonl", "requests.2.jsonl", "requests.jsonl"]
    assert all(file.stat().st_size <= 100 for file in path.parent.iterdir())
    kept = numbers(path)
    assert kept == list(range(50 - len(kept), 50)) and len(kept) >= 6


def test_one_file_is_begun_again(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    log = RequestLog(path, max_bytes=30, files=1)
    for n in range(10):
        log.write({"n": n})
    assert numbers(path)[-1] == 9 and [file.name for file in tmp_path.iterdir()] == [path.name]


def test_what_a_killed_process_left_of_a_line_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    RequestLog(path).write({"n": 0})
    with open(path, "ab") as file:
        file.write(b'{"n": 1, "ha')
    assert numbers(path) == [0]
    log = RequestLog(path)
    log.write({"n": 2})
    log.write({"n": 3, "half of a pair": "\ud800"})
    assert numbers(path) == [0, 2, 3]


def test_writers_of_several_servers_lose_no_line(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"

    def write(first: int) -> None:
        log = RequestLog(path, max_bytes=2000, files=100)
        for n in range(first, first + 300):
            log.write({"n": n})

    threads = [threading.Thread(target=write, args=(1000 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers(path)) == [1000 * number + n for number in range(4) for n in range(300)]


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full")
def test_a_full_disk_fails_no_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = Root.at(tmp_path)
    app = make_app(root, model=None, start_jobs=False)
    root.state.mkdir(exist_ok=True)
    root.request_log.symlink_to("/dev/full")
    with client_of(app) as client:
        assert [client.get("/health").status_code for _ in range(3)] == [200] * 3
        assert "mlx_distill_request_log_lost_lines_total 3.0" in client.get("/metrics").text
        root.request_log.unlink()
        client.get("/health")
    assert [line["route"] for line in read_requests(root.request_log)] == ["/health"]
    assert caplog.text.lower().count("no space left") == 1
