"""IDEFICS' text decoder with a cache of slots, so that rows join and leave at any step.

The arithmetic is that of transformers' `modeling_idefics.py`; three things are kept that it computes again: the
cross-attention's keys and values (projected once per image), of those after the prompt only the ones that new tokens
still attend to (each token sees the image before it, and no other), and whole beginnings of prompts (`Prefix`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import IdeficsForVisionText2Text
from transformers.models.idefics.modeling_idefics import apply_rotary_pos_emb

from worker.models.traced import Traced

#: Positions that a cache grows by: often enough to be small, seldom enough for its copies not to count.
GROWTH = 64

KeysValues = tuple[Tensor, Tensor]
#: One of transformers' layers, which are not typed.
Block = Any


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
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)


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
    """Keys and values (slots, heads, capacity, head size) of each layer. Slots 0 to n-1 are in use."""

    def __init__(self, layers: int, heads: int, size: int, like: Tensor) -> None:
        """`like` says the type and the device."""
        self._empty = like.new_zeros(0, heads, 0, size)
        self._layers: list[KeysValues] = [(self._empty, self._empty)] * layers

    def reserve(self, index: int, slots: int, capacity: int) -> KeysValues:
        """A layer's tensors with room for so many slots and positions; what they hold stays."""
        kept = self._layers[index]
        rows, room = max(slots, kept[0].shape[0]), max(capacity, kept[0].shape[2])
        if (rows, room) != (kept[0].shape[0], kept[0].shape[2]):
            room = -(-room // GROWTH) * GROWTH
            keys, values = (self._empty.new_zeros(rows, old.shape[1], room, old.shape[3]) for old in kept)
            for new, old in zip((keys, values), kept, strict=True):
                new[: old.shape[0], :, : old.shape[2]] = old
            self._layers[index] = keys, values
        return self._layers[index]

    def view(self, index: int, first: int, end: int, length: int) -> KeysValues:
        """A layer's tensors, of these slots and so many positions."""
        keys, values = self.reserve(index, end, length)
        return keys[first:end, :, :length], values[first:end, :, :length]

    def views(self, first: int, end: int, length: int) -> list[Tensor]:
        """Those of all layers, keys and values in turn."""
        return [tensor for index in range(len(self._layers)) for tensor in self.view(index, first, end, length)]

    def clear(self) -> None:
        """Give the memory back."""
        self._layers = [(self._empty, self._empty)] * len(self._layers)

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Put some slots' content in others' places."""
        for kept in self._layers:
            for tensor in kept:
                tensor[targets] = tensor[sources]

    def copy(self, slot: int, length: int) -> tuple[KeysValues, ...]:
        """A slot's first positions, in every layer."""
        return tuple(
            (keys[slot, :, :length].clone(), values[slot, :, :length].clone()) for keys, values in self._layers
        )


class IdeficsDecoder:
    """Reads prompts into slots, and appends a token to every slot at a time."""

    def __init__(self, model: IdeficsForVisionText2Text) -> None:
        self._model: Block = model.model
        self._head: Block = model.lm_head
        self._interval: int = model.config.cross_layer_interval
        self._rotary: Block = model.model.layers[0].self_attn.rotary_emb
        self._device = model.device
        layers, blocks = model.model.layers, model.model.gated_cross_attn_layers
        self._own, self._cross = (
            SlotCache(len(parts), attention.num_heads, attention.head_dim, model.model.norm.weight)
            for parts, attention in ((layers, layers[0].self_attn), (blocks, blocks[0].cross_attn))
        )
        self._continue = Traced(_Continuation(layers, blocks, self._interval))
        self._look = Traced(_Reader(layers, blocks, self._interval))
        #: Keys of one image: the resampler's latents, or the vision tower's patches.
        self._width = 0
        #: By slot: its tokens, and whether new ones see an image.
        self._lengths: list[int] = []
        self._sees: list[bool] = []

    @torch.inference_mode()
    def read(self, prompts: Sequence[Prompt], image_id: int) -> Tensor:
        """Read prompts into the next free slots, in order. Their next token's logits (prompts, vocabulary)."""
        states = self._read(prompts, image_id)
        last = torch.tensor([len(prompt.ids) - 1 for prompt in prompts], device=self._device)
        return self._logits(states[torch.arange(len(prompts), device=self._device), last])

    @torch.inference_mode()
    def read_prefix(self, prompt: Prompt, image_id: int) -> Prefix:
        """Read a prompt's beginning, to be shared by the prompts that begin so."""
        self._read([prompt], image_id)
        slot = len(self._lengths) - 1
        prefix = Prefix(self._own.copy(slot, self._lengths[slot]), prompt.last_image)
        self.release([slot])
        return prefix

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each slot. The next token's logits (slots, vocabulary)."""
        places = _Places(self._device, 0, self._lengths, 1)
        states = self._go_on(torch.tensor(tokens, device=self._device)[:, None], places)
        self._lengths = [length + 1 for length in self._lengths]
        return self._logits(states[:, 0])

    @torch.inference_mode()
    def try_out(self, first: int, packs: Sequence[Sequence[Sequence[int]]]) -> list[list[list[float]]]:
        """Log-probabilities of continuations of the slots from `first` on, which stay as they are.

        `packs[slot]` are token sequences that each follow the slot's prompt; the answer has, for each, one number for
        each token but its first, whose probability is known from the prompt. The sequences of a slot run as one, each
        token seeing the prompt and its own sequence only (tree attention: Miao et al., "SpecInfer", 2023), so that
        the prompt's keys and values stand once.
        """
        tokens = [[token for sequence in pack for token in sequence[:-1]] for pack in packs]
        longest = max(map(len, tokens))
        if not longest:
            return [[[] for _ in pack] for pack in packs]
        owners = [[n for n, sequence in enumerate(pack) for _ in sequence[:-1]] for pack in packs]
        depths = [[depth for sequence in pack for depth in range(len(sequence) - 1)] for pack in packs]
        owner, depth, ids = (
            _padded(rows, longest, fill, self._device) for rows, fill in ((owners, -1), (depths, 0), (tokens, 0))
        )
        places = _Places(self._device, first, self._lengths[first:], longest)
        places.branch(owner, depth)
        logits = self._logits(self._go_on(ids, places)).log_softmax(dim=-1)
        targets = _padded(
            [[token for sequence in pack for token in sequence[1:]] for pack in packs], longest, 0, self._device
        )
        picked = logits.gather(2, targets[..., None])[..., 0].tolist()
        return [_unpacked(row, pack) for row, pack in zip(picked, packs, strict=True)]

    @torch.inference_mode()
    def release(self, slots: Sequence[int]) -> list[tuple[int, int]]:
        """Free slots: the last rows in use move into their places. Those moves, from slot to slot."""
        left = len(self._lengths) - len(slots)
        freed = set(slots)
        sources = [slot for slot in range(left, len(self._lengths)) if slot not in freed]
        moves = list(zip(sources, sorted(slot for slot in freed if slot < left), strict=True))
        if moves:
            from_, to = torch.tensor(moves, device=self._device).unbind(dim=1)
            self._own.move(from_, to)
            self._cross.move(from_, to)
        for source, target in moves:
            self._lengths[target], self._sees[target] = self._lengths[source], self._sees[source]
        del self._lengths[left:], self._sees[left:]
        return moves

    def clear(self) -> None:
        """Free all slots and their memory, after a failure on the way."""
        self._lengths.clear()
        self._sees.clear()
        self._own.clear()
        self._cross.clear()

    def _go_on(self, ids: Tensor, places: _Places) -> Tensor:
        """States (slots, length, hidden) of tokens that show no image: each sees its row's last one."""
        states: Tensor = self._model.embed_tokens(ids)
        sees = torch.tensor(self._sees[places.first : places.end], device=self._device)
        caches = self._own.views(places.first, places.end, places.longest)
        if any(self._sees[places.first : places.end]):
            caches += self._cross.views(places.first, places.end, self._width)
        rotary = self._rotary(states, places.positions)
        return self._continue(states, *rotary, places.rows, places.stored, places.seen, ~sees[:, None, None], *caches)

    def _read(self, prompts: Sequence[Prompt], image_id: int) -> Tensor:
        length = max(len(prompt.ids) for prompt in prompts)
        # Padding on the right: no kept token looks at it, and the next tokens overwrite it.
        ids = _padded([prompt.ids for prompt in prompts], length, 0, self._device)
        places = _Places(self._device, len(self._lengths), [prompt.start for prompt in prompts], length)
        self._recall(prompts, places)
        states: Tensor = self._model.embed_tokens(ids)
        text = (states, *self._rotary(states, places.positions), places.rows, places.stored)
        own = self._own.views(places.first, places.end, places.longest)
        shown = _Shown(prompts, (ids == image_id).cumsum(dim=1), states)
        if shown.distinct is None:
            states = self._continue(*text, places.seen, shown.blind, *own)
        else:
            self._width = shown.distinct.shape[1]
            images = (shown.distinct, shown.index, shown.last, shown.mask, shown.blind)
            cross = self._cross.views(places.first, places.end, self._width)
            before = () if places.mask is None else (places.mask,)
            states = self._look(*text, *images, *before, *own, *cross)
        self._lengths += [prompt.start + len(prompt.ids) for prompt in prompts]
        self._sees += [prompt.last_image is not None for prompt in prompts]
        return states

    def _logits(self, states: Tensor) -> Tensor:
        logits: Tensor = self._head(self._model.norm(states))
        return logits.float()

    def _recall(self, prompts: Sequence[Prompt], places: _Places) -> None:
        """Put the prompts' prefixes into their slots."""
        for slot, prompt in enumerate(prompts, start=places.first):
            for index, kept in enumerate(prompt.prefix.layers if prompt.prefix else ()):
                keys, values = self._own.reserve(index, places.end, places.longest)
                keys[slot, :, : prompt.start], values[slot, :, : prompt.start] = kept


class _Stack(torch.nn.Module):
    """A decoder's layers, with an image block before every few of them, as functions of tensors."""

    def __init__(self, layers: torch.nn.ModuleList, blocks: torch.nn.ModuleList, interval: int) -> None:
        super().__init__()
        self.layers = layers
        self.blocks = blocks
        self.interval = interval

    def through(
        self,
        states: Tensor,
        rotary: KeysValues,
        rows: Tensor,
        stored: Tensor,
        mask: Tensor | None,
        caches: Sequence[Tensor],
        look: Callable[[Block, Tensor, KeysValues | None], Tensor],
    ) -> Tensor:
        """`caches` are the keys and values of each layer, then those of each image block unless no row sees one.
        `look` is what an image block does, with its own."""
        pairs = list(zip(caches[::2], caches[1::2], strict=True))
        own, cross = pairs[: len(self.layers)], pairs[len(self.layers) :]
        for index, layer in enumerate(self.layers):
            if index % self.interval == 0:
                number = index // self.interval
                states = look(self.blocks[number], states, cross[number] if cross else None)
            states = _attend(layer, states, rotary, *own[index], rows, stored, mask)
        return states


class _Reader(_Stack):
    """Prompts that show images."""

    def forward(
        self,
        states: Tensor,
        cos: Tensor,
        sin: Tensor,
        rows: Tensor,
        stored: Tensor,
        distinct: Tensor,
        index: Tensor,
        last: Tensor,
        looks: Tensor,
        blind: Tensor,
        *rest: Tensor,
    ) -> Tensor:
        """`distinct` to `blind` are _Shown's. `rest` are the text's own mask, where something stands before, and the
        caches."""

        def look(block: Block, states: Tensor, kept: KeysValues | None) -> Tensor:
            assert kept is not None, "a prompt shows an image"
            return _look(block, states, distinct, index, last, looks, blind, *kept)

        mask = rest[0] if len(rest) % 2 else None
        return self.through(states, (cos, sin), rows, stored, mask, rest[len(rest) % 2 :], look)


class _Continuation(_Stack):
    """Tokens that show no image: each sees its row's last one."""

    def forward(
        self,
        states: Tensor,
        cos: Tensor,
        sin: Tensor,
        rows: Tensor,
        stored: Tensor,
        mask: Tensor,
        blind: Tensor,
        *caches: Tensor,
    ) -> Tensor:
        def look(block: Block, states: Tensor, kept: KeysValues | None) -> Tensor:
            return _look_back(block, states, blind, kept)

        return self.through(states, (cos, sin), rows, stored, mask, caches, look)


def _attend(
    layer: Block,
    states: Tensor,
    rotary: KeysValues,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    stored: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """The text's own attention. `keys` and `values` (rows, heads, positions, head size) take in the new tokens'."""
    attention = layer.self_attn
    normed = layer.input_layernorm(states)
    query, key = (_headed(attention, project(normed)) for project in (attention.q_proj, attention.k_proj))
    value = _headed(attention, attention.v_proj(normed))
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    for cache, new in ((keys, key), (values, value)):
        # Not cache[rows, :, stored] = ...: recorded, that keeps the number of rows.
        cache.transpose(1, 2).index_put_((rows, stored), new.transpose(1, 2))
    if mask is None:
        attended = scaled_dot_product_attention(query, key, value, is_causal=True)
    else:
        attended = scaled_dot_product_attention(query, keys, values, mask)
    states = states + attention.o_proj(_joined(attended))
    mixed: Tensor = states + layer.mlp(layer.post_attention_layernorm(states))
    return mixed


def _look(
    block: Block,
    states: Tensor,
    distinct: Tensor,
    index: Tensor,
    last: Tensor,
    looks: Tensor,
    blind: Tensor,
    kept_keys: Tensor,
    kept_values: Tensor,
) -> Tensor:
    """While prompts are read each token sees the image before it. The last one's keys and values are kept."""
    attention = block.cross_attn
    keys, values = (_headed(attention, project(distinct)) for project in (attention.k_proj, attention.v_proj))
    keys = attention.k_layer_norm(keys) if attention.qk_layer_norms else keys
    kept_keys.copy_(keys[last])
    kept_values.copy_(values[last])
    attended = scaled_dot_product_attention(
        _query(block, states), _side_by_side(keys, index), _side_by_side(values, index), looks
    )
    return _gated(block, states, attended, blind)


def _side_by_side(images: Tensor, index: Tensor) -> Tensor:
    """(images, heads, length, head size) as (rows, heads, keys, head size) of each row's images."""
    each = images[index].transpose(1, 2)
    return each.flatten(2, 3)


def _look_back(block: Block, states: Tensor, blind: Tensor, kept: KeysValues | None) -> Tensor:
    """After the prompt every token sees its row's last image, whose keys and values are kept."""
    if kept is None:
        return _mixed(block, states)
    keys, values = kept
    return _gated(block, states, scaled_dot_product_attention(_query(block, states), keys, values), blind)


class _Places:
    """Where new tokens stand: `count` of them a row, behind what their slots hold already (`lengths`)."""

    def __init__(self, device: torch.device, first: int, lengths: Sequence[int], count: int) -> None:
        self.first, self.end = first, first + len(lengths)
        latest = max(lengths)
        #: Positions that a slot needs.
        self.longest = latest + count
        self._starts = torch.tensor(lengths, device=device)[:, None]
        self._all = torch.arange(self.longest, device=device)
        #: (rows, 1) and (rows, count): where in the slots' caches.
        self.rows = torch.arange(len(lengths), device=device)[:, None]
        self.stored = self._starts + torch.arange(count, device=device)
        #: (rows, count): which place in the text.
        self.positions = self.stored
        #: (rows, 1, count, longest): a token sees those up to itself.
        self.seen = (self._all <= self.positions[..., None])[:, None]
        #: The same, or None where nothing stands before: plain causal.
        self.mask = self.seen if latest else None

    def branch(self, owner: Tensor, depth: Tensor) -> None:
        """Let the new tokens be several texts side by side: `owner` and `depth` (rows, count) say which text a token
        is of, and its place there."""
        self.positions = self._starts + depth
        before = (self._all < self._starts)[:, None]
        column = (self._all - self._starts).clamp(0, owner.shape[1] - 1)
        same = owner.gather(1, column)[:, None] == owner[..., None]
        reached = depth.gather(1, column)[:, None] <= depth[..., None]
        inside = (self._all >= self._starts) & (self._all < self._starts + owner.shape[1])
        self.seen = (before | (same & reached & inside[:, None]))[:, None]


def _padded(rows: Sequence[Sequence[int]], length: int, fill: int, device: torch.device) -> Tensor:
    """Rows of unlike length as one tensor (rows, length), filled up on the right."""
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows], device=device)


