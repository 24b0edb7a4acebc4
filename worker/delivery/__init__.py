"""Callbacks: recorded when a job ends, sent by the callbacks worker.

`recorder.py` records them, `callback_dispatcher.py` claims them when they are due, `sender.py` signs and posts one,
`retry.py` decides on another attempt, `callback_policy.py` decides which URLs are allowed. The outbox itself is
`tasks/outbox.py`.
"""
