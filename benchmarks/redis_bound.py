"""What a job costs Redis, with one to three workers: `python -m benchmarks.redis_bound [--save redis_bound]`.

The model is a fake that does nothing, so that the queue is all that is measured. Redis runs commands in one thread: a
server on a core like this one's takes at most a second's microseconds divided by those of a job.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks import measures
from benchmarks.contenders import await_results
from tasks import Client, Complete
from worker.demo import stack

JOBS, ROUNDS = 2_000, 3
#: Counters of Redis' INFO, and what a job's part of each is called.
COUNTERS = {
    "total_commands_processed": "commands",
    "total_net_input_bytes": "bytes_in",
    "total_net_output_bytes": "bytes_out",
}


def workers(count: int) -> dict[str, Any]:
    """The cost of a job to Redis while `count` workers share a queue, from its submission to its stored result."""
    with contextlib.ExitStack() as opened:
        broker = opened.enter_context(stack.broker())
        for number in range(count):
            opened.enter_context(stack.worker(broker, "-n", f"worker{number}@bench", settings={"MODEL": "fake"}))
        client = Client(broker.url)
        _round(broker, client)
        rounds = [_round(broker, client) for _ in range(ROUNDS)]
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


def _round(broker: stack.Broker, client: Client) -> dict[str, float]:
    before, started = _counters(broker), time.monotonic()
    jobs = client.submit_many(Complete(prompt=["hello"], max_new_tokens=1) for _ in range(JOBS))
    await_results(broker.connect(1), [job.id for job in jobs])
    seconds, after = time.monotonic() - started, _counters(broker)
    parts = {name: round((after[name] - before[name]) / JOBS, 1) for name in after}
    return {"jobs_per_s": round(JOBS / seconds), **parts, "redis_bound_jobs_per_s": round(1e6 / parts["redis_us"])}


def _counters(broker: stack.Broker) -> dict[str, float]:
    """Microseconds of Redis' main thread, and its counters."""
    info = broker.connect(0).info("everything")
    cpu = info["used_cpu_user_main_thread"] + info["used_cpu_sys_main_thread"]
    return {"redis_us": 1e6 * cpu, **{short: info[name] for name, short in COUNTERS.items()}}


MEASURES: dict[str, Callable[[], Any]] = {f"workers_{count}": functools.partial(workers, count) for count in (1, 2, 3)}


if __name__ == "__main__":
    measures.run(__doc__, MEASURES)
