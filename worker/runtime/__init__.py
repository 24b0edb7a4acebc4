"""The process itself: its CPU cores, permits for the interpreter's lock (`gil.py`), its exit (`exit_watchdog.py`).

The orderly shutdown is `SoftShutdown` in `worker/pool/bootsteps.py`.
"""
