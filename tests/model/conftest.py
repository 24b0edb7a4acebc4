"""The bundled checkpoint, and random ones with and without a resampler."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from config.settings import Settings
from tests.conftest import PICTURES
from tests.model.checkpoints import random_checkpoint
from worker.engine.continuous import ContinuousModel
from worker.images.decode import open_image
from worker.models import DEMO
from worker.models.loading import load


@dataclass(frozen=True)
class Served:
    """A loaded checkpoint, its stock processor, and pictures to show it."""

    model: ContinuousModel
    processor: object
    images: dict[str, Image.Image]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", params=["demo", "random with resampler", "random without resampler"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    if request.param == "demo":
        return _served("demo", DEMO, {path.name: open_image(path.read_bytes()) for path in PICTURES.glob("*.png")})
    folder = tmp_path_factory.mktemp("random") / "checkpoint"
    random_checkpoint(folder, use_resampler="without" not in request.param)
    return _served(str(folder), folder, {f"{n}.png": noise(n) for n in range(12)})


@pytest.fixture(scope="session")
def demo(request: pytest.FixtureRequest) -> Served:
    return _served("demo", DEMO, {path.name: open_image(path.read_bytes()) for path in PICTURES.glob("*.png")})


def _served(name: str, folder: Path, images: dict[str, Image.Image]) -> Served:
    model = load(Settings(model=name, dtype="float32"))
    assert isinstance(model, ContinuousModel)
    return Served(model, AutoProcessor.from_pretrained(folder), images)


def noise(seed: int) -> Image.Image:
    """A picture like no other."""
    rng = random.Random(seed)
    width, height = rng.randint(20, 90), rng.randint(20, 90)
    return Image.frombytes("RGB", (width, height), rng.randbytes(width * height * 3))
