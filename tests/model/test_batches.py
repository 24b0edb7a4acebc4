"""In float32 a job's answer is stock transformers' answer for that job alone, whatever it was batched with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tasks import Answer, Caption, CaptionExample, ImagePath, Job
from tasks.errors import Internal, OutOfMemory
from tests.model.conftest import SERVED, Served, noise
from tests.model.jobs import Parts, mixed_jobs, prepared, row_of, stock_prefilled
from worker.engine import prefix_cache
from worker.engine.block_cache import BlockCache
from worker.engine.continuous import ContinuousModel
from worker.engine.cuda_graphs import Step
from worker.engine.decoder import SlotDecoder
from worker.engine.interfaces import Admit, PendingPrompt, Prefix, Runner
from worker.engine.pauses import Pauses
from worker.engine.row import Output, Picture, Row, Sampling
from worker.engine.slot_cache import SlotCache
from worker.engine.slots import Move
from worker.engine.stock import memory_errors
from worker.models import BUNDLED

#: Most new tokens of a mixed job here.
LONGEST = 24


def _nobody(running: Sequence[Row]) -> Sequence[Row]:
    return ()


def _nothing() -> None:
    """A heartbeat that nobody hears."""


def rebuilt(model: ContinuousModel, **options: Any) -> ContinuousModel:
    """The same checkpoint with other options, and empty caches of the engine's own."""
    cache = model.decoder.cache
    blocks = cache.pool.allocator.count if isinstance(cache, BlockCache) else 0
    given = {"stock": model.stock, "decoder": model.decoder.family, "encode": model.encode, "blocks": blocks}
    return ContinuousModel(**{**given, **options})


def _alone(served: Served, row: Row) -> Output:
    again = Row(row.tokens, row.sampling, row.labels)
    served.model.run([again], _nothing, _nobody)
    return again.output.result()


def _in_turn(groups: list[list[Row]]) -> Admit:
    """They join, one group at each step."""
    return lambda running: groups.pop(0) if groups else []


@pytest.mark.parametrize("served", [*BUNDLED, *SERVED], indirect=True)
def test_a_batch_of_24_mixed_jobs_says_what_stock_generate_says_to_each_alone(served: Served) -> None:
    jobs = mixed_jobs(24, sorted(served.images), longest=LONGEST)
    prompts = [served.parts(job) for job in jobs]
    rows = [row_of(served.model, job, parts) for job, parts in zip(jobs, prompts, strict=True)]
    served.model.run(rows, _nothing, _nobody)
    for job, parts, row in zip(jobs, prompts, rows, strict=True):
        alone = served.stock_ids(job, parts)
        assert list(row.output.result().ids) == alone, job


