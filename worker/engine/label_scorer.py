"""Scores the labels of rows on a decoder: in the pass that prefills their prompts, and in bounded parts after it."""

from __future__ import annotations

from collections.abc import Sequence

from worker.engine.decoder import SlotDecoder
from worker.engine.interfaces import PendingPrompt
from worker.engine.pauses import Pauses
from worker.engine.row import Row
from worker.engine.scoring import add_likelihoods, finish_scored, label_parts

#: Maximum label tokens scored at once: each needs the logits of the whole vocabulary.
LABEL_TOKENS = 2048


class LabelScorer:
    """Finishes rows with labels."""

    def __init__(self, decoder: SlotDecoder, max_tokens: int = LABEL_TOKENS) -> None:
        """`decoder`: must have no slot in use whenever `score` is called. `max_tokens`: see LABEL_TOKENS."""
        self._decoder = decoder
        self._max_tokens = max_tokens

    def room(self, row: Row) -> int:
        """Number of label tokens that a row needs room for, at most."""
        lengths = [len(label) for label in row.labels]
        return min(sum(lengths), max(self._max_tokens, *lengths)) if lengths else 0

    def score(self, rows: Sequence[Row], prompts: Sequence[PendingPrompt]) -> Pauses[None]:
        """Prefill prompts together with their first labels, then score the other labels."""
        part, *others = label_parts(rows, self._max_tokens)
        firsts = [[label[0] for label in row.labels] for row in rows]
        room = [prompt.end + self.room(row) for row, prompt in zip(rows, prompts, strict=True)]
        slots, scores, behind = self._decoder.prefill_scored(prompts, firsts, [row.labels[part] for row in rows], room)
        add_likelihoods(scores, part, behind)
        for part in others:
            yield
            add_likelihoods(scores, part, self._decoder.score_continuations([row.labels[part] for row in rows]))
        finish_scored(rows, scores)
        for slot, row in zip(slots, rows, strict=True):
            if row.output.exception():
                self._decoder.cache.spoil(slot)
        self._decoder.release(slots)
