"""Writes the dashboards beside this file: `python deploy/grafana/generate.py`.

The tables below are the dashboards; the JSON files are made from them, so that all panels look and behave alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from grafana_foundation_sdk.builders import common, dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import GraphGradientMode, LegendDisplayMode, LegendPlacement
from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DataSourceRef, VariableRefresh, VariableSort

FOLDER = Path(__file__).parent
#: The user chooses the data source, and workers by their `instance`.
SOURCE = DataSourceRef(type_val="prometheus", uid="${source}")
#: Units of Grafana.
SECONDS, BYTES, SHARE, EACH_SECOND, COUNT = "s", "bytes", "percentunit", "ops", "short"
#: Columns and rows of Grafana's grid that a panel takes.
WIDTH, HEIGHT = 8, 8


class Panel(NamedTuple):
    """A panel: a title, a unit, a sentence about it, and its queries by the legends of their curves."""

    title: str
    unit: str
    about: str
    queries: dict[str, str]
    is_stacked: bool = False


def quantiles(metric: str, by: str = "") -> dict[str, str]:
    """Queries for the median and the 95th percentile of a histogram, for each value of the label `by`."""
    labels, legend = (f"le, {by}", f" {{{{{by}}}}}") if by else ("le", "")
    rates = f"sum by ({labels}) (rate({metric}_bucket{WORKERS}[$__rate_interval]))"
    return {f"{name}{legend}": f"histogram_quantile({share}, {rates})" for name, share in (("p50", 0.5), ("p95", 0.95))}


def rate(metric: str, by: str, labels: str = "") -> str:
    """The rate of a counter in all chosen workers, for each value of the label `by`."""
    return f"sum by ({by}) (rate({metric}{{{_chosen(labels)}}}[$__rate_interval]))"


def _chosen(labels: str = "") -> str:
    return ", ".join(filter(None, ['instance=~"$worker"', labels]))


WORKERS = f"{{{_chosen()}}}"


def hit_share(cache: str) -> str:
    """The share of a cache's lookups that found something."""
    hits, queries = (
        f"sum(rate(idefics_{cache}_cache_{kind}_total{WORKERS}[$__rate_interval]))" for kind in ("hits", "queries")
    )
    return f"{hits} / {queries}"


#: Answers are kept in Redis.
CACHES_IN_MEMORY = ("picture", "encoder", "prefix")
CACHES = (*CACHES_IN_MEMORY, "answer")

