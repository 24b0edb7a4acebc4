"""Attention over keys and values in blocks by torch's paged FlashAttention kernel, which reads them where they are.

Where it does not run, `self_attention.py` copies the blocks of each row side by side first.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from worker.engine.blocks import BLOCK_TOKENS
from worker.models.layers import causal_mask

varlen_attn: Callable[..., Any] | None
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    # Before torch 2.10.
    varlen_attn = None

logger = logging.getLogger(__name__)

#: FlashAttention 2 takes blocks whose number of tokens is a multiple of this.
KERNEL_BLOCK = 256
#: It takes head sizes that are multiples of 8, up to this.
MAX_HEAD_SIZE = 256
#: Maximum error, as a part of the largest result, that half precision explains.
MAX_ERROR = 0.03
#: Compute capability of the first GPUs that it runs on (Ampere).
FIRST_CAPABILITY = (8, 0)


def block_tokens(device: torch.device, dtype: torch.dtype, head_size: int) -> int:
    """Tokens of a block on this device, for keys and values of this dtype and head size: such that the kernel takes
    them, if it runs there and is right."""
    is_paged = can_page(device, dtype, head_size, KERNEL_BLOCK) and is_right(device, dtype, head_size)
    return KERNEL_BLOCK if is_paged else BLOCK_TOKENS


@torch.inference_mode()
def is_right(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether the kernel's results on this device are those of plain operations. If not, logs a warning."""
    try:
        errors = [
            largest_error(device, dtype, head_size, queries, window) for queries in (1, 3) for window in (None, 100)
        ]
    except RuntimeError as error:
        logger.warning("torch's paged attention fails here, so blocks are copied for attention: %s", error)
        return False
    # NaN is not within the bound either.
    if not all(error < MAX_ERROR for error in errors):
        logger.warning("torch's paged attention is wrong here by %s, so blocks are copied for attention.", errors)
        return False
    return True


def largest_error(
    device: torch.device, dtype: torch.dtype, head_size: int, queries: int, window: int | None = None
) -> float:
    """The kernel's largest error, as a part of the largest result, for random rows of different lengths and two query
    heads for each key head."""
    ends = torch.tensor([KERNEL_BLOCK + 44, 9, 2 * KERNEL_BLOCK], device=device)
    table = torch.tensor([[3, 5], [1, 0], [4, 2]], device=device)
    keys, values = torch.randn(2, 6, KERNEL_BLOCK, 2, head_size, device=device).to(dtype)
    query = torch.randn(len(ends), 4, queries, head_size, device=device).to(dtype)
    found = paged_attention(query, keys, values, PagedRows.of(table, ends, queries, window)).float()
    # (rows, heads, keys, head size), in float32.
    row_keys, row_values = (
        pool[table].flatten(1, 2).transpose(1, 2).repeat_interleave(2, dim=1).float() for pool in (keys, values)
    )
    positions = ends[:, None] + torch.arange(-queries, 0, device=device)
    mask = causal_mask(positions, row_keys.shape[2], window)
    exact = scaled_dot_product_attention(query.float(), row_keys, row_values, mask)
    return float((found - exact).abs().max() / exact.abs().max())


def can_page(device: torch.device, dtype: torch.dtype, head_size: int, block_tokens: int) -> bool:
    """Whether `paged_attention` runs on this device, for keys and values of this dtype and head size in blocks of this
    many tokens."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= FIRST_CAPABILITY
        and dtype in (torch.float16, torch.bfloat16)
        and head_size % 8 == 0
        and head_size <= MAX_HEAD_SIZE
        and block_tokens % KERNEL_BLOCK == 0
        and _takes_block_tables(varlen_attn)
    )


@functools.cache
def _takes_block_tables(kernel: Callable[..., Any] | None) -> bool:
    """Whether torch's function has the parameters that are needed here: since torch 2.13."""
    return kernel is not None and {"block_table", "num_splits"} <= set(inspect.signature(kernel).parameters)


@dataclass(frozen=True)
class PagedRows:
    """The new tokens of a batch's rows, and where the keys are that they attend to; the same for all layers.

    Each row has the same number of new tokens. They are consecutive, and the last of them attends to all keys of its
    row, the one before it to all but the last, and so on.
    """

    #: (rows, width), int32: the blocks of each row in turn, then zeros.
    table: Tensor
    #: (rows,), int32: number of keys of each row, those of the new tokens included.
    ends: Tensor
    #: (rows + 1,), int32: where each row's queries and keys begin among those of all rows.
    query_offsets: Tensor
    key_offsets: Tensor
    #: Maximum keys that a token attends to, itself included; None: no maximum.
    window: int | None

    @classmethod
    def of(cls, table: Tensor, ends: Tensor, queries: int, window: int | None = None) -> PagedRows:
        """From a block table (rows, width), `ends` (rows,), the number of new tokens of each row, and `window`."""
        ends = ends.int()
        offsets = torch.arange(0, (len(table) + 1) * queries, queries, dtype=torch.int32, device=table.device)
        return cls(table.int(), ends, offsets, pad(ends.cumsum(0, dtype=torch.int32), (1, 0)), window)


def paged_attention(query: Tensor, keys: Tensor, values: Tensor, rows: PagedRows) -> Tensor:
    """Attention of new tokens to their row's keys.

    `query` (rows, heads, queries, head size); `keys` and `values` (blocks, block tokens, key heads, head size), for
    which `can_page` is true. Several query heads may share a key head. The result has the shape of `query`. Raises
    RuntimeError while a graph is traced, in which the number of queries and keys would be those of the first call.
    """
    assert varlen_attn is not None, "see can_page"
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise RuntimeError("The paged kernel cannot be traced.")
    count, heads, queries, head_size = query.shape
    # The longest row that the table has room for, since the host does not know the rows' lengths. The kernel ignores
    # what is behind a row's end, and a CUDA graph that is recorded with this number serves all rows of this width.
    most = rows.table.shape[1] * keys.shape[1]
    # With a window, the kernel does not put the heads of a group together, so it gets none that has no effect.
    left = -1 if rows.window is None or rows.window >= most else rows.window - 1
    attended: Tensor = varlen_attn(
        query.transpose(1, 2).reshape(count * queries, heads, head_size),
        keys,
        values,
        rows.query_offsets,
        rows.key_offsets,
        queries,
        most,
        window_size=(left, 0),
        enable_gqa=True,
        seqused_k=rows.ends,
        block_table=rows.table,
        # With more, or without a number, FlashAttention 2 gives wrong results for tables
        # (https://github.com/pytorch/pytorch/issues/194167).
        num_splits=1,
    )
    return attended.view(count, queries, heads, head_size).transpose(1, 2)
