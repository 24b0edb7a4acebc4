"""The computations of the text decoder of Idefics2, Idefics3 and SmolVLM: Llama or Mistral, where image features
replace the embeddings of image tokens.

The modules take tensors only, so that each can be recorded as one graph (engine/traced.py). Common arguments: `ids`
(rows, length) are new tokens, `starts` (rows,) the number of tokens before them. `caches` are those of the engine (see
engine/interfaces.Decoder), with room for the new tokens, whose keys and values the modules write.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from worker.models.layers import (
    Attend,
    DecoderLayer,
    RMSNorm,
    StockModule,
    eager_attention,
    rotary_cos_sin,
    runs_eagerly,
)
from worker.models.self_attention import (
    Caches,
    SelfAttention,
    causal_attention,
    new_positions,
    prompt_scores,
    run_layer,
    scored_places,
    target_scores,
    tree_mask,
)


class TextModel(torch.nn.Module):
    """The text model: an embedding, decoder layers and a head, with the checkpoint's own weights."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        text: StockModule = model.model.text_model
        config = text.config
        self.embedding: StockModule = text.embed_tokens
        self.rotary: StockModule = text.rotary_emb
        self.layers: StockModule = torch.nn.ModuleList(
            DecoderLayer(layer, config.num_attention_heads, config.num_key_value_heads) for layer in text.layers
        )
        self.norm = RMSNorm(text.norm)
        self.head: StockModule = model.lm_head
        #: Maximum tokens that a token attends to, itself included (sliding window); None: no maximum.
        self.window: int | None = getattr(config, "sliding_window", None)

    def logits(self, states: Tensor) -> Tensor:
        """Logits (..., vocabulary) in float32, from the last layer's states (..., hidden)."""
        logits: Tensor = self.head(self.norm(states))
        return logits.float()


class _Network(torch.nn.Module):
    """Base of the modules: runs the layers of the text model."""

    def __init__(self, text: TextModel) -> None:
        super().__init__()
        self.text = text
        self.attend = grouped(scaled_dot_product_attention)

    def states(self, embedded: Tensor, positions: Tensor, caches: Caches, attention: SelfAttention) -> Tensor:
        """The last layer's states (rows, length, hidden), or (rows, selected, hidden) if `attention` selects tokens.
        `embedded` (rows, length, hidden): the tokens' embeddings. `positions` (rows, length): the tokens' positions in
        the text, for the rotary embedding."""
        states = embedded
        rotary = rotary_cos_sin(self.text.rotary, states, positions)
        last = len(self.text.layers) - 1
        for index, (layer, cache) in enumerate(zip(self.text.layers, caches.layers, strict=True)):
            # The last layer stores keys and values of all tokens, but computes states of the selected ones only.
            asked = attention if index == last else attention.of_all()
            states = run_layer(layer, states, rotary, cache, asked, self.attend)
        return states


class Prompts(NamedTuple):
    """The tensors of new tokens of prompts."""

    #: (rows, length): token ids, padded on the right. No real token attends to the padding, and later tokens overwrite
    #: it.
    ids: Tensor
    #: (rows,): number of tokens before them.
    starts: Tensor
    #: (rows,): the index of each row's last token in `ids`.
    lasts: Tensor
    #: (image tokens,): the indices of the image tokens in the flattened `ids`.
    places: Tensor
    #: (image tokens, hidden): the image features at these indices.
    features: Tensor

    def embedded(self, text: TextModel) -> Tensor:
        """The embeddings (rows, length, hidden), with image features in place of those of image tokens."""
        states: Tensor = text.embedding(self.ids)
        return states.flatten(0, 1).index_copy(0, self.places, self.features).view_as(states)

    @property
    def positions(self) -> Tensor:
        """(rows, length): the tokens' positions in the caches."""
        return new_positions(self.starts, self.ids)


#: Number of tensors of `Prompts`: the first arguments of the modules that prefill prompts.
_PROMPT_TENSORS = len(Prompts._fields)


