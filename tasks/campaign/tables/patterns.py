"""Names of several files in one: `part-*.parquet`, `shards/{00000..00099}.tar`, `s3://bucket/{train,test}/*.csv`."""

from __future__ import annotations

import fnmatch
import glob
import re
from pathlib import Path

from ..errors import TableError
from .files import is_url, located, reported

#: More would be a mistake in a range.
MAX_FILES = 100_000

_BRACES = re.compile(r"\{(?:(\d{1,12})\.\.(\d{1,12})|([^{},]*,[^{}]*))\}")


def is_pattern(path: str) -> bool:
    """Whether a path names several files. In a URL `*` is a wildcard, and `?` and `[` are not.

    The name of an existing local file is no pattern, even if it has such characters.
    """
    return (_has_wildcard(path) or bool(_BRACES.search(path))) and (is_url(path) or not Path(path).exists())


def matching_files(pattern: str) -> list[str]:
    """A pattern's files: those of braces in the order of the braces, those of a wildcard by name. Raises TableError."""
    return [path for each in _expanded(pattern) for path in _matches(each)]


def may_match(pattern: str, path: str) -> bool:
    """Whether a pattern would name a file if it were there."""
    return is_pattern(pattern) and any(_fits(path, each) for each in _expanded(pattern))


def _has_wildcard(path: str) -> bool:
    return "*" in path.partition("?")[0] if is_url(path) else glob.has_magic(path)


def _expanded(pattern: str) -> list[str]:
    """A pattern without its braces, as a shell expands them: the last ones change first."""
    found, place = [""], 0
    for braces in _BRACES.finditer(pattern):
        numbers, names = _range(braces), str(braces[3]).split(",")
        if len(found) * len(numbers or names) > MAX_FILES:
            raise TableError(f"{pattern} names more than {MAX_FILES:,} files: write a smaller range.")
        width = len(braces[1] or "") if (braces[1] or "").startswith("0") else 0
        choices = [f"{number:0{width}}" for number in numbers] or names
        found = [f"{start}{pattern[place : braces.start()]}{choice}" for start in found for choice in choices]
        place = braces.end()
    return [f"{start}{pattern[place:]}" for start in found]


def _range(braces: re.Match[str]) -> range:
    """The numbers of `{first..last}`; none for names."""
    if braces[1] is None:
        return range(0)
    first, last = int(braces[1]), int(braces[2])
    return range(first, last + 1) if first <= last else range(first, last - 1, -1)


def _matches(path: str) -> list[str]:
    if not _has_wildcard(path):
        return [path]
    # By the module glob, since a path's method takes no absolute pattern.
    found = _remote(path) if is_url(path) else glob.glob(path, recursive=True)  # noqa: PTH207
    if not found:
        raise TableError(f"There is no file {path}.")
    return sorted(found)


def _remote(url: str) -> list[str]:
    with reported(url):
        files, place = located(url)
        # What stands around the path stays, as in `simplecache::s3://` and `zip://...::https://`.
        before, _, after = url.partition(place)
        return [f"{before}{path}{after}" for path in files.glob(place)]


def _fits(path: str, pattern: str) -> bool:
    if "**" in pattern:
        return fnmatch.fnmatchcase(path, pattern.replace("**/", "*"))
    parts, wanted = path.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))
