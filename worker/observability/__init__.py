"""What a worker reports about itself.

The log: `log_setup.py` (level, destination; a failed job is one line at INFO), `log_lines.py` (its format).

Metrics have no module of their own: each is counted where it happens, as in `worker/engine/prefix_cache.py`.
`worker/model_process.py` sends them with its heartbeat, and `worker/pool/pool.py` shows them in `inspect stats`.
"""
