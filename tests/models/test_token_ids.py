"""Token ids beyond a model's tables, and columns of a head that have no token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.labels import one_node

from mlx_distill.config import resolve_asset
from mlx_distill.data.chat import pad_id
from mlx_distill.distill.teacher import TokenizedAnswer, score
from mlx_distill.errors import ModelError
from mlx_distill.infer.analyze import analyze
from mlx_distill.infer.engine import generate
from mlx_distill.infer.label_scoring import label_probabilities
from mlx_distill.models.forward import embedding_rows, head_columns
from mlx_distill.models.load import load, load_tokenizer
from mlx_distill.models.token_ids import check_token_ids, used_ids
from mlx_distill.storage import write_json

TINY = Path(resolve_asset("asset:models/tiny-qwen3"))
TABLE = "model.embed_tokens.weight"
LABELS = one_node(("yes", "no"), ((1, 4), (2,)))


def resized(folder: Path, rows: int, padding: Any = None) -> Path:
    """The packaged Qwen3 (1,024 tokens, 1,088 rows) with another number of rows in its tied table; rows of
    padding are copies of the given ones, so that they are likely.
    """
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    weights = {k: v for file in sorted(TINY.glob("*.safetensors")) for k, v in mx.load(str(file)).items()}
    table = weights[TABLE][:1024]
    more = table[mx.array(np.resize(padding or [0], max(rows - 1024, 0)))] * 1.5
    weights[TABLE] = mx.concatenate([table, more])[:rows]
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "vocab_size": rows})
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model whose embedding ends before the tokens of the thinking block: 1022 and 1023."""
    return load(resized(tmp_path_factory.mktemp("small") / "model", 1022), dtype="float32")


# --- ids beyond a table -------------------------------------------------------------------------------------


def test_a_prompt_with_a_token_beyond_the_embedding_is_refused_with_folder_and_fix(small: Any) -> None:
    text = r"model: the tokenizer has number 1023 \('</think>'\), the embedding 1022 rows"
    with pytest.raises(ModelError, match=text) as error:
        analyze(small, "moderation", ["a lovely day"])
    assert "resize it to 1024 rows" in str(error.value.fix)


def test_every_engine_refuses_them(small: Any) -> None:
    model, tokenizer = small
    with pytest.raises(ModelError, match="number 1023"):
        generate(model, tokenizer, [[5], [5, 1023, 6]], max_tokens=1, stop=set())
    with pytest.raises(ModelError, match="number 1022"):
        list(score(model, [TokenizedAnswer([5, 6], 1), TokenizedAnswer([5, 1022], 1)], top_k=2))
    with pytest.raises(ModelError, match="number 1022"):
        label_probabilities(model, [[5], [1022]], LABELS)
    assert generate(model, tokenizer, [[5, 1021]], max_tokens=1, stop={1021, 1023})[0].prompt_tokens == 2


def test_an_answer_that_cannot_be_ended_is_refused(small: Any) -> None:
    with pytest.raises(ModelError, match="number 1022"):
        generate(*small, [[5]], max_tokens=1, stop={1022, 1023})


def test_a_padding_token_without_a_row_is_not_used() -> None:
    class Toy:
        pad_token_id, eos_token_id = 1023, 7

    assert (pad_id(Toy()), pad_id(Toy(), 1024), pad_id(Toy(), 1023), pad_id(Toy(), 7)) == (1023, 1023, 7, 0)


def test_ids_within_the_table_pass(small: Any) -> None:
    check_token_ids(np.array([[0, 1021]]), 1022)
    check_token_ids([], 1022)
    check_token_ids([10**6], 0)  # a model of unknown structure
    assert embedding_rows(small[0]) == head_columns(small[0]) == 1022
    assert embedding_rows(object()) == 0


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (1090, r"model: the tokenizer has number 1090 \('<new>'\), the embedding 1088 rows"),
        (1030, r"tokenizer.json: the added token '<new>' has number 1030 and is read as 1024"),
        (1024, ""),
    ],
)
def test_an_added_token_behind_a_gap_is_refused(tmp_path: Path, number: int, error: str) -> None:
    """``tokenizers`` reads it under another number than the file says."""
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    raw["added_tokens"].append({**raw["added_tokens"][0], "id": number, "content": "<new>"})
    write_json(folder / "tokenizer.json", raw)
    if error:
        with pytest.raises(ModelError, match=error):
            load_tokenizer(folder)
    else:
        assert load_tokenizer(folder).convert_tokens_to_ids("<new>") == number


# --- columns without a token --------------------------------------------------------------------------------


def test_padded_columns_take_no_part_in_the_teachers_targets(tmp_path: Path) -> None:
    answers = [TokenizedAnswer([(7 * i + j) % 300 for j in range(4 + 9 * i)], 2, 3) for i in range(4)]
    models = [load(TINY, dtype="float32")] + [
        load(resized(tmp_path / str(rows), rows, [24, 387]), dtype="float32") for rows in (1024, 1152)
    ]
    plain, *others = (
        list(score(model, answers, top_k=2000, labels=LABELS, tokenizer=tokenizer))
        for model, tokenizer in models
    )
    for targets in others:
        for row, wanted in zip(targets, plain, strict=True):
            assert row.topk_ids.shape[1] == 1024 and sorted(row.topk_ids[0].tolist()) == list(range(1024))
            np.testing.assert_allclose(row.logprobs, wanted.logprobs, atol=1e-4)
            np.testing.assert_allclose(row.topk_logprobs, wanted.topk_logprobs, atol=1e-4)
            np.testing.assert_allclose(row.label_logprobs, wanted.label_logprobs, atol=1e-4)
    # The padding is likely: without the tokenizer it is a part of the distribution.
    padded = next(iter(score(models[2][0], answers, top_k=8)))
    assert (padded.topk_ids >= 1024).any() and (padded.logprobs < plain[0].logprobs - 0.01).any()


def test_gaps_between_token_ids_are_no_tokens() -> None:
    class Toy:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "b": 3}

    assert np.flatnonzero(used_ids(Toy())).tolist() == [0, 3]
    assert used_ids(Toy(), 2).tolist() == [True, False]  # type: ignore[union-attr]
    assert used_ids(object()) is None


def test_ids_are_listed_again_where_a_token_was_added() -> None:
    tokenizer = load_tokenizer(resolve_asset("asset:models/tiny-qwen3"))
    before = used_ids(tokenizer)
    assert before is not None and (used_ids(tokenizer) == before).all()
    tokenizer.add_tokens(["<another token>"])
    after = used_ids(tokenizer)
    assert after is not None and len(after) == len(before) + 1
