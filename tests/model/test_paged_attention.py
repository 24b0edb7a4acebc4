"""Paged attention: torch's kernel, whose documented contract a model of it computes here, against gathered blocks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import paged_kernel
from tests.model.conftest import random_model
from tests.model.jobs import mixed_jobs, row_of
from tests.support.recording import StepRecorder
from worker.engine.blocks import BLOCK_TOKENS
from worker.engine.continuous import ContinuousModel
from worker.engine.row import Row, Sampling
from worker.engine.traced import Traced
from worker.models import paged_attention, self_attention
from worker.models import report as reports
from worker.models.idefics2_3.network import grouped
from worker.models.layers import KeysValues
from worker.models.loading import load
from worker.models.paged_attention import KERNEL_BLOCK, PagedRows, block_tokens, can_page
from worker.models.report import report
from worker.models.self_attention import Caches, causal_attention

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
    assert int(seqused_k.max()) <= max_k <= block_table.shape[1] * key.shape[1]
    assert num_splits == 1, "wrong results, see pytorch issue 194167"
    assert window_size[1] == 0
    group, rest = divmod(query.shape[1], key.shape[2])
    assert not rest
    assert group == 1 or enable_gqa
    result = torch.full_like(query, torch.nan)
    for row, (first, last) in enumerate(itertools.pairwise(cu_seq_q.tolist())):
        assert last - first <= max_q
        used = int(seqused_k[row])
        keys, values = (
            pool[block_table[row].long()].flatten(0, 1)[:used].repeat_interleave(group, dim=1) for pool in (key, value)
        )
        ends = torch.arange(used - (last - first), used)[:, None]
        columns = torch.arange(used)
        mask = columns <= ends
        if window_size[0] >= 0:
            mask &= columns >= ends - window_size[0]
        scores = torch.einsum("qhd,khd->hqk", query[first:last], keys) * query.shape[2] ** -0.5
        chances = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
        result[first:last] = torch.einsum("hqk,khd->qhd", chances, values)
    return result


@pytest.fixture
def paging(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model take the kernel's place, on a CPU."""
    monkeypatch.setattr(paged_attention, "varlen_attn", kernel_model)
    for module in (paged_attention, self_attention, reports):
        monkeypatch.setattr(module, "can_page", lambda *_: True)


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


def new_cache(blocks: int, key_heads: int) -> KeysValues:
    """Random keys and values, but zeros in the block that pads tables."""
    keys, values = torch.randn(2, blocks, KERNEL_BLOCK, key_heads, HEAD_SIZE)
    keys[0] = values[0] = 0.0
    return keys, values


