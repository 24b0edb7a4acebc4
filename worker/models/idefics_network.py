"""What IDEFICS' text decoder does, as functions of tensors alone: each is recorded as one graph (models/traced.py).

Everywhere, `ids` (rows, length) are new tokens, `starts` (rows,) how many stand before them, and `caches` the keys and
values (slots, heads, positions, head size) of each layer in turn, with room for the new ones, which are stored there;
then those of each image block, for the image that the tokens after a prompt see. Each row has the slot of its number,
but a reader's rows have any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from worker.models.idefics_layers import Decoder, ImageBlock, KeysValues, Layer

#: A block's part for states, with its own keys and values if there are any.
Look = Callable[[ImageBlock, Tensor, KeysValues | None], Tensor]
#: Where texts stand side by side, the owners of tokens that are of none of them: the prompt's, and padding.
PROMPT, NOBODY = -1, -2


class _Network(torch.nn.Module):
    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def states(
        self,
        ids: Tensor,
        stored: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        caches: Sequence[Tensor],
        look: Look,
        slots: Tensor | None = None,
    ) -> Tensor:
        """The tokens' last states (rows, length, hidden). `stored` and `positions` (rows, length) are their places in
        the caches and in the text."""
        decoder = self.decoder
        pairs = list(zip(caches[::2], caches[1::2], strict=True))
        own, cross = pairs[: len(decoder.layers)], pairs[len(decoder.layers) :]
        states: Tensor = decoder.embedding(ids)
        turns = decoder.turns(states, positions)
        for index, (layer, cache) in enumerate(zip(decoder.layers, own, strict=True)):
            if index % decoder.interval == 0:
                number = index // decoder.interval
                states = look(decoder.blocks[number], states, cross[number] if cross else None)
            states = _attend(layer, states, turns, cache, stored, mask, slots)
        return states


class Reader(_Network):
    """Reads prompts that show images."""

    def __init__(self, decoder: Decoder, image_id: int, *, begins: bool) -> None:
        """`begins`: nothing stands before any of them."""
        super().__init__(decoder)
        self.image_id = image_id
        self.begins = begins

    def forward(
        self,
        ids: Tensor,
        starts: Tensor,
        lasts: Tensor,
        slots: Tensor,
        images: Tensor,
        shown: Tensor,
        kept: Tensor,
        unseeing: Tensor,
        *caches: Tensor,
    ) -> Tensor:
        """The logits (rows, vocabulary) after each row's last token, which `lasts` (rows,) says. `slots` (rows,) are
        the rows' places in the caches.

        `images` (images, width, size) are features; `shown` (rows, most) which of them a row shows, the one before its
        new tokens first; `kept` (rows,) which one the tokens after the prompt see; `unseeing` (rows,) whether there is
        none before the new tokens.
        """
        stored = starts[:, None] + torch.arange(ids.shape[1], device=ids.device)
        look = self._looker(ids, slots, images, shown, kept, unseeing)
        mask = None if self.begins else _up_to(stored, caches[0])
        states = self.states(ids, stored, stored, mask, caches, look, slots)
        return self.decoder.logits(_picked(states, lasts))

    def _looker(
        self, ids: Tensor, slots: Tensor, images: Tensor, shown: Tensor, kept: Tensor, unseeing: Tensor
    ) -> Look:
        """Each token sees the image before it."""
        seen = (ids == self.image_id).cumsum(dim=1)
        blind = ((seen == 0) & unseeing[:, None])[..., None]
        places = torch.arange(shown.shape[1] * images.shape[1], device=ids.device)
        looks = (seen[..., None] == places // images.shape[1])[:, None]

        def look(block: ImageBlock, states: Tensor, cache: KeysValues | None) -> Tensor:
            assert cache is not None, "a prompt shows an image"
            own = block.keys_values(images)
            # The last image's are kept.
            for slot_cache, new in zip(cache, own, strict=True):
                slot_cache.index_copy_(0, slots, new[kept])
            keys, values = (_side_by_side(each, shown) for each in own)
            return block.looked(states, keys, values, blind, looks)

        return look


class Scorer(Reader):
    """Reads prompts that show images, and behind each several texts side by side, as `Branches` does."""

    def forward(  # type: ignore[override]
        self,
        ids: Tensor,
        starts: Tensor,
        lasts: Tensor,
        slots: Tensor,
        images: Tensor,
        shown: Tensor,
        kept: Tensor,
        unseeing: Tensor,
        owner: Tensor,
        depth: Tensor,
        firsts: Tensor,
        targets: Tensor,
        *caches: Tensor,
    ) -> Tensor:
        """Log-probabilities (rows, firsts and targets): of `firsts` (rows, any) after each prompt, then of `targets`
        (rows, any) after each token of the texts. The first eight are a Reader's, but `ids` go on with the texts'
        tokens. `owner` and `depth` (rows, length) say whose a token is, and its place behind what `starts` counts."""
        stored = starts[:, None] + torch.arange(ids.shape[1], device=ids.device)
        look = self._looker(ids, slots, images, shown, kept, unseeing)
        mask = _side_by_side_mask(starts, owner, depth, caches[0])
        states = self.states(ids, stored, starts[:, None] + depth, mask, caches, look, slots)
        scored = lasts[:, None] + torch.arange(targets.shape[1] + 1, device=ids.device)
        likelihoods = self.decoder.logits(_picked(states, scored.clamp(max=ids.shape[1] - 1))).log_softmax(dim=-1)
        behind = likelihoods[:, 1:].gather(2, targets[..., None])[..., 0]
        return torch.cat((likelihoods[:, 0].gather(1, firsts), behind), dim=1)


class Continuation(_Network):
    """Goes on with tokens that show no image: they see their row's last one."""

    def forward(self, ids: Tensor, starts: Tensor, lasts: Tensor, sees: Tensor, *caches: Tensor) -> Tensor:
        """The logits (rows, vocabulary) after each row's last token, which `lasts` (rows,) says. `sees` (rows,):
        whether it has an image. Without any, the image blocks' caches may be left out."""
        stored = starts[:, None] + torch.arange(ids.shape[1], device=ids.device)
        states = self.states(ids, stored, stored, _up_to(stored, caches[0]), caches, _looker_back(sees))
        return self.decoder.logits(_picked(states, lasts))


