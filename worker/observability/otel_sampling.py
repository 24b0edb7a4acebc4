"""Which traces are recorded where OTEL_TRACES_SAMPLER says nothing.

A job of a sampled trace is always recorded, as OpenTelemetry's default does. Of jobs whose producers send no trace ten
a second are: recording one takes about half a millisecond of a processor, so more would delay a busy worker.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased, Sampler, SamplingResult

#: Jobs a second that begin a trace of their own.
TRACES_PER_S = 10


class RateSampler(Sampler):
    """Samples TRACES_PER_S of the spans without a parent in each second. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        #: The whole second that is counted, and the spans in it.
        self._second, self._count = 0, 0

    def should_sample(self, *arguments: Any, **options: Any) -> SamplingResult:
        return (ALWAYS_ON if self._is_within_rate() else ALWAYS_OFF).should_sample(*arguments, **options)

    def _is_within_rate(self) -> bool:
        second = int(self._clock())
        with self._lock:
            if second != self._second:
                self._second, self._count = second, 0
            self._count += 1
            return self._count <= TRACES_PER_S

    def get_description(self) -> str:
        return f"RateSampler{{{TRACES_PER_S}/s}}"


def default_sampler() -> Sampler:
    return ParentBased(RateSampler())
