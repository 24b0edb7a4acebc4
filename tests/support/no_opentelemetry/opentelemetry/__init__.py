"""In the place of OpenTelemetry, for a process that must not use it."""

raise ImportError("OpenTelemetry is not installed")