DASHBOARDS: dict[str, tuple[str, Sequence[Panel]]] = {
    "queue": ("Queue", [
        Panel("Waiting jobs", COUNT, "Over all priorities, by queue.",
              {"{{queue}}": "idefics_queue_jobs_waiting"}),
        Panel("Age of the oldest waiting job", SECONDS, "How long a job submitted now may wait.",
              {"{{queue}}": "idefics_queue_oldest_job_age_seconds"}),
        Panel("Waiting jobs by priority", COUNT, "0 is the most urgent priority, 9 that of bulk work.",
              {"{{queue}} {{priority}}": "idefics_queue_jobs"}, is_stacked=True),
        Panel("Taken and scheduled jobs", COUNT, "Jobs that workers hold, and jobs with a countdown.",
              {"taken": "idefics_queue_jobs_in_flight", "scheduled {{queue}}": "idefics_queue_jobs_scheduled"}),
        Panel("Workers", COUNT, "Workers that take jobs from the queue.", {"{{queue}}": "idefics_queue_workers"}),
        Panel("Failed jobs kept", COUNT, "They can be inspected and retried with `idefics-jobs failed`.",
              {"failed": "idefics_queue_dead_letters"}),
    ]),
    "jobs": ("Jobs", [
        Panel("Jobs ended", EACH_SECOND, "By state.", {"{{state}}": rate("idefics_jobs_total", "state")},
              is_stacked=True),
        Panel("Failures by code", EACH_SECOND, "docs/errors.md says what each code means.",
              {"{{code}}": rate("idefics_jobs_total", "code", 'state="failed"')}, is_stacked=True),
        Panel("Retries by code", EACH_SECOND, "A retried job waits, then runs again.",
              {"{{code}}": rate("idefics_job_retries_total", "code")}, is_stacked=True),
        Panel("Jobs by task", EACH_SECOND, "In any state.", {"{{task}}": rate("idefics_jobs_total", "task")},
              is_stacked=True),
        Panel("Time from submission to end", SECONDS, "For jobs whose message says when it was sent.",
              quantiles("idefics_e2e_request_latency_seconds", "task")),
        Panel("Time to first token", SECONDS, "From the engine's queue to the first token.",
              quantiles("idefics_time_to_first_token_seconds")),
        Panel("Time by stage", SECONDS, "Mean seconds of a job. What takes longest bounds latency, not throughput.",
              {"{{stage}}": f"{rate('idefics_request_stage_seconds_sum', 'stage')}"
               f" / {rate('idefics_request_stage_seconds_count', 'stage')}"}, is_stacked=True),
        Panel("Jobs in a worker", COUNT, "Taken jobs, and those of them that wait for pictures.",
              {"in flight {{instance}}": f"idefics_num_jobs_in_flight{WORKERS}",
               "loading images {{instance}}": f"idefics_num_jobs_loading_images{WORKERS}",
               "waiting for a host {{instance}}": f"idefics_num_jobs_waiting_for_host{WORKERS}"}),
        Panel("Redeliveries and quarantine", EACH_SECOND, "Jobs whose worker or model process died.",
              {"redelivered": rate("idefics_redeliveries_total", "instance"),
               "quarantined": rate("idefics_quarantined_jobs_total", "instance")}),
        Panel("Canary", EACH_SECOND, "Jobs that ran again alone (IDEFICS_CANARY). In float32 none may diverge.",
              {"{{outcome}}": rate("idefics_canary_runs_total", "outcome")}, is_stacked=True),
        Panel("Abstained", EACH_SECOND, "Jobs whose answer was less sure than their min_confidence.",
              {"{{task}}": rate("idefics_abstained_total", "task")}, is_stacked=True),
    ]),
    "engine": ("Engine", [
        Panel("Rows", COUNT, "Rows in the batch, its limit, and rows that wait for it.",
              {"running {{instance}}": f"idefics_num_requests_running{WORKERS}",
               "waiting {{instance}}": f"idefics_num_requests_waiting{WORKERS}",
               "limit {{instance}}": f"idefics_engine_max_rows{WORKERS}"}),
        Panel("Tokens", EACH_SECOND, "Prompts' and generated tokens.",
              {"prompt": rate("idefics_prompt_tokens_total", "instance"),
               "generated": rate("idefics_generation_tokens_total", "instance")}),
        Panel("The engine's time", SHARE, "By phase. Idle beside a long queue means that pictures come slowly.",
              {"{{phase}}": rate("idefics_engine_seconds_total", "phase")}, is_stacked=True),
        Panel("Rows in a step", COUNT, "A step of a few rows takes nearly as long as a step of a full batch.",
              quantiles("idefics_engine_step_rows")),
        Panel("Steps", EACH_SECOND, "Decode steps.", {"{{instance}}": rate("idefics_engine_steps_total", "instance")}),
        Panel("Preemptions", EACH_SECOND, "Rows computed again, since memory for keys and values was short.",
              {"{{instance}}": rate("idefics_num_preemptions_total", "instance")}),
        Panel("Memory for keys and values", SHARE, "Share in use.",
              {"{{instance}}": f"idefics_gpu_cache_usage_perc{WORKERS}"}),
        Panel("Cache hits", SHARE, "Share of lookups.", {cache: hit_share(cache) for cache in CACHES}),
        Panel("Caches", BYTES, "Bytes held.",
              {cache: f"sum(idefics_{cache}_cache_bytes{WORKERS})" for cache in CACHES_IN_MEMORY}, is_stacked=True),
        Panel("Memory of the device", BYTES, "Only with a GPU.",
              {"{{kind}} {{instance}}": f"idefics_gpu_memory_bytes{WORKERS}"}),
        Panel("Use of the device", SHARE, "Only with a GPU.",
              {"{{instance}}": f"idefics_gpu_utilization_ratio{WORKERS}"}),
        Panel("Model process", BYTES, "Resident memory.",
              {"{{instance}}": f"idefics_model_process_resident_memory_bytes{WORKERS}"}),
        Panel("Restarts of the model process", COUNT, "In the last hour, by cause. No job is lost.",
              {"{{cause}} {{instance}}": f"increase(idefics_model_process_restarts_total{WORKERS}[1h])"}),
    ]),
    "callbacks": ("Callbacks", [
        Panel("Pending", COUNT, "Callbacks that wait for their next attempt.",
              {"pending": 'idefics_callbacks{state="pending"}'}),
        Panel("Age of the oldest pending callback", SECONDS, "Attempts go on for three days.",
              {"age": "idefics_callbacks_oldest_pending_age_seconds"}),
        Panel("Ended", EACH_SECOND, "By state.", {"{{state}}": rate("idefics_callbacks_total", "state")},
              is_stacked=True),
        Panel("Attempts", EACH_SECOND, "By result.", {"{{result}}": rate("idefics_callback_attempts_total", "result")},
              is_stacked=True),
        Panel("Time of an attempt", SECONDS, "The receiver's time to answer.",
              quantiles("idefics_callback_attempt_seconds")),
        Panel("Kept", COUNT, "Delivered and failed callbacks that can be sent again.",
              {"{{state}}": 'idefics_callbacks{state!="pending"}'}),
    ]),
}  # fmt: skip


