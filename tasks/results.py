"""A job's result, as it is stored and returned: JSON."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer


class _Reply(BaseModel):
    # An older client ignores fields that a newer worker adds.
    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)


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

    @model_serializer(mode="wrap")
    def _without_no_retries(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = serialize(self)
        if not self.retries:
            values.pop("retries", None)
        return values


class Result(_Reply):
    """A finished job's answer. `text` is the new text only; `label` and `scores` come from `classify`."""

    text: str
    """The new text, without the prompt."""
    finish_reason: Literal["stop", "length", "stop_sequence", "canceled", "deadline"]
    """Why the text ends."""
    label: str | None = None
    """The most likely label, for `classify`."""
    scores: dict[str, float] | None = None
    """Each label's probability, for `classify`."""
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
