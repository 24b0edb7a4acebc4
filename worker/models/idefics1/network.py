"""What IDEFICS' text decoder computes, as modules whose arguments are tensors alone: each is recorded as one graph (see
engine/traced.py).

Common arguments: `ids` (rows, length) are new tokens, `starts` (rows,) the number of tokens before them. `caches` are
the keys and values, each (slots, heads, positions, head size), of each decoder layer in turn, with room for the new
ones, which are stored there; then those of each cross-attention block, for the image that the tokens after a prompt
attend to. Row n has slot n, unless `slots` says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from worker.models.idefics1.layers import GatedCrossAttention, TextModel
from worker.models.layers import KeysValues
from worker.models.self_attention import (
    SelfAttention,
    causal_mask,
    picked,
    run_layer,
    scored,
    scored_places,
    tree_mask,
)

#: A cross-attention block's output (rows, length, hidden) for states of that shape, with its keys and values if any.
CrossAttend = Callable[[GatedCrossAttention, Tensor, KeysValues | None], Tensor]


class _Network(torch.nn.Module):
    def __init__(self, text: TextModel, *, is_short: bool = False) -> None:
        """`is_short`: each row has a few new tokens."""
        super().__init__()
        self.text = text
        self.attend = text.attention(is_short=is_short)

    def states(
        self,
        ids: Tensor,
        positions: Tensor,
        caches: Sequence[Tensor],
        cross_attend: CrossAttend,
        attention: SelfAttention,
    ) -> Tensor:
        """The tokens' last states (rows, length, hidden), or those of the selected ones (rows, selected, hidden).
        `positions` (rows, length) are their places in the text."""
        text = self.text
        pairs = list(zip(caches[::2], caches[1::2], strict=True))
        self_kv, cross_kv = pairs[: len(text.layers)], pairs[len(text.layers) :]
        states: Tensor = text.embedding(ids)
        rotary = text.rotary_cos_sin(states, positions)
        for index, (layer, cache) in enumerate(zip(text.layers, self_kv, strict=True)):
            if index % text.interval == 0:
                number = index // text.interval
                states = cross_attend(text.blocks[number], states, cross_kv[number] if cross_kv else None)
            # The last layer's keys and values are stored for all tokens, but its states are asked of few.
            asked = attention if index == len(self_kv) - 1 else attention.of_all()
            states = run_layer(layer, states, rotary, cache, asked, self.attend)
        return states

    def cross_attend_cached(self, attends_image: Tensor) -> CrossAttend:
        """After the prompt every token attends to its row's last image, whose keys and values are kept.
        `attends_image` (rows,): whether there is one."""
        no_image = (attends_image == 0)[:, None, None]

        def cross_attend(block: GatedCrossAttention, states: Tensor, kept: KeysValues | None) -> Tensor:
            return block.output(states) if kept is None else block.cross_attend(states, *kept, no_image, self.attend)

        return cross_attend


def _cross_attend_nothing(block: GatedCrossAttention, states: Tensor, kept: KeysValues | None) -> Tensor:
    """States (rows, length, hidden) of rows without an image."""
    return block.output(states)


class Prompts(NamedTuple):
    """Prompts that show images."""

    #: (rows, length), filled up on the right.
    ids: Tensor
    #: (rows,)
    starts: Tensor
    #: (rows,): their last tokens' places among the new ones.
    lasts: Tensor
    #: (rows,): their slots.
    slots: Tensor
    #: (images, width, size): features.
    images: Tensor
    #: (rows, most): which of them a row shows, from its number `first` on.
    shown: Tensor
    #: (rows,): which one the tokens after the prompt attend to.
    kept: Tensor
    #: (rows,): whether there is no image before the new tokens.
    no_image_before: Tensor
    #: 0, the image before the new tokens, or 1.
    first: Tensor

    @property
    def positions(self) -> Tensor:
        """(rows, length): the tokens' positions in the caches."""
        return self.starts[:, None] + torch.arange(self.ids.shape[1], device=self.ids.device)


#: How many tensors come first where prompts are prefilled.
_PROMPT_TENSORS = len(Prompts._fields)


class _PromptNetwork(_Network):
    """Prefills prompts that show images."""

    def __init__(self, text: TextModel, image_id: int, *, is_short: bool) -> None:
        super().__init__(text, is_short=is_short)
        self.image_id = image_id

    def cross_attend_shown(self, prompts: Prompts) -> CrossAttend:
        """Each token attends to the image before it."""
        ids, images, shown = prompts.ids, prompts.images, prompts.shown
        attended = (ids == self.image_id).cumsum(dim=1)
        no_image = ((attended == 0) & prompts.no_image_before[:, None])[..., None]
        numbers = torch.arange(shown.shape[1] * images.shape[1], device=ids.device) // images.shape[1] + prompts.first
        image_mask = (attended[..., None] == numbers)[:, None]

        def cross_attend(block: GatedCrossAttention, states: Tensor, cache: KeysValues | None) -> Tensor:
            assert cache is not None, "a prompt shows an image"
            projected = block.keys_values(images)
            # The last image's are kept.
            for slot_cache, new in zip(cache, projected, strict=True):
                slot_cache.index_copy_(0, prompts.slots, new[prompts.kept])
            keys, values = (_side_by_side(each, shown) for each in projected)
            return block.cross_attend(states, keys, values, no_image, self.attend, image_mask)

        return cross_attend


