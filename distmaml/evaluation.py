"""Scores of a model on the episodes of a split, which the workers share out among them."""

from collections.abc import Callable
from typing import Any

import torch

from distmaml import build, collectives
from distmaml.config import Config
from distmaml.episodes import TaskDistribution, shard
from distmaml.scoring import Intervals, interval, score, scored_steps
from distmaml.trees import tree_to
from distmaml.worker import Worker

CHUNK = 20
"""Episodes side by side."""


def scores_on(
    config: Config, worker: Worker, learner: build.Learner, meta_params: Any, tasks: TaskDistribution, split: str, *,
    inductive: bool, tell: Callable[[float], None] | None = None,
) -> Intervals:  # fmt: skip
    """Scores on the first episodes of a split, which are always the same ones; every worker gets them.

    Args:
      tasks: of the split.
      tell: hears after each chunk what share of its episodes this worker has done.
    """
    num_episodes = config.evaluation.num_episodes(split)
    steps = config.evaluation.num_eval_steps if learner.algorithm.descends else 0
    modes = ["transductive", *(["inductive"] if inductive else [])]
    keys = [(mode, f"query_{name}") for mode in modes for name in ("loss", *learner.objective.metrics)]
    columns = [(*key, step) for key in keys for step in scored_steps(key[0], steps)]
    table = torch.zeros(num_episodes, len(columns), dtype=getattr(torch, config.outer.dtype), device=worker.device)
    shards = shard(num_episodes, CHUNK, worker.rank, worker.world_size)
    for number, (_, positions) in enumerate(shards, start=1):
        batch = tree_to(tasks.sample(positions), worker.device, table.dtype)
        found = score(learner.algorithm, learner.objective, meta_params, batch, num_steps=steps, inductive=inductive,
                      vectorize=learner.vectorize)  # fmt: skip
        table[positions.start : positions.stop] = torch.cat([found[mode][metric] for mode, metric in keys], 1)
        if tell is not None:
            tell(number / len(shards))
    collectives.all_reduce(table)  # every row is zero on all workers but one
    scores: Intervals = {mode: {} for mode in modes}
    for (mode, metric, step), values in zip(columns, table.T, strict=True):
        scores[mode].setdefault(metric, {})[step] = interval(values)
    return scores