def _unpacked(numbers: Sequence[float], pack: Sequence[Sequence[int]]) -> list[list[float]]:
    """A slot's numbers, sequence by sequence."""
    rest = iter(numbers)
    return [list(itertools.islice(rest, len(sequence) - 1)) for sequence in pack]


class _Shown:
    """The images of prompts, laid out for the cross-attention. Each row begins with the image before it, if any."""

    def __init__(self, prompts: Sequence[Prompt], seen: Tensor, like: Tensor) -> None:
        """`seen` (rows, length) counts the image tokens up to each token."""
        rows = [[prompt.image_before, *prompt.images] for prompt in prompts]
        distinct = {id(image): image for row in rows for image in row if image is not None}
        places = {key: place for place, key in enumerate(distinct)}
        most = max(map(len, rows))
        index = [[places.get(id(image), 0) for image in row] + [0] * (most - len(row)) for row in rows]
        #: (rows, images) which of them each row shows.
        self.index = torch.tensor(index, device=like.device)
        #: (images, length, width) of each distinct image once; None where no row shows one.
        self.distinct = torch.stack(list(distinct.values())).to(like) if distinct else None
        #: (rows,) which of them the tokens after each prompt see.
        self.last = torch.tensor([places.get(id(prompt.last_image), 0) for prompt in prompts], device=like.device)
        begins = torch.tensor([prompt.image_before is None for prompt in prompts], device=like.device)
        #: (rows, length, 1): tokens before any image.
        self.blind = ((seen == 0) & begins[:, None])[..., None]
        width = 0 if self.distinct is None else self.distinct.shape[1]
        image_of_key = torch.arange(most, device=like.device).repeat_interleave(width)
        #: (rows, 1, length, keys): each token sees the image before it.
        self.mask = (seen[..., None] == image_of_key)[:, None]


def _headed(attention: Block, states: Tensor) -> Tensor:
    """(rows, length, hidden) as (rows, heads, length, head size)."""
    headed: Tensor = states.view(*states.shape[:2], attention.num_heads, attention.head_dim).transpose(1, 2)
    return headed


def _joined(states: Tensor) -> Tensor:
    return states.transpose(1, 2).flatten(2)


def _query(block: Block, states: Tensor) -> Tensor:
    attention = block.cross_attn
    query = _headed(attention, attention.q_proj(block.input_layernorm(states)))
    return attention.q_layer_norm(query) if attention.qk_layer_norms else query


def _gated(block: Block, states: Tensor, attended: Tensor, blind: Tensor | None) -> Tensor:
    added = block.cross_attn.o_proj(_joined(attended))
    if blind is not None:
        added = added.masked_fill(blind, 0.0)
    return _mixed(block, states + block.act_cross_attn(block.alpha_cross_attn) * added)


def _mixed(block: Block, states: Tensor) -> Tensor:
    mixed: Tensor = states + block.act_dense(block.alpha_dense) * block.mlp(block.post_attention_layernorm(states))
    return mixed
