"""Runs named measurements one after the other and writes their figures to one file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def run(description: str | None, measures: Mapping[str, Callable[[], Any]]) -> None:
    """The command line: some of the measures, or all."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("names", nargs="*", choices=[*measures, []], default=[])
    parser.add_argument("--save", help="the name of the file in results/, where other measures' figures stay")
    asked = parser.parse_args()
    for name in asked.names or measures:
        figures = {name: measures[name]()}
        print(json.dumps(figures), flush=True)
        if asked.save:
            path = RESULTS / f"{asked.save}.json"
            known = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(known | figures, indent=2) + "\n")
