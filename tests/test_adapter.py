"""The result of a run, used as a user does: load, adapt, predict."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distmaml import adapter, build, checkpoint, loop, paths
from distmaml.adapter import FewShotModel
from distmaml.config import Config, override, to_json
from distmaml.episodes import Batch
from distmaml.errors import CheckpointError, ConfigError, DataError
from distmaml.inner import hvp_mode
from distmaml.worker import LocalWorker
from tests.runs import pictures, tiny_store, waves


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("adapter")
    tiny_store(folder / "tiny.arrow")
    config = pictures(folder, "tiny", num_outer_steps=2, val_every=2, checkpoint_every=2)
    loop.train(config, LocalWorker())
    return config


@pytest.fixture
def file(run: Config) -> Path:
    return paths.model(paths.run_folder(run))


@pytest.fixture
def model(file: Path) -> FewShotModel:
    return adapter.load(file)


@pytest.fixture(scope="module")
def task(run: Config) -> tuple[Batch, Batch]:
    found = build.task_distributions(run)["test"].sample([3])
    return Batch(*(leaf[0] for leaf in found.support)), Batch(*(leaf[0] for leaf in found.query))


def by_hand(run: Config, task: tuple[Batch, Batch], steps: int) -> tuple[Tensor, Tensor]:
    """Probabilities of all queries at once, and of each with the support alone."""
    tensors, _ = checkpoint.load(checkpoint.path_of(paths.checkpoints(paths.run_folder(run)), 2))
    theta = {name.removeprefix("meta_params/"): t for name, t in tensors.items() if name.startswith("meta_params/")}
    algorithm = build.learner(run, build.Shapes((1, 8, 8), 3), torch.device("cpu")).algorithm
    support, query = task
    with torch.no_grad(), hvp_mode("graph"):  # as training adapts to one task after the other
        state = algorithm.adapt(theta, support, num_steps=steps)[-1]
    together = algorithm.predict(theta, state, query.inputs).softmax(-1)
    alone = [
        algorithm.predict(theta, state, torch.cat([support.inputs, x[None]]))[-1].softmax(-1) for x in query.inputs
    ]
    return together, torch.stack(alone)


def test_predictions_equal_those_of_the_algorithm_on_the_trained_parameters(
    model: FewShotModel, run: Any, task: Any
) -> None:
    together, alone = by_hand(run, task, steps=2)
    adapted = model.adapt(task[0])
    torch.testing.assert_close(adapted.predict(task[1].inputs), alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(adapted.predict(task[1].inputs, transductive=True), together, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(alone, together, rtol=1e-5, atol=1e-6)  # batch norm sees the others
    torch.testing.assert_close(adapted.predict(task[1].inputs).sum(-1), torch.ones(len(alone)))


def test_the_number_of_steps_can_be_chosen(model: FewShotModel, run: Any, task: Any) -> None:
    for steps in (0, 5):
        _, alone = by_hand(run, task, steps)
        torch.testing.assert_close(model.adapt(task[0], steps).predict(task[1].inputs), alone, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="num_steps=-1"):
        model.adapt(task[0], -1)


def test_a_folder_and_numpy_arrays_will_do(run: Any, task: Any, model: FewShotModel) -> None:
    loaded = adapter.load(paths.run_folder(run))
    support = Batch(task[0].inputs.numpy(), task[0].targets.numpy())
    expected = model.adapt(task[0]).predict(task[1].inputs)
    assert torch.equal(loaded.adapt(support).predict(task[1].inputs.numpy()), expected)


def test_adapting_twice_leaves_the_model_as_it_was(model: FewShotModel, task: Any) -> None:
    first = model.adapt(task[0]).predict(task[1].inputs)
    model.adapt(Batch(task[0].inputs.flip(0), task[0].targets)).predict(task[1].inputs)
    assert torch.equal(model.adapt(task[0]).predict(task[1].inputs), first)


def test_a_class_that_was_not_shown_has_no_probability(model: FewShotModel, task: Any) -> None:
    support, query = task
    shown = support.targets != 1
    found = model.adapt(Batch(support.inputs[shown], support.targets[shown])).predict(query.inputs)
    assert found.shape == (len(query.inputs), 3)
    assert not found[:, 1].any()
    torch.testing.assert_close(found.sum(-1), torch.ones(len(found)))


def test_no_query_has_no_answer(model: FewShotModel, task: Any) -> None:
    assert model.adapt(task[0]).predict(task[1].inputs[:0]).shape == (0, 3)


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 1, 8, 9), (3, 3, 8, 8), (3, 64)])
def test_inputs_of_another_shape_are_refused(model: FewShotModel, task: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"this model takes \[num_samples, 1, 8, 8\]"):
        model.adapt(Batch(torch.zeros(shape), torch.arange(3)))
    with pytest.raises(DataError, match="this model takes"):
        model.adapt(task[0]).predict(torch.zeros(shape))


@pytest.mark.parametrize("labels", [[0, 1, 3], [-1, 0, 1], [0.0, 1.0, 2.0]])
def test_labels_that_are_not_those_of_its_ways_are_refused(model: FewShotModel, labels: list[Any]) -> None:
    with pytest.raises(DataError, match=r"labels .* must be whole numbers in \[0, 3\)"):
        model.adapt(Batch(torch.zeros(3, 1, 8, 8), torch.tensor(labels)))


@pytest.mark.parametrize(("inputs", "targets"), [(3, 2), (0, 0), (1, 0)])
def test_as_many_targets_as_inputs_are_asked_for(model: FewShotModel, inputs: int, targets: int) -> None:
    with pytest.raises(DataError, match=rf"{inputs} support inputs and targets of shape \[{targets}\]"):
        model.adapt(Batch(torch.zeros(inputs, 1, 8, 8), torch.zeros(targets, dtype=torch.int64)))


def test_whole_numbers_are_no_images(model: FewShotModel) -> None:
    with pytest.raises(DataError, match="divide by 255"):
        model.adapt(Batch(np.zeros((3, 1, 8, 8), np.uint8), torch.arange(3)))


def test_a_regression_predicts_values_and_takes_whole_numbers_as_targets(tmp_path: Path) -> None:
    config = waves(tmp_path, "waves", num_outer_steps=1, val_every=0, precision="float64")
    loop.train(config, LocalWorker())
    model = adapter.load(paths.model(paths.run_folder(config)))
    x = torch.linspace(-5, 5, 7).unsqueeze(-1)
    targets = torch.tensor([[3], [2], [1], [0], [-1], [-2], [-3]])
    found = model.adapt(Batch(x, targets)).predict(x)
    assert found.dtype == torch.float64
    assert torch.equal(found, model.adapt(Batch(x.double(), targets.double())).predict(x.double()))
    with pytest.raises(ConfigError, match="was trained on 'sinusoid', not on images"):
        model.read_pictures([])


# ------------------------------------------------------------------------------------------ what is no model


def test_a_damaged_file_is_refused(file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "model.safetensors"
    broken.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="damaged"):
        adapter.load(broken)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no file"):
        adapter.load(tmp_path)


def test_a_checkpoint_is_no_model(run: Config) -> None:
    with pytest.raises(CheckpointError, match="is a checkpoint but not a model"):
        adapter.load(checkpoint.path_of(paths.checkpoints(paths.run_folder(run)), 2))


def rewritten(file: Path, target: Path, tensors: dict[str, Tensor] | None = None, **options: Any) -> Path:
    """The model file with other tensors, or with other options in its configuration."""
    old, document = checkpoint.load(file)
    checkpoint.save(
        target, old if tensors is None else tensors, {**document, "config": {**document["config"], **options}}
    )
    return target


@pytest.mark.parametrize("kind", ["algorithm", "model", "objective"])
def test_a_file_may_not_say_which_code_to_run(file: Path, run: Config, tmp_path: Path, kind: str) -> None:
    tensors, document = checkpoint.load(file)
    target = tmp_path / "foreign.safetensors"
    foreign = override(run, {kind: "os:getcwd"})
    checkpoint.save(target, tensors, {**document, "config": to_json(foreign)})
    with pytest.raises(ConfigError, match=rf"A file may not say which code to run.*load\(path, {kind}=\.\.\.\)"):
        adapter.load(target)


def test_tensors_that_do_not_fit_the_configuration_are_named(file: Path, tmp_path: Path) -> None:
    tensors, _ = checkpoint.load(file)
    fewer = {name: t for name, t in tensors.items() if name != "head.bias"}
    wrong = {**tensors, "head.bias": torch.zeros(7)}
    more = {**tensors, "head.extra": torch.zeros(1)}
    for broken, name in ((fewer, "head.bias"), (wrong, "head.bias"), (more, "head.extra")):
        with pytest.raises(CheckpointError, match=rf"does not fit its own configuration: .*its parameter '{name}'"):
            adapter.load(rewritten(file, tmp_path / "x.safetensors", broken))


def test_an_option_that_does_not_exist_is_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="unknown option 'num_wayz'"):
        adapter.load(rewritten(file, tmp_path / "x.safetensors", num_wayz=3))


@pytest.mark.parametrize(
    "changes",
    [
        {"shapes": {"input_shape": [1, 8, 8], "num_outputs": "x"}},
        {"shapes": {"input_shape": [1, 8, 8], "num_outputs": -1}},
        {"shapes": {"input_shape": [1], "num_outputs": 3}},
        {"shapes": None},
        {"config": [1, 2]},
        {"config": {"num_filters": -4}},
        {"config": {"objective": "clasification"}},
        {"config": {"model": "mlp"}, "shapes": {"input_shape": [64], "num_outputs": 3}},
        {"dataset": 3},
    ],
    ids=str,
)
def test_a_header_that_describes_no_model_is_refused(file: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    tensors, document = checkpoint.load(file)
    checkpoint.save(tmp_path / "x.safetensors", tensors, {**document, **changes})
    with pytest.raises(
        CheckpointError, match=r"x\.safetensors (is no model|does not fit|is damaged or of another kind)"
    ):
        adapter.load(tmp_path / "x.safetensors")


_WITHIN = """
import resource, sys
import distmaml, torch
from distmaml.errors import CheckpointError
distmaml.load(sys.argv[1])
in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + 2**28, in_use + 2**28))
try:
    distmaml.load(sys.argv[2])
