"""The engine: runs many jobs on one model, in batches; knows no family of models.

`engine.py` is the thread that runs batches, and runs them again in halves if memory was short. `scheduler.py` decides
which rows join, `continuous.py` runs the decode steps, `kv_cache.py` and `slots.py` keep keys and values,
`prefix_cache.py` finds shared prefixes, `scoring.py` scores labels, `progress.py` ends a row. `stock.py` runs families
without a decoder of their own; `interfaces.py` is what a family implements.
"""
