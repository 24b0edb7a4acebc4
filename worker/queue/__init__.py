"""The worker's side of Redis: messages are taken, checked, acknowledged and returned, and results are stored.

`reserve.py` takes a message, `envelope/` checks it, `refusals.py` ends one that is refused, `qos.py` acknowledges and
requeues (`pending_acks.py` holds what could not be sent yet), `visibility_timeout.py` returns the messages of silent
workers, `due.py` holds jobs with an `eta`, `result_backend.py` stores results. The keys are in `tasks/redis_keys.py`.
"""
