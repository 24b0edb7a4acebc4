"""The receiver's Celery app, like that of a web backend: its worker runs the links and errbacks and records them."""

from __future__ import annotations

import os
from pathlib import Path

from celery import Celery

from benchmarks.chaos.ledger import BROKER, CALLS, VISIBILITY_S, Call, Ledger, now
from worker.queue.transport import use

# With kombu's own transport a link is lost if the broker dies during its BRPOP.
use()
app = Celery("notes", broker=os.environ[BROKER])
app.conf.update(
    task_default_queue="notes",
    task_acks_late=True,
    task_ignore_result=True,
    broker_connection_max_retries=None,
    broker_channel_error_retry=True,
    worker_cancel_long_running_tasks_on_connection_loss=False,
    # The shortest timeout of all apps on a broker applies to all of them; so does a lock that one of them leaves.
    broker_transport_options={"visibility_timeout": int(os.environ[VISIBILITY_S]), "unacked_mutex_expire": 1},
)


@app.task(name="chaos.note")  # type: ignore[untyped-decorator]
def note(what: str, id: str) -> None:
    Ledger(Path(os.environ[CALLS])).write(Call(now(), id, what))
