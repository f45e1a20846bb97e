"""Work that is recorded on a GPU and replayed gives what the plain path gives. Without a GPU: what is refused."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distmaml import build, gpu, loop, workers
from distmaml.algorithms import ALGORITHMS
from distmaml.algorithms.maml import maml
from distmaml.config import Config, override
from distmaml.engine import warn_once
from distmaml.episodes import Batch, Episode
from distmaml.errors import ConfigError, DataError
from distmaml.models.conv4 import Conv4
from distmaml.objectives import classification, initial_params
from distmaml.outer import chunk_sum
from distmaml.recipes.glyphs import glyphs_maml_5w1s
from distmaml.scoring import after_last
from distmaml.store import ClassRows
from distmaml.tasks.images import ImageTasks
from distmaml.trees import tree_leaves
from distmaml.worker import LocalWorker
from tests import oracles

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def tasks(num_tasks: int, device: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> Episode:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(5).expand(num_tasks, 5).to(device)
    support, query = (
        torch.randn(num_tasks, 5, 1, 28, 28, generator=generator, dtype=dtype).to(device) for _ in range(2)
    )
    return Episode(Batch(support, labels), Batch(query, labels))  # fmt: skip


def meta_gradient(device: str, dtype: torch.dtype = torch.float64) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Conv4((1, 28, 28), 5, num_filters=8).to(device, dtype)
    return maml(classification(model), inner_lr=0.3, num_inner_steps=2), initial_params(model)


# ------------------------------------------------------------------------------------------- everywhere


def test_on_a_cpu_and_where_the_step_matters_the_function_stays_itself() -> None:
    assert gpu.replayed(len, torch.device("cpu"), steady_from=0) is len  # type: ignore[arg-type, comparison-overlap]
    assert gpu.replayed(len, torch.device("cuda"), steady_from=None) is len  # type: ignore[arg-type, comparison-overlap]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
@pytest.mark.parametrize("rotations", [False, True])
def test_episodes_of_a_tensor_are_those_of_a_store(rotations: bool, device: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (60, 3, 8, 8), dtype=np.uint8)
    classes = [ClassRows(str(number), np.arange(6 * number, 6 * number + 6)) for number in range(10)]
    options: dict[str, Any] = {
        "split": "train", "seed": 3, "num_ways": 5, "num_shots": 1, "num_queries": 3, "rotations": rotations
    }  # fmt: skip
    expected = ImageTasks(images, classes, **options).sample([4, 0, 17])
    found = ImageTasks(torch.from_numpy(images).to(device), classes, **options).sample([4, 0, 17])
    for one, other in zip(expected[:2], found[:2], strict=True):
        assert torch.equal(one.inputs, other.inputs.cpu())
        assert torch.equal(one.targets, other.targets.cpu())
    assert expected.key is not None
    assert found.key is not None
    assert torch.equal(expected.key, found.key.cpu())


@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_a_precision_gets_along_with_what_recurrent_networks_switch_off(precision: str) -> None:
    build.set_products(precision)
    try:
        with torch.backends.cudnn.flags(enabled=False, allow_tf32=torch.backends.cudnn.allow_tf32):
            assert torch.backends.cudnn.allow_tf32 == (precision == "tf32")
        assert torch.backends.cuda.matmul.allow_tf32 == (precision == "tf32")
    finally:
        build.set_products("float32")


def test_rotations_want_square_images() -> None:
    images = np.zeros((40, 1, 8, 6), np.uint8)
    classes = [ClassRows(str(number), np.arange(8 * number, 8 * number + 8)) for number in range(5)]
    with pytest.raises(DataError, match="images of 8x6 are not square"):
        ImageTasks(images, classes, split="train", seed=0, num_ways=2, num_shots=1, num_queries=1, rotations=True)


def test_tf32_without_a_gpu_is_refused_before_training() -> None:
    config = override(glyphs_maml_5w1s(), {"precision": "tf32"})
    with pytest.raises(ConfigError, match="precision='tf32' is for GPUs, and the cluster has none"):
        workers.check_precision(config, {"CPU": 2.0})
    with pytest.raises(ConfigError, match="--use-gpu no leaves them out"):
        workers.check_precision(override(config, {"use_gpu": "no"}), {"CPU": 2.0, "GPU": 1.0})
    workers.check_precision(config, {"GPU": 1.0})


# --------------------------------------------------------------------------------------------- on a GPU


@on_gpu
def test_replaying_equals_computing_for_new_tasks_new_shapes_and_new_parameters() -> None:
    algorithm, theta = meta_gradient("cuda")
    plain = partial(chunk_sum, algorithm, theta)
    replayed = gpu.replayed(plain, torch.device("cuda"), steady_from=0)
    results = []
    for seed, num_tasks in enumerate((3, 3, 2, 3)):
        batch = tasks(num_tasks, "cuda", seed)
        found, expected = replayed(batch, seed), plain(batch, seed)
        assert oracles.relative_error(found[0], expected[0]) < 1e-10
        assert float(found[1]["query_loss"]) == pytest.approx(float(expected[1]["query_loss"]), rel=1e-10)
        results.append((found, expected))
        for leaf in theta.values():
            leaf.mul_(0.9)  # as an optimiser does, in place
    for found, expected in results:  # copies: later replays have not changed them
        assert oracles.relative_error(found[0], expected[0]) < 1e-10


@on_gpu
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_is_recorded_and_replayed(name: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    values = {"algorithm": name, "num_filters": 8, "precision": "float64"}
    config = override(Config(), {**values, **({"annealing_steps": 0} if name == "maml_plus_plus" else {})})
    learner = build.learner(config, build.Shapes((1, 28, 28), 5, 20), torch.device("cuda"))
    assert learner.algorithm.steady_from == 0
    plain = partial(chunk_sum, learner.algorithm, learner.meta_params)
    replayed = gpu.replayed(plain, torch.device("cuda"), steady_from=0)
    for seed in range(2):
        batch = tasks(3, "cuda", seed)._replace(classes=torch.arange(15, device="cuda").view(3, 5))
        for found, expected in zip(tree_leaves(replayed(batch, 0)), tree_leaves(plain(batch, 0)), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    assert "not recorded" not in caplog.text


@on_gpu
def test_it_equals_unrolled_autodiff() -> None:
    torch.manual_seed(0)
    model = Conv4((1, 28, 28), 5, num_filters=8).to("cuda", torch.float64)
    theta, batch = initial_params(model), tasks(3, "cuda")
    algorithm = maml(classification(model), inner_lr=0.3, num_inner_steps=3)
    found, _ = gpu.replayed(partial(chunk_sum, algorithm, theta), torch.device("cuda"), steady_from=0)(batch, 0)
    expected = oracles.unrolled(model, theta, batch, torch.nn.functional.cross_entropy, inner_lr=0.3, num_steps=3)
    assert oracles.relative_error({name: grad / 3 for name, grad in found.items()}, expected) < 1e-10


@on_gpu
def test_what_cannot_be_recorded_runs_as_it_is_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    def looks(batch: Episode, step: int) -> Tensor:
        total: Tensor = batch.support.inputs.sum()
        return total if float(total) > 1e9 else -total  # a value that the CPU must know

    warn_once.cache_clear()
    replayed = gpu.replayed(looks, torch.device("cuda"), steady_from=0)
    for seed in range(2):
        batch = tasks(2, "cuda", seed)
        with caplog.at_level(logging.WARNING):
            assert float(replayed(batch, 0)) == float(looks(batch, 0))
    assert [record.message[:45] for record in caplog.records] == ["The GPU's work is not recorded and replayed ("]


@on_gpu
def test_a_chunk_that_does_not_fit_says_what_one_task_needs() -> None:
    algorithm, theta = meta_gradient("cuda", torch.float32)
    batch = tasks(4096, "cuda", dtype=torch.float32)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.5 * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    try:
        replayed = gpu.replayed(partial(chunk_sum, algorithm, theta), torch.device("cuda"), steady_from=0)
        with pytest.raises(ConfigError, match=r"a chunk of 4096 tasks does not fit .* Lower --reduction-chunk to \d+"):
            replayed(batch, 0)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@on_gpu
@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_a_run_on_a_gpu_learns_and_goes_on_where_it_stopped(precision: str, tmp_path: Path) -> None:
    changes = {
        "output_dir": tmp_path, "name": "run", "precision": precision, "num_outer_steps": 40, "val_every": 20,
        "num_val_episodes": 40, "num_test_episodes": 40, "checkpoint_every": 20, "schedule": "constant",
    }  # fmt: skip
    config = override(glyphs_maml_5w1s(), changes)
    (tmp_path / "runs" / "run" / "checkpoints").mkdir(parents=True)
    worker = LocalWorker("cuda")
    first = loop.train(override(config, {"num_outer_steps": 20}), worker)
    assert first["step"] == 20
    values = loop.train(config, worker)
    assert values["step"] == 40
    tested = loop.evaluate(config, worker)
    assert tested.machine["gpu"] == torch.cuda.get_device_name()
    assert after_last(tested.scores["transductive"]["query_accuracy"]).mean > 0.35
    assert build.dataset_record(config) is not None
