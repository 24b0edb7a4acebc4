"""Continuous batching: rows join and leave a running batch at any step."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from tasks.payloads import ModelInfo
from worker.engine.cuda_graphs import Step
from worker.engine.generation import NO_RULES, GenerationRules
from worker.engine.interfaces import Beat, Newcomers
from worker.engine.prefix_cache import Head, PrefixCache, heads
from worker.engine.processors import RowRules
from worker.engine.progress import Progress
from worker.engine.row import Output, Row, Tokens
from worker.engine.sampling import RowSampler
from worker.engine.stock import StockModel, finish_scored, memory_errors, overflow
from worker.engine.traced import Traced
from worker.models.idefics1.adapter import IdeficsAdapter
from worker.models.idefics1.decoder import IdeficsDecoder, Prefix, Prompt

#: Prompt tokens, padding included, that are read at once: more would hold up the running rows, and need memory.
PREFILL_TOKENS = 4096
#: Tokens of one prompt that are read at once; what is longer is read in pieces, with a step between them.
PIECE_TOKENS = 512
#: Tokens of labels that are scored at once: each needs the logits of the whole vocabulary.
LABEL_TOKENS = 2048
#: Where a model of small numbers has overflowed.
NO_TOKEN = -1

T = TypeVar("T")
#: Work that pauses wherever the running rows may take a step.
Pauses = Generator[None, None, T]


class _Running(NamedTuple):
    """A row that is continued. Without a sampler it is greedy."""

    progress: Progress
    sampler: RowSampler | None
    rules: RowRules | None


class ContinuousModel(StockModel):
    """IDEFICS on a decoder of our own, token for token what stock `generate` says in float32.

    Beams still run through stock `generate`.
    """

    def __init__(
        self,
        adapter: IdeficsAdapter,
        info: ModelInfo,
        max_tokens: int,
        prefix_cache_bytes: int = 2**29,
        record: Callable[[Step], Step] | None = None,
        rules: GenerationRules = NO_RULES,
    ) -> None:
        """`record`: see IdeficsDecoder."""
        super().__init__(adapter, info, max_tokens, rules)
        self._decoder = IdeficsDecoder(adapter.model, adapter.image_id, max_tokens, record)
        #: For beginnings and labels, which are read and not continued: the running rows' slots need no room for them.
        self._aside = self._decoder.another(PREFILL_TOKENS + LABEL_TOKENS)
        self._image_id = adapter.image_id
        self._features = adapter.features
        self._prefixes = PrefixCache(prefix_cache_bytes, self._decoder.position_bytes, adapter.feature_bytes)
        self._best = Traced(best)
        self._forbidden = torch.tensor(adapter.codec.bad_words_ids, device=adapter.model.device).flatten()
        #: By slot of the decoder.
        self._running: dict[int, _Running] = {}
        #: Rows whose prompt is read piece by piece, with what is still to be read.
        self._partly_read: list[tuple[Row, Prompt]] = []

    @torch.inference_mode()
    def run(self, rows: Sequence[Row], beat: Beat, newcomers: Newcomers) -> None:
        """See engine.Runner."""
        if rows[0].sampling.num_beams > 1:
            super().run(rows, beat, newcomers)
            return
        try:
            with memory_errors():
                self._run_on(rows, beat, newcomers)
        except BaseException:
            self._running.clear()
            self._partly_read.clear()
            self._decoder.clear()
            self._aside.clear()
            raise

    def figures(self) -> dict[str, int]:
        """See StockModel."""
        return super().figures() | self._prefixes.figures()

    def _run_on(self, rows: Sequence[Row], beat: Beat, newcomers: Newcomers) -> None:
        self._join(rows, beat)
        while self._running or self._partly_read:
            self._read_a_piece(beat)
            if self._running:
                self._step()
            beat()
            joining = newcomers(
                [*(run.progress.row for run in self._running.values()), *(row for row, _ in self._partly_read)]
            )
            if joining:
                self._join(joining, beat)

    def _step(self) -> None:
        for source, target in self._decoder.close_gaps():
            self._running[target] = self._running.pop(source)
        slots = range(self._decoder.slots)
        tokens = [self._running[slot].progress.last if slot in self._running else 0 for slot in slots]
        self._advance(self._decoder.step(tokens), slots)

    def _join(self, rows: Sequence[Row], beat: Beat) -> None:
        """Read their prompts, with a step of the others between two pieces."""
        unseeing = [row for row in rows if row.labels and not row.tokens.pictures]
        if unseeing:
            # Our network for labels reads images.
            self._score(unseeing, beat)
        self._go_through(self._reading([row for row in rows if not row.is_done]), beat)

    def _go_through(self, work: Pauses[None], beat: Beat) -> None:
        for _ in work:
            beat()
            if self._running:
                self._step()

    def _reading(self, rows: Sequence[Row]) -> Pauses[None]:
        prompts = yield from self._prompts(rows)
        self._partly_read += [(row, prompt) for row, prompt in prompts if len(prompt.ids) > PIECE_TOKENS]
        short = [(row, prompt) for row, prompt in prompts if len(prompt.ids) <= PIECE_TOKENS]
        labeled = [pair for pair in short if pair[0].labels]
        continued = [pair for pair in short if not pair[0].labels]
        for number, chunk in enumerate((*_chunks(labeled), *_chunks(continued))):
            if number:
                yield
            if chunk[0][0].labels:
                yield from self._score_labels(*zip(*chunk, strict=True))
            else:
                self._begin(*zip(*chunk, strict=True))

    def _read_a_piece(self, beat: Beat) -> None:
        """Bring the most urgent of the long prompts forward: the running rows wait for one piece between two steps."""
        now = time.monotonic()
        for row, _ in self._partly_read:
            reason = row.interruption(now)
            if reason:
                row.finish(Output((), reason))
        self._partly_read = [pair for pair in self._partly_read if not pair[0].is_done]
        if not self._partly_read:
            return
        pair = min(self._partly_read, key=lambda pair: (pair[0].priority, pair[0].arrived))
        self._partly_read.remove(pair)
        row, prompt = pair
        if len(prompt.ids) > PIECE_TOKENS:
            self._partly_read.append((row, self._less_a_piece(prompt)))
        elif row.labels:
            self._go_through(self._score_labels([row], [prompt]), beat)
        else:
            self._begin([row], [prompt])

    def _less_a_piece(self, prompt: Prompt) -> Prompt:
        """What is left of a prompt, once its first piece is read."""
        piece, rest = prompt.split(PIECE_TOKENS, self._image_id)
        return replace(rest, prefix=self._aside.read_prefix(piece))

    def _prompts(self, rows: Sequence[Row]) -> Pauses[list[tuple[Row, Prompt]]]:
        """Each row's prompt, less the beginning that it shares with others."""
        batch = [heads(row.tokens, self._image_id) for row in rows]
        for index, head in self._prefixes.worth_reading(batch):
            self._prefixes.keep(head, (yield from self._read_head(rows[index].tokens, head, batch[index])))
            yield
        known = [self._prefixes.longest(row_heads) for row_heads in batch]
        rests = [_rest(row.tokens, found) for row, found in zip(rows, known, strict=True)]
        # All at once, so that they are encoded in chunks.
        features = self._features(picture for rest in rests for picture in rest.pictures)
        return [(row, _prompt(rest, features, found)) for row, rest, found in zip(rows, rests, known, strict=True)]

    def _read_head(self, tokens: Tokens, head: Head, row_heads: Sequence[Head]) -> Pauses[Prefix]:
        beginning = Tokens(tokens.ids[: head.length], tokens.pictures[: head.images])
        # Examples that were shared before and one more: only what is new is read.
        shorter = self._prefixes.longest([each for each in row_heads if each.length < head.length])
        rest = _rest(beginning, shorter)
        prompt = _prompt(rest, self._features(rest.pictures), shorter)
        while len(prompt.ids) > PIECE_TOKENS:
            prompt = self._less_a_piece(prompt)
            yield
        return self._aside.read_prefix(prompt)

    def _begin(self, rows: Sequence[Row], prompts: Sequence[Prompt]) -> None:
        """Read the prompts of rows that are continued: from now on they run."""
        slots, logits = self._decoder.read(prompts)
        for slot, row in zip(slots, rows, strict=True):
            sampler = RowSampler(row.sampling) if row.sampling.temperature > 0 else None
            rules = RowRules(row, self.rules.scores, self._forbidden.device) if self.rules.scores else None
            self._running[slot] = _Running(Progress(row, self.decode), sampler, rules)
        self._advance(logits, slots)

    def _score_labels(self, rows: Sequence[Row], prompts: Sequence[Prompt]) -> Pauses[None]:
        """The first labels with the prompts, the others after them."""
        part, *others = _label_parts(rows)
        firsts = [[label[0] for label in row.labels] for row in rows]
        slots, scores, behind = self._aside.score(prompts, firsts, [row.labels[part] for row in rows])
        _add(scores, part, behind)
        for part in others:
            yield
            _add(scores, part, self._aside.try_out([row.labels[part] for row in rows]))
        self._aside.release(slots)
        finish_scored(rows, scores)
        if any(row.output.exception() for row in rows):
            self._aside.clear()

    def _advance(self, logits: Tensor, slots: Sequence[int]) -> None:
        """Give the rows in these slots their next tokens, and free the slots of those that are over."""
        now, tokens = time.monotonic(), self._best(logits, self._forbidden).tolist()
        running = [(place, slot, self._running[slot]) for place, slot in enumerate(slots) if slot in self._running]
        for place, slot, run in running:
            if tokens[place] == NO_TOKEN:
                run.progress.row.fail(overflow())
                # What stands there would spoil the next row's sums, although that row does not see it.
                self._decoder.wipe(slot)
                continue
            run.progress.take(_next_token(run, tokens[place], logits[place]), now)
        over = [slot for _, slot, run in running if run.progress.row.is_done]
        for slot in over:
            del self._running[slot]
        self._decoder.release(over)


