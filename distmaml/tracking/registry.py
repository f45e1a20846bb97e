"""MLflow's model registry: a trained model as one that MLflow loads and serves, under a name and an alias."""

import hashlib
import tempfile
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.exceptions import MlflowException

from distmaml.tracking.database import Tracking

ALIAS = "champion"
_CODE = Path(__file__).with_name("served.py")
_NEEDED = ("torch", "numpy", "pyarrow", "safetensors", "Pillow", "fonttools", "tqdm", "filelock", "mlflow")
"""What the package needs to load a model and adapt it."""


def register(
    tracking: Tracking,
    run_id: str,
    model: Path,
    *,
    name: str,
    input_shape: Sequence[int],
    labels: bool,
    num_outputs: int,
) -> str:
    """Makes a model file of a run the newest version of a registered model, and its champion; once for each file.

    Whoever has MLflow adapts it by ``mlflow.pyfunc.load_model("models:/NAME@champion").predict({...})`` or by
    ``mlflow models serve``; the package itself travels with it, and nothing is pickled.

    Args:
      run_id: of the MLflow run that the version is said to come from.
      input_shape: of one input.
      labels: whether targets are labels rather than values.
      num_outputs: values of one target, where they are values.

    Returns:
      The version.

    Raises:
      MlflowException: MLflow cannot be reached, or does not want it.
    """
    client = tracking.client()
    # A folder for each file: a version must stay what it was.
    place = f"served_model-{hashlib.sha256(model.read_bytes()).hexdigest()[:12]}"
    source = f"{client.get_run(run_id).info.artifact_uri}/{place}"
    for known in client.search_model_versions(f"name = '{name}'"):
        if known.source == source:
            return str(known.version)
    # mlflow.pyfunc warns of its own type hints and of those that an array has no use for, past the filters.
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings(record=True):
        warnings.simplefilter("ignore")
        import mlflow.pyfunc

        folder = Path(temporary) / place
        mlflow.pyfunc.save_model(
            str(folder),
            python_model=str(_CODE),
            artifacts={"model": str(model)},
            code_paths=[str(_CODE.parent.parent)],
            signature=_signature(input_shape, labels=labels, num_outputs=num_outputs),
            pip_requirements=[f"{package}=={version(package).partition('+')[0]}" for package in _NEEDED],
        )
        client.log_artifacts(run_id, str(folder), place)
    try:
        client.create_registered_model(name, description="A few-shot learner, meta-trained by distmaml.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    created = client.create_model_version(name, source, run_id)
    client.set_registered_model_alias(name, ALIAS, created.version)
    return str(created.version)


def _signature(input_shape: Sequence[int], *, labels: bool, num_outputs: int) -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    inputs = (-1, *input_shape)
    targets = TensorSpec(np.dtype(np.int64), (-1,), "support_targets")
    if not labels:
        targets = TensorSpec(np.dtype(np.float32), (-1, num_outputs), "support_targets")
    return ModelSignature(
        Schema(
            [
                TensorSpec(np.dtype(np.float32), inputs, "support_inputs"),
                targets,
                TensorSpec(np.dtype(np.float32), inputs, "query_inputs"),
            ]
        ),
        Schema([TensorSpec(np.dtype(np.float32), (-1, num_outputs))]),
        ParamSchema([ParamSpec("num_steps", "long", -1), ParamSpec("transductive", "boolean", False)]),
    )
