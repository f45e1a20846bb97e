"""Meta-learning algorithms: small tuples of pure functions of one task.

An algorithm returns a gradient, not a loss to differentiate: the exact meta-gradient is an adjoint recursion
(inner.py), and first-order methods are the gradient of no loss at all.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch

from distmaml.episodes import Episode
from distmaml.inner import Metrics, Params
from distmaml.trees import Tree

MetaParams: TypeAlias = Tree
"""What is meta-learned: an initialisation, and whatever an algorithm learns beside it."""
Adapted: TypeAlias = Any
"""An algorithm's state after some inner steps."""


class Algorithm(NamedTuple):
    """Pure functions of one task, free of devices, ranks, data sources and logging.

    Attributes:
      init: ``(params, generator) -> meta_params``; adds whatever else is meta-learned.
      adapt: ``(meta_params, support, num_steps=None, key=None) -> [state_0, ..., state_K]``; the only inner loop, for
        training and for test, with any number of steps (None: as many as in training).
      predict: ``(meta_params, adapted, inputs) -> outputs``: what an adapted state says of new inputs.
      meta_grad: ``(meta_params, episode, step) -> (meta_grads, metrics)``; `meta_grads` is shaped like `meta_params`,
        `metrics` are scalars to be averaged over tasks, `step` is the outer step.
      steady: whether `meta_grad` does the same at every outer step, so that a GPU may record it once and replay it.
    """

    init: Callable[[Params, torch.Generator], MetaParams]
    adapt: Callable[..., list[Adapted]]
    predict: Callable[[MetaParams, Adapted, Tree], Any]
    meta_grad: Callable[[MetaParams, Episode, int], tuple[MetaParams, Metrics]]
    steady: bool = False


ALGORITHMS: dict[str, str] = {
    "maml": "distmaml.algorithms.maml:maml",
    "fomaml": "distmaml.algorithms.maml:fomaml",
    "anil": "distmaml.algorithms.maml:anil",
}
"""Name -> where its factory is: ``factory(objective, **options) -> Algorithm``."""
