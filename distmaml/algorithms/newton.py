"""A step of Hessian-free optimisation: along the Newton direction, as far as a line search lets it.

Martens (2010), "Deep learning via Hessian-free optimization", https://icml.cc/Conferences/2010/papers/458.pdf.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from distmaml.conjugate_gradient import conjugate_gradient, tree_axpy, tree_dot
from distmaml.inner import Params

LINE_SEARCH = (1.0, 0.5, 0.25, 0.125, 0.0625)
"""Lengths that are tried, the longest first."""
SUFFICIENT = 1e-4
"""Share of the decrease that the gradient promises which a step must reach (Armijo)."""


def newton_step(
    value_of: Callable[[Params], Tensor],
    params: Params,
    grads: Params,
    hessian: Callable[[Params], Params],
    num_cg_steps: int,
) -> Params:
    """Where the step leads; the same parameters if no length of it is enough of a decrease.

    The direction solves ``H d = g`` as far as conjugate gradients come; it is the gradient where the curvature along
    that is not positive.

    Args:
      value_of: what is to be minimised.
      grads: g, its gradient at `params`.
      hessian: ``v -> H v``, its Hessian there.
      num_cg_steps: steps of conjugate gradients at most.
    """
    value, direction = value_of(params), conjugate_gradient(hessian, grads, num_cg_steps)
    promised, length = tree_dot(grads, direction), torch.zeros_like(value)
    for tried in LINE_SEARCH:
        there = value_of(tree_axpy(torch.full_like(value, -tried), direction, params))
        enough = there <= value - SUFFICIENT * tried * promised
        length = torch.where((length == 0) & enough & (promised > 0), tried, length)
    moved: Params = tree_axpy(-length, direction, params)
    return moved
