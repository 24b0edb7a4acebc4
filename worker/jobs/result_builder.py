"""A finished row as the job's result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tasks.payloads import Classify, Job
from tasks.results import ModelInfo, Result, Timing, Usage
from worker.engine.generation_rules import GenerationRules
from worker.engine.interfaces import Codec
from worker.engine.row import Output, Row
from worker.jobs.row_builder import truncation


class ResultBuilder:
    """Builds the results of jobs on one model. Used from many threads at once."""

    def __init__(self, info: ModelInfo, codec: Codec, rules: GenerationRules) -> None:
        """`rules`: the checkpoint's generation parameters; each result lists those that applied to it."""
        self._info = info
        self._codec = codec
        self._rules = rules
        self._told = rules.abbreviated()

    def build(self, job: Job, row: Row, output: Output, timing: Timing) -> Result:
        text = _until_stop(self._codec.decode(output.ids), job.stop)
        scores = dict(zip(labels_of(job), output.probabilities, strict=True)) if output.probabilities else None
        label = max(scores, key=scores.__getitem__) if scores else None
        usage = Usage(
            prompt_tokens=len(row.tokens.ids),
            completion_tokens=len(output.ids),
            images=len(row.tokens.pictures),
            cached_images=row.cached_images,
        )
        return Result(
            text=label or text,
            finish_reason=output.finish_reason,
            label=label,
            scores=scores,
            usage=usage,
            model=self._info,
            timing=timing,
            generation=self._generation(job),
            metadata=job.metadata,
        )

    def _generation(self, job: Job) -> dict[str, Any]:
        """The generation parameters that applied, by their names in transformers; none for plain greedy decoding."""
        if labels_of(job):
            return {}
        if job.num_beams > 1:
            return {**self._told.scores, **self._told.beams, "num_beams": job.num_beams}
        sampled = {"temperature": job.temperature, **truncation(job, self._rules)} if job.temperature > 0 else {}
        return {**self._told.scores, **sampled}


def labels_of(job: Job) -> list[str]:
    """The labels of a classification, as they were sent; none for other jobs."""
    return job.labels if isinstance(job, Classify) else []


def _until_stop(text: str, stop: Sequence[str]) -> str:
    return text[: min((text.find(word) for word in stop if word in text), default=len(text))]
