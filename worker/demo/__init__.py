"""A small IDEFICS of our own: what the service runs when no model is named."""
