"""Doubtful answers: workers put them on a review list, a person decides, and the decisions are truth for evaluations.

`idefics-jobs review` (tasks/cli/review.py) is the command.
"""

from __future__ import annotations

from .items import Decision, RankedAnswer, ReviewItem
from .review_list import ReviewBounds, ReviewList

__all__ = ["Decision", "RankedAnswer", "ReviewBounds", "ReviewItem", "ReviewList"]
