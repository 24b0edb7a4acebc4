"""Callbacks on their way: which go out next."""
