"""Measurements, each a command; their last figures lie in `results/`."""
