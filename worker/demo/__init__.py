"""The bundled model, its demo, and a broker and worker on this machine (`stack.py`, `up.py`)."""
