"""A managed Redis: one database, no CONFIG and no other commands for administrators."""

from __future__ import annotations

from dataclasses import dataclass

from tasks import Client, Complete
from worker.demo import stack


@dataclass(frozen=True)
class OneDatabase:
    """Queues and results in one database."""

    url: str

    @property
    def results(self) -> str:
        return self.url


def test_one_database_without_config_is_enough() -> None:
    refused = [part for command in ("config", "save", "debug", "monitor") for part in ("--rename-command", command, "")]
    with stack.broker("--databases", "1", *refused) as broker:
        servers = OneDatabase(broker.url)
        with stack.worker(servers, settings={"MODEL": "fake"}):
            client = Client(servers.url, result_backend=servers.results)
            jobs = client.submit_many(Complete(prompt=["hello"]) for _ in range(20))
            assert all(job.result(20).text for job in jobs)
            assert client.queued() == 0
            assert client.workers()
