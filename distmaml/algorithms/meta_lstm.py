"""The LSTM meta-learner: the update rule is a recurrent network whose cell state is the learner's parameters.

Ravi, Larochelle (2017), "Optimization as a Model for Few-Shot Learning", https://openreview.net/forum?id=rJY0-Kcll.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vjp
from torch.nn import functional as F

from distmaml.algorithms import Algorithm
from distmaml.algorithms.passes import check_steps, halves, loss_gradient, predict, query_gradient, uniform
from distmaml.episodes import Batch, Episode
from distmaml.errors import ConfigError
from distmaml.inner import Metrics, Params, last
from distmaml.objectives import Moment, Objective
from distmaml.trees import tree_add, tree_leaves, tree_map

SCALE = 10.0
"""p of the preprocessing of gradients and losses (Andrychowicz et al., 2016)."""


class MetaLstmParams(NamedTuple):
    """What is learned: the initial cell state, which is the learner's initialisation, and the recurrent rule."""

    params: Params
    rule: Params


class _Memory(NamedTuple):
    """What the rule remembers of each parameter: the first layer's state, and the gates of the step before."""

    hidden: Tensor  # [num_params, hidden_size]
    cell: Tensor  # [num_params, hidden_size]
    forget: Tensor  # [num_params]
    input: Tensor  # [num_params]


