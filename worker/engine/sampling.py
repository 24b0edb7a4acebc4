"""Sampling that depends only on a row's seed, not on the other rows of its batch."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from worker.engine.row import Row, Sampling


class RowSampling(LogitsProcessor):  # type: ignore[misc]
    """Turns the greedy choice of stock `generate` into sampling, for the rows with a temperature.

    Gumbel-max trick: the largest of log-probabilities plus Gumbel noise is a sample of the distribution (Gumbel 1954;
    Maddison et al., "A* Sampling", 2014). So sampled and greedy rows share a batch, and each sampled row has its own
    random generator.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._samplers = {
            index: RowSampler(row.sampling) for index, row in enumerate(rows) if row.sampling.temperature > 0
        }

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Perturb scores (rows, vocabulary) in place and return them. `input_ids`: (rows, length)."""
        for index, sampler in self._samplers.items():
            scores[index] = sampler.perturb(scores[index])
        return scores


class RowSampler:
    """One row's temperature, truncation and noise."""

    def __init__(self, sampling: Sampling) -> None:
        self._warpers = [TemperatureLogitsWarper(sampling.temperature), *_cuts(sampling)]
        # On the CPU, so that a seed gives the same noise on every device.
        self._generator = torch.Generator()
        self._generator.manual_seed(secrets.randbits(63) if sampling.seed is None else sampling.seed)

    def perturb(self, scores: Tensor) -> Tensor:
        """Perturb scores (vocabulary) so that the largest is the sample; same shape."""
        # Shifted so that the largest is 0: with a low temperature, large scores would overflow or lose precision.
        warped = scores[None].float() - scores.max().float()
        for warper in self._warpers:
            warped = warper(None, warped)
        uniform = torch.rand(warped.shape, generator=self._generator, dtype=torch.float64)
        noise = -torch.log(-torch.log(uniform.clamp(min=1e-300)))
        return (warped + noise.to(warped)).to(scores.dtype)[0]


def _cuts(sampling: Sampling) -> Iterator[LogitsProcessor]:
    """Processors that truncate the distribution, in the order of stock `generate`."""
    if sampling.top_k:
        yield TopKLogitsWarper(sampling.top_k)
    if sampling.top_p is not None and sampling.top_p < 1.0:
        yield TopPLogitsWarper(sampling.top_p)
    if sampling.min_p:
        yield MinPLogitsWarper(sampling.min_p)
    if sampling.typical_p is not None and sampling.typical_p < 1.0:
        yield TypicalLogitsWarper(sampling.typical_p)
    if sampling.epsilon_cutoff:
        yield EpsilonLogitsWarper(sampling.epsilon_cutoff)
    if sampling.eta_cutoff:
        yield EtaLogitsWarper(sampling.eta_cutoff)
