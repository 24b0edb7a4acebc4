"""The base of the families' codecs: labels, padding, and which texts a checkpoint's tokenizer must not be given."""

from __future__ import annotations

import copy
import functools
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasks.errors import InvalidRequest
from tasks.protocol import END_OF_UTTERANCE
from worker.engine.grammar import GrammarTokens
from worker.engine.interfaces import PromptContent
from worker.engine.row import Picture, Tokens
from worker.models import SetupFailed

IMAGE = "<image>"
FAKE = "<fake_token_around_image>"
#: The form of special tokens. Some tokenizers do not mark as special the tokens that give a frame's row and column.
_MARKUP = re.compile(r"<\S+>")
#: Maximum prompts and label sets whose tokens are cached: most jobs differ from earlier ones in their picture only.
CACHED_TEXTS = 128
#: Maximum characters of a cached text: longer texts are rare and would take memory.
CACHED_CHARS = 8_000
#: Maximum tokens whose text is cached.
CACHED_TOKENS = 8_192
#: A text before a token, which keeps the token's blank.
LEAD = "a"


@dataclass(frozen=True, slots=True)
class CodecConfig:
    """What a codec needs to know about the model that takes its tokens."""

    #: The tokens that end a text, as the checkpoint says.
    eos_ids: tuple[int, ...]
    #: Number of tokens with an embedding. Another id would be an index error, which on a GPU ends the process.
    vocabulary: int
    #: Maximum tokens of a prompt and its answer.
    context: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> CodecConfig:
        """From a loaded checkpoint."""
        configured = model.generation_config.eos_token_id
        ids = configured if isinstance(configured, list) else [configured]
        text = model.config.get_text_config()
        vocabulary = text.vocab_size + getattr(text, "additional_vocab_size", 0)
        return cls(tuple(id for id in ids if id is not None), vocabulary, text.max_position_embeddings)


