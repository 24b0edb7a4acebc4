"""Keys and values in blocks: rows cost what they are long, and share what they have in common."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import pytest
import torch
from torch import Tensor

from tasks.errors import Internal, OutOfMemory
from tests.model.conftest import Served, random_model
from tests.model.jobs import mixed_jobs, prepared, row_of
from worker.engine import prefix_cache
from worker.engine.block_cache import BlockCache
from worker.engine.blocks import BLOCK_TOKENS, BlockAllocator, blocks_for
from worker.engine.continuous import ContinuousModel
from worker.engine.cuda_graphs import Step
from worker.engine.interfaces import Admit, PendingPrompt, Prefix
from worker.engine.pauses import Pauses
from worker.engine.row import Output, Picture, Row, Sampling
from worker.observability.metrics import WORKER

PREEMPTIONS = "idefics_num_preemptions_total"


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
    shown: list[set[int]] = []

    def heartbeat() -> None:
        most.append((allocator(model).used, allocator(model).shared))
        shown.append(set(model.decoder.cache.extra_numbers))

    model.run(rows, heartbeat, _nobody)
    assert all(row.output.result() for row in rows)
    (span,) = rows[0].tokens.spans
    common = span.end // BLOCK_TOKENS
    assert common
    own = sum(blocks_for(len(row.tokens.ids) + 4) - common for row in rows)
    used, shared = max(most)
    # The last block of the prefix, which no row shares, is that of the cache.
    assert used <= common + 1 + own
    assert shared == common
    # IDEFICS' cross-attention, which the later families do not have.
    assert max(map(len, shown)) == 1
    assert set().union(*shown) <= {0, 1}


def answered(served: Served, count: int) -> tuple[list[Row], list[list[int]]]:
    """Rows of mixed jobs, and what stock `generate` says to each alone."""
    # With these, rows are preempted in each family.
    jobs = mixed_jobs(count, sorted(served.images), seed=11)
    prompts = [served.parts(job) for job in jobs]
    rows = [row_of(served.model, job, parts) for job, parts in zip(jobs, prompts, strict=True)]
    return rows, [served.stock_ids(job, parts) for job, parts in zip(jobs, prompts, strict=True)]


def smallest(rows: Sequence[Row]) -> int:
    """Blocks for the longest row alone, and one for the copy of a prefix's last block."""
    return max(blocks_for(len(row.tokens.ids) + row.max_steps) for row in rows) + 1


def test_preempted_rows_say_what_stock_generate_says_to_each_alone(in_blocks: Served) -> None:
    rows, expected = answered(in_blocks, 16)
    model = with_blocks(in_blocks, smallest(rows))
    before = WORKER.get_sample_value(PREEMPTIONS)
    usages: list[float | None] = []

    def heartbeat() -> None:
        usages.append(WORKER.get_sample_value("idefics_gpu_cache_usage_perc"))

    model.run(rows[:10], heartbeat, in_turn([[], rows[10:]]))
    assert [list(row.output.result().ids) for row in rows] == expected
    preemptions = model.metrics()["preemptions"]
    assert preemptions > 0
    assert (WORKER.get_sample_value(PREEMPTIONS) or 0.0) - (before or 0.0) == preemptions
    # It takes nearly all blocks before rows are preempted.
    assert 0.5 < max(usage or 0.0 for usage in usages) <= 1
    assert is_empty(model)


def test_a_preempted_row_goes_on_with_its_samples(in_blocks: Served) -> None:
    texts = [f"Say {n}" + " and more" * n for n in range(8)]

    def sampled(model: ContinuousModel) -> list[tuple[int, ...]]:
        rows = [
            Row(prepared(in_blocks.model, [text]), Sampling(30, temperature=1.0, top_p=0.9, seed=n))
            for n, text in enumerate(texts)
        ]
        model.run(rows, lambda: None, _nobody)
        return [row.output.result().ids for row in rows]

    roomy, tight = with_blocks(in_blocks, 400), with_blocks(in_blocks, 10)
    assert sampled(tight) == sampled(roomy)
    assert tight.metrics()["preemptions"] > 0 == roomy.metrics()["preemptions"]


