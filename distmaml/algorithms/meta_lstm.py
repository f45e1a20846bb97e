"""The LSTM meta-learner: the update rule is a recurrent network whose cell state is the learner's parameters.

Ravi, Larochelle (2017), "Optimization as a Model for Few-Shot Learning", https://openreview.net/forum?id=rJY0-Kcll.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from distmaml.algorithms import Algorithm
from distmaml.algorithms.passes import check_steps, halves, loss_gradient, predict, query_gradient
from distmaml.algorithms.recurrent_rule import Memory, Pull, blank, first_rule, step, step_vjp
from distmaml.episodes import Batch, Episode
from distmaml.errors import ConfigError
from distmaml.inner import Metrics, Params, last
from distmaml.objectives import Moment, Objective
from distmaml.trees import tree_add, tree_leaves, tree_map

ALIGNED = 16
"""Rows of so many numbers start where a processor loads them at once: products of others may take twice as long."""

Take: TypeAlias = Callable[[Tensor, Memory, Tensor, Tensor], tuple[Tensor, Memory]]
"""(phi, memory, gradient, loss) -> (phi, memory): a step by a rule."""


class MetaLstmParams(NamedTuple):
    """What is learned: the initial cell state, which is the learner's initialisation, and the recurrent rule."""

    params: Params
    rule: Params


def meta_lstm(objective: Objective, *, num_inner_steps: int, hidden_size: int = 20) -> Algorithm:
    """The LSTM meta-learner (Ravi and Larochelle, 2017).

    ::

        phi_{k+1} = f_k * phi_k - i_k * grad L_support(phi_k),  f_k, i_k by the rule              (recurrent_rule.py)
        meta-gradient = d L_query(phi_K) / d (theta, rule), K = num_inner_steps

    An approximation, the paper's own: the inner gradients and losses are taken for constants, so there is no second
    derivative. The forget gate starts near 1 and the input gate near 0.01: gradient descent.

    Args:
      hidden_size: of the LSTM that sees gradient and loss.

    Raises:
      ConfigError: no inner step, an LSTM without a hidden unit.
    """
    check_steps(num_inner_steps)
    if hidden_size < 1:
        raise ConfigError(f"hidden_size={hidden_size} must be 1 or more.")

    def init(params: Params, generator: torch.Generator) -> MetaLstmParams:
        return MetaLstmParams(params, first_rule(hidden_size, tree_leaves(params)[0], generator))

    def walk(meta: MetaLstmParams, support: Batch, num_steps: int, key: Tensor | None, take: Take) -> Iterator[Params]:
        phi = _flat(meta.params)
        memory = blank(meta.rule, phi)
        yield meta.params
        for k in range(num_steps):
            grads, (loss, _) = loss_gradient(objective, _like(meta.params, phi), support, Moment(k, key))
            phi, memory = take(phi, memory, _flat(grads), loss)
            yield _like(meta.params, phi)

    def adapt(
        meta: MetaLstmParams, support: Batch, num_steps: int | None = None, key: Tensor | None = None
    ) -> list[Params]:
        steps = num_inner_steps if num_steps is None else num_steps
        return list(walk(meta, support, steps, key, partial(step, meta.rule)))

    def meta_grad(meta: MetaLstmParams, episode: Episode, outer_step: int) -> tuple[MetaLstmParams, Metrics]:
        support_key, query_key = halves(episode.key)
        pulls: list[Pull] = []

        def take(phi: Tensor, memory: Memory, grads: Tensor, loss: Tensor) -> tuple[Tensor, Memory]:
            after, pull = step_vjp(meta.rule, phi, memory, grads, loss)
            pulls.append(pull)
            return after

        phi = last(walk(meta, episode.support, num_inner_steps, support_key, take))
        query_grads, metrics = query_gradient(objective, phi, episode.query, num_inner_steps, query_key)
        of_phi = _flat(query_grads)
        of_memory, of_rule = tree_map(torch.zeros_like, (blank(meta.rule, of_phi), meta.rule))
        while pulls:  # from the last step on, each let go of once it has been used
            rule_part, of_phi, of_memory = pulls.pop()(of_phi, of_memory)
            of_rule = tree_add(of_rule, rule_part)
        return MetaLstmParams(_like(meta.params, of_phi), of_rule), metrics

    return Algorithm(init, adapt, predict(objective), meta_grad, steady_from=0)


def _flat(params: Params) -> Tensor:
    """All parameters in one row, filled up with zeros that the rule leaves alone: torch multiplies such rows faster."""
    flat = torch.cat([leaf.flatten() for leaf in params.values()])
    return F.pad(flat, (0, -len(flat) % ALIGNED))


def _like(params: Params, flat: Tensor) -> Params:
    sizes = [leaf.numel() for leaf in params.values()]
    pieces = torch.split(flat[: sum(sizes)], sizes)
    return {name: piece.view_as(params[name]) for name, piece in zip(params, pieces, strict=True)}
