"""What IDEFICS' text decoder does, as functions of tensors alone: each is recorded as one graph (models/traced.py).

Everywhere, `ids` (rows, length) are new tokens, `starts` (rows,) how many stand before them, and `caches` the keys and
values (slots, heads, positions, head size) of each layer in turn, with room for the new ones, which are stored there;
then those of each image block, for the image that the tokens after a prompt see. Each row has the slot of its number,
but a `Reader`'s rows have any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from worker.models.idefics1.layers import Decoder, ImageBlock, KeysValues, Layer

#: A block's part for states, with its own keys and values if there are any.
Look = Callable[[ImageBlock, Tensor, KeysValues | None], Tensor]
#: Where texts stand side by side, the owners of tokens that are of none of them: the prompt's, and padding.
PROMPT, NOBODY = -1, -2


@dataclass(frozen=True)
class _Seeing:
    """What new tokens see of one another and of the caches."""

    #: (rows, length): their places in the caches.
    stored: Tensor
    #: (rows, 1, length, keys)
    mask: Tensor
    #: (rows,): where the rows are not the slots in order.
    slots: Tensor | None = None
    #: (rows, any): the tokens whose states are asked for.
    wanted: Tensor | None = None
    #: Nothing stands before them.
    only_new: bool = False


class _Network(torch.nn.Module):
    def __init__(self, decoder: Decoder, *, is_short: bool = False) -> None:
        """`is_short`: each row has a few new tokens."""
        super().__init__()
        self.decoder = decoder
        self.attend = decoder.attention(is_short=is_short)

    def states(self, ids: Tensor, positions: Tensor, caches: Sequence[Tensor], look: Look, seeing: _Seeing) -> Tensor:
        """The tokens' last states (rows, length, hidden), or those of the ones that are wanted. `positions` (rows,
        length) are their places in the text."""
        decoder = self.decoder
        pairs = list(zip(caches[::2], caches[1::2], strict=True))
        own, cross = pairs[: len(decoder.layers)], pairs[len(decoder.layers) :]
        states: Tensor = decoder.embedding(ids)
        turns = decoder.turns(states, positions)
        for index, (layer, cache) in enumerate(zip(decoder.layers, own, strict=True)):
            if index % decoder.interval == 0:
                number = index // decoder.interval
                states = look(decoder.blocks[number], states, cross[number] if cross else None)
            # The last layer's keys and values are kept of all tokens, but what it says is asked of few.
            wanted = seeing.wanted if index == len(own) - 1 else None
            states = self._layer(layer, states, turns, cache, seeing, wanted)
        return states

    def _layer(
        self, layer: Layer, states: Tensor, turns: KeysValues, cache: KeysValues, seeing: _Seeing, wanted: Tensor | None
    ) -> Tensor:
        """The text's own attention. `wanted` (rows, any) are those tokens whose states are."""
        query, key, value = layer.query_keys_values(states, turns)
        slots = torch.arange(states.shape[0], device=states.device) if seeing.slots is None else seeing.slots
        for kept, new in zip(cache, (key, value), strict=True):
            # Not kept[slots, :, stored] = ...: recorded, that keeps the number of rows.
            kept.transpose(1, 2).index_put_((slots[:, None], seeing.stored), new.transpose(1, 2))
        mask = seeing.mask
        if wanted is not None:
            states, query = _picked(states, wanted), _picked(query.transpose(1, 2), wanted).transpose(1, 2)
            mask = _picked(mask.transpose(1, 2), wanted).transpose(1, 2)
        if seeing.only_new:
            keys, values = key, value
        else:
            keys, values = cache if seeing.slots is None else (kept.index_select(0, slots) for kept in cache)
        return layer.mixed(states, self.attend(query, keys, values, mask))

    def _looker_back(self, sees: Tensor) -> Look:
        """After the prompt every token sees its row's last image, whose keys and values are kept."""
        blind = (sees == 0)[:, None, None]

        def look(block: ImageBlock, states: Tensor, kept: KeysValues | None) -> Tensor:
            return block.mixed(states) if kept is None else block.looked(states, *kept, blind, self.attend)

        return look


