"""What the worker writes of streamed jobs, into a real Redis: in pieces, bounded, and never in a job's way."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tasks.payloads import Complete
from tests.support.rows import row
from worker.demo import stack
from worker.engine.grammar import Grammar, GrammarTokens
from worker.engine.row import Row
from worker.jobs import live_updates
from worker.jobs.live_updates import TTL_S, LiveRun, LiveUpdates, pause_after
from worker.models import DEMO
from worker.models.fake import FakeCodec

KEY = "shop:idefics:updates:a"


class Story:
    """A streamed run with its row, and what is written of it. No thread writes: the test says when."""

    def __init__(self, server: redis.Redis) -> None:
        self.live = LiveUpdates(server, FakeCodec().decode, "shop:")
        self.run = self.begin()
        self.row = row()
        self.row.started = 1.0

    def begin(self, stop: tuple[str, ...] = ()) -> LiveRun:
        run = self.live.begin(Complete(prompt=["Hello"], stream=True, stop=list(stop)), "a")
        assert isinstance(run, LiveRun)
        return run

    def end(self, text: str) -> None:
        self.run.finish(text)
        self.run.close()


@pytest.fixture
def server(broker: stack.Broker) -> Iterator[redis.Redis]:
    with redis.Redis(port=broker.port) as server:
        server.flushall()
        yield server


@pytest.fixture
def story(server: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> Story:
    monkeypatch.setattr(LiveUpdates, "_write_forever", lambda self: None)
    return Story(server)


def add(row: Row, text: str) -> None:
    row.new_tokens += map(ord, text)


def written(server: redis.Redis) -> list[dict[str, str]]:
    """The entries so far; their runs by number, in order."""
    runs: list[bytes] = []
    entries = []
    for _, fields in server.xrange(KEY):
        if fields[b"run"] not in runs:
            runs.append(fields[b"run"])
        told = {name.decode(): value.decode() for name, value in fields.items()}
        entries.append(told | {"run": str(runs.index(fields[b"run"]))})
    return entries


def test_a_run_tells_its_stages_its_text_and_that_the_text_is_whole(story: Story, server: redis.Redis) -> None:
    story.run.loading_images()
    story.live.flush()
    story.run.follow(story.row)
    add(story.row, "A c")
    story.live.flush()
    story.live.flush()
    add(story.row, "at.")
    story.live.flush()
    story.end("A cat.")
    story.live.flush()
    story.live.flush()
    assert written(server) == [
        {"run": "0", "stage": "loading_images"},
        {"run": "0", "stage": "running", "text": "A c"},
        {"run": "0", "text": "at"},
        {"run": "0", "text": ".", "end": "1"},
    ]
    assert TTL_S - 60 < server.ttl(KEY) <= TTL_S


def test_a_short_job_is_one_entry(story: Story, server: redis.Redis) -> None:
    story.run.loading_images()
    story.run.follow(story.row)
    add(story.row, "A cat.")
    story.end("A cat.")
    story.live.flush()
    assert written(server) == [{"run": "0", "stage": "running", "text": "A cat.", "end": "1"}]


def test_a_job_that_is_not_streamed_writes_nothing(story: Story, server: redis.Redis) -> None:
    story.end("")
    run = story.live.begin(Complete(prompt=["Hello"]), "b")
    run.loading_images()
    run.follow(story.row)
    run.finish("A cat.")
    run.close()
    story.live.flush()
    assert [entry["run"] for entry in written(server)] == ["0"]
    assert server.dbsize() == 1


def test_what_may_become_a_stop_string_is_held_back(story: Story, server: redis.Redis) -> None:
    story.end("")
    run = story.begin(stop=("User:",))
    run.follow(story.row)
    for text in ("A cat Us", "er", ":"):
        add(story.row, text)
        story.live.flush()
    run.finish("A cat ")
    run.close()
    story.live.flush()
    assert [entry["text"] for entry in written(server) if "text" in entry] == ["A cat", " "]


def test_a_failed_job_writes_no_end(story: Story, server: redis.Redis) -> None:
    story.run.loading_images()
    story.run.close()
    story.live.flush()
    assert written(server) == [{"run": "0", "stage": "loading_images"}]


def test_a_row_that_the_engine_runs_once_more_begins_its_text_anew(story: Story, server: redis.Redis) -> None:
    story.run.follow(story.row)
    add(story.row, "A dog")
    story.live.flush()
    story.row.new_tokens = []
    add(story.row, "A cat")
    story.live.flush()
    assert [(entry["run"], entry["text"]) for entry in written(server)] == [("0", "A dog"), ("1", "A cat")]


def test_of_an_answer_in_a_form_the_text_of_its_grammar_is_told_also_when_it_begins_anew(
    story: Story, server: redis.Redis
) -> None:
    tokenizer = GrammarTokens((DEMO / "tokenizer.json").read_text(), 1403, (2, 1402)).tokenizer()
    grammar = Grammar(tokenizer, json.dumps({"grammars": [{"lark_grammar": "start: /( ?[a-z]+)+/"}]}), drops_blank=True)
    row = Row(story.row.tokens, story.row.sampling, grammar=grammar, started=1.0)
    story.run.follow(row)
    for text in (" a cat", " a red dog"):
        row.new_tokens = tokenizer.greedy_tokenize(text)
        story.live.flush()
    story.end("a red dog")
    story.live.flush()
    texts = [(entry["run"], entry["text"]) for entry in written(server) if "text" in entry]
    assert texts == [("0", "a cat"), ("1", "a red dog")]


def test_a_text_that_became_another_one_begins_anew(story: Story, server: redis.Redis) -> None:
    story.run.follow(story.row)
    add(story.row, "A dog")
    story.live.flush()
    story.end("A cat")
    story.live.flush()
    assert written(server)[1:] == [{"run": "1", "stage": "running", "text": "A cat", "end": "1"}]


def test_while_redis_is_away_updates_are_dropped_and_then_begin_anew(
    story: Story, server: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    story.run.follow(story.row)
    add(story.row, "A cat")
    assert story.live.flush()
    monkeypatch.setattr(story.live, "_redis", redis.Redis(port=1, retry=Retry(NoBackoff(), 0)))
    add(story.row, " on")
    lost = story.begin()
    lost.finish("lost")
    lost.close()
    assert not story.live.flush()
    monkeypatch.undo()
    add(story.row, " a mat")
    assert story.live.flush()
    assert [(entry["run"], entry["text"]) for entry in written(server)] == [("0", "A cat"), ("1", "A cat on a mat")]


def test_an_old_run_writes_seldom_and_no_more_than_so_much(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_updates, "MAX_CHARS", 100_000)
    story.run.follow(story.row)
    begun, entries = time.monotonic(), []
    for step in range(14_400):
        # An hour.
        add(story.row, "abcdefghij")
        entries.append(story.run.entry(begun + step * 0.25))
    sizes = [len(entry["text"]) for entry in entries if entry]
    assert 200 < len(sizes) < 1_000
    assert sum(sizes) < 110_000


def test_a_stream_is_trimmed(story: Story, server: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_updates, "MAX_ENTRIES", 100)
    story.run.follow(story.row)
    for _ in range(350):
        story.run.restart()
        story.live.flush()
    assert 100 <= server.xlen(KEY) < 300


def test_the_end_is_told_once(story: Story, server: redis.Redis) -> None:
    story.run.finish("A cat.")
    story.live.flush()
    story.run.close()
    story.live.flush()
    assert written(server) == [{"run": "0", "stage": "running", "text": "A cat.", "end": "1"}]


def test_no_text_breaks_the_writing_of_others(story: Story, server: redis.Redis) -> None:
    story.run.follow(story.row)
    add(story.row, "a\ud800\0\x1b[2J\r\n\u2028b")
    other: Any = story.begin()
    assert story.live.flush()
    assert written(server)[0]["text"] == "a?\0\x1b[2J\r\n\u2028b"
    other.close()


def test_the_more_a_write_takes_the_later_is_the_next_one() -> None:
    assert [pause_after(cpu_s) for cpu_s in (0.0, 0.0006, 0.003, 1.0)] == pytest.approx([0.05, 0.05, 0.2, 0.5])
