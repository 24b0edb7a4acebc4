"""A job and its pictures as the row that the engine runs: tokens, sampling, limits."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

from config.settings import Settings
from tasks.errors import InvalidRequest, PromptTooLong
from tasks.payloads import Chat, Classify, Job
from tasks.response_format import ResponseFormat
from worker.engine.generation_rules import GenerationRules
from worker.engine.grammar import Grammar
from worker.engine.interfaces import Codec, PromptContent
from worker.engine.row import Output, Row, Sampling
from worker.jobs.grammars import Grammars
from worker.jobs.prompts import Prompt, build, in_turns, without_ends


class RowBuilder:
    """Builds the rows of jobs for one model. Used from many threads at once."""

    def __init__(self, settings: Settings, codec: Codec, rules: GenerationRules) -> None:
        """`rules`: the checkpoint's generation parameters."""
        self._max_prompt_tokens, self._cure = prompt_bound(settings, codec.context_tokens)
        self._max_new_tokens = settings.max_new_tokens
        self._default_new_tokens = settings.default_new_tokens
        self._codec = codec
        self._rules = rules
        self._grammars = Grammars(codec.grammar_tokens)

    def prompt(self, job: Job) -> Prompt:
        """The job's prompt in the model's form: texts and references to images."""
        prompt = in_turns(job) if self._codec.has_chat_template else build(job)
        return without_ends(prompt) if isinstance(job, Chat) and not self._codec.has_end_of_utterance else prompt

    def new_tokens(self, job: Job) -> int:
        """The maximum number of new tokens. Raises InvalidRequest for a job that asks for too many."""
        most = self._max_new_tokens
        if isinstance(job, Chat) and job.max_completion_tokens is not None:
            return min(job.max_completion_tokens, most)
        if job.max_new_tokens is None:
            return min(self._default_new_tokens, most)
        if job.max_new_tokens > most:
            raise InvalidRequest(f"max_new_tokens is {job.max_new_tokens}: this worker's maximum is {most}.")
        return job.max_new_tokens

    def prepare(self) -> None:
        """See Grammars."""
        self._grammars.prepare()

    def grammar(self, job: Job) -> Grammar | None:
        """The grammar that the job's text keeps to. Raises InvalidRequest for a `response_format` that is refused."""
        form: ResponseFormat | None = getattr(job, "response_format", None)
        return self._grammars.of(form) if form else None

    def build(
        self, job: Job, parts: PromptContent, new_tokens: int, priority: int = 5, deadline: float | None = None
    ) -> Row:
        """The row of a job whose prompt, with its pictures, is `parts`. Raises PromptTooLong or InvalidRequest."""
        least = self._codec.min_token_count(parts)
        if least > self._max_prompt_tokens:
            # Tokenizing 200,000 characters takes a quarter of a second, during which other threads cannot run.
            raise self._too_long(f"at least {least}")
        tokens = self._codec.prepare(parts)
        if job.n > 1 and job.num_beams == 1:
            tokens = dataclasses.replace(tokens, is_repeated=True)
        labels = self._codec.encode_labels(parts[-2:], job.spoken_labels if isinstance(job, Classify) else [])
        # The longest label counts too: it is in the same context window.
        length = len(tokens.ids) + max(map(len, labels), default=0)
        if length > self._max_prompt_tokens:
            raise self._too_long(str(length))
        sampling = self._sampling(job, new_tokens)
        return Row(tokens, sampling, tuple(labels), priority, deadline, grammar=self.grammar(job))

    def _sampling(self, job: Job, new_tokens: int) -> Sampling:
        return Sampling(
            max_new_tokens=new_tokens,
            # Labels are scored without beams; with them, the row would wait for rows with as many.
            num_beams=1 if isinstance(job, Classify) else job.num_beams,
            temperature=job.temperature,
            **truncation(job, self._rules),
            seed=job.seed,
            logit_bias=self._bias(job),
            repetition_penalty=job.repetition_penalty,
            frequency_penalty=job.frequency_penalty,
            presence_penalty=job.presence_penalty,
            logprobs=job.logprobs,
            answers=job.n,
            stop=tuple(job.stop),
            eos_ids=self._codec.eos_ids,
        )

    def _bias(self, job: Job) -> tuple[tuple[int, float], ...]:
        """The job's bias by token. Raises InvalidRequest for a token that the model does not have, or that no answer
        may contain."""
        for id, bias in job.logit_bias.items():
            last = self._codec.vocabulary - 1
            if id > last:
                raise InvalidRequest(f"logit_bias: token {id} is none of the model's, which are 0 to {last}.")
            if bias > 0 and id in self._codec.reserved_ids:
                raise InvalidRequest(f"logit_bias: token {id} is reserved: no bias may make it more likely.")
        return tuple(sorted(job.logit_bias.items()))

    def _too_long(self, count: str) -> PromptTooLong:
        return PromptTooLong(
            f"The prompt has {count} tokens and this worker takes {self._max_prompt_tokens}: {self._cure}."
        )


def others(row: Row) -> list[Row]:
    """The rows of a job's further samples, each with a seed of its own. Beams are all of one row."""
    if row.sampling.num_beams > 1:
        return []
    seeds = [_derived_seed(row.sampling.seed, number) for number in range(1, row.sampling.answers)]
    return [
        Row(
            row.tokens,
            dataclasses.replace(row.sampling, seed=seed),
            (),
            row.priority,
            row.deadline,
            grammar=row.grammar,
            leader=row,
            alone=row.alone,
        )
        for seed in seeds
    ]


def joined(outputs: Sequence[Output]) -> Output:
    """The output of a job by those of its rows: the first one, which has the others."""
    first, *further = outputs
    return dataclasses.replace(first, others=tuple(further)) if further else first


def _derived_seed(seed: int | None, number: int) -> int | None:
    if seed is None:
        return None
    digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest()
    # As large as a job's own may be.
    return int.from_bytes(digest, "little") >> 1


def prompt_bound(settings: Settings, context_tokens: int) -> tuple[int, str]:
    """The tokens that a prompt may have, and how to send one with more."""
    if settings.max_prompt_tokens:
        return settings.max_prompt_tokens, "shorten it or raise IDEFICS_MAX_PROMPT_TOKENS"
    if settings.max_batch_tokens < context_tokens:
        return settings.max_batch_tokens, "shorten it or raise IDEFICS_MAX_BATCH_TOKENS"
    return context_tokens, "shorten it or send fewer images, since the model reads no more"


def truncation(job: Job, rules: GenerationRules) -> dict[str, Any]:
    """The parameters that exclude unlikely tokens from sampling: the job's own, else the checkpoint's."""
    asked = {name: value for name in ("top_k", "top_p", "min_p") if (value := getattr(job, name)) is not None}
    return {**rules.sampling, **asked} if job.temperature > 0 else {}