def attended(
    query: Tensor, cache: KeysValues, table: Tensor, ends: Sequence[int], window: int | None = None, last: bool = False
) -> Tensor:
    """The attention of a layer's last new tokens. `ends`: each row's keys. `last`: of each row's last token only."""
    positions = torch.tensor(ends)[:, None] + torch.arange(-query.shape[2], 0)
    lasts = torch.full((len(ends),), query.shape[2] - 1) if last else None
    attention = causal_attention(Caches(table, [cache]), positions, window=window, lasts=lasts)
    asked = query[:, :, -1:] if last else query
    return attention.attended(asked, cache, cache, grouped(scaled_dot_product_attention))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_kernels_contract_is_that_of_gathered_blocks(name: str, last: bool, request: pytest.FixtureRequest) -> None:
    key_heads, heads, queries, ends, window = CASES[name]
    torch.manual_seed(0)
    # Each row's blocks are in any order, and behind them the table names the null block.
    blocks = iter([7, 2, 5, 1, 6, 3, 4])
    counts = [-(-end // KERNEL_BLOCK) for end in ends]
    table = torch.tensor([[next(blocks) for _ in range(count)] + [0] * (2 - count) for count in counts])
    cache, query = new_cache(8, key_heads), torch.randn(len(ends), heads, queries, HEAD_SIZE)
    reference = attended(query, cache, table, ends, window, last)
    request.getfixturevalue("paging")
    for each in cache:
        each[0] = torch.nan
    found = attended(query, cache, table, ends, window, last)
    assert found.shape == reference.shape
    torch.testing.assert_close(found, reference)


def test_padding_behind_a_shorter_segment_changes_no_real_token(paging: None) -> None:
    # Row 0 has 5 new tokens after 250, row 1 has 2 after 3, padded to 5.
    torch.manual_seed(0)
    cache, query = new_cache(3, 1), torch.randn(2, 1, 5, HEAD_SIZE)
    table = torch.tensor([[1], [2]])
    padded = attended(query, cache, table, [255, 8])
    alone = attended(query[1:, :, :2], cache, table[1:], [5])
    torch.testing.assert_close(padded[1:, :, :2], alone)


def test_the_comparison_on_a_gpu_finds_the_kernel_right_and_a_wrong_one_wrong(
    paging: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged_kernel, "REPEATS", 1)
    case = paged_kernel.Case(3, 500, queries=2, heads=4, key_heads=2, head_size=16, window=300)
    assert paged_kernel.compare(case, torch.device("cpu"))["error"] < 2e-2
    monkeypatch.setattr(paged_attention, "varlen_attn", forgetful_kernel)
    assert paged_kernel.compare(case, torch.device("cpu"))["error"] > 0.1


def failing_kernel(*args: Any, **options: Any) -> Tensor:
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")


def forgetful_kernel(query: Tensor, *args: Any, **options: Any) -> Tensor:
    """Leaves out each row's last key."""
    return kernel_model(query, *args, **options | {"seqused_k": options["seqused_k"] - 1})


def unfinished_kernel(query: Tensor, *args: Any, **options: Any) -> Tensor:
    """Does not write the last row, as with split keys and values."""
    result = kernel_model(query, *args, **options)
    result[-1] = torch.nan
    return result


@pytest.mark.parametrize(
    ("kernel", "told"),
    [(failing_kernel, "only supports Ampere"), (forgetful_kernel, "is wrong here"), (unfinished_kernel, "nan")],
)
def test_a_kernel_that_is_wrong_on_this_device_is_not_used(
    kernel: Any, told: str, paging: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    device = torch.device("cpu")
    assert block_tokens(device, torch.bfloat16, HEAD_SIZE) == KERNEL_BLOCK
    assert not caplog.text
    monkeypatch.setattr(paged_attention, "varlen_attn", kernel)
    assert block_tokens(device, torch.bfloat16, HEAD_SIZE) == BLOCK_TOKENS
    assert told in caplog.text


def test_torchs_own_function_takes_the_arguments() -> None:
    # Tensors without content, for which torch computes the shapes only.
    with torch.device("meta"):
        keys, values = torch.empty(2, 8, KERNEL_BLOCK, 2, HEAD_SIZE, dtype=torch.bfloat16)
        query = torch.empty(3, 4, 5, HEAD_SIZE, dtype=torch.bfloat16)
        rows = PagedRows.of(torch.zeros(3, 2, dtype=torch.long), torch.full((3,), 300), 5, window=100)
        assert paged_attention.paged_attention(query, keys, values, rows).shape == query.shape


def test_a_traced_function_that_uses_the_kernel_runs_operation_by_operation(paging: None) -> None:
    # A trace would keep the number of queries and keys of the first call.
    cache, calls = new_cache(3, 1), []

    def layer(query: Tensor, table: Tensor, *pools: Tensor) -> Tensor:
        calls.append(query.shape[2])
        return attended(query, (pools[0], pools[1]), table, [300])

    traced = Traced(layer)
    for length in (2, 5, 5):
        query, table = torch.randn(1, 1, length, HEAD_SIZE), torch.tensor([[1, 2]])
        found = traced(query, self_kv=[table, *cache])
        torch.testing.assert_close(found, attended(query, cache, table, [300]))
    assert calls[-2:] == [5, 5]


def test_the_report_says_whether_the_kernel_reads_the_blocks(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    served = random_model(tmp_path / "checkpoint", "smolvlm chat", "blocks")
    assert "in blocks of 16 tokens, gathered at each step" in "".join(report(served.model, served.settings, 100))
    request.getfixturevalue("paging")
    paged = load(served.settings)
    assert "in blocks of 256 tokens, read by torch's paged kernel" in "".join(report(paged, served.settings, 100))


@pytest.mark.parametrize("name", ["with resampler", "idefics2 chat", "smolvlm chat"])
@pytest.mark.parametrize("graphs", [True, False])
def test_a_batch_with_the_kernel_says_what_stock_generate_says_to_each_job_alone(
    name: str, graphs: bool, tmp_path: Path, paging: None
) -> None:
    served, record = random_model(tmp_path / "checkpoint", name, "blocks"), StepRecorder()
    decoder = served.model.decoder.family
    assert decoder.spec.block_tokens == KERNEL_BLOCK
    model = ContinuousModel(
        served.stock, decoder, served.model.encode, record=record if graphs else None, blocks=200, chunk_tokens=40
    )
    jobs = mixed_jobs(16, sorted(served.images))
    prompts = [served.parts(job) for job in jobs]
    rows = [row_of(model, job, parts) for job, parts in zip(jobs, prompts, strict=True)]
    model.run(rows, lambda: None, lambda running: ())
    for job, parts, row in zip(jobs, prompts, rows, strict=True):
        assert list(row.output.result().ids) == served.stock_ids(job, parts), job
    # Labels are scored by tree attention, whose rows are in the same blocks.
    labeled = [Row(row.tokens, Sampling(1), ((5, 6, 2), (7, 2), (8, 9, 10, 2))) for row in rows[:3] for _ in (1, 2)]
    model.run(labeled[::2], lambda: None, lambda running: ())
    served.stock.run(labeled[1::2], lambda: None, lambda running: ())
    scored = torch.tensor([row.output.result().probabilities for row in labeled])
    torch.testing.assert_close(scored[::2], scored[1::2], rtol=1e-4, atol=1e-6)
    # One for each power of two of rows, with and without pictures among them.
    assert record.recorded <= 10 if graphs else not record.recorded


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
        ({"block_tokens": 64}, False),
        ({"block_tokens": 512}, True),
        ({"capability": (7, 5)}, False),
        ({"hip": "6.0"}, False),
        ({"flash": False}, False),
        ({"kernel": None}, False),
        ({"kernel": lambda query, key, value: query}, False),
    ],
)
def test_the_kernel_is_used_only_where_it_runs(
    changed: dict[str, Any], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: changed.get("capability", (9, 0)))
    monkeypatch.setattr(torch.version, "hip", changed.get("hip"))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: changed.get("flash", True))
    if "kernel" in changed:
        monkeypatch.setattr(paged_attention, "varlen_attn", changed["kernel"])
    device: Any = Cuda()
    dtype = changed.get("dtype", torch.bfloat16)
    assert can_page(device, dtype, changed.get("head_size", 128), changed.get("block_tokens", KERNEL_BLOCK)) is expected


def test_a_cpu_gathers() -> None:
    assert not can_page(torch.device("cpu"), torch.bfloat16, 128, KERNEL_BLOCK)
    assert block_tokens(torch.device("cpu"), torch.bfloat16, 128) == BLOCK_TOKENS
