"""A calibration of confidences: fitted on labelled answers of one model, kept as a JSON file, read by its workers.

A model may say 0.9 and be right seven times in ten. The calibrated confidence is the sigmoid of
`logit(confidence) / temperature + offset`, fitted so that it is the share of right answers (temperature scaling, Guo et
al. 2017, with the offset of Platt scaling, 1999, which a mean over tokens needs).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

#: What a model was fitted on: labels of `classify`, or texts of the other tasks.
AnswerKind = Literal["labels", "text"]
#: Confidences nearer to 0 or 1 count as this near, since their logits are infinite.
NEAREST = 1e-6


class CalibrationError(ValueError):
    """The file cannot be used; the message says why."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Curve(_Part):
    """From a model's confidence to a calibrated one."""

    temperature: float = Field(gt=0.0)
    offset: float

    def calibrated(self, confidence: float) -> float:
        """The calibrated confidence, 0 to 1."""
        return 1 / (1 + math.exp(-(logit(confidence) / self.temperature + self.offset)))


class Fit(_Part):
    """A curve for all answers of a kind, and curves of their own for answers with some labels."""

    curve: Curve
    classes: dict[str, Curve] = {}
    rows: int
    """Answers that it was fitted on."""

    def calibrated(self, confidence: float, label: str | None) -> float:
        """The calibrated confidence of an answer, `label` being that of `classify`."""
        return self.classes.get(label or "", self.curve).calibrated(confidence)


class Calibration(_Part):
    """A calibration file."""

    model_id: str
    model_revision: str | None = None
    """None: any revision."""
    labels: Fit | None = None
    text: Fit | None = None

    def calibrated(self, confidence: float, label: str | None) -> float | None:
        """The calibrated confidence of a text, or of a label where one is given. None without a fit of this kind."""
        fit = self.text if label is None else self.labels
        return None if fit is None else fit.calibrated(confidence, label)

    def check_model(self, id: str, revision: str | None) -> None:
        """Raises CalibrationError if the file was fitted on another model."""
        if (self.model_id, self.model_revision or revision) != (id, revision):
            raise CalibrationError(
                f"it is for the model {_named(self.model_id, self.model_revision)}, and this worker serves "
                f"{_named(id, revision)}: calibrate this model, or leave IDEFICS_CALIBRATION out."
            )


def read_calibration(path: Path) -> Calibration:
    """The calibration in a file. Raises CalibrationError."""
    try:
        return Calibration.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        told = error.strerror if isinstance(error, OSError) else f"{error.error_count()} fields are wrong"
        raise CalibrationError(f"{path} is no calibration that `idefics-jobs calibrate` wrote: {told}.") from None


def logit(confidence: float) -> float:
    """The logarithm of the odds."""
    bounded = min(max(confidence, NEAREST), 1 - NEAREST)
    return math.log(bounded / (1 - bounded))


def _named(id: str, revision: str | None) -> str:
    return f"{id} at {revision}" if revision else id
