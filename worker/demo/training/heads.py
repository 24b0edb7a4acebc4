"""Throw-away heads that guide the vision tower in training."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from worker.demo.world import CATEGORIES, COLORS, THINGS

#: Width of the latents: of the text layers in every family.
WIDTH = 192

_HEADS = {"thing": len(THINGS), "color": len(COLORS), "count": 3, "category": len(CATEGORIES)}
_CATEGORY_OF = torch.tensor([CATEGORIES.index(thing.category) for thing in THINGS.values()])


class ContentHeads(nn.Module):
    """Name a picture's contents from its latents. They only guide the vision tower and are thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, size) for name, size in _HEADS.items()})

    def loss(self, latents: Tensor, contents: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Mean cross-entropy, summed over the heads, and the accuracy of each head.

        `latents`: (pictures, 16, 192); `contents`: (pictures, 3), indices of thing, colour and count.
        """
        pooled = latents.mean(1)
        losses, accuracies = [], {}
        for (name, head), target in zip(self.heads.items(), _targets(contents), strict=True):
            scores = head(pooled).float()
            losses.append(nn.functional.cross_entropy(scores, target))
            accuracies[name] = (scores.argmax(-1) == target).float().mean().item()
        return torch.stack(losses).sum(), accuracies


def _targets(contents: Tensor) -> Iterable[Tensor]:
    thing, color, count = contents.T
    return thing, color, count, _CATEGORY_OF[thing]