class Prefill(_Network):
    """Prefills prompts."""

    def __init__(self, text: TextModel, *, begins: bool) -> None:
        """`begins`: whether all prompts begin with the new tokens, so that no cached token is attended to."""
        super().__init__(text)
        self.begins = begins

    def forward(self, *tensors: Tensor) -> Tensor:
        """Logits (rows, vocabulary) after each row's last token. `tensors`: those of `Prompts`, then the caches."""
        prompts, caches = Prompts(*tensors[:_PROMPT_TENSORS]), Caches.of(tensors[_PROMPT_TENSORS:])
        positions = prompts.positions
        attention = causal_attention(
            caches, positions, window=self.text.window, lasts=prompts.lasts, only_new=self.begins
        )
        return self.text.logits(self.states(prompts.embedded(self.text), positions, caches, attention)[:, 0])


class ScoredPrefill(_Network):
    """Prefills prompts, and scores token sequences that run side by side after each, as in `TreeAttention`."""

    def forward(self, *tensors: Tensor) -> Tensor:
        """Log-probabilities (rows, firsts + targets): see self_attention.prompt_scores.

        `tensors`: those of `Prompts`, whose `ids` go on with the sequences' tokens; then `owner` and `depth` (rows,
        length), `firsts` (rows, firsts), `targets` (rows, targets), as in engine/scoring.TokenTree; then the caches.
        """
        prompts = Prompts(*tensors[:_PROMPT_TENSORS])
        owner, depth, firsts, targets, *rest = tensors[_PROMPT_TENSORS:]
        caches = Caches.of(rest)
        mask = tree_mask(prompts.starts, owner, depth, caches.keys, self.text.window)
        selected = scored_places(prompts.lasts, targets, prompts.ids.shape[1])
        attention = SelfAttention(caches.places(prompts.positions), mask).at(selected)
        positions = prompts.starts[:, None] + depth
        states = self.states(prompts.embedded(self.text), positions, caches, attention)
        return prompt_scores(self.text.logits(states), firsts, targets)


class DecodeStep(_Network):
    """Appends a token to each row (`step` of engine/interfaces.Decoder)."""

    def __init__(self, text: TextModel) -> None:
        super().__init__(text)
        if runs_eagerly(text.norm.weight):
            self.attend = grouped(eager_attention)

    def forward(self, numbers: Tensor, *tensors: Tensor) -> Tensor:
        """Logits (rows, vocabulary) of the next token. `numbers` (3, rows): each row's token, the number of tokens
        before it, and 0. `tensors`: the caches."""
        ids, starts, _ = numbers.unbind()
        caches, positions = Caches.of(tensors), starts[:, None]
        attention = causal_attention(caches, positions, window=self.text.window)
        states = self.states(self.text.embedding(ids[:, None]), positions, caches, attention)
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
        has_extra: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        """Log-probabilities (rows, length) of `targets` (rows, length), the next tokens of `ids`. `owner` and `depth`
        (rows, length): see engine/scoring.TokenTree. `has_extra` (rows,): zeros. `tensors`: the caches."""
        caches = Caches.of(tensors)
        mask = tree_mask(starts, owner, depth, caches.keys, self.text.window)
        attention = SelfAttention(caches.places(new_positions(starts, ids)), mask)
        states = self.states(self.text.embedding(ids), starts[:, None] + depth, caches, attention)
        return target_scores(self.text.logits(states), targets)


def grouped(attend: Attend) -> Attend:
    """An attention function in which several query heads share a key and value head, without repeating keys and
    values."""

    def attend_grouped(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """`query` (rows, heads, queries, head size), `keys` and `values` (rows, key heads, keys, head size), `mask`
        (rows, 1, queries, keys), True where a query attends to a key. The result has the shape of `query`."""
        group = query.shape[1] // keys.shape[1]
        # The queries of a group's heads are concatenated, as if one head had them all.
        together = query.reshape(query.shape[0], keys.shape[1], -1, query.shape[3])
        repeated = None if mask is None else mask.repeat(1, 1, group, 1)
        return attend(together, keys, values, repeated).reshape(query.shape)

    return attend_grouped
