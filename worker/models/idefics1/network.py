"""The computations of IDEFICS' text decoder, as modules that take tensors only, so that each can be recorded as one
graph (engine/traced.py).

Common arguments: `ids` (rows, length) are new tokens, `starts` (rows,) the number of tokens before them. `caches` are
those of the self-attention (see engine/interfaces.Decoder), with room for the new tokens, whose keys and values the
modules write; then the keys and values of each cross-attention block, (slots, heads, width, head size), for the image
that the tokens after a prompt attend to. Row n is in slot n, unless `slots` says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from worker.models.idefics1.layers import GatedCrossAttention, TextModel
from worker.models.layers import KeysValues
from worker.models.self_attention import (
    Caches,
    SelfAttention,
    causal_attention,
    new_positions,
    prompt_scores,
    run_layer,
    scored_places,
    states_at,
    target_scores,
    tree_mask,
)

#: Runs a cross-attention block: from its input (rows, length, hidden) and its cached keys and values, if any, to its
#: output of the same shape.
CrossAttend = Callable[[GatedCrossAttention, Tensor, KeysValues | None], Tensor]


class _Network(torch.nn.Module):
    """Base of the modules: runs the layers of the text model."""

    def __init__(self, text: TextModel, *, is_short: bool = False) -> None:
        """`is_short`: whether each row has only a few new tokens (see layers.eager_attention)."""
        super().__init__()
        self.text = text
        self.attend = text.attention(is_short=is_short)

    def states(
        self,
        ids: Tensor,
        positions: Tensor,
        caches: Caches,
        cross_attend: CrossAttend,
        attention: SelfAttention,
    ) -> Tensor:
        """The last layer's states (rows, length, hidden), or (rows, selected, hidden) if `attention` selects tokens.
        `positions` (rows, length): the tokens' positions in the text, for the rotary embedding."""
        text = self.text
        self_kv, cross_kv = caches.layers[: len(text.layers)], caches.layers[len(text.layers) :]
        states: Tensor = text.embedding(ids)
        rotary = text.rotary_cos_sin(states, positions)
        for index, (layer, cache) in enumerate(zip(text.layers, self_kv, strict=True)):
            if index % text.interval == 0:
                number = index // text.interval
                states = cross_attend(text.blocks[number], states, cross_kv[number] if cross_kv else None)
            # The last layer stores keys and values of all tokens, but computes states of the selected ones only.
            asked = attention if index == len(self_kv) - 1 else attention.of_all()
            states = run_layer(layer, states, rotary, cache, asked, self.attend)
        return states

    def cross_attend_cached(self, image: Tensor, caches: Caches) -> CrossAttend:
        """Cross-attention of tokens after the prompt, to their row's last image, whose keys and values are cached.
        `image` (rows,): 0 for a row without an image; with a block table the image's slot."""
        no_image = (image == 0)[:, None, None]

        def cross_attend(block: GatedCrossAttention, states: Tensor, kept: KeysValues | None) -> Tensor:
            if kept is None:
                return block.output(states)
            keys, values = kept if caches.table is None else (each.index_select(0, image) for each in kept)
            return block.cross_attend(states, keys, values, no_image, self.attend)

        return cross_attend


def _cross_attend_nothing(block: GatedCrossAttention, states: Tensor, kept: KeysValues | None) -> Tensor:
    """Run a block on rows without an image: from `states` (rows, length, hidden) to the same shape."""
    return block.output(states)


class Prompts(NamedTuple):
    """The tensors of new tokens of prompts with images."""

    #: (rows, length): token ids, padded on the right.
    ids: Tensor
    #: (rows,): number of tokens before them.
    starts: Tensor
    #: (rows,): the index of each row's last token in `ids`.
    lasts: Tensor
    #: (rows,): the row's slot.
    slots: Tensor
    #: (images, width, size): features of the distinct images of all rows.
    images: Tensor
    #: (rows, shown images): index in `images` of each image of a row. Column n is the row's image number `first` + n,
    #: where number 0 is the image before the new tokens.
    shown: Tensor
    #: (rows,): index in `images` of the image that the tokens after the prompt attend to.
    kept: Tensor
    #: (rows,): True if there is no image before the new tokens.
    no_image_before: Tensor
    #: A scalar, 0 or 1: the number of the image in the first column of `shown`.
    first: Tensor

    @property
    def positions(self) -> Tensor:
        """(rows, length): the tokens' positions in the caches."""
        return new_positions(self.starts, self.ids)


