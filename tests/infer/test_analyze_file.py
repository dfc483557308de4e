"""Files of rows to files of answers: what becomes of bad rows and long ones, and what is continued."""

from __future__ import annotations

import gzip
import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.small_chain import RecordedProgress
from helpers.small_model import write_small_model
from helpers.small_run import TASK

import mlx_distill as md
from mlx_distill.cli import cli
from mlx_distill.errors import ConfigError, DataError, FileError, Interrupted
from mlx_distill.infer.analyze_file import Summary, analyze_file, answer_line, model_digest
from mlx_distill.infer.long_items import MARK
from mlx_distill.records import Prediction
from mlx_distill.tasks.task import parse_task

# A task without a label: its distribution would take as long as the answers.
PLAIN = {key: value for key, value in TASK.items() if key != "label"}
SONGS = {**PLAIN, "user": "{title}: {lyrics}"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "small"
    write_small_model(folder)
    return folder


@pytest.fixture
def task(tmp_path: Path) -> str:
    (tmp_path / "task.yaml").write_text(json.dumps(PLAIN), encoding="utf-8")
    return str(tmp_path / "task.yaml")


def ask(model: Path, rows: Any, task: str, **more: Any) -> tuple[Summary, list[str]]:
    progress = RecordedProgress()
    settings = {"batch_size": 2, "max_tokens": 2, "constrain": False, **more}
    return analyze_file(model, rows, task=task, progress=progress, **settings), progress.notes


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, count: int) -> Path:
    path.write_text("".join(f'{{"id": {i}, "text": "bridge {i}"}}\n' for i in range(count)), encoding="utf-8")
    return path


BAD_LINES: dict[str, tuple[bytes, str]] = {
    "not JSON": (b'{"text": "a"', "rows.jsonl:2: not JSON"),
    "no object": (b'["a"]', "rows.jsonl:2: a JSON list, not an object"),
    "not UTF-8": (b'{"text": "\xff"}', "rows.jsonl:2: not UTF-8 (byte 10 of the line)"),
    "no field": (b'{"id": "x", "txt": "a"}', "rows.jsonl:2: no field 'text'; the row has id, txt"),
    "null": (b'{"text": null}', "rows.jsonl:2: the field 'text' is null"),
    "NaN": (b'{"text": NaN}', "rows.jsonl:2: the field 'text' is null"),
    "nested": (b'{"text": {"a": ["b"]}}', "rows.jsonl:2: text: text is needed, not {'a': ['b']}"),
    "empty": (b'{"text": ""}', "rows.jsonl:2: "),
    "blank": (b'{"text": " \\n\\t\\u3000"}', "rows.jsonl:2: "),
    "id": (b'{"id": [1], "text": "a"}', "rows.jsonl:2: id: text or a whole number is needed"),
    "half a pair": (b'{"text": "a \\ud800"}', "rows.jsonl:2: "),
    "deep": (b"[" * 100_000, "rows.jsonl:2: not JSON"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_row_is_an_error_in_its_place(tmp_path: Path, model: Path, task: str, name: str) -> None:
    raw, error = BAD_LINES[name]
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(b'{"id": 1, "text": "a"}\n' + raw + b'\n{"id": 3, "text": "c"}\n')
    summary, notes = ask(model, rows, task, out=tmp_path / "out.jsonl")
    answers = read(tmp_path / "out.jsonl")
    own = "x" if name == "no field" else "rows.jsonl:2"
    assert [answer["id"] for answer in answers] == ["1", own, "3"]
    assert answers[1]["error"].startswith(error) and answers[1]["answer"] is None
    fix = answers[1]["error"].partition("): " if "): " in answers[1]["error"] else " (")[2]
    assert fix and "drop_invalid" not in fix
    assert [answer["error_kind"] == "bad row" for answer in answers] == [False, True, False]
    assert summary.answers == 3 and summary.kinds["bad row"] == 1
    assert notes == ["rows.jsonl: 1 of 3 rows cannot be asked"]
    assert all("latency_s" not in answer for answer in answers)


def test_bad_rows_of_tables_and_lists(tmp_path: Path, model: Path, task: str) -> None:
    files = {
        "rows.csv": b'id,text\n1,a\n2,"b "c" d"\n3\n4,\xff\n5,"e\nf"\n',
        "rows.json": b'[{"id": 1, "text": "a"}, 2, {"id": 3, "text": 3.5}]',
        "rows.jsonl.gz": gzip.compress(b'{"id": 1, "text": "a"}\n{\n{"id": 3, "text": "b"}\n'),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        ask(model, tmp_path / name, task, out=tmp_path / f"{name}.out")
    csv, listed, packed = (read(tmp_path / f"{name}.out") for name in files)
    assert [row["id"] for row in csv] == ["1", "rows.csv:3", "rows.csv:4", "rows.csv:5", "5"]
    for row, words in zip(csv[1:4], ("not CSV", "1 cells", "not UTF-8"), strict=True):
        assert words in row["error"] and row["error"].startswith(row["id"])
    assert [row["id"] for row in listed] == ["1", "rows.json[1]", "3"]
    assert [row["id"] for row in packed] == ["1", "rows.jsonl.gz:2", "3"]


def test_files_that_cannot_be_read_to_their_end_are_refused_before_anything(
    tmp_path: Path, task: str
) -> None:
    (tmp_path / "quote.csv").write_text('id,text\n1,a\n2,"b\n3,c\n', encoding="utf-8")
    packed = gzip.compress(b'{"id": 1, "text": "a"}\n' * 5000)
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "none.jsonl").write_text("\n", encoding="utf-8")
    write_small_model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()  # it is not loaded
    for name, words in (
        ("quote.csv", "quote.csv:3: not CSV: unexpected end"),
        ("cut.jsonl.gz", "cannot be read to its end"),
        ("none.jsonl", "no rows"),
        ("absent.jsonl", "no such file"),
    ):
        with pytest.raises(DataError, match=words):
            ask(tmp_path / "model", tmp_path / name, task, out=tmp_path / "out.jsonl")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"id": 1, "txt": "a"}\n{"id": 2}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"none of the 2 rows can be asked: rows\.jsonl:1: no field 'text'"):
        ask(tmp_path / "model", rows, task)
    with pytest.raises(ConfigError, match="where the rows are"):
        ask(tmp_path / "model", rows, task, out=rows)
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*"))


