"""What every entry of a table keeps to. A new algorithm, model, task source or data set joins by being in its table."""

import itertools
import re
from collections.abc import Callable
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from distmaml import build, checkpoint, collectives
from distmaml.algorithms import ALGORITHMS, Algorithm, Stateful, learned_part
from distmaml.collectives import mean_over_tasks
from distmaml.config import Config, Outer, flatten, override
from distmaml.datasets import DATASETS, ensure_store
from distmaml.engine import ENGINES
from distmaml.episodes import Episode, shard
from distmaml.models import MODELS
from distmaml.objectives import Objective, classification, initial_params
from distmaml.options import OPTIONS
from distmaml.outer import (
    OuterState,
    chunk_sum,
    init_outer,
    load_meta_params,
    load_named_state,
    meta_gradient,
    named_state,
    outer_step,
)
from distmaml.scoring import score
from distmaml.splits import SAMPLES, SPLITS
from distmaml.store import open_store
from distmaml.tasks import TASKS
from distmaml.trees import named_leaves, tree_add, tree_index, tree_leaves, tree_map, tree_names, tree_to
from tests import oracles
from tests.datasets.test_image_folder import folders
from tests.datasets.test_omniglot import BACKGROUND, EVALUATION, members, write_zip
from tests.modules import make
from tests.runs import tiny_store


def test_the_configuration_has_options_for_every_entry_and_for_no_other() -> None:
    tables = {"algorithm": ALGORITHMS, "model": MODELS, "tasks": TASKS}
    assert {selector: set(named) for selector, (named, _) in OPTIONS.items()} == {k: set(t) for k, t in tables.items()}


# ------------------------------------------------------------------------------------------ algorithms


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ALGORITHMS},
    "reptile with adam": ("reptile", {"inner_optimizer": "adam", "inner_lr": 0.01}),
    "maml_plus_plus with statistics": ("maml_plus_plus", {"per_step_statistics": True}),
    "imaml by newton steps": ("imaml", {"solver": "hessian_free"}),
    "cavia by scale and shift": ("cavia", {"modulation": "scale_shift"}),
}
"""Every algorithm, and with options those that take another way: the name in the table, and the options."""
STATEFUL = ("reptile with adam", "maml_plus_plus with statistics")
"""Those that gather something beside what they learn."""
NO_SLOPE = {"fomaml", "reptile", "imaml", "meta_lstm", "fine_tuning"}
"""Those whose papers follow something else than the slope of the query loss; what it is, test_algorithms.py knows."""
assert ALGORITHMS.keys() >= NO_SLOPE
NUM_CLASSES = 10


class Case(NamedTuple):
    """An algorithm with the options of its dataclass, its meta-parameters, and tasks, all in float64."""

    algorithm: Algorithm
    objective: Objective
    meta_params: Any
    tasks: Episode


def case_of(
    variant: str, model: str = "mlp", *, num_tasks: int = 4, inner_lr: float = 0.1, precision: str = "float64"
) -> Case:
    name, changes = VARIANTS[variant]
    if "per_step_statistics" in changes and model == "mlp":
        model = "batch norm"
    module, tasks, _ = make(model, num_tasks=num_tasks)
    tasks = tasks._replace(classes=torch.stack([torch.randperm(NUM_CLASSES)[:4] for _ in range(num_tasks)]))
    normed = any(isinstance(layer, nn.BatchNorm2d) for layer in module.model.modules())
    config = override(Config(), {"algorithm": name, "precision": precision})
    wanted = {"inner_lr": inner_lr, "num_inner_steps": 2, "per_step_biases": normed, **changes}
    config = override(config, {option: value for option, value in wanted.items() if option in flatten(config)})
    learned = build.learner(config, build.Shapes((), 4, NUM_CLASSES), torch.device("cpu"), module=module.model)
    return Case(learned.algorithm, learned.objective, learned.meta_params, tasks)


def same(one: Any, other: Any) -> bool:
    """Alike to the last bit."""
    return all(torch.equal(a, b) for a, b in zip(tree_leaves(one), tree_leaves(other), strict=True))


