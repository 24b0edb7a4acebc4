"""The worker. What is started: `app.py`, `callbacks.py`, `model_process.py`, `health.py`; a package is one part of it.

CONTRIBUTING.md lists where to find what; docs/architecture.md shows how the parts work together.
"""
