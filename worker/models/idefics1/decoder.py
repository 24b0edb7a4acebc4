"""IDEFICS' text decoder with a cache of slots, so that rows join and leave at any step.

Three things are kept that transformers' own decoder computes again: the cross-attention's keys and values (projected
once per image), of those after the prompt only the ones that new tokens still attend to (each token sees the image
before it, and no other), and whole beginnings of prompts (`Prefix`).
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import IdeficsForVisionText2Text

from worker.engine.cuda_graphs import Graphed, Step, bucket
from worker.engine.traced import Traced
from worker.models.idefics1.layers import Decoder, KeysValues
from worker.models.idefics1.network import NOBODY, PROMPT, Branches, Continuation, Reader, Scorer, move, recall

#: Positions that a cache grows by: often enough to be small, seldom enough for its copies not to count.
GROWTH = 64
#: One slot in so many may be free among those in use, before the last rows move there. Each costs a step what a row
#: costs it; moving one costs more, and newcomers mostly fill it.
GAPS_PART = 4
#: New tokens of a row that are few (see idefics_layers.in_parts).
FEW = 24


@dataclass(frozen=True, slots=True)
class Prefix:
    """A prompt's beginning, read: each layer's keys and values (heads, length, head size), and its last image."""

    layers: tuple[KeysValues, ...]
    last_image: Tensor | None

    @property
    def length(self) -> int:
        """Tokens."""
        return int(self.layers[0][0].shape[1])

    @property
    def nbytes(self) -> int:
        last_image = 0 if self.last_image is None else self.last_image.nbytes
        return last_image + sum(tensor.nbytes for layer in self.layers for tensor in layer)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is still to be read of a prompt: token ids, and the features (length, width) of each image among them."""

    ids: Sequence[int]
    images: Sequence[Tensor]
    prefix: Prefix | None = None

    @property
    def start(self) -> int:
        return self.prefix.length if self.prefix else 0

    @property
    def image_before(self) -> Tensor | None:
        return self.prefix.last_image if self.prefix else None

    def split(self, length: int, image_id: int) -> tuple[Prompt, Prompt]:
        """The first `length` tokens, and the rest, which still lacks its prefix."""
        shown = list(self.ids[:length]).count(image_id)
        return Prompt(self.ids[:length], self.images[:shown], self.prefix), Prompt(
            self.ids[length:], self.images[shown:]
        )

    @property
    def last_image(self) -> Tensor | None:
        """What the tokens after the prompt attend to."""
        return self.images[-1] if self.images else self.image_before


class SlotCache:
    """Keys and values (slots, heads, capacity, head size) of each layer."""

    def __init__(self, layers: int, heads: int, size: int, like: Tensor, most: int) -> None:
        """`like` says the type and the device; `most` is how many positions are kept unused, of all slots together."""
        self._empty = like.new_zeros(0, heads, 0, size)
        self._layers: list[KeysValues] = [(self._empty, self._empty)] * layers
        self._most = most

    @property
    def positions(self) -> int:
        """Of all slots together, in use or not."""
        keys, _ = self._layers[0]
        return keys.shape[0] * keys.shape[2]

    @property
    def position_bytes(self) -> int:
        """What the keys and values of one position take, in all layers."""
        return 2 * len(self._layers) * self._empty.shape[1] * self._empty.shape[3] * self._empty.element_size()

    def reserve(self, slots: int, capacity: int) -> None:
        """Room for so many slots, of so many positions. What those hold stays."""
        held, held_room = self._layers[0][0].shape[0], self._layers[0][0].shape[2]
        if slots <= held and capacity <= held_room:
            return
        rows, room = max(slots, held), _grown(max(capacity, held_room))
        if rows * room > self._most:
            # Many short rows and a long one need not have come at the same time.
            rows, room = slots, _grown(capacity)
        for index, (keys, values) in enumerate(self._layers):
            # One after the other, so that only one stands twice.
            self._layers[index] = self._resized(keys, rows, room), self._resized(values, rows, room)

    def _resized(self, old: Tensor, rows: int, room: int) -> Tensor:
        new = old.new_zeros(rows, old.shape[1], room, old.shape[3])
        both = new[: old.shape[0], :, : old.shape[2]]
        both.copy_(old[: both.shape[0], :, : both.shape[2]])
        return new

    def views(self, end: int, length: int) -> list[Tensor]:
        """All layers' tensors, keys and values in turn, of the first slots and so many positions."""
        return [tensor[:end, :, :length] for tensor in self.tensors]

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, keys and values in turn."""
        return [tensor for kept in self._layers for tensor in kept]

    def clear(self) -> None:
        """Give the memory back."""
        self._layers = [(self._empty, self._empty)] * len(self._layers)

    def shrink(self) -> None:
        """Nobody is here: give back what is more than is kept beyond need."""
        if self.positions > self._most:
            self.clear()

    def wipe(self, slot: int) -> None:
        """Zeros, where something stood that even a masked look would notice."""
        for tensor in self.tensors:
            tensor[slot : slot + 1].zero_()

    def another(self, most: int) -> SlotCache:
        """An empty one of the same shape."""
        return SlotCache(len(self._layers), self._empty.shape[1], self._empty.shape[3], self._empty, most)

    def copy(self, slot: int, length: int) -> tuple[KeysValues, ...]:
        """A slot's first positions, in every layer."""
        return tuple(
            (keys[slot, :, :length].clone(), values[slot, :, :length].clone()) for keys, values in self._layers
        )


