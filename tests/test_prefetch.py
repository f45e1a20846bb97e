"""The tasks of a step are there when it begins."""

import threading
from collections.abc import Iterator, Sequence

import torch

from distmaml.episodes import Batch, Episode, TaskBatch
from distmaml.prefetch import Chunk, prefetched

SECONDS = 10.0


class Counted:
    """Tasks that are their own index, and say when they are built."""

    def __init__(self) -> None:
        self.built: list[list[int]] = []
        self.changed = threading.Condition()

    def sample(self, indices: Sequence[int]) -> TaskBatch:
        with self.changed:
            self.built.append(list(indices))
            self.changed.notify_all()
        batch = Batch(torch.tensor(indices, dtype=torch.float64), torch.tensor(indices))
        return Episode(batch, batch)

    def wait_for(self, number: int) -> bool:
        """Whether so many lists of tasks are built, after some time."""
        with self.changed:
            return self.changed.wait_for(lambda: len(self.built) >= number, timeout=SECONDS)


def steps_of(tasks: Counted, steps: range) -> Iterator[tuple[int, list[Chunk]]]:
    shards = [(1, range(2, 4)), (2, range(4, 5))]  # the second and third chunk of five tasks
    return prefetched(tasks, shards, steps=steps, tasks_per_step=5, device=torch.device("cpu"), dtype=torch.float32)


def test_the_tasks_of_the_next_step_are_built_while_this_one_computes() -> None:
    tasks = Counted()
    next(steps_of(tasks, range(7, 10)))
    assert tasks.wait_for(4), "those of step 8, though nobody has asked for them yet"
    assert tasks.built == [[37, 38], [39], [42, 43], [44]]


def test_each_step_gets_its_own_chunks_and_nothing_is_built_beyond_the_last() -> None:
    tasks = Counted()
    seen = [
        (step, [(chunk.number, chunk.num_tasks, chunk.tasks.support.targets.tolist()) for chunk in chunks])
        for step, chunks in steps_of(tasks, range(2))
    ]
    assert seen == [(0, [(1, 2, [2, 3]), (2, 1, [4])]), (1, [(1, 2, [7, 8]), (2, 1, [9])])]
    assert len(tasks.built) == 4


def test_floats_come_in_the_precision_of_the_run() -> None:
    ((_, chunks),) = steps_of(Counted(), range(1))
    assert (chunks[0].tasks.support.inputs.dtype, chunks[0].tasks.support.targets.dtype) == (torch.float32, torch.int64)


def test_a_run_without_a_step_left_builds_nothing() -> None:
    tasks = Counted()
    assert list(steps_of(tasks, range(3, 3))) == []
    assert tasks.built == []
