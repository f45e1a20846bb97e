"""MAML++: MAML with what makes it train steadily, each part a switch of its own.

Antoniou, Edwards, Storkey (2019), "How to train your MAML", https://arxiv.org/abs/1810.09502; where the paper leaves
something open, the authors' code, https://github.com/AntreasAntoniou/HowToTrainYourMAMLPytorch, is followed.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from distmaml.algorithms import Algorithm, MetaParams, Stateful
from distmaml.algorithms.norms import Norms, Statistics
from distmaml.algorithms.passes import check_rate, check_steps, halves, num_kept, query_gradient, support_loss
from distmaml.algorithms.passes import predict as predict_by_params
from distmaml.episodes import Batch, Episode
from distmaml.inner import Metrics, Params, descend, descend_vjp, differentiable, sgd
from distmaml.objectives import Moment, Objective
from distmaml.trees import Tree, tree_add, tree_map


class MamlPlusPlusParams(NamedTuple):
    """What MAML++ learns.

    Attributes:
      params: the initialisation of what the inner loop moves.
      inner_lr: a rate for each of them and each inner step, ``[num_inner_steps]``; empty without learned_rates.
      norms: scale and shift of batch norms for each inner step, ``[num_inner_steps, channels]``; empty without
        per_step_biases.
    """

    params: Params
    inner_lr: Params
    norms: Params


class MamlPlusPlusState(NamedTuple):
    """Adapted parameters of the whole model, and the running statistics that belong to their inner step."""

    params: Params
    statistics: Statistics


def maml_plus_plus(
    objective: Objective,
    *,
    inner_lr: float,
    num_inner_steps: int,
    multi_step_loss: bool = True,
    annealing_steps: int = 5000,
    learned_rates: bool = True,
    first_order_steps: int = 0,
    per_step_biases: bool = True,
    per_step_statistics: bool = False,
) -> Algorithm:
    """MAML++ (Antoniou et al., 2019); its cosine schedule is the outer loop's.

    ::

        phi_{k+1} = phi_k - alpha_k * grad L_support(phi_k, norms_k)    (alpha_k: one rate for each tensor)
        meta-gradient = d sum_{k=1..K} w_k L_query(phi_k, norms_{k-1}) / d (theta, alpha, norms), K = num_inner_steps

    The weights w begin as 1/K each, and those before the last fall linearly to 0.03/K over `annealing_steps`; from
    then on the last loss alone counts; the authors' fall once in an epoch of 500 steps. Batch norms use the statistics
    of the batch; `per_step_statistics` gathers those of the query sets besides, for `predict_alone`, where the authors'
    code takes support sets into the average too. Steps past K reuse the last rates, norms and statistics.

    Args:
      inner_lr: first value of the rates.
      first_order_steps: outer steps at the start that ignore second derivatives.

    Raises:
      ConfigError: no inner step, no rate above 0; per-step biases or statistics for a model without batch norm.
    """
    check_steps(num_inner_steps)
    check_rate(inner_lr)
    last = num_inner_steps - 1
    norms = Norms(objective, biases=per_step_biases, statistics=per_step_statistics)

    def step_by_rates(rates: Params, params: Params, grads: Params, k: int) -> Params:
        return {name: p - rates[name][min(k, last)] * grads[name] for name, p in params.items()}

    rule = differentiable(step_by_rates) if learned_rates else sgd(inner_lr)

    def init(params: Params, generator: torch.Generator) -> MetaParams:
        moved = {name: p for name, p in params.items() if name not in norms.parameters}
        rates = {name: p.new_full((num_inner_steps,), inner_lr) for name, p in moved.items()} if learned_rates else {}
        rows = {name: params[name].repeat(num_inner_steps, 1) for name in norms.parameters}
        meta = MamlPlusPlusParams(moved, rates, rows)
        return Stateful(meta, norms.first_statistics(params, num_inner_steps)) if per_step_statistics else meta

    def merge(params: Params, rows: Tree, k: int) -> Params:
        return {**params, **_row(rows, min(k, last))}

    def adapt(
        meta: MetaParams, support: Batch, num_steps: int | None = None, key: Tensor | None = None
    ) -> list[MamlPlusPlusState]:
        learned, statistics = _parts(meta)
        steps = num_inner_steps if num_steps is None else num_steps
        loss_fn = support_loss(objective, learned.params, support, key, merge=merge, context=learned.norms)
        trajectory = descend(
            loss_fn, learned.params, rule=rule, rule_params=learned.inner_lr, num_steps=steps, context=learned.norms
        )
        rows = [min(max(k - 1, 0), last) for k in range(steps + 1)]
        return [
            MamlPlusPlusState(merge(phi, learned.norms, row), _row(statistics, row))
            for phi, row in zip(trajectory, rows, strict=True)
        ]

    def meta_grad(meta: MetaParams, episode: Episode, step: int) -> tuple[MetaParams, Metrics]:
        learned, statistics = _parts(meta)
        support_key, query_key = halves(episode.key)
        loss_fn = support_loss(
            objective, learned.params, episode.support, support_key, merge=merge, context=learned.norms
        )
        trajectory, pull_back = descend_vjp(
            loss_fn, learned.params, rule=rule, rule_params=learned.inner_lr, num_steps=num_inner_steps,
            context=learned.norms, num_kept=num_kept(episode, loss_fn, num_inner_steps),
            first_order=step < first_order_steps,
        )  # fmt: skip
        weights = loss_weights(step, num_inner_steps, annealing_steps if multi_step_loss else 0)
        cotangents: list[Params | None] = [None]
        of_norms = tree_map(torch.zeros_like, learned.norms)
        for k, weight in enumerate(weights, start=1):
            whole = merge(trajectory[k], learned.norms, k - 1)
            grads, metrics = query_gradient(objective, whole, episode.query, k, query_key) if weight else ({}, {})
            cotangents.append({name: weight * grads[name] for name in learned.params} if weight else None)
            for name in learned.norms if weight else ():
                of_norms[name] = of_norms[name] + weight * _only_row(grads[name], k - 1, num_inner_steps)
        back = pull_back(cotangents)
        found = MamlPlusPlusParams(back.params, back.rule_params or {}, tree_add(back.context, of_norms))
        if not isinstance(meta, Stateful):
            return found, metrics
        seen = [
            norms.observe(merge(phi, learned.norms, k), episode.query.inputs, Moment(k + 1, query_key))
            for k, phi in enumerate(trajectory[1:])
        ]
        return Stateful(found, norms.averaged(statistics, seen)), metrics

    by_params = predict_by_params(objective)

    def predict(meta: MetaParams, state: MamlPlusPlusState, inputs: Tree) -> Tree:
        return by_params(meta, state.params, inputs)

    def predict_alone(meta: MetaParams, state: MamlPlusPlusState, inputs: Tree) -> Tree:
        return norms.predict(state.params, state.statistics, inputs)

    return Algorithm(
        init, adapt, predict, meta_grad,
        steady_from=max(annealing_steps if multi_step_loss else 0, first_order_steps),
        predict_alone=predict_alone if per_step_statistics else None,
    )  # fmt: skip


def loss_weights(step: int, num_inner_steps: int, annealing_steps: int) -> list[float]:
    """The weight of the query loss after each inner step, at an outer step; they add up to 1."""
    if step >= annealing_steps:
        return [0.0] * (num_inner_steps - 1) + [1.0]
    early = max(1 - step / annealing_steps, 0.03) / num_inner_steps
    return [early] * (num_inner_steps - 1) + [1 - early * (num_inner_steps - 1)]


def _parts(meta: MetaParams) -> tuple[MamlPlusPlusParams, Statistics]:
    return (meta.learned, meta.state) if isinstance(meta, Stateful) else (meta, {})


def _row(tree: Tree, index: int) -> Tree:
    return tree_map(lambda leaf: leaf[index], tree)


def _only_row(row: Tensor, index: int, num_rows: int) -> Tensor:
    """``[num_rows, channels]``, zero but for one row; written so that vmap knows how."""
    return torch.stack([row if number == index else torch.zeros_like(row) for number in range(num_rows)])
