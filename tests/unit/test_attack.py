"""The attacks of `benchmarks/attack.py` are ones: none of their jobs is answered but a mutated picture's."""

from __future__ import annotations

import json
import time
from collections import Counter

import pytest

from benchmarks import attack, fuzz
from config.settings import Settings
from tasks.errors import ImageInvalid, ImageTooLarge, ImageUnreachable
from worker.images.fetch import Fetcher, FetchPolicy


def ends(kind: str) -> Counter[str]:
    with fuzz.Answering() as answering:
        jobs = (attack.ATTACKS[kind](number, 1) for number in range(36))
        return Counter(answering.end("idefics.complete", json.loads(json.dumps(job))) for job in jobs)


def test_refused_addresses_are_refused() -> None:
    assert set(ends("refused")) == {"image_blocked"}


def test_bad_payloads_are_refused() -> None:
    assert set(ends("payloads")) == {"invalid_request", "prompt_too_long"}


def test_broken_pictures_are_refused_but_for_some_mutated_ones() -> None:
    found = ends("pictures")
    assert set(found) == {"image_invalid", "image_too_large", "result"}
    assert found["result"] < 36 / 4


@pytest.mark.parametrize("answer", attack.ANSWERS)
def test_hostile_servers_end_in_an_error_in_time(answer: str) -> None:
    networks = Settings(image_allow_networks="127.1.0.0/16").image_allow_networks  # type: ignore[arg-type]
    with attack.hostile_servers() as port:
        policy = FetchPolicy(allow_networks=networks, ports=(port,), read_s=0.2, total_s=0.5)
        began = time.monotonic()
        with pytest.raises((ImageInvalid, ImageTooLarge, ImageUnreachable)):
            Fetcher(policy).fetch(f"http://127.1.0.1:{port}/{answer}/1")
    assert time.monotonic() - began < 3