def _grown(positions: int) -> int:
    return -(-positions // GROWTH) * GROWTH


class IdeficsDecoder:
    """Reads prompts into slots, and appends a token to every slot at a time."""

    def __init__(
        self,
        model: IdeficsForVisionText2Text,
        image_id: int,
        most: int = 2**16,
        record: Callable[[Step], Step] | None = None,
    ) -> None:
        """`image_id`: the token that stands for an image. `most`: see SlotCache. `record`: see Graphed; None: steps are
        not recorded."""
        self._device = model.device
        self._image_id = image_id
        self._like: Tensor = model.model.norm.weight
        layers, blocks = model.model.layers, model.model.gated_cross_attn_layers
        self._own, self._cross = (
            SlotCache(len(parts), attention.num_heads, attention.head_dim, self._like, most)
            for parts, attention in ((layers, layers[0].self_attn), (blocks, blocks[0].cross_attn))
        )
        decoder = Decoder(model)
        #: By whether the prompts begin, and whether they are short.
        self._readers = {
            (begins, is_short): Traced(Reader(decoder, image_id, begins=begins, is_short=is_short))
            for begins, is_short in itertools.product((True, False), repeat=2)
        }
        self._scorers = {is_short: Traced(Scorer(decoder, image_id, is_short=is_short)) for is_short in (True, False)}
        self._read_text = Traced(Continuation(decoder))
        step = Continuation(decoder, is_short=True)
        self._step = Traced(step)
        self._graphed = Graphed(functools.partial(_stepped, step), record) if record else None
        self._branch = Traced(Branches(decoder))
        self._move = Traced(move)
        self._put = Traced(recall)
        #: Keys of one image: the resampler's latents, or the vision tower's patches.
        self._width = 0
        #: By slot: its tokens, none where it is free, and whether new ones see an image.
        self._lengths: list[int] = []
        self._sees: list[bool] = []

    def another(self, most: int) -> IdeficsDecoder:
        """One with slots of its own. `most`: see SlotCache."""
        other = copy.copy(self)
        other._own, other._cross = self._own.another(most), self._cross.another(most)
        other._lengths, other._sees = [], []
        return other

    @property
    def position_bytes(self) -> int:
        """What a token's keys and values take."""
        return self._own.position_bytes

    @property
    def slots(self) -> int:
        """Up to the last one in use."""
        return len(self._lengths)

    @torch.inference_mode()
    def read(self, prompts: Sequence[Prompt]) -> tuple[Sequence[int], Tensor]:
        """Read prompts into free slots. Those, in order, and the next tokens' logits (prompts, vocabulary)."""
        length = max(len(prompt.ids) for prompt in prompts)
        shown = _Shown(prompts, self._like, self._image_id)
        slots = self._free(len(prompts), at_end=shown.images is None)
        # Padding on the right: no kept token looks at it, and the next tokens overwrite it.
        ids = _padded([prompt.ids for prompt in prompts], length, 0, self._device)
        own, cross = self._occupied(prompts, slots, length, shown)
        if shown.images is None:
            starts, lasts, _, sees = self._numbers(prompts, slots)
            return slots, self._read_text(ids, starts, lasts, sees, *(each[slots[0] :] for each in own))
        begins = not any(prompt.start for prompt in prompts)
        return slots, self._readers[begins, length <= FEW](
            ids, *self._numbers(prompts, slots)[:3], *shown.tensors, *own, *cross
        )

    @torch.inference_mode()
    def score(
        self,
        prompts: Sequence[Prompt],
        firsts: Sequence[Sequence[int]],
        packs: Sequence[Sequence[Sequence[int]]],
    ) -> tuple[Sequence[int], list[list[float]], list[list[list[float]]]]:
        """Read prompts that show images into slots, of which none is in use, with continuations: what `try_out` says of
        those comes last. Before it, for each prompt, the log-probabilities of its `firsts` as the next token."""
        shown = _Shown(prompts, self._like, self._image_id)
        assert shown.images is not None, "a prompt shows an image"
        assert not self.slots, "nobody is here"
        slots = range(len(prompts))
        texts = _Texts(packs, [prompt.ids for prompt in prompts], self._device)
        own, cross = self._occupied(prompts, slots, texts.length, shown)
        first = _padded(firsts, max(map(len, firsts)), 0, self._device)
        numbers, score = self._numbers(prompts, slots)[:3], self._scorers[texts.length <= FEW]
        picked = score(
            texts.ids, *numbers, *shown.tensors, texts.owner, texts.depth, first, texts.target, *own, *cross
        ).tolist()
        return (
            slots,
            [row[: len(asked)] for row, asked in zip(picked, firsts, strict=True)],
            [_unpacked(row[first.shape[1] :], pack) for row, pack in zip(picked, packs, strict=True)],
        )

    def _numbers(self, prompts: Sequence[Prompt], slots: Sequence[int]) -> tuple[Tensor, ...]:
        """The prompts' starts, their last tokens' places, their slots, and that they see no image before."""
        starts, lasts = [prompt.start for prompt in prompts], [len(prompt.ids) - 1 for prompt in prompts]
        # One tensor, since each that is made lets go of the interpreter and has to get it back.
        return self._tensor([starts, lasts, slots, [0] * len(slots)]).unbind()

    def _occupied(
        self, prompts: Sequence[Prompt], slots: Sequence[int], length: int, shown: _Shown
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Both caches' tensors, with the prompts' beginnings in their slots and room for so many tokens behind them."""
        more = max(0, slots[-1] + 1 - self.slots)
        self._lengths += [0] * more
        self._sees += [False] * more
        own = self._room(max(prompt.start for prompt in prompts) + length, self.slots)
        self._recall(prompts, slots)
        for slot, prompt in zip(slots, prompts, strict=True):
            self._lengths[slot] = prompt.start + len(prompt.ids)
            self._sees[slot] = prompt.last_image is not None
        if shown.images is None:
            return own, []
        self._width = shown.images.shape[1]
        return own, self._images_room(self.slots)

    def _room(self, length: int, slots: int) -> list[Tensor]:
        """The text's keys and values: the first so many positions of the first so many slots."""
        self._own.reserve(slots, max(length, *self._lengths))
        return self._own.views(slots, length)

    def _images_room(self, slots: int) -> list[Tensor]:
        """The image blocks' keys and values in the first so many slots."""
        self._cross.reserve(slots, self._width)
        return self._cross.views(slots, self._width)

    @torch.inference_mode()
    def read_prefix(self, prompt: Prompt) -> Prefix:
        """Read a prompt's beginning, to be shared by the prompts that begin so."""
        (slot,), _ = self.read([prompt])
        prefix = Prefix(self._own.copy(slot, self._lengths[slot]), prompt.last_image)
        self.release([slot])
        return prefix

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each slot; free ones take any. The next token's logits (slots, vocabulary)."""
        rows, length = self.slots, max(self._lengths) + 1
        if self._graphed:
            # Few shapes are recorded: rows that are too many are free ones.
            rows, length = bucket(rows), _grown(length)
        free = [0] * (rows - self.slots)
        # One tensor, since each that is made lets go of the interpreter and has to get it back.
        numbers = self._tensor([[*tokens, *free], [*self._lengths, *free], [0] * rows, [*self._sees, *free]])
        caches = self._caches(length, rows)
        logits = self._graphed(numbers, caches) if self._graphed else _stepped(self._step, numbers, *caches)
        self._lengths = [length and length + 1 for length in self._lengths]
        return logits[: self.slots]

    @torch.inference_mode()
    def try_out(self, packs: Sequence[Sequence[Sequence[int]]]) -> list[list[list[float]]]:
        """Log-probabilities of continuations of each slot, which stays as it is.

        `packs[slot]` are token sequences that each follow the slot's prompt; the answer has, for each, one number for
        each token but its first, whose probability is known from the prompt. The sequences of a slot run as one, each
        token seeing the prompt and its own sequence only, so that the prompt's keys and values stand once.
        """
        texts = _Texts(packs, [()] * len(packs), self._device)
        if not texts.length:
            return [[[] for _ in pack] for pack in packs]
        starts, sees = self._tensor([self._lengths, self._sees]).unbind()
        caches = self._caches(max(self._lengths) + texts.length, self.slots)
        picked = self._branch(texts.ids, starts, texts.target, texts.owner, texts.depth, sees, *caches).tolist()
        return [_unpacked(row, pack) for row, pack in zip(picked, packs, strict=True)]

    def release(self, slots: Sequence[int]) -> None:
        """Free slots."""
        for slot in slots:
            self._lengths[slot], self._sees[slot] = 0, False
        while self._lengths and not self._lengths[-1]:
            self._lengths.pop()
            self._sees.pop()
        if not self._lengths:
            self._own.shrink()
            self._cross.shrink()

    def wipe(self, slot: int) -> None:
        """Leave no trace of what a slot held."""
        for cache in (self._own, self._cross):
            cache.wipe(slot)

    @torch.inference_mode()
    def close_gaps(self) -> list[tuple[int, int]]:
        """Where too many slots are free among those in use, move the last rows there: from slot to slot."""
        gaps = self._gaps()
        if len(gaps) * GAPS_PART <= self.slots:
            return []
        left = self.slots - len(gaps)
        sources = [slot for slot in range(left, self.slots) if self._lengths[slot]]
        moves = list(zip(sources, gaps, strict=False))
        caches = self._room(max(self._lengths), self.slots) + self._images_room(self.slots)
        self._move(*self._tensor(moves).unbind(dim=1), *caches)
        for source, target in moves:
            self._lengths[target], self._sees[target] = self._lengths[source], self._sees[source]
        del self._lengths[left:], self._sees[left:]
        return moves

    def _gaps(self) -> list[int]:
        """The free slots before the last one in use."""
        return [slot for slot, length in enumerate(self._lengths) if not length]

    def _free(self, count: int, *, at_end: bool) -> list[int]:
        """So many free slots."""
        gaps = [] if at_end else self._gaps()[:count]
        return [*gaps, *range(self.slots, self.slots + count - len(gaps))]

    def clear(self) -> None:
        """Free all slots and their memory, after a failure on the way."""
        self._lengths.clear()
        self._sees.clear()
        self._own.clear()
        self._cross.clear()

    def _tensor(self, numbers: Sequence[Any]) -> Tensor:
        return torch.tensor(numbers, device=self._device)

    def _caches(self, length: int, slots: int) -> list[Tensor]:
        """Of what the rows see: the first so many positions of the first so many slots."""
        caches = self._room(length, slots)
        return caches + self._images_room(slots) if any(self._sees) else caches

    def _recall(self, prompts: Sequence[Prompt], slots: Sequence[int]) -> None:
        """Put the prompts' prefixes into their slots, which have room for them."""
        places: dict[int, list[int]] = {}
        prefixes = {id(prompt.prefix): prompt.prefix for prompt in prompts if prompt.prefix}
        for slot, prompt in zip(slots, prompts, strict=True):
            places.setdefault(id(prompt.prefix), []).append(slot)
        for key, prefix in prefixes.items():
            kept = (tensor for layer in prefix.layers for tensor in layer)
            self._put(self._tensor(places[key]), *self._own.tensors, *kept)


def _stepped(step: Callable[..., Tensor], numbers: Tensor, *caches: Tensor) -> Tensor:
    """`numbers` (4, rows): each row's token, how many stand before it, zeros, and whether it sees an image."""
    ids, starts, lasts, sees = numbers.unbind()
    return step(ids[:, None], starts, lasts, sees, *caches)


class _Texts:
    """Token sequences that stand side by side behind each prompt, as `Scorer` and `Branches` take them."""

    def __init__(
        self, packs: Sequence[Sequence[Sequence[int]]], prompts: Sequence[Sequence[int]], device: torch.device
    ) -> None:
        """`prompts`: what is still to be read of them."""
        both = list(zip(prompts, packs, strict=True))
        # Of each sequence, what something follows.
        tokens = [[*prompt, *(token for text in pack for token in text[:-1])] for prompt, pack in both]
        owners = [
            [PROMPT] * len(prompt) + [n for n, text in enumerate(pack) for _ in text[1:]] for prompt, pack in both
        ]
        depths = [
            [*range(len(prompt)), *(len(prompt) + depth for text in pack for depth in range(len(text) - 1))]
            for prompt, pack in both
        ]
        targets = [[token for text in pack for token in text[1:]] for pack in packs]
        self.length = max(map(len, tokens))
        self.ids = _padded(tokens, self.length, 0, device)
        self.owner = _padded(owners, self.length, NOBODY, device)
        self.depth = _padded(depths, self.length, 0, device)
        self.target = _padded(targets, max(map(len, targets)), 0, device)


def _padded(rows: Sequence[Sequence[int]], length: int, fill: int, device: torch.device) -> Tensor:
    """Rows of unlike length as one tensor (rows, length), filled up on the right."""
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows], device=device)


