"""Connections to addresses that are not trusted: which are allowed, how fast, and for how long."""
