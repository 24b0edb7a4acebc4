"""Attention over keys and values in blocks of a shared pool: by torch's paged FlashAttention kernel where it applies,
otherwise by gathering each row's blocks.

A pool has the shape (blocks, block size, key heads, head size). A row's block table names the blocks that hold its
positions in turn; entries behind them are 0, a block to whose content no real token attends.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from worker.models.layers import Attend

varlen_attn: Callable[..., Any] | None
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    # Before torch 2.10.
    varlen_attn = None

#: FlashAttention 2 takes blocks whose size is a multiple of this. So a pool on a GPU should have such blocks.
KERNEL_BLOCK = 256
#: It takes head sizes that are multiples of 8, up to this.
MAX_HEAD_SIZE = 256
#: Compute capability of the first GPUs that it runs on (Ampere).
FIRST_CAPABILITY = (8, 0)


def can_page(device: torch.device, dtype: torch.dtype, head_size: int, block_size: int) -> bool:
    """Whether `paged_attention` runs on this device, for pools of this dtype, head size and block size."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= FIRST_CAPABILITY
        and dtype in (torch.float16, torch.bfloat16)
        and head_size % 8 == 0
        and head_size <= MAX_HEAD_SIZE
        and block_size % KERNEL_BLOCK == 0
        and _takes_block_tables(varlen_attn)
    )


def _takes_block_tables(kernel: Callable[..., object] | None) -> bool:
    """Whether torch's function has the parameters that are needed here: since torch 2.13."""
    return kernel is not None and {"block_table", "num_splits"} <= set(inspect.signature(kernel).parameters)


@dataclass(frozen=True)
class PagedRows:
    """The new tokens of a batch's rows, and where the keys are that they attend to; the same for all layers.

    Each row has the same number of new tokens. They are consecutive, and the last of them attends to all keys of its
    row, the one before it to all but the last, and so on.
    """

    #: (rows, width), int64: the blocks of each row in turn, then zeros.
    table: Tensor
    #: (rows,): number of keys of each row, those of the new tokens included; at most width times the block size.
    ends: Tensor
    #: New tokens of each row.
    queries: int
    #: The same as int32 tensors, as the kernel takes them: the table, the ends, and where each row's queries and keys
    #: begin among those of all rows, each (rows + 1,).
    kernel_table: Tensor
    kernel_ends: Tensor
    query_offsets: Tensor
    key_offsets: Tensor

    @classmethod
    def of(cls, table: Tensor, ends: Tensor, queries: int) -> PagedRows:
        """From a block table (rows, width) and `ends` (rows,). `queries`: new tokens of each row."""
        rows = table.shape[0]
        offsets = torch.arange(0, (rows + 1) * queries, queries, dtype=torch.int32, device=table.device)
        kernel_ends = ends.int()
        key_offsets = torch.nn.functional.pad(kernel_ends.cumsum(0, dtype=torch.int32), (1, 0))
        return cls(table, ends, queries, table.int(), kernel_ends, offsets, key_offsets)


def paged_attention(query: Tensor, keys: Tensor, values: Tensor, rows: PagedRows, window: int | None = None) -> Tensor:
    """Attention of new tokens to their row's keys by torch's kernel, which reads the blocks where they are.

    `query` (rows, heads, queries, head size); `keys` and `values` (blocks, block size, key heads, head size): pools for
    which `can_page` is true. Several query heads may share a key head. `window`: maximum keys that a token attends to,
    itself included. The result has the shape of `query`.
    """
    assert varlen_attn is not None, "see can_page"
    count, heads, queries, head_size = query.shape
    # The longest row that the table has room for. The kernel ignores keys behind it, and a graph that is recorded with
    # it serves all rows of this width.
    most = rows.table.shape[1] * keys.shape[1]
    # With a window the kernel is slower for a single query: it does not put the heads of a group together.
    left = -1 if window is None or window >= most else window - 1
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
        seqused_k=rows.kernel_ends,
        block_table=rows.kernel_table,
        # With more, or without a number, FlashAttention 2 gives wrong results for tables
        # (https://github.com/pytorch/pytorch/issues/194167).
        num_splits=1,
    )
    return attended.view(count, queries, heads, head_size).transpose(1, 2)


def gathered_attention(
    query: Tensor, keys: Tensor, values: Tensor, rows: PagedRows, attend: Attend, window: int | None = None
) -> Tensor:
    """The same as `paged_attention`, on any device and in any dtype: copies the blocks of each row side by side first.

    `attend`: takes as many key heads as the pools have.
    """
    row_keys, row_values = gathered(keys, rows.table), gathered(values, rows.table)
    offsets = torch.arange(rows.queries, device=query.device) - rows.queries
    positions = rows.ends[:, None] + offsets
    columns = torch.arange(row_keys.shape[2], device=query.device)
    mask = columns <= positions[..., None]
    if window is not None:
        mask = mask & (columns > positions[..., None] - window)
    return attend(query, row_keys, row_values, mask[:, None])


def gathered(pool: Tensor, table: Tensor) -> Tensor:
    """The keys or values (rows, key heads, width * block size, head size) of a `table` (rows, width), from a pool
    (blocks, block size, key heads, head size)."""
    return pool[table].flatten(1, 2).transpose(1, 2)
