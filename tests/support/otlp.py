"""A receiver of traces: a real HTTP server on loopback that reads OTLP in protobuf."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue

from tests.support.web import Quiet, serving


@dataclass(frozen=True)
class ReceivedSpan:
    name: str
    trace: str
    id: str
    parent: str
    #: Unix seconds.
    started: float
    ended: float
    process: str
    attributes: dict[str, Any]
    #: The linked spans' ids.
    links: tuple[str, ...]
    is_error: bool


@dataclass
class TraceReceiver:
    port: int = 0
    spans: list[ReceivedSpan] = field(default_factory=list)
    #: All that was received, as text.
    raw: list[str] = field(default_factory=list)

    def of(self, name: str, trace: str | None = None) -> list[ReceivedSpan]:
        return [span for span in self.spans if span.name == name and trace in (None, span.trace)]

    @property
    def variables(self) -> dict[str, str]:
        """The environment of a process that sends its spans here soon."""
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self.port}",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
            "OTEL_TRACES_SAMPLER": "always_on",
        }

    @contextmanager
    def open(self) -> Iterator[TraceReceiver]:
        with serving(_handler(self)) as self.port:
            yield self


def _handler(receiver: TraceReceiver) -> type[BaseHTTPRequestHandler]:
    class Handler(Quiet, BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers["Content-Encoding"] == "gzip":
                body = gzip.decompress(body)
            message = ExportTraceServiceRequest.FromString(body)
            receiver.raw.append(str(message))
            for resource in message.resource_spans:
                process = _attributes(resource.resource.attributes).get("idefics.process", "producer")
                receiver.spans += [_received(span, process) for scope in resource.scope_spans for span in scope.spans]
            self.send_response(200)
            self.end_headers()

    return Handler


def _received(span: Any, process: str) -> ReceivedSpan:
    return ReceivedSpan(
        name=span.name,
        trace=span.trace_id.hex(),
        id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        started=span.start_time_unix_nano / 1e9,
        ended=span.end_time_unix_nano / 1e9,
        process=process,
        attributes=_attributes(span.attributes),
        links=tuple(link.span_id.hex() for link in span.links),
        is_error=span.status.code == 2,
    )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, str(kind))
