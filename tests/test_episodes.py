"""Who computes which task, and random streams that are functions of their key."""

import pytest
import torch
from torch.func import vmap

from distmaml.episodes import fold_in, random_choice, random_ints, random_uniform, shard, task_keys
from distmaml.splits import SPLITS

# --------------------------------------------------------------------------------------- who computes what

over_sizes = pytest.mark.parametrize(
    ("num_tasks", "chunk_size", "world_size"),
    [(1, 1, 1), (1, 4, 3), (7, 3, 2), (25, 25, 3), (25, 4, 3), (32, 4, 5), (32, 1, 9)],
)


@over_sizes
def test_every_task_is_computed_once_in_order(num_tasks: int, chunk_size: int, world_size: int) -> None:
    shards = [shard(num_tasks, chunk_size, rank, world_size) for rank in range(world_size)]
    assert [task for chunks in shards for _, positions in chunks for task in positions] == list(range(num_tasks))
    assert [index for chunks in shards for index, _ in chunks] == list(range(-(-num_tasks // chunk_size)))


@over_sizes
def test_chunks_do_not_depend_on_the_number_of_workers(num_tasks: int, chunk_size: int, world_size: int) -> None:
    together = [chunk for rank in range(world_size) for chunk in shard(num_tasks, chunk_size, rank, world_size)]
    assert together == shard(num_tasks, chunk_size, 0, 1)
    assert all(positions.start == index * chunk_size for index, positions in together)


@over_sizes
def test_workers_have_equally_many_chunks_up_to_one(num_tasks: int, chunk_size: int, world_size: int) -> None:
    counts = [len(shard(num_tasks, chunk_size, rank, world_size)) for rank in range(world_size)]
    assert max(counts) - min(counts) <= 1


def test_more_workers_than_chunks_leaves_some_without() -> None:
    assert [len(shard(8, 4, rank, 5)) for rank in range(5)].count(0) == 3


# ------------------------------------------------------------------------------------------ random streams

MASK = 2**64 - 1


def splitmix64(state: int) -> int:
    """The output function of splitmix64 after one addition of the golden gamma, on Python's integers."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def test_the_oracle_gives_the_published_splitmix64_sequence() -> None:
    """The first outputs of the reference implementation (https://prng.di.unimi.it/splitmix64.c) for seed 1234567."""
    gamma = 0x9E3779B97F4A7C15
    found = [splitmix64((1234567 + i * gamma) & MASK) for i in range(5)]
    assert found == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
    ]  # fmt: skip


def test_fold_in_is_the_nth_output_of_splitmix64() -> None:
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert fold_in(torch.tensor(1234567), torch.arange(5)).tolist() == [signed(value) for value in published]


@pytest.mark.parametrize("key", [0, 1, -1, 2**63 - 1, -(2**63), 1234567890123456789])
@pytest.mark.parametrize("data", [0, 1, 5, 2**31, 2**62])
def test_fold_in_equals_splitmix64_on_python_integers(key: int, data: int) -> None:
    expected = signed(splitmix64((key + data * 0x9E3779B97F4A7C15) & MASK))
    assert int(fold_in(torch.tensor(key), data)) == expected
    assert int(fold_in(torch.tensor(key), torch.tensor(data))) == expected


def test_fold_in_under_vmap_equals_one_by_one() -> None:
    keys = torch.tensor([3, -7, 2**61])
    assert torch.equal(vmap(lambda key: fold_in(key, 4))(keys), torch.stack([fold_in(key, 4) for key in keys]))


def test_task_keys_are_a_function_of_the_index_alone() -> None:
    together = task_keys(5, "train", range(20))
    assert torch.equal(together, torch.cat([task_keys(5, "train", [i]) for i in range(20)]))
    assert torch.equal(together.flip(0), task_keys(5, "train", list(reversed(range(20)))))


def test_task_keys_differ_over_seeds_splits_and_indices() -> None:
    keys = torch.cat([task_keys(seed, split, range(500)) for seed in range(5) for split in SPLITS])
    assert len(set(keys.tolist())) == 5 * 3 * 500


def test_uniform_numbers_lie_in_the_unit_interval_and_fill_it_evenly() -> None:
    numbers = random_uniform(task_keys(0, "train", range(200)), 500).flatten()
    assert numbers.dtype == torch.float64
    assert float(numbers.min()) >= 0
    assert float(numbers.max()) < 1
    counts = torch.bincount((numbers * 100).long(), minlength=100).double()
    expected = len(numbers) / 100
    # chi-square with 99 degrees of freedom: mean 99, standard deviation sqrt(198) = 14
    assert 99 - 5 * 14 < float(((counts - expected) ** 2 / expected).sum()) < 99 + 5 * 14


def test_integers_are_never_negative() -> None:
    assert int(random_ints(task_keys(0, "val", range(1000)), 50).min()) >= 0


@pytest.mark.parametrize(("size", "total"), [(1, 1), (5, 5), (5, 20), (20, 1000)])
def test_choice_is_distinct_and_in_range(size: int, total: int) -> None:
    chosen = random_choice(task_keys(1, "train", range(2000)), size, total)
    assert chosen.shape == (2000, size)
    assert int(chosen.min()) >= 0
    assert int(chosen.max()) < total
    assert all(len(set(row)) == size for row in chosen.tolist())


def test_every_ordered_choice_is_equally_likely() -> None:
    chosen = random_choice(task_keys(2, "train", range(12_000)), 3, 5)
    counts = torch.bincount((chosen * torch.tensor([25, 5, 1])).sum(-1), minlength=125)
    seen = counts[counts > 0].double()
    assert len(seen) == 5 * 4 * 3
    # chi-square with 59 degrees of freedom: mean 59, standard deviation sqrt(118) = 10.9
    assert float(((seen - 200) ** 2 / 200).sum()) < 59 + 5 * 10.9


def test_choice_under_vmap_equals_one_by_one() -> None:
    keys = task_keys(3, "test", range(7))
    together = vmap(lambda key: random_choice(key, 4, 9))(keys)
    assert torch.equal(together, torch.stack([random_choice(key, 4, 9) for key in keys]))
