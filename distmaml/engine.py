"""Running a function of one task over a chunk of tasks: side by side where torch can, else one after the other.

Some torch operators have no batching rule under vmap and some have no forward derivative. Then the engine steps
down, says so once in the log, and stays there. The results are exact on every engine; only the speed differs.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch.func import vmap

from distmaml.episodes import TaskBatch
from distmaml.errors import first_line
from distmaml.inner import HvpMode, hvp_mode
from distmaml.trees import Tree, tree_add, tree_index, tree_leaves, tree_map

log = logging.getLogger("distmaml")


class Engine(NamedTuple):
    """How a chunk of tasks is computed."""

    vectorize: bool
    hvp: HvpMode

    def __str__(self) -> str:
        tasks = "tasks side by side" if self.vectorize else "one task after the other"
        return f"{tasks}, {'forward' if self.hvp == 'forward' else 'reverse'} over reverse"


ENGINES = (Engine(True, "forward"), Engine(True, "reverse"), Engine(False, "graph"), Engine(False, "forward"))
"""In the order in which they are tried. Side by side, forward derivatives store nothing for each task; one task after
the other, a second backward pass is the faster, and forward derivatives are for modules that have none."""

# Which engine an algorithm got along with on its module, so that those before it are tried once and not at every step.
_engines: WeakKeyDictionary[Any, Engine] = WeakKeyDictionary()


@functools.cache
def warn_once(message: str) -> None:
    """Logs a warning that this process has not logged yet."""
    log.warning(message)


def sum_over_tasks(owner: Any, function: Callable[[Any], Tree], tasks: TaskBatch, *, vectorize: bool = True) -> Tree:
    """``sum_i function(task_i)``, leaf by leaf; see `stack_over_tasks`."""
    return _run(owner, function, tasks, vectorize, _sum_side_by_side, _sum_one_by_one)


def stack_over_tasks(owner: Any, function: Callable[[Any], Tree], tasks: TaskBatch, *, vectorize: bool = True) -> Tree:
    """``[function(task_0), function(task_1), ...]``, each leaf stacked along a new first axis.

    Args:
      owner: what the choice of the engine is remembered for. Gradients and scores must not share it: a score that
        meets an operator that the gradient does not know would change the arithmetic of the training.
      function: of one `Episode`.
      tasks: leaves ``[num_tasks, ...]``.
      vectorize: False keeps to one task after the other, which is faster for convolutions on a CPU.
    """
    return _run(owner, function, tasks, vectorize, _stack_side_by_side, _stack_one_by_one)


def _run(
    owner: Any, function: Callable[[Any], Tree], tasks: TaskBatch, vectorize: bool, side_by_side: Any, one_by_one: Any
) -> Tree:
    allowed = [engine for engine in ENGINES if vectorize or not engine.vectorize]
    known = _engines.get(owner)
    first = allowed.index(known) if known in allowed else 0
    refusals: list[tuple[Engine, Exception]] = []
    for engine in allowed[first:]:
        try:
            with torch.no_grad(), hvp_mode(engine.hvp):
                result = (side_by_side if engine.vectorize else one_by_one)(function, tasks)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            refusals.append((engine, error))
            continue
        _engines[owner] = engine
        if refusals:
            reasons = "; ".join(f"not {tried}: {first_line(error)[:160]}" for tried, error in refusals)
            warn_once(f"Computing {engine} ({reasons}).")
        return result
    raise refusals[-1][1]


def _sum_side_by_side(function: Callable[[Any], Tree], tasks: TaskBatch) -> Tree:
    return tree_map(lambda leaf: leaf.sum(0), _stack_side_by_side(function, tasks))


def _stack_side_by_side(function: Callable[[Any], Tree], tasks: TaskBatch) -> Tree:
    return vmap(function, in_dims=(tree_map(lambda leaf: None if leaf is None else 0, tasks),))(tasks)


def _sum_one_by_one(function: Callable[[Any], Tree], tasks: TaskBatch) -> Tree:
    total: Tree = None
    for index in range(len(tree_leaves(tasks)[0])):
        one = function(tree_index(tasks, index))
        total = one if total is None else tree_add(total, one)
    return total


def _stack_one_by_one(function: Callable[[Any], Tree], tasks: TaskBatch) -> Tree:
    each = [function(tree_index(tasks, index)) for index in range(len(tree_leaves(tasks)[0]))]
    return tree_map(lambda *leaves: torch.stack(leaves), *each)
