"""How many blocks a worker has, by numbers that stand in for a device's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from config.settings import Settings
from tests.model.conftest import Served, random_model
from worker.engine.blocks import BLOCK_TOKENS, blocks_for
from worker.engine.scheduler import Limits
from worker.models import SetupFailed
from worker.models.kv_memory import BLOCKS_SHARE, blocks_that_fit, extra_bytes, number_of_blocks
from worker.models.start import batch_limits


@pytest.fixture(scope="module", params=["with resampler", "idefics2 chat", "smolvlm chat"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return random_model(tmp_path_factory.mktemp("memory") / "checkpoint", request.param, "blocks")


class Counted:
    """A device with this much free memory, of which work needs this much."""

    def __init__(self, free: int, peak: int) -> None:
        self.free, self.peak = free, peak
        self.works = 0

    def free_bytes(self) -> int:
        return self.free

    def peak_bytes(self, work: Callable[[], None]) -> int:
        work()
        self.works += 1
        return self.peak


def blocks(served: Served, memory: Counted | None = None, **settings: Any) -> int:
    model, asked = served.model, Settings(**{"kv_layout": "blocks", "feature_cache_bytes": 0, **settings})
    return number_of_blocks(asked, model.decoder.family, model.encode, model.codec, memory)


def block_bytes(served: Served) -> int:
    return BLOCK_TOKENS * served.model.decoder.cache.position_bytes


@pytest.mark.parametrize(
    ("free", "reserved", "expected"), [(1_000, 0, 9), (1_000, 500, 4), (1_000, 990, 0), (100, 200, 0)]
)
def test_blocks_take_their_share_of_what_is_left(free: int, reserved: int, expected: int) -> None:
    assert blocks_that_fit(free, reserved, 100) == expected


def test_slots_need_no_blocks(demo: Served) -> None:
    assert blocks(demo, kv_layout="slots") == blocks(demo, kv_layout="auto") == 0


def test_a_cpu_has_blocks_for_the_tokens_of_a_batch(small: Served) -> None:
    assert blocks(small, max_batch_tokens=10_000) == blocks_for(10_000)


def test_a_gpu_has_blocks_for_what_its_largest_work_leaves(small: Served) -> None:
    memory = Counted(10**9, peak=10**8)
    rows = 7 * extra_bytes(small.model.decoder.family.spec)
    # Pictures are encoded while prompts are prefilled.
    left = 10**9 - 2 * 10**8 - 10**7 - rows
    found = blocks(small, memory, feature_cache_bytes=10**7, max_batch_size=7)
    assert found == int(left * BLOCKS_SHARE) // block_bytes(small)
    assert memory.works == 2


def test_bytes_that_are_set_are_not_measured(small: Served) -> None:
    memory = Counted(10**9, 10**8)
    assert blocks(small, memory, kv_bytes=1_000 * block_bytes(small) + 1) == 1_000
    assert memory.works == 0


def test_too_little_memory_is_told_at_start(small: Served) -> None:
    with pytest.raises(SetupFailed, match="IDEFICS_QUANTIZATION=8bit"):
        blocks(small, Counted(10**9, 10**9))
    with pytest.raises(SetupFailed, match="IDEFICS_KV_BYTES"):
        blocks(small, kv_bytes=1)


def test_in_blocks_a_row_counts_with_its_own_length(small: Served, demo: Served) -> None:
    settings = Settings(max_batch_size=9)
    tokens, held = settings.max_batch_tokens, small.model.decoder.cache.block_tokens
    assert batch_limits(small.model, settings) == Limits(9, tokens, held)
    assert batch_limits(small.model, Settings(max_batch_size=9, max_batch_tokens=100)) == Limits(9, 100, 100)
    assert batch_limits(demo.model, settings) == Limits(9, tokens)
