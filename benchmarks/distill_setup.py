"""The tasks, models and trainings of ``distill_bench.py``: everything is made once and kept in a folder.

A *form* is one of the two tasks with drawn answers: ``label`` (the verdict is drawn; task ``music_drawn``)
and ``fields`` (verdict, both digits of the score and both themes are; ``music_drawn_fields``). The teacher is
tiny-qwen3, fine-tuned on rows of seed 11; a student is tiny-gpt-oss (another tokenizer) or tiny-qwen3 (the
same).
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from mlx_distill.assets.music import drawn_fields
from mlx_distill.recipe import ATTENTION, MLP, DistillConfig, SourceConfig, TargetsConfig, TeachConfig
from mlx_distill.storage import digest

FORMS = {"label": ("music_drawn", "drawn", 4000), "fields": ("music_drawn_fields", "drawn_fields", 8000)}
BASES = {"qwen": "tiny-qwen3", "gpt-oss": "tiny-gpt-oss"}
HEADS = {"qwen": ["embed_tokens", "norm"], "gpt-oss": ["lm_head", "norm"]}
TEACHER_SEED, HELD_OUT_SEED, TUNING_SEED = 11, 31, 30
HELD_OUT_ROWS = {"label": 1000, "fields": 600}
VALID_ROWS = 100  # whose written answers are checked, of the second form
_TRAINING: dict[str, Any] = {
    "method": "lora",
    "lora_rank": 16,
    "lora_alpha": 32.0,
    "lora_dropout": 0.0,
    "accumulate": 1,
    "warmup": 0.05,
    "evaluate_every": 0,
    "checkpoint_every": 20,
}


@dataclass(frozen=True)
class Method:
    """One way of training a student.

    Attributes:
        text: Of ``targets.text``: greedy, sampled or data.
        settings: What differs in ``distill``.
        samples: Sampled answers a row.
        target: ``soft``; ``hard``: the label of the text one-hot; ``none``: cross-entropy on the text alone.
        note: What it is, and what a comparison with it tells.
    """

    text: str
    settings: dict[str, Any] = field(default_factory=dict)
    samples: int = 1
    target: str = "soft"
    note: str = ""


def terms(label: float = 1.0, text: float = 0.3, token: float = 0.0, **others: Any) -> dict[str, Any]:
    """The weights of the terms, at temperature 1."""
    weights = {"label_weight": label, "text_weight": text, "token_weight": token}
    return {**weights, "label_temperature": 1.0, **others}


METHODS = {
    "labels": Method("data", target="none", note="cross-entropy on the rows' own answers: control `labels`"),
    "text": Method(
        "greedy", target="none", note="cross-entropy on the teacher's greedy text: control `text`"
    ),
    "label": Method("greedy", terms(), note="the teacher's label distribution, text 0.3"),
    "labels_hard": Method(
        "data", terms(), target="hard", note="the same terms, the row's own label: fair control `labels_hard`"
    ),
    "teacher_hard": Method(
        "greedy",
        terms(),
        target="hard",
        note="the same terms, the teacher's label: fair control `teacher_hard`",
    ),
    "groups1": Method("greedy", terms(token=1.0), note="label distribution and token groups, weight 1"),
    "groups10": Method("greedy", terms(token=10.0), note="the same, weight 10"),
    "alm1": Method("greedy", terms(token=1.0, token_loss="alm"), note="label distribution and ALM, weight 1"),
    "label_sampled": Method("sampled", terms(), samples=4, note="the label's distribution, sampled text 0.3"),
    "label_sampled1": Method("sampled", terms(), note="the same, one sampled text a row"),
    "text10_sampled1": Method(
        "sampled", terms(text=10.3), note="hard tokens on one sampled text a row, weight 10.3"
    ),
    "default_greedy": Method(
        "greedy", {"token_weight": 0.3}, note="what was the default: 0.7 at T = 4, text and token groups 0.3"
    ),
    "default_groups10_sampled1": Method(
        "sampled", {"token_weight": 10.0}, note="0.7 at T = 4, text 0.3, token groups or KL 10, sampled text"
    ),
    "default_text003_sampled1": Method(
        "sampled", {"token_weight": 1.0, "text_weight": 0.03}, note="0.7 at T = 4, text 0.03, tokens 1"
    ),
    "label7_groups10_sampled1": Method(
        "sampled", {"label_weight": 7.0, "token_weight": 10.0}, note="the same times ten"
    ),
    "default_groups1_sampled1": Method(
        "sampled", {"token_weight": 1.0}, note="0.7 at T = 4, text 0.3, token groups or KL 1, sampled text"
    ),
    "default_groups3_sampled1": Method(
        "sampled", {"token_weight": 3.0}, note="0.7 at T = 4, text 0.3, token groups or KL 3, sampled text"
    ),
    "groups3_sampled1": Method("sampled", terms(token=3.0), note="one sampled text a row, weight 3"),
    "groups10_sampled1": Method("sampled", terms(token=10.0), note="one sampled text a row, weight 10"),
    "groups10_sampled2": Method("sampled", terms(token=10.0), samples=2, note="two sampled texts a row"),
    "groups_mid10_sampled1": Method(
        "sampled",
        terms(token=10.0, mid_token_rows=True),
        note="the same, and targets in the middle of tokens",
    ),
    "groups30_sampled1": Method("sampled", terms(token=30.0), note="one sampled text a row, weight 30"),
    "kl10_sampled1": Method(
        "sampled", terms(token=10.0, token_loss="kl"), note="KL on one sampled text a row, weight 10"
    ),
    "kl30_sampled1": Method(
        "sampled", terms(token=30.0, token_loss="kl"), note="KL on one sampled text a row, weight 30"
    ),
}
TABLE_WEIGHTS = (1, 3, 10, 30)
# Name in the tables: what differs in `distill`. All on four sampled answers a row, beside the label's
# distribution and text 0.3; `text` has the same weight on hard tokens: the fair control of each.
OTHER_TOKENIZER: dict[str, dict[str, Any]] = {
    "groups": {"token_loss": "token_groups"},
    "alm": {"token_loss": "alm"},
    "uld": {"token_loss": "uld"},
    "gold": {"token_loss": "gold"},
    "groups_mid": {"token_loss": "token_groups", "mid_token_rows": True},
    "x_token": {"token_loss": "x_token"},
    "groups_spans": {"token_loss": "token_groups"},  # and spans at the same weight: gmlx's recipe
}
SAME_TOKENIZER: dict[str, dict[str, Any]] = {
    name.split("_divergence")[0]: {"token_loss": name}
    for name in ("kl", "reverse_kl", "js_divergence", "skew_kl", "total_variation", "uld", "gold")
}


def table_methods(losses: Mapping[str, dict[str, Any]]) -> dict[str, Method]:
    """Every token-level loss at every weight, and its control: hard tokens at the same weight."""
    out = {}
    for weight in TABLE_WEIGHTS:
        out[f"text{weight}_sampled"] = Method(
            "sampled", terms(text=weight + 0.3), samples=4, note=f"hard tokens, weight {weight}.3"
        )
        for name, settings in losses.items():
            spans = {"span_weight": float(weight)} if name == "groups_spans" else {}
            out[f"{name}{weight}_sampled"] = Method(
                "sampled",
                terms(token=float(weight), **settings, **spans),
                samples=4,
                note=f"{name}, weight {weight}",
            )
    return out


OTHER_TABLE, SAME_TABLE = table_methods(OTHER_TOKENIZER), table_methods(SAME_TOKENIZER)
METHODS |= OTHER_TABLE | SAME_TABLE


class Lab:
    """The teacher of one form, its held-out rows, and students.

    Args:
        form: A key of :data:`FORMS`.
        folder: Where everything is kept.
        held_out: Seed and number of the held-out songs.
        teacher_rows: Rows that the teacher learns from; None for those of the form.
    """

    def __init__(
        self, form: str, folder: Path, held_out: tuple[int, int], teacher_rows: int | None = None
    ) -> None:
        from mlx_distill.tasks.task import load_task

        task, self.policy, rows = FORMS[form]
        self.form, self.task, self.folder = form, load_task(task), folder
        self.held_out_seed, self.held_out_rows = held_out
        self.teacher_rows = teacher_rows or rows
        self.name = f"{form}-{self.teacher_rows}"

    def rows(self, count: int, seed: int, part: str = "train") -> list[dict[str, Any]]:
        """Prepared rows of the form."""
        from mlx_distill.data.rows import to_example, to_row
        from mlx_distill.data.sources import read_source

        source = SourceConfig(generator="music", policy=self.policy, part=part, count=count, seed=seed)
        read = read_source(source, self.task)
        return [to_row(to_example(row, self.task, where), part) for where, row in read]

    def fresh(self, base: str) -> tuple[Any, Any]:
        """An untrained base model in float32 and its tokenizer."""
        from mlx_distill.config import resolve_asset
        from mlx_distill.models.convert import convert
        from mlx_distill.models.load import load
        from mlx_distill.models.modules import dequantize_model

        path = self.folder / BASES[base]
        if not (path / "manifest.json").is_file():
            convert(resolve_asset(f"asset:models/{BASES[base]}"), path)
        model, tokenizer = load(path, dtype="float32")
        dequantize_model(model, "float32")
        return model, tokenizer

    @cached_property
    def teacher(self) -> tuple[Any, Any]:
        """The fine-tuned teacher and its tokenizer; a killed training goes on."""
        from mlx_distill.models.adapters import save_adapter
        from mlx_distill.models.load import load
        from mlx_distill.models.modules import dequantize_model
        from mlx_distill.train.trainable import adapter_settings

        path = self.folder / f"teacher-{self.name}"
        if not path.is_dir():
            model, tokenizer = self.fresh("qwen")
            settings = TeachConfig(
                **_TRAINING,
                learning_rate=3e-3,
                batch_size=16,
                target_modules=ATTENTION + MLP,
                modules_to_save=HEADS["qwen"],
                steps=self.teacher_rows // 16,
            )
            cpu = time.process_time()
            rows = self.rows(self.teacher_rows, TEACHER_SEED)
            train_on_text(model, tokenizer, rows, settings, self.folder / f"training-{self.name}")
            print(
                f"teacher {self.name}: {time.process_time() - cpu:.0f} s of CPU in this process", flush=True
            )
            adapter, partial_folder = adapter_settings(settings), path.with_suffix(".partial")
            assert adapter is not None
            shutil.rmtree(partial_folder, ignore_errors=True)
            partial_folder.mkdir()
            save_adapter(model, partial_folder, adapter, self.folder / BASES["qwen"])
            partial_folder.rename(path)
        model, tokenizer = load(path, dtype="float32")
        dequantize_model(model, "float32")
        return model, tokenizer

    def targets(self, rows: Sequence[dict[str, Any]], method: Method, seed: int) -> list[tuple[Any, Any]]:
        """Rows with the teacher's targets, ``method.samples`` of each row."""
        from mlx_distill.distill.teacher import score_answers
        from mlx_distill.infer.label_scoring import task_label_trie

        model, tokenizer = self.teacher
        settings = TargetsConfig(text=method.text, top_k=16, batch_size=64, seed=seed)
        trie = task_label_trie(tokenizer, self.task)
        out: list[tuple[Any, Any]] = []
        for sample in range(method.samples):
            scored, _ = score_answers(model, tokenizer, rows, self.task, settings, trie, [sample] * len(rows))
            out += zip(rows, scored, strict=True)
        return out

    @cached_property
    def held_out(self) -> HeldOut:
        """The held-out rows and what the teacher says of them."""
        return HeldOut(self)

    def student(
        self, method: Method, seed: int, *, rows: int, steps: int, base: str, rate: float
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Train a student and read it on the held-out rows: facts, and its distributions."""
        model, tokenizer = self.fresh(base)
        settings = DistillConfig(
            **{
                **_TRAINING,
                "learning_rate": rate,
                "batch_size": 8,
                "target_modules": ATTENTION,
                "modules_to_save": HEADS[base],
                "steps": steps,
                "seed": seed,
                **method.settings,
            }
        )
        own = self.rows(rows, seed)
        cpu = time.process_time()
        folder = self.folder / "training" / digest([self.name, asdict(method), asdict(settings), rows, base])
        if method.target == "none" and method.text == "data":
            train_on_text(model, tokenizer, own, settings, folder)
        else:
            pairs = self.targets(own, method, seed)
            cpu = time.process_time()
            train_on_targets(self, model, tokenizer, pairs, method, settings, folder)
        shutil.rmtree(folder)
        trained = time.process_time()
        arrays = self.held_out.read(model, tokenizer)
        facts = {"train_cpu": round(trained - cpu, 1), "read_cpu": round(time.process_time() - trained, 1)}
        if self.form == "fields":
            facts["valid"] = count_valid(model, tokenizer, self.held_out.rows[:VALID_ROWS], self.task)
        return facts, arrays


class HeldOut:
    """Held-out rows, their exact distributions, and the teacher's.

    Of the form ``fields`` everything is read along one sampled answer of the teacher a row, so the exact
    distribution of the tens is that given the verdict which stands there.
    """

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.rows = lab.rows(lab.held_out_rows, lab.held_out_seed, "test")
        self.values = {"verdict": drawn_fields.VERDICTS}
        if lab.form == "fields":
            self.values = dict(drawn_fields.VALUES)
            self.texts = _kept(self._file("texts.json"), self._sample)
        self.teacher = self._teacher()

    def _file(self, name: str) -> Path:
        return self.lab.folder / f"heldout-{self.lab.name}-{self.lab.held_out_seed}-{len(self.rows)}-{name}"

    def _sample(self) -> list[str]:
        from mlx_distill.distill.teacher import score_answers

        model, tokenizer = self.lab.teacher
        settings = TargetsConfig(text="sampled", top_k=1, batch_size=64, seed=7)
        scored, check = score_answers(model, tokenizer, self.rows, self.lab.task, settings)
        unfit = check.rows - check.valid
        print(
            f"held-out: {unfit} of {check.rows} sampled answers do not fit, {check.valid_again} drawn again",
            flush=True,
        )
        return [targets.text for targets in scored]

    def _teacher(self) -> dict[str, np.ndarray]:
        path = self._file("teacher.npz")
        if not path.is_file():
            save_arrays(path, self.read(*self.lab.teacher))
        return load_arrays(path)

    @cached_property
    def exact(self) -> dict[str, np.ndarray]:
        """The exact distributions of the drawn values."""
        if self.lab.form == "label":
            drawn = [row["fields"]["probabilities"] for row in self.rows]
        else:
            cues = [(row["fields"]["subject"], row["fields"]["stance"]) for row in self.rows]
            verdicts = [json.loads(text)["verdict"] for text in self.texts]
            drawn = [drawn_fields.probabilities(*c, v) for c, v in zip(cues, verdicts, strict=True)]
        return {name: np.array([[d[name][value] for value in values] for d in drawn])
                for name, values in self.values.items()}  # fmt: skip

    def read(self, model: Any, tokenizer: Any) -> dict[str, np.ndarray]:
        """A model's distributions by drawn value; of ``fields`` also the log-probability of the answer."""
        from mlx_distill.data.chat import prompt_ids
        from mlx_distill.infer.label_scoring import label_probabilities, scored_labels
        from mlx_distill.infer.value_scoring import read_values

        model.eval()
        if self.lab.form == "label":
            before, trie = scored_labels(tokenizer, self.lab.task)
            prompts = [prompt_ids(tokenizer, row["messages"][:-1]) + before for row in self.rows]
            return {"verdict": label_probabilities(model, prompts, trie, batch_size=64)}
        chats = [
            [*row["messages"][:-1], {"role": "assistant", "content": text}]
            for row, text in zip(self.rows, self.texts, strict=True)
        ]
        answers = [json.loads(text) for text in self.texts]
        found = read_values(model, tokenizer, chats, answers, self.lab.task.schema, self.values)
        return {**found.distributions, "logprobs": found.logprobs, "tokens": found.tokens}


def train_on_text(
    model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], settings: Any, folder: Path
) -> None:
    """Cross-entropy on the answers of the rows."""
    from mlx_distill.data.batching import collate
    from mlx_distill.data.chat import pad_id, render_many
    from mlx_distill.train.objective import sft

    rendered = render_many(tokenizer, [row["messages"] for row in rows])
    pad = pad_id(tokenizer)
    _train(model, settings, sft(), rendered, lambda chosen: collate(rendered, chosen, pad, 16), folder)


