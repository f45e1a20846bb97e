"""What a GPU wants otherwise than a CPU: work that is recorded once and replayed, and a word on its memory."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from distmaml.engine import warn_once
from distmaml.episodes import TaskBatch
from distmaml.errors import ConfigError, first_line
from distmaml.trees import Tree, tree_index, tree_leaves, tree_map

OnTasks: TypeAlias = Callable[[TaskBatch, int], Tree]
"""``(tasks, outer step) -> tree of tensors``."""


def replayed(function: OnTasks, device: torch.device, *, steady_from: int | None) -> OnTasks:
    """The function, recorded as a CUDA graph for each shape of its tasks and then replayed.

    A meta-gradient is thousands of small kernels, and a CPU takes longer to start one than the GPU to run it. Whatever
    else the function reads must stay where it is in memory; its results are copies. On another device, or where it is
    not steady, it is the function itself; and one that cannot be recorded, because it looks at a value on the way,
    runs as it is, which is said once.

    Args:
      steady_from: the outer step from which on the function does the same at every step; None for never.
    """
    if device.type != "cuda" or steady_from is None:
        return function
    recorded: dict[Any, _Recording | None] = {}

    def call(tasks: TaskBatch, step: int) -> Tree:
        if step < steady_from:
            return function(tasks, step)
        leaves = tree_leaves(tasks)
        shapes = tuple((leaf.shape, leaf.dtype) if leaf is not None else None for leaf in leaves)
        if shapes not in recorded:
            with torch.cuda.device(device):
                recorded[shapes] = _recorded(function, tasks, step)
        recording = recorded[shapes]
        return function(tasks, step) if recording is None else recording(leaves)

    return call


class _Recording:
    """A CUDA graph with the places that its tasks go to."""

    def __init__(self, function: OnTasks, tasks: TaskBatch, step: int) -> None:
        self._places = tree_map(lambda leaf: None if leaf is None else leaf.clone(), tasks)
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):  # libraries set themselves up, which a graph must not hold
                function(self._places, step)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        # Only this thread: the next step's tasks are built by another one meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._results = function(self._places, step)

    def __call__(self, leaves: list[Any]) -> Tree:
        for place, leaf in zip(tree_leaves(self._places), leaves, strict=True):
            if leaf is not None:
                place.copy_(leaf)
        self._graph.replay()
        return tree_map(torch.clone, self._results)


def _recorded(function: OnTasks, tasks: TaskBatch, step: int) -> _Recording | None:
    try:
        return _Recording(function, tasks, step)
    except torch.OutOfMemoryError as error:
        raise ConfigError(_on_memory(function, tasks, step)) from error
    except RuntimeError as error:
        warn_once(f"The GPU's work is not recorded and replayed ({first_line(error)[:160]}).")
        torch.cuda.synchronize()
        return None


def _on_memory(function: OnTasks, tasks: TaskBatch, step: int) -> str:
    """What to say of a chunk that does not fit: how much one task needs."""
    num_tasks = len(tree_leaves(tasks)[0])
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        function(tree_index(tasks, slice(0, 1)), step)
    except torch.OutOfMemoryError:
        return (
            f"one task does not fit into the {total / 2**30:.0f} GiB of this GPU. Take a smaller model, smaller images "
            "or fewer queries."
        )
    one = torch.cuda.max_memory_allocated() - before
    if num_tasks == 1:
        return f"one task needs {one / 2**30:.1f} GiB and more to be recorded, and this GPU has {total / 2**30:.0f}."
    room = max(1, min(int(0.8 * (total - before) / one), num_tasks - 1))
    return (
        f"a chunk of {num_tasks} tasks does not fit into the {total / 2**30:.0f} GiB of this GPU, and one task needs "
        f"{one / 2**30:.1f} GiB. Lower --reduction-chunk to {room} or less."
    )
