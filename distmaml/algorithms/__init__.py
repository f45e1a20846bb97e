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


class Stateful(NamedTuple):
    """Meta-parameters of which a part is gathered and not descended on, like running statistics.

    Attributes:
      learned: what the outer optimiser moves. In what `meta_grad` returns: its gradient.
      state: what it does not see. In what `meta_grad` returns: what the task makes of it; the next state is the mean of
        that over the tasks of the step.
    """

    learned: Tree
    state: Tree


def learned_part(meta_params: MetaParams) -> Tree:
    """What the outer optimiser moves."""
    return meta_params.learned if isinstance(meta_params, Stateful) else meta_params


class Algorithm(NamedTuple):
    """Pure functions of one task, free of devices, ranks, data sources and logging.

    Attributes:
      init: ``(params, generator) -> meta_params``; adds whatever else is meta-learned.
      adapt: ``(meta_params, support, num_steps=None, key=None) -> [state_0, ..., state_K]``; the only inner loop, for
        training and for test, with any number of steps (None: as many as in training).
      predict: ``(meta_params, adapted, inputs) -> outputs``: what an adapted state says of new inputs.
      meta_grad: ``(meta_params, episode, step) -> (meta_grads, metrics)``; `meta_grads` is shaped like `meta_params`,
        `metrics` are scalars to be averaged over tasks, `step` is the outer step.
      steady_from: the outer step from which on `meta_grad` does the same at every step, so that a GPU may record it
        once and replay it; None where there is no such step.
      descends: whether there are inner steps; False: `adapt` returns one state, however many are asked for.
      predict_alone: like `predict`, without any input having a say in what becomes of another; None where batch
        statistics need company, or nothing depends on it.
    """

    init: Callable[[Params, torch.Generator], MetaParams]
    adapt: Callable[..., list[Adapted]]
    predict: Callable[[MetaParams, Adapted, Tree], Any]
    meta_grad: Callable[[MetaParams, Episode, int], tuple[MetaParams, Metrics]]
    steady_from: int | None = None
    descends: bool = True
    predict_alone: Callable[[MetaParams, Adapted, Tree], Any] | None = None


ALGORITHMS: dict[str, str] = {
    "maml": "distmaml.algorithms.maml:maml",
    "fomaml": "distmaml.algorithms.maml:fomaml",
    "anil": "distmaml.algorithms.anil:anil",
    "boil": "distmaml.algorithms.boil:boil",
    "reptile": "distmaml.algorithms.reptile:reptile",
    "meta_sgd": "distmaml.algorithms.meta_sgd:meta_sgd",
    "maml_plus_plus": "distmaml.algorithms.maml_plus_plus:maml_plus_plus",
    "imaml": "distmaml.algorithms.imaml:imaml",
    "cavia": "distmaml.algorithms.cavia:cavia",
    "meta_curvature": "distmaml.algorithms.meta_curvature:meta_curvature",
    "proto_maml": "distmaml.algorithms.proto_maml:proto_maml",
    "meta_lstm": "distmaml.algorithms.meta_lstm:meta_lstm",
    "prototypical_networks": "distmaml.algorithms.metric:prototypical_networks",
    "matching_networks": "distmaml.algorithms.metric:matching_networks",
    "fine_tuning": "distmaml.algorithms.fine_tuning:fine_tuning",
}
"""Name -> where its factory is: ``factory(objective, **options) -> Algorithm``."""
