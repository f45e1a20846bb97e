"""Regression on sine waves.

Finn, Abbeel, Levine (2017), https://arxiv.org/abs/1703.03400, section 5.1.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distmaml.episodes import Batch, Episode, TaskBatch, fold_in, random_uniform, task_keys


class SinusoidTasks:
    """y = amplitude * sin(x - phase): amplitude in [0.1, 5], phase in [0, pi], x in [-5, 5], all uniform.

    Leaves are float64 ``[num_tasks, num_samples, 1]``. The phase is subtracted, as in the paper's code.
    """

    def __init__(self, *, split: str, seed: int, num_shots: int, num_queries: int) -> None:
        self.split, self.seed = split, seed
        self.num_shots, self.num_queries = num_shots, num_queries

    def sample(self, indices: Sequence[int]) -> TaskBatch:
        """The tasks with these indices; pure in (seed, split, index)."""
        keys = task_keys(self.seed, self.split, indices)
        amplitude, phase = self.waves(indices).unsqueeze(-1).unbind(1)
        x = random_uniform(fold_in(keys, 1), self.num_shots + self.num_queries) * 10 - 5
        y = amplitude * torch.sin(x - phase)
        x, y = x.unsqueeze(-1), y.unsqueeze(-1)
        support, query = slice(None, self.num_shots), slice(self.num_shots, None)
        return Episode(Batch(x[:, support], y[:, support]), Batch(x[:, query], y[:, query]), fold_in(keys, 2))

    def waves(self, indices: Sequence[int]) -> Tensor:
        """Amplitude and phase of each task, ``[num_tasks, 2]``."""
        unit = random_uniform(fold_in(task_keys(self.seed, self.split, indices), 0), 2)
        return unit * torch.tensor([4.9, math.pi], dtype=torch.float64) + torch.tensor([0.1, 0.0], dtype=torch.float64)
