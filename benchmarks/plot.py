"""Plots the ratios in `benchmarks/results` for the docs: `python -m benchmarks.plot`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

from benchmarks.measures import RESULTS

PICTURE = Path(__file__).parents[1] / "docs" / "throughput.png"
BOUND = "stock loop, batch 32"
FILES = {"shipped": "bundled model", "mid-size": "mid-size model"}


def ratios(figures: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By workload and contender: its throughput against the stock loop's."""
    return {
        workload: {
            name: contenders[BOUND]["ours_to_this_median"] / each["ours_to_this_median"]
            for name, each in contenders.items()
        }
        for workload, contenders in figures["workloads"].items()
    }


def main() -> None:
    figure, axes = pyplot.subplots(1, len(FILES), figsize=(11, 3.6), layout="constrained")
    for axis, (file, title) in zip(axes, FILES.items(), strict=True):
        found = ratios(json.loads((RESULTS / f"{file}.json").read_text()))
        names = [name for name in next(iter(found.values())) if name != BOUND]
        for number, name in enumerate(names):
            places = [place + 0.8 * number / len(names) for place in range(len(found))]
            bars = axis.bar(places, [each[name] for each in found.values()], 0.8 / len(names), align="edge", label=name)
            axis.bar_label(bars, fmt="%.1f", fontsize=7)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set_xticks([place + 0.4 for place in range(len(found))], list(found), rotation=20, fontsize=8)
        axis.set_title(title)
        axis.set_ylabel("jobs/s against the stock loop at batch 32")
        axis.legend(fontsize=7)
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    main()
