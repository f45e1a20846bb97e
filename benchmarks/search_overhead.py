"""What a search costs beside the training of its trials: its wall time over their training time by its concurrency.

    python -m benchmarks.search_overhead NAME --output-dir DIR

Read off the search's own record in MLflow. The training time of a trial is that of its outer steps and validations;
what comes after a validation, its checkpoint and the report to a driver that may be busy, counts as the search's. The
wall time is that from the start of the first trial's process to the end of the last trial; beside it stands that from
the start of the search, with Ray's own. Search with ``--log-every 1``, so that there is a point for each step.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Annotated

import tyro
from mlflow import MlflowClient

from distmaml import paths


def main(
    name: Annotated[str, tyro.conf.Positional],
    concurrency: int = 2,
    output_dir: Path | None = None,
    result: Annotated[Path | None, tyro.conf.arg(help="JSON file for the result")] = None,
) -> None:
    """Measure and print."""
    client = MlflowClient(f"sqlite:///{paths.output_dir(output_dir)}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    trials = client.search_runs(experiments, f"tags.`distmaml.search` = '{name}'", max_results=1000)
    training, num_steps = [], 0
    for trial in trials:
        history = client.get_metric_history(trial.info.run_id, "train/query_loss")
        times = {point.step: point.timestamp / 1000 for point in history}
        validated = {point.step for point in client.get_metric_history(trial.info.run_id, "val/query_loss")}
        gaps = {step: times[step] - times[step - 1] for step in times if step - 1 in times}
        usual = statistics.median(gap for step, gap in gaps.items() if not {step, step - 1} & validated)
        training.append(usual + sum(usual if step - 1 in validated else gap for step, gap in gaps.items()))
        num_steps += max(times)
    (search,) = client.search_runs(experiments, f"attributes.run_name = '{name}' and tags.`distmaml.kind` = 'search'")
    end = max(trial.info.end_time for trial in trials)
    wall = (end - min(trial.info.start_time for trial in trials)) / 1000
    with_ray = (end - search.info.start_time) / 1000
    ideal = sum(training) / concurrency
    sys.stdout.write(
        f"{name}: {len(trials)} trials, {num_steps} outer steps, {sum(training):.0f} s of training, the shortest trial "
        f"{min(training):.0f} s; {wall:.0f} s by the clock are {wall / ideal:.3f} times {ideal:.0f} s, and with Ray's "
        f"start {with_ray / ideal:.3f} times\n"
    )
    if result:
        record = {"search": name, "num_trials": len(trials), "num_outer_steps": num_steps, "concurrency": concurrency,
                  "training_seconds": training, "wall_seconds": wall, "ratio": wall / ideal,
                  "ratio_with_ray": with_ray / ideal}  # fmt: skip
        result.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
