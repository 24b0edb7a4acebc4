"""Keys and values in blocks: rows cost what they are long, and share what they have in common."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.model.conftest import Served, random_model
from tests.model.jobs import prepared
from worker.engine import prefix_cache
from worker.engine.block_cache import BlockCache
from worker.engine.blocks import BLOCK_TOKENS, BlockAllocator, blocks_for
from worker.engine.continuous import ContinuousModel
from worker.engine.row import Row, Sampling


@pytest.fixture(scope="module", params=["with resampler", "smolvlm chat"])
def in_blocks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return random_model(tmp_path_factory.mktemp("blocks") / "checkpoint", request.param, "blocks")


def with_blocks(served: Served, blocks: int, prefix_bytes: int = 2**29) -> ContinuousModel:
    """The same checkpoint with a pool of its own."""
    model = served.model
    return ContinuousModel(model.stock, model.decoder.family, model.encode, prefix_bytes, blocks=blocks)


def allocator(model: ContinuousModel) -> BlockAllocator:
    assert isinstance(model.decoder.cache, BlockCache)
    return model.decoder.cache.pool.allocator


def _nobody(running: Sequence[Row]) -> Sequence[Row]:
    return ()


def test_a_very_long_row_costs_the_others_no_memory(in_blocks: Served) -> None:
    model = with_blocks(in_blocks, 400, prefix_bytes=0)
    short = [Row(prepared(in_blocks.model, [f"Say {n}"]), Sampling(8)) for n in range(12)]
    long = Row(prepared(in_blocks.model, ["Say " * 300]), Sampling(8))
    used: list[int] = []
    model.run([*short, long], lambda: used.append(allocator(model).used), _nobody)
    assert all(row.output.result() for row in (*short, long))
    assert max(used) <= sum(blocks_for(len(row.tokens.ids) + 8) for row in (*short, long))
    assert allocator(model).used == 0


def test_many_questions_on_one_picture_hold_its_keys_and_values_once(
    in_blocks: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_cache, "MIN_TOKENS", 1)
    model = with_blocks(in_blocks, 1_000)
    picture = in_blocks.images[min(in_blocks.images)]
    rows = [Row(prepared(in_blocks.model, ["Look: " * 30, picture, f"What is {n}?"]), Sampling(4)) for n in range(64)]
    most: list[tuple[int, int]] = []
    model.run(rows, lambda: most.append((allocator(model).used, allocator(model).shared)), _nobody)
    assert all(row.output.result() for row in rows)
    (span,) = rows[0].tokens.spans
    common = span.end // BLOCK_TOKENS
    assert common
    own = sum(blocks_for(len(row.tokens.ids) + 4) - common for row in rows)
    used, shared = max(most)
    # The last block of the prefix, which no row shares, is that of the cache.
    assert used <= common + 1 + own
    assert shared == common
