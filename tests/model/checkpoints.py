"""Checkpoints with random weights, for tests of everything that does not depend on what a model knows."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
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

#: Idefics3's text model is Llama 3: its rotary embedding is stretched. This one has the biases that a Llama may have.
LLAMA3: Mapping[str, Any] = {
    "attention_bias": True,
    "mlp_bias": True,
    "max_position_embeddings": 1024,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


#: Holds each checkpoint that was made, until this process ends. Tests get copies: these take a tenth of the time.
_ORIGINALS = tempfile.TemporaryDirectory(prefix="idefics-checkpoints-")


def random_checkpoint(folder: Path, *, use_resampler: bool, seed: int = 0) -> Path:
    """A tiny IDEFICS with the demo's tokenizer, saved in a folder as a hub checkpoint is."""
    return shutil.copytree(_random_original(use_resampler, seed), folder)


def later_checkpoint(folder: Path, family: str, template: str | None) -> Path:
    """A tiny Idefics2, Idefics3 or SmolVLM, whose pictures are cut into frames."""
    return shutil.copytree(_later_original(family, template), folder)


def _new_folder() -> Path:
    return Path(tempfile.mkdtemp(dir=_ORIGINALS.name)) / "checkpoint"


@functools.cache
def _random_original(use_resampler: bool, seed: int) -> Path:
    folder = _new_folder()
    tokenizer = _tokenizer(folder)
    torch.manual_seed(seed)
    model = IdeficsForVisionText2Text(_config(len(tokenizer), use_resampler)).eval()
    randomize(model)
    model.save_pretrained(folder)
    image_processor = IdeficsImageProcessor(image_size=SIDE)
    IdeficsProcessor(image_processor, tokenizer, image_size=SIDE).save_pretrained(folder)
    return folder


@functools.cache
def _later_original(family: str, template: str | None) -> Path:
    folder = _new_folder()
    tokenizer = _tokenizer(folder)
    torch.manual_seed(0)
    model, processor = _FAMILIES[family](tokenizer)
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
    processor = _idefics3_processor(tokenizer)
    config = Idefics3Config(**_idefics3_config(processor, LLAMA3))
    return Idefics3ForConditionalGeneration(config), processor


def _smolvlm(tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedModel, ProcessorMixin]:
    processor = _idefics3_processor(tokenizer)
    # Four heads of queries for one of keys, and heads of another size than usual: not 64 / 8.
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 6}
    config = SmolVLMConfig(**_idefics3_config(processor, heads), tie_word_embeddings=True)
    return SmolVLMForConditionalGeneration(config), processor


def _idefics3_processor(tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
    tokenizer.add_tokens(["<global-img>", *(f"<row_{row}_col_{col}>" for row in (1, 2) for col in (1, 2))])
    images = Idefics3ImageProcessorPil(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    return Idefics3Processor(images, tokenizer, image_seq_len=4)


def _idefics3_config(processor: ProcessorMixin, text: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "image_token_id": processor.image_token_id,
        "scale_factor": 2,
        "text_config": {"model_type": "llama", **_text_config(processor.tokenizer), **text},
        "vision_config": _vision_config(),
    }


_FAMILIES = {"idefics2": _idefics2, "idefics3": _idefics3, "smolvlm": _smolvlm}


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