def _unpacked(numbers: Sequence[float], pack: Sequence[Sequence[int]]) -> list[list[float]]:
    """A slot's numbers, sequence by sequence."""
    rest = iter(numbers)
    return [list(itertools.islice(rest, len(sequence) - 1)) for sequence in pack]


class _Shown:
    """The images of prompts, as `Reader` takes them."""

    def __init__(self, prompts: Sequence[Prompt], like: Tensor, image_id: int) -> None:
        # Number 0, the image before, is left out where no token sees it.
        first = int(all(prompt.image_before is None or prompt.ids[0] == image_id for prompt in prompts))
        rows = [[prompt.image_before, *prompt.images][first:] for prompt in prompts]
        distinct = {id(image): image for row in rows for image in row if image is not None}
        places = {key: place for place, key in enumerate(distinct)}
        most = max(map(len, rows))
        index = [[places.get(id(image), 0) for image in row] for row in rows]
        self.first = torch.tensor(first, device=like.device)
        #: (images, width, size) of each distinct image once; None where no row shows one.
        self.images = torch.stack(list(distinct.values())).to(like) if distinct else None
        self.index = _padded(index, most, 0, like.device)
        self.last = torch.tensor([places.get(id(prompt.last_image), 0) for prompt in prompts], device=like.device)
        self.unseeing = torch.tensor([prompt.image_before is None for prompt in prompts], device=like.device)

    @property
    def tensors(self) -> list[Tensor]:
        assert self.images is not None, "a prompt shows an image"
        return [self.images, self.index, self.last, self.unseeing, self.first]
