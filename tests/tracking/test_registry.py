"""A model in MLflow's registry: loaded and asked as anybody with MLflow would, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distmaml import adapter, build, checkpoint, loop, paths
from distmaml.config import Config
from distmaml.episodes import Batch
from distmaml.tracking.database import Tracking, experiment_id, open_tracking
from distmaml.tracking.registry import register
from distmaml.worker import LocalWorker
from tests.runs import pictures, tiny_store, waves

PROGRAM = """
import json, sys
import mlflow, numpy as np
mlflow.set_tracking_uri(sys.argv[1])
asked = {name: np.asarray(values, dtype=kind) for name, (values, kind) in json.loads(sys.stdin.read()).items()}
model = mlflow.pyfunc.load_model(sys.argv[2])
print(json.dumps([model.predict(asked).tolist(), model.predict(asked, params={"num_steps": 0}).tolist()]))
"""


@pytest.fixture
def tracking(output_dir: Path) -> Tracking:
    return open_tracking(output_dir)


def registered(tracking: Tracking, config: Config, name: str, **shapes: object) -> tuple[str, Path]:
    """Trains, registers twice, and gives the URI and the model's file."""
    loop.train(config, LocalWorker())
    client = tracking.client()
    run = client.create_run(experiment_id(tracking, client, "e"))
    model = paths.model(paths.run_folder(config))
    versions = [register(tracking, run.info.run_id, model, name=name, **shapes) for _ in range(2)]  # type: ignore[arg-type]
    assert versions == ["1", "1"]
    assert str(client.get_model_version_by_alias(name, "champion").version) == "1"
    return f"models:/{name}@champion", model


def ask(tracking: Tracking, uri: str, asked: dict[str, tuple[object, str]], folder: Path) -> list[np.ndarray]:
    """What the model answers after its own number of steps, and after none; with pickle forbidden."""
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, tracking.uri, uri], input=json.dumps(asked), capture_output=True, text=True,
        cwd=folder, env={"PATH": "/usr/bin:/bin", "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
                         "MLFLOW_DISABLE_TELEMETRY": "true", "HOME": str(folder)},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return [np.asarray(values) for values in json.loads(found.stdout)]


@pytest.mark.slow
def test_another_model_is_another_version_and_the_first_stays_what_it_was(tracking: Tracking, output_dir: Path) -> None:
    config = waves(output_dir, "waves", num_outer_steps=5)
    _, file = registered(tracking, config, "waves", input_shape=(1,), labels=False, num_outputs=1)
    other = output_dir / "other.safetensors"
    tensors, document = checkpoint.load(file)
    checkpoint.save(other, {name: 2 * tensor for name, tensor in tensors.items()}, document)
    client = tracking.client()
    run_id = client.get_model_version("waves", "1").run_id
    shapes: dict[str, Any] = {"name": "waves", "input_shape": (1,), "labels": False, "num_outputs": 1}
    assert [register(tracking, run_id, model, **shapes) for model in (other, file)] == ["2", "1"]
    assert str(client.get_model_version_by_alias("waves", "champion").version) == "2"
    asked: dict[str, tuple[object, str]] = {
        "support_inputs": ([[0.0], [1.0]], "float32"),
        "support_targets": ([[0.0], [1.0]], "float32"),
        "query_inputs": ([[0.5]], "float32"),
    }
    first, _ = ask(tracking, "models:/waves/1", asked, output_dir)
    support = Batch(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [1.0]]))
    expected = adapter.load(file).adapt(support).predict(torch.tensor([[0.5]]))
    np.testing.assert_allclose(first, expected.numpy(), atol=1e-6)


@pytest.mark.slow
def test_a_classifier_adapts_and_predicts_as_it_does_without_mlflow(tracking: Tracking, output_dir: Path) -> None:
    tiny_store(output_dir / "tiny.arrow")
    config = pictures(output_dir, "tiny", num_outer_steps=2, val_every=2, checkpoint_every=2)
    uri, file = registered(tracking, config, "tiny", input_shape=(1, 8, 8), labels=True, num_outputs=3)
    task = build.task_distributions(config)["test"].sample([0])
    support, query = Batch(*(leaf[0] for leaf in task.support)), Batch(*(leaf[0] for leaf in task.query))
    asked = {
        "support_inputs": (support.inputs.tolist(), "float32"),
        "support_targets": (support.targets.tolist(), "int64"),
        "query_inputs": (query.inputs.tolist(), "float32"),
    }
    adapted, before = ask(tracking, uri, asked, output_dir)
    model = adapter.load(file)
    np.testing.assert_allclose(adapted, model.adapt(support).predict(query.inputs).numpy(), atol=1e-5)
    np.testing.assert_allclose(before, model.adapt(support, 0).predict(query.inputs).numpy(), atol=1e-5)
    assert not np.allclose(adapted, before)


@pytest.mark.slow
def test_a_regression_predicts_values(tracking: Tracking, output_dir: Path) -> None:
    config = waves(output_dir, "waves", num_outer_steps=5)
    uri, file = registered(tracking, config, "waves", input_shape=(1,), labels=False, num_outputs=1)
    x, y = np.linspace(-5, 5, 6)[:, None], np.linspace(1, 2, 6)[:, None]
    asked = {"support_inputs": (x.tolist(), "float32"), "support_targets": (y.tolist(), "float32"),
             "query_inputs": (x.tolist(), "float32")}  # fmt: skip
    adapted, _ = ask(tracking, uri, asked, output_dir)
    expected = adapter.load(file).adapt(Batch(np.float32(x), np.float32(y))).predict(np.float32(x))
    np.testing.assert_allclose(adapted, expected.numpy(), atol=1e-5)
