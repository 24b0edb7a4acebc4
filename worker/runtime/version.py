"""The version of this project."""

from __future__ import annotations

import functools
from importlib import metadata


@functools.cache
def project_version() -> str:
    """The installed version; `dev` in a checkout that was not installed."""
    try:
        return metadata.version("idefics-jobs")
    except metadata.PackageNotFoundError:
        return "dev"
