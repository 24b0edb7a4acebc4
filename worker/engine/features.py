"""Image features by content: a picture that several jobs show is encoded once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from worker.engine.row import Picture

#: Images that the vision tower takes at once: larger chunks are no faster and need more memory.
CHUNK = 8


class FeatureCache:
    """Least-recently-used features, bounded in bytes. Used by the engine's thread only."""

    def __init__(self, encode: Callable[[Tensor], Tensor], max_bytes: int) -> None:
        """`encode` maps pixels (n, channels, height, width) to features (n, length, width)."""
        self._encode = encode
        self._max_bytes = max_bytes
        self._bytes = 0
        self._hits = self._misses = 0
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()

    def __contains__(self, picture: Picture) -> bool:
        return picture.key in self._features

    def get(self, pictures: Iterable[Picture]) -> dict[bytes, Tensor]:
        """The features (length, width) of each distinct picture, encoding those that are not kept."""
        wanted = {picture.key: picture for picture in pictures}
        found = {key: self._features[key] for key in wanted if key in self._features}
        self._hits += len(found)
        self._misses += len(wanted) - len(found)
        found |= self._encoded([picture for key, picture in wanted.items() if key not in found])
        for key in wanted:
            self._keep(key, found[key])
        return found

    def figures(self) -> dict[str, int]:
        """Images that were known, images that were encoded, and bytes kept."""
        return {"feature_hits": self._hits, "feature_misses": self._misses, "feature_bytes": self._bytes}

    @torch.inference_mode()
    def _encoded(self, pictures: Sequence[Picture]) -> dict[bytes, Tensor]:
        found: dict[bytes, Tensor] = {}
        for start in range(0, len(pictures), CHUNK):
            chunk = pictures[start : start + CHUNK]
            features = self._encode(torch.stack([picture.pixels for picture in chunk if picture.pixels is not None]))
            # Cloned: a view would keep the whole chunk alive.
            found |= {picture.key: feature.clone() for picture, feature in zip(chunk, features, strict=True)}
        return found

    def _keep(self, key: bytes, feature: Tensor) -> None:
        if key not in self._features:
            self._bytes += feature.nbytes
            self._features[key] = feature
        self._features.move_to_end(key)
        while self._bytes > self._max_bytes:
            _, dropped = self._features.popitem(last=False)
            self._bytes -= dropped.nbytes
