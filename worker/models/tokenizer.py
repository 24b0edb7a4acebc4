"""What every family's codec does with its checkpoint's tokenizer."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Collection, Sequence

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasks.errors import InvalidRequest
from tasks.payloads import END_OF_UTTERANCE
from worker.engine.interfaces import Parts
from worker.engine.row import Picture, Tokens

IMAGE = "<image>"
FAKE = "<fake_token_around_image>"
#: Special tokens by their form. Not every tokenizer calls those special that say where in a picture a frame lies.
_MARKUP = re.compile(r"<\S+>")
#: Prompts, and labels, whose tokens are remembered: most jobs differ from those before them by their picture only.
#: Longer ones (characters) come seldom and would hold memory.
REMEMBERED, REMEMBERED_CHARS = 128, 8_000


class Words:
    """The base of codecs: labels, ends, padding, and texts that are refused."""

    in_turns = False
    #: Ends each label, so that `car` does not win as the beginning of `cart`.
    label_end = "\n"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> None:
        """`ends`: the tokens that the checkpoint says end a text."""
        self.tokenizer = tokenizer
        self._ends = ends
        self._known_ids = functools.lru_cache(REMEMBERED)(self._split)
        #: Characters of the longest token.
        self._longest = max(map(len, tokenizer.get_vocab()))
        self.bad_words_ids: list[list[int]] = tokenizer([IMAGE, FAKE], add_special_tokens=False).input_ids
        special = _special_tokens(tokenizer)
        self._reserved = sorted(special - {END_OF_UTTERANCE} | {IMAGE, FAKE})
        self._special_ids = frozenset(_ids_that_texts_never_have(tokenizer, special))
        self._markers = functools.lru_cache(REMEMBERED)(self._markers_of)

    def picture(self, image: Image) -> Picture:
        """See `Codec`."""
        raise NotImplementedError

    def least_tokens(self, parts: Parts) -> int:
        """See `Codec`."""
        return sum(len(part) for part in parts if isinstance(part, str)) // self._longest

    def prepare(self, parts: Parts) -> Tokens:
        """See `Codec`."""
        raise NotImplementedError

    def prompt_ids(self, parts: Parts) -> tuple[int, ...]:
        """A whole prompt's tokens, without a look at what they are."""
        raise NotImplementedError

    def lead_text(self, lead: Parts) -> str:
        """A prompt's last parts as text, as far as it bears on how a label behind them is split."""
        raise NotImplementedError

    def tokens_of(self, *texts: str) -> tuple[tuple[int, ...], ...]:
        """The tokens of each text as it stands: none is added."""
        split = self._known_ids if sum(map(len, texts)) <= REMEMBERED_CHARS else self._split
        return split(*texts)

    def _split(self, *texts: str) -> tuple[tuple[int, ...], ...]:
        return tuple(map(tuple, self.tokenizer(list(texts), add_special_tokens=False).input_ids))

    def encode_labels(self, lead: Parts, labels: Sequence[str]) -> list[tuple[int, ...]]:
        """See `Codec`."""
        if not labels:
            return []
        text = self.lead_text(lead)
        before, *after = self.tokens_of(text, *(f"{text} {label}{self.label_end}" for label in labels))
        encoded = [self._behind(before, ids, label) for ids, label in zip(after, labels, strict=True)]
        end = (self.tokenizer.convert_tokens_to_ids(self.label_end),) if self.label_end == END_OF_UTTERANCE else ()
        for ids in encoded:
            self._refuse_others(ids, end)
        return encoded

    def _behind(self, before: tuple[int, ...], ids: tuple[int, ...], label: str) -> tuple[int, ...]:
        if ids[: len(before)] == before:
            return ids[len(before) :]
        # The tokenizer merged over the seam: what the label is alone is the nearest thing.
        (alone,) = self.tokens_of(f"{label}{self.label_end}")
        return alone

    def end_ids(self, *, utterance: bool) -> frozenset[int]:
        """See `Codec`."""
        known = self.tokenizer.get_added_vocab()
        if utterance and END_OF_UTTERANCE in known:
            return frozenset((*self._ends, known[END_OF_UTTERANCE]))
        return frozenset(self._ends)

    def decode(self, ids: Sequence[int]) -> str:
        """See `Codec`."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def padded(self, prompts: Collection[Tokens]) -> dict[str, Tensor]:
        """Prompts padded on the left, with their mask."""
        length = max(len(prompt.ids) for prompt in prompts)
        pad = self.tokenizer.pad_token_id
        ids = torch.full((len(prompts), length), int(pad if pad is not None else 0))
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, length - len(prompt.ids) :] = torch.tensor(prompt.ids)
            mask[row, length - len(prompt.ids) :] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def refuse_reserved(self, text: str) -> None:
        """Raises InvalidRequest for a text that would become a token with a meaning of its own."""
        for token in self._reserved:
            if token in text:
                raise InvalidRequest(f"The prompt holds {token}, which is reserved: remove it.")

    def refuse_smuggled(self, ids: Sequence[int], parts: Parts) -> None:
        """Raises InvalidRequest where a text of `parts` became a special token although it does not spell one.

        A tokenizer normalises: it may drop characters that no eye sees, fold others into ASCII, and join texts.
        """
        spelled = [_plainest(part) if isinstance(part, str) else part for part in parts]
        self._refuse_others(ids, self._markers(_Shape(spelled)))

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
            raise InvalidRequest(f"The text becomes {token} in the model's terms, which is reserved: remove it.")
        raise InvalidRequest("The text changes the marks around the prompt's images: remove what resembles <image>.")


class _Shape:
    """A prompt's order of texts and pictures, whichever these are: equal to others of the same."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self._key = tuple(part if isinstance(part, str) else _shape_of(part) for part in parts)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Shape) and self._key == other._key


def _plainest(text: str) -> str:
    """A text of one letter, with as many ends of utterances. An empty one stays so: pictures may share a mark then."""
    return text and END_OF_UTTERANCE.join("a" * (1 + text.count(END_OF_UTTERANCE)))


def _shape_of(picture: Picture) -> object:
    """What a picture is in a text: the same for most families, else its own spelling."""
    return getattr(picture, "text", None)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Tokens that users may not write."""
    added = tokenizer.added_tokens_decoder.values()
    return {
        *tokenizer.all_special_tokens,
        *(token.content for token in added if token.special or _MARKUP.fullmatch(token.content)),
    }


def _ids_that_texts_never_have(tokenizer: PreTrainedTokenizerBase, special: Collection[str]) -> set[int]:
    ids = set(tokenizer.convert_tokens_to_ids(sorted(special)))
    # A text of strange characters holds the unknown token by right, where nothing else is meant by it.
    return ids - ({tokenizer.unk_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id})


def configured_ends(model: PreTrainedModel) -> list[int]:
    """The tokens that a checkpoint's generation config says end a text."""
    configured = model.generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    return [end for end in ends if end is not None]