TEXTS = {
    "Arabic": "أمطار على السطح " * 300,
    "Chinese": "雨落在屋顶上，她在唱歌。" * 200,
    "emoji": "👩‍👩‍👧‍👦👍🏽🇩🇪" * 150,
    "combining": "e\u0301" * 900,
    "mixed direction": "abc \u202eأمطار\u202c שלום " * 150,
    "control": "a\x00b\x1b[31m\u200b\ufeff " * 200,
    "control tokens": "<|im_end|><|im_start|>assistant " * 100,
    "one word": "a" * 5000,
    "instrumental": "[Instrumental]",
    "one character": ".",
}


@pytest.mark.parametrize("name", TEXTS)
def test_other_scripts_and_long_texts_have_an_answer(tmp_path: Path, model: Path, name: str) -> None:
    task = parse_task(SONGS, "task.yaml")
    item = {"id": "x", "title": "Rain", "lyrics": TEXTS[name]}
    limit = 120
    settings: dict[str, Any] = {"max_tokens": 2, "constrain": False, "max_prompt_tokens": limit}
    progress = RecordedProgress()
    refused, cut = (
        md.Analyzer(model, task, long=long, progress=progress, **settings).analyze([item])[0]
        for long in ("refuse", "cut")
    )
    if len(TEXTS[name]) < 100:
        assert refused == cut or refused.text == cut.text
        assert refused.cut is None and refused.tokens and refused.error_kind != "prompt too long"
        return
    assert refused.error_kind == "prompt too long" and "item 1: the prompt has" in str(refused.error)
    assert "--long cut" in str(refused.error) and refused.answer is None and refused.tokens == 0
    assert cut.cut is not None and cut.tokens and limit - 30 <= cut.prompt_tokens <= limit
    assert cut.cut["field"] == "lyrics" and cut.id == refused.id
    assert cut.cut["removed_tokens"] == refused.prompt_tokens - cut.prompt_tokens > 0
    assert 0 < cut.cut["removed_characters"] < len(TEXTS[name])
    json.loads(answer_line(cut))


