"""A finished campaign's output, with the state beside it: made up, without workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tasks.campaign.plan import Plan
from tasks.campaign.state import About, CampaignState, state_path, stored
from tasks.campaign.tables import open_writer
from tasks.outcomes import Outcome
from tasks.results import Result

BEGAN = 1_800_000_000.0
CLASSIFY = Plan(task="classify", image="url", id="sku", set={"labels": ["cat", "duck"]})


def answered(label: str, score: float, *, seconds: float = 1.0, text: str | None = None) -> Result:
    """A result of `classify`."""
    return Result.model_validate(
        {
            "text": text or label,
            "finish_reason": "stop",
            "label": label,
            "scores": {label: score, "other": 1 - score},
            "usage": {"prompt_tokens": 40, "completion_tokens": 2, "images": 1},
            "model": {"id": "demo", "family": "idefics", "dtype": "float32"},
            "timing": {"queued_s": seconds / 2, "fetch_s": seconds / 4, "wait_s": 0, "generate_s": seconds / 4},
        }
    )


def write_output(
    output: Path,
    rows: Iterable[Mapping[str, Any]],
    outcome_of: Callable[[int], Outcome | None],
    *,
    plan: Plan = CLASSIFY,
    input: str = "photos.csv",
    left_out: Iterable[int] = (),
    host: str | None = "cdn.example",
    has_state: bool = True,
) -> None:
    """Write an output, and its state. Row n, from 1, ends n seconds after the campaign began."""
    missing = set(left_out)
    about = About(
        id="c0ffee" * 5 + "00",
        name="",
        plan=plan.as_dict(),
        input=input,
        output=str(output),
        created=BEGAN,
        seconds=90.0,
    )
    told = [(number, row, outcome_of(number)) for number, row in enumerate(rows, start=1)]
    columns = list(dict.fromkeys(name for _, row, _ in told for name in row))
    with open_writer(str(output), [*columns, *plan.outcome_columns]) as writer:
        for number, row, outcome in told:
            if number not in missing:
                writer.write({**row, **(plan.outcome(outcome) if outcome is not None else {})})
    if has_state:
        with CampaignState.begin(state_path(str(output)), about) as state, state.transaction():
            state.leave_out(missing)
            state.store(
                stored(number, b"12345678", f"job-{number}", host, outcome, BEGAN + number)
                for number, _, outcome in told
                if outcome is not None and number not in missing
            )
