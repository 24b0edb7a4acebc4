"""A producer without Celery and a Redis client, as it could be written in PHP or Go. README.md describes the protocol.

Beside `make up`:

    python examples/wire/producer.py examples/pictures/cat.png
"""

import base64
import json
import os
import socket
import sys
import time
import uuid
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Redis:
    """One connection to one database. Commands are arrays of strings: https://redis.io/docs/latest/develop/reference/protocol-spec/"""

    def __init__(self, url):
        parts = urlsplit(url)
        self._socket = socket.create_connection((parts.hostname, parts.port or 6379), timeout=30)
        self._replies = self._socket.makefile("rb")
        if parts.password:
            self("AUTH", *filter(None, [unquote(parts.username or "")]), unquote(parts.password))
        self("SELECT", parts.path.strip("/") or "0")

    def __call__(self, *words):
        encoded = [word if isinstance(word, bytes) else str(word).encode() for word in words]
        command = b"*%d\r\n" % len(encoded)
        self._socket.sendall(command + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in encoded))
        kind, rest = (line := self._replies.readline())[:1], line[1:-2]
        if kind == b"-":
            raise RuntimeError(rest.decode())
        if kind != b"$":
            return rest
        return None if rest == b"-1" else self._replies.read(int(rest) + 2)[:-2]


def message(task, arguments, id, priority=5):
    """A job in Celery's protocol 2, as kombu writes it to Redis."""
    body = json.dumps([[], arguments, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}])
    return {
        "body": base64.b64encode(body.encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"lang": "py", "task": task, "id": id, "root_id": id, "idefics_submitted_at": time.time()},
        "properties": {
            "body_encoding": "base64",
            "correlation_id": id,
            "delivery_info": {"exchange": "", "routing_key": "idefics"},
            "delivery_mode": 2,
            "delivery_tag": str(uuid.uuid4()),
            "priority": priority,
        },
    }


def queue_list(priority):
    """0 is first and 9 last."""
    return "idefics" if priority == 0 else f"idefics\x06\x16{priority}"


def submit(broker, task, arguments, priority=5):
    id = str(uuid.uuid4())
    broker("LPUSH", queue_list(priority), json.dumps(message(task, arguments, id, priority)))
    return id


def result(results, id, timeout=60.0):
    """The job's record once it has ended: its `status` is SUCCESS, FAILURE or REVOKED."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        record = results("GET", f"celery-task-meta-{id}")
        if record and (told := json.loads(record))["status"] in ("SUCCESS", "FAILURE", "REVOKED"):
            return told
        time.sleep(0.1)
    raise TimeoutError(f"Job {id} has no answer after {timeout} s: is a worker running?")


def cancel(results, id):
    results("SET", f"idefics:cancel:{id}", 1, "EX", 32 * 86_400)


def main():
    broker = Redis(os.environ.get("BROKER_URL", "redis://localhost:6379/0"))
    results = Redis(os.environ.get("RESULT_BACKEND", "redis://localhost:6379/1"))
    image = "data:image/png;base64," + base64.b64encode(Path(sys.argv[1]).read_bytes()).decode()
    record = result(results, submit(broker, "idefics.caption", {"image": image}))
    if record["status"] != "SUCCESS":
        sys.exit(": ".join(record["result"]["exc_message"][:2]))
    print(record["result"]["text"].strip())


if __name__ == "__main__":
    main()
