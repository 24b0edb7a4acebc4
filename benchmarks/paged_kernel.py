"""torch's paged kernel on this GPU, against the same attention over gathered blocks: how far its results are from those
in float32, and how long both take. `python -m benchmarks.paged_kernel`.

An error of 1e-2 is that of bfloat16. NaN, or an error that differs between runs, is a defect of the kernel.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu import settle
from worker.models.idefics2_3.network import grouped
from worker.models.layers import KeysValues, causal_mask
from worker.models.paged_attention import KERNEL_BLOCK, can_page
from worker.models.self_attention import BlockPlaces, Caches, SelfAttention, causal_attention


class Case(NamedTuple):
    """The attention of `rows` rows of up to `keys` keys, the last `queries` of which are of new tokens."""

    rows: int
    keys: int
    queries: int = 1
    heads: int = 32
    key_heads: int = 8
    head_size: int = 128
    window: int | None = None


CASES = (
    Case(1, 2048),
    Case(16, 2048),
    Case(64, 2048),
    Case(64, 2048, key_heads=32),
    Case(16, 8192, window=4096),
    Case(4, 2048, queries=512),
    Case(4, 8192, queries=512, window=4096),
    Case(8, 1024, heads=9, key_heads=3, head_size=64),
)
REPEATS = 20


def compare(case: Case, device: torch.device) -> dict[str, Any]:
    """The kernel's largest error, as a part of the largest result, and microseconds of both forms."""
    torch.manual_seed(0)
    # Rows of different lengths, whose blocks are in any order.
    ends = torch.linspace(case.keys // 2 + 1, case.keys, case.rows, device=device).long()
    width = -(-case.keys // KERNEL_BLOCK)
    table = 1 + torch.randperm(case.rows * width, device=device).view(case.rows, width)
    shape = 2, case.rows * width + 2, KERNEL_BLOCK, case.key_heads, case.head_size
    keys, values = torch.randn(shape, device=device, dtype=torch.bfloat16)
    query = torch.randn(case.rows, case.heads, case.queries, case.head_size, device=device, dtype=torch.bfloat16)
    positions = ends[:, None] + torch.arange(-case.queries, 0, device=device)
    paged = causal_attention(Caches(table, [(keys, values)]), positions, window=case.window)
    mask = causal_mask(positions, width * KERNEL_BLOCK, case.window)
    gathered = SelfAttention(BlockPlaces.of(table, positions, KERNEL_BLOCK), mask)

    def attended(attention: SelfAttention, query: Tensor, cache: KeysValues) -> Tensor:
        return attention.attended(query, cache, cache, grouped(scaled_dot_product_attention))

    exact = attended(gathered, query.float(), (keys.float(), values.float()))
    found = attended(paged, query, (keys, values)).float()
    return {
        **case._asdict(),
        "error": float((found - exact).abs().max() / exact.abs().max()),
        "paged_us": microseconds(lambda: attended(paged, query, (keys, values)), device),
        "gathered_us": microseconds(lambda: attended(gathered, query, (keys, values)), device),
    }


def microseconds(run: Callable[[], object], device: torch.device) -> float:
    """The time of a run, on average."""
    for repeats in (3, REPEATS):
        started = time.perf_counter()
        for _ in range(repeats):
            run()
        settle(device)
    return round((time.perf_counter() - started) / REPEATS * 1e6, 1)


@torch.inference_mode()
def main() -> None:
    device = torch.device("cuda", 0)
    if not can_page(device, torch.bfloat16, 128, KERNEL_BLOCK):
        raise SystemExit("The kernel does not run here.")
    for case in CASES:
        print(json.dumps(compare(case, device)), flush=True)


if __name__ == "__main__":
    main()