def test_rows_that_join_a_running_batch_and_fill_its_gaps_say_what_they_say_alone(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves: list[Move] = []
    filled: list[int] = []
    model = rebuilt(served.model)
    decoder = model.decoder
    stock_compact, stock_prefill = decoder.compact, decoder.prefill

    def compact() -> list[Move]:
        moves.extend(moved := stock_compact())
        return moved

    def prefill(prompts: Sequence[PendingPrompt]) -> tuple[Sequence[int], Tensor]:
        before = len(decoder.slots)
        slots, logits = stock_prefill(prompts)
        filled.extend(slot for slot in slots if slot < before)
        return slots, logits

    monkeypatch.setattr(decoder, "compact", compact)
    monkeypatch.setattr(decoder, "prefill", prefill)
    jobs = mixed_jobs(24, sorted(served.images), longest=LONGEST)
    prompts = [served.parts(job) for job in jobs]
    rows = [row_of(model, job, parts) for job, parts in zip(jobs, prompts, strict=True)]
    waiting = rows[5:]

    def one_or_two(running: Sequence[Row]) -> Sequence[Row]:
        joining = [waiting.pop(0) for _ in range(min(len(waiting), len(running) % 3)) if len(running) < 9]
        # Nobody is forgotten when the batch runs empty.
        return joining or ([waiting.pop(0)] if waiting and len(running) < 2 else [])

    model.run(rows[:5], _nothing, one_or_two)
    while waiting:
        model.run([waiting.pop(0)], _nothing, one_or_two)
    for job, parts, row in zip(jobs, prompts, rows, strict=True):
        assert list(row.output.result().ids) == served.stock_ids(job, parts), job
    assert moves
    # Where rows without a carry are many, they follow one another behind the last one.
    assert filled or not decoder.family.spec.extra


def test_a_long_prompt_is_prefilled_in_chunks_between_the_steps_of_the_others(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = rebuilt(served.model, chunk_tokens=7)
    jobs = mixed_jobs(16, sorted(served.images), longest=LONGEST)
    prompts = [served.parts(job) for job in jobs]
    rows = [row_of(model, job, parts) for job, parts in zip(jobs, prompts, strict=True)]
    events: list[str] = []
    stock_step, stock_prefix = model.decoder.step, model.scratch.prefill_prefixes

    def step(tokens: Sequence[int]) -> Tensor:
        events.append("step")
        return stock_step(tokens)

    def prefill_prefixes(prompts: Sequence[PendingPrompt]) -> list[Prefix]:
        events.append("chunk")
        return stock_prefix(prompts)

    monkeypatch.setattr(model.decoder, "step", step)
    monkeypatch.setattr(model.scratch, "prefill_prefixes", prefill_prefixes)
    model.run(rows, _nothing, _nobody)
    for job, parts, row in zip(jobs, prompts, rows, strict=True):
        assert list(row.output.result().ids) == served.stock_ids(job, parts), job
    assert "chunk step chunk step chunk" in " ".join(events)


def _shared(model: ContinuousModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each forward that prefills prompts, as it comes."""
    prefilled: list[int] = []
    stock_prefill = SlotDecoder.prefill

    def prefill(decoder: SlotDecoder, prompts: Sequence[PendingPrompt]) -> tuple[Sequence[int], Tensor]:
        prefilled.append(sum(len(prompt.segment.ids) for prompt in prompts))
        return stock_prefill(decoder, prompts)

    monkeypatch.setattr(SlotDecoder, "prefill", prefill)
    return prefilled


@pytest.mark.parametrize("chunk", [512, 7])
def test_jobs_that_share_examples_prefill_them_once_and_say_what_they_say_alone(
    served: Served, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = rebuilt(served.model, chunk_tokens=chunk)
    names = sorted(served.images)
    examples = [CaptionExample(image=ImagePath(path=name), text=f"A thing like {name}.") for name in names[:3]]
    jobs: list[Job] = [
        Caption(image=ImagePath(path=name), examples=examples[: 1 + n % 3], max_new_tokens=12)
        for n, name in enumerate(names[3:12])
    ]
    prefilled = _shared(model, monkeypatch)
    rows = [row_of(model, job, served.parts(job)) for job in jobs]
    model.run(rows, _nothing, _nobody)
    for job, row in zip(jobs, rows, strict=True):
        alone = served.stock_ids(job, served.parts(job))
        assert list(row.output.result().ids) == alone, job
    assert sum(prefilled) < sum(len(row.tokens.ids) for row in rows) / 2
    assert chunk == 512 or max(prefilled) <= chunk * len(rows)


def test_questions_on_one_picture_say_what_they_say_alone_behind_a_prefix_that_ends_with_it(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if a picture, one token here, were long enough for a prefix of its own.
    monkeypatch.setattr(prefix_cache, "MIN_TOKENS", 1)
    model = rebuilt(served.model)
    name = min(served.images)
    jobs: list[Job] = [
        Answer(image=ImagePath(path=name), question=f"What is on the {side}?", max_new_tokens=12)
        for side in ("left", "right", "far left", "very far right of this picture", "top")
    ]
    rows = [row_of(model, job, served.parts(job)) for job in jobs]
    prefilled = _shared(model, monkeypatch)
    model.run(rows, _nothing, _nobody)
    for job, row in zip(jobs, rows, strict=True):
        alone = served.stock_ids(job, served.parts(job))
        assert list(row.output.result().ids) == alone, job
    (span,) = rows[0].tokens.spans
    assert prefilled == [span.end, sum(len(row.tokens.ids) - span.end for row in rows)]


def recorded(step: Step) -> Step:
    """As a CUDA graph, where there is no GPU: what it answers stands in one place."""
    answer = step().clone()
    return lambda: answer.copy_(step())


def test_recorded_and_replayed_steps_give_the_same_answers(served: Served) -> None:
    shapes: list[int] = []

    def record(step: Step) -> Step:
        shapes.append(len(model.decoder.slots))
        return recorded(step)

    model = rebuilt(served.model, record=record)
    jobs = mixed_jobs(24, sorted(served.images), longest=LONGEST)
    prompts = [served.parts(job) for job in jobs]
    rows = [row_of(model, job, parts) for job, parts in zip(jobs, prompts, strict=True)]
    steps = []
    model.run(rows[:12], lambda: steps.append(1), _in_turn([[], [], rows[12:20], [], [], [], rows[20:]]))
    for job, parts, row in zip(jobs, prompts, rows, strict=True):
        assert list(row.output.result().ids) == served.stock_ids(job, parts), job
    assert 0 < len(shapes) < len(steps) / 2


def test_answers_are_right_with_caches_that_must_grow(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    model = rebuilt(served.model)
    for name in ("decoder", "scratch"):
        monkeypatch.setattr(model, name, model.decoder.empty_like(1))
    jobs = mixed_jobs(24, sorted(served.images), longest=LONGEST)
    prompts = [served.parts(job) for job in jobs]
    rows = [row_of(model, job, parts) for job, parts in zip(jobs, prompts, strict=True)]
    never_ends = Row(prepared(model, prompts[0]), Sampling(70))
    # The others join when that one is long.
    model.run([never_ends, *rows[:12]], _nothing, _in_turn([[]] * 50 + [rows[12:]]))
    assert never_ends.output.result() == _alone(served, never_ends)
    for job, parts, row in zip(jobs, prompts, rows, strict=True):
        assert list(row.output.result().ids) == served.stock_ids(job, parts), job
    if isinstance(model.decoder.cache, SlotCache):
        assert model.decoder.cache.positions == 0


def test_many_short_rows_and_a_long_one_after_them_take_no_more_than_each_alone(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 24 * 64
    decoder = served.model.decoder.empty_like(most)
    if not isinstance(decoder.cache, SlotCache):
        pytest.skip("blocks take what rows are long: test_kv_blocks.py")
    cache = decoder.cache
    monkeypatch.setattr(served.model, "decoder", decoder)
    held: list[int] = []
    parts = [served.images[min(served.images)], "Say"]
    short = [Row(prepared(served.model, parts), Sampling(2)) for _ in range(24)]
    long = Row(prepared(served.model, parts), Sampling(100))
    for rows in (short, [long], short[:1]):
        again = [Row(row.tokens, row.sampling) for row in rows]
        served.model.run(again, lambda: held.append(cache.positions), _nobody)
    assert max(held) <= most
    assert max(map(len, (row.output.result().ids for row in again))) <= 2


@pytest.mark.parametrize("labeled", [False, True])
def test_a_row_that_overflows_fails_alone_and_leaves_no_trace(served: Served, labeled: bool) -> None:
    names = sorted(served.images)[:4]
    broken = served.model.codec.picture(served.images[names[0]]).key

    def encode(pictures: Iterable[Picture]) -> Pauses[dict[bytes, Tensor]]:
        found = yield from served.model.encode(pictures)
        return {key: features * torch.nan if key == broken else features for key, features in found.items()}

    model = rebuilt(served.model, encode=encode)
    labels = tuple(tuple(served.model.codec.tokenizer(text).input_ids) for text in ("a dog", "a somewhat longer text"))

    def rows_of(names: Sequence[str], text: str) -> list[Row]:
        return [
            Row(prepared(served.model, [served.images[name], text]), Sampling(8), labels if labeled else ())
            for name in names
        ]

    again = rows_of(names[1:], "Say")
    first, *others = rows_of(names, "Say " * 20)
    # The later ones take its place, beside longer ones.
    model.run([first, *others], _nothing, _in_turn([again]))
    if labeled:
        model.run(again, _nothing, _nobody)
    with pytest.raises(Internal, match="overflow"):
        first.output.result()
    assert all(row.output.result() for row in others)
    for row in again:
        ours, alone = row.output.result(), _alone(served, row)
        assert ours.ids == alone.ids
        assert ours.probabilities == pytest.approx(alone.probabilities, abs=1e-5)
    for decoder in (model.decoder, model.scratch):
        if isinstance(decoder.cache, SlotCache):
            assert not any(tensor.isnan().any() for tensor in decoder.cache.tensors)


def test_a_long_prompt_that_is_canceled_waits_for_no_other(served: Served) -> None:
    model = rebuilt(served.model, chunk_tokens=4)
    prompts = [[served.images[name], f"{name} " * 20] for name in sorted(served.images)[:3]]
    rows = [Row(prepared(served.model, parts), Sampling(4), priority=n) for n, parts in enumerate(reversed(prompts))]
    done: list[list[bool]] = []

    def heartbeat() -> None:
        rows[2].canceled = True
        done.append([row.is_done for row in rows])

    model.run(rows, heartbeat, _nobody)
    assert rows[2].output.result().finish_reason == "canceled"
    # The more urgent one first.
    assert [each for n, each in enumerate(done) if each != done[n - 1]] == [
        [False, False, False],
        [False, False, True],
        [True, False, True],
        [True, True, True],
    ]


def test_beams_in_a_batch_say_what_stock_beams_say_to_each_alone(served: Served) -> None:
    mixed = mixed_jobs(10, sorted(served.images), longest=LONGEST)
    changes = {"num_beams": 3, "max_new_tokens": 12}
    jobs = [job.model_copy(update=changes) for job in mixed if job.task != "idefics.chat"]
    prompts = [served.parts(job) for job in jobs]
    rows = [row_of(served.model, job, parts) for job, parts in zip(jobs, prompts, strict=True)]
    served.model.run(rows, _nothing, _nobody)
    for job, parts, row in zip(jobs, prompts, rows, strict=True):
        assert list(row.output.result().ids) == served.stock_ids(job, parts), job


def test_beams_beside_other_rows_say_what_stock_beams_say_to_each_alone(served: Served) -> None:
    jobs = [
        job.model_copy(update={"num_beams": (1, 3, 1, 2, 4)[n % 5], "max_new_tokens": 5 + 3 * n % 7})
        for n, job in enumerate(mixed_jobs(10, sorted(served.images), seed=3))
    ]
    prompts = [served.parts(job) for job in jobs]
    rows = [row_of(served.model, job, parts) for job, parts in zip(jobs, prompts, strict=True)]
    together: list[int] = []

    def heartbeat() -> None:
        together.append(len({row.sampling.num_beams for row in rows if row.first_token and not row.is_done}))

    served.model.run(rows[:6], heartbeat, _in_turn([[], rows[6:8], [], rows[8:]]))
    assert [list(row.output.result().ids) for row in rows] == [
        served.stock_ids(job, parts) for job, parts in zip(jobs, prompts, strict=True)
    ]
    assert max(together) == 4


def test_beams_that_are_canceled_answer_the_best_so_far_while_others_go_on(served: Served) -> None:
    prompts = [[served.images[name], "Say"] for name in sorted(served.images)[:2]]
    # Neither ends before.
    asked = Sampling(12, num_beams=3, logprobs=0, eos_ids=frozenset({2}), logit_bias=((2, -100.0),))
    canceled, going_on = (Row(prepared(served.model, parts), asked) for parts in prompts)

    beats: list[bool] = []

    def heartbeat() -> None:
        beats.append(canceled.is_prefilled)
        canceled.canceled = sum(beats) > 3

    served.model.run([canceled, going_on], heartbeat, _nobody)
    cut, whole = canceled.output.result(), going_on.output.result()
    assert (cut.finish_reason, whole.finish_reason) == ("canceled", "length")
    assert 3 <= len(cut.ids) == len(cut.scores) < len(whole.ids) == 12
    # As if the job had asked for as many tokens as it got.
    cut_short = dataclasses.replace(asked, max_new_tokens=len(cut.ids))
    alone = [Row(canceled.tokens, cut_short), Row(going_on.tokens, asked)]
    for row in alone:
        served.stock.run([row], _nothing, _nobody)
    assert [cut.ids, whole.ids] == [row.output.result().ids for row in alone]


def test_torchs_memory_errors_become_out_of_memory() -> None:
    # Torch says so in a plain RuntimeError.
    with pytest.raises(OutOfMemory), memory_errors():
        torch.empty(10**15)
    with pytest.raises(RuntimeError, match="shape"), memory_errors():
        torch.zeros(2) @ torch.zeros(3, 4)


@pytest.mark.parametrize("served", [*BUNDLED, *SERVED], indirect=True)
def test_prompts_and_pixels_are_those_of_transformers_own_processor(served: Served) -> None:
    for job in mixed_jobs(16, sorted(served.images), seed=2, longest=LONGEST):
        parts = served.parts(job)
        tokens = prepared(served.model, parts)
        stock = served.stock_inputs(parts)
        assert list(tokens.ids) == stock["input_ids"][0].tolist()
        frames = [frame for picture in tokens.pictures for frame in picture.frames]
        if not served.is_first_family:
            # Padded to the size of the largest frame.
            masks = stock.get("pixel_attention_mask", [()])[0]
            for frame, pixels, mask in zip(frames, stock.get("pixel_values", [()])[0], masks, strict=True):
                height, width = frame.mask.shape
                assert torch.equal(frame.mask, mask[:height, :width].bool())
                assert mask.sum() == frame.mask.sum()
                assert torch.equal(frame.normalize(frame.pixels, frame.mask), pixels[:, :height, :width])
            continue
        if frames:
            pixels = served.model.codec.pixels.normalized(torch.stack([frame.pixels for frame in frames]))
            assert torch.equal(pixels, stock["pixel_values"][0])
        mask = stock_prefilled(served.model, [tokens]).prompts.generate_inputs()["image_attention_mask"]
        assert torch.equal(mask, stock["image_attention_mask"].long())


@pytest.mark.parametrize(
    "text", ["a", "a strawberry " * 50, "x y " * 200, "  \n\t" * 99, "\u00e9\u4e16\U0001f600" * 40]
)
def test_a_prompt_never_has_fewer_tokens_than_it_is_said_to_have_at_least(served: Served, text: str) -> None:
    codec = served.model.codec
    assert 0 <= codec.min_token_count([text]) <= len(codec.prepare([text]).ids)
    assert codec.min_token_count(["y x" * 50_000]) > 2_048


@pytest.mark.parametrize("with_pictures", [True, False])
def test_label_scores_in_a_batch_are_the_log_likelihoods_of_each_label_alone(
    served: Served, with_pictures: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So few at once that the labels are scored in several parts, here and on the stock path.
    model = rebuilt(served.model, label_tokens=24)
    monkeypatch.setattr(served.model.stock, "max_tokens", 40)
    labels = (("food", "animal", "hot dog", "a b c d e"), ("x", "a somewhat longer label"))
    parts: list[Parts] = [[served.images[name], "Category:"] for name in sorted(served.images)[:4]]
    # Longer than the sliding window of the family that has one.
    parts[-1].insert(1, "very " * 60)
    if not with_pictures:
        parts = [["A dog barks. Category:"], ["Category:"], ["A hot dog is " + "very " * 9 + "hot. Category:"]]
    # The last ones are of one length, so that none is far more likely than the others.
    choices = [*(labels[n % 2] for n in range(len(parts) - 1)), ("a hot dog", "a red dog", "a hot cat")]
    rows = [
        Row(
            prepared(served.model, prompt),
            Sampling(1),
            labels=tuple(served.model.codec.encode_labels(["Category:"], choice)),
        )
        for prompt, choice in zip(parts, choices, strict=True)
    ]
    on_stock = [Row(row.tokens, row.sampling, row.labels) for row in rows]
    runs_on = Row(prepared(served.model, parts[0]), Sampling(60))
    steps: list[int] = []
    #: Steps before each part but the first.
    parted: list[int] = []
    stock_step, stock_score = model.decoder.step, model.scratch.score_continuations

    def step(tokens: Sequence[int]) -> Tensor:
        steps.append(1)
        return stock_step(tokens)

    def score(continuations: Sequence[Sequence[Sequence[int]]]) -> list[list[list[float]]]:
        parted.append(len(steps))
        return stock_score(continuations)

    monkeypatch.setattr(model.decoder, "step", step)
    monkeypatch.setattr(model.scratch, "score_continuations", score)
    model.run([runs_on], _nothing, _in_turn([rows]))
    assert len(parted) > 1
    assert parted == sorted(set(parted))
    model.stock.run(on_stock, _nothing, _nobody)
    for row, stock_row in zip(rows, on_stock, strict=True):
        alone = torch.tensor([_log_likelihood(served, row, label) for label in row.labels], dtype=torch.float64)
        for answered in (row, stock_row):
            probabilities = torch.tensor(answered.output.result().probabilities, dtype=torch.float64)
            assert torch.allclose(probabilities, alone.softmax(0), atol=1e-5)


@torch.inference_mode()
def _log_likelihood(served: Served, row: Row, label: tuple[int, ...]) -> float:
    whole = dataclasses.replace(row.tokens, ids=row.tokens.ids + label)
    prompts = stock_prefilled(served.model, [whole]).prompts
    inputs = prompts.forward_inputs(0, len(whole.ids))
    logits = served.stock.adapter.model(prompts.ids, prompts.mask, **inputs).logits[0].log_softmax(dim=-1)
    start = len(row.tokens.ids) - 1
    return sum(float(logits[start + n, token]) for n, token in enumerate(label))


def test_an_image_that_several_jobs_show_is_encoded_once(served: Served) -> None:
    def encoded() -> int:
        return served.model.stock.adapter.metrics()["feature_misses"]

    before = encoded()
    # No other test shows these.
    new = noise(1_001), noise(1_002)
    rows = [Row(prepared(served.model, [new[n % 2], "Say"]), Sampling(2)) for n in range(6)]
    served.model.run(rows, _nothing, _nobody)
    assert encoded() - before == 2


def test_sampling_depends_on_the_seed_and_not_on_the_batch(served: Served) -> None:
    parts = [served.images[min(served.images)], "Say"]
    sampling = Sampling(10, temperature=1.0, top_p=0.95, seed=7)
    alone = Row(prepared(served.model, parts), sampling)
    served.model.run([alone], _nothing, _nobody)
    others = [
        row_of(served.model, job, served.parts(job)) for job in mixed_jobs(5, sorted(served.images), longest=LONGEST)
    ]
    among = Row(prepared(served.model, parts), sampling)
    served.model.run([*others, among], _nothing, _nobody)
    assert among.output.result().ids == alone.output.result().ids


@pytest.mark.parametrize("options", [{}, {"top_p": 0.8}, {"top_k": 5, "temperature": 2.0}])
def test_stock_generate_draws_the_tokens_of_the_continuous_path(served: Served, options: dict[str, Any]) -> None:
    tokens = [prepared(served.model, [served.images[name], "Say"]) for name in sorted(served.images)[:4]]
    ends = served.model.codec.eos_ids
    samplings = [Sampling(10, eos_ids=ends, **{"temperature": 1.0, "seed": seed, **options}) for seed in range(4)]
    samplings[2] = Sampling(10, eos_ids=ends)

    def ids(model: Runner) -> list[tuple[int, ...]]:
        rows = [Row(prompt, sampling) for prompt, sampling in zip(tokens, samplings, strict=True)]
        model.run(rows, _nothing, _nobody)
        return [row.output.result().ids for row in rows]

    assert ids(served.model) == ids(served.model.stock)
