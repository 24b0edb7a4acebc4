"""A finished row as the job's result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tasks.calibration import Calibration
from tasks.payloads import Classify, Job
from tasks.results import Choice, ModelInfo, Receipt, Result, Timing, TokenLogprob, TopLogprob, Usage
from worker.engine.generation_rules import GenerationRules
from worker.engine.interfaces import Codec
from worker.engine.row import Output, Row
from worker.jobs.row_builder import truncation

#: The log-probability of a token that has none, in JSON, which has no infinity.
IMPOSSIBLE = -9999.0


class ResultBuilder:
    """Builds the results of jobs on one model. Used from many threads at once."""

    def __init__(
        self, info: ModelInfo, codec: Codec, rules: GenerationRules, calibration: Calibration | None = None
    ) -> None:
        """`rules`: the checkpoint's generation parameters; each result lists those that applied to it. `calibration`:
        this model's."""
        self._calibration = calibration
        self._info = info
        self._codec = codec
        self._rules = rules
        self._told = rules.abbreviated()

    def build(self, job: Job, row: Row, output: Output, timing: Timing, receipt: Receipt) -> Result:
        text = self._text(job, row, output)
        scores = dict(zip(labels_of(job), output.probabilities, strict=True)) if output.probabilities else None
        label = max(scores, key=scores.__getitem__) if scores else None
        outputs = (output, *output.others)
        confidence = self._confidence(scores[label] if scores and label else output.confidence, label)
        usage = Usage(
            prompt_tokens=len(row.tokens.ids),
            completion_tokens=sum(len(each.ids) for each in outputs),
            images=len(row.tokens.pictures),
            cached_images=row.cached_images,
        )
        return Result(
            text=label or text,
            finish_reason=output.finish_reason,
            label=label,
            scores=scores,
            **confidence,
            abstained=_is_doubtful(job, output, confidence["confidence"]),
            logprobs=self._logprobs(job, output),
            choices=[self._choice(job, row, each) for each in outputs] if job.n > 1 else None,
            usage=usage,
            model=self._info,
            timing=timing,
            generation=self._generation(job),
            metadata=job.metadata,
            receipt=self._with_token_ends(receipt, row, output) if row.alone else receipt,
        )

    def _text(self, job: Job, row: Row, output: Output) -> str:
        return until_stop(self._decode(row, output.ids), job.stop)

    def _decode(self, row: Row, ids: Sequence[int]) -> str:
        return row.grammar.text(ids) if row.grammar else self._codec.decode(ids)

    def _choice(self, job: Job, row: Row, output: Output) -> Choice:
        return Choice(
            text=self._text(job, row, output),
            finish_reason=output.finish_reason,
            logprobs=self._logprobs(job, output),
            **self._confidence(output.confidence, None),
        )

    def _confidence(self, raw: float | None, label: str | None) -> dict[str, float | None]:
        """The fields of an answer's confidence."""
        calibrated = self._calibration.calibrated(raw, label) if self._calibration and raw is not None else None
        return {"confidence": raw} if calibrated is None else {"confidence": calibrated, "raw_confidence": raw}

    def _logprobs(self, job: Job, output: Output) -> list[TokenLogprob] | None:
        if job.logprobs is None:
            return None
        text = self._codec.token_text
        return [
            TokenLogprob(
                token=text(score.id),
                id=score.id,
                logprob=_finite(score.logprob),
                top_logprobs=[TopLogprob(token=text(id), id=id, logprob=logprob) for id, logprob in score.top],
            )
            for score in output.scores
        ]

    def _with_token_ends(self, receipt: Receipt, row: Row, output: Output) -> Receipt:
        ends = [len(self._decode(row, output.ids[: n + 1])) for n in range(len(output.ids))]
        return receipt.model_copy(update={"token_ends": ends})

    def _generation(self, job: Job) -> dict[str, Any]:
        """The generation parameters that applied, by their names in transformers; none for plain greedy decoding."""
        if labels_of(job):
            return {}
        scores = {**self._told.scores, **_own_penalties(job)}
        if job.num_beams > 1:
            return {**scores, **self._told.beams, "num_beams": job.num_beams}
        sampled = {"temperature": job.temperature, **truncation(job, self._rules)} if job.temperature > 0 else {}
        return {**scores, **sampled}


def _own_penalties(job: Job) -> dict[str, Any]:
    """The job's own changes of the logits; `presence_penalty` and the next two are no parameters of transformers."""
    asked = {
        "repetition_penalty": job.repetition_penalty,
        "presence_penalty": job.presence_penalty,
        "frequency_penalty": job.frequency_penalty,
        "logit_bias": {str(id): bias for id, bias in job.logit_bias.items()},
    }
    return {name: value for name, value in asked.items() if value}


def _is_doubtful(job: Job, output: Output, confidence: float | None) -> bool:
    """Whether an answer is less sure than its job wants. One that was interrupted, or has no confidence, is not."""
    if job.min_confidence is None or confidence is None or output.is_interrupted:
        return False
    return confidence < job.min_confidence


def labels_of(job: Job) -> list[str]:
    """The labels of a classification, as they were sent; none for other jobs."""
    return job.labels if isinstance(job, Classify) else []


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else IMPOSSIBLE


def until_stop(text: str, stop: Sequence[str]) -> str:
    return text[: min((text.find(word) for word in stop if word in text), default=len(text))]
