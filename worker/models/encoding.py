"""Pictures encoded once each, and before their rows run: for the adapters of families with a decoder of our own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from worker.engine.encoder_cache import CHUNK, EncoderCache, EncoderThread
from worker.engine.pauses import Pauses
from worker.engine.row import Picture


class PictureEncoder:
    """An encoder cache with the thread that fills it: what interfaces.Runner asks of a model's encoder."""

    def __init__(
        self,
        encode: Callable[[Sequence[Any]], Sequence[Tensor]],
        max_bytes: int,
        device: torch.device,
        chunk: int = CHUNK,
    ) -> None:
        """`encode`, `max_bytes`, `chunk`: see EncoderCache."""
        self._cache = EncoderCache(encode, max_bytes, chunk)
        self._thread = EncoderThread(self._cache)
        self._is_on_cpu = device.type == "cpu"
        self.prefetch = self._thread.prefetch

    def help(self, within_s: float) -> bool:
        """See interfaces.Runner. On a GPU, two threads that encode take as long as one."""
        return self._is_on_cpu and self._thread.help(within_s)

    def features(self, pictures: Iterable[Picture]) -> Pauses[dict[bytes, Tensor]]:
        """See interfaces.Encode."""
        return self._cache.get(pictures)

    def metrics(self) -> dict[str, int]:
        """Those of EncoderCache."""
        return self._cache.metrics()


class NoEncoder:
    """In its place where stock `generate` encodes the pictures: none is encoded ahead, and none is kept."""

    def prefetch(self, pictures: Sequence[Picture], then: Callable[[int], None]) -> None:
        """See interfaces.Runner."""
        then(0)

    def help(self, within_s: float) -> bool:
        """See interfaces.Runner."""
        return False

    def metrics(self) -> dict[str, int]:
        """See interfaces.Model."""
        return {}
