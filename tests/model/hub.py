"""Random checkpoints with the file sets of those on the hub: their configs, special tokens at their ids, chat templates
and processor sizes, with tiny networks and tokenizers that know few words."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    Idefics2ForConditionalGeneration,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    IdeficsForVisionText2Text,
    PreTrainedModel,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
)

from tests.model.checkpoints import randomize
from worker.models import DEMO

FAKE, IMAGE, END = "<fake_token_around_image>", "<image>", "<end_of_utterance>"
#: As published, behind what the checkpoint opens its prompts with.
TEMPLATE = (
    "{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
#: What the tokenizers learn their few words from.
CORPUS = [
    "User: Describe this image.\n\nAssistant: A cat on a mat.\nInstruction: Provide an answer to the question. Use the "
    "image to answer.\nQuestion: What is it? Answer: Classify the following image into a single category. Category:"
] * 2
MEAN_OF_CLIP = [0.48145466, 0.4578275, 0.40821073]
STD_OF_CLIP = [0.26862954, 0.26130258, 0.27577711]
HALF = [0.5, 0.5, 0.5]
TINY_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
TINY_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


@dataclass(frozen=True)
class HubCheckpoint:
    """The JSON files of one repository, by name, and how to make the rest of it."""

    network: type[PreTrainedModel]
    tokenizer: Callable[[], Tokenizer]
    files: Mapping[str, Any]

    def save(self, folder: Path, seed: int = 0) -> Path:
        """Write it as a folder."""
        folder.mkdir(parents=True)
        self._write(folder, {"config.json": self.files["config.json"]})
        torch.manual_seed(seed)
        model = self.network(AutoConfig.from_pretrained(folder)).eval()
        randomize(model)
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        self._write(folder, self.files)
        (folder / "tokenizer.json").write_text(_tokenizer_json(self.tokenizer))
        return folder

    def _write(self, folder: Path, files: Mapping[str, Any]) -> None:
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content))

    def with_files(self, **changes: Mapping[str, Any]) -> HubCheckpoint:
        """The same with other values in its files, which are named without `.json`."""
        changed = {f"{name}.json": {**self.files.get(f"{name}.json", {}), **values} for name, values in changes.items()}
        return replace(self, files={**self.files, **changed})


@functools.cache
def _tokenizer_json(make: Callable[[], Tokenizer]) -> str:
    """Of up to 128,000 words, which take a while to make."""
    return make().to_str(pretty=True)


def _tokenizer_config(kind: str, processor: str, special: Iterable[str], **more: Any) -> dict[str, Any]:
    return {
        "additional_special_tokens": list(special),
        "clean_up_tokenization_spaces": False,
        "processor_class": processor,
        "tokenizer_class": kind,
        **more,
    }


def _filled(tokenizer: Tokenizer, first: Iterable[str], words: int, added: Mapping[str, int]) -> Tokenizer:
    """The tokenizer with `first` before its own tokens, filled up to `words`, and `added` tokens by their ids."""
    model = json.loads(tokenizer.to_str())["model"]
    names = [*first, *(word for word in model["vocab"] if word not in first)]
    names += [f"t{number}" for number in range(len(names), words)]
    merges = [tuple(pair) for pair in model["merges"]]
    options = {name: model[name] for name in ("unk_token", "fuse_unk", "byte_fallback") if model[name]}
    tokenizer.model = models.BPE(vocab={name: id for id, name in enumerate(names)}, merges=merges, **options)
    for token in sorted(added, key=added.__getitem__):
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        assert tokenizer.token_to_id(token) == added[token], token
    return tokenizer


def llama_tokenizer(added: Mapping[str, int]) -> Tokenizer:
    """As that of Llama and Mistral: 32,000 pieces of SentencePiece's, of which those of the demo's form words."""
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    return _filled(Tokenizer.from_str(json.dumps(content)), (), 32_000, added)


def _byte_level(split: pre_tokenizers.PreTokenizer) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def llama3_tokenizer() -> Tokenizer:
    """As that of Llama 3: 128,000 words, 256 special tokens, and those of Idefics3 behind them."""
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = _byte_level(pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"), byte_level]))
    named = {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 8: "<|eom_id|>", 9: "<|eot_id|>"}
    special = {named.get(n, f"<|reserved_special_token_{n}|>"): 128_000 + n for n in range(256)}
    tokenizer = _filled(tokenizer, (), 128_000, {**special, FAKE: 128_256, IMAGE: 128_257, END: 128_258})
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 128_000)]
    )
    return tokenizer


def smol_tokenizer(added: Mapping[str, int]) -> Tokenizer:
    """As that of SmolLM: 49,152 words, without a token that opens a text."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = _byte_level(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]))
    first = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer = _filled(tokenizer, first, 49_152, {})
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in first])
    for token in added:
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        assert tokenizer.token_to_id(token) == added[token], token
    return tokenizer


