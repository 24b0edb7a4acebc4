"""Attention over keys and values in blocks by torch's paged FlashAttention kernel, which reads them where they are.

Where it does not run, `self_attention.py` copies the blocks of each row side by side first.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from worker.engine.blocks import BLOCK_TOKENS

varlen_attn: Callable[..., Any] | None
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    # Before torch 2.10.
    varlen_attn = None

#: FlashAttention 2 takes blocks whose number of tokens is a multiple of this.
KERNEL_BLOCK = 256
#: It takes head sizes that are multiples of 8, up to this.
MAX_HEAD_SIZE = 256
#: Compute capability of the first GPUs that it runs on (Ampere).
FIRST_CAPABILITY = (8, 0)


def block_tokens(device: torch.device, dtype: torch.dtype, head_size: int) -> int:
    """Tokens of a block on this device, for keys and values of this dtype and head size: such that the kernel takes
    them, if it runs there."""
    return KERNEL_BLOCK if can_page(device, dtype, head_size, KERNEL_BLOCK) else BLOCK_TOKENS


def can_page(device: torch.device, dtype: torch.dtype, head_size: int, block_tokens: int) -> bool:
    """Whether `paged_attention` runs on this device, for keys and values of this dtype and head size in blocks of this
    many tokens."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
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
