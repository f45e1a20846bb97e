"""Where things lie under the output folder.

OUTPUT_DIR/stores/            class stores, with downloads/ beside it
OUTPUT_DIR/mlflow.db          the embedded tracking database, with mlartifacts/ beside it
OUTPUT_DIR/ray/               what Ray must know of the runs that are going on
OUTPUT_DIR/searches/NAME/     one search; its trials are runs, NAME-000 and so on:
  search.json                   what it searches, and how
  journal.jsonl                 what happened to its trials
  champion.json                 the best configuration, a recipe file
  tracking/                     what MLflow is to be told of the search as a whole
  artifacts/                    pictures
OUTPUT_DIR/runs/NAME/         one training run:
  config.json                   its configuration
  store                         which class store it uses
  checkpoints/00000100.safetensors
  metrics/                      committed points
  tracking/                     what MLflow is to be told, and has been told
  progress.json                 how far it is, for whoever watches
  save-now                      there while a checkpoint is wanted out of turn
  model.safetensors             the best meta-parameters so far: the result
  evaluation-test.json, .csv    scores of the model, and of later evaluations under names of their own
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


def stores(output: Path) -> Path:
    """The class stores in an output folder."""
    return output / "stores"


def runs(output: Path) -> Path:
    """The runs in an output folder."""
    return output / "runs"


def searches(output: Path) -> Path:
    """The searches in an output folder."""
    return output / "searches"


def search_file(folder: Path) -> Path:
    """What a search searches, and how."""
    return folder / "search.json"


def champion(folder: Path) -> Path:
    """The best configuration that a search found, as a recipe file."""
    return folder / "champion.json"


def journal(folder: Path) -> Path:
    """What happened to the trials of a search."""
    return folder / "journal.jsonl"


def ray(output: Path) -> Path:
    """Ray's own files in an output folder."""
    return output / "ray"


def run_folder(config: Config) -> Path:
    """The folder of the run that a configuration names.

    Raises:
      RunError: it names none.
    """
    if config.run.name is None:
        raise RunError("the run has no name; give it one: override(config, {'name': ...}) or --name.")
    return runs(output_dir(config.run.output_dir)) / config.run.name


def config_file(run: Path) -> Path:
    """The configuration of a run."""
    return run / "config.json"


def pinned_store(run: Path) -> Path:
    """Which class store a run uses."""
    return run / "store"


def progress(run: Path) -> Path:
    """How far a run is."""
    return run / "progress.json"


def save_request(run: Path) -> Path:
    """The file that asks for a checkpoint at once."""
    return run / "save-now"


def artifacts(run: Path) -> Path:
    """The pictures of a run."""
    return run / "artifacts"


def checkpoints(run: Path) -> Path:
    """The checkpoints of a run."""
    return run / "checkpoints"


def metrics(run: Path) -> Path:
    """The metric segments of a run."""
    return run / "metrics"


def model(run: Path) -> Path:
    """The best model of a run."""
    return run / "model.safetensors"
