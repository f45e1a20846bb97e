"""A saved view of an experiment in MLflow's page, which compares its runs.

MLflow keeps a view as a tag of the experiment; the format is its own affair, and was read out of version 3.17.2. Hence
all of this is best effort: without the view the page opens as MLflow likes it.
"""

import base64
import json
import logging
import time
import zlib
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote, urlencode

from distmaml.tracking.database import Tracking

log = logging.getLogger(__name__)

VIEW_ID = "distmaml"
_LONGEST_TAG = 20_000
_MOST_RUNS = 200


def seed_view(
    tracking: Tracking,
    experiment_id: str,
    *,
    params: Sequence[str],
    best: str,
    test: str,
    curves: Sequence[str],
    lower_is_better: bool = False,
    parent_run_id: str | None = None,
) -> str | None:
    """Writes the view that compares the runs of an experiment, over the one of an earlier call.

    It shows the parameters against the best selection metric (parallel coordinates), that metric and the test's as
    bars, and curves over the outer step; the runs are listed from the best on. The view of a search has its trials
    alone, and the metric over its first two parameters as a contour instead of the test's bars.

    Args:
      parent_run_id: of a search; None for all runs of the experiment.
      params: names of numeric parameters; log10_inner_lr rather than inner_lr, as the axes are linear.
      best: the best of the selection metric, as in best/query_accuracy.
      test: as in test/query_accuracy.
      curves: metrics with a point at many steps. Their part before the slash becomes a section.
      lower_is_better: whether the first run is the one with the least.

    Returns:
      The link of the view, to be put behind a server's address; None where it could not be written.
    """
    state = _state(params, best, test, curves, lower_is_better)
    view_id, title = VIEW_ID, "Compare runs"
    if parent_run_id is not None:
        view_id, title = f"{VIEW_ID}-{parent_run_id[:8]}", f"Search {parent_run_id[:8]}"
        _of_search(state, parent_run_id, params, best, test)
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    now_ms = time.time_ns() // 1_000_000
    tag = {"name": title, "createdAt": now_ms, "updatedAt": now_ms, "state": f"deflate;{packed}"}
    text = json.dumps(tag)
    try:
        if len(text) > _LONGEST_TAG:
            raise ValueError(f"the view takes {len(text)} characters of at most {_LONGEST_TAG}")
        tracking.client().set_experiment_tag(experiment_id, f"mlflow.sharedViewState.{view_id}", text)
    except Exception as error:  # whatever MLflow raises, a picture of runs must not stop one
        log.debug("No view of experiment %s was written: %s", experiment_id, error)
        return None
    query = {"workflowType": "machine_learning", "compareRunsMode": "CHART", "viewStateShareKey": view_id}
    return f"/#/experiments/{experiment_id}/runs?{urlencode(query, quote_via=quote)}"


def _state(params: Sequence[str], best: str, test: str, curves: Sequence[str], lower_is_better: bool) -> dict[str, Any]:
    names = ["Comparison", *sorted({curve.split("/")[0] for curve in curves})]
    sections = {name: f"distmaml-section-{number}" for number, name in enumerate(names)}
    charts = [
        _chart("PARALLEL", "parallel", sections["Comparison"])
        | {"selectedParams": list(params), "selectedMetrics": [best], "showAllRuns": True},
        _chart("BAR", "best", sections["Comparison"]) | {"metricKey": best},
        _chart("BAR", "test", sections["Comparison"]) | {"metricKey": test},
        *(_line(curve, sections[curve.split("/")[0]]) for curve in curves),
    ]
    columns = [f"metrics.`{best}`", f"metrics.`{test}`", *(f"params.`{param}`" for param in params)]
    return {
        "searchFilter": "",
        "orderByKey": f"metrics.`{best}`",
        "orderByAsc": lower_is_better,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": columns,
        "columnOrder": [],
        "columnWidths": {},
        "runsHiddenMode": "SHOWALL",
        "compareRunCharts": charts,
        "compareRunSections": [
            {"uuid": uuid, "name": name, "display": True, "isReordered": True, "deleted": False, "isGenerated": False}
            for name, uuid in sections.items()
        ],
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": True,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": None,
        "groupsExpanded": {},
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }


def _of_search(state: dict[str, Any], parent_run_id: str, params: Sequence[str], best: str, test: str) -> None:
    """Turns the view of all runs into that of a search's trials."""
    state["searchFilter"] = f"tags.`mlflow.parentRunId` = '{parent_run_id}'"
    state["selectedColumns"].remove(f"metrics.`{test}`")
    charts = state["compareRunCharts"]
    section = charts[0]["metricSectionId"]
    tests = next(chart for chart in charts if chart.get("metricKey") == test)
    charts.remove(tests)
    if len(params) < 2:
        return
    axes = {axis: {"key": param, "type": "PARAM"} for axis, param in zip(("xaxis", "yaxis"), params, strict=False)}
    charts.insert(1, _chart("CONTOUR", "contour", section) | axes | {"zaxis": {"key": best, "type": "METRIC"}})


def _chart(kind: str, name: str, section: str) -> dict[str, Any]:
    return {
        "uuid": f"distmaml-{name}",
        "type": kind,
        "runsCountToCompare": _MOST_RUNS,
        "metricSectionId": section,
        "deleted": False,
        "isGenerated": False,
    }


def _line(metric: str, section: str) -> dict[str, Any]:
    return _chart("LINE", metric, section) | {
        "metricKey": metric,
        "lineSmoothness": 0,
        "xAxisScaleType": "linear",
        "scaleType": "linear",
        "range": {},
        "xAxisKey": "step",
        "selectedXAxisMetricKey": "",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "ignoreOutliers": False,
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
    }
