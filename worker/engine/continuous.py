"""Continuous batching: rows join and leave a running batch at any step (Yu et al., "Orca", 2022).

`worker/engine/progress.py` decides that a row ends: its answer is complete, or the job was canceled or is over its
limit. `_advance` then frees the row's slot.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tasks.errors import OutOfMemory
from worker.engine.batch import Batch, urgency
from worker.engine.cuda_graphs import Step
from worker.engine.decoder import SlotDecoder
from worker.engine.interfaces import Admit, Decoder, Encode, PendingPrompt, SendHeartbeat
from worker.engine.logits_processors import RowRules
from worker.engine.next_tokens import NO_TOKEN, NextTokens, Running
from worker.engine.pauses import Pauses
from worker.engine.prefill import PREFILL_CHUNK_TOKENS, PromptPrefiller
from worker.engine.prefix_cache import PrefixCache
from worker.engine.progress import RowProgress
from worker.engine.row import Row
from worker.engine.sampling import RowSampler
from worker.engine.scoring import add_likelihoods, finish_scored, label_parts, overflow
from worker.engine.stock import StockModel, memory_errors

#: Maximum prompt tokens, with padding, in one prefill: more would delay the running rows and need more memory.
PREFILL_TOKENS = 4096
#: Maximum label tokens scored at once: each needs the logits of the whole vocabulary.
LABEL_TOKENS = 2048


class ContinuousModel:
    """A checkpoint on its family's decoder. In float32, each token is the one of stock `generate`.

    Stock `generate` itself runs beams.
    """

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
    ) -> None:
        """`stock`: the same checkpoint. `record`, `blocks`: see SlotDecoder. `chunk_tokens`, `label_tokens`: see
        PREFILL_CHUNK_TOKENS and LABEL_TOKENS."""
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
        self._label_tokens = label_tokens
        self._device = decoder.spec.device
        self._next_tokens = NextTokens([id for ids in stock.codec.bad_words_ids for id in ids], self._device)
        self._batch = Batch()

    @torch.inference_mode()
    def run(self, rows: Sequence[Row], heartbeat: SendHeartbeat, admit: Admit) -> None:
        """Run rows and those that join them: see interfaces.Runner. Rows with beams run through stock `generate`."""
        if rows[0].sampling.num_beams > 1:
            self.stock.run(rows, heartbeat, admit)
            return
        try:
            with memory_errors():
                self._run(rows, heartbeat, admit)
        except BaseException:
            self._batch.clear()
            self._prefiller.clear()
            self.decoder.clear()
            self.scratch.clear()
            raise

    def metrics(self) -> dict[str, int]:
        """Counters of the caches, and of preempted rows."""
        own = {**self._prefiller.metrics(), **self.decoder.cache.metrics(), "preemptions": self._batch.preemptions}
        return self.stock.metrics() | own

    def _run(self, rows: Sequence[Row], heartbeat: SendHeartbeat, admit: Admit) -> None:
        batch = self._batch
        self._go_through(self._prefill(rows), heartbeat)
        while batch.rows:
            batch.end_aborted(time.monotonic())
            has_blocks = self._prefill_a_chunk(heartbeat)
            if not self._make_room():
                self._fail_last()
            self._step()
            heartbeat()
            # New rows come after those that wait for blocks, and these after a long prompt that does.
            if has_blocks and batch.waiting:
                self._resume(heartbeat)
            elif has_blocks and (joining := admit(batch.rows)):
                self._go_through(self._prefill(joining), heartbeat)

    def _make_room(self) -> bool:
        """Preempt rows until each running one has room for a token. Returns False if the last one has none."""
        while self._batch.running and not self.decoder.has_room():
            if self._batch.holders == 1:
                return False
            self._batch.preempt(self.decoder)
        return True

    def _fail_last(self) -> None:
        """Fail the only running row: all blocks together are too few for it."""
        ((slot, run),) = self._batch.running.items()
        run.progress.row.fail(OutOfMemory())
        del self._batch.running[slot]
        self.decoder.release([slot])

    def _step(self) -> None:
        running = self._batch.running
        if not running:
            return
        for source, target in self.decoder.compact():
            running[target] = running.pop(source)
        slots = range(len(self.decoder.slots))
        tokens = [running[slot].progress.last if slot in running else 0 for slot in slots]
        self._advance(self.decoder.step(tokens), slots)

    def _go_through(self, work: Pauses[None], heartbeat: SendHeartbeat) -> None:
        """Do work, with a step of the running rows between two parts of it."""
        for _ in work:
            heartbeat()
            # What is prefilled meanwhile may hold blocks that a running row will have later.
            if self._make_room():
                self._step()

    def _resume(self, heartbeat: SendHeartbeat) -> None:
        """Prefill waiting rows whose blocks are free. A row fails if it does not fit into all blocks."""
        batch = self._batch
        batch.waiting.sort(key=urgency)
        if batch.holders:
            tokens = [batch.tokens(row) for row in batch.waiting]
            cached = map(self._prefiller.cached_length, tokens)
            count = self._fitting(list(zip(cached, map(self._room, batch.waiting), strict=True)))
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

    def _fitting(self, rows: Sequence[tuple[int, int]]) -> int:
        """How many of these rows, the first ones, can begin so that a block is left for each running row: see
        KVCache.fitting."""
        return self.decoder.cache.fitting(rows, len(self._batch.running))

    def _room(self, row: Row) -> int:
        """Number of tokens for which a row needs room when it begins."""
        tokens = len(self._batch.tokens(row).ids)
        if not row.labels:
            return tokens
        lengths = [len(label) for label in row.labels]
        # Labels are scored in parts (see label_parts).
        return tokens + min(sum(lengths), max(self._label_tokens, *lengths))

    def _prefill(self, rows: Sequence[Row], *, are_new: bool = True) -> Pauses[None]:
        """Prefill the prompts of rows. `are_new`: see PromptPrefiller.pending."""
        found = yield from self._prefiller.pending([self._batch.tokens(row) for row in rows], are_new=are_new)
        pairs = list(zip(rows, found, strict=True))
        self._batch.prefilling += [pair for pair in pairs if self._prefiller.is_long(pair[1])]
        short = [pair for pair in pairs if not self._prefiller.is_long(pair[1])]
        labeled = [pair for pair in short if pair[0].labels]
        continued = [pair for pair in short if not pair[0].labels]
        for number, group in enumerate((*_groups(labeled), *_groups(continued))):
            if number:
                yield
            yield from self._begin(self._that_fit(group))

    def _that_fit(self, group: Sequence[tuple[Row, PendingPrompt]]) -> Sequence[tuple[Row, PendingPrompt]]:
        """The prompts of a group whose blocks are free. The other rows wait."""
        ordered = sorted(group, key=lambda pair: urgency(pair[0]))
        count = self._fitting([(prompt.start, self._room(row)) for row, prompt in ordered])
        for row, prompt in ordered[count:]:
            prompt.release()
            self._batch.waiting.append(row)
        return ordered[:count]

    def _prefill_a_chunk(self, heartbeat: SendHeartbeat) -> bool:
        """Prefill one chunk of the most urgent long prompt, if there is one. Returns False if blocks are short."""
        batch = self._batch
        if not batch.prefilling:
            return True
        row, prompt = pair = min(batch.prefilling, key=lambda pair: urgency(pair[0]))
        is_long = self._prefiller.is_long(prompt)
        if not self._fitting([(prompt.start, self._prefiller.chunk_end(prompt) if is_long else self._room(row))]):
            if not batch.running:
                self._free_for_chunk(pair)
            return False
        batch.prefilling.remove(pair)
        if is_long:
            batch.prefilling.append((row, self._prefiller.prefill_chunk(prompt)))
        else:
            self._go_through(self._begin([pair]), heartbeat)
        return True

    def _free_for_chunk(self, pair: tuple[Row, PendingPrompt]) -> None:
        """Preempt a row whose prompt is prefilled, or fail the only one: all blocks together are too few for it."""
        if self._batch.holders > 1:
            self._batch.preempt(self.decoder)
            return
        row, prompt = pair
        self._batch.prefilling.remove(pair)
        prompt.release()
        row.fail(OutOfMemory())

    def _begin(self, group: Sequence[tuple[Row, PendingPrompt]]) -> Pauses[None]:
        """Prefill the prompts of rows that are continued, or score the labels of rows with labels."""
        if not group:
            return
        rows, prompts = zip(*group, strict=True)
        if rows[0].labels:
            yield from self._score_labels(rows, prompts)
        else:
            self._continue(rows, prompts)

    def _continue(self, rows: Sequence[Row], prompts: Sequence[PendingPrompt]) -> None:
        """Prefill the prompts of rows that are continued, and add the rows to the running ones."""
        slots, logits = self.decoder.prefill(prompts)
        for slot, row in zip(slots, rows, strict=True):
            self._batch.running[slot] = self._batch.state(row) or self._new_state(row)
        self._advance(logits, slots)

    def _new_state(self, row: Row) -> Running:
        sampler = RowSampler(row.sampling) if row.sampling.temperature > 0 else None
        rules = RowRules(row, self.rules.scores, self._device) if self.rules.scores else None
        return Running(RowProgress(row, self.codec.decode), sampler, rules)

    def _score_labels(self, rows: Sequence[Row], prompts: Sequence[PendingPrompt]) -> Pauses[None]:
        """Prefill prompts together with their first labels, then score the other labels."""
        part, *others = label_parts(rows, self._label_tokens)
        firsts = [[label[0] for label in row.labels] for row in rows]
        room = [self._room(row) for row in rows]
        slots, scores, behind = self.scratch.prefill_scored(prompts, firsts, [row.labels[part] for row in rows], room)
        add_likelihoods(scores, part, behind)
        for part in others:
            yield
            add_likelihoods(scores, part, self.scratch.score_continuations([row.labels[part] for row in rows]))
        finish_scored(rows, scores)
        for slot, row in zip(slots, rows, strict=True):
            if row.output.exception():
                self.scratch.cache.spoil(slot)
        self.scratch.release(slots)

    def _advance(self, logits: Tensor, slots: Sequence[int]) -> None:
        """Give the rows in `slots` their next tokens by `logits` (slots, vocabulary), and free the slots of rows that
        are done."""
        running = {place: run for place, slot in enumerate(slots) if (run := self._batch.running.get(slot))}
        tokens = self._next_tokens.choose(logits, running)
        now = time.monotonic()
        for place, run in running.items():
            if tokens[place] == NO_TOKEN:
                run.progress.row.fail(overflow())
                self.decoder.cache.spoil(slots[place])
                continue
            run.progress.take(tokens[place], now)
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
