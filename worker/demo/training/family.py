"""What training, evaluation and export need to know of a family of models."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BatchFeature, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

from tasks.payloads import Job
from worker.demo.dialogue import Dialogue, Reply
from worker.demo.training import art
from worker.demo.training.rows import MicroBatch
from worker.jobs.prompts import Prompt
from worker.models import BUNDLED


class Family(ABC):
    """A network with its tokenizer, its processor and its form of prompts."""

    #: As in IDEFICS_MODEL.
    name: str
    network: type[PreTrainedModel]
    #: Mean and standard deviation by which a processor normalises each channel of a picture.
    mean: Sequence[float]
    std: Sequence[float]
    #: Follows every label in an answer.
    label_end: str
    #: The right reply of a chat.
    reply: Reply
    #: Special tokens that a checkpoint ships.
    generation: GenerationConfig
    #: Steps of the first stage and of the second.
    steps: tuple[int, int]

    @property
    def checkpoint(self) -> Path:
        """The folder that ships."""
        return BUNDLED[self.name]

    @property
    def work(self) -> Path:
        """The folder of what training writes on the way."""
        return art.WORK / self.name

    def pixel_values(self, pixels: npt.NDArray[np.uint8]) -> Tensor:
        """(n, 64, 64, 3) bytes as the image processor's (n, 3, 64, 64) floats."""
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return ((torch.from_numpy(pixels).float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()

    @abstractmethod
    def new_model(self, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
        """The network as training begins with it."""

    @abstractmethod
    def seeing(self, model: Any) -> Sequence[nn.Module]:
        """The parts that turn a picture into latents, which the first stage trains."""

    @abstractmethod
    def encode_images(self, model: Any, pixels: Tensor) -> Tensor:
        """(n, 3, 64, 64) to (n, 16, 192): what the text model sees of each picture."""

    @abstractmethod
    def hidden(self, model: Any, latents: Tensor, batch: MicroBatch) -> Tensor:
        """The text model's last hidden states (rows, tokens, 192), from the latents (n, 16, 192) of all pictures."""

    @abstractmethod
    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer's files into an empty folder."""

    @abstractmethod
    def save_processor(self, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
        """Write the processor's files into a checkpoint's folder."""

    @abstractmethod
    def prompt(self, job: Job) -> Prompt:
        """The job's prompt in the family's form: texts and references to images."""

    @abstractmethod
    def rendered(self, tokenizer: PreTrainedTokenizerFast, prompt: Prompt) -> str:
        """A prompt's whole text, with the tokens that stand for its pictures."""

    @abstractmethod
    def spoken(self, start: str, dialogue: Dialogue) -> str:
        """The rendered prompt followed by the right answer and its end."""

    @abstractmethod
    def shown_spans(self, start: str, dialogue: Dialogue) -> Sequence[tuple[int, int]]:
        """Where a rendered prompt holds answers that can be taught too: the first character of each, and its end."""

    @abstractmethod
    def inputs(self, processor: ProcessorMixin, prompts: Sequence[Sequence[str | Image.Image]]) -> BatchFeature:
        """The stock processor's tensors for prompts, padded on the left."""
