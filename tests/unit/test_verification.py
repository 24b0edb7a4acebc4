"""Two answers to one job compared: what differs, and where first."""

from __future__ import annotations

from typing import Any

import pytest

from tasks import Caption, Classify
from tasks.results import Choice, Receipt, Result
from tasks.testing import canned
from tasks.verification import compare

URL = "https://example.com/a.jpg"


def answer(text: str = "a red cat", **receipt: Any) -> Result:
    fields: dict[str, Any] = {"model": "m", "dtype": "float32", "prompt": "p", "output": text, **receipt}
    return canned(text, Caption(image=URL)).model_copy(update={"receipt": Receipt(**fields)})


def classified(label: str, probability: float) -> Result:
    result = canned(label, Classify(image=URL, labels=["cat", "dog"]))
    scores = {"cat": probability, "dog": 1 - probability}
    return result.model_copy(update={"scores": scores, "receipt": answer().receipt})


def test_the_same_answer_by_other_circumstances_is_identical() -> None:
    first = answer(worker="a", version="1", engine="continuous", attempts=2, cached=True)
    found = compare(first, answer(worker="b", version="2", engine="stock", token_ends=[1, 5, 9]))
    assert found.is_identical
    assert (found.causes, found.answer) == ((), None)


@pytest.mark.parametrize(
    "changed",
    [{"model": "n"}, {"revision": "r"}, {"weights": "v"}, {"dtype": "bfloat16"}, {"quantization": "4bit"},
     {"prompt": "q"}, {"pixels": ["y"]}, {"sampling": {"top_p": 0.5}}, {"seed": 7}],
)  # fmt: skip
def test_what_an_answer_depends_on_is_compared(changed: dict[str, Any]) -> None:
    found = compare(answer(weights="w"), answer(**{"weights": "w", **changed}))
    assert (found.causes, found.answer) == (tuple(changed), None)
    assert not found.is_identical


def test_weights_that_a_worker_has_not_read_yet_are_not_compared() -> None:
    assert compare(answer(), answer(weights="w")).is_identical


def test_a_text_differs_at_a_token() -> None:
    # "a", " red" and " cat", or " dog".
    found = compare(answer("a red cat"), answer("a red dog", token_ends=[1, 5, 9]))
    assert found.answer == "token 3"
    assert compare(answer("a red cat"), answer("a red", token_ends=[1, 5])).answer == "token 3"
    assert compare(answer("x"), answer("a red", token_ends=[1, 5])).answer == "token 1"
    assert compare(answer("a red cat"), answer("a red dog")).answer == "character 7"


def test_tokens_without_text_and_the_end_are_compared() -> None:
    assert compare(answer(output="x"), answer(output="y")).answer == "token"
    cut = answer().model_copy(update={"finish_reason": "length"})
    assert compare(cut, answer()).answer == "finish_reason"


@pytest.mark.parametrize("reason", ["deadline", "canceled"])
def test_of_an_interrupted_answer_the_beginning_is_compared(reason: str) -> None:
    cut = answer("a red").model_copy(update={"finish_reason": reason})
    assert compare(cut, answer("a red cat")).is_identical
    assert compare(cut, answer("a blue cat", token_ends=[1, 6, 10])).answer == "token 2"


def several(*texts: str, reason: Any = "stop") -> Result:
    """Answers of one job; the last of them ends for a reason of its own."""
    ends = ["stop"] * (len(texts) - 1) + [reason]
    choices = [Choice(text=text, finish_reason=end) for text, end in zip(texts, ends, strict=True)]
    return answer(texts[0], output=" ".join(texts)).model_copy(update={"choices": choices})


def test_each_of_several_answers_is_compared() -> None:
    first = several("a cat", "a dog")
    assert compare(first, several("a cat", "a dog")).is_identical
    assert compare(first, several("a cat", "a cow")).answer == "choices"
    assert compare(first, several("a cat")).answer == "choices"
    assert compare(first, several("a cat", "a dog", reason="length")).answer == "choices"
    cut = several("a cat", "a d", reason="deadline")
    assert compare(cut, first).is_identical
    assert compare(cut, several("a cat", "a cow")).answer == "choices"


def test_labels_and_their_probabilities_are_compared() -> None:
    assert compare(classified("cat", 0.9), classified("cat", 0.9001)).is_identical
    assert compare(classified("cat", 0.9), classified("cat", 0.8)).answer == "probabilities"
    assert compare(classified("cat", 0.5001), classified("dog", 0.4999)).answer == "label"


def test_results_without_receipts_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="receipt"):
        compare(canned("a", Caption(image=URL)), answer())