except CheckpointError as error:
    print(error)
"""


@pytest.mark.parametrize("num_filters", [20_000, 2**40])
def test_a_model_larger_than_its_file_is_refused_before_memory_is_taken(
    file: Path, tmp_path: Path, num_filters: int
) -> None:
    large = rewritten(file, tmp_path / "x.safetensors", num_filters=num_filters)
    command = [sys.executable, "-c", _WITHIN, str(file), str(large)]
    environment = {**os.environ, "PYTHONPATH": str(Path(adapter.__file__).parents[1])}
    found = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert "does not fit its own configuration" in found.stdout, found.stderr
    assert "memory" not in found.stdout


def test_a_fresh_process_needs_neither_ray_nor_mlflow_nor_the_data(file: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere.safetensors"
    moved.write_bytes(file.read_bytes())
    code = (
        "import sys, torch, distmaml\n"
        "model = distmaml.load(sys.argv[1])\n"
        "adapted = model.adapt(distmaml.Batch(torch.rand(3, 1, 8, 8), torch.arange(3)))\n"
        "print(tuple(adapted.predict(torch.rand(2, 1, 8, 8)).shape))\n"
        "print([name for name in ('ray', 'mlflow', 'matplotlib', 'plotly') if name in sys.modules])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(adapter.__file__).parents[1])}
    found = subprocess.run(
        [sys.executable, "-c", code, str(moved)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert found.stdout.splitlines() == ["(2, 3)", "[]"], found.stderr
