"""Meta-SGD: an inner learning rate for every single parameter is learned beside the initialisation.

Li, Zhou, Chen, Li (2017), "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning",
https://arxiv.org/abs/1707.09835.
"""

from typing import NamedTuple

import torch

from distmaml.algorithms import Algorithm
from distmaml.algorithms.learned_rule import by_learned_rule
from distmaml.algorithms.passes import check_rate
from distmaml.inner import Params, differentiable
from distmaml.objectives import Objective
from distmaml.trees import tree_map


class MetaSgdParams(NamedTuple):
    """What Meta-SGD learns: `inner_lr` has a rate for each entry of `params`."""

    params: Params
    inner_lr: Params


def meta_sgd(objective: Objective, *, inner_lr: float, num_inner_steps: int) -> Algorithm:
    """Meta-SGD (Li et al., 2017).

    ::

        phi_{k+1} = phi_k - alpha * grad L_support(phi_k)   (alpha shaped like phi, the product entry by entry)
        meta-gradient = d L_query(phi_K) / d (theta, alpha), K = num_inner_steps; 1 in the paper

    Args:
      inner_lr: the first value of every rate; the paper draws them at random.

    Raises:
      ConfigError: no inner step, no rate above 0.
    """
    check_rate(inner_lr)

    def step(rates: Params, params: Params, grads: Params, k: int) -> Params:
        return {name: p - rates[name] * grads[name] for name, p in params.items()}

    return by_learned_rule(
        objective, MetaSgdParams, differentiable(step), num_inner_steps,
        init_rule=lambda params: tree_map(lambda p: torch.full_like(p, inner_lr), params),
    )  # fmt: skip
