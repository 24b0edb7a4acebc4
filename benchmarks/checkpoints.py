"""The bundled checkpoint, and mid-size ones with random weights, made when they are needed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import (
    AutoTokenizer,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsImageProcessor,
    IdeficsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from worker.models import DEMO

#: Pixels.
SIDE, FRAME_SIDE = 224, 256


def mid_size(root: Path) -> Path:
    """224-pixel images, 64 latents, hidden size 512, 8 layers; the shipped tokenizer."""
    folder = root / "mid-size"
    tokenizer = _tokenizer(folder)
    torch.manual_seed(0)
    _save(IdeficsForVisionText2Text(_config(len(tokenizer))), folder)
    IdeficsProcessor(IdeficsImageProcessor(image_size=SIDE), tokenizer, image_size=SIDE).save_pretrained(folder)
    return folder


def smolvlm(root: Path) -> Path:
    """SmolVLM's form at a fortieth of its size: a picture is one frame of 64 tokens."""
    return _smolvlm(root / "smolvlm", split=False)


def smolvlm_split(root: Path) -> Path:
    """The same, where a picture of 4:3 is 13 frames of 64 tokens, as it is in SmolVLM-256M."""
    return _smolvlm(root / "smolvlm-split", split=True)


def _smolvlm(folder: Path, *, split: bool) -> Path:
    tokenizer = _tokenizer(folder)
    tokenizer.add_tokens(["<global-img>", *(f"<row_{row}_col_{col}>" for row in range(1, 5) for col in range(1, 5))])
    images = Idefics3ImageProcessorPil(
        do_image_splitting=split,
        size={"longest_edge": (4 if split else 1) * FRAME_SIDE},
        max_image_size={"longest_edge": FRAME_SIDE},
    )
    processor = Idefics3Processor(images, tokenizer, image_seq_len=64)
    torch.manual_seed(0)
    _save(Idefics3ForConditionalGeneration(_smolvlm_config(processor)), folder)
    processor.save_pretrained(folder)
    return folder


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The shipped one, in a new folder."""
    folder.mkdir()
    for path in DEMO.glob("*token*"):
        shutil.copy(path, folder)
    return AutoTokenizer.from_pretrained(folder)


def _save(model: PreTrainedModel, folder: Path) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                # Wide enough that answers differ from prompt to prompt.
                weight.mul_(2.0)
    model.eval().save_pretrained(folder)


def _config(vocabulary: int) -> IdeficsConfig:
    return IdeficsConfig(
        vocab_size=vocabulary - 3,
        additional_vocab_size=3,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        cross_layer_interval=4,
        alpha_type="vector",
        alpha_initializer="ones",
        use_resampler=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        vision_config={
            "embed_dim": 384,
            "image_size": SIDE,
            "patch_size": 16,
            "intermediate_size": 1536,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
        },
        perceiver_config={
            "use_resampler": True,
            "resampler_n_latents": 64,
            "resampler_depth": 2,
            "resampler_n_heads": 6,
            "resampler_head_dim": 64,
        },
    )


def _smolvlm_config(processor: ProcessorMixin) -> Idefics3Config:
    return Idefics3Config(
        image_token_id=processor.image_token_id,
        scale_factor=2,
        tie_word_embeddings=True,
        text_config={
            "model_type": "llama",
            "vocab_size": len(processor.tokenizer),
            "hidden_size": 256,
            "intermediate_size": 704,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "image_size": FRAME_SIDE,
            "patch_size": 16,
        },
    )


class Checkpoint(NamedTuple):
    """Makes a checkpoint in a folder, and the size of the pictures (width, height) that its jobs show; None: as they
    are."""

    make: Callable[[Path], Path]
    picture_size: tuple[int, int] | None = None


CHECKPOINTS = {
    "shipped": Checkpoint(lambda root: DEMO),
    "mid-size": Checkpoint(mid_size),
    "smolvlm": Checkpoint(smolvlm),
    "smolvlm-split": Checkpoint(smolvlm_split, (640, 480)),
}