class BaseCodec:
    """The base of the families' codecs: labels, ends of answers, padding, and texts that are refused."""

    has_chat_template = False
    #: Ends each label, so that `car` is not scored as the beginning of `cart`.
    label_end = "\n"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: CodecConfig) -> None:
        """Raises SetupFailed if the model has no embedding of a token that prompts need."""
        self.tokenizer = tokenizer
        self.context_tokens = model.context
        self._model = model
        utterance_end = self._known(tokenizer.get_added_vocab().get(END_OF_UTTERANCE))
        self.has_end_of_utterance = utterance_end is not None
        ends = (utterance_end, *map(self._known, model.eos_ids))
        self.eos_ids = frozenset(id for id in ends if id is not None)
        self._pad = self._known(tokenizer.pad_token_id) or 0
        self._require_known([tokenizer.bos_token, IMAGE, FAKE])
        self._known_ids = functools.lru_cache(CACHED_TEXTS)(self._split)
        #: Characters of the longest token.
        self._longest = max(map(len, tokenizer.get_vocab()))
        self.bad_words_ids: list[list[int]] = tokenizer([IMAGE, FAKE], add_special_tokens=False).input_ids
        special = _special_tokens(tokenizer)
        self._reserved = sorted(special - {END_OF_UTTERANCE} | {IMAGE, FAKE})
        self._special_ids = frozenset(_ids_that_texts_never_have(tokenizer, special))
        self._marked_ids = frozenset(tokenizer.convert_tokens_to_ids(sorted(special)))
        self.reserved_ids = self._marked_ids - self.eos_ids
        self.vocabulary = model.vocabulary
        self.token_text = functools.lru_cache(CACHED_TOKENS)(self._token_text)
        self._markers = functools.lru_cache(CACHED_TEXTS)(self._markers_of)

    def picture(self, image: Image) -> Picture:
        """An RGB image as the vision encoder takes it."""
        raise NotImplementedError

    def min_token_count(self, parts: PromptContent) -> int:
        """A lower bound of the number of tokens: as if every token of its texts were the longest one."""
        return sum(len(part) for part in parts if isinstance(part, str)) // self._longest

    def prepare(self, parts: PromptContent) -> Tokens:
        """Tokenize a prompt. Raises InvalidRequest for text that holds or becomes a reserved token."""
        raise NotImplementedError

    def prompt_ids(self, parts: PromptContent) -> tuple[int, ...]:
        """The token ids of a whole prompt, unchecked."""
        raise NotImplementedError

    def lead_text(self, lead: PromptContent) -> str:
        """A prompt's last parts as text. It may leave out what does not change the tokens of a label after them."""
        raise NotImplementedError

    def tokens_of(self, *texts: str) -> tuple[tuple[int, ...], ...]:
        """The token ids of each text, without those that the tokenizer adds to a prompt."""
        split = self._known_ids if sum(map(len, texts)) <= CACHED_CHARS else self._split
        return split(*texts)

    def _split(self, *texts: str) -> tuple[tuple[int, ...], ...]:
        return tuple(map(tuple, self.tokenizer(list(texts), add_special_tokens=False).input_ids))

    def encode_labels(self, lead: PromptContent, labels: Sequence[str]) -> list[tuple[int, ...]]:
        """The token ids of each label with its end, as they continue a prompt that ends with `lead`. Raises
        InvalidRequest for a label that holds or becomes a reserved token."""
        if not labels:
            return []
        text = self.lead_text(lead)
        before, *after = self.tokens_of(text, *(f"{text} {label}{self.label_end}" for label in labels))
        encoded = [self._continuation(before, ids, label) for ids, label in zip(after, labels, strict=True)]
        end = (self.tokenizer.convert_tokens_to_ids(self.label_end),) if self.label_end == END_OF_UTTERANCE else ()
        for ids in encoded:
            self._refuse_unknown(ids)
            self._refuse_others(ids, end)
        return encoded

    def _continuation(self, before: tuple[int, ...], ids: tuple[int, ...], label: str) -> tuple[int, ...]:
        if ids[: len(before)] == before:
            return ids[len(before) :]
        # The tokenizer merged the lead's end with the label's beginning: use the label's own tokens instead.
        (alone,) = self.tokens_of(f"{label}{self.label_end}")
        return alone

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _token_text(self, id: int) -> str:
        """The text that one token adds to an answer; a special token's name."""
        if id in self._marked_ids:
            return str(self.tokenizer.convert_ids_to_tokens(id))
        (lead,) = self.tokens_of(LEAD)
        return self.decode([*lead, id]).removeprefix(self.decode(lead))

    def padded(self, prompts: Collection[Tokens]) -> tuple[Tensor, Tensor]:
        """The token ids of prompts, padded on the left, and their mask, 0 for padding: each (prompts, length)."""
        length = max(len(prompt.ids) for prompt in prompts)
        ids = torch.full((len(prompts), length), self._pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, length - len(prompt.ids) :] = torch.tensor(prompt.ids)
            mask[row, length - len(prompt.ids) :] = 1
        return ids, mask

    def refuse_reserved(self, text: str) -> None:
        """Raise InvalidRequest if a text holds a special token."""
        for token in self._reserved:
            if token in text:
                raise InvalidRequest(f"The prompt holds {token}, which is reserved: remove it.")

    def refuse_smuggled(self, ids: Sequence[int], parts: PromptContent) -> None:
        """Raise InvalidRequest if `ids`, the tokens of `parts`, hold a special token that no text spells, or a token
        that the model does not know.

        A tokenizer may drop invisible characters, turn others into ASCII, and join texts.
        """
        self._refuse_unknown(ids)
        plain = [_plainest(part) if isinstance(part, str) else part for part in parts]
        self._refuse_others(ids, self._markers(_Shape(plain)))

    def grammar_tokens(self) -> GrammarTokens:
        """What grammars are compiled for."""
        tokenizer = copy.copy(self.tokenizer.backend_tokenizer)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return GrammarTokens(tokenizer.to_str(), self._model.vocabulary, tuple(sorted(self.eos_ids)))

    def _known(self, id: int | None) -> int | None:
        """A token's id; None if the model has no embedding of it."""
        return id if id is not None and id < self._model.vocabulary else None

    def _require_known(self, tokens: Sequence[str | None]) -> None:
        for token in tokens:
            id = self.tokenizer.convert_tokens_to_ids(token) if token else None
            if id is not None and self._known(id) is None:
                raise SetupFailed(
                    f"The checkpoint's tokenizer has {token} as its token {id:,}, and its model has "
                    f"{self._model.vocabulary:,} tokens: correct vocab_size in config.json, or the tokenizer."
                )

    def _refuse_unknown(self, ids: Sequence[int]) -> None:
        largest = max(ids, default=0)
        if self._known(largest) is None:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise InvalidRequest(f"The text holds {token}, a token that this model does not know: remove it.")

    def _markers_of(self, shape: _Shape) -> tuple[int, ...]:
        return self._special(self.prompt_ids(shape.parts))

    def _special(self, ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(id for id in ids if id in self._special_ids)

    def _refuse_others(self, ids: Sequence[int], expected: tuple[int, ...]) -> None:
        found = self._special(ids)
        if found == expected:
            return
        for id in Counter(found) - Counter(expected):
            token = self.tokenizer.convert_ids_to_tokens(id)
            raise InvalidRequest(f"The text becomes the token {token}, which is reserved: remove it.")
        raise InvalidRequest("The text changes the marks around the prompt's images: remove what resembles <image>.")


class _Shape:
    """A prompt's order of texts and pictures. Equal for prompts of the same texts, even with different pictures."""

    def __init__(self, parts: PromptContent) -> None:
        self.parts = parts
        self._key = tuple(part if isinstance(part, str) else _shape_of(part) for part in parts)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Shape) and self._key == other._key


def _plainest(text: str) -> str:
    """A harmless text with as many ends of utterances as `text`. An empty text stays empty: the pictures around it may
    share a token."""
    return text and END_OF_UTTERANCE.join("a" * (1 + text.count(END_OF_UTTERANCE)))


def _shape_of(picture: Picture) -> object:
    """What a picture is in a prompt's text: its own text, or None in families where it is the same for all pictures."""
    return getattr(picture, "text", None)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The tokenizer's special tokens, which users may not write."""
    added = tokenizer.added_tokens_decoder.values()
    return {
        *tokenizer.all_special_tokens,
        *(token.content for token in added if token.special or _MARKUP.fullmatch(token.content)),
    }


def _ids_that_texts_never_have(tokenizer: PreTrainedTokenizerBase, special: Collection[str]) -> set[int]:
    """The ids of those special tokens that harmless text never becomes."""
    ids = set(tokenizer.convert_tokens_to_ids(sorted(special)))
    # The unknown token stands for unknown characters, unless the checkpoint uses it as another special token too.
    return ids - ({tokenizer.unk_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id})
