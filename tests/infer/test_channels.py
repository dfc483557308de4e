"""Where the answer begins, for blocks of thinking and for harmony's channels."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_distill.data.chat import prompt_ids, stop_ids
from mlx_distill.infer.channels import AnswerStart, Channels, channels_of, split_thinking
from mlx_distill.records import Message

CHAT = [Message("user", "the weather is lovely.")]
THINKING = {
    "chatml": "<think>\nlovely\n</think>\n\n",
    "harmony": "<|channel|>analysis<|message|>lovely<|end|>",
}
HEADER = {"chatml": "", "harmony": "<|start|>assistant<|channel|>final<|message|>"}


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def open_prompt(tokenizer: Any) -> list[int]:
    """A prompt that leaves thinking to the model."""
    return list(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "hm"}], add_generation_prompt=True, return_dict=False
        )
    )


def test_the_answer_begins_at_once_behind_our_prompts(tokenizer: Any) -> None:
    channels = channels_of(tokenizer)
    answer = encode(tokenizer, '{"label": "fine"}')
    for prompt in (prompt_ids(tokenizer, CHAT), []):
        assert split_thinking(answer, channels, prompt) == ([], answer)
        assert AnswerStart(channels, prompt).start == 0


def test_thinking_ends_where_the_template_has_the_answer(tokenizer: Any, kind: str) -> None:
    channels = channels_of(tokenizer)
    answer = encode(tokenizer, '{"label": "fine"}')
    thinking = encode(tokenizer, THINKING[kind] + HEADER[kind])
    for prompt in (open_prompt(tokenizer), []):
        assert split_thinking([*thinking, *answer], channels, prompt) == (thinking, answer)
        assert split_thinking(thinking[:-1], channels, prompt)[0] == thinking[:-1]
    opened = thinking[0] if kind == "chatml" else None
    if opened is not None:  # some templates begin the block themselves
        assert split_thinking([*thinking[1:], *answer], channels, [*open_prompt(tokenizer), opened]) == (
            thinking[1:],
            answer,
        )


def test_what_the_template_has_behind_thinking_is_forced(tokenizer: Any, kind: str) -> None:
    channels = channels_of(tokenizer)
    assert channels is not None
    place = AnswerStart(channels, open_prompt(tokenizer))
    for token in encode(tokenizer, THINKING[kind].rstrip("\n")):
        assert not place.forced
        place.accept(token)
    written = []
    while place.forced:
        written.append(place.forced[0])
        place.accept(place.forced[0])
    assert tokenizer.decode(written) == ("\n\n" if kind == "chatml" else HEADER["harmony"])
    assert place.start == len(encode(tokenizer, THINKING[kind] + HEADER[kind]))


def test_an_answer_that_begins_otherwise_is_followed(tokenizer: Any, kind: str) -> None:
    channels = channels_of(tokenizer)
    if kind == "chatml":  # no empty line behind the block
        thinking = encode(tokenizer, "<think>a</think>")
        assert split_thinking([*thinking, 65], channels) == (thinking, [65])
        return
    more = "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary<|message|>b<|end|>"
    thinking = encode(tokenizer, more + HEADER[kind])
    assert split_thinking([*thinking, 65], channels, open_prompt(tokenizer)) == (thinking, [65])
    at_once = encode(tokenizer, "<|channel|>final<|message|>")
    assert split_thinking([*at_once, 65], channels, open_prompt(tokenizer)) == (at_once, [65])
    formatted = encode(tokenizer, "<|channel|>final json<|message|>")  # the format of the content behind it
    assert split_thinking([*formatted, 65], channels, open_prompt(tokenizer)) == (formatted, [65])
    assert AnswerStart(channels, [*open_prompt(tokenizer), *formatted]).start == 0
    within = AnswerStart(channels, [*open_prompt(tokenizer), *formatted, 65])
    within.accept(66)
    assert within.start == 0


def test_the_end_of_a_message_of_thinking_does_not_end_the_generation(tokenizer: Any, kind: str) -> None:
    channels, stops = channels_of(tokenizer), stop_ids(tokenizer)
    assert channels is not None
    place = AnswerStart(channels, open_prompt(tokenizer))
    for token in encode(tokenizer, THINKING[kind].split("lovely")[0]):
        place.accept(token)
    assert [token for token in stops if not place.ends(token)] == [channels.closes] * (kind == "harmony")
    assert all(map(AnswerStart(channels, prompt_ids(tokenizer, CHAT)).ends, stops))


def test_no_channels_without_their_tokens() -> None:
    class Plain:
        def get_vocab(self) -> dict[str, int]:
            return {"<think>": 1, "a": 2}

    assert channels_of(Plain()) is None and channels_of(object()) is None
    assert split_thinking([1, 2], None) == ([], [1, 2])


@pytest.mark.parametrize("token", [3, 7])
def test_a_block_within_an_answer_is_part_of_it(token: int) -> None:
    channels = Channels(frozenset([7]), 8)
    assert split_thinking([5, token, 8], channels) == ([], [5, token, 8])
