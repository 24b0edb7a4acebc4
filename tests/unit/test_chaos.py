"""The campaign's checker finds what it is there to find, in ledgers that were made up; and its proxy cuts off."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.chaos.checker import Ledgers, Remains, figures, problems, recoveries, resumptions
from benchmarks.chaos.faults import KINDS, schedule
from benchmarks.chaos.ledger import Accepted, Call, End, Ledger, Step, Strike, read
from benchmarks.chaos.proxy import Proxy
from benchmarks.chaos.traffic import plan

GOOD = Ledgers(
    accepted=[Accepted(1.0, "a", is_linked=True), Accepted(2.0, "b"), Accepted(3.0, "poison", is_poison=True)],
    ends=[
        End(1.5, "a", "SUCCESS", "1"),
        End(2.5, "b", "SUCCESS", "2"),
        End(6.0, "poison", "FAILURE", "3", "worker_lost"),
        # Read once more at last.
        End(9.0, "a", "SUCCESS", "1"),
    ],
    calls=[Call(1.4, "a", "link"), Call(1.6, "a", "link"), Call(6.1, "poison", "errback")],
)


def test_ledgers_that_agree_are_clean() -> None:
    assert problems(GOOD) == {}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"ends": GOOD.ends[1:3]}, {"lost": ["a"]}),
        ({"ends": [*GOOD.ends, End(9.0, "b", "SUCCESS", "another answer")]}, {"ended twice": ["b"]}),
        (
            {"ends": [*GOOD.ends, End(9.0, "b", "FAILURE", "2", "internal")]},
            {"ended twice": ["b"], "ended as it should not": ["b"]},
        ),
        (
            {"ends": [replace(GOOD.ends[0], state="FAILURE", code="worker_lost"), *GOOD.ends[1:3]]},
            {"ended as it should not": ["a"]},
        ),
        ({"ends": [*GOOD.ends[:2], End(6.0, "poison", "SUCCESS", "3")]}, {"ended as it should not": ["poison"]}),
        (
            {"ends": [*GOOD.ends[:2], End(6.0, "poison", "FAILURE", "3", "internal")]},
            {"ended as it should not": ["poison"]},
        ),
        ({"accepted": [*GOOD.accepted, GOOD.accepted[1]]}, {"accepted twice": ["b"]}),
        ({"ends": [*GOOD.ends, End(9.0, "c", "SUCCESS", "4")]}, {"ended, and never accepted": ["c"]}),
        ({"calls": GOOD.calls[2:]}, {"link not called": ["a"]}),
        ({"calls": [*GOOD.calls, GOOD.calls[2]]}, {"errback called twice": ["poison"]}),
        ({"remains": Remains(queued=1)}, {"left in queues": ["messages"]}),
        ({"remains": Remains(unacked=1)}, {"left unacknowledged": ["messages"]}),
        ({"remains": Remains(strays=("0:key",))}, {"keys that stay for ever": ["0:key"]}),
    ],
)
def test_ledgers_that_disagree_are_found(change: dict[str, object], found: dict[str, list[str]]) -> None:
    assert problems(replace(GOOD, **change)) == found  # type: ignore[arg-type]


def test_recovery_is_measured_for_the_jobs_that_a_strike_caught() -> None:
    names = ["held", "waiting", "ended", "elsewhere", "given back", "poison"]
    accepted = [Accepted(0.0, name, is_poison=name == "poison") for name in names]
    steps = [
        Step(0.1, "one", "received", "given back"),
        Step(0.2, "one", "born"),
        *[Step(1.0, "two" if name == "elsewhere" else "one", "received", name) for name in names if " " not in name],
        Step(1.1, "one", "started", "held"),
        Step(1.2, "one", "started", "ended"),
        Step(1.3, "one", "SUCCESS", "ended"),
    ]
    ends = [End(1.4, "ended", "SUCCESS", ""), *[End(5.0, name, "SUCCESS", "") for name in names if name != "ended"]]
    strike = Strike(2.0, "kill -9 of the worker", "one", 0.0)
    ledgers = Ledgers(accepted, steps, ends, strikes=[strike])
    assert list(recoveries(ledgers)) == [(strike, 3.0), (strike, 3.0)]
    everywhere = replace(ledgers, strikes=[replace(strike, target="all")])
    assert len(list(recoveries(everywhere))) == 3


def test_recovery_counts_from_when_a_job_was_due_or_taken() -> None:
    accepted = [
        Accepted(0.0, "later", countdown=6.0),
        Accepted(0.0, "picture", is_pictured=True),
        Accepted(0.0, "text"),
    ]
    steps = [
        Step(1.0, "one", "received", "later"),
        Step(3.0, "one", "received", "picture"),
        Step(3.0, "one", "received", "text"),
    ]
    ends = [End(7.0, "later", "SUCCESS", ""), End(7.0, "picture", "SUCCESS", ""), End(7.0, "text", "SUCCESS", "")]
    reset, dead = Strike(2.0, "reset", "all", 0.0), Strike(2.0, "dead image server", "pictures", 2.0)
    ledgers = Ledgers(accepted, steps, ends, strikes=[reset, dead])
    assert list(recoveries(ledgers)) == [(reset, 1.0), (dead, 4.0)]


def test_a_struck_worker_has_recovered_when_it_ends_a_job_that_it_began_afterwards() -> None:
    accepted = [Accepted(0.0, name, is_pictured=name == "picture") for name in ("before", "early", "text", "picture")]
    steps = [
        Step(1.0, "one", "started", "before"),
        Step(2.5, "one", "SUCCESS", "before"),
        Step(2.6, "one", "started", "early"),
        Step(3.5, "two", "started", "early"),
        Step(3.6, "one", "SUCCESS", "early"),
        Step(4.0, "two", "SUCCESS", "early"),
        Step(4.5, "one", "started", "text"),
        Step(5.0, "one", "SUCCESS", "text"),
        Step(6.0, "two", "started", "picture"),
        Step(7.0, "two", "SUCCESS", "picture"),
    ]
    freeze, images = Strike(2.0, "freeze", "one", 1.0), Strike(2.0, "dead image server", "pictures", 1.0)
    kill, cut = Strike(2.0, "kill", "one", 0.0), Strike(2.0, "reset", "all", 1.0)
    too_late = Strike(9.0, "reset", "all", 0.0)
    ledgers = Ledgers(accepted, steps, strikes=[kill, freeze, cut, images, too_late])
    assert [round(seconds, 1) for seconds in resumptions(ledgers)] == [1.6, 3.0, 2.0, 5.0]


def test_jobs_that_ran_again_are_counted_without_retries_and_dropped_runs() -> None:
    runs = {"once": ["SUCCESS"], "retried": ["RETRY", "SUCCESS"], "dropped": ["SUCCESS", "IGNORED"]}
    runs |= {"killed": ["", "SUCCESS"], "twice": ["SUCCESS", "SUCCESS"]}
    steps = [
        Step(1.0, "one", what, id) for id, whats in runs.items() for end in whats for what in ("started", end) if what
    ]
    found = figures(Ledgers([Accepted(0.0, id) for id in runs], steps))
    assert found["jobs_run_again"] == 2
    assert found["jobs_run_twice_to_their_end"] == 1


def test_a_ledger_keeps_what_was_written(tmp_path: Path) -> None:
    entries = [Strike(2.0, "reset", "all", 0.0), Strike(1.0, "freeze", "worker-1", 3.0)]
    for entry in entries:
        Ledger(tmp_path / "ledger").write(entry)
    assert read(tmp_path / "ledger", Strike) == entries[::-1]
    assert read(tmp_path / "none", Strike) == []


def test_a_seed_gives_the_same_campaign_and_every_kind_of_fault_its_turn() -> None:
    faults, again, others = (schedule(2 * len(KINDS), 2, seed, pause_s=3.0, longest_s=2.0) for seed in (7, 7, 8))
    assert faults == again != others
    assert max(fault.hold_s for fault in faults) == 2.0
    assert Counter(fault.kind for fault in faults) == dict.fromkeys(KINDS, 2)
    jobs = plan(200, 3, seed=7)
    assert jobs == plan(200, 3, seed=7) != plan(200, 3, seed=8)
    assert sum(job.is_poison for job in jobs) == 3
    assert {job.priority for job in jobs} == set(range(10))


def test_the_proxy_forwards_holds_back_and_resets() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, Proxy(server.getsockname()[1]).open() as proxy:
        threading.Thread(target=_echo, args=(server,), daemon=True).start()
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as client:
            client.sendall(b"one")
            assert client.recv(3) == b"one"
            proxy.hang()
            client.sendall(b"two")
            client.settimeout(0.3)
            with pytest.raises(TimeoutError):
                client.recv(3)
            client.settimeout(5)
            proxy.go_on()
            assert client.recv(3) == b"two"
            proxy.reset()
            with pytest.raises(ConnectionResetError):
                client.recv(3)


def _echo(server: socket.socket) -> None:
    connection, _ = server.accept()
    with connection, contextlib.suppress(ConnectionResetError):
        while said := connection.recv(100):
            connection.sendall(said)
