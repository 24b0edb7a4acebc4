"""Loads a checkpoint from a hub id or a folder: safetensors only, no remote code.

Pickled weights and a repository's own modules are programs: they are never run, even if a checkpoint's files ask for
it. `FAMILIES` lists the families. One with a fast path has a `Decoder` (`worker/engine/interfaces.py`).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    Idefics2ForConditionalGeneration,
    Idefics2Processor,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    IdeficsForVisionText2Text,
    IdeficsProcessor,
    PreTrainedModel,
    ProcessorMixin,
    SmolVLMForConditionalGeneration,
)

from config.settings import Settings
from tasks.results import ModelInfo
from worker.engine.continuous import ContinuousModel
from worker.engine.cuda_graphs import CudaGraphs
from worker.engine.generation_rules import NO_RULES, GenerationRules, generation_rules
from worker.engine.interfaces import Decoder, Encode, Model
from worker.engine.stock import Adapter, StockModel
from worker.models import SetupFailed, checkpoint_folder
from worker.models.checkpoint import inspect, require_safetensors
from worker.models.encoding import PictureEncoder
from worker.models.idefics1.adapter import IdeficsAdapter
from worker.models.idefics1.decoder import IdeficsDecoder
from worker.models.idefics2_3.adapter import Idefics2And3Adapter
from worker.models.idefics2_3.decoder import MergedDecoder, has_decoder, steady_tokens
from worker.models.idefics2_3.encoder import FrameEncoder
from worker.models.kv_memory import CudaMemory, number_of_blocks
from worker.models.report import devices_of

logger = logging.getLogger(__name__)

#: A full commit hash. A revision of another form is a branch or a tag, which can be moved.
_COMMIT = re.compile(r"[0-9a-f]{40}")

#: Modules that stay in full precision: quantizing them costs more quality than the saved memory is worth. These are
#: full names, since bitsandbytes ignores others.
NOT_QUANTIZED = ["model.vision_model", "model.perceiver_resampler", "model.connector", "lm_head"]


def load(settings: Settings) -> Model:
    """The model that the settings name. Raises SetupFailed."""
    source = str(checkpoint_folder(settings) or settings.model)
    pinned: dict[str, Any] = {
        "revision": settings.model_revision,
        "trust_remote_code": False,
        "local_files_only": settings.offline,
    }
    try:
        return _load(settings, source, pinned)
    except SetupFailed:
        raise
    except (KeyboardInterrupt, SystemExit):
        raise
    except torch.OutOfMemoryError as error:
        raise SetupFailed(
            f"The weights of {settings.model} do not fit on the device: set IDEFICS_QUANTIZATION=8bit or 4bit, or free "
            "memory there."
        ) from error
    except BaseException as error:
        # Errors that a checkpoint's files cause in the libraries would occur again after a restart. Panics of Rust code
        # are not Exceptions.
        raise SetupFailed(
            f"Cannot load {settings.model}: {_text(error)} IDEFICS_MODEL takes a hub id or a folder with safetensors."
            + (" IDEFICS_OFFLINE is on: a hub id must be in the cache already." if settings.offline else "")
        ) from error


def _load(settings: Settings, source: str, pinned: dict[str, Any]) -> Model:
    # Otherwise, if a repository has no safetensors, transformers loads them from a bot's pull request.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    content = inspect(source, **pinned)
    family = FAMILIES.get(str(content.get("model_type")))
    if family is None:
        raise SetupFailed(
            f"{settings.model} is of the family {content.get('model_type')!r}; supported are {', '.join(FAMILIES)}."
        )
    config = AutoConfig.from_pretrained(source, **pinned)  # nosec B615 - pinned as the operator says
    processor = _processor(family.processor, source, pinned)
    require_safetensors(source, **pinned)
    model = family.network.from_pretrained(  # nosec B615
        source,
        config=config,
        **pinned,
        use_safetensors=True,
        dtype=_dtype(settings),
        device_map=device_map_of(settings),
        quantization_config=_quantization(settings),
    )
    rules = _taken_rules(model)
    if checkpoint_folder(settings) is None and not _COMMIT.fullmatch(settings.model_revision or ""):
        commit = _commit(settings)
        logger.warning("%s is not pinned and may change: set IDEFICS_MODEL_REVISION, now %s.", settings.model, commit)
    if rules != NO_RULES:
        logger.info("The generation_config.json of %s applies: %s.", settings.model, asdict(rules))
    return family.serve(model.eval(), processor, _info(settings, model), settings, rules)


def _processor(kind: type[ProcessorMixin], source: str, pinned: dict[str, Any]) -> ProcessorMixin:
    """The family's processor, with Pillow as its backend, since torchvision scales to other pixels.

    For SmolVLM2 this is Idefics3's processor: its own also reads videos, for which it needs torchvision."""
    named, _ = kind.get_processor_dict(source, **pinned)
    images = AutoImageProcessor.from_pretrained(source, **pinned, backend="pil")  # nosec B615
    tokenizer = AutoTokenizer.from_pretrained(source, **pinned)  # nosec B615
    return kind.from_args_and_dict([images, tokenizer], named)


def _text(error: BaseException) -> str:
    text = str(error).strip() if isinstance(error, OSError | ValueError | ImportError) else ""
    return text or f"{type(error).__name__}: {error}."


