"""Linear equations by conjugate gradients, on trees of tensors.

Hestenes, Stiefel (1952), "Methods of Conjugate Gradients for Solving Linear Systems",
https://doi.org/10.6028/jres.049.044.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from distmaml.trees import Tree, tree_leaves, tree_map


def conjugate_gradient(product: Callable[[Tree], Tree], target: Tree, num_steps: int) -> Tree:
    """An approximate solution x of ``A x = target``, begun at 0.

    Exact after as many steps as A has different eigenvalues, if it is symmetric and positive definite. A direction
    along which A is not positive ends it: steps from there on change nothing, and if it is the very first one, the
    result is `target`. Nothing is decided by the CPU, so that it can be vmapped and recorded.

    Args:
      product: ``v -> A v``.
      target: the right-hand side.
      num_steps: at most this many products.
    """
    solution, residual, direction = tree_map(torch.zeros_like, target), target, target
    squared = tree_dot(residual, residual)
    going = torch.ones_like(squared, dtype=torch.bool)
    for number in range(num_steps):
        along = product(direction)
        curvature = tree_dot(direction, along)
        going = going & (curvature > 0) & (squared > 0)
        if number == 0:
            solution = tree_map(lambda t, positive=going: torch.where(positive, 0.0, t), target)
        length = torch.where(going, squared / curvature, 0.0)
        solution = tree_axpy(length, direction, solution)
        residual = tree_axpy(-length, along, residual)
        before, squared = squared, tree_dot(residual, residual)
        direction = tree_axpy(torch.where(going, squared / before, 0.0), direction, residual)
    return solution


def tree_dot(a: Tree, b: Tree) -> Tensor:
    """The inner product over all leaves."""
    return torch.stack([(x * y).sum() for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True)]).sum()


def tree_axpy(factor: Tensor, x: Tree, y: Tree) -> Tree:
    """``factor * x + y``, leaf by leaf."""
    return tree_map(lambda one, other: factor * one + other, x, y)