class Prompts(NamedTuple):
    """Prompts that show images."""

    ids: Tensor
    starts: Tensor
    #: (rows,): their last tokens' places among the new ones.
    lasts: Tensor
    #: (rows,): their places in the caches.
    slots: Tensor
    #: (images, width, size): features.
    images: Tensor
    #: (rows, most): which of them a row shows, from its number `first` on.
    shown: Tensor
    #: (rows,): which one the tokens after the prompt see.
    kept: Tensor
    #: (rows,): whether there is no image before the new tokens.
    unseeing: Tensor
    #: 0, the image before the new tokens, or 1.
    first: Tensor

    @property
    def stored(self) -> Tensor:
        """(rows, length): the tokens' places in the caches."""
        return self.starts[:, None] + torch.arange(self.ids.shape[1], device=self.ids.device)


#: How many tensors come first where prompts are read.
_PROMPT_TENSORS = len(Prompts._fields)


class _Prompted(_Network):
    """Reads prompts that show images."""

    def __init__(self, decoder: Decoder, image_id: int, *, is_short: bool) -> None:
        super().__init__(decoder, is_short=is_short)
        self.image_id = image_id

    def looker(self, prompts: Prompts) -> Look:
        """Each token sees the image before it."""
        ids, images, shown = prompts.ids, prompts.images, prompts.shown
        seen = (ids == self.image_id).cumsum(dim=1)
        blind = ((seen == 0) & prompts.unseeing[:, None])[..., None]
        numbers = torch.arange(shown.shape[1] * images.shape[1], device=ids.device) // images.shape[1] + prompts.first
        looks = (seen[..., None] == numbers)[:, None]

        def look(block: ImageBlock, states: Tensor, cache: KeysValues | None) -> Tensor:
            assert cache is not None, "a prompt shows an image"
            own = block.keys_values(images)
            # The last image's are kept.
            for slot_cache, new in zip(cache, own, strict=True):
                slot_cache.index_copy_(0, prompts.slots, new[prompts.kept])
            keys, values = (_side_by_side(each, shown) for each in own)
            return block.looked(states, keys, values, blind, self.attend, looks)

        return look


class Reader(_Prompted):
    """Reads prompts that show images."""

    def __init__(self, decoder: Decoder, image_id: int, *, begins: bool, is_short: bool) -> None:
        """`begins`: nothing stands before any of them."""
        super().__init__(decoder, image_id, is_short=is_short)
        self.begins = begins

    def forward(self, *tensors: Tensor) -> Tensor:
        """Of `Prompts` and the caches: the logits (rows, vocabulary) after each row's last token."""
        prompts, caches = Prompts(*tensors[:_PROMPT_TENSORS]), tensors[_PROMPT_TENSORS:]
        stored = prompts.stored
        mask = _up_to(stored, stored.shape[1] if self.begins else caches[0].shape[2])
        seeing = _Seeing(stored, mask, prompts.slots, prompts.lasts[:, None], self.begins)
        return self.decoder.logits(self.states(prompts.ids, stored, caches, self.looker(prompts), seeing)[:, 0])


class Scorer(_Prompted):
    """Reads prompts that show images, and behind each several texts side by side, as `Branches` does."""

    def forward(self, *tensors: Tensor) -> Tensor:
        """Of `Prompts`, whose ids go on with the texts' tokens, `owner`, `depth`, `firsts`, `targets`, and the caches:
        log-probabilities (rows, firsts and targets) of `firsts` (rows, any) after each prompt, then of `targets` (rows,
        any) after each token of the texts. `owner` and `depth` (rows, length) say whose a token is, and its place
        behind what `starts` counts."""
        prompts, (owner, depth, firsts, targets, *caches) = (
            Prompts(*tensors[:_PROMPT_TENSORS]),
            tensors[_PROMPT_TENSORS:],
        )
        stored, starts = prompts.stored, prompts.starts
        mask = _side_by_side_mask(starts, owner, depth, caches[0].shape[2])
        scored = prompts.lasts[:, None] + torch.arange(targets.shape[1] + 1, device=stored.device)
        seeing = _Seeing(stored, mask, wanted=scored.clamp(max=stored.shape[1] - 1))
        states = self.states(prompts.ids, starts[:, None] + depth, caches, self.looker(prompts), seeing)
        likelihoods = self.decoder.logits(states).log_softmax(dim=-1)
        behind = likelihoods[:, 1:].gather(2, targets[..., None])[..., 0]
        return torch.cat((likelihoods[:, 0].gather(1, firsts), behind), dim=1)


