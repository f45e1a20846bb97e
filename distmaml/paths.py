"""Where things lie under the output folder.

OUTPUT_DIR/stores/            class stores
OUTPUT_DIR/mlflow.db          the embedded tracking database, with mlartifacts/ beside it
OUTPUT_DIR/runs/NAME/         one training run:
  config.json                   its configuration
  checkpoints/00000100.safetensors
  metrics/                      committed points
  progress.json                 how far it is, for whoever watches
  model.safetensors             the best meta-parameters so far: the result
  evaluation-test.json, .csv    scores of the model
  artifacts/                    pictures
"""

import os
from pathlib import Path

from distmaml.config import Config
from distmaml.errors import RunError
from distmaml.files import absolute


def output_dir(explicit: Path | None) -> Path:
    """The absolute output folder: the one named, else $DISTMAML_HOME, else ~/distmaml."""
    return absolute(explicit or Path(os.environ.get("DISTMAML_HOME") or Path.home() / "distmaml"))


def run_folder(config: Config) -> Path:
    """The folder of the run that a configuration names."""
    if config.run.name is None:
        raise RunError("the run has no name yet.")
    return output_dir(config.run.output_dir) / "runs" / config.run.name


def stores(config: Config) -> Path:
    """The folder of the class stores."""
    return output_dir(config.run.output_dir) / "stores"


def checkpoints(run: Path) -> Path:
    """The checkpoints of a run."""
    return run / "checkpoints"


def metrics(run: Path) -> Path:
    """The metric segments of a run."""
    return run / "metrics"


def model(run: Path) -> Path:
    """The best model of a run."""
    return run / "model.safetensors"
