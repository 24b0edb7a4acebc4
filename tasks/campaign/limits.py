"""Limits at which a campaign stops: failures, hours, tokens. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import CampaignError

#: Answers before a share of failures is judged.
MIN_ANSWERS = 100


@dataclass(frozen=True, slots=True)
class Limits:
    """What a campaign may spend and suffer, all its runs together. None: no limit."""

    #: A number of failed rows (`"100"`), or a share of the answers (`"5%"`), judged after MIN_ANSWERS of them.
    max_failures: str | None = None
    #: Hours of its runs.
    hours: float | None = None
    #: Tokens of its answers, those of prompts too.
    tokens: int | None = None

    def __post_init__(self) -> None:
        """Raises CampaignError for a limit in another form."""
        try:
            is_wrong = self.max_failures is not None and not 0 <= self._number() < float("inf")
        except ValueError:
            is_wrong = True
        if is_wrong:
            raise CampaignError(f"max_failures is {self.max_failures!r}: write a number, or a share such as 5%.")

    def reached(self, *, done: int, failed: int, seconds: float, tokens: int) -> str | None:
        """Why the campaign stops, a sentence with the way to go on; None if it goes on."""
        if self._has_too_many(done, failed):
            return (
                f"{failed:,} of {done:,} answers are errors, more than --max-failures {self.max_failures}: remove "
                "their cause, then run the same command with --retry-failed, or with a higher limit."
            )
        if self.hours is not None and seconds >= self.hours * 3600:
            return f"It has run for {seconds / 3600:.2g} hours, --budget-hours: {_GO_ON}"
        if self.tokens is not None and tokens >= self.tokens:
            return f"Its answers have {tokens:,} tokens, and --budget-tokens is {self.tokens:,}: {_GO_ON}"
        return None

    def _has_too_many(self, done: int, failed: int) -> bool:
        if self.max_failures is None:
            return False
        if self.max_failures.endswith("%"):
            return done >= MIN_ANSWERS and failed > self._number() / 100 * done
        return failed > self._number()

    def _number(self) -> float:
        return float((self.max_failures or "").removesuffix("%"))


_GO_ON = "run the same command with a higher limit to go on."
