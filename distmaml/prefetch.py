"""The tasks of the next outer step are built while this one computes."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from distmaml.episodes import TaskBatch, TaskDistribution
from distmaml.trees import tree_to


class Chunk(NamedTuple):
    """Some tasks of a step, computed together by one worker."""

    number: int
    num_tasks: int
    tasks: TaskBatch


def prefetched(
    tasks: TaskDistribution,
    shards: Sequence[tuple[int, range]],
    *,
    steps: range,
    tasks_per_step: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[tuple[int, list[Chunk]]]:
    """For each step its number and one worker's chunks. Task `i` of step `t` has the index ``t * tasks_per_step + i``.

    Args:
      shards: which positions of a step this worker computes, from `episodes.shard`.
    """

    def load(step: int) -> list[Chunk]:
        return [
            Chunk(
                index,
                len(positions),
                tree_to(tasks.sample([step * tasks_per_step + p for p in positions]), device, dtype),
            )
            for index, positions in shards
        ]

    if not steps:
        return
    with ThreadPoolExecutor(1, thread_name_prefix="episodes") as pool:
        pending = pool.submit(load, steps.start)
        for step in steps:
            chunks = pending.result()
            if step + 1 < steps.stop:
                pending = pool.submit(load, step + 1)
            yield step, chunks
