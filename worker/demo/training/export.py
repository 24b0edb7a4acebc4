"""Writes what ships: the checkpoint in a hub checkpoint's form, the golden check, and the pictures."""

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image
from transformers import AutoTokenizer, PreTrainedModel

from worker.demo import golden
from worker.demo.dialogue import everything
from worker.demo.training import art
from worker.demo.training.evaluate import Case, Speaker, is_right, said_by
from worker.demo.training.family import Family
from worker.demo.training.shards import sprite
from worker.demo.world import CATEGORIES, COLORS, THINGS, TRAIN_STYLES, Scene, compose

#: Of the golden picture.
GOLDEN_STYLE = "noto"

SHIPPED_PICTURES = 36


def save_checkpoint(family: Family, model: PreTrainedModel, tokenizer: Path) -> None:
    """Replace the family's folder in one go, so that who loads it meanwhile finds it whole."""
    folder = family.checkpoint
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    # A copy, in the stock attention: what was fast for training is not what a checkpoint should ask for.
    shipped = family.network(type(model.config).from_dict(model.config.to_dict()))
    shipped.load_state_dict(model.state_dict())
    shipped.generation_config = family.generation
    shipped.half().save_pretrained(part)
    (part / "model.safetensors").chmod(0o644)
    family.save_processor(AutoTokenizer.from_pretrained(tokenizer), part)
    for file in tokenizer.iterdir():
        shutil.copy(file, part / file.name)
    _sample(golden.SHOWN, GOLDEN_STYLE, random.Random("golden")).image.save(part / golden.FILE, optimize=True)
    _swap(part, folder)
    golden.save(folder)


def _swap(part: Path, folder: Path) -> None:
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


@dataclass(frozen=True)
class Sample:
    """A composed picture that may ship."""

    picture: Scene
    style: str
    image: Image.Image

    @property
    def file(self) -> str:
        name = self.picture.thing.replace(" ", "-")
        return f"{self.picture.count}-{name}-{self.picture.background}-{self.style}.png"

    def entry(self) -> dict[str, str | int]:
        """Its line in pictures.json."""
        return {
            "file": self.file,
            "name": self.picture.thing,
            "category": THINGS[self.picture.thing].category,
            "background": self.picture.background,
            "count": self.picture.count,
        }


def save_pictures(speaker: Speaker, folder: Path) -> int:
    """Compose the pictures that ship; answer how many were passed over because of a wrong answer."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    rng, tried = random.Random("shipped"), 0
    chosen: list[Sample] = []
    while len(chosen) < SHIPPED_PICTURES:
        sample = _next_sample(chosen, rng)
        tried += 1
        examples = chosen[-2:] or [_sample(golden.SHOWN, GOLDEN_STYLE, random.Random("golden"))]
        if all(knows(speaker, sample, example) for example in examples):
            chosen.append(sample)
            sample.image.save(part / sample.file, optimize=True)
    (part / "pictures.json").write_text(json.dumps([each.entry() for each in chosen], indent=2) + "\n")
    _swap(part, folder)
    return tried - len(chosen)


def _next_sample(chosen: Sequence[Sample], rng: random.Random) -> Sample:
    """Every category, colour, style and count comes in turn; the thing is drawn, and none comes twice."""
    index, used = len(chosen), {each.picture.thing for each in chosen}
    category, color = CATEGORIES[index % len(CATEGORIES)], list(COLORS)[index % len(COLORS)]
    free = [name for name, thing in THINGS.items() if thing.category == category and name not in used]
    style = TRAIN_STYLES[(index + index // len(CATEGORIES)) % len(TRAIN_STYLES)]
    return _sample(Scene(rng.choice(free), color, 1 + (index + index // len(COLORS)) % 2), style, rng)


def _sample(picture: Scene, style: str, rng: random.Random) -> Sample:
    return Sample(picture, style, compose(picture, partial(sprite, style, side=art.SPRITE_SIDE), rng))


def knows(speaker: Speaker, sample: Sample, example: Sample) -> bool:
    """True where the model answers everything about the sample word for word."""
    images = (sample.image, example.image)
    cases = [Case(dialogue, images) for dialogue in everything(sample.picture, example.picture, speaker.family.reply)]
    return all(is_right(case, said) for case, said in said_by(speaker, cases)) and all(
        speaker.choose(case) == case.dialogue.text.strip() for case in cases if case.dialogue.kind == "classify"
    )