def _next_token(run: _Running, likeliest: int, logits: Tensor) -> int:
    """A row's next token, given the one that greedy decoding without rules takes and its scores (vocabulary)."""
    if run.rules is None and run.sampler is None:
        return likeliest
    scores = run.rules.apply(run.progress.new, logits) if run.rules else logits
    return int((run.sampler.perturb(scores) if run.sampler else scores).argmax())


def best(logits: Tensor, forbidden: Tensor) -> Tensor:
    """Each row's most likely token of those that are not forbidden, which get no chance in `logits` either; NO_TOKEN
    where these are not numbers."""
    chances, tokens = logits.index_fill_(1, forbidden, -torch.inf).max(dim=-1)
    return torch.where(chances.isnan(), NO_TOKEN, tokens)


def _add(scores: Sequence[list[float]], part: slice, likelihoods: Sequence[Sequence[Sequence[float]]]) -> None:
    """To the scores of a part of the rows' labels, the log-probabilities of their tokens."""
    for row, labels in zip(scores, likelihoods, strict=True):
        for number, tokens in enumerate(labels, start=part.start):
            row[number] += sum(tokens)


def _label_parts(rows: Sequence[Row]) -> Iterator[slice]:
    """Slices of the rows' labels, each of about LABEL_TOKENS tokens at most for all the rows together."""
    most = max(len(row.labels) for row in rows)
    longest = max(len(label) for row in rows for label in row.labels)
    size = max(1, LABEL_TOKENS // (len(rows) * longest))
    return (slice(start, start + size) for start in range(0, most, size))


Known = tuple[Head, Prefix] | None


def _rest(tokens: Tokens, known: Known) -> Tokens:
    """A prompt without the beginning that is kept."""
    head = known[0] if known else None
    return Tokens(tokens.ids[head.length :], tokens.pictures[head.images :]) if head else tokens


def _prompt(rest: Tokens, features: Mapping[bytes, Tensor], known: Known) -> Prompt:
    return Prompt(rest.ids, [features[picture.key] for picture in rest.pictures], known[1] if known else None)


def _chunks(prompts: Sequence[tuple[Row, Prompt]]) -> Iterator[list[tuple[Row, Prompt]]]:
    """Prompts of like length together, as many as PREFILL_TOKENS and LABEL_TOKENS allow with their padding, one at
    least."""
    chunk: list[tuple[Row, Prompt]] = []
    for row, prompt in sorted(prompts, key=_width):
        if chunk and (len(chunk) + 1) * _width((row, prompt)) > PREFILL_TOKENS:
            yield chunk
            chunk = []
        chunk.append((row, prompt))
    if chunk:
        yield chunk


def _width(pair: tuple[Row, Prompt]) -> int:
    """Prompt tokens, or so many as a label is as dear as."""
    row, prompt = pair
    return max(len(prompt.ids), PREFILL_TOKENS // LABEL_TOKENS * max(map(len, row.labels), default=0))