def meta_lstm(objective: Objective, *, num_inner_steps: int, hidden_size: int = 20) -> Algorithm:
    """The LSTM meta-learner (Ravi and Larochelle, 2017).

    ::

        h_k = LSTM(preprocessed gradient and loss)                            (for each parameter, weights shared)
        f_k = sigmoid(w_f . [h_k, phi_k, f_{k-1}] + b_f),  i_k = sigmoid(w_i . [h_k, phi_k, i_{k-1}] + b_i)
        phi_{k+1} = f_k * phi_k - i_k * grad L_support(phi_k)
        meta-gradient = d L_query(phi_K) / d (theta, rule), K = num_inner_steps

    An approximation, the paper's own: the inner gradients and losses are taken for constants, so there is no second
    derivative. The forget gate starts near 1 and the input gate near 0.01: gradient descent.

    Args:
      hidden_size: of the first layer.

    Raises:
      ConfigError: no inner step, an empty first layer.
    """
    check_steps(num_inner_steps)
    if hidden_size < 1:
        raise ConfigError(f"hidden_size={hidden_size} must be 1 or more.")

    def init(params: Params, generator: torch.Generator) -> MetaLstmParams:
        like = tree_leaves(params)[0]

        def draw(low: float, high: float, *shape: int) -> Tensor:
            return uniform(low, high, shape, like, generator)

        bound = hidden_size**-0.5
        rule = {
            "lstm_input": draw(-bound, bound, 4 * hidden_size, 4),
            "lstm_hidden": draw(-bound, bound, 4 * hidden_size, hidden_size),
            "lstm_bias": draw(-bound, bound, 4 * hidden_size),
            "forget_weight": draw(-0.01, 0.01, hidden_size + 2),
            "forget_bias": draw(4, 6),
            "input_weight": draw(-0.01, 0.01, hidden_size + 2),
            "input_bias": draw(-5, -4),
        }
        return MetaLstmParams(params, rule)

    def forget_all(like: Tensor) -> _Memory:
        zeros = like.new_zeros(len(like))
        wide = zeros.unsqueeze(-1).expand(-1, hidden_size)
        return _Memory(wide, wide, zeros, zeros)

    def step(rule: Params, phi: Tensor, memory: _Memory, grads: Tensor, loss: Tensor) -> tuple[Tensor, _Memory]:
        """One inner step of all parameters, ``[num_params]``."""
        seen = torch.cat([_preprocessed(grads), _preprocessed(loss).expand(len(grads), -1), memory.hidden], -1)
        weight = torch.cat([rule["lstm_input"], rule["lstm_hidden"]], -1)
        enter, keep, candidate, show = F.linear(seen, weight, rule["lstm_bias"]).chunk(4, -1)
        cell = keep.sigmoid() * memory.cell + enter.sigmoid() * candidate.tanh()
        hidden = show.sigmoid() * cell.tanh()

        def gate(name: str, before: Tensor) -> Tensor:
            weight = rule[f"{name}_weight"]
            from_hidden = hidden @ weight[:hidden_size]
            return (from_hidden + weight[-2] * phi + weight[-1] * before + rule[f"{name}_bias"]).sigmoid()

        forget, input_ = gate("forget", memory.forget), gate("input", memory.input)
        return forget * phi - input_ * grads, _Memory(hidden, cell, forget, input_)

    def walk(
        params: Params, support: Batch, num_steps: int, key: Tensor | None,
        take: Callable[[Tensor, _Memory, Tensor, Tensor], tuple[Tensor, _Memory]],
    ) -> Iterator[Params]:  # fmt: skip
        phi, memory = _flat(params), forget_all(_flat(params))
        yield params
        for k in range(num_steps):
            grads, (loss, _) = loss_gradient(objective, _like(params, phi), support, Moment(k, key))
            phi, memory = take(phi, memory, _flat(grads), loss)
            yield _like(params, phi)

    def adapt(
        meta: MetaLstmParams, support: Batch, num_steps: int | None = None, key: Tensor | None = None
    ) -> list[Params]:
        steps = num_inner_steps if num_steps is None else num_steps
        return list(walk(meta.params, support, steps, key, partial(step, meta.rule)))

    def meta_grad(meta: MetaLstmParams, episode: Episode, outer_step: int) -> tuple[MetaLstmParams, Metrics]:
        support_key, query_key = halves(episode.key)
        pulls: list[Callable[[Any], tuple[Params, Tensor, _Memory]]] = []

        def take(phi: Tensor, memory: _Memory, grads: Tensor, loss: Tensor) -> tuple[Tensor, _Memory]:
            def go(rule: Params, phi: Tensor, memory: _Memory) -> tuple[Tensor, _Memory]:
                return step(rule, phi, memory, grads, loss)

            (moved, remembered), pull, *_ = vjp(go, meta.rule, phi, memory)
            pulls.append(pull)
            return moved, remembered

        phi = last(walk(meta.params, episode.support, num_inner_steps, support_key, take))
        query_grads, metrics = query_gradient(objective, phi, episode.query, num_inner_steps, query_key)
        of_phi = _flat(query_grads)
        of_memory, of_rule = tree_map(torch.zeros_like, (forget_all(of_phi), meta.rule))
        while pulls:  # from the last step on, each let go of once it has been used
            rule_part, of_phi, of_memory = pulls.pop()((of_phi, of_memory))
            of_rule = tree_add(of_rule, rule_part)
        return MetaLstmParams(_like(meta.params, of_phi), of_rule), metrics

    return Algorithm(init, adapt, predict(objective), meta_grad, steady_from=0)


def _preprocessed(values: Tensor) -> Tensor:
    """Magnitude and sign of numbers of any size, ``[*values, 2]`` (Ravi and Larochelle, 2017, section 3.4).

    ::

        (log|x| / p, sign(x))  where |x| >= e^-p,  else (-1, e^p x)
    """
    magnitude = values.abs()
    large = magnitude >= math.exp(-SCALE)
    log = magnitude.clamp_min(torch.finfo(values.dtype).tiny).log() / SCALE
    ones = torch.ones_like(values)
    return torch.stack(
        [torch.where(large, log, -ones), torch.where(large, values.sign(), values * math.exp(SCALE))], -1
    )


def _flat(params: Params) -> Tensor:
    return torch.cat([leaf.flatten() for leaf in params.values()])


def _like(params: Params, flat: Tensor) -> Params:
    pieces = torch.split(flat, [leaf.numel() for leaf in params.values()])
    return {name: piece.view_as(params[name]) for name, piece in zip(params, pieces, strict=True)}
