"""`make up`: a broker and a worker with the bundled model, until Ctrl-C. For a first hour with the project.

Where a Redis answers on the port already, the worker uses that one.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import redis

from worker.demo import stack

PICTURES = stack.CHECKOUT / "examples" / "pictures"
PORT = 6379
READY = """\
Ready: redis://localhost:{port}/0, results in redis://localhost:{port}/1, the bundled model. Ctrl-C ends {what}.
In another shell:

  . .venv/bin/activate
  idefics-jobs submit caption image=@examples/pictures/cat.png --wait

The worker's log: {log}
"""


@contextlib.contextmanager
def redis_on(port: int) -> Iterator[stack.Redis]:
    """The Redis server on a port, which is started where there is none."""
    there = stack.Redis(port)
    try:
        there.connect().ping()
    except redis.ConnectionError:
        with stack.broker(port=port) as server:
            yield server
    else:
        yield there


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=PORT, help="of the broker")
    port = parser.parse_args().port
    print("Starting a broker and a worker with the bundled model ...", flush=True)
    with tempfile.TemporaryDirectory(prefix="idefics-up-") as folder, contextlib.ExitStack() as started:
        log = Path(folder) / "worker.log"
        try:
            server = started.enter_context(redis_on(port))
            settings = {"IMAGE_ROOT": str(PICTURES)}
            worker = started.enter_context(stack.worker(server, settings=settings, log=log))
            what = "both" if isinstance(server, stack.Broker) else "the worker, and leaves the Redis that was there"
            print(READY.format(port=port, what=what, log=log), flush=True)
            _wait(worker, log)
        except KeyboardInterrupt:
            print("\nStopping ...", flush=True)
            return 0
        except stack.StartFailed as error:
            print(error, file=sys.stderr)
            return 1
    return 1


def _wait(worker: subprocess.Popen[bytes], log: Path) -> None:
    """Raises StartFailed when the worker has ended by itself."""
    while worker.poll() is None:
        time.sleep(0.2)
    raise stack.StartFailed(f"The worker ended:\n{log.read_text(errors='replace')[-4000:]}")


if __name__ == "__main__":
    sys.exit(main())