def drawn(number: int, panel: Panel) -> timeseries.Panel:
    """A panel in Grafana's form."""
    drawing = (
        timeseries.Panel()
        .id(number)
        .title(panel.title)
        .description(panel.about)
        .unit(panel.unit)
        .min(0)
        .datasource(SOURCE)
        .span(WIDTH)
        .height(HEIGHT)
        .fill_opacity(20 if panel.is_stacked else 5)
        .gradient_mode(GraphGradientMode.NONE)
        .legend(
            common.VizLegendOptions()
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(True)
        )
    )
    if panel.is_stacked:
        drawing.stacking(common.StackingConfig().mode("normal"))
    for legend, query in panel.queries.items():
        drawing.with_target(prometheus.Dataquery().expr(query).legend_format(legend).datasource(SOURCE))
    return drawing


def dashboards() -> Iterator[tuple[Path, str]]:
    """Each dashboard's file and its text."""
    for name, (title, panels) in DASHBOARDS.items():
        board = (
            dashboard.Dashboard(f"IDEFICS Jobs: {title}")
            .uid(f"idefics-{name}")
            .tags(["idefics-jobs"])
            .refresh("30s")
            .time("now-3h", "now")
            .tooltip(DashboardCursorSync.CROSSHAIR)
            .with_variable(dashboard.DatasourceVariable("source").label("Data source").type("prometheus"))
            .with_variable(
                dashboard.QueryVariable("worker")
                .label("Worker")
                .query("label_values(idefics_worker_state, instance)")
                .datasource(SOURCE)
                .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
                .sort(VariableSort.ALPHABETICAL_ASC)
                .multi(True)
                .include_all(True)
                .all_value(".*")
            )
        )
        for number, panel in enumerate(panels, start=1):
            board.with_panel(drawn(number, panel))
        yield FOLDER / f"{name}.json", json.dumps(board.build(), cls=JSONEncoder, indent=2) + "\n"


if __name__ == "__main__":
    for path, text in dashboards():
        path.write_text(text)
