"""Networks of published checkpoints' shapes with random weights, loaded as a worker loads a checkpoint; what a step and
a prefill cost at least; and what a card can do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoTokenizer,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsImageProcessorPil,
    IdeficsProcessor,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from config.settings import Settings
from tasks.results import ModelInfo
from worker.engine.continuous import ContinuousModel
from worker.engine.generation_rules import NO_RULES
from worker.engine.row import Tokens
from worker.models import DEMO
from worker.models.loading import FAMILIES

#: Pixels of the pictures (width, height).
PICTURE = 640, 480


class Card(NamedTuple):
    """What a card can do by its datasheet: bytes a second of its memory, and operations a second in bfloat16, dense."""

    bandwidth: float
    flops: float


#: By a part of the card's name; the first one that matches.
CARDS = {
    "B200": Card(8.0e12, 2250e12),
    "H200": Card(4.8e12, 989e12),
    "H100 PCIe": Card(2.0e12, 756e12),
    "H100": Card(3.35e12, 989e12),
    "A100": Card(2.0e12, 312e12),
    "L40S": Card(0.864e12, 362e12),
    "L4": Card(0.3e12, 121e12),
    "A10": Card(0.6e12, 125e12),
    "RTX 4090": Card(1.0e12, 165e12),
}


def card(name: str) -> Card | None:
    """The card of this name, if it is known."""
    return next((known for part, known in CARDS.items() if part in name), None)


class Shape(NamedTuple):
    """A checkpoint to make: its network, its processor, and its configuration with this processor."""

    network: type[PreTrainedModel]
    processor: Callable[[], ProcessorMixin]
    config: Callable[[ProcessorMixin], PretrainedConfig]


def _idefics(side: int, vocabulary: int, perceiver: dict[str, Any], vision: dict[str, Any], **text: Any) -> Shape:
    """`side`: pixels of a picture's side."""

    def processor() -> ProcessorMixin:
        return IdeficsProcessor(
            IdeficsImageProcessorPil(image_size=side), AutoTokenizer.from_pretrained(DEMO), image_size=side
        )

    def config(processor: ProcessorMixin) -> PretrainedConfig:
        return IdeficsConfig(
            vocab_size=vocabulary,
            additional_vocab_size=2,
            use_resampler=True,
            qk_layer_norms=True,
            vision_config={"image_size": side, **vision},
            perceiver_config={"qk_layer_norms_perceiver": True, **perceiver},
            **text,
        )

    return Shape(IdeficsForVisionText2Text, processor, config)


def _idefics3(side: int, tiles: int, scale: int, vision: dict[str, Any], **text: Any) -> Shape:
    """`side`: pixels of a frame's side. `tiles`: maximum frames in a row. `scale`: patches of a side that one token
    stands for."""

    def processor() -> ProcessorMixin:
        tokenizer = AutoTokenizer.from_pretrained(DEMO)
        names = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
        tokenizer.add_tokens(["<global-img>", *names])
        images = Idefics3ImageProcessorPil(
            size={"longest_edge": tiles * side}, max_image_size={"longest_edge": side}, do_image_splitting=tiles > 1
        )
        tokens = (side // vision["patch_size"] // scale) ** 2
        return Idefics3Processor(images, tokenizer, image_seq_len=tokens)

    def config(processor: ProcessorMixin) -> PretrainedConfig:
        return Idefics3Config(
            image_token_id=processor.image_token_id,
            scale_factor=scale,
            tie_word_embeddings=False,
            text_config={"model_type": "llama", "max_position_embeddings": 8192, "pad_token_id": 0, **text},
            vision_config={"image_size": side, **vision},
        )

    return Shape(Idefics3ForConditionalGeneration, processor, config)


_SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
_SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
_SMALL_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}

