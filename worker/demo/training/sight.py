"""Stage one of training: the vision tower and what follows it learn to see, guided by throw-away heads.

On its own the text loss finds out very late that there is something to see.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from worker.demo.training.family import Family
from worker.demo.training.heads import ContentHeads
from worker.demo.training.shards import Shard, load_shard

BATCH = 96
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


def learn_to_see(family: Family, tokenizer: PreTrainedTokenizerFast, pictures: Path, saved: Path) -> None:
    """Train stage one and write its weights to `saved`, now and then and at the end; goes on where it was stopped."""
    torch.manual_seed(0)
    model, heads, steps = family.new_model(tokenizer), ContentHeads(), family.steps[0]
    model.set_attn_implementation("eager")  # measured: 1.5 times faster than sdpa at this size
    seeing = _seeing(family, model, heads)
    optimizer = torch.optim.AdamW(seeing.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.02)
    step = _resume(saved, seeing, optimizer)
    for shard, indices in PictureStream(pictures, seed=step).batches(BATCH):
        if step >= steps:
            break
        step += 1
        _set_learning_rate(optimizer, step, steps)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            latents = family.encode_images(model, varied(family.pixel_values(shard.pixels[indices])))
        loss, accuracies = heads.loss(latents.float(), torch.from_numpy(shard.contents[indices]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(seeing.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            shown = " ".join(f"{name} {accuracy:.2f}" for name, accuracy in accuracies.items())
            print(f"see {step}/{steps} loss {loss.item():.3f} {shown}", flush=True)
        if step % 250 == 0 or step == steps:
            _save(saved, seeing, optimizer, step)


def load_sight(family: Family, model: PreTrainedModel, heads: ContentHeads, saved: Path) -> None:
    """Put stage one's weights into a new model."""
    _seeing(family, model, heads).load_state_dict(torch.load(saved, weights_only=True)["seeing"])


def _seeing(family: Family, model: PreTrainedModel, heads: ContentHeads) -> nn.ModuleList:
    """The parts that stage one trains."""
    return nn.ModuleList([*family.seeing(model), heads])


def _set_learning_rate(optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
    """Up, level for half of the steps, then down to a tenth."""
    factor = min(1.0, step / WARM_UP_STEPS, 0.1 + 2 * (1 - step / steps))
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