def test_the_middle_is_cut_at_words_and_not_inside_a_character(model: Path) -> None:
    from mlx_distill.data.rows import to_item
    from mlx_distill.infer.long_items import cut_middle
    from mlx_distill.infer.predict import item_prompt
    from mlx_distill.models.load import load_tokenizer

    tokenizer, task = load_tokenizer(model), parse_task(SONGS, "task.yaml")

    def kept(lyrics: str) -> tuple[str, str]:
        row = {"title": "Rain", "lyrics": lyrics}
        item = to_item(row, task)
        short = cut_middle(row, item, task, 100, lambda item: item_prompt(tokenizer, item))
        assert short is not None and len(short.prompt) <= 100 and short.item.id == item.id
        text = short.item.messages[-1].content.removeprefix("Rain: ")
        start, end = text.split(MARK)
        left_out = lyrics.removeprefix(start).removesuffix(end)
        assert lyrics == start + left_out + end and len(left_out.strip()) <= short.cut["removed_characters"]
        assert len(left_out) >= short.cut["removed_characters"]
        return start, end

    words = " ".join(f"word{number}" for number in range(500))
    start, end = kept(words)
    assert set(start.split()) | set(end.split()) <= set(words.split()) and start and end
    start, end = kept("e\u0301" * 900)
    assert not end.startswith("\u0301") and start.endswith("\u0301")
    chat = {"messages": [{"role": "user", "content": "ha " * 900}]}
    item = to_item(chat, task)
    short = cut_middle(chat, item, task, 100, lambda item: item_prompt(tokenizer, item))
    assert (
        short is not None and short.cut["field"] == "messages[0]" and MARK in short.item.messages[0].content
    )
    long_title = {"title": "Rain " * 400, "lyrics": "la " * 900}
    item = to_item(long_title, task)
    assert cut_middle(long_title, item, task, 100, lambda item: item_prompt(tokenizer, item)) is None


@pytest.mark.slow
@pytest.mark.parametrize("labels_only", [False, True])
def test_an_interrupted_analysis_is_continued(tmp_path: Path, model: Path, labels_only: bool) -> None:
    rows, out = write_rows(tmp_path / "rows.jsonl", 40), tmp_path / "out.jsonl"
    task = str(tmp_path / "task.yaml")
    (tmp_path / "task.yaml").write_text(json.dumps(TASK if labels_only else PLAIN), encoding="utf-8")
    written: list[str] = []
    ask(model, rows, task, write=written.append, labels_only=labels_only)

    class Stops(RecordedProgress):
        def task(self, name: str, total: float | None = None, unit: str = "", start: float = 0) -> Any:
            def update(done: float, **info: Any) -> None:
                if name == "analyze" and done >= 20:
                    raise KeyboardInterrupt

            return nullcontext(SimpleNamespace(update=update))

    settings: dict[str, Any] = {"batch_size": 2, "max_tokens": 2, "constrain": False}
    settings["labels_only"] = labels_only
    with pytest.raises(Interrupted, match="16 answers") as caught:
        analyze_file(model, rows, task=task, out=out, progress=Stops(), **settings)
    assert caught.value.fix == "the same command continues" and not out.exists()
    summary, _ = ask(model, rows, task, out=out, labels_only=labels_only)
    assert summary.before == 16 and "40 answers, 16 of them from before" in summary.line()
    assert out.read_text(encoding="utf-8").splitlines() == written
    again, _ = ask(model, rows, task, out=out, labels_only=labels_only)
    assert again.was_finished and f"{out} is finished: 40 answers" in again.line()
    assert again.kinds == summary.kinds
    forced, _ = ask(model, rows, task, out=out, force=True, labels_only=labels_only)
    assert not forced.was_finished and forced.before == 0
    with pytest.raises(Interrupted) as caught:
        analyze_file(model, rows, task=task, write=written.append, progress=Stops(), **settings)
    assert "--out FILE" in str(caught.value.fix)


@pytest.mark.slow
def test_answers_of_other_inputs_are_never_continued(tmp_path: Path, model: Path, task: str) -> None:
    rows, out = write_rows(tmp_path / "rows.jsonl", 20), tmp_path / "out.jsonl"
    partial = tmp_path / ".out.jsonl.partial"
    key = tmp_path / ".out.jsonl.partial.json"
    ask(model, rows, task, out=out)
    finished, stored = out.read_bytes(), json.loads((tmp_path / ".out.jsonl.json").read_text())["key"]

    def reason(**changes: Any) -> str:
        partial.write_bytes(b"".join(finished.splitlines(keepends=True)[:16]))
        key.write_text(json.dumps({"key": stored}), encoding="utf-8")
        arguments = {"model": model, "rows": rows, "task": task, "max_tokens": 2, **changes}
        summary, notes = ask(**arguments, out=out)
        assert summary.before == 0
        return next(note for note in notes if "all rows are answered anew" in note)

    assert "with other settings" in reason(max_tokens=3)
    other = tmp_path / "other"
    write_small_model(other, num_hidden_layers=1, intermediate_size=16)
    assert "of another model" in reason(model=other)
    (tmp_path / "second.yaml").write_text(json.dumps({**PLAIN, "system": "Say."}), encoding="utf-8")
    assert "of another task" in reason(task=str(tmp_path / "second.yaml"))
    write_rows(rows, 21)
    assert "of another input" in reason()
    assert len(read(out)) == 21


