"""Rows for tests: what counts is their length, what they ask for, and who they are."""

from __future__ import annotations

from typing import Any

from worker.engine.row import Picture, Row, Sampling, Tokens


def row(
    text: str = "prompt",
    *,
    wanted: int = 3,
    beams: int = 1,
    priority: int = 5,
    arrived: float | None = None,
    labels: tuple[tuple[int, ...], ...] = (),
    deadline: float | None = None,
    pictures: tuple[Picture, ...] = (),
    **sampling: Any,
) -> Row:
    """A row of the fake model: its tokens are its characters."""
    made = Row(
        Tokens(tuple(map(ord, text)), pictures),
        Sampling(max_new_tokens=wanted, num_beams=beams, **sampling),
        labels,
        priority,
        deadline,
    )
    if arrived is not None:
        made.arrived = arrived
    return made
