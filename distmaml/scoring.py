"""How good an algorithm is on new tasks: adapt, predict the query set, and say how sure the mean is."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.func import vmap

from distmaml.algorithms import Algorithm, MetaParams
from distmaml.engine import stack_over_tasks, warn_once
from distmaml.episodes import Episode, TaskBatch
from distmaml.errors import first_line
from distmaml.objectives import Objective
from distmaml.trees import Tree, tree_index, tree_leaves, tree_map

SAMPLES_AT_ONCE = 128
"""Of a task in one pass where each query item has the whole support set beside it. They bound the memory: 20 episodes
side by side go through the model as 2,560 samples, however many queries they ask."""

MOST_INDUCTIVE_STEPS = 3
"""Inner steps after each of which the inductive figure is taken. It costs a pass for each query item."""

Scores: TypeAlias = dict[str, Tensor]
"""Metric -> one value for each of the `scored_steps`, ``[num_scored]``; over tasks ``[num_tasks, num_scored]``."""


class Interval(NamedTuple):
    """A mean with the half width of its 95 % interval."""

    mean: float
    half_width: float


Intervals: TypeAlias = dict[str, dict[str, dict[int, Interval]]]
"""Batch-norm mode -> metric -> inner step, 0 being before adaptation -> the interval after it, in order."""


class Evaluated(NamedTuple):
    """A model's scores on the episodes of a split.

    Attributes:
      step: outer steps that the model was trained for.
      scores: over all episodes.
      machine: what computed them, from `machine_of`.
    """

    step: int
    scores: Intervals
    machine: Mapping[str, Any]


def score(
    algorithm: Algorithm,
    objective: Objective,
    meta_params: MetaParams,
    tasks: TaskBatch,
    *,
    num_steps: int,
    inductive: bool,
    vectorize: bool = True,
) -> dict[str, Scores]:
    """Query loss and metrics of each task after the `scored_steps`; nothing random happens.

    Two figures, because batch statistics see whatever is predicted together. "transductive" predicts the query set at
    once, as the MAML papers do, so that a query item profits from the others. "inductive" predicts each item with the
    support set alone, or by running statistics where the algorithm gathers them. For a module without batch statistics
    both are the same.

    Returns:
      Batch-norm mode -> metric -> ``[num_tasks, num_scored]``, `num_scored` being the number of `scored_steps`.
    """

    def of_task(task: Episode) -> dict[str, Scores]:
        states = algorithm.adapt(meta_params, task.support, num_steps=num_steps)
        return {
            mode: _stack([
                _judge(objective, predict(states[step], task), task) for step in scored_steps(mode, len(states) - 1)
            ])
            for mode, predict in modes.items()
        }  # fmt: skip

    def predict_all(state: Tree, task: Episode) -> Tree:
        return algorithm.predict(meta_params, state, task.query.inputs)

    def predict_each(state: Tree, task: Episode) -> Tree:
        return predict_one_by_one(algorithm, meta_params, state, task.support.inputs, task.query.inputs)

    modes = {"transductive": predict_all, **({"inductive": predict_each} if inductive else {})}
    found: dict[str, Scores] = stack_over_tasks(
        algorithm.predict, of_task, tasks._replace(key=None), vectorize=vectorize
    )
    return found


def scored_steps(mode: str, num_steps: int) -> list[int]:
    """The inner steps after which a figure is taken: all, but of many the inductive one before, after the first and
    after the last alone."""
    many = mode == "inductive" and num_steps > MOST_INDUCTIVE_STEPS
    return [0, 1, num_steps] if many else list(range(num_steps + 1))


def interval(values: Tensor | Sequence[float]) -> Interval:
    """Mean over episodes and its normal 95 % interval, ``1.96 * s / sqrt(n)``, as the few-shot papers print it."""
    sample = torch.as_tensor(values, dtype=torch.float64)
    half_width = 1.96 * float(sample.std(correction=1)) / math.sqrt(len(sample)) if len(sample) > 1 else math.inf
    return Interval(float(sample.mean()), half_width)


def by_step(metric: str, intervals: Mapping[int, Interval]) -> dict[str, float]:
    """The last mean under the name of the metric, and that after each inner step, if there are any, under
    ``METRIC_step_K``."""
    steps = {f"{metric}_step_{k}": value.mean for k, value in intervals.items()} if len(intervals) > 1 else {}
    return {**steps, metric: after_last(intervals).mean}


def after_last(intervals: Mapping[int, Interval]) -> Interval:
    """What an algorithm comes to: after its last inner step."""
    return intervals[max(intervals)]


def predict_one_by_one(
    algorithm: Algorithm, meta_params: MetaParams, state: Tree, support_inputs: Tree, query_inputs: Tree
) -> Tree:
    """Outputs for each query input, predicted together with the support inputs at most.

    Args:
      state: adapted to the support set, from `algorithm.adapt`.
      support_inputs: leaves ``[num_support, *input_shape]``.
      query_inputs: leaves ``[num_queries, *input_shape]``; none is fine.

    Returns:
      Leaves ``[num_queries, *output_shape]``.
    """

    def predict(item: Tree) -> Tree:
        together = tree_map(lambda s, q: torch.cat([s, q.unsqueeze(0)]), support_inputs, item)
        return tree_map(lambda leaf: leaf[-1], algorithm.predict(meta_params, state, together))

    if algorithm.predict_alone is not None:
        return algorithm.predict_alone(meta_params, state, query_inputs)
    size = len(tree_leaves(query_inputs)[0])
    if size == 0:
        return tree_map(lambda leaf: leaf[:0], algorithm.predict(meta_params, state, support_inputs))
    try:
        together = len(tree_leaves(support_inputs)[0]) + 1
        return vmap(predict, chunk_size=max(1, SAMPLES_AT_ONCE // together))(query_inputs)
    except torch.OutOfMemoryError:
        raise
    # A recurrent cell, say, has no batching rule, for which torch has no narrower error. Any other comes again below.
    except RuntimeError as error:
        warn_once(f"Predicting one query item after the other in the inductive test ({first_line(error)[:160]}).")
        outputs = [predict(tree_index(query_inputs, i)) for i in range(size)]
        return tree_map(lambda *leaves: torch.stack(leaves), *outputs)


def _judge(objective: Objective, outputs: Tree, task: Episode) -> Scores:
    loss, metrics = objective.loss(outputs, task.query.targets)
    return {"query_loss": loss, **{f"query_{name}": metric for name, metric in metrics.items()}}


def _stack(states: Sequence[Scores]) -> Scores:
    stacked: Scores = tree_map(lambda *values: torch.stack(values), *states)
    return stacked
