"""Continuous batching: rows join and leave a running batch at any step (Yu et al., "Orca", 2022).

`worker/engine/progress.py` decides that a row ends: its answer is complete, or the job was canceled or is over its
limit. `_advance` then frees the row's slot.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tasks.errors import OutOfMemory
from worker.engine.batch import Batch
from worker.engine.beam_candidates import BeamCandidates
from worker.engine.beam_rows import BeamRows
from worker.engine.cuda_graphs import Step
from worker.engine.decoder import SlotDecoder
from worker.engine.interfaces import Admit, Decoder, Encode, EnginePath, PendingPrompt, SendHeartbeat
from worker.engine.label_scorer import LABEL_TOKENS, LabelScorer
from worker.engine.next_tokens import NewState, NextTokens
from worker.engine.pauses import Pauses
from worker.engine.prefill import PREFILL_CHUNK_TOKENS, PromptPrefiller
from worker.engine.prefix_cache import PrefixCache
from worker.engine.progress import grammars_going_on
from worker.engine.row import Row, urgency
from worker.engine.scoring import overflow
from worker.engine.step_metrics import phase
from worker.engine.stock import StockModel, memory_errors
from worker.engine.token_scores import NO_TOKEN

#: Maximum prompt tokens, with padding, in one prefill: more would delay the running rows and need more memory.
PREFILL_TOKENS = 4096
#: Maximum tokens of long prompts that are prefilled between two steps, in chunks of several prompts: so many on a GPU,
#: which has work for all its cores then. On a CPU one chunk, since the running rows wait for it.
BUDGET_TOKENS = 2048


class ContinuousModel:
    """A checkpoint on its family's decoder. In float32, each token is the one of stock `generate`."""

    def __init__(
        self,
        stock: StockModel,
        decoder: Decoder,
        encode: Encode,
        prefix_cache_bytes: int = 2**29,
        record: Callable[[Step], Step] | None = None,
        *,
        blocks: int = 0,
        chunk_tokens: int = PREFILL_CHUNK_TOKENS,
        label_tokens: int = LABEL_TOKENS,
        budget_tokens: int | None = None,
    ) -> None:
        """`stock`: the same checkpoint. `record`, `blocks`: see SlotDecoder. `chunk_tokens`, `label_tokens`,
        `budget_tokens`: see PREFILL_CHUNK_TOKENS, LABEL_TOKENS and BUDGET_TOKENS."""
        self.stock = stock
        self.info, self.rules, self.codec = stock.info, stock.rules, stock.codec
        self.prefetch, self.help = stock.prefetch, stock.help
        self.decoder = SlotDecoder(decoder, stock.max_tokens, record, blocks)
        #: Slots for prefixes and scored rows, which are not continued and need no slot among the running rows.
        self.scratch = self.decoder.empty_like(PREFILL_TOKENS + LABEL_TOKENS)
        prefixes = PrefixCache(prefix_cache_bytes, self.decoder.cache.position_bytes, decoder.spec.carry_bytes)
        self.decoder.cache.reclaim_from(prefixes)
        self._prefiller = PromptPrefiller(self.scratch, prefixes, encode, chunk_tokens)
        self.encode = encode
        self._labels = LabelScorer(self.scratch, label_tokens)
        self._device = decoder.spec.device
        self._budget_tokens = budget_tokens or (BUDGET_TOKENS if self._device.type == "cuda" else chunk_tokens)
        forbidden = tuple(itertools.chain(*stock.codec.bad_words_ids))
        self._next_tokens = NextTokens(forbidden, self._device, stock.masks)
        beams = BeamRows(self.decoder, BeamCandidates(forbidden, self._device), stock.rules, stock.codec.decode)
        self._batch = Batch(self.decoder, beams, NewState(stock.rules, stock.codec.decode, self._device))

    @torch.inference_mode()
    def run(self, rows: Sequence[Row], heartbeat: SendHeartbeat, admit: Admit) -> None:
        """Run rows and those that join them: see interfaces.Runner."""
        try:
            with memory_errors():
                self._run(rows, heartbeat, admit)
        except BaseException:
            self._batch.clear()
            self._prefiller.clear()
            self.decoder.clear()
            self.scratch.clear()
            raise

    def path(self, row: Row) -> EnginePath:
        """Continuous batching, for every row."""
        return "continuous"

    def metrics(self) -> dict[str, int]:
        """Counters of the caches, and of preempted rows."""
        own = {**self._prefiller.metrics(), **self.decoder.cache.metrics(), "preemptions": self._batch.preemptions}
        return self.stock.metrics() | own

    def _run(self, rows: Sequence[Row], heartbeat: SendHeartbeat, admit: Admit) -> None:
        batch = self._batch
        self._go_through(self._prefill(rows), heartbeat)
        while batch.rows:
            batch.end_aborted(time.monotonic())
            has_blocks = self._prefill_chunks(heartbeat)
            if not batch.make_room():
                batch.fail_last()
            self._step()
            heartbeat()
            # New rows come after those that wait for blocks, and these after a long prompt that does.
            if has_blocks and batch.waiting:
                self._resume(heartbeat)
            elif has_blocks and (joining := admit(batch.rows)):
                self._go_through(self._prefill(joining), heartbeat)

    @phase("decode")
    def _step(self) -> None:
        batch = self._batch
        if not batch.slots:
            return
        for move in self.decoder.compact():
            batch.move(move)
        slots, newest = range(len(self.decoder.slots)), batch.newest()
        self._advance(self.decoder.step([newest.get(slot, 0) for slot in slots]), slots)

    def _go_through(self, work: Pauses[None], heartbeat: SendHeartbeat) -> None:
        """Do work, with a step of the running rows between two parts of it."""
        for _ in work:
            heartbeat()
            # What is prefilled meanwhile may hold blocks that a running row will have later.
            if self._batch.make_room():
                self._step()

    def _resume(self, heartbeat: SendHeartbeat) -> None:
        """Prefill waiting rows whose blocks are free. A row fails if it does not fit into all blocks."""
        batch = self._batch
        batch.waiting.sort(key=urgency)
        if batch.holders:
            tokens = [batch.tokens(row) for row in batch.waiting]
            cached = map(self._prefiller.cached_length, tokens)
            count = batch.fitting(list(zip(cached, map(self._room, batch.waiting), strict=True)))
            if count:
                self._go_through(self._prefill(batch.next_waiting(count), are_new=False), heartbeat)
            return
        (row,) = batch.next_waiting(1)
        for _ in range(2):
            self._go_through(self._prefill([row], are_new=False), heartbeat)
            if row not in batch.waiting:
                return
            batch.waiting.remove(row)
            # A prefix that ends within a block needs one block more.
            self._prefiller.clear()
        row.fail(OutOfMemory())

    def _room(self, row: Row) -> int:
        """Number of tokens that a row needs room for when it begins."""
        return len(self._batch.tokens(row).ids) + self._labels.room(row) + self._batch.beams.room(row)

    def _prefill(self, rows: Sequence[Row], *, are_new: bool = True) -> Pauses[None]:
        """Prefill the prompts of rows. `are_new`: see PromptPrefiller.pending."""
        found = yield from self._prefiller.pending([self._batch.tokens(row) for row in rows], are_new=are_new)
        pairs = list(zip(rows, found, strict=True))
        self._batch.prefilling += [pair for pair in pairs if self._prefiller.is_long(pair[1])]
        short = [pair for pair in pairs if not self._prefiller.is_long(pair[1])]
        yield from self._begin_all(short)

    def _begin_all(self, pairs: Sequence[tuple[Row, PendingPrompt]]) -> Pauses[None]:
        """Prefill prompts that are not long, with pauses between groups of them."""
        labeled = [pair for pair in pairs if pair[0].labels]
        continued = [pair for pair in pairs if not pair[0].labels]
        for number, group in enumerate((*_groups(labeled), *_groups(continued))):
            if number:
                yield
            yield from self._begin(self._batch.that_fit(group, self._room))

    def _prefill_chunks(self, heartbeat: SendHeartbeat) -> bool:
        """Prefill chunks of the most urgent long prompts within the budget. Returns False if blocks are short."""
        batch, prefiller = self._batch, self._prefiller
        if not batch.prefilling:
            return True
        batch.prefilling.sort(key=lambda pair: urgency(pair[0]))
        needs = [(prompt.start, self._chunk_end(row, prompt)) for row, prompt in batch.prefilling]
        totals = itertools.accumulate(end - start for start, end in needs)
        within = sum(total <= self._budget_tokens for total in totals)
        count = batch.fitting(needs[: max(1, within)])
        if not count:
            batch.free_for_chunk()
            return False
        chosen, batch.prefilling = batch.prefilling[:count], batch.prefilling[count:]
        long = [pair for pair in chosen if prefiller.is_long(pair[1])]
        if long:
            rests = prefiller.prefill_chunks([prompt for _, prompt in long])
            batch.prefilling += [(row, rest) for (row, _), rest in zip(long, rests, strict=True)]
        self._go_through(self._begin_all([pair for pair in chosen if pair not in long]), heartbeat)
        return True

    def _chunk_end(self, row: Row, prompt: PendingPrompt) -> int:
        """Number of tokens that a row needs room for when its next chunk is prefilled."""
        return self._prefiller.chunk_end(prompt) if self._prefiller.is_long(prompt) else self._room(row)

    def _begin(self, group: Sequence[tuple[Row, PendingPrompt]]) -> Pauses[None]:
        """Prefill the prompts of rows that are continued, or score the labels of rows with labels."""
        if not group:
            return
        rows, prompts = zip(*group, strict=True)
        if rows[0].labels:
            yield from self._labels.score(rows, prompts)
        else:
            self._continue(rows, prompts)

    @phase("prefill")
    def _continue(self, rows: Sequence[Row], prompts: Sequence[PendingPrompt]) -> None:
        """Prefill the prompts of rows that are continued, and add the rows to the running ones."""
        slots, logits = self.decoder.prefill(prompts)
        for slot, row in zip(slots, rows, strict=True):
            self._batch.begin(row, slot)
        self._advance(logits, slots)

    def _advance(self, logits: Tensor, slots: Sequence[int]) -> None:
        """Give the rows in `slots` their next tokens by `logits` (slots, vocabulary), and free the slots of rows that
        are done."""
        # First, since the others change the logits.
        self._batch.beams.advance(logits, slots)
        running = {place: run for place, slot in enumerate(slots) if (run := self._batch.running.get(slot))}
        if not running:
            return
        tokens = self._next_tokens.choose(logits, running)
        now = time.monotonic()
        for place, run in running.items():
            if tokens[place].id == NO_TOKEN:
                run.progress.row.fail(overflow())
                self.decoder.cache.spoil(slots[place])
                continue
            run.progress.take(tokens[place], now)
        self.stock.masks.compute(grammars_going_on(run.progress for run in running.values()))
        done = [slots[place] for place, run in running.items() if run.progress.row.is_done]
        for slot in done:
            del self._batch.running[slot]
        self.decoder.release(done)


def _groups(prompts: Sequence[tuple[Row, PendingPrompt]]) -> Iterator[list[tuple[Row, PendingPrompt]]]:
    """Group prompts of similar length, within PREFILL_TOKENS and LABEL_TOKENS with padding; one prompt at least."""
    group: list[tuple[Row, PendingPrompt]] = []
    for row, prompt in sorted(prompts, key=_width):
        if group and (len(group) + 1) * _width((row, prompt)) > PREFILL_TOKENS:
            yield group
            group = []
        group.append((row, prompt))
    if group:
        yield group


def _width(pair: tuple[Row, PendingPrompt]) -> int:
    """The cost of a row's prefill, in tokens of a prompt: its prompt's or its longest label's, whichever is greater."""
    row, prompt = pair
    return max(len(prompt.segment.ids), PREFILL_TOKENS // LABEL_TOKENS * max(map(len, row.labels), default=0))
