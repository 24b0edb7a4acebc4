"""A job's result, as it is stored and returned: JSON."""

from __future__ import annotations

import json
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, PrivateAttr, SerializerFunctionWrapHandler, model_serializer

from .described_model import DescribedModel


class _Reply(DescribedModel):
    # An older client ignores fields that a newer worker adds.
    model_config = ConfigDict(extra="ignore", frozen=True)

    #: Fields that the JSON leaves out while they have their default, so that it grows only for jobs with the feature.
    optional: ClassVar[tuple[str, ...]] = ()

    # Without the type of what it returns, which would replace the fields in a JSON Schema of outputs.
    @model_serializer(mode="wrap")
    def _without_defaults(self, serialize: SerializerFunctionWrapHandler):  # type: ignore[no-untyped-def]  # noqa: ANN202
        values: dict[str, Any] = serialize(self)
        for name in self.optional:
            if getattr(self, name) == type(self).model_fields[name].default:
                values.pop(name, None)
        return values


class Usage(_Reply):
    """Tokens and images of a job."""

    prompt_tokens: int
    completion_tokens: int
    images: int
    cached_images: int = 0
    """Images whose features came from the cache."""


class ModelInfo(_Reply):
    """The model that answered."""

    id: str
    revision: str | None = None
    family: str
    dtype: str
    quantization: str | None = None


class Timing(_Reply):
    """Seconds of a job's last run, and how many runs came before it."""

    optional = ("retries",)

    queued_s: float
    """From submission to its start in a worker, earlier runs included."""
    fetch_s: float
    """Download and decoding of its images."""
    wait_s: float
    """In the engine, before its first step."""
    generate_s: float
    """From its first step to its last."""
    retries: int = 0
    """Runs before it that ended with a temporary error, such as an unreachable image. Left out of the JSON if 0."""


class TopLogprob(_Reply):
    """One of the likeliest tokens in a token's place."""

    token: str
    """Its text."""
    id: int
    """Its id in the model's vocabulary."""
    logprob: float
    """Natural logarithm of its probability; -9999 for none."""


class TokenLogprob(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob] = []
    """The likeliest tokens in its place, the likeliest first: as many as the job's `logprobs`."""


class Choice(_Reply):
    """One of several answers of a job with `n` above 1."""

    optional = ("confidence", "raw_confidence", "logprobs")

    text: str
    """The new text, without the prompt."""
    finish_reason: Literal["stop", "length", "stop_sequence", "canceled", "deadline"]
    """Why the text ends."""
    confidence: float | None = None
    """See the result's."""
    raw_confidence: float | None = None
    """See the result's."""
    logprobs: list[TokenLogprob] | None = None
    """See the result's."""


class Receipt(_Reply):
    """What an answer depended on, so that `idefics-jobs verify` can repeat it. Hashes are 16 hexadecimal digits.

    Fields that say nothing are left out of the JSON.
    """

    model: str
    """Hub id or name of the checkpoint."""
    revision: str | None = None
    """Commit of the hub repository."""
    weights: str | None = None
    """Hash of the checkpoint's safetensors files. Unset in the first seconds of a worker, while it reads them."""
    dtype: str
    """Precision of the weights."""
    quantization: str | None = None
    """Quantization of the weights."""
    engine: str | None = None
    """What ran the model: `continuous` (the worker's own decoder), `stock` (transformers' `generate`) or `fake`."""
    version: str | None = None
    """Version of the worker."""
    prompt: str
    """Hash of the prompt's token ids, and of the labels' for `classify`."""
    pixels: list[str] = []
    """Hash of each picture as the model sees it, in order; of more than eight pictures one hash of them all."""
    sampling: dict[str, Any] = {}
    """Parameters that differ from plain greedy decoding, and the maximum of new tokens. Of texts a hash."""
    seed: int | None = None
    """Seed of a sampled answer: the job's own, or the one that was drawn for it."""
    output: str
    """Hash of the answer's token ids, and of its label."""
    attempts: int = 1
    """Runs of the job, this one included. Left out if 1."""
    worker: str | None = None
    """Celery's name of the worker."""
    cached: bool = False
    """True: the answer is that of an identical job, shared or from the answer cache."""
    token_ends: list[int] = []
    """Number of characters of the text after each new token; only where the job ran alone to be compared."""


Receipt.optional = tuple(name for name, field in Receipt.model_fields.items() if not field.is_required())


class Result(_Reply):
    """A finished job's answer. `text` is the new text only; `label` and `scores` come from `classify`."""

    optional = ("confidence", "raw_confidence", "abstained", "logprobs", "choices", "receipt")

    text: str
    """The new text, without the prompt."""
    finish_reason: Literal["stop", "length", "stop_sequence", "canceled", "deadline"]
    """Why the text ends."""
    label: str | None = None
    """The most likely label, for `classify`."""
    scores: dict[str, float] | None = None
    """Each label's probability, for `classify`."""
    confidence: float | None = None
    """How sure the model is, from 0 to 1: the label's probability; for a text the geometric mean of the probabilities
    of its tokens and of the one that ended it. Left out of the JSON if there is no token."""
    raw_confidence: float | None = None
    """The model's own confidence where `confidence` is calibrated (IDEFICS_CALIBRATION of the worker). Left out of the
    JSON otherwise."""
    abstained: bool = False
    """The confidence is below the job's `min_confidence`: the answer is a guess, to be decided by a person. Left out of
    the JSON if false."""
    logprobs: list[TokenLogprob] | None = None
    """The text's tokens with their log-probabilities, for jobs with `logprobs`. Left out of the JSON otherwise."""
    choices: list[Choice] | None = None
    """All answers, the result's own first, for jobs with `n` above 1. Left out of the JSON otherwise."""
    usage: Usage
    """Counts of tokens and images."""
    model: ModelInfo
    """The model that answered: id, revision, family, dtype, quantization."""
    timing: Timing
    """Seconds that the job spent in each stage."""
    generation: dict[str, Any] = {}
    """transformers' generation parameters that applied, including the checkpoint's. Empty: plain greedy decoding."""
    metadata: dict[str, Any] = {}
    """The job's own metadata."""
    receipt: Receipt | None = None
    """What the answer depended on: model, weights, prompt, pixels, sampling, seed. Unset by older workers."""
    _response_model: type[BaseModel] | None = PrivateAttr(default=None)

    @property
    def parsed(self) -> Any:
        """The text as JSON: an instance of the job's `response_model` if the job was submitted here with one, else
        plain values.

        Raises ValueError for a text that is no JSON, as one that `max_new_tokens` has cut (`finish_reason` `length`).
        """
        model = self._response_model
        return json.loads(self.text) if model is None else model.model_validate_json(self.text)

    def parsed_as(self, model: type[BaseModel] | None) -> Self:
        """The same result, whose `parsed` is an instance of `model`."""
        self._response_model = model
        return self