#: Number of tensors of `Prompts`: the first arguments of the modules that prefill prompts with images.
_PROMPT_TENSORS = len(Prompts._fields)


class _PromptNetwork(_Network):
    """Base of the modules that prefill prompts with images."""

    def __init__(self, text: TextModel, image_id: int, *, is_short: bool) -> None:
        super().__init__(text, is_short=is_short)
        self.image_id = image_id

    def cross_attend_shown(self, prompts: Prompts) -> CrossAttend:
        """Cross-attention of a prompt's tokens, each to the last image up to it. Caches the keys and values of
        `kept`."""
        ids, images, shown = prompts.ids, prompts.images, prompts.shown
        attended = (ids == self.image_id).cumsum(dim=1)
        no_image = ((attended == 0) & prompts.no_image_before[:, None])[..., None]
        numbers = torch.arange(shown.shape[1] * images.shape[1], device=ids.device) // images.shape[1] + prompts.first
        image_mask = (attended[..., None] == numbers)[:, None]

        def cross_attend(block: GatedCrossAttention, states: Tensor, cache: KeysValues | None) -> Tensor:
            assert cache is not None, "prompts with images need the cross-attention's caches"
            projected = block.keys_values(images)
            # Later tokens attend to the last image only.
            for slot_cache, new in zip(cache, projected, strict=True):
                slot_cache.index_copy_(0, prompts.slots, new[prompts.kept])
            keys, values = (_side_by_side(each, shown) for each in projected)
            return block.cross_attend(states, keys, values, no_image, self.attend, image_mask)

        return cross_attend


class Prefill(_PromptNetwork):
    """Prefills prompts with images."""

    def __init__(self, text: TextModel, image_id: int, *, begins: bool, is_short: bool) -> None:
        """`begins`: whether all prompts begin with the new tokens, so that no cached token is attended to."""
        super().__init__(text, image_id, is_short=is_short)
        self.begins = begins

    def forward(self, *tensors: Tensor) -> Tensor:
        """Logits (rows, vocabulary) after each row's last token. `tensors`: those of `Prompts`, then the caches."""
        prompts, caches = Prompts(*tensors[:_PROMPT_TENSORS]), Caches.of(tensors[_PROMPT_TENSORS:])
        positions = prompts.positions
        attention = causal_attention(caches, positions, slots=prompts.slots, lasts=prompts.lasts, only_new=self.begins)
        states = self.states(prompts.ids, positions, caches, self.cross_attend_shown(prompts), attention)
        return self.text.logits(states[:, 0])