def test_preempted_beams_begin_anew_and_say_the_same(in_blocks: Served) -> None:
    def searched(model: ContinuousModel) -> list[Output]:
        sampling = Sampling(24, num_beams=3, answers=2)
        rows = [Row(prepared(in_blocks.model, [f"Say {n}" + " and more" * n]), sampling) for n in range(5)]
        model.run(rows, lambda: None, _nobody)
        return [row.output.result() for row in rows]

    roomy, tight = with_blocks(in_blocks, 400), with_blocks(in_blocks, 16)
    assert searched(tight) == searched(roomy)
    assert tight.metrics()["preemptions"] > 0 == roomy.metrics()["preemptions"]
    assert is_empty(tight)


def test_the_youngest_of_the_least_urgent_rows_is_preempted(in_blocks: Served) -> None:
    prompt = prepared(in_blocks.model, ["Say"])
    rows = [Row(prompt, Sampling(40), priority=priority, arrived=arrived)
            for priority, arrived in ((5, 1.0), (9, 0.0), (0, 3.0), (5, 2.0))]  # fmt: skip
    ended: list[Row] = []

    def heartbeat() -> None:
        ended.extend(row for row in rows if row.is_done and row not in ended)

    model = with_blocks(in_blocks, smallest(rows))
    model.run(rows, heartbeat, _nobody)
    heartbeat()
    assert model.metrics()["preemptions"] > 0
    assert ended[-1] is rows[1]
    assert rows.index(ended[0]) == 2 or ended[0] is rows[0]


def test_a_row_that_is_too_long_for_all_blocks_fails_alone(in_blocks: Served) -> None:
    fits = [Row(prepared(in_blocks.model, [f"Say {n}"]), Sampling(6)) for n in range(4)]
    long_prompt = Row(prepared(in_blocks.model, ["Say " * 300]), Sampling(6))
    long_answer = Row(prepared(in_blocks.model, ["Say"]), Sampling(400))
    many_labels = Row(prepared(in_blocks.model, ["Say"]), Sampling(1), labels=tuple((5, 6, 7) for _ in range(200)))
    model = with_blocks(in_blocks, 8)
    model.run([long_prompt, long_answer, many_labels, *fits], lambda: None, _nobody)
    for row in (long_prompt, long_answer, many_labels):
        with pytest.raises(OutOfMemory):
            row.output.result()
    assert all(len(row.output.result().ids) == 6 for row in fits)
    assert is_empty(model)


def test_rows_that_grow_are_recorded_as_few_graphs(in_blocks: Served) -> None:
    recorded: list[int] = []

    def record(step: Step) -> Step:
        recorded.append(len(model.decoder.slots))
        return step

    given = in_blocks.model
    model = ContinuousModel(given.stock, given.decoder.family, given.encode, record=record, blocks=400)
    rows = [Row(prepared(given, [f"Say {n}"]), Sampling(150 + n)) for n in range(5)]
    model.run(rows, lambda: None, _nobody)
    assert all(row.output.result() for row in rows)
    # Eight rows until some end, in tables of 4, 8 and 16 blocks.
    assert len(recorded) <= 6


