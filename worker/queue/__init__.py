"""The broker's side of a worker: what lies in its queue, and what becomes of it."""
