"""The best continuations of running beams: found on the device, and read by the host in one transfer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from worker.engine.beam_search import BeamSearch, Candidate
from worker.engine.generation_rules import GenerationRules
from worker.engine.logits_processors import BeamRules
from worker.engine.penalties import StockPenalties
from worker.engine.row import Row, TokenScore
from worker.engine.tensors import to_device


class RunningSearch:
    """A row's beam search in a running batch."""

    def __init__(self, row: Row, slot: int, rules: GenerationRules, device: torch.device) -> None:
        """`slot`: that of the row's prompt. `rules`: the checkpoint's."""
        self.row = row
        self.search = BeamSearch(row.sampling, rules.beams)
        #: By beam. Before the first step, all begin in one slot.
        self.slots = [slot]
        self._prompt = to_device([row.tokens.ids], device)
        self._rules = BeamRules(row, rules.scores, device) if rules.scores else None
        beams = row.sampling.num_beams
        self._penalties = (
            StockPenalties([row], beams, len(row.tokens.ids), device) if row.sampling.changes_logits else None
        )
        self._is_normalized_again = bool(rules.beams.get("renormalize_logits"))

    @property
    def kind(self) -> tuple[int, ...]:
        """A key that is equal for searches whose candidates are found together: numbers of beams, of slots, of compared
        candidates, and of likeliest tokens that are returned."""
        sampling = self.row.sampling
        return sampling.num_beams, len(self.slots), self.search.compared, sampling.logprobs or 0

    @property
    def changes_scores(self) -> bool:
        """Whether `changed` does."""
        return bool(self._rules or self._penalties or self._is_normalized_again)

    def changed(self, scores: Tensor) -> Tensor:
        """Log-probabilities (beams, vocabulary) after the checkpoint's rules and the row's penalties."""
        new = [[token.id for token in beam.tokens] for beam in self.search.running]
        ids = torch.cat([self._prompt.expand(len(new), -1), to_device(new, scores.device, self._prompt.dtype)], dim=1)
        # In stock `generate`'s order.
        scores = self._rules.apply(ids, scores) if self._rules else scores
        scores = self._penalties(ids, scores) if self._penalties else scores
        return scores.log_softmax(dim=-1) if self._is_normalized_again else scores


class BeamCandidates:
    """Finds the best candidates of searches."""

    def __init__(self, forbidden: Iterable[int], device: torch.device) -> None:
        """`forbidden`: tokens that no answer contains."""
        self._forbidden = to_device(list(forbidden), device, torch.long)
        self._device = device

    def find(
        self, logits: Tensor, places: Mapping[RunningSearch, Sequence[int]]
    ) -> dict[RunningSearch, list[Candidate]]:
        """The best candidates of each search, the best first; none for one with NaN.

        `places`: the row of `logits` (rows, vocabulary) of each slot of a search. The host waits for the device once.
        """
        groups: dict[tuple[int, ...], list[RunningSearch]] = {}
        for search in places:
            groups.setdefault(search.kind, []).append(search)
        ranked = [
            self._ranked(logits, group, [place for search in group for place in places[search]])
            for group in groups.values()
        ]
        numbers = torch.cat([part.flatten() for part in ranked]).tolist() if ranked else []
        found: dict[RunningSearch, list[Candidate]] = {}
        for group, part in zip(groups.values(), ranked, strict=True):
            for search in group:
                found[search] = _candidates(numbers[: part.shape[1]], search, logits.shape[1])
                del numbers[: part.shape[1]]
        return found

    def _ranked(self, logits: Tensor, searches: Sequence[RunningSearch], places: Sequence[int]) -> Tensor:
        """Numbers of searches of one kind, in double precision (searches, numbers): the candidates' scores, their
        places among all beams' tokens, their log-probabilities, then the log-probabilities of each beam's likeliest
        tokens, and these. `places`: the rows of `logits` (rows, vocabulary) of their slots."""
        beams, _, compared, top = searches[0].kind
        logits = logits.index_select(0, to_device(places, self._device))
        scores = logits.log_softmax(dim=-1, dtype=torch.float32).index_fill_(1, self._forbidden, -torch.inf)
        scores = scores.view(len(searches), -1, scores.shape[1])
        if scores.shape[1] < beams:
            scores = scores.repeat(1, beams, 1)
        for search, own in zip(searches, scores, strict=True):
            if search.changes_scores:
                own.copy_(search.changed(own))
        sums = to_device([[[beam.score] for beam in search.search.running] for search in searches], self._device)
        values, tokens = (scores + sums).flatten(1).topk(compared)
        # For probabilities that add up to 1, as for rows without beams.
        normalizers = scores.logsumexp(dim=-1, keepdim=True)
        logprobs = (scores - normalizers).flatten(1).gather(1, tokens)
        parts = [values, tokens, logprobs]
        if top:
            likeliest, tokens = scores.topk(min(top, scores.shape[2]))
            parts += [likeliest - normalizers, tokens]
        return torch.cat([part.flatten(1).double() for part in parts], dim=1)


def _candidates(numbers: Sequence[float], search: RunningSearch, vocabulary: int) -> list[Candidate]:
    """A search's candidates by its numbers: see BeamCandidates._ranked."""
    beams, _, count, _ = search.kind
    values, places, logprobs = (numbers[start : start + count] for start in range(0, 3 * count, count))
    if math.isnan(values[0]):
        return []
    rest = numbers[3 * count :]
    half, width = len(rest) // 2, len(rest) // 2 // beams
    likeliest = list(zip(map(int, rest[half:]), rest[:half], strict=True))
    # Without tokens that are impossible.
    tops = [
        tuple(pair for pair in likeliest[beam * width : (beam + 1) * width] if pair[1] > -math.inf)
        for beam in range(beams)
    ]
    found = []
    for value, place, logprob in zip(values, map(int, places), logprobs, strict=True):
        parent, token = divmod(place, vocabulary)
        found.append(Candidate(value, parent, TokenScore(token, logprob, tops[parent])))
    return found
