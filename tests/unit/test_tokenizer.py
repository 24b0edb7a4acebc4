"""A tokenizer is asked once for what many jobs say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from worker.models import tokenizer
from worker.models.tokenizer import BaseCodec, CodecConfig


class Letters:
    """A tokenizer whose tokens are letters."""

    all_special_tokens = ("<image>",)
    bos_token = bos_token_id = eos_token_id = pad_token_id = unk_token_id = None

    def __init__(self) -> None:
        self.asked = 0
        self.added_tokens_decoder: dict[int, Any] = {}

    def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | list[int]:
        return -1 if isinstance(tokens, str) else [-1 for _ in tokens]

    def get_added_vocab(self) -> dict[str, int]:
        return {}

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0}

    def __call__(self, texts: list[str], **_: Any) -> SimpleNamespace:
        self.asked += 1
        return SimpleNamespace(input_ids=[list(map(ord, text)) for text in texts])


class Plain(BaseCodec):
    def lead_text(self, lead: Any) -> str:
        return "".join(lead)


@pytest.fixture
def letters() -> Letters:
    return Letters()


@pytest.fixture
def codec(letters: Letters) -> Plain:
    made = Plain(letters, CodecConfig((0,), 1_000_000, 100))  # type: ignore[arg-type]
    letters.asked = 0
    return made


def test_a_text_that_comes_again_is_not_split_again(codec: Plain, letters: Letters) -> None:
    for _ in range(3):
        assert codec.tokens_of("ab", "c") == ((97, 98), (99,))
    assert letters.asked == 1


def test_long_texts_are_not_remembered(codec: Plain, letters: Letters) -> None:
    long = "a" * (tokenizer.CACHED_CHARS + 1)
    for _ in range(2):
        assert codec.tokens_of(long) == ((97,) * len(long),)
    assert letters.asked == 2


def test_labels_that_come_again_are_not_split_again(codec: Plain, letters: Letters) -> None:
    for _ in range(3):
        assert codec.encode_labels(["It is"], ["a", "b"]) == [tuple(map(ord, f" {label}\n")) for label in "ab"]
    assert letters.asked == 1
    assert codec.encode_labels(["It was"], ["a"]) == [tuple(map(ord, " a\n"))]
    assert letters.asked == 2
