"""The rows of a running batch, by what they do: run, have their prompt prefilled, or wait for blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from tasks.errors import OutOfMemory
from worker.engine.decoder import SlotDecoder
from worker.engine.interfaces import PendingPrompt
from worker.engine.next_tokens import Running
from worker.engine.row import Output, Row, Tokens, urgency
from worker.observability.metrics import PREEMPTIONS

#: Room for this many tokens of each running row is left when others begin: a preempted row would be prefilled often if
#: it was preempted again at once.
SPARE_TOKENS = 16


class Batch:
    """Rows that were admitted and are not done, and the blocks of a decoder that they need."""

    def __init__(self, decoder: SlotDecoder) -> None:
        self._decoder = decoder
        #: By slot of the decoder.
        self.running: dict[int, Running] = {}
        #: Rows whose prompt is prefilled in chunks, with the rest of it.
        self.prefilling: list[tuple[Row, PendingPrompt]] = []
        #: Rows that wait until enough blocks are free.
        self.waiting: list[Row] = []
        #: Number of times that a row was preempted.
        self.preemptions = 0
        #: The state of preempted rows.
        self._preempted: dict[Row, Running] = {}

    @property
    def rows(self) -> list[Row]:
        """All rows."""
        return [
            *(run.progress.row for run in self.running.values()),
            *(row for row, _ in self.prefilling),
            *self.waiting,
        ]

    @property
    def holders(self) -> int:
        """Number of rows that hold slots or blocks."""
        return len(self.running) + len(self.prefilling)

    def tokens(self, row: Row) -> Tokens:
        """What is to be prefilled for a row: its prompt, and the new tokens that it had when it was preempted."""
        run = self._preempted.get(row)
        return dataclasses.replace(row.tokens, ids=(*row.tokens.ids, *run.progress.new)) if run else row.tokens

    def state(self, row: Row) -> Running | None:
        """The state of a row that runs again after it was preempted; None for another row."""
        return self._preempted.pop(row, None)

    def next_waiting(self, count: int) -> list[Row]:
        """Remove and return the first waiting rows."""
        rows, self.waiting = self.waiting[:count], self.waiting[count:]
        return rows

    def fitting(self, rows: Sequence[tuple[int, int]]) -> int:
        """How many of these rows, the first ones, can begin so that the running ones have room for SPARE_TOKENS more
        each: see KVCache.fitting."""
        return self._decoder.cache.fitting(rows, SPARE_TOKENS * len(self.running))

    def that_fit(
        self, group: Sequence[tuple[Row, PendingPrompt]], room: Callable[[Row], int]
    ) -> Sequence[tuple[Row, PendingPrompt]]:
        """The rows whose blocks are free, the most urgent first. The others wait. `room`: number of tokens that a row
        needs room for."""
        ordered = sorted(group, key=lambda pair: urgency(pair[0]))
        count = self.fitting([(prompt.start, room(row)) for row, prompt in ordered])
        for row, prompt in ordered[count:]:
            prompt.release()
            self.waiting.append(row)
        return ordered[:count]

    def make_room(self) -> bool:
        """Preempt rows until each running one has room for a token. Returns False if the last one has none."""
        while self.running and not self._decoder.has_room():
            if self.holders == 1:
                return False
            self._preempt()
        return True

    def fail_last(self) -> None:
        """Fail the only running row: all blocks together are too few for it."""
        ((slot, run),) = self.running.items()
        run.progress.row.fail(OutOfMemory())
        del self.running[slot]
        self._decoder.release([slot])

    def free_for_chunk(self) -> None:
        """Preempt a row whose prompt is prefilled, or fail the only one: all blocks together are too few for it.

        While rows run, their end frees blocks.
        """
        if self.running:
            return
        if self.holders > 1:
            self._preempt()
            return
        row, prompt = self.prefilling.pop()
        prompt.release()
        row.fail(OutOfMemory())

    def _preempt(self) -> None:
        """Take the blocks of the last row in order of urgency: it waits then, and keeps its new tokens and state."""
        self.preemptions += 1
        PREEMPTIONS.inc()
        slot = max(self.running, key=lambda slot: urgency(self.running[slot].progress.row), default=None)
        pair = max(self.prefilling, key=lambda pair: urgency(pair[0]), default=None)
        if pair and (slot is None or urgency(pair[0]) > urgency(self.running[slot].progress.row)):
            self.prefilling.remove(pair)
            pair[1].release()
            self.waiting.append(pair[0])
        elif slot is not None:
            run = self.running.pop(slot)
            self._decoder.release([slot])
            self._preempted[run.progress.row] = run
            self.waiting.append(run.progress.row)

    def end_aborted(self, now: float) -> None:
        """End rows that are canceled or passed their deadline while they do not run. `now`: time.monotonic()."""
        for row, prompt in [pair for pair in self.prefilling if pair[0].abort_reason(now)]:
            prompt.release()
            self._abort(row, now)
        for row in [row for row in self.waiting if row.abort_reason(now)]:
            self._abort(row, now)
        self.prefilling = [pair for pair in self.prefilling if not pair[0].is_done]
        self.waiting = [row for row in self.waiting if not row.is_done]

    def _abort(self, row: Row, now: float) -> None:
        run, reason = self.state(row), row.abort_reason(now)
        assert reason, "the row goes on"
        row.finish(run.progress.output(reason) if run else Output((), reason))

    def clear(self) -> None:
        """Forget all rows, after a failure."""
        self.running.clear()
        self.prefilling.clear()
        self.waiting.clear()
        self._preempted.clear()
