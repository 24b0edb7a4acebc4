"""The headers by which a job continues its producer's trace, if the producer uses OpenTelemetry."""

from __future__ import annotations

import sys


def trace_headers() -> dict[str, str]:
    """W3C's `traceparent` and what else is set up, for the current span. Nothing is imported for other producers."""
    headers: dict[str, str] = {}
    if "opentelemetry.trace" in sys.modules:
        from opentelemetry.propagate import inject

        inject(headers)
    return headers
