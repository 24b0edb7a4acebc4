"""`idefics-jobs`: jobs from a shell."""

from .main import main

__all__ = ["main"]
