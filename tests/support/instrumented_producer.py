"""A producer with OpenTelemetry's own instrumentation of Celery: sends one job, and prints its trace's id."""

from __future__ import annotations

import sys

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from tasks import Client, Complete

if __name__ == "__main__":
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    CeleryInstrumentor().instrument()
    with trace.get_tracer("shop").start_as_current_span("request") as span:
        Client(sys.argv[1]).submit(Complete(prompt=["Hello"], max_new_tokens=2))
    print(trace.format_trace_id(span.get_span_context().trace_id))
