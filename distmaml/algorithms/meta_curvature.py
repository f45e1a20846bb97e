"""Meta-Curvature: matrices that transform the gradient are learned beside the initialisation.

Park, Oliva (2019), "Meta-Curvature", https://arxiv.org/abs/1902.03356.
"""

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from distmaml.algorithms import Algorithm
from distmaml.algorithms.learned_rule import by_learned_rule
from distmaml.algorithms.passes import check_rate
from distmaml.inner import Params, differentiable
from distmaml.objectives import Objective

Curvature: TypeAlias = dict[str, tuple[Tensor, ...]]
"""For each parameter a square matrix for each of its modes."""


class MetaCurvatureParams(NamedTuple):
    """What Meta-Curvature learns."""

    params: Params
    curvature: Curvature


def meta_curvature(objective: Objective, *, inner_lr: float, num_inner_steps: int) -> Algorithm:
    """Meta-Curvature in its form MC2 (Park and Oliva, 2019).

    ::

        phi_{k+1} = phi_k - inner_lr * MC(grad L_support(phi_k))
        MC(G) = G x_1 M_out x_2 M_in x_3 M_filter,  the mode products of G [out, in, height * width]
        meta-gradient = d L_query(phi_K) / d (theta, M), K = num_inner_steps

    All matrices start as the identity, which is MAML. A linear layer's weight has the first two modes, a bias the
    first. The arguments are those of `maml`.

    Raises:
      ConfigError: no inner step, no rate above 0.
    """
    check_rate(inner_lr)

    def step(curvature: Curvature, params: Params, grads: Params, k: int) -> Params:
        return {name: p - inner_lr * transformed(grads[name], curvature[name]) for name, p in params.items()}

    return by_learned_rule(
        objective, MetaCurvatureParams, differentiable(step), num_inner_steps,
        init_rule=lambda params: {
            name: tuple(torch.eye(size, dtype=p.dtype, device=p.device) for size in _modes(p).shape)
            for name, p in params.items()
        },
    )  # fmt: skip


def transformed(gradient: Tensor, matrices: tuple[Tensor, ...]) -> Tensor:
    """The product of a gradient with a matrix along each of its modes: ``sum_j M[i, j] G[.., j, ..]``."""
    result = _modes(gradient)
    for mode, matrix in enumerate(matrices):
        result = torch.tensordot(matrix, result, dims=([1], [mode])).movedim(0, mode)
    return result.reshape(gradient.shape)


def _modes(tensor: Tensor) -> Tensor:
    """``[out, in, all filter positions]`` of a convolution's weight, else the tensor as it is."""
    return tensor.flatten(2) if tensor.ndim > 3 else tensor
