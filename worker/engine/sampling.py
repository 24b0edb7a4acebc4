"""Sampling for the whole batch on the device. A row's tokens depend on its logits, its seed and the step only."""

from __future__ import annotations

import functools
import hashlib
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessor,
    LogitsProcessorList,
    TypicalLogitsWarper,
)

from worker.engine.row import Row, Sampling
from worker.engine.tensors import to_device

#: A token's weight is its probability divided by the likeliest token's, in units of 2 ** -WEIGHT_BITS.
WEIGHT_BITS = 40
#: Scores that are smaller than the largest by this have the weight 0.
SCORE_RANGE = 28.0
#: A nucleus is found in two passes, each of which divides a range of scores into so many parts.
BUCKETS = 4096
#: The second pass looks a little further, since places in the first one are rounded.
OVERLAP = 1.01

#: Logits that a CPU draws from at once, of one row or more: what is computed of them stays in its caches.
CPU_NUMBERS = 2**17

#: Sets the scores (rows, vocabulary) of the tokens that may not be drawn to -inf.
Truncate = Callable[[Tensor], Tensor]


class RowSampler:
    """One row's sampling parameters and its seed."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._seed = secrets.randbits(63) if sampling.seed is None else sampling.seed

    def uniform(self, step: int) -> float:
        """A number that is uniformly distributed in [0, 1): a hash of the seed and the step."""
        key = self._seed.to_bytes(8, "little")
        digest = hashlib.blake2b(step.to_bytes(8, "little"), digest_size=8, key=key).digest()
        return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


class BatchSampler:
    """Draws the next tokens of a batch's sampled rows: on a GPU all together, on a CPU in groups (see CPU_NUMBERS)."""

    def __init__(self, samplers: Mapping[int, RowSampler], device: torch.device, vocabulary: int) -> None:
        """`samplers`: those of the sampled rows, by the row's index in the batch. `vocabulary`: number of logits."""
        self._samplers = list(samplers.values())
        self._device = device
        #: Indices of the sampled rows (sampled rows,).
        self.places = to_device(list(samplers), device)
        self._size = max(1, CPU_NUMBERS // vocabulary) if device.type == "cpu" else len(samplers)
        sampled = [sampler.sampling for sampler in self._samplers]
        self._groups = [
            _Group(sampled[start : start + self._size], device) for start in range(0, len(sampled), self._size)
        ]

    def draw(self, logits: Tensor, steps: Sequence[int]) -> Tensor:
        """Draw a token (sampled rows,) for each sampled row by the batch's `logits` (rows, vocabulary).

        `steps`: each sampled row's number of new tokens so far.
        """
        numbers = [sampler.uniform(step) for sampler, step in zip(self._samplers, steps, strict=True)]
        uniforms = to_device(numbers, self._device, torch.float64)
        parts = zip(self._groups, torch.split(self.places, self._size), torch.split(uniforms, self._size), strict=True)
        return torch.cat([group.draw(logits.index_select(0, places), part) for group, places, part in parts])


class _Group:
    """Parameters of sampled rows that are drawn together, as tensors."""

    def __init__(self, sampled: Sequence[Sampling], device: torch.device) -> None:
        self._temperature = to_device([[sampling.temperature] for sampling in sampled], device)
        self._truncations = list(_truncations(sampled, device))

    def draw(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """A token (rows,) of each row, by its logits (rows, vocabulary) and its number in [0, 1) of `uniforms`
        (rows,)."""
        scores = scaled(logits, self._temperature)
        for places, truncate in self._truncations:
            scores.index_copy_(0, places, truncate(scores.index_select(0, places)))
        return drawn(scores, uniforms)


class RowSampling(LogitsProcessor):  # type: ignore[misc]
    """Turns the greedy choice of stock `generate` into sampling, for the rows with a temperature."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._samplers = {
            index: RowSampler(row.sampling) for index, row in enumerate(rows) if row.sampling.temperature > 0
        }
        self._step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (rows, vocabulary) in which all of each sampled row but the drawn token's are -inf.

        `input_ids`: (rows, length).
        """
        if self._samplers:
            sampler = BatchSampler(self._samplers, scores.device, scores.shape[1])
            tokens = sampler.draw(scores, [self._step] * len(self._samplers))
            only_drawn = scores.new_full((len(tokens), scores.shape[1]), -torch.inf).scatter_(1, tokens[:, None], 0.0)
            scores = scores.index_copy(0, sampler.places, only_drawn)
        self._step += 1
        return scores


def scaled(logits: Tensor, temperature: Tensor) -> Tensor:
    """Scores (rows, vocabulary) of which the largest is 0, by logits of this shape and a temperature (rows, 1)."""
    scores = logits.float()
    # First shifted: with a low temperature, large logits would overflow. Infinite ones would become NaN.
    scores = (scores - scores.amax(dim=-1, keepdim=True)).div_(temperature)
    return scores.nan_to_num_(nan=0.0, neginf=-torch.inf)


def weights(scores: Tensor) -> Tensor:
    """The weights (rows, vocabulary) of tokens by their scores, of which the largest is 0: see WEIGHT_BITS.

    They are integers, whose sum is the same in any order: the batch and the device's threads do not change it.
    """
    return scores.exp().mul_(2.0**WEIGHT_BITS).long()


def drawn(scores: Tensor, uniforms: Tensor) -> Tensor:
    """A token (rows,) of each row's distribution by its scores (rows, vocabulary), of which the largest is 0.

    It is the token at which the cumulative probability exceeds the row's number in [0, 1) of `uniforms` (rows,).
    """
    sums = weights(scores).cumsum(dim=-1)
    total = sums[:, -1:]
    # The product is rounded, so it might be the total.
    threshold = torch.minimum((uniforms[:, None] * total).long(), total - 1)
    return torch.searchsorted(sums, threshold, right=True)[:, 0]


def keep_top_k(scores: Tensor, top_k: Tensor, largest: int) -> Tensor:
    """Keep the `top_k` (rows, 1) likeliest tokens of each row, and those as likely as the last of them.

    `scores`, and what is returned: (rows, vocabulary). `largest`: the largest number in `top_k`.
    """
    ordered = scores.topk(min(largest, scores.shape[1])).values
    last = ordered.gather(1, top_k.clamp(max=ordered.shape[1]) - 1)
    return scores.masked_fill(scores < last, -torch.inf)


def keep_nucleus(scores: Tensor, top_p: Tensor) -> Tensor:
    """Keep the fewest likeliest tokens of each row that have the probability `top_p` (rows, 1) together.

    `scores`, of which the largest is 0, and what is returned: (rows, vocabulary). Tokens as likely as the last
    one, within two millionths, are kept too. Sorting the vocabulary takes several times as long. Here weights are
    summed by ranges of scores, and where the sum reaches `top_p` by smaller ranges.
    """
    weight = weights(scores)
    wanted = (weight.sum(dim=-1, keepdim=True) * top_p).ceil_().long().clamp_(min=1)
    # The upper end of the divided range (rows, 1). Tokens above it are in bucket 0 and those below in the last one.
    top, width = torch.zeros_like(scores[:, :1]), SCORE_RANGE / BUCKETS
    for _ in range(2):
        bucket = ((top - scores) / width).clamp_(0, BUCKETS).long()
        sums = weight.new_zeros(len(scores), BUCKETS + 1).scatter_add_(1, bucket, weight).cumsum(dim=-1)
        last = torch.searchsorted(sums, wanted)
        top, width = top - width * last, width / BUCKETS * OVERLAP
    return scores.masked_fill(bucket > last, -torch.inf)


def keep_min_p(scores: Tensor, min_p: Tensor) -> Tensor:
    """Keep the tokens of each row with at least `min_p` (rows, 1) times the probability of the likeliest one.

    `scores`, of which the largest is 0, and what is returned: (rows, vocabulary).
    """
    return scores.masked_fill(scores < min_p.log(), -torch.inf)


def _truncations(sampled: Sequence[Sampling], device: torch.device) -> Iterator[tuple[Tensor, Truncate]]:
    """Truncations in the order of stock `generate`, with the indices (any,) of the sampled rows that ask for them."""
    top_k = {place: [sampling.top_k] for place, sampling in enumerate(sampled) if sampling.top_k}
    if top_k:
        largest = max(sampling.top_k or 0 for sampling in sampled)
        truncate = functools.partial(keep_top_k, top_k=to_device(list(top_k.values()), device), largest=largest)
        yield to_device(list(top_k), device), truncate
    top_p = {
        place: [sampling.top_p]
        for place, sampling in enumerate(sampled)
        if sampling.top_p is not None and sampling.top_p < 1.0
    }
    if top_p:
        # In double precision: in single precision the smallest numbers would be 0.
        numbers = to_device(list(top_p.values()), device, torch.float64)
        yield to_device(list(top_p), device), functools.partial(keep_nucleus, top_p=numbers)
    min_p = {place: [sampling.min_p] for place, sampling in enumerate(sampled) if sampling.min_p}
    if min_p:
        truncate = functools.partial(keep_min_p, min_p=to_device(list(min_p.values()), device))
        yield to_device(list(min_p), device), truncate
    for others, places in _by_other_parameters(sampled).items():
        warpers = LogitsProcessorList(_warpers(*others))
        if warpers:
            yield to_device(places, device), functools.partial(warpers, None)


#: `typical_p`, `epsilon_cutoff` and `eta_cutoff`. Only a checkpoint gives them, so rows rarely differ in them.
_Others = tuple[float | None, float | None, float | None]


def _by_other_parameters(sampled: Sequence[Sampling]) -> dict[_Others, list[int]]:
    """The indices of the rows by their other parameters."""
    places: dict[_Others, list[int]] = {}
    for place, row in enumerate(sampled):
        others = row.typical_p, row.epsilon_cutoff, row.eta_cutoff
        places.setdefault(others, []).append(place)
    return places


def _warpers(
    typical_p: float | None, epsilon_cutoff: float | None, eta_cutoff: float | None
) -> Iterator[LogitsProcessor]:
    if typical_p is not None and typical_p < 1.0:
        yield TypicalLogitsWarper(typical_p)
    if epsilon_cutoff:
        yield EpsilonLogitsWarper(epsilon_cutoff)
    if eta_cutoff:
        yield EtaLogitsWarper(eta_cutoff)
