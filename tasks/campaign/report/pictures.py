"""Gives a page's rows their small pictures: from what is at hand, and from the web only where that is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from pathlib import Path
from typing import Any

from ...errors import ConfigurationError, IdeficsError
from ..picture_cells import PictureCells
from ..plan import Plan
from ..tables.files import is_url
from ..thumbnails import check_pillow, data_uri_bytes, fetched, is_web, thumbnail

#: Characters of all thumbnails of a page: more would open slowly.
MAX_CHARS = 40_000_000
#: Downloads at once.
DOWNLOADS = 16


class Thumbnails(StrEnum):
    """Which rows get small pictures."""

    NONE = "none"
    #: Those whose picture is at hand: in the table, or a file of the producer's.
    LOCAL = "local"
    #: Those at http(s) addresses, too, which this process downloads.
    FETCH = "fetch"


def possible(thumbnails: Thumbnails, notes: list[str]) -> Thumbnails:
    """NONE, with a note, instead of LOCAL where Pillow is missing. Raises ConfigurationError for FETCH."""
    if thumbnails is Thumbnails.NONE:
        return thumbnails
    try:
        check_pillow()
    except ConfigurationError as error:
        if thumbnails is Thumbnails.FETCH:
            raise
        notes.append(str(error))
        return Thumbnails.NONE
    return thumbnails


def pictures_folder(output: str, plan: Plan | None) -> str | None:
    """Where files that the output names may be read; nothing outside it is."""
    folder = plan.images_in if plan is not None else None
    if folder is None and not is_url(output):
        folder = str(Path(output).absolute().parent)
    return folder if folder is not None and Path(folder).is_dir() else None


class PictureAdder:
    """Adds `thumb` to items: call it for each, then `finish`. Files are read below `folder` only."""

    def __init__(self, mode: Thumbnails, folder: str | None) -> None:
        self._mode = mode
        self._cells = PictureCells(folder)
        self._chars = 0
        self._to_fetch: list[tuple[dict[str, Any], str]] = []
        #: Items with a picture, and those without one for want of room.
        self.shown = self.left_out = 0

    def __call__(self, item: dict[str, Any], picture: Any) -> None:
        """See an item's picture: a cell's value, or an image of a job's arguments."""
        if self._mode is Thumbnails.NONE or picture is None:
            return
        if isinstance(picture, str) and is_web(picture):
            if self._mode is Thumbnails.FETCH:
                self._to_fetch.append((item, picture))
            return
        content = self._at_hand(picture)
        self._add(item, content and thumbnail(content))

    def finish(self) -> None:
        """Download what is to be downloaded."""
        with ThreadPoolExecutor(DOWNLOADS) as pool:
            addresses = [address for _, address in self._to_fetch]
            for (item, _), small in zip(self._to_fetch, pool.map(_from_the_web, addresses), strict=True):
                self._add(item, small)

    def _at_hand(self, picture: Any) -> bytes | None:
        if isinstance(picture, Mapping) and picture.keys() == {"path"}:
            picture = picture["path"]
        try:
            uri = self._cells.image(picture, "image")
        except IdeficsError:
            return None
        return data_uri_bytes(uri) if isinstance(uri, str) else None

    def _add(self, item: dict[str, Any], small: str | bytes | None) -> None:
        if not isinstance(small, str):
            return
        if self._chars + len(small) > MAX_CHARS:
            self.left_out += 1
            return
        self._chars += len(small)
        self.shown += 1
        item["thumb"] = small


def _from_the_web(address: str) -> str | None:
    content = fetched(address)
    return thumbnail(content) if content else None
