"""What producers and workers must agree on: queues, headers, limits of a payload, reserved tokens.

Keys in Redis are in redis_keys.py.
"""

from __future__ import annotations

#: The queue that the workers read.
QUEUE = "idefics"
#: The callbacks worker's.
CALLBACK_QUEUE = "idefics.callbacks"
#: Celery on Redis: 0 is first and 9 last.
DEFAULT_PRIORITY = 5
#: The message header with the producer's clock (unix seconds) at submission.
SUBMITTED_AT = "idefics_submitted_at"
#: The message header of a job that a worker has sent back to its queue itself: it goes on with its submission.
CONTINUES = "idefics_continues"
#: What logs, events and monitors show of a job's arguments: no prompt, no signed URL. Celery's options.
HIDDEN = {"argsrepr": "()", "kwargsrepr": "{...}"}
#: Seconds that the key of a cancellation stays (tasks/redis_keys.py): longer than a job waits, for its `eta` too.
CANCEL_TTL_S = 32 * 86_400

MAX_TEXT_CHARS = 200_000
MAX_LABELS = 1_000
MAX_METADATA_BYTES = 16_384
#: Lists and objects inside one another.
MAX_METADATA_DEPTH = 32
#: Entries of any list of a payload: examples, images, messages, parts.
MAX_ENTRIES = 1_000
#: A job's arguments as JSON. The worker's default IDEFICS_MAX_JOB_BYTES, less what Celery adds.
MAX_JOB_BYTES = 31_900_000

END_OF_UTTERANCE = "<end_of_utterance>"
#: A user's text with one of these would become the real token and change what other images mean.
RESERVED_TOKENS = ("<image>", "<fake_token_around_image>", "<s>", "</s>", "<unk>", "<pad>")
