"""Paged attention: torch's kernel, whose documented contract a model of it computes here, against gathered blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from worker.models import paged_attention as paged
from worker.models.idefics2_3.network import grouped
from worker.models.paged_attention import KERNEL_BLOCK, PagedRows, can_page, gathered_attention, paged_attention

HEAD_SIZE = 16


def kernel_model(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
    block_table: Tensor,
    num_splits: int,
) -> Tensor:
    """What torch.nn.attention.varlen.varlen_attn computes by FlashAttention 2 with a block table, and what it refuses.

    The last query of a row is aligned with its last key. Keys behind `max_k` are not read.
    """
    rows = len(seqused_k)
    for numbers, shape in ((cu_seq_q, (rows + 1,)), (cu_seq_k, (rows + 1,)), (seqused_k, (rows,))):
        assert numbers.dtype == torch.int32
        assert numbers.is_contiguous()
        assert numbers.shape == shape
    assert block_table.dtype == torch.int32
    assert block_table.stride(-1) == query.stride(-1) == key.stride(-1) == 1
    assert key.shape == value.shape
    assert key.shape[1] % KERNEL_BLOCK == 0
    assert max_k >= int(seqused_k.max())
    assert int(seqused_k.max()) <= block_table.shape[1] * key.shape[1]
    assert num_splits == 1, "wrong results, see pytorch issue 194167"
    heads, key_heads = query.shape[1], key.shape[2]
    assert heads == key_heads or (enable_gqa and heads % key_heads == 0)
    left, right = window_size
    result = torch.full_like(query, torch.nan)
    for row in range(rows):
        first, last = cu_seq_q.tolist()[row : row + 2]
        assert last - first <= max_q
        used = int(seqused_k[row])
        keys, values = (pool[block_table[row].long()].flatten(0, 1)[:used] for pool in (key, value))
        for number in range(first, last):
            end = used - (last - number) + 1
            begin = max(0, end - 1 - left) if left >= 0 else 0
            seen = range(begin, min(used, end + right) if right >= 0 else used)
            for head in range(heads):
                key_head = head // (heads // key_heads)
                scores = keys[seen.start : seen.stop, key_head] @ query[number, head] * query.shape[2] ** -0.5
                result[number, head] = scores.softmax(dim=0) @ values[seen.start : seen.stop, key_head]
    return result


#: Key heads, heads, new tokens, each row's keys, window.
CASES: dict[str, tuple[int, int, int, list[int], int | None]] = {
    "decode step": (4, 4, 1, [5, 300, 1], None),
    "decode step, grouped": (2, 6, 1, [5, 300, 256], None),
    "beginning of prompts": (4, 4, 7, [7, 7], None),
    "chunks after ragged beginnings": (2, 4, 5, [5, 261, 300], None),
    "decode step, window": (2, 4, 1, [5, 300], 64),
    "chunks, window": (1, 2, 6, [6, 290], 64),
    "window as long as the table": (1, 2, 1, [290, 500], 512),
    "window of the token itself": (1, 1, 2, [9], 1),
}


@pytest.mark.parametrize("name", CASES)
def test_the_kernels_contract_is_that_of_gathered_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    key_heads, heads, queries, ends, window = CASES[name]
    monkeypatch.setattr(paged, "varlen_attn", kernel_model)
    torch.manual_seed(0)
    keys, values = torch.randn(2, 8, KERNEL_BLOCK, key_heads, HEAD_SIZE)
    # Each row's blocks are in any order, and behind them the table names the scratch block.
    blocks = iter([7, 2, 5, 1, 6, 3, 4])
    counts = [-(-end // KERNEL_BLOCK) for end in ends]
    table = torch.tensor([[next(blocks) for _ in range(count)] + [0] * (2 - count) for count in counts])
    keys[0] = values[0] = torch.nan
    rows = PagedRows.of(table, torch.tensor(ends), queries)
    query = torch.randn(len(ends), heads, queries, HEAD_SIZE)
    attended = paged_attention(query, keys, values, rows, window)
    assert attended.shape == query.shape
    keys[0] = values[0] = 0.0
    reference = gathered_attention(query, keys, values, rows, grouped(scaled_dot_product_attention), window)
    torch.testing.assert_close(attended, reference)


def test_padding_behind_a_shorter_segment_changes_no_real_token(monkeypatch: pytest.MonkeyPatch) -> None:
    # Row 0 has 5 new tokens after 250, row 1 has 2 after 3, padded to 5: its padding may lie in the scratch block.
    monkeypatch.setattr(paged, "varlen_attn", kernel_model)
    torch.manual_seed(0)
    keys, values = torch.randn(2, 3, KERNEL_BLOCK, 1, HEAD_SIZE)
    query = torch.randn(2, 1, 5, HEAD_SIZE)
    table = torch.tensor([[1], [2]])
    padded = paged_attention(query, keys, values, PagedRows.of(table, torch.tensor([255, 8]), 5))
    alone = paged_attention(query[1:, :, :2], keys, values, PagedRows.of(table[1:], torch.tensor([5]), 2))
    torch.testing.assert_close(padded[1:, :, :2], alone)


def test_torchs_own_function_takes_the_arguments() -> None:
    # Tensors without content, for which torch computes the shapes only.
    with torch.device("meta"):
        keys, values = torch.empty(2, 8, KERNEL_BLOCK, 2, HEAD_SIZE, dtype=torch.bfloat16)
        query = torch.empty(3, 4, 5, HEAD_SIZE, dtype=torch.bfloat16)
        rows = PagedRows.of(torch.zeros(3, 2, dtype=torch.long), torch.full((3,), 300), 5)
        assert paged_attention(query, keys, values, rows, window=100).shape == query.shape


class Cuda:
    """A device's type, and its capability: a stand-in for a GPU."""

    type = "cuda"


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, True),
        ({"dtype": torch.float16}, True),
        ({"dtype": torch.float32}, False),
        ({"head_size": 84}, False),
        ({"head_size": 320}, False),
        ({"block_size": 64}, False),
        ({"block_size": 512}, True),
        ({"capability": (7, 5)}, False),
        ({"hip": "6.0"}, False),
        ({"kernel": None}, False),
        ({"kernel": lambda query, key, value: query}, False),
    ],
)
def test_the_kernel_is_used_only_where_it_runs(
    changed: dict[str, Any], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: changed.get("capability", (9, 0)))
    monkeypatch.setattr(torch.version, "hip", changed.get("hip"))
    if "kernel" in changed:
        monkeypatch.setattr(paged, "varlen_attn", changed["kernel"])
    device: Any = Cuda()
    dtype = changed.get("dtype", torch.bfloat16)
    assert can_page(device, dtype, changed.get("head_size", 128), changed.get("block_size", KERNEL_BLOCK)) is expected


def test_a_cpu_gathers() -> None:
    assert not can_page(torch.device("cpu"), torch.bfloat16, 128, KERNEL_BLOCK)
