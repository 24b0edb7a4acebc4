"""A campaign's output as one page for a browser: `idefics-jobs report`."""

from .pictures import Thumbnails
from .write import ROWS, Written, write_report

__all__ = ["ROWS", "Thumbnails", "Written", "write_report"]
