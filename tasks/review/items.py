"""What is on the review list: a doubtful answer with all that a person needs, and that person's decision. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

#: Characters of a decision's answer that is none of the item's own.
MAX_ANSWER_CHARS = 4_000


@dataclass(frozen=True, slots=True)
class RankedAnswer:
    """One of a job's answers."""

    text: str
    #: From 0 to 1: a label's probability, as in `scores`, or a text's confidence, as in the result.
    confidence: float | None


@dataclass(frozen=True, slots=True)
class ReviewItem:
    """A job whose answer was less sure than it asked for."""

    #: The job's id.
    id: str
    #: Such as `idefics.classify`.
    task: str
    #: The question, the instruction or the conversation, as one text.
    asked: str
    #: The likeliest first: all labels, or the different texts.
    answers: tuple[RankedAnswer, ...]
    #: Of the model's own answer, as in the result, and the job's bound.
    confidence: float
    min_confidence: float
    #: Number of pictures.
    pictures: int
    #: Unix seconds.
    created: float
    metadata: dict[str, Any]
    #: The model's own answer, which is the result's `text`.
    answer: str = ""
    #: The model's own confidence where `confidence` is calibrated.
    raw_confidence: float | None = None
    #: Of the model.
    model: str = ""
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """What a person decided about an item."""

    #: The item's.
    id: str
    #: None: no answer is right, or it cannot be told.
    answer: str | None
    #: Unix seconds.
    decided: float


@dataclass(frozen=True, slots=True)
class Entry:
    """An item as it is stored, with what a reviewer does not see."""

    item: ReviewItem
    #: Bytes of each picture's copy. The copies are stored one after the other.
    picture_bytes: tuple[int, ...] = ()
    #: The job's callback for decisions: its URL and key, or nothing.
    callback: tuple[str, str] | None = None
    #: The job's submission, in unix seconds: another run of it is told from another job with its id.
    submitted_at: float | None = None
    #: Seconds that an item is kept, and its decision.
    ttl_s: int = field(default=0)

    def as_dict(self) -> dict[str, Any]:
        """It as JSON."""
        return {**asdict(self), "item": asdict(self.item)}


def entry_of(values: Mapping[str, Any]) -> Entry:
    """An entry from JSON, without fields that a newer worker has added."""
    item = _known(ReviewItem, values["item"])
    item["answers"] = tuple(RankedAnswer(**_known(RankedAnswer, each)) for each in item["answers"])
    known = _known(Entry, values)
    callback = known.get("callback")
    return Entry(**{
        **known,
        "item": ReviewItem(**item),
        "picture_bytes": tuple(known.get("picture_bytes", ())),
        "callback": None if callback is None else tuple(callback),
    })  # fmt: skip


def decision_of(values: Mapping[str, Any]) -> Decision:
    """A decision from JSON, without fields that a newer reviewer's program has added."""
    return Decision(**_known(Decision, values))


def _known(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    return {each.name: values[each.name] for each in fields(kind) if each.name in values}
