"""What the text decoders of Idefics2, Idefics3 and SmolVLM compute: Llama or Mistral, over tokens whose embeddings are
replaced by image features where a picture stands.

Modules whose arguments are tensors alone: each is recorded as one graph (see engine/traced.py). Common arguments: `ids`
(rows, length) are new tokens, `starts` (rows,) the number of tokens before them. `caches` are the keys and values, each
(rows, key heads, positions, head size), of each layer in turn, with room for the new ones, which are stored there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from worker.models.layers import Attend, Block, DecoderLayer, RMSNorm, eager_attention, rotary_cos_sin, runs_eagerly
from worker.models.self_attention import SelfAttention, causal_mask, run_layer, scored, scored_places, tree_mask


class TextModel(torch.nn.Module):
    """Decoder layers between an embedding and a head: the checkpoint's own weights."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        text: Block = model.model.text_model
        config = text.config
        self.embedding: Block = text.embed_tokens
        self.rotary: Block = text.rotary_emb
        self.layers: Block = torch.nn.ModuleList(
            DecoderLayer(layer, config.num_attention_heads, config.num_key_value_heads) for layer in text.layers
        )
        self.norm = RMSNorm(text.norm)
        self.head: Block = model.lm_head
        #: Tokens that one attends to at most, itself included; None: all before it.
        self.window: int | None = getattr(config, "sliding_window", None)

    def logits(self, states: Tensor) -> Tensor:
        """float32 logits (..., vocabulary) of last states (..., hidden)."""
        logits: Tensor = self.head(self.norm(states))
        return logits.float()


class _Network(torch.nn.Module):
    def __init__(self, text: TextModel) -> None:
        super().__init__()
        self.text = text
        self.attend = grouped(scaled_dot_product_attention)

    def states(self, embedded: Tensor, positions: Tensor, caches: Sequence[Tensor], attention: SelfAttention) -> Tensor:
        """The last states (rows, length, hidden) of embedded tokens of that shape, or those of the selected ones (rows,
        selected, hidden). `positions` (rows, length) are their places in the text."""
        states = embedded
        rotary = rotary_cos_sin(self.text.rotary, states, positions)
        last = len(self.text.layers) - 1
        for index, layer in enumerate(self.text.layers):
            cache = caches[2 * index], caches[2 * index + 1]
            # The last layer's keys and values are stored for all tokens, but its states are asked of few.
            asked = attention if index == last else attention.of_all()
            states = run_layer(layer, states, rotary, cache, asked, self.attend)
        return states


class Prompts(NamedTuple):
    """Prompts, filled up on the right: no kept token attends to what stands there, and the next tokens overwrite it."""

    #: (rows, length)
    ids: Tensor
    #: (rows,)
    starts: Tensor
    #: (rows,): their last tokens' places among the new ones.
    lasts: Tensor
    #: (image tokens,): places in the flattened `ids` where pictures stand.
    places: Tensor
    #: (image tokens, hidden): what stands there.
    features: Tensor

    def embedded(self, text: TextModel) -> Tensor:
        """(rows, length, hidden)."""
        states: Tensor = text.embedding(self.ids)
        return states.flatten(0, 1).index_copy(0, self.places, self.features).view_as(states)

    @property
    def positions(self) -> Tensor:
        """(rows, length): the tokens' positions in the caches."""
        return self.starts[:, None] + torch.arange(self.ids.shape[1], device=self.ids.device)


#: How many tensors come first where prompts are prefilled.
_PROMPT_TENSORS = len(Prompts._fields)


class Prefill(_Network):
    """Prefills prompts."""

    def __init__(self, text: TextModel, *, begins: bool) -> None:
        """`begins`: nothing stands before any of them."""
        super().__init__(text)
        self.begins = begins

    def forward(self, *tensors: Tensor) -> Tensor:
        """Of the tensors of `Prompts` and the caches: logits (rows, vocabulary) after each row's last token."""
        prompts, caches = Prompts(*tensors[:_PROMPT_TENSORS]), tensors[_PROMPT_TENSORS:]
        positions = prompts.positions
        mask = causal_mask(positions, positions.shape[1] if self.begins else caches[0].shape[2], self.text.window)
        attention = SelfAttention(positions, mask, selected=prompts.lasts[:, None], only_new=self.begins)
        return self.text.logits(self.states(prompts.embedded(self.text), positions, caches, attention)[:, 0])


class ScoredPrefill(_Network):
    """Prefills prompts, and runs token sequences side by side behind each, as `TreeAttention` does."""

    def forward(self, *tensors: Tensor) -> Tensor:
        """Of the tensors of `Prompts`, whose ids go on with the sequences' tokens, then `owner`, `depth`, `firsts`,
        `targets` (see engine/scoring.TokenTree) and the caches: log-probabilities as self_attention.scored says."""
        prompts = Prompts(*tensors[:_PROMPT_TENSORS])
        owner, depth, firsts, targets, *caches = tensors[_PROMPT_TENSORS:]
        mask = tree_mask(prompts.starts, owner, depth, caches[0].shape[2], self.text.window)
        selected = scored_places(prompts.lasts, targets, prompts.ids.shape[1])
        attention = SelfAttention(prompts.positions, mask, selected=selected)
        positions = prompts.starts[:, None] + depth
        states = self.states(prompts.embedded(self.text), positions, caches, attention)
        return scored(self.text.logits(states), firsts, targets)


class Step(_Network):
    """Appends a token to each row: see engine/interfaces.Decoder."""

    def __init__(self, text: TextModel) -> None:
        super().__init__(text)
        if runs_eagerly(text.norm.weight):
            self.attend = grouped(eager_attention)

    def forward(self, numbers: Tensor, *caches: Tensor) -> Tensor:
        """`numbers` (3, rows) are each row's token, how many stand before it, and a zero. Logits (rows, vocabulary) of
        the next token."""
        ids, starts, _ = numbers.unbind()
        positions = starts[:, None]
        attention = SelfAttention(positions, causal_mask(positions, caches[0].shape[2], self.text.window))
        states = self.states(self.text.embedding(ids[:, None]), positions, caches, attention)
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
        has_extra: Tensor,
        *caches: Tensor,
    ) -> Tensor:
        """Log-probabilities (rows, length) of `targets` (rows, length), the tokens that follow. `owner` and `depth`
        (rows, length) as in TokenTree; `has_extra` (rows,) are zeros."""
        positions = starts[:, None] + torch.arange(ids.shape[1], device=ids.device)
        mask = tree_mask(starts, owner, depth, caches[0].shape[2], self.text.window)
        states = self.states(self.text.embedding(ids), starts[:, None] + depth, caches, SelfAttention(positions, mask))
        return self.text.logits(states).log_softmax(dim=-1).gather(2, targets[..., None])[..., 0]


def grouped(attend: Attend) -> Attend:
    """Attention where several heads of queries share one of keys and values, which need not be repeated for it."""

    def attend_grouped(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """`query` (rows, heads, queries, head size), `keys` and `values` (rows, key heads, keys, head size), `mask`
        (rows, 1, queries, keys); the result has the query's shape."""
        group = query.shape[1] // keys.shape[1]
        # The queries of a group stand one after another, as if they were those of one head.
        together = query.reshape(query.shape[0], keys.shape[1], -1, query.shape[3])
        repeated = None if mask is None else mask.repeat(1, 1, group, 1)
        return attend(together, keys, values, repeated).reshape(query.shape)

    return attend_grouped