#: By family, as its published checkpoint.
SHAPES = {
    # HuggingFaceM4/idefics-9b
    "idefics": _idefics(
        224,
        32_000,
        {"resampler_n_latents": 64, "resampler_depth": 6, "resampler_n_heads": 16, "resampler_head_dim": 96},
        {"embed_dim": 1280, "patch_size": 14, "intermediate_size": 5120, "num_hidden_layers": 32,
         "num_attention_heads": 16},
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        cross_layer_interval=4,
    ),
    # HuggingFaceM4/Idefics3-8B-Llama3
    "idefics3": _idefics3(
        364, 4, 2, {"patch_size": 14, **_SIGLIP},
        vocab_size=128_259, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    ),
    # HuggingFaceTB/SmolVLM-Instruct
    "smolvlm": _idefics3(
        384, 4, 3, {"patch_size": 14, **_SIGLIP},
        vocab_size=49_155, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32,
        num_key_value_heads=32,
    ),
}  # fmt: skip
#: The same networks, small enough for any machine.
TINY = {
    "idefics": _idefics(
        32,
        1_500,
        {"resampler_n_latents": 8, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 16},
        {"embed_dim": 32, "patch_size": 8, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        **_SMALL,
        cross_layer_interval=2,
    ),
    "idefics3": _idefics3(32, 2, 2, {"patch_size": 8, **_SMALL_VISION}, vocab_size=1_500, num_key_value_heads=2,
                          **_SMALL),
    "smolvlm": _idefics3(24, 1, 3, {"patch_size": 8, **_SMALL_VISION}, vocab_size=1_500, num_key_value_heads=4,
                         **_SMALL),
}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """A family's model, as a worker would serve it."""

    model: ContinuousModel
    network: PreTrainedModel

    @classmethod
    def new(cls, shape: Shape, device: str) -> Measured:
        """Random weights in bfloat16, made where they stay: 9 billion take minutes to make elsewhere."""
        processor = shape.processor()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device(device):
                network = shape.network(shape.config(processor)).eval()
        finally:
            torch.set_default_dtype(torch.float32)
        settings = Settings(model="random", feature_cache_bytes=0, cuda_graphs=False, kv_layout="slots")
        info = ModelInfo(
            id="random", revision=None, family=network.config.model_type, dtype="bfloat16", quantization=None
        )
        model = FAMILIES[network.config.model_type].serve(network, processor, info, settings, NO_RULES)
        assert isinstance(model, ContinuousModel)
        return cls(model, network)

    @property
    def device(self) -> torch.device:
        return self.model.decoder.family.spec.device

    def picture(self, seed: int) -> Any:
        """A picture, scaled for the model, that differs from all others."""
        return self.model.codec.picture(Image.effect_noise(PICTURE, 20 + seed).convert("RGB"))

    def prompt(self, least_tokens: int = 0) -> Tokens:
        """A picture and a text, of this many tokens or a few more."""
        picture, words = self.picture(0), 8
        while True:
            prompt = self.model.codec.prepare([picture, "a picture of a cat " * words])
            if len(prompt.ids) >= least_tokens:
                return prompt
            words *= 2

    def step_bytes(self, rows: int, tokens: int) -> int:
        """The bytes that a step must read at least: the text model's weights once, and the rows' keys and values.
        `tokens`: of each row."""
        spec = self.model.decoder.family.spec
        position = sum(
            2 * kv.layers * kv.heads * kv.head_size * (kv.width or tokens) for kv in (spec.self_kv, *spec.extra)
        )
        weights = sum(parameter.nbytes for parameter in self._text_parameters().values())
        return weights + rows * position * spec.dtype.itemsize

    def prefill_flops(self, prompts: int, tokens: int) -> float:
        """About the operations of a prefill, two for each product and sum: those of the layers' weights, and those of
        each token's attention to the tokens before it. `tokens`: of each prompt."""
        kv = self.model.decoder.family.spec.self_kv
        sizes = {name: parameter.numel() for name, parameter in self._text_parameters().items()}
        head = self.network.get_output_embeddings().weight.numel()
        # The last layer computes keys and values of all tokens, and a state of the last one.
        last = f".{kv.layers - 1}."
        rarely = sum(size for name, size in sizes.items() if last in name and ("mlp" in name or "o_proj" in name))
        heads = self.network.config.get_text_config().num_attention_heads
        attention = 4 * kv.layers * heads * kv.head_size * tokens / 2
        often = sum(sizes.values()) - head - rarely
        return float(prompts * (2 * (head + rarely) + tokens * (2 * often + attention)))

    def _text_parameters(self) -> Mapping[str, torch.nn.Parameter]:
        """The weights that a step multiplies with: not the embeddings, and not what encodes pictures."""
        vision = ("model.vision_model", "model.perceiver_resampler", "model.connector")
        embedding = self.network.get_input_embeddings().weight
        return {
            name: parameter
            for name, parameter in self.network.named_parameters()
            if not name.startswith(vision) and parameter is not embedding
        }

    def stock_inputs(self, rows: int, tokens: int) -> dict[str, Tensor]:
        """Arguments of stock `generate` for prompts of `tokens` tokens. In IDEFICS they show a picture, since a step
        attends to it again; elsewhere a picture's tokens cost what others do."""
        ones = torch.ones(rows, tokens, dtype=torch.long, device=self.device)
        inputs = {"input_ids": ones * 7, "attention_mask": ones}
        if self.model.info.family != "idefics":
            return inputs
        config = self.network.config
        shape = rows, 1, config.perceiver_config.resampler_n_latents, config.vision_config.embed_dim
        features = torch.randn(shape, device=self.device, dtype=torch.bfloat16)
        return {**inputs, "image_attention_mask": ones[..., None], "image_hidden_states": features}
