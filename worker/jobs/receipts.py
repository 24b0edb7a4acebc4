"""A result's receipt: hashes and parameters by which its answer can be repeated and compared."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from tasks.results import ModelInfo, Receipt
from worker.engine.interfaces import EnginePath
from worker.engine.row import Output, Row, Sampling, Tokens
from worker.jobs.runs import JobContext
from worker.runtime.version import project_version

#: Pictures of which each has a hash of its own: a receipt is small.
MAX_PICTURES = 8
#: Hexadecimal digits of a hash.
DIGITS = 16
#: Parameters that stand elsewhere in the receipt, or belong to the checkpoint.
_ELSEWHERE = ("seed", "eos_ids")


class Receipts:
    """Writes the receipts of one model's answers. Used from many threads at once."""

    def __init__(
        self,
        info: ModelInfo,
        path: Callable[[Row], EnginePath] | None = None,
        weights: Callable[[], str | None] = lambda: None,
    ) -> None:
        """`path`: see Model. `weights`: the hash of the weights, None while it is not known."""
        self._model = _without_folders(info.id)
        self._info = info
        self._path = path
        self._weights = weights

    def receipt(self, tokens: Tokens, row: Row, output: Output, context: JobContext) -> Receipt:
        """The receipt of an answer. `tokens`: the row's, without salt."""
        is_sampled = row.sampling.temperature > 0 and not row.labels
        return Receipt(
            model=self._model,
            revision=self._info.revision,
            weights=self._weights(),
            dtype=self._info.dtype,
            quantization=self._info.quantization,
            engine=self._path(row) if self._path else None,
            version=project_version(),
            prompt=_hash_of_ids([tokens.ids, *row.labels]),
            pixels=_pixels(tokens),
            sampling={} if row.labels else _told(row.sampling) | _grammar(row),
            seed=row.sampling.seed if is_sampled else None,
            output=output_hash(output),
            attempts=context.retries + 1,
            worker=context.worker,
            cached=row.is_reused,
        )


def output_hash(output: Output) -> str:
    """Hash of an answer's token ids, of the number of its label, and of the token ids of further answers."""
    label = -1 if output.label is None else output.label
    return _hash_of_ids([output.ids, [label], *(other.ids for other in output.others)])


def _without_folders(id: str) -> str:
    """A model's id; of a folder its name alone."""
    return Path(id).name if id.startswith((".", "/")) else id


def _told(sampling: Sampling) -> dict[str, Any]:
    """The parameters that differ from plain greedy decoding; those that are no numbers as a hash."""
    found = {field.name: (getattr(sampling, field.name), field.default) for field in fields(sampling)}
    return {
        name: value if isinstance(value, int | float) else _hash(json.dumps(value, sort_keys=True, default=repr))
        for name, (value, default) in found.items()
        if value != default and name not in _ELSEWHERE
    }


def _grammar(row: Row) -> dict[str, str]:
    return {"grammar": _hash(row.grammar.definition)} if row.grammar else {}


def _pixels(tokens: Tokens) -> list[str]:
    keys = [picture.key for picture in tokens.pictures]
    if len(keys) > MAX_PICTURES:
        return [hashlib.blake2b(b"".join(keys)).hexdigest()[:DIGITS]]
    return [key.hex()[:DIGITS] for key in keys]


def _hash_of_ids(sequences: Iterable[Iterable[int]]) -> str:
    content = hashlib.blake2b(digest_size=DIGITS // 2)
    for ids in sequences:
        each = array("q", ids)
        content.update(len(each).to_bytes(8, "little") + each.tobytes())
    return content.hexdigest()


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=DIGITS // 2).hexdigest()
