"""Episodes, where they come from, and which worker computes which of them.

Knows nothing of images, gradients or processes.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from distmaml.splits import SPLITS
from distmaml.trees import Tree


class Batch(NamedTuple):
    """Labelled samples, leaves ``[num_samples, ...]``."""

    inputs: Tree
    targets: Tree


class Episode(NamedTuple):
    """One task: adapt on `support`, judge on `query`.

    Attributes:
      support: what the inner loop sees, a `Batch`.
      query: what the adapted parameters are judged on, a `Batch` that shares no sample with `support`.
      key: int64 scalar, the task's own random stream; None where nothing may be random.
      classes: int64 ``[num_ways]``, for each label the number of its class among all of the split's, for algorithms
        that train on all classes at once; None for tasks that have no classes.
    """

    support: Tree
    query: Tree
    key: Tensor | None = None
    classes: Tensor | None = None


TaskBatch: TypeAlias = Episode
"""Tasks stacked: leaves ``[num_tasks, ...]``."""


class TaskDistribution(Protocol):
    """Where tasks come from.

    One whose episodes carry `classes` also has `num_classes`, how many the split has.
    """

    def sample(self, indices: Sequence[int]) -> TaskBatch:
        """The tasks with these indices, stacked in their order.

        Pure: task i is a function of (seed, split, i) alone, in any order, in any process.
        """
        ...


def shard(num_tasks: int, chunk_size: int, rank: int, world_size: int) -> list[tuple[int, range]]:
    """The chunks of one step that a worker computes: (index of the chunk, positions of its tasks).

    The step's tasks are cut at multiples of `chunk_size` whatever the number of workers; each worker gets a
    contiguous run of whole chunks, as even as possible. Having none is fine.
    """
    total = num_chunks(num_tasks, chunk_size)
    first, last = (total * r // world_size for r in (rank, rank + 1))
    return [(c, range(c * chunk_size, min((c + 1) * chunk_size, num_tasks))) for c in range(first, last)]


def num_chunks(num_tasks: int, chunk_size: int) -> int:
    """Chunks of a step, the last one perhaps a smaller one: no more workers than these have something to do."""
    return -(-num_tasks // chunk_size)


def fold_in(key: Tensor, data: int | Tensor) -> Tensor:
    """A new random stream from a stream and a number: one round of splitmix64 on int64 tensors.

    Steele, Lea, Flood (2014), "Fast Splittable Pseudorandom Number Generators",
    https://doi.org/10.1145/2714064.2660195. Arithmetic only, so that it can be vmapped, and the same on every
    version and device. `data` broadcasts against `key`.
    """
    offset = (data + 1) * _signed(0x9E3779B97F4A7C15)
    mixed = key + (_signed(offset) if isinstance(offset, int) else offset)
    mixed = (mixed ^ _shift(mixed, 30)) * _signed(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ _shift(mixed, 27)) * _signed(0x94D049BB133111EB)
    return mixed ^ _shift(mixed, 31)


def task_keys(seed: int, split: str, indices: Sequence[int]) -> Tensor:
    """The random stream of each task, int64 ``[num_tasks]``: a function of (seed, split, index) alone."""
    stream = fold_in(torch.tensor(seed), SPLITS.index(split))
    return fold_in(stream, torch.tensor(indices, dtype=torch.int64))


def random_ints(key: Tensor, size: int) -> Tensor:
    """`size` integers in [0, 2**63) from each stream: ``[*key, size]``."""
    return fold_in(key.unsqueeze(-1), torch.arange(size)) & (2**63 - 1)


def random_uniform(key: Tensor, size: int) -> Tensor:
    """`size` float64 numbers in [0, 1) from each stream: ``[*key, size]``."""
    return (random_ints(key, size) >> 10).double() * 2.0**-53


def random_choice(key: Tensor, size: int, total: int) -> Tensor:
    """`size` distinct integers in [0, total) in random order from each stream: ``[*key, size]``."""
    chosen: list[Tensor] = []
    for position, draw in enumerate(random_ints(key, size).unbind(-1)):
        pick = draw % (total - position)
        for earlier in torch.stack(chosen, -1).sort(-1).values.unbind(-1) if chosen else ():
            pick = pick + (pick >= earlier)  # the pick-th of those that are left
        chosen.append(pick)
    return torch.stack(chosen, -1)


def _signed(value: int) -> int:
    """The 64 low bits as a two's complement number, which is what an int64 tensor holds."""
    return (value + 2**63) % 2**64 - 2**63


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own keeps the sign."""
    shifted: Tensor = torch.bitwise_right_shift(value, bits) & (2 ** (64 - bits) - 1)
    return shifted
