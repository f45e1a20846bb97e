"""What a search costs beside the training of its trials: its wall time over their training time by its concurrency.

    python -m benchmarks.search_overhead NAME --output-dir DIR

Read off the search's own record in MLflow. The wall time is that from the start of the first trial to the end of the
last, so Ray's own start is not in it. The training time of a trial is that from its first outer step to its last
validation, validations included; for the first step, which nobody timed, stands the mean of the others. Search with
``--log-every 1``, so that there is a point for each step.
"""

import json
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
        times: dict[int, int] = {}
        for key in ("train/query_loss", "val/query_loss"):
            for point in client.get_metric_history(trial.info.run_id, key):
                times[point.step] = max(times.get(point.step, 0), point.timestamp)
        if times:
            first, last = min(times), max(times)
            seconds = (times[last] - times[first]) / 1000
            training.append(seconds + seconds / max(last - first, 1))
            num_steps += last
    wall = (max(t.info.end_time for t in trials) - min(t.info.start_time for t in trials)) / 1000
    ideal = sum(training) / concurrency
    sys.stdout.write(
        f"{name}: {len(trials)} trials, {num_steps} outer steps, {sum(training):.0f} s of training, the shortest trial "
        f"{min(training):.0f} s; {wall:.0f} s by the clock, {wall / ideal:.3f} times {ideal:.0f} s\n"
    )
    if result:
        record = {"search": name, "num_trials": len(trials), "num_outer_steps": num_steps, "concurrency": concurrency,
                  "training_seconds": training, "wall_seconds": wall, "ratio": wall / ideal}  # fmt: skip
        result.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
