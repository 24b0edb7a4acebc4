"""Continuous batching: rows join and leave a running batch at any step (Yu et al., "Orca", 2022).

`worker/engine/progress.py` decides that a row ends: its answer is complete, or the job was canceled or is over its
limit. `_advance` then frees the row's slot.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from worker.engine.cuda_graphs import Step
from worker.engine.decoder import SlotDecoder
from worker.engine.interfaces import Admit, Decoder, Encode, PendingPrompt, SendHeartbeat
from worker.engine.logits_processors import RowRules
from worker.engine.next_tokens import NO_TOKEN, NextTokens, Running
from worker.engine.pauses import Pauses
from worker.engine.prefill import PREFILL_CHUNK_TOKENS, PromptPrefiller
from worker.engine.prefix_cache import PrefixCache
from worker.engine.progress import RowProgress
from worker.engine.row import Output, Row
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
        self.decoder.cache.reclaim_from(prefixes.evict)
        self._prefiller = PromptPrefiller(self.scratch, prefixes, encode, chunk_tokens)
        self.encode = encode
        self._label_tokens = label_tokens
        self._device = decoder.spec.device
        self._next_tokens = NextTokens([id for ids in stock.codec.bad_words_ids for id in ids], self._device)
        #: By slot of the decoder.
        self._running: dict[int, Running] = {}
        #: Rows whose prompt is prefilled in chunks, with the rest of it.
        self._prefilling: list[tuple[Row, PendingPrompt]] = []

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
            self._running.clear()
            self._prefilling.clear()
            self._prefiller.clear()
            self.decoder.clear()
            self.scratch.clear()
            raise

    def metrics(self) -> dict[str, int]:
        """Counters of the encoder cache and the prefix cache."""
        return self.stock.metrics() | self._prefiller.metrics()

    def _run(self, rows: Sequence[Row], heartbeat: SendHeartbeat, admit: Admit) -> None:
        self._join(rows, heartbeat, admit)
        while self._running or self._prefilling:
            self._prefill_a_chunk(heartbeat)
            if self._running:
                self._step()
            heartbeat()
            joining = admit(
                [*(run.progress.row for run in self._running.values()), *(row for row, _ in self._prefilling)]
            )
            if joining:
                self._join(joining, heartbeat, admit)

    def _step(self) -> None:
        for source, target in self.decoder.compact():
            self._running[target] = self._running.pop(source)
        slots = range(len(self.decoder.slots))
        tokens = [self._running[slot].progress.last if slot in self._running else 0 for slot in slots]
        self._advance(self.decoder.step(tokens), slots)

    def _join(self, rows: Sequence[Row], heartbeat: SendHeartbeat, admit: Admit) -> None:
        """Prefill the prompts of rows, with a step of the running rows between two parts of the work."""
        self._go_through(self._prefill(rows), heartbeat)

    def _go_through(self, work: Pauses[None], heartbeat: SendHeartbeat) -> None:
        for _ in work:
            heartbeat()
            if self._running:
                self._step()

    def _prefill(self, rows: Sequence[Row]) -> Pauses[None]:
        prompts = yield from self._prefiller.pending(rows)
        self._prefilling += [pair for pair in prompts if self._prefiller.is_long(pair[1])]
        short = [pair for pair in prompts if not self._prefiller.is_long(pair[1])]
        labeled = [pair for pair in short if pair[0].labels]
        continued = [pair for pair in short if not pair[0].labels]
        for number, group in enumerate((*_groups(labeled), *_groups(continued))):
            if number:
                yield
            if group[0][0].labels:
                yield from self._score_labels(*zip(*group, strict=True))
            else:
                self._begin(*zip(*group, strict=True))

    def _prefill_a_chunk(self, heartbeat: SendHeartbeat) -> None:
        """Prefill one chunk of the most urgent long prompt."""
        now = time.monotonic()
        for row, prompt in self._prefilling:
            reason = row.abort_reason(now)
            if reason:
                prompt.release()
                row.finish(Output((), reason))
        self._prefilling = [pair for pair in self._prefilling if not pair[0].is_done]
        if not self._prefilling:
            return
        pair = min(self._prefilling, key=lambda pair: (pair[0].priority, pair[0].arrived))
        self._prefilling.remove(pair)
        row, prompt = pair
        if self._prefiller.is_long(prompt):
            self._prefilling.append((row, self._prefiller.prefill_chunk(prompt)))
        elif row.labels:
            self._go_through(self._score_labels([row], [prompt]), heartbeat)
        else:
            self._begin([row], [prompt])

    def _begin(self, rows: Sequence[Row], prompts: Sequence[PendingPrompt]) -> None:
        """Prefill the prompts of rows that are continued, and add the rows to the running ones."""
        slots, logits = self.decoder.prefill(prompts)
        for slot, row in zip(slots, rows, strict=True):
            sampler = RowSampler(row.sampling) if row.sampling.temperature > 0 else None
            rules = RowRules(row, self.rules.scores, self._device) if self.rules.scores else None
            self._running[slot] = Running(RowProgress(row, self.codec.decode), sampler, rules)
        self._advance(logits, slots)

    def _score_labels(self, rows: Sequence[Row], prompts: Sequence[PendingPrompt]) -> Pauses[None]:
        """Prefill prompts together with their first labels, then score the other labels."""
        part, *others = label_parts(rows, self._label_tokens)
        firsts = [[label[0] for label in row.labels] for row in rows]
        slots, scores, behind = self.scratch.prefill_scored(prompts, firsts, [row.labels[part] for row in rows])
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
        running = {place: self._running[slot] for place, slot in enumerate(slots) if slot in self._running}
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
            del self._running[slot]
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
