"""What a worker reports about itself.

The log: `log_setup.py` (level, destination; a failed job is one line at INFO), `log_lines.py` and `log_json.py` (its
two formats), `job_fields.py` (the job that a record is about), `redaction.py` (defects without a job's contents).

Traces: `tracing.py` is called everywhere and does nothing while they are off; `otel.py` makes the spans,
`otel_setup.py` sets OpenTelemetry up, `otel_sampling.py` chooses what is recorded.

Errors out: `setup_hook.py` calls the operator's function in each process, `sentry.py` is one for Sentry.

Metrics: `metrics.py` defines them, each is counted where it happens, as in `worker/images/cache.py`. `exposition.py`
serves them; `worker/model_process.py` sends its own to the parent with the heartbeat. `queue.py` is the queue exporter.
"""
