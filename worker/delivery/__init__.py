"""Callbacks: recorded when a job ends, sent by the callbacks worker."""
