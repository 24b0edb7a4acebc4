"""The bundled checkpoint, and a mid-size one with random weights, made when it is needed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsImageProcessor,
    IdeficsProcessor,
)

from worker.models import DEMO

SIDE = 224


def mid_size(root: Path) -> Path:
    """224-pixel images, 64 latents, hidden size 512, 8 layers; the shipped tokenizer."""
    folder = root / "mid-size"
    folder.mkdir()
    for path in DEMO.glob("*token*"):
        shutil.copy(path, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    model = IdeficsForVisionText2Text(_config(len(tokenizer))).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                # Wide enough that answers differ from prompt to prompt.
                weight.mul_(2.0)
    model.save_pretrained(folder)
    IdeficsProcessor(IdeficsImageProcessor(image_size=SIDE), tokenizer, image_size=SIDE).save_pretrained(folder)
    return folder


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


CHECKPOINTS: dict[str, Callable[[Path], Path]] = {"shipped": lambda root: DEMO, "mid-size": mid_size}
