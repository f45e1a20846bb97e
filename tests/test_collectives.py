"""The mean over all workers' tasks, by hand and over real process groups."""

from pathlib import Path
from typing import Any

import pytest
import torch

from distmaml.collectives import all_reduce, from_first, mean_over_tasks
from distmaml.episodes import shard
from distmaml.trees import Tree, tree_leaves
from tests.runs import Member, in_groups

LIKE = {"w": torch.zeros(2), "metrics": (torch.zeros(()),)}


@pytest.mark.parametrize("ordered", [True, False])
def test_uneven_chunks_count_by_their_tasks(ordered: bool) -> None:
    """Three tasks in one chunk and one in the other: (3 + 6 + 9 + 2) / 4, not the mean of two means."""
    sums: dict[int, tuple[Tree, int]] = {
        0: ({"w": torch.tensor([18.0, 3.0]), "metrics": (torch.tensor(6.0),)}, 3),
        1: ({"w": torch.tensor([2.0, 1.0]), "metrics": (torch.tensor(0.0),)}, 1),
    }
    mean, num_tasks, _ = mean_over_tasks(sums, LIKE, num_chunks=2, ordered=ordered)
    assert num_tasks == 4
    assert mean["w"].tolist() == [5.0, 1.0]
    assert mean["metrics"][0].tolist() == 1.5
    assert list(mean) == ["w", "metrics"]


def test_without_a_group_the_collectives_do_nothing() -> None:
    assert all_reduce(torch.tensor([2.0])).tolist() == [2.0]
    assert from_first(7, torch.device("cpu")) == 7


def test_the_sums_handed_in_stay_as_they_are() -> None:
    sums: dict[int, tuple[Tree, int]] = {0: ({"w": torch.ones(2), "metrics": (torch.ones(()),)}, 2)}
    mean_over_tasks(sums, LIKE, num_chunks=1, ordered=True)
    assert sums[0][0]["w"].tolist() == [1.0, 1.0]


def test_not_a_number_in_one_task_reaches_the_mean() -> None:
    sums: dict[int, tuple[Tree, int]] = {0: ({"w": torch.tensor([float("nan"), 1.0]), "metrics": (torch.ones(()),)}, 1)}
    mean, _, _ = mean_over_tasks(sums, LIKE, num_chunks=3, ordered=True)
    assert mean["w"].isnan().tolist() == [True, False]


# ------------------------------------------------------------------------------------------ process groups

NUM_TASKS, CHUNK = 7, 4  # two chunks: of three workers one has none


def gradients(dtype: torch.dtype) -> torch.Tensor:
    """One row a task, of very different sizes, so that the order of a sum shows."""
    generator = torch.Generator().manual_seed(0)
    scales = 10.0 ** torch.randint(-4, 5, (NUM_TASKS, 1), generator=generator)
    return (torch.randn(NUM_TASKS, 1000, generator=generator, dtype=torch.float64) * scales).to(dtype)


def reduce_and_save(member: Member, folder: Path) -> None:
    found: dict[str, Any] = {"first": from_first(10 + member.rank, member.device)}
    for dtype in (torch.float32, torch.float64):
        for ordered in (True, False):
            rows, sums = gradients(dtype), {}
            for index, positions in shard(NUM_TASKS, CHUNK, member.rank, member.world_size):
                sums[index] = ({"w": rows[positions.start : positions.stop].sum(0)}, len(positions))
            like = {"w": torch.zeros(1000, dtype=dtype)}
            mean, num_tasks, flag = mean_over_tasks(
                sums, like, num_chunks=-(-NUM_TASKS // CHUNK), ordered=ordered, flag=member.rank == 1
            )
            assert num_tasks == NUM_TASKS
            assert flag == (member.world_size > 1), "raised by rank 1, seen by all"
            found[f"{dtype} {ordered}"] = tree_leaves(mean)[0]
    torch.save(found, folder / f"{member.world_size}-{member.rank}.pt")


@pytest.fixture(scope="module")
def reduced(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("collectives")
    in_groups(folder, (1, 2, 3), reduce_and_save, folder)
    return {(size, rank): torch.load(folder / f"{size}-{rank}.pt") for size in (1, 2, 3) for rank in range(size)}


def test_the_ordered_mean_is_the_same_to_the_last_bit_on_every_worker_of_every_group(reduced: Any) -> None:
    for dtype in (torch.float32, torch.float64):
        means = [found[f"{dtype} True"] for found in reduced.values()]
        assert all(torch.equal(mean, means[0]) for mean in means)


def test_the_plain_mean_is_that_of_all_tasks(reduced: Any) -> None:
    expected = gradients(torch.float64).mean(0)
    for found in reduced.values():
        torch.testing.assert_close(found["torch.float64 False"], expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found["torch.float64 True"], expected, rtol=1e-12, atol=1e-12)


def test_a_group_of_one_equals_no_group(reduced: Any) -> None:
    rows = gradients(torch.float32)
    sums = {0: ({"w": rows[:4].sum(0)}, 4), 1: ({"w": rows[4:].sum(0)}, 3)}
    mean, _, _ = mean_over_tasks(sums, {"w": torch.zeros(1000)}, num_chunks=2, ordered=True)
    assert torch.equal(mean["w"], reduced[1, 0]["torch.float32 True"])


def test_the_first_workers_number_reaches_all(reduced: Any) -> None:
    assert [found["first"] for found in reduced.values()] == [10] * 6
