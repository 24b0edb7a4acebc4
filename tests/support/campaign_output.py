"""A campaign's output with the state beside it, as a run leaves them, from answers that are made up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tasks.campaign import output as campaign_output
from tasks.campaign.plan import Plan
from tasks.campaign.rows import row_digest
from tasks.campaign.state import About, CampaignState, state_path, stored
from tasks.campaign.tables import open_table, open_writer
from tasks.outcomes import Outcome
from tasks.results import Result

BEGAN = 1_800_000_000.0
#: A row's outcome by its number, from 1; None for a row that was not run.
OutcomeOf = Callable[[int], Outcome | None]
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


def write_output(output: Path, rows: Iterable[Mapping[str, Any]], outcome_of: OutcomeOf, **options: Any) -> None:
    """An output whose input is a CSV table beside it; see `finish`."""
    told = list(rows)
    source = output.with_name("photos.csv")
    with open_writer(str(source), list(dict.fromkeys(name for row in told for name in row))) as writer:
        for row in told:
            writer.write(row)
    finish(source, output, outcome_of, **options)


def finish(
    source: Path,
    output: Path,
    outcome_of: OutcomeOf,
    *,
    plan: Plan = CLASSIFY,
    left_out: Iterable[int] = (),
    host: str | None = "cdn.example",
    has_state: bool = True,
) -> None:
    """Write an output and its state. Row n, from 1, ends n seconds after the campaign began."""
    table, path, skipped = open_table(str(source)), state_path(str(output)), set(left_out)
    about = About(
        id="c0ffee" * 5 + "00",
        name=output.name,
        plan=plan.as_dict(),
        input=str(source),
        output=str(output),
        created=BEGAN,
        seconds=90.0,
    )
    columns = plan.needed_columns
    with CampaignState.begin(path, about) as state:
        with state.transaction():
            state.leave_out(skipped)
            state.store(
                stored(number, row_digest(columns, cells), f"job-{number}", host, outcome, BEGAN + number)
                for number, cells in enumerate(table, start=1)
                if number not in skipped and (outcome := outcome_of(number)) is not None
            )
        campaign_output.write_output(str(output), table, plan, state)
    if not has_state:
        path.unlink()
