"""Rows that run alone, and those of them that give way to others."""

from __future__ import annotations

from dataclasses import replace

from tests.support.engines import PICTURE, SOON, Gate, Joinable, Recorder, running, submit, text
from tests.support.rows import row
from tests.support.waiting import eventually
from worker.engine.prefix_cache import prefix_keys
from worker.engine.row import ImageSpan, Picture, Row, Tokens
from worker.engine.scheduler import Limits, next_batch
from worker.models.fake import FakeModel

WIDE = Limits(rows=100, tokens=1_000_000)


def alone(text: str = "alone", *, gives_way: bool = False, wanted: int = 3, **options: int) -> Row:
    made = row(text, wanted=wanted, **options)
    made.alone, made.gives_way = True, gives_way
    return made


def test_no_row_shares_the_batch_of_one_that_runs_alone() -> None:
    lonely, others = alone(arrived=0), [row(arrived=n) for n in (1, 2)]
    assert next_batch([*others, lonely], WIDE) == [lonely]
    assert next_batch([*others, alone(arrived=3)], WIDE) == others
    assert next_batch(others, WIDE, running=[lonely]) == []
    assert next_batch([lonely], WIDE, running=others) == []
    assert next_batch([alone(arrived=1), lonely], WIDE) == [lonely]


def test_a_row_runs_alone_between_others() -> None:
    gate = Gate()
    with running(gate) as engine:
        submit(engine, row("first"))
        assert gate.entered.wait(SOON)
        rows = submit(engine, row("second"), alone(), row("third"))
        gate.opened.set()
        assert [text(one) for one in rows] == ["second", "alone", "third"]
    assert ["alone"] in gate.batches
    assert all(len(batch) == 1 for batch in gate.batches if "alone" in batch)


def test_no_row_joins_one_that_runs_alone() -> None:
    model = Joinable(step_s=0.01)
    with running(model) as engine:
        first = alone(wanted=20)
        engine.submit(first)
        eventually(lambda: engine.running)
        (second,) = submit(engine, row("second"))
        assert (text(first), text(second)) == ("alone", "second")
    assert model.batches == [["alone"], ["second"]]


def test_pictures_of_a_row_that_runs_alone_are_not_encoded_with_others() -> None:
    recorder = Recorder()
    with running(recorder) as engine:
        one = alone()
        one.tokens = replace(one.tokens, pictures=(PICTURE,))
        engine.submit(one)
        assert text(one) == "alone"
    assert recorder.encoded == []


def test_a_running_row_gives_way_to_another() -> None:
    with running(FakeModel(step_s=0.01)) as engine:
        assert engine.is_idle
        background = alone("a" * 500, gives_way=True, wanted=500)
        engine.submit(background)
        eventually(lambda: engine.running)
        assert not engine.is_idle
        (other,) = submit(engine, row("other", wanted=2))
        assert background.output.result(SOON).finish_reason == "canceled"
        assert text(other) == "er"


def test_a_waiting_row_gives_way_to_another() -> None:
    gate = Gate()
    with running(gate) as engine:
        submit(engine, row("first"))
        assert gate.entered.wait(SOON)
        background, other = submit(engine, alone(gives_way=True, priority=10), row("other"))
        gate.opened.set()
        assert text(other) == "other"
        assert background.output.result(SOON).finish_reason == "canceled"


def test_no_cache_has_anything_of_a_prompt_apart() -> None:
    picture = Picture(b"key", None)
    tokens = Tokens(tuple(range(60)), (picture,), (ImageSpan(0, 20, 20),))
    apart = tokens.apart(b"salt")
    assert (apart.ids, apart.spans) == (tokens.ids, tokens.spans)
    assert apart.pictures[0].key != picture.key
    keys, others = ({key.key for key in prefix_keys(each)} for each in (tokens, apart))
    assert keys
    assert others
    assert not keys & others