class _ScoredNetwork(_Network):
    """Base of the modules that prefill prompts and run token sequences side by side after each, as `TreeAttention`
    does."""

    def scores(
        self,
        ids: Tensor,
        starts: Tensor,
        lasts: Tensor,
        cross_attend: CrossAttend,
        owner: Tensor,
        depth: Tensor,
        firsts: Tensor,
        targets: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        """Log-probabilities (rows, firsts + targets): see self_attention.prompt_scores.

        `ids` (rows, length): the prompt's new tokens, then those of the sequences. `lasts` (rows,): the index of the
        prompt's last token in `ids`. `firsts` (rows, firsts). `owner` and `depth` (rows, length), `targets` (rows,
        targets): see engine/scoring.TokenTree. `tensors`: the caches.
        """
        caches = Caches.of(tensors)
        mask = tree_mask(starts, owner, depth, caches.keys)
        selected = scored_places(lasts, targets, ids.shape[1])
        attention = SelfAttention(caches.places(new_positions(starts, ids)), mask).at(selected)
        states = self.states(ids, starts[:, None] + depth, caches, cross_attend, attention)
        return prompt_scores(self.text.logits(states), firsts, targets)


class ScoredPrefill(_PromptNetwork, _ScoredNetwork):
    """Prefills prompts with images, and scores sequences after them."""

    def forward(self, *tensors: Tensor) -> Tensor:
        """Log-probabilities (rows, firsts + targets): see `scores`. `tensors`: those of `Prompts`, then `owner`,
        `depth`, `firsts`, `targets` and the caches."""
        prompts = Prompts(*tensors[:_PROMPT_TENSORS])
        cross_attend = self.cross_attend_shown(prompts)
        return self.scores(prompts.ids, prompts.starts, prompts.lasts, cross_attend, *tensors[_PROMPT_TENSORS:])


class ScoredTextPrefill(_ScoredNetwork):
    """Prefills prompts without images, and scores sequences after them."""

    def forward(self, ids: Tensor, starts: Tensor, lasts: Tensor, *tensors: Tensor) -> Tensor:
        """Log-probabilities (rows, firsts + targets): see `scores`. `ids` (rows, length), `starts` and `lasts` (rows,);
        `tensors`: `owner`, `depth`, `firsts`, `targets` and the caches."""
        return self.scores(ids, starts, lasts, _cross_attend_nothing, *tensors)


class TextPrefill(_Network):
    """Prefills prompts without images."""

    def forward(self, ids: Tensor, starts: Tensor, lasts: Tensor, *tensors: Tensor) -> Tensor:
        """Logits (rows, vocabulary) after each row's last token, which is at index `lasts` (rows,) of `ids`. `tensors`:
        the caches."""
        caches, positions = Caches.of(tensors), new_positions(starts, ids)
        attention = causal_attention(caches, positions)
        states = self.states(ids, positions, caches, _cross_attend_nothing, attention)
        return self.text.logits(states_at(states, lasts[:, None])[:, 0])


class DecodeStep(_Network):
    """Appends a token to each row (`step` of engine/interfaces.Decoder)."""

    def forward(self, numbers: Tensor, *tensors: Tensor) -> Tensor:
        """Logits (rows, vocabulary) of the next token. `numbers` (3, rows): each row's token, the number of tokens
        before it, and `image` of `cross_attend_cached`. `tensors`: the caches. If no row attends to an image, those of
        the cross-attention may be left out."""
        ids, starts, image = numbers.unbind()
        caches, positions = Caches.of(tensors), starts[:, None]
        attention = causal_attention(caches, positions)
        states = self.states(ids[:, None], positions, caches, self.cross_attend_cached(image, caches), attention)
        return self.text.logits(states[:, 0])


class TreeAttention(_Network):
    """Runs several token sequences side by side after each row (`branch` of engine/interfaces.Decoder)."""

    def forward(
        self,
        ids: Tensor,
        starts: Tensor,
        targets: Tensor,
        owner: Tensor,
        depth: Tensor,
        image: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        """Log-probabilities (rows, length) of `targets` (rows, length), the next tokens of `ids`. `owner` and `depth`
        (rows, length): see engine/scoring.TokenTree. `image` (rows,): see `cross_attend_cached`. `tensors`:
        the caches."""
        caches, positions = Caches.of(tensors), new_positions(starts, ids)
        attention = SelfAttention(caches.places(positions), tree_mask(starts, owner, depth, caches.keys))
        cross_attend = self.cross_attend_cached(image, caches)
        states = self.states(ids, starts[:, None] + depth, caches, cross_attend, attention)
        return target_scores(self.text.logits(states), targets)


def _side_by_side(images: Tensor, shown: Tensor) -> Tensor:
    """The keys or values (rows, heads, shown images * width, head size) of each row's images one after another, from
    those of all images, `images` (images, heads, width, head size), and the indices `shown` (rows, shown images)."""
    each = images[shown].transpose(1, 2)
    return each.flatten(2, 3)
