"""Tokenizers of every kind, and tokens of odd texts."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.model.hub import llama_tokenizer, smol_tokenizer
from worker.engine.stop_strings import Decode
from worker.models import DEMO

#: Words, blanks, marks, bytes of characters that no tokenizer here has as one token, and what clean-up touches.
PIECES = [
    "the", " cat", " sat", " on", "\n", "\n\n", " ", "  ", ".", " .", ",", " ,", " ' ", " n't", " 's", " 're", "User:",
    "Assistant", "é", "ß", "你好", "世界", "🙂", "👩‍👩‍👧", "a", "b", "1", "42", "\t", "”", "…", "\u0301",
]  # fmt: skip


class Words:
    """A model of words, whose texts transformers cleans up: it removes blanks before marks."""

    def __init__(self) -> None:
        pieces = [*PIECES, *(f"##{piece.strip()}" for piece in PIECES if piece.strip())]
        vocabulary = {piece: id for id, piece in enumerate(dict.fromkeys(pieces))}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="the"))
        self._tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=True)
        self.decode = self._tokenizer.decode
        self.ids = list(vocabulary.values())


def decoder_of(tokenizer: PreTrainedTokenizerFast) -> Decode:
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))


def counted(decode: Decode) -> tuple[Decode, list[int]]:
    """The same function, and a list to which it appends the number of tokens of each call."""
    asked: list[int] = []

    def decode_counted(ids: Sequence[int]) -> str:
        asked.append(len(ids))
        return decode(ids)

    return decode_counted, asked


def fast(made: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=made)


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "bundled": lambda: AutoTokenizer.from_pretrained(DEMO),
    "llama": lambda: fast(llama_tokenizer({})),
    "byte level": lambda: fast(smol_tokenizer({})),
}


def of_texts(rng: random.Random, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The tokens of a random text."""
    text = "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 60)))
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def of_bytes(rng: random.Random, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Tokens in an order that no text has: half characters, special tokens, other texts between them."""
    known = of_texts(rng, tokenizer)
    parts = [known[start : start + rng.randint(1, 3)] for start in range(0, len(known), 3)]
    rng.shuffle(parts)
    return [id for part in parts for id in (*part, *([rng.randrange(300)] if rng.random() < 0.2 else []))]


def stops_of(rng: random.Random, text: str) -> tuple[str, ...]:
    """Some that the text holds, and some that it may not hold."""
    found = [text[start : start + rng.randint(1, 12)] for start in (rng.randrange(len(text) or 1) for _ in range(2))]
    chosen = [word for word in found if word and rng.random() < 0.5]
    return (*chosen, "".join(rng.choices(PIECES, k=rng.randint(1, 3))))