#: One token for the place of each frame, as in the small SmolVLM.
FRAMES = {f"<row_{n // 6 + 1}_col_{n % 6 + 1}>": 49_153 + n for n in range(36)}
SMALL_SMOL_TOKENS = {
    "<global-img>": 49_152,
    **FRAMES,
    FAKE: 49_189,
    IMAGE: 49_190,
    **{f"<|reserved_special_token_{n}|>": 49_191 + n for n in range(88)},
    END: 49_279,
}
LARGE_SMOL_TOKENS = {FAKE: 49_152, IMAGE: 49_153, END: 49_154}
#: What the text part's config carries along from training, unused.
LEFT_OVER = {
    "architectures": ["VLlama3ForCausalLM"],
    "_flash_attn_2_enabled": True,
    "_name_or_path": "None",
    "is_llama_config": True,
    "neftune_noise_alpha": 0.0,
    "perceiver_config": {
        "_attn_implementation_autoset": False,
        "architectures": None,
        "model_type": "vllama3",
        "resampler_depth": 6,
        "resampler_n_latents": 64,
        "tokenizer_class": None,
        "torch_dtype": None,
    },
    "pixel_shuffle_factor": 4,
    "qk_layer_norms": False,
    "rope_interleaved": False,
    "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16", "q4f16": "float16"}},
    "use_resampler": False,
}


def _image_processor(kind: str, size: Mapping[str, int], **more: Any) -> dict[str, Any]:
    return {
        "do_convert_rgb": True,
        "do_image_splitting": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": HALF,
        "image_processor_type": f"{kind}ImageProcessor",
        "image_std": HALF,
        "processor_class": f"{kind}Processor",
        "resample": 1,
        "rescale_factor": 0.00392156862745098,
        "size": dict(size),
        **more,
    }


def _idefics_instruct() -> HubCheckpoint:
    config = {
        "additional_vocab_size": 3,
        "alpha_initializer": "zeros",
        "alpha_type": "float",
        "architectures": ["IdeficsForVisionText2Text"],
        "bos_token_id": 1,
        "cross_layer_interval": 2,
        "eos_token_id": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "max_position_embeddings": 2048,
        "max_sequence_length": 2048,
        "model_type": "idefics",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
        "perceiver_config": {
            "model_type": "idefics",
            "qk_layer_norms_perceiver": True,
            "resampler_depth": 1,
            "resampler_head_dim": 16,
            "resampler_n_heads": 2,
            "resampler_n_latents": 64,
            "use_resampler": True,
        },
        "qk_layer_norms": True,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_resampler": True,
        "vision_config": {
            "embed_dim": 32,
            "hidden_act": "gelu",
            "image_size": 224,
            "intermediate_size": 64,
            "model_type": "idefics",
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "patch_size": 14,
            "vision_model_name": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        },
        "vocab_size": 32_000,
    }
    files = {
        "config.json": config,
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        "preprocessor_config.json": {
            "image_mean": MEAN_OF_CLIP,
            "image_num_channels": 3,
            "image_processor_type": "IdeficsImageProcessor",
            "image_size": 224,
            "image_std": STD_OF_CLIP,
            "processor_class": "IdeficsProcessor",
        },
        "tokenizer_config.json": _tokenizer_config(
            "LlamaTokenizer",
            "IdeficsProcessor",
            [FAKE, IMAGE, END],
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<unk>",
            unk_token="<unk>",
            padding_side="left",
        ),
    }
    tokens = {FAKE: 32_000, IMAGE: 32_001, END: 32_002}
    return HubCheckpoint(IdeficsForVisionText2Text, lambda: llama_tokenizer(tokens), files)