def train_on_targets(
    lab: Lab,
    model: Any,
    tokenizer: Any,
    pairs: Sequence[tuple[Any, Any]],
    method: Method,
    settings: DistillConfig,
    folder: Path,
) -> None:
    """Distillation of a method's terms, or cross-entropy on the teacher's text."""
    from mlx_distill.data.chat import answer_ids, pad_id, render_many
    from mlx_distill.distill.align import align_answer, collate_aligned_rows
    from mlx_distill.distill.hard_targets import hard_settings
    from mlx_distill.distill.objective import kd
    from mlx_distill.infer.label_scoring import task_label_trie
    from mlx_distill.losses.mid_token import MidTokens

    chats = [
        [*row["messages"][:-1], {"role": "assistant", "content": targets.text}] for row, targets in pairs
    ]
    if method.target == "none":
        train_on_text(model, tokenizer, [{"messages": chat} for chat in chats], settings, folder)
        return
    teacher_tokenizer = lab.teacher[1]
    same = tokenizer.vocab_size == teacher_tokenizer.vocab_size
    trie = task_label_trie(tokenizer, lab.task)
    by_groups = settings.token_weight > 0 and (not same or settings.token_loss == "gold")
    groups = token_groups(tokenizer, teacher_tokenizer) if by_groups else None
    middle = groups is not None and method.target == "soft" and settings.mid_token_rows
    align = partial(
        align_answer,
        task=lab.task,
        student_tokenizer=tokenizer,
        teacher_tokenizer=teacher_tokenizer,
        encode=partial(answer_ids, tokenizer),
        labels=trie,
        same_tokenizer=same,
        mid_tokens=MidTokens(tokenizer, teacher_tokenizer, groups) if middle else None,
    )
    if method.target == "hard":
        settings = hard_settings(settings)
        pairs = [(row, one_hot(targets, lab.task)) for row, targets in pairs]
    rendered = render_many(tokenizer, chats)
    rows = [align(chat, targets) for chat, (_, targets) in zip(rendered, pairs, strict=True)]
    objective = kd(settings, labels=trie, groups=groups, same_tokenizer=same)
    pad, classes = pad_id(tokenizer), len(lab.task.labels) + 1
    _train(
        model, settings, objective, rows, lambda c: collate_aligned_rows(rows, c, pad, classes, 16), folder
    )


