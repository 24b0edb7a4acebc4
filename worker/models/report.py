"""Facts about a loaded model and what it needs, one per line, for the worker's log and for `python -m worker check`."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from config.settings import Settings
from worker.engine.block_cache import BlockCache
from worker.engine.continuous import ContinuousModel
from worker.engine.interfaces import Codec, Model
from worker.engine.kv_cache import KVCache
from worker.engine.stock import StockModel
from worker.models.paged_attention import can_page

#: Width and height in pixels of the pictures whose tokens are counted.
SHAPES = {"wide": (640, 480), "square": (640, 640)}
#: Share of the memory left beside the weights that a full batch's keys and values may take; activations need the rest.
BATCH_SHARE = 0.8


def report(model: Model, settings: Settings, max_prompt_tokens: int) -> list[str]:
    """The lines of the report. `max_prompt_tokens`: maximum tokens of a prompt, as row_builder.prompt_bound returns."""
    info = model.info
    tokens = {name: _picture_tokens(model.codec, *size) for name, size in SHAPES.items()}
    facts = [
        ("Model", f"{info.id} at {info.revision}" if info.revision else info.id),
        ("Family", f"{info.family}, {info.quantization or info.dtype}"),
        ("Engine", _engine(model)),
        *_memory(model, settings),
        ("Picture", ", ".join(f"{count} tokens {shape}" for shape, count in tokens.items())),
        ("Prompt", f"at most {max_prompt_tokens:,} tokens, pictures included"),
    ]
    return [f"{name:<8} {text}" for name, text in facts]


def devices_of(network: PreTrainedModel) -> list[torch.device]:
    """The devices of a network's weights, the first one's first. `meta` stands for weights that are on no device, and
    are copied to one whenever they are used."""
    return list(dict.fromkeys(parameter.device for parameter in network.parameters()))


def _engine(model: Model) -> str:
    if isinstance(model, ContinuousModel):
        return f"continuous batching, {_layout(model.decoder.cache)}"
    is_spread = len(devices_of(_stock(model).adapter.model)) > 1
    reason = ", since the weights are on several devices" if is_spread else ""
    return f"transformers' generate: no continuous batching, no prefix cache{reason}"


def _layout(cache: KVCache) -> str:
    """Where keys and values are, and how attention reads them."""
    if not isinstance(cache, BlockCache):
        return "keys and values in slots"
    spec = cache.spec
    is_paged = can_page(spec.device, spec.dtype, spec.self_kv.head_size, spec.block_tokens)
    reading = "read by torch's paged kernel" if is_paged else "gathered at each step"
    return f"keys and values in blocks of {spec.block_tokens} tokens, {reading}"


def _stock(model: Model) -> StockModel:
    stock = model.stock if isinstance(model, ContinuousModel) else model
    assert isinstance(stock, StockModel)
    return stock


def _memory(model: Model, settings: Settings) -> Iterator[tuple[str, str]]:
    network = _stock(model).adapter.model
    devices = devices_of(network)
    total, weights, token = sum(map(_device_bytes, devices)), _weight_bytes(network), kv_bytes(network)
    yield "Device", f"{', '.join(map(_device_name, devices))}, {_size(total)}"
    yield "Weights", _size(weights)
    if isinstance(model, ContinuousModel) and model.decoder.cache.block_tokens:
        cache = model.decoder.cache
        size, kept = cache.spec.block_tokens, _size(token * cache.block_tokens)
        yield "K/V", f"{_size(token)} a token, {cache.block_tokens // size:,} blocks of {size} tokens, {kept}"
        return
    batch = token * settings.max_batch_tokens
    yield "K/V", f"{_size(token)} a token, {_size(batch)} for IDEFICS_MAX_BATCH_TOKENS={settings.max_batch_tokens}"
    if batch > BATCH_SHARE * (total - weights):
        fitting = max(1, int(BATCH_SHARE * (total - weights) / token))
        yield "Warning", f"a full batch may not fit on the device: set IDEFICS_MAX_BATCH_TOKENS={fitting} or lower"


def kv_bytes(network: PreTrainedModel) -> int:
    """Bytes of one token's keys and values in all layers."""
    text = network.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * size * network.dtype.itemsize)


def _weight_bytes(network: PreTrainedModel) -> int:
    # Keyed by identity, so that tied weights count once.
    tensors: dict[int, Tensor] = {id(each): each for each in (*network.parameters(), *network.buffers())}
    return sum(each.nbytes for each in tensors.values())


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "meta":
        return "weights offloaded to memory or disk"
    return f"{device.type}, {torch.get_num_threads()} of torch's threads"


def _device_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type == "meta":
        return 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _size(size: float) -> str:
    """A number of bytes with its unit, such as `6.14 kB`."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1_000:
            return f"{size:.3g} {unit}"
        size /= 1_000
    return f"{size:,.1f} GB"


def _picture_tokens(codec: Codec, width: int, height: int) -> int:
    """Tokens that a picture of this size in pixels adds to a prompt."""
    picture = codec.picture(Image.linear_gradient("L").resize((width, height)).convert("RGB"))
    return len(codec.prepare([picture, "a"]).ids) - len(codec.prepare(["a"]).ids)
