"""Stage two of training: the whole model learns to talk about what it sees."""

import math
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from worker.demo.dialogue import a_dialogue
from worker.demo.training.family import Family
from worker.demo.training.heads import ContentHeads
from worker.demo.training.rows import MicroBatch, RowMaker
from worker.demo.training.shards import Shard
from worker.demo.training.sight import PictureStream, load_sight, varied

PICTURES, ROWS_PER_PICTURE = 96, 2
WARM_UP_STEPS = 150
LEARNING_RATE = 1.2e-3
FINAL_LEARNING_RATE = 1e-5
#: Part of the learning rate for what stage one has trained: the full rate undoes some of it.
SEEING_PART = 0.35
#: Part of the averaged weights that a step leaves in place.
AVERAGE_DECAY = 0.995
#: The heads of stage one go on guiding, more softly.
HEADS_WEIGHT = 0.2
STEPS_BETWEEN_REPORTS, STEPS_BETWEEN_SAVES, STEPS_BETWEEN_CHECKS = 25, 100, 300

#: How many rows of each kind, relatively.
MIX = {
    "caption": 0.5,
    "prompted": 0.6,
    "continued": 0.4,
    "few-shot": 1.6,
    "answer": 1.8,
    "classify": 1.5,
    "write": 0.8,
    "complete": 0.6,
    "chat": 1.3,
}


class Learner:
    """Model, average, optimizer and step: all that a stopped training needs to go on."""

    def __init__(
        self,
        family: Family,
        tokenizer: PreTrainedTokenizerFast,
        sight: Path,
        saved: Path,
        steps: int,
        seconds: float = math.inf,
    ) -> None:
        torch.manual_seed(1)
        self._family = family
        self.model = family.new_model(tokenizer)
        self.model.set_attn_implementation("eager")
        self.heads = ContentHeads()
        self.steps, self.step, self._saved = steps, 0, saved
        self._seconds, self._spent = seconds, 0.0
        self._maker = RowMaker(family, tokenizer)
        if not saved.exists():
            load_sight(family, self.model, self.heads, sight)
        self._parameters = [*self.model.parameters(), *self.heads.parameters()]
        self._optimizer = torch.optim.AdamW(self._groups(), betas=(0.9, 0.98), weight_decay=0.02)
        self.average = family.new_model(tokenizer)
        self.average.load_state_dict(self.model.state_dict())
        if saved.exists():
            self._resume()

    def learn(self, pictures: Path, check: Callable[[PreTrainedModel, int], None]) -> None:
        """Train to the last step; `check` is shown the averaged model now and then."""
        rng, begun = random.Random(self.step), time.monotonic() - self._spent
        for shard, indices in PictureStream(pictures, seed=1000 + self.step).batches(PICTURES):
            if self.done() >= 1:
                break
            self.step += 1
            loss, seen = self._study(shard, indices, rng)
            self._spent = time.monotonic() - begun
            if self.step % STEPS_BETWEEN_REPORTS == 0:
                print(f"learn {self.step} loss {loss:.3f} thing {seen:.2f}, {self.done():.1%} done", flush=True)
            if self.step % STEPS_BETWEEN_SAVES == 0 or self.done() >= 1:
                self._save()
            if self.step % STEPS_BETWEEN_CHECKS == 0:
                check(self.average, self.step)

    def done(self) -> float:
        """Part of the training that is over, by steps or by time, whichever is further."""
        return max(self.step / self.steps, self._spent / self._seconds)

    def _groups(self) -> list[dict[str, object]]:
        """The parameters for the optimizer: what has learnt to see moves less."""
        seeing = [*self._family.seeing(self.model), self.heads]
        slow = {id(parameter) for module in seeing for parameter in module.parameters()}
        return [
            {"part": 1.0, "params": [each for each in self._parameters if id(each) not in slow]},
            {"part": SEEING_PART, "params": [each for each in self._parameters if id(each) in slow]},
        ]

    def _study(self, shard: Shard, indices: list[int], rng: random.Random) -> tuple[float, float]:
        """One step on new dialogues about these pictures: the text loss, and how many things the heads name."""
        shown = [shard.picture(index) for index in indices]
        kinds = rng.choices(list(MIX), list(MIX.values()), k=PICTURES * ROWS_PER_PICTURE)
        dialogues = [a_dialogue(kind, shown, i % PICTURES, rng, self._family.reply) for i, kind in enumerate(kinds)]
        batches = list(self._maker.micro_batches(self._maker.rows(dialogues)))
        pixels = varied(self._family.pixel_values(shard.pixels[indices]))
        return self._improve(pixels, torch.from_numpy(shard.contents[indices]), batches)

    def _improve(self, pixels: Tensor, contents: Tensor, batches: list[MicroBatch]) -> tuple[float, float]:
        """The images are encoded once, and their gradient is gathered from all rows that look at them."""
        self._set_learning_rate()
        self._optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            latents = self._family.encode_images(self.model, pixels)
        heads_loss, accuracies = self.heads.loss(latents.float(), contents)
        shared = latents.detach().float().requires_grad_()
        total_weight = sum(batch.weights.sum().item() for batch in batches)
        text_loss = 0.0
        for batch in batches:
            loss = self._text_loss(shared, batch) / total_weight
            loss.backward()  # type: ignore[no-untyped-call]
            text_loss += loss.item()
        assert shared.grad is not None
        torch.autograd.backward([latents, HEADS_WEIGHT * heads_loss], [shared.grad.to(latents.dtype), None])
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._move_average()
        return text_loss, accuracies["thing"]

    def _text_loss(self, latents: Tensor, batch: MicroBatch) -> Tensor:
        """Cross-entropy summed over the taught tokens by weight; only these go through the output layer."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = self._family.hidden(self.model, latents, batch)
            taught = batch.weights[:, 1:] > 0
            scores = self.model.lm_head(hidden[:, :-1][taught])
        losses = nn.functional.cross_entropy(scores.float(), batch.ids[:, 1:][taught], reduction="none")
        return (losses * batch.weights[:, 1:][taught]).sum()

    def _set_learning_rate(self) -> None:
        fall = (1 + math.cos(math.pi * min(1.0, self.done()))) / 2
        rate = FINAL_LEARNING_RATE + (LEARNING_RATE - FINAL_LEARNING_RATE) * fall
        for group in self._optimizer.param_groups:
            group["lr"] = group["part"] * rate * min(1.0, self.step / WARM_UP_STEPS)

    @torch.no_grad()
    def _move_average(self) -> None:
        decay = min(AVERAGE_DECAY, self.step / (self.step + 10))
        for mean, now in zip(self.average.parameters(), self.model.parameters(), strict=True):
            mean.lerp_(now, 1 - decay)

    def _save(self) -> None:
        part = self._saved.with_suffix(".part")
        parts = {"model": self.model, "average": self.average, "heads": self.heads, "optimizer": self._optimizer}
        torch.save(
            {name: each.state_dict() for name, each in parts.items()} | {"step": self.step, "spent": self._spent}, part
        )
        part.rename(self._saved)

    def _resume(self) -> None:
        stored = torch.load(self._saved, weights_only=True)
        for name in ("model", "average", "heads"):
            getattr(self, name).load_state_dict(stored[name])
        self._optimizer.load_state_dict(stored["optimizer"])
        self.step, self._spent = int(stored["step"]), float(stored["spent"])
