"""A model as a body that makes features and a head that tells classes apart."""

import torch
from torch import Tensor, nn

from distmaml.errors import ConfigError
from distmaml.inner import Params
from distmaml.objectives import Objective


def head_of(objective: Objective, params: Params) -> Params:
    """The parameters of the last layer, by their full names."""
    return {name: p for name, p in params.items() if name.startswith(objective.head + ".")}


def body_of(objective: Objective, params: Params, algorithm: str) -> Params:
    """All others.

    Raises:
      ConfigError: there is none, so that the algorithm has nothing to treat apart.
    """
    body = {name: p for name, p in params.items() if not name.startswith(objective.head + ".")}
    if not body:
        raise ConfigError(
            f"the head {objective.head!r} is the whole model, and {algorithm} treats head and body apart. Take maml, "
            "or a model with a layer before its head."
        )
    return body


def linear_head(objective: Objective, algorithm: str, *, bias: bool = False) -> nn.Linear:
    """The head of a classifier, which says how many ways a task has.

    Args:
      bias: whether it must have one.

    Raises:
      ConfigError: it is no linear layer, or has no bias.
    """
    head = objective.model.get_submodule(objective.head)
    if not isinstance(head, nn.Linear) or (bias and head.bias is None):
        raise ConfigError(
            f"{algorithm} makes a linear classifier of each task, so the model must end in an nn.Linear"
            f"{' with a bias' if bias else ''}; its head {objective.head!r} is {head}."
        )
    return head


def one_hot(labels: Tensor, num_ways: int, like: Tensor) -> Tensor:
    """``[num_samples] -> [num_samples, num_ways]``, of the type of `like`; F.one_hot looks at values, vmap has none.

    Raises:
      ConfigError: targets that are no labels.
    """
    if labels.is_floating_point():
        raise ConfigError("prototypes and matches are of classes, and these tasks have values for targets; take maml.")
    return (labels.unsqueeze(-1) == torch.arange(num_ways, device=labels.device)).to(like.dtype)
