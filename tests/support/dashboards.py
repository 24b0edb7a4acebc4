"""The queries of the dashboards in deploy/grafana."""

from __future__ import annotations

import json
from pathlib import Path

from worker.demo.stack import CHECKOUT

DASHBOARDS: list[Path] = sorted((CHECKOUT / "deploy" / "grafana").glob("*.json"))


def queries() -> list[str]:
    """Every query, of all workers, with rates over a minute."""
    panels = [panel for path in DASHBOARDS for panel in json.loads(path.read_text())["panels"]]
    written = [target["expr"] for panel in panels for target in panel["targets"]]
    return [query.replace("$__rate_interval", "1m").replace("$worker", ".*") for query in written]