def one_hot(targets: Any, task: Any) -> Any:
    """Targets with the label of their own text in place of the distribution."""
    from mlx_distill.losses.numerics import LOWEST

    label = np.full(len(task.labels) + 1, LOWEST, dtype=np.float32)
    label[task.labels.index(json.loads(targets.text)[task.label])] = 0.0
    return replace(targets, label_logprobs=label)


def token_groups(tokenizer: Any, teacher_tokenizer: Any) -> Any:
    """The token groups of two vocabularies."""
    from mlx_distill.data.chat import stop_ids
    from mlx_distill.losses.cross_tokenizer import build_token_groups

    stops = {"student_stop": stop_ids(tokenizer)[0], "teacher_stop": stop_ids(teacher_tokenizer)[0]}
    return build_token_groups(tokenizer, teacher_tokenizer, **stops)


def _train(
    model: Any, settings: Any, objective: Any, rows: Sequence[Any], collate: Callable[..., Any], folder: Path
) -> None:
    from mlx_distill.optim import make_optimizer
    from mlx_distill.train.batches import RowBatches
    from mlx_distill.train.loop import train
    from mlx_distill.train.trainable import make_trainable

    lengths = [len(row.tokens) for row in rows]
    trained = [
        int(row.trained.sum()) if hasattr(row, "trained") else len(row.tokens) - row.start for row in rows
    ]
    batches = RowBatches(lengths, collate, settings.batch_size, settings.seed, weights=trained)
    make_trainable(model, settings)
    train(model, batches, objective, make_optimizer(settings, settings.steps), settings, folder=folder)


def count_valid(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], task: Any) -> int:
    """How many greedy answers fit the task."""
    from mlx_distill.distill.teacher import generate_answers
    from mlx_distill.tasks.answer import parse_answer

    prompts = [row["messages"][:-1] for row in rows]
    answers = generate_answers(model, tokenizer, prompts, task.max_answer_tokens, 64)
    return sum(parse_answer(answer.text, task.schema)[0] is not None for answer in answers)


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write named arrays, atomically."""
    temporary = path.with_suffix(f".{os.getpid()}.npz")
    np.savez(temporary, **{name: array.astype(np.float32) for name, array in arrays.items()})
    temporary.rename(path)


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of :func:`save_arrays`, in float64."""
    with np.load(path) as arrays:
        return {name: arrays[name].astype(np.float64) for name in arrays.files}


def _kept(path: Path, make: Callable[[], Any]) -> Any:
    if not path.is_file():
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(make()))
        temporary.rename(path)
    return json.loads(path.read_text())