def _serve_idefics(
    model: PreTrainedModel, processor: ProcessorMixin, info: ModelInfo, settings: Settings, rules: GenerationRules
) -> Model:
    adapter = IdeficsAdapter(model, processor, settings.feature_cache_bytes)
    stock = _stock(adapter, info, settings, rules)
    if _is_spread(model, settings):
        return stock
    return _continuous(stock, IdeficsDecoder(model, adapter.codec.image_id), adapter.encode, settings)


def _serve_idefics2_or_3(
    model: PreTrainedModel, processor: ProcessorMixin, info: ModelInfo, settings: Settings, rules: GenerationRules
) -> Model:
    frames = FrameEncoder(model)
    encoder = PictureEncoder(frames.encode, settings.feature_cache_bytes, model, frames.chunk)
    adapter = Idefics2And3Adapter(model, processor, encoder, steady_tokens(model))
    stock = _stock(adapter, info, settings, rules)
    if not has_decoder(model) or _is_spread(model, settings):
        return stock
    return _continuous(stock, MergedDecoder(model), encoder.features, settings)


def _is_spread(model: PreTrainedModel, settings: Settings) -> bool:
    """Whether a model is spread over several devices. It then runs through transformers' hooks, since our decoders need
    all weights on one device."""
    if len(devices_of(model)) == 1:
        return False
    logger.warning(
        "%s is spread over several devices and runs through transformers' generate, which is slower: "
        "free a GPU that it fits on, or set IDEFICS_QUANTIZATION=4bit.",
        settings.model,
    )
    return True


def _stock(adapter: Adapter, info: ModelInfo, settings: Settings, rules: GenerationRules) -> StockModel:
    # Published checkpoints of Idefics2 forbid the image tokens themselves. Rules take time for each row at each step.
    rules = rules.without_bad_words(adapter.codec.bad_words_ids)
    return StockModel(adapter, info, settings.max_batch_tokens, rules)


def _continuous(stock: StockModel, decoder: Decoder, encode: Encode, settings: Settings) -> ContinuousModel:
    record = CudaGraphs() if settings.cuda_graphs and decoder.spec.device.type == "cuda" else None
    memory = CudaMemory() if decoder.spec.device.type == "cuda" else None
    blocks = number_of_blocks(settings, decoder, encode, stock.codec, memory)
    return ContinuousModel(stock, decoder, encode, settings.prefix_cache_bytes, record, blocks=blocks)


class Family(NamedTuple):
    """How the checkpoints of a `model_type` are loaded and run."""

    network: type[PreTrainedModel]
    processor: type[ProcessorMixin]
    serve: Callable[[PreTrainedModel, ProcessorMixin, ModelInfo, Settings, GenerationRules], Model]


FAMILIES = {
    "idefics": Family(IdeficsForVisionText2Text, IdeficsProcessor, _serve_idefics),
    "idefics2": Family(Idefics2ForConditionalGeneration, Idefics2Processor, _serve_idefics2_or_3),
    "idefics3": Family(Idefics3ForConditionalGeneration, Idefics3Processor, _serve_idefics2_or_3),
    "smolvlm": Family(SmolVLMForConditionalGeneration, Idefics3Processor, _serve_idefics2_or_3),
}


def _taken_rules(model: PreTrainedModel) -> GenerationRules:
    """Take the rules out of a checkpoint's generation config, which keeps special tokens only: stock `generate` would
    apply the rules a second time. Raises UnsupportedGeneration."""
    config = model.generation_config
    rules = generation_rules(config.to_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return rules


def device_map_of(settings: Settings) -> str:
    """The `device_map` for transformers: a device's name, or how to share out the layers."""
    # transformers' `auto` spreads a model over all GPUs that it sees, even one that fits on the first.
    return "sequential" if settings.device_map == "auto" else settings.device_map


def _dtype(settings: Settings) -> torch.dtype | str:
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)  # type: ignore[no-any-return]
    # Half precision is slow on a CPU, and only in float32 is an answer independent of the batch.
    return "auto" if torch.cuda.is_available() else torch.float32


def _quantization(settings: Settings) -> BitsAndBytesConfig | None:
    if settings.quantization == "none":
        return None
    dtype = _dtype(settings)
    return BitsAndBytesConfig(
        load_in_4bit=settings.quantization == "4bit",
        load_in_8bit=settings.quantization == "8bit",
        llm_int8_skip_modules=NOT_QUANTIZED,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else dtype,
    )


def _commit(settings: Settings) -> str | None:
    """The commit that was loaded, which names its folder in the hub's cache; None for a local folder."""
    if checkpoint_folder(settings) is not None:
        return None
    file = try_to_load_from_cache(settings.model, "config.json", revision=settings.model_revision)
    return Path(file).parent.name if isinstance(file, str) else None


def _info(settings: Settings, model: PreTrainedModel) -> ModelInfo:
    return ModelInfo(
        id=settings.model,
        revision=_commit(settings) or settings.model_revision,
        family=model.config.model_type,
        dtype=str(model.dtype).removeprefix("torch."),
        quantization=None if settings.quantization == "none" else settings.quantization,
    )
