"""The rows of a running batch, by what they do: run, have their prompt prefilled, or wait for blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from tasks.errors import OutOfMemory
from worker.engine.beam_rows import BeamRows
from worker.engine.decoder import SlotDecoder
from worker.engine.interfaces import PendingPrompt
from worker.engine.next_tokens import NewState, Running
from worker.engine.row import Output, Row, Tokens, urgency
from worker.engine.slots import Move
from worker.observability.metrics import PREEMPTIONS

#: Room for this many tokens of each running row is left when others begin: a preempted row would be prefilled often if
#: it was preempted again at once.
SPARE_TOKENS = 16


class Batch:
    """Rows that were admitted and are not done, and the blocks of a decoder that they need."""

    def __init__(self, decoder: SlotDecoder, beams: BeamRows, new_state: NewState) -> None:
        self._decoder = decoder
        self._new_state = new_state
        #: Rows without beams, by slot of the decoder.
        self.running: dict[int, Running] = {}
        #: Rows with beams.
        self.beams = beams
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
        return [*self.holders, *self.waiting]

    @property
    def holders(self) -> list[Row]:
        """The rows that hold slots or blocks."""
        return [
            *(run.progress.row for run in self.running.values()),
            *(search.row for search in self.beams.running),
            *(row for row, _ in self.prefilling),
        ]

    @property
    def slots(self) -> int:
        """Number of slots that running rows hold."""
        return len(self.running) + self.beams.slots

    def move(self, move: Move) -> None:
        """Say that a slot's content was moved to another."""
        source, target = move
        if source in self.running:
            self.running[target] = self.running.pop(source)
        else:
            self.beams.move(move)

    def newest(self) -> dict[int, int]:
        """The newest token of each running row or beam, by slot."""
        return {slot: run.progress.last for slot, run in self.running.items()} | self.beams.newest()

    def tokens(self, row: Row) -> Tokens:
        """What is to be prefilled for a row: its prompt, and the new tokens that it had when it was preempted."""
        run = self._preempted.get(row)
        return dataclasses.replace(row.tokens, ids=(*row.tokens.ids, *run.progress.new)) if run else row.tokens

    def begin(self, row: Row, slot: int) -> None:
        """Add a row whose prompt was prefilled into a slot to the running ones, with the state that it had if it was
        preempted."""
        if row.sampling.num_beams > 1:
            self.beams.begin(row, slot)
        else:
            known = self._preempted.pop(row, None)
            self.running[slot] = known or self._new_state(row)

    def next_waiting(self, count: int) -> list[Row]:
        """Remove and return the first waiting rows."""
        rows, self.waiting = self.waiting[:count], self.waiting[count:]
        return rows

    def fitting(self, rows: Sequence[tuple[int, int]]) -> int:
        """How many of these rows, the first ones, can begin so that the running ones have room for SPARE_TOKENS more
        each: see KVCache.fitting."""
        return self._decoder.cache.fitting(rows, SPARE_TOKENS * self.slots)

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
        while self.slots and not self._decoder.has_room():
            if len(self.holders) == 1:
                return False
            self._preempt()
        return True

    def fail_last(self) -> None:
        """Fail the only row that holds blocks: all blocks together are too few for it."""
        (row,) = self.holders
        self._drop(row)
        row.fail(OutOfMemory())

    def free_for_chunk(self) -> None:
        """Preempt a row whose prompt is prefilled, or fail the only one: all blocks together are too few for it.

        While rows run, their end frees blocks.
        """
        if self.slots:
            return
        if len(self.holders) > 1:
            self._preempt()
        else:
            self.fail_last()

    def _preempt(self) -> None:
        """Take the blocks of the last row in order of urgency: it waits then, and keeps its new tokens and state. A row
        with beams begins anew."""
        self.preemptions += 1
        PREEMPTIONS.inc()
        row = max(self.holders, key=urgency)
        run = self._drop(row)
        if run:
            self._preempted[row] = run
        self.waiting.append(row)

    def _drop(self, row: Row) -> Running | None:
        """Free the slots and blocks of a row. Returns its state if it was running without beams."""
        for pair in [pair for pair in self.prefilling if pair[0] is row]:
            self.prefilling.remove(pair)
            pair[1].release()
        for search in [search for search in self.beams.running if search.row is row]:
            self.beams.release(search)
        slot = next((slot for slot, run in self.running.items() if run.progress.row is row), None)
        if slot is None:
            return None
        self._decoder.release([slot])
        return self.running.pop(slot)

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
        run, reason = self._preempted.pop(row, None), row.abort_reason(now)
        assert reason, "the row goes on"
        row.finish(run.progress.output(reason) if run else Output((), reason))

    def clear(self) -> None:
        """Forget all rows, after a failure."""
        self.running.clear()
        self.beams.running.clear()
        self.prefilling.clear()
        self.waiting.clear()
        self._preempted.clear()
