"""What a worker reports about itself.

The log: `log_setup.py` (level, destination; a failed job is one line at INFO), `log_lines.py` and `log_json.py` (its
two formats), `job_fields.py` (the job that a record is about), `redaction.py` (defects without a job's contents).

Errors out: `setup_hook.py` calls the operator's function in each process, `sentry.py` is one for Sentry.

Metrics have no module of their own: each is counted where it happens, as in `worker/engine/prefix_cache.py`.
`worker/model_process.py` sends them with its heartbeat, and `worker/pool/pool.py` shows them in `inspect stats`.
"""
