"""Scores a run's model, or one of its checkpoints, on fresh workers."""

import sys
from pathlib import Path
from typing import Literal

import tyro

from distmaml import cli, config, driver, preflight, report
from distmaml.errors import ConfigError


def main(
    run: str,
    num_episodes: int | None = None,
    split: Literal["val", "test"] = "test",
    step: int | None = None,
    num_eval_steps: int | None = None,
    num_workers: int | None = None,
    data_dir: Path | None = None,
    output_dir: Path | None = None,
    storage: str | None = None,
    address: str | None = None,
    use_gpu: Literal["auto", "yes", "no"] = "auto",
    tracking_uri: str | None = None,
) -> None:
    """Score a run's model on N episodes: mean and 95 % interval after each inner step, in both batch-norm modes.

    Args:
      run: name of the run.
      num_episodes: episodes; as many as the run's own evaluation by default.
      split: which classes.
      step: score the checkpoint after this outer step rather than the best model.
      num_eval_steps: inner steps; those of the run by default.
      num_workers: Ray workers; those of the run by default.
      data_dir: folder with the raw files; that of the run by default.
      output_dir: where the run lies. Default: $DISTMAML_HOME, else ~/distmaml.
      storage: where the run lies in addition, as training was told (s3://bucket/prefix).
      address: of a running Ray cluster. Default: $RAY_ADDRESS, else one started on this machine.
      use_gpu: use GPUs if the cluster has any, or always, or never.
      tracking_uri: MLflow server; the one that has the run by default.
    """
    if num_episodes is not None and num_episodes < 2:
        raise ConfigError(f"--num-episodes {num_episodes} gives no interval; take 2 or more.")
    wanted = {
        "num_val_episodes" if split == "val" else "num_test_episodes": num_episodes,
        "num_eval_steps": num_eval_steps,
        "num_workers": num_workers,
        "data_dir": data_dir,
        "storage": storage,
    }
    here = {"name": run, "output_dir": output_dir, "address": address, "use_gpu": use_gpu, "tracking_uri": tracking_uri}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    settings = config.override(preflight.settings_of(run, output_dir, storage), {**wanted, **here})
    found, files = driver.evaluate(settings, split=split, step=step)
    episodes, data = settings.evaluation.num_episodes(split), report.data_of(settings, split)
    print(f"{run} after {found.step} outer steps, {episodes} episodes of {data}:")
    print(report.table(found.scores))
    print(*files, sep="\n")


if __name__ == "__main__":
    sys.exit(cli.guarded(lambda: tyro.cli(main)))
