"""The kinds of faults, and their order by a seed."""

from __future__ import annotations

import contextlib
import math
import random
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import psutil
import redis

from benchmarks.chaos.site import VISIBILITY_S, Site, Worker, await_true
from worker.demo import stack

#: The part of the faults of a worker that may hit it while it is still starting.
UNREADY = 0.2


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: its kind, the worker, its duration, and the pause after it, in seconds."""

    kind: str
    worker: int
    hold_s: float
    pause_s: float
    awaits_ready: bool

    @property
    def target(self) -> str:
        """Whose jobs it catches."""
        if KINDS[self.kind].is_of_a_worker:
            return f"worker-{self.worker}"
        return "pictures" if "image" in self.kind else "all"


@dataclass(frozen=True, slots=True)
class Kind:
    strike: Callable[[Site, Fault], None]
    #: Seconds that it lasts, at least and at most.
    shortest: float = 0.0
    longest: float = 0.0
    is_of_a_worker: bool = False


def schedule(count: int, workers: int, seed: int, pause_s: float, longest_s: float = math.inf) -> list[Fault]:
    """So many faults, about `pause_s` apart, each `longest_s` at most: every kind as often as the others, shuffled."""
    chance = random.Random(seed)
    names: list[str] = []
    while len(names) < count:
        names += chance.sample(sorted(KINDS), len(KINDS))
    faults = [_fault(name, workers, chance, pause_s) for name in names[:count]]
    return [replace(fault, hold_s=min(fault.hold_s, longest_s)) for fault in faults]


def _fault(name: str, workers: int, chance: random.Random, pause_s: float) -> Fault:
    return Fault(
        kind=name,
        worker=chance.randrange(workers),
        hold_s=round(chance.uniform(KINDS[name].shortest, KINDS[name].longest), 2),
        pause_s=round(pause_s * chance.uniform(2 / 3, 4 / 3), 2),
        awaits_ready=chance.random() > UNREADY,
    )


def _struck(site: Site, fault: Fault) -> Worker:
    return site.workers[fault.worker]


def _kill_model(site: Site, fault: Fault) -> None:
    _signal_model(site, fault, signal.SIGKILL)


def _hang_model(site: Site, fault: Fault) -> None:
    """Its parent has to find out and replace it."""
    _signal_model(site, fault, signal.SIGSTOP)


def _signal_model(site: Site, fault: Fault, number: int) -> None:
    worker = _struck(site, fault)
    await_true(lambda: worker.model() is not None)
    model = worker.model()
    with contextlib.suppress(psutil.NoSuchProcess):
        if model is not None:
            model.send_signal(number)


def _signal_worker(number: int) -> Callable[[Site, Fault], None]:
    def strike(site: Site, fault: Fault) -> None:
        _struck(site, fault).send_signal(number)

    return strike


def _freeze_worker(site: Site, fault: Fault) -> None:
    """Both of its processes, as a paused container or a machine that swaps."""
    worker = _struck(site, fault)
    model = worker.model()
    frozen = [process for process in (worker.process, model) if process is not None]
    _freeze(frozen, fault.hold_s)


def _freeze_broker(site: Site, fault: Fault) -> None:
    _freeze([site.broker.process] if site.broker.process else [], fault.hold_s)


def _freeze(processes: Sequence[subprocess.Popen[bytes] | psutil.Process], seconds: float) -> None:
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        if number == signal.SIGSTOP:
            time.sleep(seconds)


def _kill_broker(site: Site, fault: Fault) -> None:
    site.broker.send_signal(signal.SIGKILL)


def _answering(site: Site) -> redis.Redis:
    # It may have been killed just now.
    await_true(site.answers)
    return site.connect()


def _configured(name: str, refuses: int, accepts: int) -> Callable[[Site, Fault], None]:
    """The broker can be read and refuses writes, or new connections."""

    def strike(site: Site, fault: Fault) -> None:
        with _answering(site) as broker:
            broker.config_set(name, refuses)
            if name == "maxclients":
                site.proxy.reset()
            time.sleep(fault.hold_s)
            broker.config_set(name, accepts)

    return strike


def _demote(site: Site, fault: Fault) -> None:
    """As after a failover: the server is a replica, of one that does not answer."""
    with _answering(site) as broker:
        broker.execute_command("REPLICAOF", "127.0.0.1", stack.free_port())
        time.sleep(fault.hold_s)
        broker.execute_command("REPLICAOF", "NO", "ONE")


def _reset(site: Site, fault: Fault) -> None:
    site.proxy.reset()


def _hang_connections(site: Site, fault: Fault) -> None:
    site.proxy.hang()
    time.sleep(fault.hold_s)
    site.proxy.go_on()


def _hang_and_cut(site: Site, fault: Fault) -> None:
    """What was on its way is lost with the connection."""
    site.proxy.hang()
    time.sleep(fault.hold_s)
    site.proxy.reset()
    site.proxy.go_on()


def _images(mood: str) -> Callable[[Site, Fault], None]:
    def strike(site: Site, fault: Fault) -> None:
        site.pictures.delay_s, site.pictures.mood = fault.hold_s / 2, mood
        time.sleep(fault.hold_s)
        site.pictures.mood = "well"

    return strike


KINDS = {
    "kill -9 of the model process": Kind(_kill_model, is_of_a_worker=True),
    "hang of the model process": Kind(_hang_model, is_of_a_worker=True),
    "kill -9 of the worker": Kind(_signal_worker(signal.SIGKILL), is_of_a_worker=True),
    "SIGTERM of the worker": Kind(_signal_worker(signal.SIGTERM), is_of_a_worker=True),
    "SIGQUIT of the worker": Kind(_signal_worker(signal.SIGQUIT), is_of_a_worker=True),
    # For longer than the visibility timeout, too: then another worker has its jobs when it wakes up.
    "freeze of the worker": Kind(_freeze_worker, 1.0, VISIBILITY_S + 4.0, is_of_a_worker=True),
    "kill -9 of the broker": Kind(_kill_broker),
    "freeze of the broker": Kind(_freeze_broker, 0.5, 4.0),
    "full broker": Kind(_configured("maxmemory", 1, 0), 1.0, 5.0),
    "read-only broker": Kind(_demote, 1.0, 5.0),
    "broker without its replicas": Kind(_configured("min-replicas-to-write", 1, 0), 1.0, 5.0),
    "broker out of connections": Kind(_configured("maxclients", 1, 10_000), 1.0, 4.0),
    "reset of connections": Kind(_reset),
    "hang of connections": Kind(_hang_connections, 0.5, 4.0),
    "hang, then reset of connections": Kind(_hang_and_cut, 0.2, 4.0),
    "slow image server": Kind(_images("slow"), 2.0, 6.0),
    "dead image server": Kind(_images("dead"), 2.0, 4.0),
}
