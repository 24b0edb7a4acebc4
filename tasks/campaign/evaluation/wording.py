"""The names of an evaluation's numbers, and the sentence that says which of two outputs is better. Pure."""

from __future__ import annotations

from .comparison import Difference
from .intervals import Estimate

#: By the field's name, in the order in which they are shown.
NAMES = {
    "accuracy": "accuracy",
    "accuracy_answered": "accuracy, answered rows only",
    "macro_f1": "macro F1",
    "calibration_error": "calibration error (ECE)",
    "exact": "exact match",
    "exact_answered": "exact match, answered rows only",
    "normalised": "normalised match",
    "normalised_answered": "normalised match, answered rows only",
}
NO_ANSWER = "(no answer)"
DIFFERENCE_COLUMNS = ("number", "A", "B", "B - A", "95 % interval", "p", "only A right", "only B right")
#: Smaller p-values are shown as smaller than this.
LEAST_P = 0.001


def percent(value: float | None) -> str:
    """A share from 0 to 1 in per cent."""
    return "-" if value is None else f"{100 * value:.1f} %"


def points(value: float | None) -> str:
    """A difference of shares in percentage points."""
    return "-" if value is None else f"{100 * value:+.1f}"


def interval(each: Estimate) -> str:
    """An estimate's interval in per cent."""
    if each.low is None or each.high is None:
        return "-"
    return f"{100 * each.low:.1f} to {100 * each.high:.1f} %"


def interval_in_points(each: Estimate) -> str:
    """A difference's interval in percentage points."""
    return "-" if each.low is None or each.high is None else f"{points(each.low)} to {points(each.high)}"


def chance(p_value: float) -> str:
    """A p-value."""
    return f"{p_value:.3f}" if p_value >= LEAST_P else f"< {LEAST_P}"


def verdict(name: str, difference: Difference) -> str:
    """Which is better by this number, by how much, and how sure that is."""
    told = f"B less A in {NAMES[name]}: {points(difference.difference.value)} points"
    if difference.difference.low is not None:
        told += f" (95 %: {interval_in_points(difference.difference)})"
    p = chance(difference.p_value)
    better = f"{difference.better.upper()} is better" if difference.better else "No difference can be told"
    return f"{told}, p {p if p.startswith('<') else f'= {p}'} by McNemar's exact test. {better}."


def difference_cells(name: str, each: Difference) -> tuple[str, ...]:
    """A difference as a row of `DIFFERENCE_COLUMNS`."""
    return (
        NAMES[name], percent(each.a.value), percent(each.b.value), points(each.difference.value),
        interval_in_points(each.difference), chance(each.p_value), f"{each.only_a_right:,}", f"{each.only_b_right:,}",
    )  # fmt: skip


def rows_told(rows: int, unanswered: int, without_truth: int) -> str:
    """How many rows one output's numbers are of."""
    left_out = f" ({without_truth:,} without one or unreadable left out)" if without_truth else ""
    answered = f"{unanswered:,} of them not answered, which counts as wrong" if unanswered else "all answered"
    return f"{rows:,} rows with a truth{left_out}, {answered}."


def pairs_told(rows: int, answered: int, only_in_a: int, only_in_b: int, without_truth: int) -> list[str]:
    """How many rows a comparison's numbers are of."""
    left_out = f" ({without_truth:,} without one or unreadable left out)" if without_truth else ""
    told = [
        f"{rows:,} rows with a truth are in both{left_out}.",
        f"{answered:,} of them are answered in both; a row without an answer counts as wrong.",
    ]
    if only_in_a or only_in_b:
        told.append(f"{only_in_a:,} more rows are only in A, {only_in_b:,} only in B.")
    return told
