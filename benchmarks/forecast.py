"""Is a dry run's forecast right? `python -m benchmarks.forecast [--rows 20000] [--save forecast]`.

A table of pictures on hosts that are fast, slow, dead (they accept connections and never answer), flaky (some answers
are 503) or lack some pictures. A sample of it is run and forecast; then all of it is run. Broker, workers and hosts are
real, the hosts on addresses of the loopback network; the model does nothing. The slow host alone takes 6 ms a row.

`--simulated --rows 200000`: hosts and workers are simulated event by event (tests/support/campaign_simulation.py), in
some worlds with hosts of random speeds and faults.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measures import RESULTS
from tasks import Client
from tasks.campaign.dry_run import dry_run
from tasks.campaign.forecast import Estimate
from tasks.campaign.plan import Plan
from tasks.campaign.runner import run
from tasks.campaign.tables import open_table
from tasks.cli.forecast import show
from tests.support import campaign_worlds
from tests.support.pictures import png
from worker.demo import stack

#: Beyond it a forecast counts as wrong.
TOLERANCE = 0.15
#: The worker's settings: a dead host costs four timeouts.
TIMEOUT_S = "2"


@dataclass(frozen=True)
class Host:
    """How a host answers, and its share of the rows."""

    weight: float
    download_s: float
    #: Shares of its pictures that are missing, and of its answers that are 503.
    missing: float = 0.0
    flaky: float = 0.0
    is_dead: bool = False


#: By address.
HOSTS = {
    **{f"127.0.1.{number}": Host(6.0, 0.002 * number, missing=0.02 * (number % 3)) for number in range(1, 14)},
    "127.0.2.1": Host(12.0, 0.4),
    "127.0.2.2": Host(5.0, 0.25, missing=0.1),
    "127.0.3.1": Host(0.5, 0.0, is_dead=True),
    "127.0.4.1": Host(4.0, 0.05, flaky=0.5),
}


# The hosts


async def serve(port: int) -> None:
    """Answer as all hosts."""
    picture, chance = png("teal"), random.Random(0)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            request = await reader.readuntil(b"\r\n\r\n")
            host = HOSTS[writer.get_extra_info("sockname")[0]]
            if host.is_dead:
                await asyncio.sleep(600)
            await asyncio.sleep(host.download_s * chance.uniform(0.7, 1.3))
            is_missing = b"/missing/" in request.split(b"\r\n", 1)[0]
            status = "404 Not Found" if is_missing else "503 Busy" if chance.random() < host.flaky else "200 OK"
            head = f"HTTP/1.1 {status}\r\nContent-Length: {len(picture)}\r\nConnection: close\r\n\r\n"
            writer.write(head.encode() + picture)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, list(HOSTS), port, backlog=512)
    print("listening", flush=True)
    await server.serve_forever()


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[int]:
    """The hosts in a process of their own; gives their port."""
    port, log = stack.free_port(), folder / "hosts.log"
    command = [sys.executable, "-m", "benchmarks.forecast", "--serve", str(port)]
    with stack.started(command, log=log) as process:
        stack.await_line(process, log, "listening", 20)
        yield port


def write_table(path: Path, rows: int, port: int, chance: random.Random) -> None:
    """A CSV of pictures on the hosts, mixed."""
    names, weights = list(HOSTS), [host.weight for host in HOSTS.values()]
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["sku", "image"])
        for number, name in enumerate(chance.choices(names, weights, k=rows), 1):
            folder = "missing" if chance.random() < HOSTS[name].missing else "there"
            table.writerow([number, f"http://{name}:{port}/{folder}/{number}.png"])


# The campaign


def run_all(client: Client, table: Path, plan: Plan) -> dict[str, Any]:
    """Run the table; what it took."""
    output = table.with_name("output.csv")
    started = time.monotonic()
    summary = run(client, str(table), str(output), plan)
    seconds = round(time.monotonic() - started, 1)
    failed = {"failures": summary.by_code, "failed_hosts": summary.by_host}
    return {"seconds": seconds, "tokens": summary.tokens, **failed}


def compared(forecast: Estimate, true: float) -> dict[str, float | bool]:
    """A forecast value beside the true one."""
    error = forecast.value / true - 1 if true else forecast.value
    return {
        "forecast": round(forecast.value, 1),
        "low": round(forecast.low, 1),
        "high": round(forecast.high, 1),
        "true": true,
        "error": round(error, 3),
        "is_within_15_percent": abs(error) <= TOLERANCE,
        "is_in_interval": forecast.low <= true <= forecast.high,
    }


def measure(rows: int, workers: int, seed: int) -> dict[str, Any]:
    with contextlib.ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        port = opened.enter_context(serving(folder))
        broker = opened.enter_context(stack.broker())
        settings = {
            "MODEL": "fake",
            "IMAGE_ALLOW_NETWORKS": "127.0.0.0/8",
            "IMAGE_PORTS": str(port),
            "IMAGE_TIMEOUT_S": TIMEOUT_S,
        }
        for number in range(workers):
            opened.enter_context(stack.worker(broker, "-n", f"worker{number}@bench", settings=settings))
        table = folder / "table.csv"
        write_table(table, rows, port, random.Random(seed))
        client = Client(broker.url)
        plan = Plan(task="caption", image="image", set={"max_new_tokens": "1"})
        forecast = dry_run(client, plan, open_table(str(table)), seed=seed)
        found = forecast.forecast
        assert found is not None, forecast.notes
        show(forecast)
        true = run_all(client, table, plan)
    tokens = Estimate(
        found.prompt_tokens.value + found.completion_tokens.value,
        found.prompt_tokens.low + found.completion_tokens.low,
        found.prompt_tokens.high + found.completion_tokens.high,
    )
    nothing = Estimate(0.0, 0.0, 0.0)
    codes = dict.fromkeys([*true["failures"], *found.failures])
    return {
        "rows": rows,
        "workers": workers,
        "sampled": found.sampled,
        "sample_s": round(forecast.seconds, 1),
        "waits_for": [{**cause._asdict(), "seconds": round(seconds, 1)} for cause, seconds in found.causes],
        "seconds": compared(found.seconds, true["seconds"]),
        "tokens": compared(tokens, true["tokens"]),
        "failed": compared(found.failed, sum(true["failures"].values())),
        "failures": {
            code: compared(found.failures.get(code, nothing), true["failures"].get(code, 0)) for code in codes
        },
        "failed_by_host": {
            each.host: compared(each.failed, true["failed_hosts"].get(each.host, 0)) for each in found.hosts
        },
    }


# Simulated


def simulate(rows: int, worlds: int) -> dict[str, Any]:
    """Forecast campaigns in simulated worlds."""
    found: list[dict[str, Any]] = []
    for world in range(worlds):
        true = campaign_worlds.campaign(world, rows)
        campaign_worlds.campaign.cache_clear()
        forecast = true.forecast
        found.append(
            {
                "sampled": forecast.sampled,
                "seconds": compared(forecast.seconds, round(true.seconds, 1)),
                "new_tokens": compared(forecast.completion_tokens, true.new_tokens),
                "failed": compared(forecast.failed, len(true.failed)),
            }
        )
    names = ("seconds", "new_tokens", "failed")
    right = {name: sum(each[name]["is_within_15_percent"] for each in found) for name in names}
    return {"rows": rows, "worlds": worlds, "right": right, "each": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--simulated", action="store_true")
    parser.add_argument("--worlds", type=int, default=20, help="simulated ones")
    parser.add_argument("--save", help="the name of the file in results/")
    parser.add_argument("--serve", type=int, metavar="PORT", help="be the hosts")
    asked = parser.parse_args()
    if asked.serve:
        asyncio.run(serve(asked.serve))
        return
    simulated = asked.simulated
    figures = simulate(asked.rows, asked.worlds) if simulated else measure(asked.rows, asked.workers, asked.seed)
    print(json.dumps(figures, indent=2), flush=True)
    if asked.save:
        (RESULTS / f"{asked.save}.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
