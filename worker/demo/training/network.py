"""The demo model's shape: IDEFICS throughout, three thousand times smaller than idefics-9b."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import IdeficsConfig, IdeficsForVisionText2Text
from transformers.models.idefics.image_processing_pil_idefics import IDEFICS_STANDARD_MEAN, IDEFICS_STANDARD_STD

from worker.demo.training.shards import IMAGE_SIDE
from worker.demo.world import CATEGORIES, COLORS, THINGS

#: Multiples of 64: bitsandbytes' 4-bit blocks are that long, and on some CPUs a row must fill them.
WIDTH, VISION_WIDTH = 192, 192
MLP_WIDTH, VISION_MLP_WIDTH = 256, 512
LATENTS = 16

_HEADS = {"thing": len(THINGS), "color": len(COLORS), "count": 3, "category": len(CATEGORIES)}
_CATEGORY_OF = torch.tensor([CATEGORIES.index(thing.category) for thing in THINGS.values()])


def config(vocab_size: int) -> IdeficsConfig:
    """The checkpoint's configuration; the three additional tokens are those of idefics-9b-instruct."""
    return IdeficsConfig(
        vocab_size=vocab_size,
        additional_vocab_size=3,
        hidden_size=WIDTH,
        intermediate_size=MLP_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=6,
        cross_layer_interval=2,
        alpha_type="vector",
        alpha_initializer="ones",
        freeze_text_layers=False,
        freeze_vision_layers=False,
        use_resampler=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        vision_config={
            "embed_dim": VISION_WIDTH,
            "image_size": IMAGE_SIDE,
            "patch_size": 8,
            "intermediate_size": VISION_MLP_WIDTH,
            "num_hidden_layers": 5,
            "num_attention_heads": 6,
        },
        perceiver_config={
            "use_resampler": True,
            "resampler_n_latents": LATENTS,
            "resampler_depth": 2,
            "resampler_n_heads": 5,
            "resampler_head_dim": 32,
        },
    )


def new_model(vocab_size: int) -> IdeficsForVisionText2Text:
    """Untrained. In eval mode for good: in train mode transformers' gated layers take a config for a dropout rate."""
    model = IdeficsForVisionText2Text(config(vocab_size)).eval()
    for name, weight in model.named_parameters():
        if "alpha_" in name:
            # Half-open gates: fully open ones drown the text at the start, closed ones learn too slowly.
            nn.init.constant_(weight, 0.5)
    return model


def pixel_values(pixels: npt.NDArray[np.uint8]) -> Tensor:
    """(n, 64, 64, 3) bytes as the image processor's (n, 3, 64, 64) floats."""
    mean, std = torch.tensor(IDEFICS_STANDARD_MEAN), torch.tensor(IDEFICS_STANDARD_STD)
    return ((torch.from_numpy(pixels).float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def encode_images(model: IdeficsForVisionText2Text, pixels: Tensor) -> Tensor:
    """(n, 3, 64, 64) to the resampler's (n, 16, 192): what the text model attends to."""
    seen = model.model.vision_model(pixel_values=pixels).last_hidden_state
    latents: Tensor = model.model.perceiver_resampler(seen)
    return latents


class ContentHeads(nn.Module):
    """Name a picture's contents from its latents. They only guide the vision tower and are thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(VISION_WIDTH, size) for name, size in _HEADS.items()})

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
