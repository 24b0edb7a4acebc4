"""Beam search of one row: the decision of each step, as transformers' `generate` makes it for that row alone.

The running beams are continued by tokens. A beam that a token ends is kept if it is among the best that ended. The
search is done when no running beam can become better than those, by the checkpoint's `early_stopping`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from worker.engine.row import Sampling, TokenScore
from worker.engine.slots import Move

#: Transformers' score of a beam that must not be chosen.
NEVER = -1.0e9


class Candidate(NamedTuple):
    """A running beam, by its index, continued by a token. `score`: the sum of the scores of its tokens."""

    score: float
    parent: int
    token: TokenScore


@dataclass(frozen=True, slots=True)
class Beam:
    """A beam's new tokens, the sum of their scores, and the index of the beam that it continues."""

    score: float
    tokens: tuple[TokenScore, ...] = ()
    parent: int = 0


class BeamSearch:
    """The beams of one row. Scores are single-precision numbers, computed in transformers' order of operations, so that
    equal ones are ordered alike."""

    def __init__(self, sampling: Sampling, rules: Mapping[str, Any]) -> None:
        """`rules`: those of generation_rules.BEAM_RULES that are not neutral."""
        self._sampling = sampling
        self._length_penalty: float = rules.get("length_penalty", 1.0)
        self._early_stopping: bool | str = rules.get("early_stopping", False)
        self._length = 0
        #: At first one beam is continued: the others would be the same.
        self.running = [Beam(0.0), *[Beam(NEVER)] * (sampling.num_beams - 1)]
        #: The best beams that ended, the best first, then None for each that is missing.
        self._ended: list[Beam | None] = [None] * sampling.num_beams
        #: Their scores by token (beams,).
        self._ended_scores = torch.full((sampling.num_beams,), NEVER)
        self.is_done = False

    @property
    def compared(self) -> int:
        """Number of candidates of a step: so many that enough of them do not end."""
        return max(2, 1 + len(self._sampling.eos_ids)) * self._sampling.num_beams

    @property
    def answers(self) -> list[tuple[TokenScore, ...]]:
        """The tokens of the best beams that ended, the best first, each with the token that ended it. As many as the
        row asks for, and no tokens for one that is missing."""
        return [beam.tokens if beam else () for beam in self._ended[: self._sampling.answers]]

    def advance(self, candidates: Sequence[Candidate], *, is_cut: bool) -> None:
        """Go on with the `compared` best candidates, the best first. `is_cut`: end with what is the best so far."""
        self._length += 1
        is_last = is_cut or self._length >= self._sampling.max_new_tokens
        scores = torch.tensor([candidate.score for candidate in candidates])
        ends = torch.tensor([is_last or candidate.token.id in self._sampling.eos_ids for candidate in candidates])
        values, places = (scores + ends * NEVER).topk(len(self.running))
        going_on = [
            self._continued(candidates[place], value)
            for value, place in zip(values.tolist(), places.tolist(), strict=True)
        ]
        self._end(candidates, scores, ends)
        self.running = going_on
        is_full = self._early_stopping is True and None not in self._ended
        self.is_done = is_full or bool(ends.all()) or not self._can_improve(values[0])

    def _continued(self, candidate: Candidate, score: float) -> Beam:
        return Beam(score, (*self.running[candidate.parent].tokens, candidate.token), candidate.parent)

    def _end(self, candidates: Sequence[Candidate], scores: torch.Tensor, ends: torch.Tensor) -> None:
        """Keep those of the best candidates that end, if they are among the best that ended.

        `scores` and `ends`, whether they end: (candidates,).
        """
        ends = ends & (torch.arange(len(ends)) < len(self.running))
        by_token = scores / self._length**self._length_penalty + ~ends * NEVER
        merged = torch.cat([self._ended_scores, by_token])
        self._ended_scores, places = merged.topk(len(self.running))
        count = len(self._ended)
        self._ended = [
            self._ended[place]
            if place < count
            else self._continued(candidates[place - count], candidates[place - count].score)
            if ends[place - count]
            else None
            for place in places.tolist()
        ]

    def _can_improve(self, best: torch.Tensor) -> bool:
        """Whether a running beam may become better than those that ended. `best`: the best one's score."""
        is_patient = self._early_stopping == "never" and self._length_penalty > 0
        length = self._sampling.max_new_tokens if is_patient else self._length
        possible, worst = best / length**self._length_penalty, self._ended_scores.min()
        return any(bool(possible > (worst if beam else NEVER)) for beam in self._ended)


def rearranged(slots: Sequence[int], parents: Sequence[int]) -> tuple[list[int], list[Move]]:
    """The slots of beams that continue those in `slots`, and what to copy between slots.

    `parents`: the index of the beam that each one continues. A beam stays in its parent's slot, unless another one
    does: then it takes the slot of a beam that none continues. So no slot is the source of one move and the target of
    another.
    """
    free = [slot for number, slot in enumerate(slots) if number not in parents]
    found: list[int] = []
    moves: list[Move] = []
    for parent in parents:
        source = slots[parent]
        if source in found:
            moves.append((source, free.pop()))
        found.append(moves[-1][1] if source in found else source)
    return found, moves
