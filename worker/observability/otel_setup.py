"""Sets OpenTelemetry up in a process of a worker, by its standard variables (OTEL_...)."""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worker.observability.otel import Spans

#: Spans are sent by HTTP unless OTEL_EXPORTER_OTLP_PROTOCOL says otherwise.
_EXPORTERS = {
    "http/protobuf": "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "grpc": "opentelemetry.exporter.otlp.proto.grpc.trace_exporter",
}


def spans(process: str) -> Spans:
    """The spans of this process. Ends the program with the cure where a library is missing.

    A provider that IDEFICS_SETUP has set is used as it is.
    """
    try:
        from worker.observability.otel import Spans

        return Spans(_provider(process))
    except ImportError as error:
        sys.exit(
            f"IDEFICS_TRACES=otlp needs a library that is not installed ({error}): pip install opentelemetry-sdk "
            "opentelemetry-exporter-otlp-proto-http, or opentelemetry-exporter-otlp-proto-grpc with "
            "OTEL_EXPORTER_OTLP_PROTOCOL=grpc."
        )
    except (ValueError, OSError) as error:
        sys.exit(f"IDEFICS_TRACES=otlp: a variable OTEL_... cannot be used: {error}")


def _provider(process: str) -> Any:
    from opentelemetry import trace

    present = trace.get_tracer_provider()
    if not isinstance(present, trace.ProxyTracerProvider):
        return present
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    from worker.observability.otel_sampling import default_sampler

    # Of `None` the SDK reads the variable.
    sampler = None if os.environ.get("OTEL_TRACES_SAMPLER") else default_sampler()
    resource = Resource.create(_described(process))
    # `Spans.stop` ends it, in bounded time.
    provider = TracerProvider(sampler=sampler, resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(_exporter()))
    trace.set_tracer_provider(provider)
    return provider


def _described(process: str) -> dict[str, str]:
    """Attributes of all spans of this process."""
    named = "OTEL_SERVICE_NAME" in os.environ or "service.name" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    return {"idefics.process": process, **({} if named else {"service.name": "idefics"})}


def _exporter() -> Any:
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    module = _EXPORTERS.get(protocol or "http/protobuf")
    if module is None:
        raise ValueError(f"OTEL_EXPORTER_OTLP_PROTOCOL={protocol}: use {' or '.join(_EXPORTERS)}")
    return importlib.import_module(module).OTLPSpanExporter()