class Branches(_Network):
    """Goes on with several texts side by side (tree attention: Miao et al., "SpecInfer", 2023)."""

    def forward(
        self, ids: Tensor, starts: Tensor, targets: Tensor, owner: Tensor, depth: Tensor, sees: Tensor, *caches: Tensor
    ) -> Tensor:
        """The log-probabilities (rows, length) of `targets` (rows, length), the tokens that follow. `owner` and `depth`
        (rows, length) say which text a token is of, and its place there."""
        stored = starts[:, None] + torch.arange(ids.shape[1], device=ids.device)
        mask = _side_by_side_mask(starts, owner, depth, caches[0])
        states = self.states(ids, stored, starts[:, None] + depth, mask, caches, _looker_back(sees))
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


def _up_to(stored: Tensor, keys: Tensor) -> Tensor:
    """(rows, 1, length, positions): a token sees those up to itself."""
    return (torch.arange(keys.shape[2], device=stored.device) <= stored[..., None])[:, None]


def _side_by_side_mask(starts: Tensor, owner: Tensor, depth: Tensor, keys: Tensor) -> Tensor:
    """(rows, 1, length, positions): a token sees what stands before `starts` (rows,), and of the new ones the prompt's
    and its own text's, up to itself. `owner` and `depth` are (rows, length)."""
    behind = torch.arange(keys.shape[2], device=starts.device) - starts[:, None]
    column = behind.clamp(0, owner.shape[1] - 1)
    owners = owner.gather(1, column)[:, None]
    is_shared = (owners == PROMPT) | (owners == owner[..., None])
    is_reached = depth.gather(1, column)[:, None] <= depth[..., None]
    is_new = ((behind >= 0) & (behind < owner.shape[1]))[:, None]
    return ((behind < 0)[:, None] | (is_new & is_shared & is_reached))[:, None]


def _picked(states: Tensor, places: Tensor) -> Tensor:
    """The states at some places, (rows,) or (rows, any)."""
    rows = torch.arange(states.shape[0], device=states.device)
    return states[rows if places.dim() == 1 else rows[:, None], places]


def _looker_back(sees: Tensor) -> Look:
    """After the prompt every token sees its row's last image, whose keys and values are kept."""
    blind = (sees == 0)[:, None, None]

    def look(block: ImageBlock, states: Tensor, kept: KeysValues | None) -> Tensor:
        return block.mixed(states) if kept is None else block.looked(states, *kept, blind)

    return look


def _attend(
    layer: Layer,
    states: Tensor,
    turns: KeysValues,
    cache: KeysValues,
    stored: Tensor,
    mask: Tensor | None,
    slots: Tensor | None,
) -> Tensor:
    """The text's own attention. Without a mask, to the new tokens only."""
    query, key, value = layer.query_keys_values(states, turns)
    rows = torch.arange(states.shape[0], device=states.device) if slots is None else slots
    for kept, new in zip(cache, (key, value), strict=True):
        # Not kept[rows, :, stored] = ...: recorded, that keeps the number of rows.
        kept.transpose(1, 2).index_put_((rows[:, None], stored), new.transpose(1, 2))
    if mask is None:
        return layer.mixed(states, scaled_dot_product_attention(query, key, value, is_causal=True))
    keys, values = cache if slots is None else (kept.index_select(0, slots) for kept in cache)
    return layer.mixed(states, scaled_dot_product_attention(query, keys, values, mask))


def _side_by_side(images: Tensor, shown: Tensor) -> Tensor:
    """(images, heads, length, head size) as (rows, heads, keys, head size) of each row's images."""
    each = images[shown].transpose(1, 2)
    return each.flatten(2, 3)