def test_chunks_of_several_long_prompts_are_prefilled_together_within_a_budget(
    in_blocks: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = in_blocks.model
    model = ContinuousModel(
        given.stock, given.decoder.family, given.encode, blocks=400, chunk_tokens=16, budget_tokens=3 * 16
    )
    rows = [Row(prepared(given, [f"Say {n} " * 20]), Sampling(4)) for n in range(4)]
    together: list[int] = []
    stock_prefill = model.scratch.prefill_prefixes

    def prefill_prefixes(prompts: Sequence[PendingPrompt]) -> list[Prefix]:
        together.append(len(prompts))
        return stock_prefill(prompts)

    monkeypatch.setattr(model.scratch, "prefill_prefixes", prefill_prefixes)
    model.run(rows, lambda: None, _nobody)
    assert max(together) == 3
    again = [Row(row.tokens, row.sampling) for row in rows]
    given.run(again, lambda: None, _nobody)
    assert [row.output.result() for row in rows] == [row.output.result() for row in again]
    assert is_empty(model)


def test_a_long_prompt_waits_for_blocks_while_shorter_ones_run(in_blocks: Served) -> None:
    given = in_blocks.model
    long = Row(prepared(given, ["Say " * 100]), Sampling(4), arrived=0.0)
    short = [Row(prepared(given, [f"Say {n}"]), Sampling(30), arrived=1.0) for n in range(8)]
    model = ContinuousModel(
        given.stock, given.decoder.family, given.encode, blocks=smallest([long]) + 4, chunk_tokens=BLOCK_TOKENS
    )
    model.run([long, *short], lambda: None, _nobody)
    alone = [Row(row.tokens, row.sampling) for row in (long, *short)]
    for row, again in zip((long, *short), alone, strict=True):
        given.run([again], lambda: None, _nobody)
        assert row.output.result() == again.output.result()
    assert is_empty(model)


@pytest.mark.parametrize("seed", range(4))
def test_no_block_is_lost_whatever_becomes_of_the_rows(in_blocks: Served, seed: int) -> None:
    dice, given = random.Random(seed), in_blocks.model
    names = sorted(in_blocks.images)
    broken = given.codec.picture(in_blocks.images[names[0]]).key

    def encode(pictures: Iterable[Picture]) -> Pauses[dict[bytes, Tensor]]:
        found = yield from given.encode(pictures)
        return {key: features * torch.nan if key == broken else features for key, features in found.items()}

    model = ContinuousModel(
        given.stock, given.decoder.family, encode, blocks=40, chunk_tokens=dice.choice([16, 512]), label_tokens=40
    )
    rows = [some_row(in_blocks, dice) for _ in range(40)]
    waiting = rows[8:]

    def heartbeat() -> None:
        for row in rows:
            row.canceled = row.canceled or dice.random() < 0.005

    def admit(running: Sequence[Row]) -> Sequence[Row]:
        count = dice.randrange(4) if running else 3
        joining, waiting[:] = waiting[:count], waiting[count:]
        return joining

    model.run(rows[:8], heartbeat, admit)
    while waiting:
        model.run([waiting.pop()], heartbeat, admit)
    for row in rows:
        error = row.output.exception()
        assert error is None or isinstance(error, Internal | OutOfMemory)
        shows_broken = any(picture.key == broken for picture in row.tokens.pictures)
        assert shows_broken or not isinstance(error, Internal)
    assert sum(row.output.exception() is None for row in rows) > 20
    assert is_empty(model)


def test_after_a_failure_all_blocks_are_free(in_blocks: Served) -> None:
    model = with_blocks(in_blocks, 60)
    dice = random.Random(5)
    rows = [some_row(in_blocks, dice) for _ in range(8)]
    beats: list[int] = []

    def fails() -> None:
        beats.append(1)
        if len(beats) == 4:
            raise ValueError("a part broke")

    with pytest.raises(ValueError, match="broke"):
        model.run(rows, fails, _nobody)
    assert allocator(model).used == 0
    again = [Row(row.tokens, row.sampling, row.labels) for row in rows]
    model.run(again, lambda: None, _nobody)
    assert all(row.output.result() for row in again)
    assert is_empty(model)


def some_row(served: Served, dice: random.Random) -> Row:
    """A row of any kind: with and without pictures, labels, shared beginnings, samples and beams."""
    shown = served.images[dice.choice(sorted(served.images)[:4])]
    example = [served.images[sorted(served.images)[5]], "An example. " * 6]
    parts = [*dice.choice([[], example]), *dice.choice([[], [shown]]), "Say " * dice.randint(1, 12)]
    labels = tuple(tuple(dice.choices(range(5, 30), k=dice.randint(1, 6))) for _ in range(dice.choice([0, 0, 5])))
    sampling = Sampling(dice.randint(1, 40), temperature=dice.choice([0.0, 1.0]), seed=dice.randrange(99))
    if not labels and dice.random() < 0.3:
        sampling = Sampling(dice.randint(1, 20), num_beams=dice.randint(2, 5))
    return Row(prepared(served.model, parts), sampling, labels)


def in_turn(groups: list[list[Row]]) -> Admit:
    """They join, one group at each step."""
    return lambda running: groups.pop(0) if groups else []


def is_empty(model: ContinuousModel) -> bool:
    """Whether no block is held but by cached prefixes, which are evicted."""
    prefixes = allocator(model).holder
    assert prefixes
    while prefixes.evict():
        pass
    return allocator(model).used == 0