def _idefics2(*, chat: bool) -> HubCheckpoint:
    """The base one knows no `<end_of_utterance>`, which its processor adds to the tokenizer all the same."""
    tokens = {FAKE: 32_000, IMAGE: 32_001} | ({END: 32_002} if chat else {})
    config = {
        "architectures": ["Idefics2ForConditionalGeneration"],
        "image_token_id": 32_001,
        "model_type": "idefics2",
        "perceiver_config": {
            "model_type": "idefics2",
            "num_key_value_heads": 1,
            "resampler_depth": 1,
            "resampler_head_dim": 16,
            "resampler_n_heads": 2,
            "resampler_n_latents": 64,
        },
        "text_config": {
            "max_position_embeddings": 32_768,
            "model_type": "mistral",
            "pad_token_id": 0,
            "rms_norm_eps": 1e-05,
            "vocab_size": 32_000 + len(tokens),
            **TINY_TEXT,
        },
        "torch_dtype": "float32",
        "use_cache": True,
        "vision_config": {**TINY_VISION, "image_size": 980, "model_type": "idefics2", "patch_size": 14},
    }
    processor = {"image_seq_len": 64, "processor_class": "Idefics2Processor"}
    ends = {"bad_words_ids": [[32_000], [32_001]], "eos_token_id": [2, 32_002]} if chat else {"eos_token_id": 2}
    files = {
        "config.json": config,
        "generation_config.json": {"_from_model_config": True, "bos_token_id": 1, "pad_token_id": 0, **ends},
        "preprocessor_config.json": _image_processor(
            "Idefics2", {"longest_edge": 980, "shortest_edge": 378}, resample=2, do_image_splitting=chat
        ),
        "processor_config.json": {**processor, "chat_template": TEMPLATE} if chat else processor,
        "tokenizer_config.json": _tokenizer_config(
            "LlamaTokenizer",
            "Idefics2Processor",
            tokens,
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<unk>",
            unk_token="<unk>",
        ),
    }
    return HubCheckpoint(Idefics2ForConditionalGeneration, lambda: llama_tokenizer(tokens), files)


