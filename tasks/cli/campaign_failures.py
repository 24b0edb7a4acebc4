"""`idefics-jobs campaigns failures`: a campaign's failed rows, counted by code or by the host of their images."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ..campaign.control import this_host
from ..campaign.directory import Campaigns
from ..campaign.errors import CampaignError
from ..campaign.record import CampaignRecord, base_name, public_id
from ..campaign.state import CampaignState, state_path
from .console import echo, echo_json, echo_rows, json_option

#: What stands for no host: the image has no URL, or its host is not among the 1,000 with the most failures.
NO_HOST = "-"


@click.command("failures")
@click.argument("campaign")
@click.option("--by", type=click.Choice(["code", "host"]), default="code", show_default=True)
@json_option
@click.pass_obj
def failures(client: Any, campaign: str, by: str, as_json: bool) -> None:
    """Count a campaign's failed rows by error code, or by the host of their images.

    CAMPAIGN is its output or its state file, OUTPUT.campaign, or its id or name. Hosts are in the state file only, so
    they are counted on the machine with the output.

    \b
    idefics-jobs campaigns failures captions.parquet --by host
    """
    counts = _counts(client, campaign, by)
    if as_json:
        for name, count in counts.items():
            echo_json({by: None if name == NO_HOST else name, "failed": count}, on_one_line=True)
        return
    echo_rows((by, "failed"), ((name, f"{count:,}") for name, count in counts.items()))
    if not counts:
        echo("No row has failed.", err=True)


def _counts(client: Any, campaign: str, by: str) -> Mapping[str, int]:
    path = _given(campaign)
    if path is not None:
        return _stored(path, by)
    record = Campaigns(client().app).get(campaign)
    path = _beside(record)
    return _recorded(record, by) if path is None else _stored(path, by)


def _given(campaign: str) -> Path | None:
    """The state file that was named, by itself or by its output; None if there is no such file here."""
    if campaign.endswith(".campaign"):
        path = Path(campaign)
    elif Path(campaign).name:
        path = state_path(campaign)
    else:
        return None
    return path if path.is_file() else None


def _beside(record: CampaignRecord) -> Path | None:
    """The state file in the current folder, if it is this campaign's."""
    path = _given(base_name(record.info.output))
    with contextlib.suppress(CampaignError):
        return path if path and _public_id(path) == record.id else None
    return None


def _public_id(path: Path) -> str:
    with CampaignState.read(path) as state:
        return public_id(state.about.id)


def _stored(path: Path, by: str) -> dict[str, int]:
    with CampaignState.read(path) as state:
        counts = state.counts()
    if by == "code":
        return counts.by_code
    rest = counts.failed - sum(counts.by_host.values())
    return {**counts.by_host, **({NO_HOST: rest} if rest else {})}


def _recorded(record: CampaignRecord, by: str) -> Mapping[str, int]:
    """The counts in Redis. Raises CampaignError for those by host, which are not there."""
    if by == "code":
        return record.progress.failures
    info = record.info
    where = "in another folder of this machine" if info.host == this_host() else f"on the machine {info.host}"
    raise CampaignError(
        f"The failures of {info.name} ({record.id}) by host are in the file {info.output}.campaign, {where}: give "
        "this command its path there. `--by code` works from anywhere."
    )
