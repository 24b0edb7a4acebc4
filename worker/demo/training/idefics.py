"""The first bundled model's shape: IDEFICS throughout, three thousand times smaller than idefics-9b."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    BatchFeature,
    GenerationConfig,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsImageProcessor,
    IdeficsProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.models.idefics.image_processing_pil_idefics import IDEFICS_STANDARD_MEAN, IDEFICS_STANDARD_STD

from tasks.payloads import Job
from worker.demo.dialogue import Dialogue
from worker.demo.sayings import expected_reply
from worker.demo.training.family import Family
from worker.demo.training.heads import WIDTH
from worker.demo.training.rows import MicroBatch
from worker.demo.training.shards import IMAGE_SIDE
from worker.demo.training.tokens import train_tokenizer
from worker.jobs.prompts import Prompt, build
from worker.models.idefics1.adapter import render_prompt

#: Multiples of 64: bitsandbytes' 4-bit blocks are that long, and on some CPUs a row must fill them.
VISION_WIDTH = 192
MLP_WIDTH, VISION_MLP_WIDTH = 256, 512
LATENTS = 16


class Idefics(Family):
    """IDEFICS: cross-attention to a resampler's latents, and the published guide's prompts."""

    name = "demo"
    network = IdeficsForVisionText2Text
    mean, std = IDEFICS_STANDARD_MEAN, IDEFICS_STANDARD_STD
    label_end = "\n"
    reply = staticmethod(expected_reply)
    generation = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    steps = (2500, 2200)

    def new_model(self, tokenizer: PreTrainedTokenizerFast) -> IdeficsForVisionText2Text:
        """Untrained. In eval mode for good: in train mode transformers' gated layers take a config for a dropout
        rate."""
        model = IdeficsForVisionText2Text(config(tokenizer.vocab_size)).eval()
        for name, weight in model.named_parameters():
            if "alpha_" in name:
                # Half-open gates: fully open ones drown the text at the start, closed ones learn too slowly.
                nn.init.constant_(weight, 0.5)
        return model

    def seeing(self, model: IdeficsForVisionText2Text) -> Sequence[nn.Module]:
        return model.model.vision_model, model.model.perceiver_resampler

    def encode_images(self, model: IdeficsForVisionText2Text, pixels: Tensor) -> Tensor:
        seen = model.model.vision_model(pixel_values=pixels).last_hidden_state
        latents: Tensor = model.model.perceiver_resampler(seen)
        return latents

    def hidden(self, model: IdeficsForVisionText2Text, latents: Tensor, batch: MicroBatch) -> Tensor:
        # Slot -1 takes the last picture's latents: nothing looks at it.
        hidden: Tensor = model.model(
            input_ids=batch.ids,
            attention_mask=batch.attention,
            perceiver_embeddings=latents[batch.images],
            image_attention_mask=image_mask(batch),
            use_cache=False,
        ).last_hidden_state
        return hidden

    def save_tokenizer(self, folder: Path) -> None:
        train_tokenizer(folder)

    def save_processor(self, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
        images = IdeficsImageProcessor(image_size=IMAGE_SIDE)
        IdeficsProcessor(images, tokenizer).save_pretrained(folder)
        images.save_pretrained(folder)

    def prompt(self, job: Job) -> Prompt:
        return build(job)

    def rendered(self, tokenizer: PreTrainedTokenizerFast, prompt: Prompt) -> str:
        return render_prompt(str(tokenizer.bos_token), prompt)

    def spoken(self, start: str, dialogue: Dialogue) -> str:
        # A blank between words, none after an image.
        return f"{start}{'' if start.endswith('>') else ' '}{dialogue.text}</s>"

    def shown_spans(self, start: str, dialogue: Dialogue) -> Sequence[tuple[int, int]]:
        # The first few-shot example's form cannot be known before it was read.
        spans, position = [], start.find("Assistant:") if dialogue.kind == "few-shot" else 0
        position += dialogue.kind == "few-shot"
        for lead, answer in dialogue.shown:
            position = start.index(lead + answer, position) + len(lead)
            spans.append((position, position + len(answer)))
            position += len(answer)
        return spans

    def inputs(self, processor: ProcessorMixin, prompts: Sequence[Sequence[str | Image.Image]]) -> BatchFeature:
        made: BatchFeature = processor(text=[list(prompt) for prompt in prompts], add_end_of_utterance_token=False)
        return made


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


def image_mask(batch: MicroBatch) -> Tensor:
    """Which image each token attends to: its most recent one. (rows, tokens, images) of 0 and 1."""
    latest = (batch.ids == batch.image_id).cumsum(1) - 1
    return (latest[..., None] == torch.arange(batch.images.shape[1])).long() * batch.attention[..., None]