def _idefics3() -> HubCheckpoint:
    config = {
        "architectures": ["Idefics3ForConditionalGeneration"],
        "image_token_id": 128_257,
        "model_type": "idefics3",
        "scale_factor": 2,
        "text_config": {
            **LEFT_OVER,
            "bos_token_id": 128_000,
            "eos_token_id": [128_001, 128_008, 128_009],
            "max_position_embeddings": 131_072,
            "model_type": "llama",
            "pad_token_id": 128_002,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500_000.0,
            "vocab_size": 128_259,
            **TINY_TEXT,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vision_config": {**TINY_VISION, "image_size": 364, "model_type": "idefics3", "patch_size": 14},
    }
    files = {
        "config.json": config,
        "chat_template.json": {"chat_template": "<|begin_of_text|>" + TEMPLATE},
        "preprocessor_config.json": _image_processor(
            "Idefics3", {"longest_edge": 1456}, max_image_size={"longest_edge": 364}
        ),
        "processor_config.json": {"image_seq_len": 169, "processor_class": "Idefics3Processor"},
        "tokenizer_config.json": _tokenizer_config(
            "PreTrainedTokenizerFast",
            "Idefics3Processor",
            [FAKE, IMAGE, END],
            bos_token="<|begin_of_text|>",
            eos_token="<|end_of_text|>",
            pad_token="<|reserved_special_token_2|>",
        ),
    }
    return HubCheckpoint(Idefics3ForConditionalGeneration, llama3_tokenizer, files)


def _smolvlm(
    network: type[PreTrainedModel],
    kind: str,
    tokens: Mapping[str, int],
    *,
    tile: int,
    patch: int,
    scale: int,
    context: int,
) -> HubCheckpoint:
    """`tile` and `patch`: sides in pixels; `scale`: see `scale_factor`; `context`: positions."""
    config = {
        "architectures": [network.__name__],
        "image_token_id": tokens[IMAGE],
        "model_type": kind.lower(),
        "pad_token_id": 128_002,
        "scale_factor": scale,
        "text_config": {
            **LEFT_OVER,
            "max_position_embeddings": context,
            "model_type": "llama",
            "pad_token_id": 2,
            "rms_norm_eps": 1e-05,
            "rope_theta": 100_000,
            "vocab_size": 49_152 + len(tokens),
            **TINY_TEXT,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_reentrant_checkpointing": False,
        "vision_config": {
            **TINY_VISION,
            "image_size": tile,
            "max_image_size": {"longest_edge": tile},
            "model_type": "idefics3" if kind == "Idefics3" else "smolvlm_vision",
            "patch_size": patch,
            "size": {"longest_edge": 4 * tile},
            "tie_word_embeddings": False,
            "use_base_siglip": True,
        },
        "vocab_size": 49_152 + len(tokens),
    }
    video = {"video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": tile}}}
    names = {
        "end_of_utterance_token": END,
        "fake_image_token": FAKE,
        "global_image_token": "<global-img>",
        "image_token": IMAGE,
    }
    smolvlm2 = kind == "SmolVLM"
    files = {
        "config.json": config,
        "chat_template.json": {"chat_template": "<|im_start|>" + TEMPLATE},
        "generation_config.json": {
            "_from_model_config": True, "bos_token_id": 1, "eos_token_id": tokens[END], "pad_token_id": 2,
        },
        "preprocessor_config.json": _image_processor(
            kind, {"longest_edge": 4 * tile}, max_image_size={"longest_edge": tile}, **(video if smolvlm2 else {})
        ),
        "processor_config.json": {
            "image_seq_len": (tile // patch // scale) ** 2, "processor_class": f"{kind}Processor",
        },
        "tokenizer_config.json": _tokenizer_config(
            "GPT2Tokenizer", f"{kind}Processor", [FAKE, IMAGE, END],
            bos_token="<|im_start|>", eos_token=END, pad_token="<|im_end|>", unk_token="<|endoftext|>",
            model_max_length=context, truncation_side="left",
            **({**names, "extra_special_tokens": names} if smolvlm2 else {}),
        ),
    }  # fmt: skip
    return HubCheckpoint(network, lambda: smol_tokenizer(tokens), files)


SMALL_SMOL = {"tile": 512, "patch": 16, "scale": 4, "context": 8192}
HUB: Mapping[str, HubCheckpoint] = {
    "idefics-9b-instruct": _idefics_instruct(),
    "idefics2-8b": _idefics2(chat=True),
    "idefics2-8b-base": _idefics2(chat=False),
    "Idefics3-8B-Llama3": _idefics3(),
    "SmolVLM-256M-Instruct": _smolvlm(Idefics3ForConditionalGeneration, "Idefics3", SMALL_SMOL_TOKENS, **SMALL_SMOL),
    "SmolVLM-Instruct": _smolvlm(
        Idefics3ForConditionalGeneration, "Idefics3", LARGE_SMOL_TOKENS, tile=384, patch=14, scale=3, context=16_384
    ),
    "SmolVLM2-500M-Video-Instruct": _smolvlm(
        SmolVLMForConditionalGeneration, "SmolVLM", SMALL_SMOL_TOKENS, **SMALL_SMOL
    ),
}


def stock_processor(name: str, folder: Path) -> Any:
    """transformers' own processor of a saved checkpoint, by its name in HUB."""
    if "SmolVLM2" not in name:
        return AutoProcessor.from_pretrained(folder)
    # Its own needs torchvision.
    tokenizer = AutoTokenizer.from_pretrained(folder)
    images = SmolVLMImageProcessorPil.from_pretrained(folder)
    template = HUB[name].files["chat_template.json"]["chat_template"]
    return Idefics3Processor(images, tokenizer, image_seq_len=64, chat_template=template)
