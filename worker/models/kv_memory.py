"""How many blocks of keys and values a worker has: on a GPU the memory that is left when all else has what it needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from config.settings import Settings
from worker.engine.blocks import blocks_for
from worker.engine.continuous import PREFILL_TOKENS, ContinuousModel
from worker.engine.decoder import SlotDecoder
from worker.engine.interfaces import CacheSpec, Codec, Decoder, Encode, Model
from worker.engine.label_scorer import LABEL_TOKENS
from worker.engine.pauses import without_pauses
from worker.engine.prefill import PREFILL_CHUNK_TOKENS
from worker.engine.row import Tokens
from worker.engine.scheduler import Limits
from worker.models import SetupFailed

#: Share of the memory left over that becomes blocks. The rest is for CUDA graphs, and for what torch's allocator cannot
#: use.
BLOCKS_SHARE = 0.9
#: Pictures that are encoded together to measure an encoder's memory, and their width and height in pixels.
PICTURES, PICTURE_SIZE = 8, (1600, 1600)


class DeviceMemory(Protocol):
    """Measures a device's memory."""

    def free_bytes(self) -> int:
        """Bytes that this process could allocate."""

    def peak_bytes(self, work: Callable[[], None]) -> int:
        """Bytes that some work needs at most at a time, beside those allocated before."""


class CudaMemory:
    """The memory of torch's current CUDA device."""

    def free_bytes(self) -> int:
        """Bytes that this process could allocate."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def peak_bytes(self, work: Callable[[], None]) -> int:
        """Bytes that some work needs at most at a time, beside those allocated before."""
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def blocks_that_fit(free_bytes: int, reserved_bytes: int, block_bytes: int) -> int:
    """Number of blocks for which there is memory: BLOCKS_SHARE of what is free and not reserved."""
    return max(0, int((free_bytes - reserved_bytes) * BLOCKS_SHARE) // block_bytes)


def layout(settings: Settings, device: torch.device) -> str:
    """The layout of keys and values: `slots` or `blocks`."""
    if settings.kv_layout != "auto":
        return settings.kv_layout
    return "blocks" if device.type == "cuda" else "slots"


def number_of_blocks(
    settings: Settings, decoder: Decoder, encode: Encode, codec: Codec, memory: DeviceMemory | None = None
) -> int:
    """Number of blocks for a loaded checkpoint; 0 if keys and values are kept in slots. Raises SetupFailed.

    `memory`: the device's, measured unless `IDEFICS_KV_BYTES` is set; None for a CPU.
    """
    spec = decoder.spec
    if layout(settings, spec.device) == "slots":
        return 0
    block_bytes = spec.block_tokens * spec.self_kv.position_bytes(spec.dtype)
    if settings.kv_bytes:
        blocks = settings.kv_bytes // block_bytes
    elif memory is None:
        blocks = blocks_for(settings.max_batch_tokens, spec.block_tokens)
    else:
        peak = peak_bytes(memory, decoder, encode, codec)
        reserved = peak + settings.feature_cache_bytes + settings.max_batch_size * extra_bytes(spec)
        blocks = blocks_that_fit(memory.free_bytes(), reserved, block_bytes)
    if blocks < blocks_for(PREFILL_CHUNK_TOKENS, spec.block_tokens):
        raise SetupFailed(
            f"There is memory for the keys and values of {blocks * spec.block_tokens} tokens only: set "
            "IDEFICS_QUANTIZATION=8bit or 4bit, raise IDEFICS_KV_BYTES if it is set, or free memory on the device."
        )
    return blocks


def extra_bytes(spec: CacheSpec) -> int:
    """Bytes of a row in the extra pools."""
    return sum(extra.width * extra.position_bytes(spec.dtype) for extra in spec.extra)


def peak_bytes(memory: DeviceMemory, decoder: Decoder, encode: Encode, codec: Codec) -> int:
    """Bytes that computing needs at most at a time, beside keys and values: to encode pictures, and meanwhile, on
    another stream, to prefill as many tokens as are prefilled at once or to score as many label tokens."""
    picture = Image.linear_gradient("L").resize(PICTURE_SIZE).convert("RGB")
    shown = [codec.picture(picture.rotate(angle)) for angle in range(PICTURES)]
    prompt = codec.prepare([shown[0], "a"])
    rows, token = PREFILL_TOKENS // PREFILL_CHUNK_TOKENS, prompt.ids[-1:]
    text = Tokens(token * PREFILL_CHUNK_TOKENS)
    labels: Sequence[Sequence[int]] = [token * (LABEL_TOKENS // PICTURES + 1)] * PICTURES
    size = decoder.spec.block_tokens
    blocks = rows * blocks_for(len(text.ids), size) + blocks_for(len(prompt.ids) + LABEL_TOKENS, size)
    slots = SlotDecoder(decoder, blocks=blocks)

    features: dict[bytes, Tensor] = {}

    def encode_pictures() -> None:
        features.update(without_pauses(encode(shown)))

    def prefill() -> None:
        taken, _ = slots.prefill([slots.pending(text, None, {})] * rows)
        slots.release(taken)
        shows = slots.pending(prompt, None, features)
        slots.prefill_scored([shows], [token], [labels], [shows.end + LABEL_TOKENS])

    # The encoder has a stream of its own, whose memory torch's allocator does not give to others meanwhile.
    return memory.peak_bytes(encode_pictures) + memory.peak_bytes(prefill)


def batch_limits(model: Model, settings: Settings) -> Limits:
    """See worker.models.start.batch_limits."""
    tokens, in_blocks = settings.max_batch_tokens, 0
    if isinstance(model, ContinuousModel) and model.decoder.cache.block_tokens:
        in_blocks = model.decoder.cache.block_tokens
        if "max_batch_tokens" in settings.model_fields_set:
            in_blocks = min(in_blocks, tokens)
    return Limits(settings.max_batch_size, tokens, in_blocks)
