"""Constants that producers and workers share: queues, headers, limits of a payload, reserved tokens.

Keys in Redis are in redis_keys.py.
"""

from __future__ import annotations

import time

#: The queue that the workers read.
QUEUE = "idefics"
#: The callbacks worker's queue.
CALLBACK_QUEUE = "idefics.callbacks"
#: Celery on Redis: 0 is first and 9 last.
DEFAULT_PRIORITY = 5
#: The message header with the producer's clock (unix seconds) at submission.
SUBMITTED_AT = "idefics_submitted_at"
#: The message header of a job that a worker has sent again: the message continues the same submission.
CONTINUES = "idefics_continues"
#: The message header of a campaign's job: the id under which others see the campaign (tasks/campaign/record.py). By it
#: workers hold back the jobs of a paused campaign and end those of a canceled one. Retries keep it.
CAMPAIGN = "idefics_campaign"
#: The message header with the number of times that a worker has sent a job again without a retry.
RUN = "idefics_run"
#: The message header of a job that runs alone, without what caches have, so that its answer can be compared with one
#: that it had in company (`idefics-jobs verify`).
ALONE = "idefics_alone"
#: Celery's options that hide a job's arguments in logs, events and monitors: prompts and signed URLs.
HIDDEN = {"argsrepr": "()", "kwargsrepr": "{...}"}
#: Seconds that a cancellation's key is kept (tasks/redis_keys.py): longer than a job may wait, also for its `eta`.
CANCEL_TTL_S = 32 * 86_400

MAX_TEXT_CHARS = 200_000
MAX_LABELS = 1_000
MAX_METADATA_BYTES = 16_384
#: Depth of nested lists and objects.
MAX_METADATA_DEPTH = 32
#: Entries of any list of a payload: examples, images, messages, parts.
MAX_ENTRIES = 1_000
#: A `response_format` as JSON, and the depth of its schema. Larger ones take seconds to compile.
MAX_FORMAT_BYTES = 65_536
MAX_FORMAT_DEPTH = 64
#: A job's arguments as JSON. The worker's default IDEFICS_MAX_JOB_BYTES, less what Celery adds.
MAX_JOB_BYTES = 31_900_000

END_OF_UTTERANCE = "<end_of_utterance>"
#: In a user's text these would become the real tokens and change the meaning of other images.
RESERVED_TOKENS = ("<image>", "<fake_token_around_image>", "<s>", "</s>", "<unk>", "<pad>")


def seconds_since(submitted_at: float | None) -> float:
    """Seconds since a submission, by SUBMITTED_AT: 0 if it is unknown, or if the producer's clock is ahead of ours."""
    return 0.0 if submitted_at is None else max(0.0, time.time() - submitted_at)
