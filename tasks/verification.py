"""Compares two answers to one job by their receipts: the same, or where do they first differ?"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from .results import Choice, Receipt, Result

#: What an answer depends on, in the order in which it is compared.
CAUSES = ("model", "revision", "weights", "dtype", "quantization", "prompt", "pixels", "sampling", "seed")
#: How far off a label's probability may be, by quantization or dtype. The bundled checkpoints' are off by 0.000001 in
#: float32, 0.007 in bfloat16, 0.014 in 8-bit and 0.07 in 4-bit (`python -m worker.demo.golden`).
TOLERANCES = {"float32": 0.002, "bfloat16": 0.04, "float16": 0.04, "8bit": 0.08, "4bit": 0.25}
#: Why an answer ends that was not whole.
INTERRUPTED = ("canceled", "deadline")


def tolerance(dtype: str, quantization: str | None) -> float:
    """How far off a probability may be, by the precision of the loaded model."""
    return TOLERANCES.get(quantization or dtype, max(TOLERANCES.values()))


@dataclass(frozen=True, slots=True)
class Comparison:
    """What differs between two answers to one job."""

    #: Fields of the receipt on which the answer depends.
    causes: tuple[str, ...]
    #: What differs in the answer first; None if nothing does: "token 5", "label", "probabilities", "choices",
    #: "finish_reason".
    answer: str | None

    @property
    def is_identical(self) -> bool:
        return not self.causes and self.answer is None


def compare(first: Result, again: Result) -> Comparison:
    """Compare an answer with that of the same job run alone. Both must have receipts."""
    if first.receipt is None or again.receipt is None:
        raise ValueError("a result has no receipt")
    return Comparison(tuple(_causes(first.receipt, again.receipt)), _difference(first, again, again.receipt))


def _causes(first: Receipt, again: Receipt) -> list[str]:
    differing = [name for name in CAUSES if getattr(first, name) != getattr(again, name)]
    # A worker that still reads its weights does not know their hash.
    return [name for name in differing if name != "weights" or (first.weights and again.weights)]


def _difference(first: Result, again: Result, receipt: Receipt) -> str | None:
    if first.label != again.label:
        return "label"
    if first.scores is not None and again.scores is not None:
        off = max(abs(first.scores[label] - again.scores.get(label, -1.0)) for label in first.scores)
        return None if off <= tolerance(receipt.dtype, receipt.quantization) else "probabilities"
    if first.finish_reason in INTERRUPTED:
        # It was interrupted, so only its beginning can be the same.
        return None if again.text.startswith(first.text) else _place(first.text, again.text, receipt)
    if first.text != again.text:
        return _place(first.text, again.text, receipt)
    choices, others = first.choices or [], again.choices or []
    if len(choices) != len(others) or not all(map(_fits, choices, others)):
        return "choices"
    is_whole = all(choice.finish_reason not in INTERRUPTED for choice in choices)
    if is_whole and first.receipt is not None and first.receipt.output != receipt.output:
        # Such as a special token, of which the text has nothing.
        return "token"
    return None if first.finish_reason == again.finish_reason else "finish_reason"


def _fits(first: Choice, again: Choice) -> bool:
    """Whether one of several answers is the same alone. Of an interrupted one the beginning must be."""
    if first.finish_reason in INTERRUPTED:
        return again.text.startswith(first.text)
    return (first.text, first.finish_reason) == (again.text, again.finish_reason)


def _place(first: str, again: str, receipt: Receipt) -> str:
    """Where two texts differ: the number of the token of the second one, if its receipt tells their ends."""
    pairs = enumerate(zip(first, again, strict=False))
    same = next((n for n, (one, other) in pairs if one != other), min(len(first), len(again)))
    return f"token {bisect_right(receipt.token_ends, same) + 1}" if receipt.token_ends else f"character {same + 1}"
