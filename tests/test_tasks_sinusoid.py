"""Sine waves as in section 5.1 of the MAML paper, each a function of its index."""

import math
import subprocess
import sys

import pytest
import torch

from distmaml.tasks.sinusoid import SinusoidTasks
from distmaml.trees import tree_leaves


def source(split: str = "train", seed: int = 0) -> SinusoidTasks:
    return SinusoidTasks(split=split, seed=seed, num_shots=5, num_queries=10)


def test_one_by_one_in_any_order_equals_the_batch() -> None:
    indices = [7, 0, 123456, 3, 2**40]
    together = source().sample(indices)
    for position in reversed(range(len(indices))):
        alone = source().sample([indices[position]])
        for one, all_ in zip(tree_leaves(alone[:3]), tree_leaves(together[:3]), strict=True):
            assert torch.equal(one[0], all_[position])
    assert together.classes is None  # waves have none


def test_another_process_sees_the_same_tasks() -> None:
    code = (
        "from distmaml.tasks.sinusoid import SinusoidTasks\n"
        "tasks = SinusoidTasks(split='val', seed=3, num_shots=5, num_queries=10).sample([5])\n"
        "print(tasks.query.targets.sum().item().hex(), int(tasks.key))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    here = source("val", 3).sample([5])
    assert found == [here.query.targets.sum().item().hex(), str(int(here.key[0]))]  # type: ignore[index]


@pytest.mark.parametrize("other", [source("val"), source("test"), source("train", 1)])
def test_splits_and_seeds_have_other_tasks(other: SinusoidTasks) -> None:
    assert not (source().waves(range(100)) == other.waves(range(100))).any()


def test_shapes_and_keys() -> None:
    tasks = source().sample(range(3))
    assert tasks.support.inputs.shape == tasks.support.targets.shape == (3, 5, 1)
    assert tasks.query.inputs.shape == tasks.query.targets.shape == (3, 10, 1)
    assert tasks.key is not None
    assert len(set(tasks.key.tolist())) == 3


def test_amplitude_phase_and_x_fill_the_ranges_of_the_paper() -> None:
    tasks, waves = source().sample(range(2000)), source().waves(range(2000))
    for values, low, high in ((waves[:, 0], 0.1, 5.0), (waves[:, 1], 0.0, math.pi), (tasks.query.inputs, -5.0, 5.0)):
        margin = 0.01 * (high - low)
        assert low <= float(values.min()) < low + margin
        assert high - margin < float(values.max()) <= high
        # the mean of n uniform numbers has the standard deviation (high - low) / sqrt(12 n)
        assert abs(float(values.mean()) - (low + high) / 2) < 5 * (high - low) / math.sqrt(12 * values.numel())


def test_y_is_the_sine_with_the_phase_subtracted() -> None:
    tasks, waves = source().sample(range(20)), source().waves(range(20))
    for batch in (tasks.support, tasks.query):
        for x, y, (amplitude, phase) in zip(batch.inputs, batch.targets, waves.tolist(), strict=True):
            expected = [amplitude * math.sin(value - phase) for value in x[:, 0].tolist()]
            assert y[:, 0].tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_support_and_query_share_no_point() -> None:
    tasks = source().sample(range(200))
    assert not (tasks.support.inputs == tasks.query.inputs.transpose(1, 2)).any()
