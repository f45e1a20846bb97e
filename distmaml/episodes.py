"""Episodes, where they come from, and which worker computes which of them.

Knows nothing of images, gradients or processes.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

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
    """

    support: Tree
    query: Tree
    key: Tensor | None = None


TaskBatch: TypeAlias = Episode
"""Tasks stacked: leaves ``[num_tasks, ...]``."""


class TaskDistribution(Protocol):
    """Where tasks come from."""

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
    num_chunks = -(-num_tasks // chunk_size)
    first, last = (num_chunks * r // world_size for r in (rank, rank + 1))
    return [(c, range(c * chunk_size, min((c + 1) * chunk_size, num_tasks))) for c in range(first, last)]


def fold_in(key: Tensor, data: int) -> Tensor:
    """A new random stream from a stream and a number: one round of splitmix64 on int64 tensors.

    Steele, Lea, Flood (2014), "Fast Splittable Pseudorandom Number Generators",
    https://doi.org/10.1145/2714064.2660195. Arithmetic only, so that it can be vmapped.
    """
    mixed = key + _signed((data + 1) * 0x9E3779B97F4A7C15)
    mixed = (mixed ^ _shift(mixed, 30)) * _signed(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ _shift(mixed, 27)) * _signed(0x94D049BB133111EB)
    return mixed ^ _shift(mixed, 31)


def _signed(value: int) -> int:
    """The 64 low bits as a two's complement number, which is what an int64 tensor holds."""
    return (value + 2**63) % 2**64 - 2**63


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own keeps the sign."""
    return torch.bitwise_right_shift(value, bits) & (2 ** (64 - bits) - 1)
