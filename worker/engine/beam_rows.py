"""The rows of a running batch that search with beams: each beam has a slot, and copies what another one has there."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

from torch import Tensor

from worker.engine.beam_candidates import BeamCandidates, RunningSearch
from worker.engine.beam_scores import search_output
from worker.engine.beam_search import Candidate, rearranged
from worker.engine.decoder import SlotDecoder
from worker.engine.generation_rules import GenerationRules
from worker.engine.row import Output, Row, TokenScore
from worker.engine.scoring import overflow
from worker.engine.slots import Move
from worker.engine.stop_strings import Decode


class BeamRows:
    """Rows with beams."""

    def __init__(
        self, decoder: SlotDecoder, candidates: BeamCandidates, rules: GenerationRules, decode: Decode
    ) -> None:
        """`rules`: the checkpoint's."""
        self._decoder = decoder
        self._candidates = candidates
        self._rules = rules
        self._decode = decode
        self.running: list[RunningSearch] = []

    @property
    def slots(self) -> int:
        """Number of slots that are in use."""
        return sum(len(search.slots) for search in self.running)

    def room(self, row: Row) -> int:
        """Number of tokens that a row needs room for beside its prompt: each beam writes into a block of its own."""
        spec, beams = self._decoder.family.spec, row.sampling.num_beams
        return beams * spec.block_tokens if beams > 1 else 0

    def begin(self, row: Row, slot: int) -> None:
        """Begin the search of a row whose prompt was prefilled into a slot."""
        self.running.append(RunningSearch(row, slot, self._rules, self._decoder.family.spec.device))

    def move(self, move: Move) -> None:
        """Say that a slot's content was moved to another."""
        source, target = move
        for search in self.running:
            search.slots = [target if slot == source else slot for slot in search.slots]

    def newest(self) -> dict[int, int]:
        """The newest token of each beam, by slot."""
        return {
            slot: beam.tokens[-1].id
            for search in self.running
            for slot, beam in zip(search.slots, search.search.running, strict=True)
        }

    def advance(self, logits: Tensor, slots: Sequence[int]) -> None:
        """Continue the beams in `slots` by `logits` (slots, vocabulary), and free the slots of rows that are done."""
        if not self.running:
            return
        places = {slot: place for place, slot in enumerate(slots)}
        stepped = [search for search in self.running if search.slots[0] in places]
        found = self._candidates.find(logits, {search: [places[slot] for slot in search.slots] for search in stepped})
        now = time.monotonic()
        for search, candidates in found.items():
            self._advance(search, candidates, now)
        for search in [search for search in stepped if search.row.is_done]:
            self.release(search)

    def release(self, search: RunningSearch) -> None:
        """Free the slots of a row, which does not run any more."""
        self.running.remove(search)
        self._decoder.release(search.slots)

    def _advance(self, running: RunningSearch, candidates: Sequence[Candidate], now: float) -> None:
        """Make one step of a search by its candidates. `now`: time.monotonic()."""
        row, search = running.row, running.search
        if not candidates:
            row.fail(overflow())
            for slot in running.slots:
                self._decoder.cache.spoil(slot)
            return
        row.first_token = row.first_token or now
        search.advance(candidates, is_cut=row.abort_reason(now) is not None)
        if search.is_done:
            best, *others = (self._output(row, tokens) for tokens in search.answers)
            row.finish(dataclasses.replace(best, others=tuple(others)))
        elif len(running.slots) < row.sampling.num_beams:
            running.slots += self._decoder.fork(running.slots[0], row.sampling.num_beams - 1)
        else:
            running.slots, moves = rearranged(running.slots, [beam.parent for beam in search.running])
            if moves:
                self._decoder.copy(moves, len(row.tokens.ids))

    def _output(self, row: Row, tokens: Sequence[TokenScore]) -> Output:
        """The output of a beam."""
        return search_output(row, [token.id for token in tokens], self._decode, lambda ids, top: tokens[: len(ids)])
