"""The second bundled model's shape: SmolVLM-256M-Instruct, sixty times smaller."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    BatchFeature,
    GenerationConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    IdeficsForVisionText2Text,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from tasks.payloads import Job
from tasks.protocol import END_OF_UTTERANCE
from worker.demo.dialogue import Dialogue
from worker.demo.sayings import short_reply
from worker.demo.training.family import Family
from worker.demo.training.heads import WIDTH
from worker.demo.training.idefics import VISION_MLP_WIDTH, VISION_WIDTH, Idefics
from worker.demo.training.rows import MicroBatch
from worker.demo.training.shards import IMAGE_SIDE
from worker.demo.training.warm_start import take_over_text, take_over_vision
from worker.jobs.prompts import Prompt, in_turns
from worker.models import BUNDLED
from worker.models.tokenizer import FAKE, IMAGE

MLP_WIDTH = 384
PATCH_SIDE, SCALE = 8, 2
IMAGE_TOKENS = (IMAGE_SIDE // PATCH_SIDE // SCALE) ** 2
HEADS, KV_HEADS = 6, 2
CONTEXT = 2048

#: Their ids are 0 to 2, as in SmolVLM, in place of Llama's `<unk>`, `<s>` and `</s>`.
UNKNOWN, OPENING, PADDING = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
GLOBAL = "<global-img>"
#: After the word pieces, in SmolVLM's order.
ADDITIONAL_TOKENS = (
    GLOBAL,
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
    FAKE,
    IMAGE,
    END_OF_UTTERANCE,
)
PIECES = 1400
PICTURE = f"{FAKE}{GLOBAL}{IMAGE * IMAGE_TOKENS}{FAKE}"
#: As published with SmolVLM-256M-Instruct.
CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_SAID = re.compile(rf"Assistant:( .*?{re.escape(END_OF_UTTERANCE)})", re.DOTALL)


def _id(token: str) -> int:
    """Of an additional token."""
    return PIECES + ADDITIONAL_TOKENS.index(token)


class SmolVlm(Family):
    """SmolVLM: a picture's tokens among those of the text, grouped queries, and chat turns."""

    name = "demo-smolvlm"
    network = Idefics3ForConditionalGeneration
    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    label_end = END_OF_UTTERANCE
    reply = staticmethod(short_reply)
    generation = GenerationConfig(bos_token_id=1, eos_token_id=_id(END_OF_UTTERANCE), pad_token_id=2)
    steps = (1400, 500)

    def new_model(self, tokenizer: PreTrainedTokenizerFast) -> Idefics3ForConditionalGeneration:
        """With the first bundled model's weights where they fit."""
        model = Idefics3ForConditionalGeneration(config(len(tokenizer))).eval()
        first = IdeficsForVisionText2Text.from_pretrained(BUNDLED[Idefics.name], dtype=torch.float32)
        take_over_vision(model, first, seen_as=(Idefics.mean, Idefics.std), sees_as=(self.mean, self.std))
        take_over_text(model, first, [_id(token) for token in (FAKE, IMAGE, END_OF_UTTERANCE)])
        return model

    def seeing(self, model: Idefics3ForConditionalGeneration) -> Sequence[nn.Module]:
        return model.model.vision_model, model.model.connector

    def encode_images(self, model: Idefics3ForConditionalGeneration, pixels: Tensor) -> Tensor:
        latents: Tensor = model.model.connector(model.model.vision_model(pixel_values=pixels).last_hidden_state)
        return latents

    def hidden(self, model: Idefics3ForConditionalGeneration, latents: Tensor, batch: MicroBatch) -> Tensor:
        text = model.model.text_model
        embedded = text.embed_tokens(batch.ids)
        # Each row's pictures in order, without the slots that it does not use.
        shown = latents[batch.images[batch.images >= 0]].to(embedded.dtype)
        embedded = embedded.masked_scatter((batch.ids == batch.image_id)[..., None], shown)
        hidden: Tensor = text(inputs_embeds=embedded, attention_mask=batch.attention, use_cache=False).last_hidden_state
        return hidden

    def save_tokenizer(self, folder: Path) -> None:
        content = json.loads((BUNDLED[Idefics.name] / "tokenizer.json").read_text())
        names = dict(zip(("<unk>", "<s>", "</s>"), (UNKNOWN, OPENING, PADDING), strict=True))
        content["model"]["vocab"] = {names.get(piece, piece): id for piece, id in content["model"]["vocab"].items()}
        content["model"]["unk_token"] = UNKNOWN
        content["post_processor"] = None
        added = [*zip(names.values(), range(3), strict=True), *((token, _id(token)) for token in ADDITIONAL_TOKENS)]
        like = content["added_tokens"][0]
        content["added_tokens"] = [{**like, "id": id, "content": token} for token, id in added]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        _write(folder, "tokenizer_config", _TOKENIZER)
        _write(folder, "special_tokens_map", _SPECIAL)

    def save_processor(self, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
        _write(folder, "preprocessor_config", _IMAGES)
        _write(folder, "processor_config", {"image_seq_len": IMAGE_TOKENS, "processor_class": "Idefics3Processor"})
        _write(folder, "chat_template", {"chat_template": CHAT_TEMPLATE})

    def prompt(self, job: Job) -> Prompt:
        return in_turns(job)

    def rendered(self, tokenizer: PreTrainedTokenizerFast, prompt: Prompt) -> str:
        return OPENING + "".join(part if isinstance(part, str) else PICTURE for part in prompt)

    def spoken(self, start: str, dialogue: Dialogue) -> str:
        answer = dialogue.text.removesuffix(END_OF_UTTERANCE).removesuffix("\n")
        return f"{start}{'' if start.endswith('>') else ' '}{answer}{END_OF_UTTERANCE}"

    def shown_spans(self, start: str, dialogue: Dialogue) -> Sequence[tuple[int, int]]:
        # The first few-shot example's form cannot be known before it was read.
        return [found.span(1) for found in _SAID.finditer(start)][dialogue.kind == "few-shot" :]

    def inputs(self, processor: ProcessorMixin, prompts: Sequence[Sequence[str | Image.Image]]) -> BatchFeature:
        texts = [OPENING + "".join(part if isinstance(part, str) else IMAGE for part in prompt) for prompt in prompts]
        images = [[part for part in prompt if not isinstance(part, str)] for prompt in prompts]
        made: BatchFeature = processor(
            text=texts, images=images, padding=True, padding_side="left", return_tensors="pt"
        )
        return made


def config(vocab_size: int) -> Idefics3Config:
    """The checkpoint's configuration. `vocab_size`: word pieces and additional tokens."""
    return Idefics3Config(
        image_token_id=_id(IMAGE),
        scale_factor=SCALE,
        tie_word_embeddings=False,
        pad_token_id=2,
        text_config={
            "model_type": "llama",
            "vocab_size": vocab_size,
            "hidden_size": WIDTH,
            "intermediate_size": MLP_WIDTH,
            "num_hidden_layers": 6,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": WIDTH // HEADS,
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": 1e-6,
            "bos_token_id": 1,
            "eos_token_id": _id(END_OF_UTTERANCE),
            "pad_token_id": 2,
            "tie_word_embeddings": False,
        },
        vision_config={
            "model_type": "idefics3_vision",
            "hidden_size": VISION_WIDTH,
            "image_size": IMAGE_SIDE,
            "patch_size": PATCH_SIDE,
            "intermediate_size": VISION_MLP_WIDTH,
            "num_hidden_layers": 5,
            "num_attention_heads": 6,
            "hidden_act": "gelu",
        },
    )


_SPECIAL = {
    "additional_special_tokens": [FAKE, IMAGE, END_OF_UTTERANCE],
    "bos_token": OPENING,
    "eos_token": END_OF_UTTERANCE,
    "pad_token": PADDING,
    "unk_token": UNKNOWN,
}
_TOKENIZER = {
    **_SPECIAL,
    "clean_up_tokenization_spaces": False,
    "model_max_length": CONTEXT,
    "processor_class": "Idefics3Processor",
    "tokenizer_class": "PreTrainedTokenizerFast",
    "truncation_side": "left",
}
_IMAGES = {
    "do_convert_rgb": True,
    "do_image_splitting": False,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": SmolVlm.mean,
    "image_processor_type": "Idefics3ImageProcessor",
    "image_std": SmolVlm.std,
    "max_image_size": {"longest_edge": IMAGE_SIDE},
    "processor_class": "Idefics3Processor",
    # Bicubic, as the pictures of training; SmolVLM's is 1.
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"longest_edge": IMAGE_SIDE},
}


def _write(folder: Path, name: str, content: Mapping[str, object]) -> None:
    (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
