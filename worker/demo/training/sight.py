"""Stage one of training: the vision tower and the resampler learn to see, guided by throw-away heads.

On its own the text loss finds out very late that there is something to see.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import IdeficsForVisionText2Text

from worker.demo.training.network import ContentHeads, encode_images, new_model, pixel_values
from worker.demo.training.shards import Shard, load_shard

BATCH = 96
STEPS = 2500
WARM_UP_STEPS = 200
LEARNING_RATE = 1e-3


class PictureStream:
    """Endless random batches of pictures, in turn from every shard."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._paths = sorted(folder.glob("???.npz"))
        self._rng = random.Random(seed)

    def batches(self, size: int) -> Iterator[tuple[Shard, list[int]]]:
        """A shard and `size` distinct indices into it."""
        while True:
            self._rng.shuffle(self._paths)
            for path in self._paths:
                shard = load_shard(path)
                order = list(range(len(shard.pixels)))
                self._rng.shuffle(order)
                for start in range(0, len(order) - size + 1, size):
                    yield shard, order[start : start + size]


def varied(pixels: Tensor) -> Tensor:
    """Normalised pixels (n, 3, 64, 64) with slight changes of light, so that each showing of a picture is new."""
    n = pixels.shape[0]
    light = 1 + 0.06 * torch.randn(n, 1, 1, 1)
    tint = 0.05 * torch.randn(n, 3, 1, 1)
    grain = 0.02 * torch.randn_like(pixels)
    return pixels * light + tint + grain


def learn_to_see(pictures: Path, saved: Path) -> None:
    """Train stage one and write its weights to `saved`, now and then and at the end; goes on where it was stopped."""
    torch.manual_seed(0)
    model, heads = new_model(vocab_size=8), ContentHeads()
    model.set_attn_implementation("eager")  # measured: 1.5 times faster than sdpa at this size
    seeing = _seeing(model, heads)
    optimizer = torch.optim.AdamW(seeing.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.02)
    step = _resume(saved, seeing, optimizer)
    for shard, indices in PictureStream(pictures, seed=step).batches(BATCH):
        if step >= STEPS:
            break
        step += 1
        _set_learning_rate(optimizer, step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            latents = encode_images(model, varied(pixel_values(shard.pixels[indices])))
        loss, accuracies = heads.loss(latents.float(), torch.from_numpy(shard.contents[indices]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(seeing.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            shown = " ".join(f"{name} {accuracy:.2f}" for name, accuracy in accuracies.items())
            print(f"see {step}/{STEPS} loss {loss.item():.3f} {shown}", flush=True)
        if step % 250 == 0 or step == STEPS:
            _save(saved, seeing, optimizer, step)


def load_sight(model: IdeficsForVisionText2Text, heads: ContentHeads, saved: Path) -> None:
    """Put stage one's weights into a new model."""
    _seeing(model, heads).load_state_dict(torch.load(saved, weights_only=True)["seeing"])


def _seeing(model: IdeficsForVisionText2Text, heads: ContentHeads) -> nn.ModuleDict:
    """The parts that stage one trains."""
    return nn.ModuleDict(
        {"vision": model.model.vision_model, "resampler": model.model.perceiver_resampler, "heads": heads}
    )


def _set_learning_rate(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Up, level for half of the steps, then down to a tenth."""
    factor = min(1.0, step / WARM_UP_STEPS, 0.1 + 2 * (1 - step / STEPS))
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE * factor


def _resume(saved: Path, seeing: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    if not saved.exists():
        return 0
    stored = torch.load(saved, weights_only=True)
    seeing.load_state_dict(stored["seeing"])
    optimizer.load_state_dict(stored["optimizer"])
    return int(stored["step"])


def _save(saved: Path, seeing: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    part = saved.with_suffix(".part")
    torch.save({"seeing": seeing.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, part)
    part.rename(saved)
