"""Callbacks: recorded when a job ends, then delivered."""
