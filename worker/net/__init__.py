"""Connections that a stranger names: which addresses are allowed, how fast, and for how long."""