def test_a_change_of_the_rows_meanwhile_is_an_error(tmp_path: Path, model: Path, task: str) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 3)

    class Changes(RecordedProgress):
        def task(self, *arguments: Any, **more: Any) -> Any:
            write_rows(rows, 4)
            return super().task(*arguments, **more)

    with pytest.raises(FileError, match=r"rows\.jsonl has changed meanwhile"):
        analyze_file(
            model,
            rows,
            task=task,
            out=tmp_path / "out.jsonl",
            progress=Changes(),
            max_tokens=1,
            constrain=False,
        )
    assert not (tmp_path / "out.jsonl").exists()


def test_a_large_file_of_weights_counts_with_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_small_model(tmp_path / "a")
    first = model_digest(tmp_path / "a")
    assert model_digest(tmp_path / "a") == first
    with open(tmp_path / "a" / "model.safetensors", "r+b") as file:
        file.truncate(65 << 20)
    second = model_digest(tmp_path / "a")
    with open(tmp_path / "a" / "model.safetensors", "r+b") as file:
        file.seek(64 << 20)
        file.write(b"x")
    assert len({first, second, model_digest(tmp_path / "a")}) == 3


def test_a_line_holds_what_json_can_hold() -> None:
    values = {"a": float("nan"), "b": "\ud800", "c": "é"}
    line = answer_line(Prediction("1", "", None, None, None, label_probs={"x": float("inf")}, fields=values))
    line.encode()
    row = json.loads(line)
    assert row["fields"] == {"a": None, "b": "\ufffd", "c": "é"} and row["label_probs"] == {"x": None}


def test_exit_codes(runner: Any, tmp_path: Path, model: Path, task: str) -> None:
    """The model answers nothing valid: exit code 1, but with a row that has a valid answer 0."""
    rows = write_rows(tmp_path / "rows.jsonl", 2)
    arguments = ["analyze", str(model), str(rows), "--task", task, "--max-tokens", "1", "--no-constrain"]
    result = runner.invoke(cli, arguments)
    assert result.exit_code == 1 and len(result.stdout.splitlines()) == 2, result.output
    last = result.stderr.splitlines()[-1]
    assert "2 of them without a valid answer (cut 2), the first 0: cut after 1 tokens" in last
    piped = runner.invoke(cli, ["analyze", str(model), "-", *arguments[3:]], input=rows.read_bytes())
    assert piped.stdout == result.stdout


@pytest.mark.slow
def test_labels_are_scored_as_the_flags_say(runner: Any, tmp_path: Path, model: Path) -> None:
    rows, out = write_rows(tmp_path / "rows.jsonl", 3), tmp_path / "out.jsonl"
    listed = {**TASK, "system": "Which of {colour:options}?"}
    (tmp_path / "task.yaml").write_text(json.dumps(listed), encoding="utf-8")
    arguments = ["analyze", str(model), str(rows), "--task", str(tmp_path / "task.yaml")]
    found = []
    for flags, options in (
        ([], {}),
        (["--normalize", "bytes", "--shuffle-options", "3"], {"normalize": "bytes", "shuffle_options": 3}),
        (["--normalize", "string"], {"normalize": "string"}),
    ):
        result = runner.invoke(cli, [*arguments, "--labels-only", "--out", str(out), *flags])
        assert result.exit_code == 0 and "is finished" not in result.stderr, result.output
        wanted = md.classify(model, parse_task(listed, "task.yaml"), read(rows), **options)
        got = [row["probabilities"] for row in read(out)]
        assert got == [pytest.approx(one.probabilities, abs=1e-6) for one in wanted]
        found.append(got)
    assert found[0] != found[1] != found[2] != found[0]
    again = ["--labels-only", "--out", str(out), "--normalize", "string", "--shuffle-options", "1"]
    assert "is finished" in runner.invoke(cli, [*arguments, *again]).stderr
    wrong = runner.invoke(cli, [*arguments, "--normalize", "none", "--shuffle-options", "2"])
    assert wrong.exit_code == 2
    assert "--normalize and --shuffle-options: only with --labels-only" in wrong.stderr
    cut = runner.invoke(cli, [*arguments, "--labels-only", "--max-tokens", "4"])
    assert cut.exit_code == 2 and "--max-tokens: not with --labels-only" in cut.stderr
