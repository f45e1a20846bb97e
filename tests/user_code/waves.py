"""A user's own model, objective and tasks. Nothing of distmaml was changed for them.

python jobs/train.py sinusoid-maml-5s --tasks user_code.waves:SquareWaves --model user_code.waves:network \
    --model-arguments width 32 --objective user_code.waves:robust_regression
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distmaml.episodes import Batch, Episode, TaskBatch, fold_in, random_uniform, task_keys
from distmaml.objectives import Objective, objective


class SquareWaves:
    """Square waves of another height and period in each task; task i depends on (seed, split, i) alone."""

    def __init__(self, *, split: str, seed: int, num_shots: int = 10, num_queries: int = 10) -> None:
        self.split, self.seed, self.num_shots, self.num_queries = split, seed, num_shots, num_queries

    def sample(self, indices: Sequence[int]) -> TaskBatch:
        keys = task_keys(self.seed, self.split, indices)
        height, period = torch.split(random_uniform(fold_in(keys, 0), 2) + 0.5, 1, dim=-1)
        x = random_uniform(fold_in(keys, 1), self.num_shots + self.num_queries) * 4 - 2
        y = height * torch.sign(torch.sin(2 * torch.pi * x / period))
        pairs = torch.stack([x, y]).unsqueeze(-1)  # [2, num_tasks, num_samples, 1]
        support, query = torch.split(pairs, [self.num_shots, self.num_queries], dim=2)
        return Episode(Batch(*support), Batch(*query), fold_in(keys, 2))


def network(*, width: int = 32) -> nn.Module:
    """Any differentiable module will do."""
    return nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))


def robust_regression(model: nn.Module) -> Objective:
    """A loss that grows like the square near zero and like the distance far away, and a metric beside it."""

    def loss(values: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        error = values - targets
        return torch.sqrt(1 + error.square()).mean() - 1, {"within_half": (error.abs() < 0.5).to(error.dtype).mean()}

    return objective(model, loss, metrics=("within_half",))
