"""The bundled checkpoints, and random ones of every family."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from config.settings import Settings
from tasks import Job
from tests.conftest import PICTURES
from tests.model.checkpoints import TEMPLATE, later_checkpoint, random_checkpoint
from tests.model.jobs import Parts, generated, parts_of
from worker.engine.continuous import ContinuousModel
from worker.engine.stock import StockModel
from worker.images.decode import open_image
from worker.jobs.prompts import build, in_turns
from worker.models import BUNDLED
from worker.models.loading import load

#: Random checkpoints by name: the family, and of the later ones what its chat template opens with, if it has one.
RANDOM = {
    "with resampler": ("idefics", None),
    "without resampler": ("idefics", None),
    "idefics2 base": ("idefics2", None),
    "idefics2 chat": ("idefics2", ""),
    "idefics3 base": ("idefics3", None),
    "idefics3 chat": ("idefics3", "<s>"),
    "smolvlm chat": ("smolvlm", "<s>"),
}
#: What opens the prompts of the bundled ones.
OPENINGS = {"demo": "", "demo-smolvlm": "<|im_start|>"}
#: Random checkpoints of each family.
IN_SLOTS = ["with resampler", "without resampler", "idefics2 chat", "idefics3 base", "smolvlm chat"]
#: Those with their keys and values in slots or in blocks: each layout with both kinds of decoders. `make testall` takes
#: each checkpoint in both.
SERVED = ["with resampler", "without resampler, in blocks", "idefics2 chat, in blocks", "idefics3 base", "smolvlm chat"]
if "EVERY_LAYOUT" in os.environ:
    SERVED = [*IN_SLOTS, *(f"{name}, in blocks" for name in IN_SLOTS)]


#: What stock `generate` said to a job alone, by the job's JSON.
StockAnswers = dict[str, list[int]]
#: By checkpoint: the same weights are loaded for several files and layouts of the cache, and each asks the same jobs.
_STOCK_ANSWERS: dict[str, StockAnswers] = {}


@dataclass(frozen=True)
class Served:
    """A loaded checkpoint, its stock processor, and pictures to show it."""

    settings: Settings
    model: ContinuousModel
    processor: Any
    images: dict[str, Image.Image]
    #: What opens a prompt.
    opening: str = ""
    stock_answers: StockAnswers = field(default_factory=dict)

    @property
    def stock(self) -> StockModel:
        """The model as stock `generate` runs it."""
        return self.model.stock

    @property
    def is_first_family(self) -> bool:
        return self.model.info.family == "idefics"

    def parts(self, job: Job) -> Parts:
        """A job's prompt with its pictures opened, in the form that the checkpoint's codec asks for."""
        return parts_of(job, self.images, in_turns if self.model.codec.has_chat_template else build)

    def stock_inputs(self, parts: Parts) -> Mapping[str, torch.Tensor]:
        """One prompt as transformers' own processor reads it."""
        if self.is_first_family:
            return self.processor(text=[parts], return_tensors="pt", add_end_of_utterance_token=False)  # type: ignore[no-any-return]
        text = self.opening + "".join(part if isinstance(part, str) else "<image>" for part in parts)
        images = [part for part in parts if not isinstance(part, str)]
        return self.processor(  # type: ignore[no-any-return]
            text=[text],
            images=[images] if images else None,
            add_special_tokens=not text.startswith("<s>"),
            return_tensors="pt",
        )

    def stock_ids(self, job: Job, parts: Parts) -> list[int]:
        """The new tokens of transformers' own processor and `generate` for this job alone, up to their end."""
        asked = job.model_dump_json()
        if asked not in self.stock_answers:
            self.stock_answers[asked] = generated(self.model, self.processor, job, self.stock_inputs(parts))
        return self.stock_answers[asked]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", params=SERVED)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """A random checkpoint. A test may ask for a bundled one by its name; these take ten times as long."""
    name, *layout = request.param.split(", in ")
    if name in BUNDLED:
        return _bundled(name)
    return random_model(tmp_path_factory.mktemp("random") / "checkpoint", name, *layout)


@pytest.fixture(scope="session")
def demo() -> Served:
    return _bundled("demo")


def _bundled(name: str) -> Served:
    images = {path.name: open_image(path.read_bytes()) for path in PICTURES.glob("*.png")}
    return _served(name, Settings(model=name, dtype="float32"), BUNDLED[name], images, OPENINGS[name])


def random_model(folder: Path, name: str, kv_layout: Literal["slots", "blocks"] = "slots") -> Served:
    """One of RANDOM, saved in a folder and loaded."""
    family, opening = RANDOM[name]
    if family == "idefics":
        random_checkpoint(folder, use_resampler=name == "with resampler")
    else:
        later_checkpoint(folder, family, None if opening is None else opening + TEMPLATE)
    images = {f"{n}.png": noise(n) for n in range(12)}
    settings = Settings(model=str(folder), dtype="float32", kv_layout=kv_layout)
    return _served(name, settings, folder, images, opening or "")


def _served(name: str, settings: Settings, folder: Path, images: dict[str, Image.Image], opening: str) -> Served:
    model = load(settings)
    assert isinstance(model, ContinuousModel)
    answers = _STOCK_ANSWERS.setdefault(name, {})
    return Served(settings, model, AutoProcessor.from_pretrained(folder), images, opening, answers)


def noise(seed: int) -> Image.Image:
    """A picture like no other."""
    rng = random.Random(seed)
    width, height = rng.randint(20, 90), rng.randint(20, 90)
    return Image.frombytes("RGB", (width, height), rng.randbytes(width * height * 3))
