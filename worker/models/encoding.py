"""Encodes each picture once, ahead of its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from worker.engine.encoder_cache import CHUNK, EncoderCache, EncoderThread
from worker.engine.pauses import Pauses
from worker.engine.row import Picture
from worker.engine.streams import CudaStream, at_once


class PictureEncoder:
    """An encoder cache and the thread that fills it; has the methods of interfaces.Runner that concern pictures."""

    def __init__(
        self,
        encode: Callable[[Sequence[Any]], Sequence[Tensor]],
        max_bytes: int,
        network: PreTrainedModel,
        chunk: int = CHUNK,
    ) -> None:
        """`encode` returns the features of each of up to `chunk` frames, in any shape. `max_bytes`: maximum bytes of
        cached features. `network`: what `encode` computes with."""
        device = network.device
        self._cache = EncoderCache(encode, max_bytes, chunk)
        self._thread = EncoderThread(self._cache, CudaStream(device) if device.type == "cuda" else at_once)
        # Weights that are elsewhere are copied at each use, which two threads cannot do at the same time.
        self._may_help = all(parameter.device.type == "cpu" for parameter in network.parameters())
        self.prefetch = self._thread.prefetch

    def help(self, within_s: float) -> bool:
        """Encode waiting pictures in the caller's thread for about `within_s` seconds; False if nothing was encoded.

        Does nothing on a GPU, where two threads that encode take as long as one.
        """
        return self._may_help and self._thread.help(within_s)

    def features(self, pictures: Iterable[Picture]) -> Pauses[dict[bytes, Tensor]]:
        """The features of each distinct picture by its key, in the shape of `encode`. Pauses between chunks."""
        return self._cache.get(pictures)

    def metrics(self) -> dict[str, int]:
        """Counters of the encoder cache."""
        return self._cache.metrics()
