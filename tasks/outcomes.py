"""A job's outcome: a result, an error or a cancellation."""

from __future__ import annotations

from .errors import JobCanceled, JobError
from .results import Result

#: What a job ended with.
Outcome = Result | JobError | JobCanceled
