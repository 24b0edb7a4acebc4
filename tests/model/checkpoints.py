"""IDEFICS checkpoints with random weights, for tests of everything that does not depend on what a model knows."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsImageProcessor,
    IdeficsProcessor,
)

from worker.models.loading import DEMO

SIDE = 32
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")


def random_checkpoint(folder: Path, *, use_resampler: bool, seed: int = 0) -> Path:
    """A tiny IDEFICS with the demo's tokenizer, saved in a folder as a hub checkpoint is."""
    folder.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        if (DEMO / name).exists():
            shutil.copy(DEMO / name, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    model = IdeficsForVisionText2Text(_config(len(tokenizer), use_resampler)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            # Wide enough that greedy answers differ from prompt to prompt.
            weight.normal_(0.0, 0.25)
    model.save_pretrained(folder)
    image_processor = IdeficsImageProcessor(image_size=SIDE)
    IdeficsProcessor(image_processor, tokenizer, image_size=SIDE).save_pretrained(folder)
    return folder


def _config(vocabulary: int, use_resampler: bool) -> IdeficsConfig:
    return IdeficsConfig(
        vocab_size=vocabulary - 3,
        additional_vocab_size=3,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        cross_layer_interval=2,
        alpha_type="vector",
        alpha_initializer="ones",
        use_resampler=use_resampler,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        vision_config={
            "embed_dim": 48,
            "image_size": SIDE,
            "patch_size": 8,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        perceiver_config={
            "use_resampler": use_resampler,
            "resampler_n_latents": 8,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 16,
        },
    )
