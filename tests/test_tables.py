"""What every entry of a table keeps to. A new algorithm, model, task source or data set joins by being in its table."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distmaml import build
from distmaml.algorithms import ALGORITHMS
from distmaml.config import OPTIONS, Config, flatten, override
from distmaml.datasets import DATASETS, ensure_store
from distmaml.engine import ENGINES
from distmaml.models import MODELS
from distmaml.objectives import classification, initial_params
from distmaml.outer import chunk_sum, meta_gradient
from distmaml.splits import SAMPLES, SPLITS
from distmaml.store import open_store
from distmaml.tasks import TASKS
from distmaml.trees import tree_add, tree_index, tree_leaves, tree_map, tree_names
from tests import oracles
from tests.datasets.test_image_folder import folders
from tests.datasets.test_omniglot import BACKGROUND, EVALUATION, members, write_zip
from tests.modules import make
from tests.runs import tiny_store


def test_the_configuration_has_options_for_every_entry_and_for_no_other() -> None:
    tables = {"algorithm": ALGORITHMS, "model": MODELS, "tasks": TASKS}
    assert {selector: set(named) for selector, (named, _) in OPTIONS.items()} == {k: set(t) for k, t in tables.items()}


# ------------------------------------------------------------------------------------------ algorithms


def algorithm_of(name: str, case: str = "mlp") -> tuple[Any, Any, Any]:
    """The algorithm with the options of its dataclass, its meta-parameters, and tasks, all in float64."""
    module, tasks, _ = make(case, num_tasks=4)
    values = {"algorithm": name, "inner_lr": 0.1, "num_inner_steps": 2, "precision": "float64"}
    config = override(Config(), values)
    learned = build.learner(config, build.Shapes((), 4), torch.device("cpu"), module=module.model)
    return learned.algorithm, learned.meta_params, tasks


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_adapts_by_any_number_of_steps_and_leaves_its_arguments_alone(name: str) -> None:
    algorithm, meta_params, tasks = algorithm_of(name)
    task = tree_index(tasks, 0)
    before = [leaf.clone() for leaf in tree_leaves(meta_params)]
    longest = algorithm.adapt(meta_params, task.support, num_steps=5)
    for num_steps in (0, 1, 2):
        states = algorithm.adapt(meta_params, task.support, num_steps=num_steps)
        assert len(states) in (num_steps + 1, 1)  # an algorithm without inner steps has one state
        for state, other in zip(states, longest, strict=False):
            assert all(torch.equal(a, b) for a, b in zip(tree_leaves(state), tree_leaves(other), strict=True))
    assert len(algorithm.adapt(meta_params, task.support)) in (3, 1)  # as many steps as in training
    assert all(torch.equal(leaf, old) for leaf, old in zip(tree_leaves(meta_params), before, strict=True))
    assert algorithm.predict(meta_params, longest[-1], task.query.inputs).shape == (12, 4)


@pytest.mark.parametrize("case", ["mlp", "conv4", "lstm"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_meta_gradient_is_shaped_like_the_meta_parameters_and_descends(name: str, case: str) -> None:
    algorithm, meta_params, tasks = algorithm_of(name, case)
    grads, metrics = meta_gradient(algorithm, meta_params, tasks, 0)
    assert tree_names(grads) == tree_names(meta_params)
    assert [g.shape for g in tree_leaves(grads)] == [p.shape for p in tree_leaves(meta_params)]
    assert all(g.isfinite().all() and not g.requires_grad for g in tree_leaves(grads))
    assert all(metric.dim() == 0 for metric in metrics.values())
    moved = tree_map(lambda p, g: p - 1e-3 * g, meta_params, grads)
    assert meta_gradient(algorithm, moved, tasks, 0)[1]["query_loss"] < metrics["query_loss"]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_sees_one_task_at_a_time(name: str) -> None:
    """The sum over a chunk is the sum of its tasks, on all engines."""
    algorithm, meta_params, tasks = algorithm_of(name)
    whole = chunk_sum(algorithm, meta_params, tasks, 0, vectorize=ENGINES[0].vectorize)
    one = [chunk_sum(algorithm, meta_params, tree_index(tasks, slice(i, i + 1)), 0, vectorize=False) for i in range(4)]
    total = tree_add(tree_add(one[0], one[1]), tree_add(one[2], one[3]))
    for found, expected in zip(tree_leaves(whole), tree_leaves(total), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_a_module_of_its_options_that_meta_trains_exactly(name: str) -> None:
    config = override(Config(), {"model": name})
    torch.manual_seed(0)
    model = build.resolve("model", name, MODELS)((1, 8, 8), 3, **vars(config.model_options)).double()
    inputs = torch.rand(2, 6, 1, 8, 8, dtype=torch.float64)
    assert model(inputs[0]).shape == (6, 3)
    _, tasks, loss = make("mlp", num_tasks=2)
    labels = torch.tensor([0, 1, 2, 0, 1, 2]).expand(2, -1)
    tasks = tasks._replace(support=type(tasks.support)(inputs, labels), query=type(tasks.query)(1 - inputs, labels))
    config = override(config, {"inner_lr": 0.1, "num_inner_steps": 2, "precision": "float64"})
    learned = build.learner(config, build.Shapes((1, 8, 8), 3), torch.device("cpu"), module=model)
    found, _ = meta_gradient(learned.algorithm, learned.meta_params, tasks, 0)
    expected = oracles.unrolled(model, initial_params(model), tasks, loss, inner_lr=0.1, num_steps=2)
    assert oracles.relative_error(found, expected) < 1e-10
    assert initial_params(model).keys() >= {f"{classification(model).head}.weight"}


# ----------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize("name", TASKS)
def test_tasks_are_a_pure_function_of_seed_split_and_index(name: str, tmp_path: Path) -> None:
    tiny_store(tmp_path / "tiny.arrow")
    base = override(Config(), {"tasks": name})
    values = {"num_ways": 3, "num_shots": 2, "num_queries": 2, "num_eval_queries": 2}
    values = {key: value for key, value in values.items() if key in flatten(base)}
    store = {"dataset": str(tmp_path / "tiny.arrow")} if "dataset" in flatten(base) else {}
    config = override(base, {**values, **store})
    splits, again = build.task_distributions(config), build.task_distributions(config)
    for split in SPLITS:
        batch, other = splits[split].sample([4, 0, 7]), again[split].sample([7, 4])
        for place, counterpart in ((0, 1), (2, 0)):
            left, right = tree_index(batch, place), tree_index(other, counterpart)
            assert all(torch.equal(a, b) for a, b in zip(tree_leaves(left), tree_leaves(right), strict=True))
        assert batch.key is None or (batch.key.dtype == torch.int64 and len({*batch.key.tolist()}) == 3)
        assert {len(leaf) for leaf in tree_leaves(batch)} == {3}
    elsewhere = build.task_distributions(override(config, {"seed": 1}))
    firsts = [tree_leaves(source.sample([0]))[0] for source in (*splits.values(), elsewhere["train"])]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(firsts, 2) if a.shape == b.shape)


# ------------------------------------------------------------------------------------------- data sets


def _no_files(folder: Path) -> None:
    return None


def _omniglot(folder: Path) -> Path:
    write_zip(folder / "images_background.zip", members("images_background", BACKGROUND))
    write_zip(folder / "images_evaluation.zip", members("images_evaluation", EVALUATION))
    return folder


def _image_folder(folder: Path) -> Path:
    return folders(folder, [f"class {number}" for number in range(12)])


RAW: dict[str, Callable[[Path], Path | None]] = {
    "glyphs": _no_files,
    "omniglot": _omniglot,
    "image_folder": _image_folder,
}
"""Makes the raw files of a data set; a new one says here what it reads."""


@pytest.mark.parametrize("name", DATASETS)
def test_a_data_set_becomes_a_whole_store_with_disjoint_splits(name: str, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    path = ensure_store(
        name, data_dir=RAW[name](tmp_path / "raw"), image_size=12, color=False, stores_dir=tmp_path / "out" / "stores"
    )
    store = open_store(path)
    store.verify()
    assert store.info.name == name
    assert store.info.image_shape == (1, 12, 12)
    assert store.info.source
    assert store.info.licence
    assert store.info.splits
    for scheme in (*store.info.splits, SAMPLES):
        rows = [{int(row) for entry in store.classes(scheme, split) for row in entry.rows} for split in SPLITS]
        assert all(rows)
        assert not any(a & b for a, b in itertools.combinations(rows, 2))
        assert len(store.split_hash(scheme)) == 64
    assert {file.suffix for file in path.parent.iterdir()} <= {".arrow", ".lock"}