def check_close(found: Any, expected: Any) -> None:
    for one, other in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("model", ["mlp", "conv4"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_algorithm_adapts_by_any_number_of_steps_and_leaves_its_arguments_alone(variant: str, model: str) -> None:
    algorithm, _, meta_params, tasks = case_of(variant, model)
    task = tree_index(tasks, 0)
    before = [leaf.clone() for leaf in tree_leaves((meta_params, tasks))]
    longest = algorithm.adapt(meta_params, task.support, num_steps=5)
    for num_steps in (0, 1, 2):
        states = algorithm.adapt(meta_params, task.support, num_steps=num_steps)
        assert len(states) == (num_steps + 1 if algorithm.descends else 1)
        assert all(same(state, other) for state, other in zip(states, longest, strict=False))
    whole = algorithm.adapt(meta_params, task.support)
    if "num_inner_steps" in flatten(override(Config(), {"algorithm": VARIANTS[variant][0]})):
        assert len(whole) == 3  # as many steps as in training
    assert algorithm.descends == (len(whole) > 1)
    for vectorize in (True, False):
        chunk_sum(algorithm, meta_params, tasks, 0, vectorize=vectorize)
    assert same(tree_leaves((meta_params, tasks)), before)
    assert algorithm.predict(meta_params, longest[-1], task.query.inputs).shape == (12, 4)
    if algorithm.predict_alone is not None:
        assert algorithm.predict_alone(meta_params, longest[-1], task.query.inputs).shape == (12, 4)


@pytest.mark.parametrize("model", ["mlp", "conv4", "lstm"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_meta_gradient_is_shaped_like_the_meta_parameters_and_descends(name: str, model: str) -> None:
    # Reptile's is the gradient of no loss, and along a short way nearly that of the loss at its end.
    algorithm, _, meta_params, tasks = case_of(name, model, inner_lr=0.01 if name == "reptile" else 0.1)
    grads, metrics = meta_gradient(algorithm, meta_params, tasks, 0)
    assert tree_names(grads) == tree_names(meta_params)
    assert [g.shape for g in tree_leaves(grads)] == [p.shape for p in tree_leaves(meta_params)]
    assert all(g.isfinite().all() and not g.requires_grad for g in tree_leaves(grads))
    assert all(metric.dim() == 0 for metric in metrics.values())
    moved = tree_map(lambda p, g: p - 1e-3 * g, meta_params, grads)
    assert meta_gradient(algorithm, moved, tasks, 0)[1]["query_loss"] < metrics["query_loss"]


@pytest.mark.parametrize("variant", [key for key, (name, _) in VARIANTS.items() if name not in NO_SLOPE])
def test_a_meta_gradient_is_the_slope_of_the_query_loss_after_adaptation(variant: str) -> None:
    """By differences of what `adapt` and `predict` say, so that no autograd could hide a first-order gradient."""
    algorithm, objective, meta_params, tasks = case_of(variant, num_tasks=2)
    torch.manual_seed(1)  # noise, as rates and matrices that are all alike hide a mistake
    meta_params = tree_map(lambda leaf: leaf + 0.05 * torch.randn_like(leaf), meta_params)

    def loss(meta_params: Any) -> torch.Tensor:
        losses = []
        for task in oracles.each(tasks):
            state = algorithm.adapt(meta_params, task.support)[-1]
            losses.append(
                objective.loss(algorithm.predict(meta_params, state, task.query.inputs), task.query.targets)[0]
            )
        return torch.stack(losses).mean()

    grads, _ = meta_gradient(algorithm, meta_params, tasks, 1_000_000)  # whatever is annealed is over
    if isinstance(meta_params, Stateful):  # no loss depends on the state
        grads = Stateful(grads.learned, tree_map(torch.zeros_like, meta_params.state))
    oracles.check_slope(grads, meta_params, loss)


@pytest.mark.parametrize("variant", STATEFUL)
def test_what_is_gathered_is_shaped_like_the_state_and_changes(variant: str) -> None:
    algorithm, _, meta_params, tasks = case_of(variant)
    grads, _ = meta_gradient(algorithm, meta_params, tasks, 0)
    assert isinstance(meta_params, Stateful)
    assert isinstance(grads, Stateful)
    assert tree_names(grads) == tree_names(meta_params)
    pairs = list(zip(tree_leaves(grads.state), tree_leaves(meta_params.state), strict=True))
    assert all(new.shape == old.shape and new.dtype == old.dtype for new, old in pairs)
    assert not any(torch.equal(new, old) for new, old in pairs)


@pytest.mark.parametrize("vectorize", [True, False], ids=["side by side", "one by one"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_in_float32_everything_stays_float32_and_is_nearly_what_it_is_in_float64(variant: str, vectorize: bool) -> None:
    algorithm, _, meta_params, tasks = case_of(variant, "conv4")
    exact, _ = chunk_sum(algorithm, meta_params, tasks, 0, vectorize=vectorize)
    algorithm, _, _, tasks = case_of(variant, "conv4", precision="float32")
    meta_params, tasks = tree_to((meta_params, tasks), torch.device("cpu"), torch.float32)
    grads, metrics = chunk_sum(algorithm, meta_params, tasks, 0, vectorize=vectorize)
    adapted = algorithm.adapt(meta_params, tree_index(tasks, 0).support)
    assert {leaf.dtype for leaf in tree_leaves((grads, metrics, adapted))} == {torch.float32}
    found, expected = (named_leaves(learned_part(tree)) for tree in (grads, exact))
    # Norms take out the biases of convolutions: what is left is rounding, which Adam divides by its own size.
    names = [name for name in expected if not re.search(r"convolutions\.\d\.bias", name)]
    largest = max(float(expected[name].abs().max()) for name in names)
    for name in names:
        own = float(expected[name].abs().max())
        assert float((found[name] - expected[name]).abs().max()) < 1e-3 * own + 1e-5 * largest, name


@pytest.mark.parametrize("name", ALGORITHMS)
def test_metrics_are_the_query_loss_and_what_the_objective_names(name: str) -> None:
    algorithm, objective, meta_params, tasks = case_of(name)
    _, metrics = meta_gradient(algorithm, meta_params, tasks, 0)
    assert set(metrics) == {"query_loss", *(f"query_{metric}" for metric in objective.metrics)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_algorithm_sees_one_task_at_a_time(variant: str) -> None:
    """The sum over a chunk is the sum of its tasks, on all engines."""
    algorithm, _, meta_params, tasks = case_of(variant)
    whole = chunk_sum(algorithm, meta_params, tasks, 0, vectorize=ENGINES[0].vectorize)
    one = [chunk_sum(algorithm, meta_params, tree_index(tasks, slice(i, i + 1)), 0, vectorize=False) for i in range(4)]
    check_close(whole, tree_add(tree_add(one[0], one[1]), tree_add(one[2], one[3])))


@pytest.mark.parametrize("vectorize", [True, False], ids=["side by side", "one by one"])
@pytest.mark.parametrize("model", ["mlp", "conv4"])
@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name not in ("reptile", "fine_tuning")])
def test_adaptation_at_test_is_that_of_training(name: str, model: str, vectorize: bool) -> None:
    """The query loss that training logs is that of the last state of `adapt`; reptile and fine_tuning train on no query
    loss."""
    algorithm, objective, meta_params, tasks = case_of(name, model, num_tasks=2)
    tasks = tasks._replace(key=None)  # nothing random
    _, summed = chunk_sum(algorithm, meta_params, tasks, 0, vectorize=vectorize)
    expected: Any = None
    for index in range(2):
        task = tree_index(tasks, index)
        state = algorithm.adapt(meta_params, task.support)[-1]
        loss, metrics = objective.loss(algorithm.predict(meta_params, state, task.query.inputs), task.query.targets)
        own = {"query_loss": loss, **{f"query_{name}": metric for name, metric in metrics.items()}}
        expected = own if expected is None else tree_add(expected, own)
    check_close(list(summed.values()), list(expected.values()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_are_those_of_the_adapted_states(variant: str) -> None:
    algorithm, objective, meta_params, tasks = case_of(variant, num_tasks=2)
    steps = 3 if algorithm.descends else 0
    found = score(algorithm, objective, meta_params, tasks, num_steps=3, inductive=True)
    for index in range(2):
        task = tree_index(tasks, index)
        states = algorithm.adapt(meta_params, task.support, num_steps=steps)
        for k, state in enumerate(states):
            outputs = algorithm.predict(meta_params, state, task.query.inputs)
            loss = objective.loss(outputs, task.query.targets)[0]
            torch.testing.assert_close(found["transductive"]["query_loss"][index, k], loss, rtol=1e-12, atol=1e-12)
            alone = torch.cat([alone_of(algorithm, meta_params, state, task, i) for i in range(12)])
            loss = objective.loss(alone, task.query.targets)[0]
            torch.testing.assert_close(found["inductive"]["query_loss"][index, k], loss, rtol=1e-12, atol=1e-12)


def alone_of(algorithm: Algorithm, meta_params: Any, state: Any, task: Episode, index: int) -> Any:
    """The outputs of one query item that sees no other: beside the support set, or by running statistics."""
    item = task.query.inputs[index : index + 1]
    if algorithm.predict_alone is not None:
        return algorithm.predict_alone(meta_params, state, item)
    return algorithm.predict(meta_params, state, torch.cat([task.support.inputs, item]))[-1:]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_checkpoint_brings_the_meta_parameters_back_and_goes_on_as_before(variant: str, tmp_path: Path) -> None:
    algorithm, _, meta_params, tasks = case_of(variant, num_tasks=2)
    options = Outer(optimizer="adam", outer_lr=0.01, num_outer_steps=4)
    straight = init_outer(meta_params, options)
    document = {"step": 2, "config": {}, "shapes": {"input_shape": [], "num_outputs": 4}, "dataset": None}

    def train(state: OuterState, steps: range) -> None:
        for step in steps:
            outer_step(state, meta_gradient(algorithm, state.meta_params, tasks, step)[0], step, options)

    train(straight, range(2))
    checkpoint.save(tmp_path / "2.safetensors", named_state(straight), document)
    resumed = init_outer(tree_map(torch.zeros_like, meta_params), options)
    load_named_state(resumed, checkpoint.load(tmp_path / "2.safetensors")[0])
    assert same(resumed.meta_params, straight.meta_params)
    train(straight, range(2, 4))
    train(resumed, range(2, 4))
    found, expected = named_state(resumed), named_state(straight)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    model = load_meta_params(meta_params, named_leaves(straight.meta_params))  # as a run's result is written and read
    assert same(model, straight.meta_params)
    assert type(model) is type(meta_params)


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_workers_equal_one(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven tasks in chunks of two, as the loop hands them out, and all workers' buffers added as by the network."""

    def sums(world_size: int) -> list[dict[int, tuple[Any, int]]]:
        of_workers = []
        for rank in range(world_size):
            algorithm, _, meta_params, tasks = case_of(variant, num_tasks=7)  # a process of its own
            chunks = {index: tree_index(tasks, slice(p.start, p.stop)) for index, p in shard(7, 2, rank, world_size)}
            of_workers.append(
                {i: (chunk_sum(algorithm, meta_params, chunk, 0), len(chunk.classes)) for i, chunk in chunks.items()}
            )
        return of_workers

    def mean(of_workers: list[dict[int, tuple[Any, int]]], *, ordered: bool = True, backwards: bool = False) -> Any:
        like = next(total for own in of_workers for total, _ in own.values())
        reduced = partial(mean_over_tasks, like=like, num_chunks=4, ordered=ordered)
        buffers: list[torch.Tensor] = []
        monkeypatch.setattr(collectives, "all_reduce", lambda buffer: buffers.append(buffer.clone()))
        for own in of_workers:
            reduced(own)
        summed = reduce(torch.add, buffers[::-1] if backwards else buffers)
        monkeypatch.setattr(collectives, "all_reduce", lambda buffer: buffer.copy_(summed))
        found, num_tasks, _ = reduced(of_workers[-1])
        assert num_tasks == 7
        return found

    one = mean(sums(1))
    algorithm, _, meta_params, tasks = case_of(variant, num_tasks=7)
    check_close(one, meta_gradient(algorithm, meta_params, tasks, 0))
    for world_size in (2, 5):  # of five one has no chunk
        of_workers = sums(world_size)
        assert same(mean(of_workers), one)
        assert same(mean(of_workers, backwards=True), one)
        check_close(mean(of_workers, ordered=False), one)


@pytest.mark.parametrize("variant", VARIANTS)
def test_chunks_equal_the_whole(variant: str) -> None:
    algorithm, _, meta_params, tasks = case_of(variant)
    whole = meta_gradient(algorithm, meta_params, tasks, 0)
    for chunk_size in (1, 3):
        check_close(meta_gradient(algorithm, meta_params, tasks, 0, chunk_size=chunk_size), whole)


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
            assert same(_tensors(left), _tensors(right))
        assert batch.key is None or (batch.key.dtype == torch.int64 and len({*batch.key.tolist()}) == 3)
        assert {len(leaf) for leaf in _tensors(batch)} == {3}
    elsewhere = build.task_distributions(override(config, {"seed": 1}))
    firsts = [tree_leaves(source.sample([0]))[0] for source in (*splits.values(), elsewhere["train"])]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(firsts, 2) if a.shape == b.shape)


@pytest.mark.parametrize("name", TASKS)
def test_classes_are_those_of_the_split_or_there_are_none(name: str, tmp_path: Path) -> None:
    tiny_store(tmp_path / "tiny.arrow")
    base = override(Config(), {"tasks": name})
    values = {"dataset": str(tmp_path / "tiny.arrow"), "num_ways": 3, "num_shots": 2, "num_queries": 2,
              "num_eval_queries": 2, "rotations": "train"}  # fmt: skip
    splits = build.task_distributions(override(base, {k: v for k, v in values.items() if k in flatten(base)}))
    for source in splits.values():
        found, number = source.sample(range(200)).classes, getattr(source, "num_classes", None)
        assert (found is None) == (number is None)
        if found is None or number is None:
            continue
        assert found.dtype == torch.int64
        assert all(len({*task}) == 3 for task in found.tolist())
        assert {*found.flatten().tolist()} == {*range(number)}


def _tensors(tree: Any) -> list[Any]:
    """The leaves without those that a task distribution leaves out."""
    return [leaf for leaf in tree_leaves(tree) if leaf is not None]


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
@pytest.mark.slow
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
