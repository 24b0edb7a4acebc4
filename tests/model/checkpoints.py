"""Checkpoints with random weights, for tests of everything that does not depend on what a model knows."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics2ImageProcessorPil,
    Idefics2Processor,
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

SIDE = 32
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
#: The later families' own, as published; some open with the tokenizer's first token.
TEMPLATE = (
    "{% for message in messages %}{{message['role'].capitalize()}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def random_checkpoint(folder: Path, *, use_resampler: bool, seed: int = 0) -> Path:
    """A tiny IDEFICS with the demo's tokenizer, saved in a folder as a hub checkpoint is."""
    tokenizer = _tokenizer(folder)
    torch.manual_seed(seed)
    model = IdeficsForVisionText2Text(_config(len(tokenizer), use_resampler)).eval()
    randomize(model)
    model.save_pretrained(folder)
    image_processor = IdeficsImageProcessor(image_size=SIDE)
    IdeficsProcessor(image_processor, tokenizer, image_size=SIDE).save_pretrained(folder)
    return folder


def later_checkpoint(folder: Path, family: str, template: str | None) -> Path:
    """A tiny Idefics2 or Idefics3, whose pictures are cut into frames."""
    tokenizer = _tokenizer(folder)
    torch.manual_seed(0)
    model, processor = (_idefics2 if family == "idefics2" else _idefics3)(tokenizer)
    processor.chat_template = template
    randomize(model.eval())
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _idefics2(tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedModel, ProcessorMixin]:
    images = Idefics2ImageProcessorPil(size={"shortest_edge": 16, "longest_edge": SIDE}, do_image_splitting=True)
    processor = Idefics2Processor(images, tokenizer, image_seq_len=4)
    config = Idefics2Config(
        image_token_id=processor.image_token_id,
        # Shorter than some prompts.
        text_config={"model_type": "mistral", "sliding_window": 48, **_text_config(tokenizer)},
        vision_config=_vision_config(),
        perceiver_config={
            "hidden_size": 64,
            "resampler_n_latents": 4,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 16,
            "num_key_value_heads": 2,
        },
    )
    return Idefics2ForConditionalGeneration(config), processor


def _idefics3(tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer.add_tokens(["<global-img>", *(f"<row_{row}_col_{col}>" for row in (1, 2) for col in (1, 2))])
    images = Idefics3ImageProcessorPil(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4)
    config = Idefics3Config(
        image_token_id=processor.image_token_id,
        scale_factor=2,
        text_config={"model_type": "llama", **_text_config(tokenizer)},
        vision_config=_vision_config(),
    )
    return Idefics3ForConditionalGeneration(config), processor


def _text_config(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _vision_config() -> dict[str, int]:
    return {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": 8,
    }


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    folder.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        if (DEMO / name).exists():
            shutil.copy(DEMO / name, folder)
    return AutoTokenizer.from_pretrained(folder)


def randomize(model: PreTrainedModel) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            # Wide enough that greedy answers differ from prompt to prompt.
            weight.normal_(0.0, 0.25)


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