class Continuation(_Network):
    """Goes on with tokens that show no image: they see their row's last one."""

    def forward(self, ids: Tensor, starts: Tensor, lasts: Tensor, sees: Tensor, *caches: Tensor) -> Tensor:
        """The logits (rows, vocabulary) after each row's last token, which `lasts` (rows,) says. `sees` (rows,):
        whether it has an image. Without any, the image blocks' caches may be left out."""
        stored = starts[:, None] + torch.arange(ids.shape[1], device=ids.device)
        seeing = _Seeing(stored, _up_to(stored, caches[0].shape[2]))
        states = self.states(ids, stored, caches, self._looker_back(sees), seeing)
        return self.decoder.logits(_picked(states, lasts[:, None])[:, 0])


class Branches(_Network):
    """Goes on with several texts side by side (tree attention: Miao et al., "SpecInfer", 2023)."""

    def forward(
        self, ids: Tensor, starts: Tensor, targets: Tensor, owner: Tensor, depth: Tensor, sees: Tensor, *caches: Tensor
    ) -> Tensor:
        """The log-probabilities (rows, length) of `targets` (rows, length), the tokens that follow. `owner` and `depth`
        (rows, length) say which text a token is of, and its place there."""
        stored = starts[:, None] + torch.arange(ids.shape[1], device=ids.device)
        mask = _side_by_side_mask(starts, owner, depth, caches[0].shape[2])
        states = self.states(ids, starts[:, None] + depth, caches, self._looker_back(sees), _Seeing(stored, mask))
        return self.decoder.logits(states).log_softmax(dim=-1).gather(2, targets[..., None])[..., 0]


def move(sources: Tensor, targets: Tensor, *tensors: Tensor) -> Tensor:
    """Put some rows' content in others' places."""
    for tensor in tensors:
        tensor.index_copy_(0, targets, tensor.index_select(0, sources))
    return targets


def recall(slots: Tensor, *tensors: Tensor) -> Tensor:
    """Put one beginning into some slots. The first half of the tensors are caches (slots, heads, positions, head size),
    the second what they get (heads, length, head size)."""
    half = len(tensors) // 2
    for cache, beginning in zip(tensors[:half], tensors[half:], strict=True):
        whole = beginning.expand(slots.shape[0], *beginning.shape)
        cache[:, :, : beginning.shape[1]].index_copy_(0, slots, whole)
    return slots


def _up_to(stored: Tensor, keys: int) -> Tensor:
    """(rows, 1, length, keys): a token sees those up to itself."""
    return (torch.arange(keys, device=stored.device) <= stored[..., None])[:, None]


def _side_by_side_mask(starts: Tensor, owner: Tensor, depth: Tensor, keys: int) -> Tensor:
    """(rows, 1, length, keys): a token sees what stands before `starts` (rows,), and of the new ones the prompt's and
    its own text's, up to itself. `owner` and `depth` are (rows, length)."""
    behind = torch.arange(keys, device=starts.device) - starts[:, None]
    column = behind.clamp(0, owner.shape[1] - 1)
    owners = owner.gather(1, column)[:, None]
    is_shared = (owners == PROMPT) | (owners == owner[..., None])
    is_reached = depth.gather(1, column)[:, None] <= depth[..., None]
    is_new = ((behind >= 0) & (behind < owner.shape[1]))[:, None]
    return ((behind < 0)[:, None] | (is_new & is_shared & is_reached))[:, None]


def _picked(states: Tensor, places: Tensor) -> Tensor:
    """Of states (rows, length, ...) those at `places` (rows, any)."""
    return states[torch.arange(states.shape[0], device=states.device)[:, None], places]


def _side_by_side(images: Tensor, shown: Tensor) -> Tensor:
    """(images, heads, length, head size) as (rows, heads, keys, head size) of each row's images."""
    each = images[shown].transpose(1, 2)
    return each.flatten(2, 3)
