"""The server under load, beside the engine without a server, and beside ``mlx_lm.server``.

    python benchmarks/serve_bench.py                     # about five minutes
    python benchmarks/serve_bench.py --parts engine --rounds 7
    python benchmarks/serve_bench.py --short             # a minute: that it works, no figures to keep

    load    32 clients for two minutes on /v1/analyze and /v1/analyze/batch with the packaged tiny-qwen3 in
            float32 (its bfloat16 is slow on a CPU): what was lost, whether order was kept, latency,
            throughput, resident memory of the server's process. It is flat where the line fitted to its
            samples after the first quarter rises by less than 5 % until the end
    engine  rows a second of 32 clients over those of md.analyze's Analyzer in this process, the same rows,
            the same batch, for a model of random weights with as many layers as a step of 60 ms needs
    peer    tokens a second and latency of chat completions of 32 clients, this server over mlx_lm.server, the
            same model, chats and places in the batch

Contenders take turns, each round with rows of its own; ratios are the medians of each round's. Clients are
threads of this process, each with a connection that it keeps, and share the machine with the server. Every
client asks again as soon as it has its answer. Results go to benchmarks/results/serve.json.

The exit code is 1 where a part failed, lost or reordered an answer, memory was not flat, or the server had
less than 0.9 of the engine's rows a second.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
RESULTS = ROOT / "benchmarks" / "results" / "serve.json"
PARTS = ("load", "engine", "peer")
WORDS = "rain roof river light window winter door song heart road fire sea night bell stone morning".split()
TINY = "models/tiny"
WIDE = "models/wide"  # under the root, as the other one
MODEL = ROOT / "mlx_distill" / "assets" / "models" / "tiny-qwen3"
BATCH = 16
_BATCHES = 0.2  # of the requests of the load
STEP_MS = 60.0  # of the model beside the engine and the peer, at least
FLAT = 0.05  # rise of a flat server's memory, at most
SETTLE_S = 7.0  # until an idle server has given back what was freed
JUDGED_S = 60.0  # of samples, below which nothing is said of that
LEAST = 0.9  # of the engine's rows a second
TASK: dict[str, Any] = {
    "name": "moods",
    "system": "Judge the song.",
    "user": "{title}: {lyrics}",
    "label": "mood",
    "max_answer_tokens": 48,
    "schema": {
        "type": "object",
        "additionalProperties": False,
        "required": ["mood", "why"],
        "properties": {
            "mood": {"type": "string", "enum": ["glad", "sad", "angry", "calm"]},
            "why": {"type": "string"},
        },
    },
}
PEER = (
    "from mlx_distill.runtime import load_blas; load_blas(); "  # the same matrix products for both
    "from mlx_lm.server import main; main()"
)


def make_song(number: int, seed: int = 0, words: int = 60) -> dict[str, str]:
    chance = random.Random(seed * 1_000_003 + number)
    lyrics = " ".join(chance.choices(WORDS, k=chance.randint(words // 6, words)))
    return {"id": f"s{seed}-{number}", "title": f"Song {number}", "artist": "Nobody", "lyrics": lyrics}


@dataclass
class Client:
    """One connection that is kept, and what became of its requests."""

    address: str
    seconds: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    connection: http.client.HTTPConnection | None = None

    def post(self, path: str, body: Any, again: bool = False) -> dict[str, Any] | None:
        """The answer, or None where there is none; with ``again`` it is asked until there is one."""
        from helpers.served import HEADERS

        began = time.perf_counter()
        try:
            if self.connection is None:
                host, port = self.address.removeprefix("http://").split(":")
                self.connection = http.client.HTTPConnection(host, int(port), timeout=600)
            headers = {**HEADERS, "content-type": "application/json"}
            self.connection.request("POST", path, json.dumps(body), headers)
            response = self.connection.getresponse()
            content = response.read()
        except OSError as error:
            self.connection = None
            self.problems.append(f"{type(error).__name__}: {error}")
            time.sleep(0.01)
            return self.post(path, body, again) if again else None
        self.seconds.append(time.perf_counter() - began)
        if response.status != 200:
            self.problems.append(f"{response.status}: {content[:200]!r}")
            return None
        answer: dict[str, Any] = json.loads(content)
        return answer


def run_clients(count: int, address: str, work: Callable[[int, Client], None]) -> tuple[list[Client], float]:
    """Let clients work, each in a thread; them and the wall time."""
    clients = [Client(address) for _ in range(count)]
    began = time.perf_counter()
    with ThreadPoolExecutor(count) as threads:
        list(threads.map(work, range(count), clients))  # raises what one of them raised
    return clients, time.perf_counter() - began


def divide_among_clients(
    clients: int, address: str, count: int, ask: Callable[[int, Client], None]
) -> tuple[list[Client], float]:
    """Let clients ask for rows 0 to ``count``, each for the next one as soon as it has its answer."""
    numbers, lock = iter(range(count)), threading.Lock()

    def work(_: int, client: Client) -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            ask(number, client)

    return run_clients(clients, address, work)


def latencies(seconds: Sequence[float]) -> dict[str, float]:
    return {
        "p50_ms": 1000 * float(np.quantile(seconds, 0.5)),
        "p95_ms": 1000 * float(np.quantile(seconds, 0.95)),
        "max_ms": 1000 * max(seconds),
    }


def resident_mb(pid: int) -> float:
    out = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True)
    return int(out.stdout) / 1024


def idle_mb(pid: int, settle: float) -> float:
    """The resident memory of a server that has had nothing to do for some seconds."""
    time.sleep(settle)
    return resident_mb(pid)


@contextmanager
def sampled(pid: int, every: float) -> Iterator[list[tuple[float, float]]]:
    """Seconds and resident memory in MB of a process while the block runs."""
    samples, done = list[tuple[float, float]](), threading.Event()
    began = time.perf_counter()

    def sample() -> None:
        while True:
            samples.append((time.perf_counter() - began, resident_mb(pid)))
            if done.wait(every):
                return

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def memory_over_time(samples: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """What became of a process's memory: the line fitted to the samples behind the first quarter.

    >>> memory_over_time([(0, 50.0), (30, 100.0), (60, 101.0), (90, 102.0), (120, 103.0)])["mb_a_minute"]
    2.0
    """
    seconds, sizes = np.array(samples).T
    late = seconds >= seconds[-1] / 4
    slope, start = np.polyfit(seconds[late], sizes[late], 1) if late.sum() > 1 else (0.0, sizes[-1])
    first, last = (start + slope * at for at in (seconds[late][0], seconds[-1]))
    return {
        "start": samples[0][1],
        "end": samples[-1][1],
        "most": float(sizes.max()),
        "every_twelfth": [round(size, 1) for _, size in samples[:: max(1, len(samples) // 12)]],
        "mb_a_minute": round(60 * float(slope), 3),
        "rise": float(last / first - 1),
        "flat": bool(last / first - 1 < FLAT) if seconds[-1] >= JUDGED_S else None,
    }


def metric(address: str, name: str) -> float:
    """The sum of a metric over its labels."""
    from helpers.served import HEADERS

    host, port = address.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    connection.request("GET", "/metrics", headers=HEADERS)
    lines = connection.getresponse().read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.split("{")[0].split(" ")[0] == name)


def measure_load(folder: Path, clients: int, seconds: float, tokens: int | None = None) -> dict[str, Any]:
    from helpers.served import served_process

    from mlx_distill import convert
    from mlx_distill.ledger.root import Root
    from mlx_distill.running_costs import cost_report
    from mlx_distill.serve.request_log import read_requests

    root = Root.at(folder / "load")
    convert(str(MODEL), root.path / TINY, dtype="float32")
    single, batches, rows, wrong = list[float](), list[float](), [0], list[str]()
    lock = threading.Lock()

    def work(number: int, client: Client) -> None:
        turn, chance = 0, random.Random(number)
        while turn < 3 or time.perf_counter() < until:
            turn += 1
            first = 1_000_000 * number + 10 * turn
            count = 8 if turn == 2 or chance.random() < _BATCHES else 1
            songs = [make_song(first + place) for place in range(count)]
            path = "/v1/analyze" if count == 1 else "/v1/analyze/batch"
            asked = {"item": songs[0]} if count == 1 else {"items": songs}
            answer = client.post(path, {**asked, "max_tokens": tokens})
            if answer is None:
                continue
            got = [one["id"] for one in ([answer] if count == 1 else answer["data"])]
            with lock:
                (single if count == 1 else batches).append(client.seconds[-1])
                rows[0] += len(got)
                if got != [song["id"] for song in songs]:
                    wrong.append(f"{[song['id'] for song in songs]}: {got}")

    settle = SETTLE_S if seconds >= JUDGED_S else 0.0
    arguments = ("--model", TINY, "--task", "music", "--batch-size", str(BATCH))
    with served_process(root, *arguments) as (address, process):
        until = time.perf_counter() + seconds / 6
        run_clients(clients, address, work)  # loads the model, fills the cache of beginnings
        idle_before = idle_mb(process.pid, settle)
        single.clear()
        batches.clear()
        rows[0] = 0
        before = metric(address, "gen_ai_server_answers_total")
        logged = len(list(read_requests(root.request_log)))
        until = time.perf_counter() + seconds
        with sampled(process.pid, max(0.2, seconds / 60)) as memory:
            done, wall = run_clients(clients, address, work)
        counted = metric(address, "gen_ai_server_answers_total") - before
        idle = {"idle_before": idle_before, "idle_after": idle_mb(process.pid, settle)}
        process.terminate()
        process.wait(60)
    problems = [problem for client in done for problem in client.problems]
    from mlx_distill.ledger.database import Ledger

    return {
        "clients": clients,
        "seconds": wall,
        "requests": len(single) + len(batches) + len(problems),
        "lost": len(problems),
        "problems": problems[:5],
        "out_of_order": len(wrong),
        "rows": rows[0],
        "rows_counted_by_metrics": counted,
        "log_lines": len(list(read_requests(root.request_log))) - logged - 1,  # one is /metrics
        "rows_in_costs": cost_report(Ledger(root)).total.calls,  # those of the warm-up too
        "requests_per_s": (len(single) + len(batches)) / wall,
        "rows_per_s": rows[0] / wall,
        "analyze": latencies(single),
        "batch_of_8": latencies(batches),
        "resident_mb": memory_over_time(memory) | idle,
    }


def write_wide_model(folder: Path, hidden: int, layers: int) -> None:
    """The packaged tiny tokenizer before a model of random weights."""
    from helpers.small_model import write_small_model

    (folder / WIDE).parent.mkdir(parents=True)
    write_small_model(
        folder / WIDE,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_attention_heads=max(2, hidden // 64),
        num_key_value_heads=max(1, hidden // 128),
        head_dim=min(64, hidden // 2),
        num_hidden_layers=layers,
        layer_types=["full_attention"] * layers,
    )


def measure_step(model: Any, tokenizer: Any) -> float:
    """Median milliseconds of a step with a full batch."""
    from mlx_distill.infer.engine import Engine
    from mlx_distill.infer.requests import Request

    engine = Engine(model, tokenizer, batch_size=BATCH)
    for number in range(BATCH):
        engine.submit(Request(list(range(5 + number, 25 + number)), 24))
    seconds = []
    while engine.busy:
        began = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - began)
    return 1000 * statistics.median(seconds[4:-2])


def layers_of_step(folder: Path, hidden: int, milliseconds: float) -> int:
    """How many layers a model of random weights needs so that a step with a full batch takes so long."""
    from mlx_distill.models.load import load

    def measure(layers: int) -> float:
        root = folder / f"layers-{layers}"
        write_wide_model(root, hidden, layers)
        return measure_step(*load(root / WIDE))

    few, more = measure(2), measure(6)
    of_one = max((more - few) / 4, 0.01)
    return max(2, math.ceil(6 + (1.25 * milliseconds - more) / of_one))


def in_turns(contenders: dict[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """What each contender returns in each round, behind one that is not counted; the first one changes."""
    names = list(contenders)
    out: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        contenders[name](0)
    for number in range(rounds):
        for place in range(len(names)):
            name = names[(number + place) % len(names)]
            out[name].append(contenders[name](number + 1))
    return out


def ratio(rates: dict[str, list[float]], a: str, b: str) -> dict[str, float]:
    each = [x / y for x, y in zip(rates[a], rates[b], strict=True)]
    return {"median": statistics.median(each), "min": min(each), "max": max(each)}


def measure_engine(root: Path, clients: int, rows: int, tokens: int, rounds: int) -> dict[str, Any]:
    from helpers.served import served_process

    from mlx_distill.infer.analyze import Analyzer
    from mlx_distill.progress import NullProgress

    task = root / "task.json"
    task.write_text(json.dumps(TASK))
    analyzer = Analyzer(str(root / WIDE), task, batch_size=BATCH, max_tokens=tokens, progress=NullProgress())
    texts: dict[tuple[int, str], list[str]] = {}
    spent: list[float] = []
    with served_process(root, "--model", WIDE, "--task", str(task), "--batch-size", str(BATCH)) as (
        address,
        _,
    ):

        def offline(number: int) -> float:
            songs = [make_song(n, number, words=12) for n in range(rows)]
            began = time.perf_counter()
            predictions = analyzer.analyze(songs)
            wall = time.perf_counter() - began
            texts[number, "engine"] = [prediction.text for prediction in predictions]
            return rows / wall

        def served(number: int) -> float:
            got: dict[int, str] = {}

            def ask(n: int, client: Client) -> None:
                body = {"item": make_song(n, number, words=12), "max_tokens": tokens}
                answer = client.post("/v1/analyze", body)
                assert answer is not None, client.problems
                got[n] = answer["text"]

            done, wall = divide_among_clients(clients, address, rows, ask)
            if number:
                spent.extend(second for client in done for second in client.seconds)
            texts[number, "server"] = [got[n] for n in range(rows)]
            return rows / wall

        rates = in_turns({"engine": offline, "server": served}, rounds)
    same = [
        texts[number, "server"][n] == texts[number, "engine"][n]
        for number in range(1, rounds + 1)
        for n in range(rows)
    ]
    return {
        "clients": clients,
        "batch": BATCH,
        "rows": rows,
        "tokens": tokens,
        "step_ms": measure_step(analyzer.model, analyzer.tokenizer),
        "rows_per_s": {name: statistics.median(each) for name, each in rates.items()},
        "server_over_engine": ratio(rates, "server", "engine"),
        "equal_answers": sum(same) / len(same),
        "analyze": latencies(spent),
    }


@contextmanager
def peer_process(model: Path, port: int) -> Iterator[str]:
    """``mlx_lm.server`` on the same model, with as many places in its batch."""
    arguments = ["--model", str(model), "--port", str(port), "--log-level", "ERROR"]
    arguments += ["--decode-concurrency", str(BATCH), "--chat-template-args", '{"enable_thinking": false}']
    process = subprocess.Popen(
        [sys.executable, "-c", PEER, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.perf_counter() + 60
        while True:
            with suppress(OSError):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", "/health")
                connection.getresponse().read()
                break
            if process.poll() is not None or time.perf_counter() > until:
                raise RuntimeError(f"mlx_lm.server does not answer (exit code {process.poll()})")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def measure_peer(root: Path, clients: int, chats: int, tokens: int, rounds: int) -> dict[str, Any]:
    from helpers.served import served_process

    spent: dict[str, list[float]] = {"server": [], "mlx_lm.server": []}
    used: dict[str, list[dict[str, int]]] = {"server": [], "mlx_lm.server": []}
    refused = {"server": 0, "mlx_lm.server": 0}

    def asking(name: str, address: str, model: str) -> Callable[[int], float]:
        def tokens_per_s(number: int) -> float:
            usages: list[dict[str, int]] = []

            def ask(n: int, client: Client) -> None:
                song = make_song(n, 100 + number, words=12)
                messages = [
                    {"role": "system", "content": "Say what the song is about."},
                    {"role": "user", "content": song["lyrics"]},
                ]
                body = {"model": model, "messages": messages, "max_tokens": tokens, "temperature": 0}
                # mlx_lm.server queues five connections: it resets others.
                answer = client.post("/v1/chat/completions", body, again=True)
                assert answer is not None, client.problems
                usages.append(answer["usage"])

            done, wall = divide_among_clients(clients, address, chats, ask)
            refused[name] += sum(len(client.problems) for client in done)
            if number:
                used[name] += usages
                spent[name].extend(second for client in done for second in client.seconds)
            return sum(usage["completion_tokens"] for usage in usages) / wall

        return tokens_per_s

    wide = root / WIDE
    with (
        served_process(root, "--model", WIDE, "--batch-size", str(BATCH)) as (address, _),
        peer_process(wide, free_port()) as other,
    ):
        rates = in_turns(
            {
                "server": asking("server", address, WIDE),
                "mlx_lm.server": asking("mlx_lm.server", other, str(wide)),
            },
            rounds,
        )
    quantiles = {name: latencies(each) for name, each in spent.items()}
    return {
        "clients": clients,
        "batch": BATCH,
        "chats": chats,
        "tokens": tokens,
        "tokens_per_s": {name: statistics.median(each) for name, each in rates.items()},
        "server_over_mlx_lm": ratio(rates, "server", "mlx_lm.server"),
        "latency": quantiles,
        "connections_reset": refused,
        "p95_over_mlx_lm": quantiles["server"]["p95_ms"] / quantiles["mlx_lm.server"]["p95_ms"],
        "mean_tokens": {
            name: {
                kind: statistics.mean(usage[kind] for usage in each)
                for kind in ("prompt_tokens", "completion_tokens")
            }
            for name, each in used.items()
        },
    }


def shortfalls(part: str, found: dict[str, Any]) -> list[str]:
    """What a part did not show."""
    if "error" in found:
        return [f"{part}: {found['error']}"]
    out = []
    if part == "load":
        memory = found["resident_mb"]
        if found["lost"] or found["out_of_order"]:
            out.append(f"load: {found['lost']} lost, {found['out_of_order']} out of order")
        if found["rows"] != found["rows_counted_by_metrics"]:
            out.append(f"load: {found['rows']} rows, in /metrics {found['rows_counted_by_metrics']}")
        if memory["flat"] is False:
            out.append(f"load: memory rose by {memory['rise']:.1%} after the first quarter")
    slow_steps = part == "engine" and found["step_ms"] >= STEP_MS
    if slow_steps and found["server_over_engine"]["median"] < LEAST:
        out.append(f"engine: the server has {found['server_over_engine']['median']:.2f} of its rows a second")
    if part == "engine" and found["equal_answers"] < 1:
        out.append(f"engine: {found['equal_answers']:.1%} of the answers are the same")
    return out


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=120.0, help="of the load")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, help=f"as many as a step of {STEP_MS:.0f} ms needs")
    parser.add_argument("--rows", type=int, default=48, help="a round")
    parser.add_argument("--tokens", type=int, default=48, help="an answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="that it works; no results are written")
    options = parser.parse_args(arguments)
    if options.short:
        short = {"clients": 4, "seconds": 1.0, "hidden": 32, "layers": 1}
        vars(options).update(short, rows=8, tokens=4, rounds=1)

    from mlx_distill.runtime import load_blas, machine, versions

    load_blas()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() and not options.short else {}
    measured = {"machine": machine(), "versions": versions(), "commit": commit.stdout.strip()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.layers is None and {"engine", "peer"} & set(options.parts):
            options.layers = layers_of_step(folder, options.hidden, STEP_MS)
        if options.layers is not None:
            write_wide_model(folder / "root", options.hidden, options.layers)
        sizes = options.clients, options.rows, options.tokens, options.rounds
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "load": lambda: measure_load(
                folder, options.clients, options.seconds, options.tokens if options.short else None
            ),
            "engine": lambda: measure_engine(folder / "root", *sizes),
            "peer": lambda: measure_peer(folder / "root", *sizes),
        }
        for part in options.parts:
            load_average, began = os.getloadavg()[0], time.perf_counter()
            setting = {} if part == "load" else {"hidden": options.hidden, "layers": options.layers}
            try:
                found = parts[part]()
            except Exception as error:  # the other parts are measured all the same
                found = {"error": f"{type(error).__name__}: {error}"}
            found |= {"load_average_before": load_average, "part_seconds": time.perf_counter() - began}
            results[part] = {**setting, **found, **measured}
            print(part, json.dumps(results[part]), file=sys.stderr)
            if not options.short:
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    results["shortfalls"] = [line for part in options.parts for line in shortfalls(part, results[part])]
    if "engine" in options.parts and results["engine"].get("step_ms", 0) < STEP_MS:
        print(f"engine: not judged, for its steps are below {STEP_MS:.0f} ms", file=sys.stderr)
    print(*(results["shortfalls"] or ["no shortfall"]), sep="\n", file=sys.stderr)
    return results


if __name__ == "__main__":
    sys.exit(bool(main()["shortfalls"]))