class Prefill(_PromptNetwork):
    """Prefills prompts that show images."""

    def __init__(self, text: TextModel, image_id: int, *, begins: bool, is_short: bool) -> None:
        """`begins`: nothing stands before any of them."""
        super().__init__(text, image_id, is_short=is_short)
        self.begins = begins

    def forward(self, *tensors: Tensor) -> Tensor:
        """Of the tensors of `Prompts` and the caches: logits (rows, vocabulary) after each row's last token."""
        prompts, caches = Prompts(*tensors[:_PROMPT_TENSORS]), tensors[_PROMPT_TENSORS:]
        positions = prompts.positions
        mask = causal_mask(positions, positions.shape[1] if self.begins else caches[0].shape[2])
        attention = SelfAttention(positions, mask, prompts.slots, prompts.lasts[:, None], self.begins)
        states = self.states(prompts.ids, positions, caches, self.cross_attend_shown(prompts), attention)
        return self.text.logits(states[:, 0])


class _ScoredNetwork(_Network):
    """Prefills prompts, and runs token sequences side by side behind each, as `TreeAttention` does."""

    def scored(
        self,
        ids: Tensor,
        starts: Tensor,
        lasts: Tensor,
        cross_attend: CrossAttend,
        owner: Tensor,
        depth: Tensor,
        firsts: Tensor,
        targets: Tensor,
        *caches: Tensor,
    ) -> Tensor:
        """Log-probabilities as self_attention.scored says. `ids` (rows, length) go on with the sequences' tokens,
        `lasts` (rows,) are the prompts' last tokens' places; `owner`, `depth` and `targets` as in TokenTree."""
        positions = starts[:, None] + torch.arange(ids.shape[1], device=ids.device)
        mask = tree_mask(starts, owner, depth, caches[0].shape[2])
        attention = SelfAttention(positions, mask, selected=scored_places(lasts, targets, ids.shape[1]))
        states = self.states(ids, starts[:, None] + depth, caches, cross_attend, attention)
        return scored(self.text.logits(states), firsts, targets)


class ScoredPrefill(_PromptNetwork, _ScoredNetwork):
    """Prefills and scores prompts that show images."""

    def forward(self, *tensors: Tensor) -> Tensor:
        """Of the tensors of `Prompts`, then `owner`, `depth`, `firsts`, `targets` and the caches: see `scored`."""
        prompts = Prompts(*tensors[:_PROMPT_TENSORS])
        cross_attend = self.cross_attend_shown(prompts)
        return self.scored(prompts.ids, prompts.starts, prompts.lasts, cross_attend, *tensors[_PROMPT_TENSORS:])


class ScoredTextPrefill(_ScoredNetwork):
    """Prefills and scores rows without images."""

    def forward(self, ids: Tensor, starts: Tensor, lasts: Tensor, *tensors: Tensor) -> Tensor:
        """`tensors` are `owner`, `depth`, `firsts`, `targets` and the caches: see `scored`."""
        return self.scored(ids, starts, lasts, _cross_attend_nothing, *tensors)


class TextPrefill(_Network):
    """Prefills tokens of rows without images."""

    def forward(self, ids: Tensor, starts: Tensor, lasts: Tensor, *caches: Tensor) -> Tensor:
        """Logits (rows, vocabulary) after each row's last token. `lasts` (rows,): its place among the new ones."""
        positions = starts[:, None] + torch.arange(ids.shape[1], device=ids.device)
        attention = SelfAttention(positions, causal_mask(positions, caches[0].shape[2]))
        states = self.states(ids, positions, caches, _cross_attend_nothing, attention)
        return self.text.logits(picked(states, lasts[:, None])[:, 0])


class TextStep(_Network):
    """Appends a token to each row: see engine/interfaces.Decoder."""

    def forward(self, numbers: Tensor, *caches: Tensor) -> Tensor:
        """`numbers` (3, rows) are each row's token, how many stand before it, and whether it attends to an image.
        Logits (rows, vocabulary) of the next token. If no row does, the cross-attention's caches may be left out."""
        ids, starts, attends_image = numbers.unbind()
        positions = starts[:, None]
        attention = SelfAttention(positions, causal_mask(positions, caches[0].shape[2]))
        states = self.states(ids[:, None], positions, caches, self.cross_attend_cached(attends_image), attention)
        return self.text.logits(states[:, 0])


class TreeAttention(_Network):
    """Runs several token sequences side by side behind each row: see engine/scoring.TokenTree."""

    def forward(
        self,
        ids: Tensor,
        starts: Tensor,
        targets: Tensor,
        owner: Tensor,
        depth: Tensor,
        attends_image: Tensor,
        *caches: Tensor,
    ) -> Tensor:
        """Log-probabilities (rows, length) of `targets` (rows, length), the tokens that follow. `owner` and `depth`
        (rows, length) as in TokenTree; `attends_image` (rows,) as in `TextStep`."""
        positions = starts[:, None] + torch.arange(ids.shape[1], device=ids.device)
        attention = SelfAttention(positions, tree_mask(starts, owner, depth, caches[0].shape[2]))
        cross_attend = self.cross_attend_cached(attends_image)
        states = self.states(ids, starts[:, None] + depth, caches, cross_attend, attention)
        return self.text.logits(states).log_softmax(dim=-1).gather(2, targets[..., None])[..., 0]


def _side_by_side(images: Tensor, shown: Tensor) -> Tensor:
    """(images, heads, length, head size) as (rows, heads, keys, head size) of the images that each row shows (rows,
    most)."""
    each = images[shown].transpose(1, 2)
    return each.flatten(2, 3)
