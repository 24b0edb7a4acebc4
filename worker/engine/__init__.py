"""The engine: runs many jobs on one model, in batches; knows no family of models.

`engine.py` is the thread that runs batches, and runs them again in halves if memory was short. `scheduler.py` decides
which rows join, `continuous.py` runs the decode steps, `kv_cache.py` keeps keys and values in slots (`slot_cache.py`)
or in blocks (`block_cache.py`), `slots.py` and `blocks.py` say which of them are in use. `prefix_cache.py` finds shared
prefixes, `scoring.py` scores labels, `progress.py` ends a row. `stock.py` runs families without a decoder of their own;
`interfaces.py` is what a family implements.
"""
