"""The fields of every task that say how its answer's tokens are chosen."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from .validation import PayloadModel

#: Lower temperatures count as 0: they would choose the likeliest token anyway, but with numbers that overflow.
NEAR_GREEDY = 1e-5


#: Largest change of a logit by `logit_bias`, OpenAI's.
MAX_BIAS = 100.0
#: Maximum tokens of `logit_bias`.
MAX_BIASES = 1_000


LogitBias = Annotated[
    dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS, allow_inf_nan=False)]],
    Field(max_length=MAX_BIASES),
]


def greedy_near_zero(temperature: float) -> float:
    """The temperature, or 0 below NEAR_GREEDY."""
    return temperature if temperature >= NEAR_GREEDY else 0.0


class Sampled(PayloadModel):
    """How tokens are chosen."""

    num_beams: int = Field(default=1, ge=1, le=16)
    """Beams of the search. More than one requires temperature 0."""
    temperature: Annotated[float, AfterValidator(greedy_near_zero)] = Field(default=0.0, ge=0.0, le=10.0)
    """0: greedy decoding; so is a value below 0.00001. Above: sampling."""
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    """Sample from the most likely tokens whose probabilities add up to this. Default: the checkpoint's, else 1."""
    top_k: int | None = Field(default=None, ge=0, le=1_000_000)
    """Sample from this many most likely tokens; 0: from all. Default: the checkpoint's, else all. (The default of 50 in
    transformers is not used.)"""
    min_p: float | None = Field(default=None, ge=0.0, le=1.0)
    """Sample from tokens with at least this part of the likeliest token's probability; 0: from all. Default: the
    checkpoint's, else all."""
    repetition_penalty: float | None = Field(default=None, gt=0.0, le=10.0)
    """Above 1: tokens of the prompt and the answer so far become less likely, as in transformers. Default: the
    checkpoint's, else 1."""
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    """Subtracted from the logit of each token that is in the answer so far (OpenAI's)."""
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    """Subtracted from the logit of each token once for each time that it is in the answer so far (OpenAI's)."""
    logit_bias: LogitBias = {}
    """Added to the logits of tokens by their ids in the model's vocabulary, from -100 to 100: `{"1234": -100}`."""
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Makes sampling reproducible."""
    n: int = Field(default=1, ge=1, le=16)
    """Number of answers, in the result's `choices`: samples, or with `num_beams` the best beams."""
    logprobs: int | None = Field(default=None, ge=0, le=20)
    """The result has the tokens with their log-probabilities, and this many of the likeliest tokens in their place."""

    @model_validator(mode="after")
    def _sampling_is_one_of_beams_or_temperature(self) -> Self:
        if self.num_beams > 1 and self.temperature > 0:
            raise ValueError("num_beams above 1 needs temperature 0: beams and sampling do not go together")
        return self

    @model_validator(mode="after")
    def _answers_differ(self) -> Self:
        if self.n > 1 and self.temperature == 0 and self.num_beams < self.n:
            raise ValueError(
                "n above 1 needs a temperature above 0, or num_beams of at least n: otherwise answers are equal"
            )
        return self
