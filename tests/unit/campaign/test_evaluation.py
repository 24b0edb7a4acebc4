"""The numbers of an evaluation, against scikit-learn and by hand."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support

from tasks.campaign.evaluation import (
    Columns,
    EvaluationError,
    LabelFigures,
    TextFigures,
    compare,
    evaluate,
    find_columns,
)
from tasks.campaign.evaluation.comparison import mcnemar
from tasks.campaign.evaluation.intervals import share
from tasks.campaign.evaluation.matching import accepted, normalised

LABELS = ("cat", "dog", "duck")
ALL = ["truth", "label", "score", "error_code"]


def _labels(rows: list[dict[str, Any]], **options: Any) -> LabelFigures:
    found = evaluate(rows, find_columns(ALL, Columns("truth")), **options).figures
    assert isinstance(found, LabelFigures)
    return found


def _texts(rows: list[dict[str, Any]]) -> TextFigures:
    found = evaluate(rows, find_columns(["truth", "text", "error_code", "finish_reason"], Columns("truth"))).figures
    assert isinstance(found, TextFigures)
    return found


def _row(truth: Any, label: str | None, score: float | None = None, code: str | None = None) -> dict[str, Any]:
    return {"truth": truth, "label": label, "score": score, "error_code": code}


def _sample(rows: int, seed: int = 1) -> list[dict[str, Any]]:
    """Rows of three classes; a surer answer is more often right. A tenth is not answered."""
    rng = random.Random(seed)
    sample = []
    for _ in range(rows):
        truth, score = rng.choice(LABELS), round(rng.random(), 3)
        answer = truth if rng.random() < 0.2 + score * 0.6 else rng.choice((*LABELS, "tent"))
        is_answered = rng.random() < 0.9
        sample.append(_row(truth, answer, score) if is_answered else _row(truth, None, None, "image_unreachable"))
    return sample


# Labels


def test_label_figures_agree_with_scikit_learn() -> None:
    rows = _sample(400)
    truths, answers = [row["truth"] for row in rows], [row["label"] or "-" for row in rows]
    answered = [row for row in rows if row["label"]]
    figures = _labels(rows)
    assert figures.rows == 400
    assert figures.unanswered == 400 - len(answered)
    assert figures.accuracy.value == pytest.approx(accuracy_score(truths, answers))
    assert figures.accuracy_answered.value == pytest.approx(
        accuracy_score([row["truth"] for row in answered], [row["label"] for row in answered])
    )
    assert figures.macro_f1.value == pytest.approx(f1_score(truths, answers, labels=LABELS, average="macro"))
    expected = precision_recall_fscore_support(truths, answers, labels=LABELS)
    got = [(each.precision, each.recall, each.f1, each.support) for each in figures.classes]
    assert [each.label for each in figures.classes] == list(LABELS)
    assert got == [pytest.approx(numbers) for numbers in zip(*expected, strict=True)]


def test_the_confusion_matrix_agrees_with_scikit_learn() -> None:
    rows = _sample(300)
    every = [*LABELS, "tent", "-"]
    expected = confusion_matrix([row["truth"] for row in rows], [row["label"] or "-" for row in rows], labels=every)
    got = {(cell.truth, cell.answer or "-"): cell.rows for cell in _labels(rows).confusion}
    told = {(a, b): expected[i][j] for i, a in enumerate(every) for j, b in enumerate(every) if expected[i][j]}
    assert got == told


def test_the_calibration_curve_agrees_with_scikit_learn() -> None:
    answered = [row for row in _sample(500) if row["label"]]
    right = [row["truth"] == row["label"] for row in answered]
    accuracy, score = calibration_curve(right, [row["score"] for row in answered], n_bins=10)
    curve = _labels(answered).calibration
    assert [each.accuracy for each in curve] == pytest.approx(list(accuracy))
    assert [each.score for each in curve] == pytest.approx(list(score))


def test_the_calibration_error_by_hand() -> None:
    rows = [_row("a", "a", 0.95), _row("a", "b", 0.85), _row("b", "b", 0.55), _row("b", "b", 0.55)]
    # Bins: 0.95 right, 0.85 wrong, twice 0.55 right.
    error = _labels(rows).calibration_error
    assert error is not None
    assert error.value == pytest.approx((0.05 + 0.85 + 2 * 0.45) / 4)


def test_a_row_without_an_answer_is_wrong_in_one_number_and_left_out_of_the_other() -> None:
    figures = _labels([_row("a", "a"), _row("a", "b"), _row("b", None, None, "image_unreachable"), _row("b", "")])
    assert (figures.accuracy.value, figures.accuracy.rows) == (0.25, 4)
    assert (figures.accuracy_answered.value, figures.accuracy_answered.rows) == (0.5, 2)
    assert figures.unanswered == 2


def test_the_answer_of_a_failed_row_does_not_count() -> None:
    assert _labels([_row("a", "a"), _row("a", "a", 0.9, "canceled")]).unanswered == 1


def test_a_class_that_no_answer_names_has_no_precision() -> None:
    of_b = _labels([_row("a", "a"), _row("b", "a")]).classes[1]
    assert (of_b.label, of_b.precision, of_b.recall, of_b.f1) == ("b", None, 0.0, 0.0)


def test_any_of_several_truths_is_right_and_the_answered_one_is_the_class() -> None:
    figures = _labels([_row('["cat", "dog"]', "dog"), _row('["cat", "dog"]', "duck")])
    assert {(cell.truth, cell.answer) for cell in figures.confusion} == {("dog", "dog"), ("cat", "duck")}


def test_rows_without_a_truth_are_left_out_and_counted() -> None:
    rows = [_row("a", "a"), _row("", "a"), _row(None, "b"), _row("[]", "b")]
    found = evaluate([*rows, "a row that cannot be read"], find_columns(ALL, Columns("truth")))
    assert found.figures.rows == 2  # `[]` is a text, not a list of truths
    assert found.without_truth == 3


@given(st.lists(st.sampled_from(LABELS), min_size=1, max_size=40))
@settings(max_examples=20, deadline=None)
def test_perfect_answers_give_perfect_figures(truths: list[str]) -> None:
    figures = _labels([_row(truth, truth, 1.0) for truth in truths])
    assert figures.accuracy.value == figures.accuracy_answered.value == figures.macro_f1.value == 1
    assert figures.calibration_error is not None
    assert figures.calibration_error.value == 0
    assert all((each.precision, each.recall, each.f1) == (1, 1, 1) for each in figures.classes)
    # Not all other rows are right because these are: the exact interval says so, the resamples would not.
    assert figures.accuracy.method == "exact"
    assert figures.accuracy.low == pytest.approx(0.025 ** (1 / len(truths)))
    assert figures.macro_f1.low is None


@given(st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from((*LABELS, None))), min_size=1, max_size=40))
@settings(max_examples=20, deadline=None)
def test_the_figures_fit_together(pairs: list[tuple[str, str | None]]) -> None:
    figures = _labels([_row(truth, answer) for truth, answer in pairs])
    assert sum(each.support for each in figures.classes) == figures.rows == sum(c.rows for c in figures.confusion)
    for each in (figures.accuracy, figures.accuracy_answered, figures.macro_f1):
        assert each.value is None or 0 <= each.value <= 1
        assert each.low is None or each.low <= (each.high or 0)
    assert sum(each.recall * each.support for each in figures.classes) == pytest.approx(
        (figures.accuracy.value or 0) * figures.rows
    )


# Intervals


def test_the_same_seed_gives_the_same_intervals() -> None:
    rows = _sample(200)
    assert _labels(rows, seed=7) == _labels(rows, seed=7)
    assert _labels(rows, seed=7).macro_f1 != _labels(rows, seed=8).macro_f1


def test_the_bootstrap_of_a_share_is_near_the_binomial_spread() -> None:
    each = share(300, 1_000)
    assert each.method == "bootstrap"
    spread = 1.96 * math.sqrt(0.3 * 0.7 / 1_000)
    assert each.low == pytest.approx(0.3 - spread, abs=0.003)
    assert each.high == pytest.approx(0.3 + spread, abs=0.003)


def test_a_share_of_nothing_has_the_exact_interval() -> None:
    # The rule of three.
    assert share(0, 300).high == pytest.approx(3.69 / 300, rel=0.01)
    assert share(0, 300).low == 0
    assert share(0, 0).value is None


# Texts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" A cat. ", "cat"),
        ("The two dogs!", "2 dogs"),
        ("Don\u2019t", "dont"),
        ("don't", "dont"),
        ("1,000 sheep", "1000 sheep"),
        ("2.5 m", "2.5 m"),
        ("U.S. flag", "us flag"),
        ("black-and-white", "black and white"),
        ("none", "0"),
        ("cat,dog", "cat dog"),
        ("an  umbrella\n", "umbrella"),
        ("...", ""),
    ],
)
def test_texts_are_normalised_as_for_vqa(text: str, expected: str) -> None:
    assert normalised(text) == expected


@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalised(normalised(text)) == normalised(text)


def test_texts_match_exactly_and_normalised() -> None:
    rows = [
        {"truth": "Two cats", "text": "Two cats"},
        {"truth": "two cats", "text": "2 cats."},
        {"truth": "two cats", "text": "a dog"},
        {"truth": "two cats", "text": "", "error_code": "image_invalid"},
        {"truth": "two cats", "text": "", "finish_reason": "stop"},
    ]
    figures = _texts(rows)
    assert (figures.rows, figures.unanswered) == (5, 1)
    assert (figures.exact.value, figures.normalised.value) == (0.2, 0.4)
    assert (figures.exact_answered.value, figures.normalised_answered.value) == (0.25, 0.5)


def test_several_truths_are_a_list_its_json_or_parts_between_separators() -> None:
    assert accepted(["a", "b"]) == accepted('["a", "b"]') == accepted("a | b", "|") == ("a", "b")
    assert accepted("a | b") == ("a | b",)
    assert accepted("[a") == ("[a",)
    assert accepted(3.0) == accepted(3) == ("3",)
    assert accepted(float("nan")) == accepted(None) == accepted("  ") == ()


def test_the_worst_mistakes_are_the_most_confident_ones() -> None:
    rows = [_row("a", "b", 0.6), _row("a", "a", 0.99), _row("a", "b", 0.9), _row("a", "b", 0.7), _row("a", None)]
    found = evaluate(rows, find_columns(ALL, Columns("truth")), keep=2)
    assert [row.number for row in found.mistakes] == [3, 4]


# Columns


def test_the_columns_of_a_campaign_are_found() -> None:
    labels = find_columns(["sku", *ALL], Columns("truth", id="sku"))
    assert (labels.kind, labels.answer, labels.score, labels.error) == ("labels", "label", "score", "error_code")
    text = find_columns(["truth", "text"], Columns("truth"))
    assert (text.kind, text.answer, text.score, text.error) == ("text", "text", None, None)
    chosen = find_columns(["truth", "colour", "score"], Columns("truth", answer="colour"))
    assert (chosen.kind, chosen.answer) == ("labels", "colour")
    assert find_columns(["truth", "colour", "score"], Columns("truth", answer="colour"), "text").score is None


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (Columns("thruth"), r"--truth: there is no column 'thruth'\. Did you mean 'truth'"),
        (Columns("truth", answer="lable"), r"--answer: .* Did you mean 'label'"),
        (Columns("truth", score="p"), "--score: there is no column 'p'"),
        (Columns("truth", id="scu"), "--id: there is no column 'scu'"),
    ],
)
def test_a_missing_column_is_named_with_the_nearest(columns: Columns, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        find_columns(ALL, columns)


def test_tables_that_cannot_be_evaluated_say_why() -> None:
    with pytest.raises(EvaluationError, match="--answer"):
        find_columns(["truth", "caption"], Columns("truth"))
    columns = find_columns(ALL, Columns("truth"))
    with pytest.raises(EvaluationError, match="no row has a value"):
        evaluate([_row("", "a")], columns)
    with pytest.raises(EvaluationError, match="Row 1: the score '7'"):
        evaluate([{**_row("a", "a"), "score": "7"}], columns)


# Two outputs


def test_mcnemars_test_by_hand() -> None:
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1
    assert mcnemar(0, 5) == mcnemar(5, 0) == pytest.approx(2 / 2**5)
    # 2 (C(10, 0) + C(10, 1) + C(10, 2)) / 2^10
    assert mcnemar(2, 8) == pytest.approx(2 * (1 + 10 + 45) / 2**10)


def _compared(a: list[dict[str, Any]], b: list[dict[str, Any]], **options: Any) -> Any:
    columns = find_columns(["sku", *ALL], Columns("truth", **options))
    return compare(a, b, columns, columns)


def test_two_outputs_are_compared_row_by_row() -> None:
    a = [_row("x", "x")] * 10 + [_row("x", "y")] * 12 + [_row("x", "x")] * 2 + [_row("x", None)]
    b = [_row("x", "x")] * 10 + [_row("x", "x")] * 12 + [_row("x", "y")] * 2 + [_row("x", "x")]
    found = _compared(a, b)
    comparison = found.comparison
    whole, answered = comparison.differences["accuracy"], comparison.differences["accuracy_answered"]
    assert (comparison.rows, comparison.answered, comparison.other_answers) == (25, 24, 15)
    assert (whole.both_right, whole.only_a_right, whole.only_b_right, whole.neither_right) == (10, 2, 13, 0)
    assert whole.difference.value == pytest.approx(11 / 25)
    assert whole.p_value == pytest.approx(mcnemar(2, 13))
    assert whole.better == "b"
    assert 0 < whole.difference.low < 11 / 25 < whole.difference.high
    assert answered.difference.value == pytest.approx(10 / 24)
    assert [pair.a.number for pair in found.differing] == list(range(11, 26))
    other_way = _compared(b, a).comparison.differences["accuracy"]
    assert (other_way.better, other_way.difference.value) == ("a", -whole.difference.value)


def test_an_output_compared_with_itself_shows_no_difference() -> None:
    rows = _sample(50)
    found = _compared(rows, rows)
    difference = found.comparison.differences["accuracy"]
    assert (difference.p_value, difference.better, difference.difference.value) == (1, None, 0)
    assert (found.differing, found.comparison.other_answers) == ([], 0)


def test_a_small_difference_is_not_called_better() -> None:
    a, b = [_row("x", "x"), _row("x", "y")], [_row("x", "x"), _row("x", "x")]
    assert _compared(a, b).comparison.differences["accuracy"].better is None


def test_rows_are_joined_by_their_ids_in_any_order() -> None:
    rows = [{**row, "sku": f"s{number}"} for number, row in enumerate(_sample(30))]
    shuffled = rows[1:]
    random.Random(2).shuffle(shuffled)
    found = _compared(rows, [*shuffled, {**_row("cat", "cat"), "sku": "new"}], id="sku").comparison
    assert (found.rows, found.only_in_a, found.only_in_b, found.other_answers) == (29, 1, 1, 0)


def test_outputs_that_do_not_fit_together_say_why() -> None:
    rows = [{**_row(truth, truth), "sku": truth} for truth in LABELS]
    with pytest.raises(EvaluationError, match=r"Row 1 of A is row 1 of B.*join them with --id"):
        _compared(rows, rows[::-1])
    with pytest.raises(EvaluationError, match="B: the id 'cat' stands in several rows"):
        _compared(rows, [rows[0], rows[0]], id="sku")
    with pytest.raises(EvaluationError, match="No row of A is in B"):
        _compared(rows[:1], rows[1:], id="sku")
    texts = find_columns(ALL, Columns("truth"), "text")
    with pytest.raises(EvaluationError, match="A holds labels and B text"):
        compare(rows, rows, find_columns(ALL, Columns("truth")), texts)
