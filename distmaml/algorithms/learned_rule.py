"""MAML whose update rule is learned beside the initialisation: what Meta-SGD and Meta-Curvature share."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from distmaml.algorithms import Algorithm
from distmaml.algorithms.passes import check_steps, halves, num_kept, predict, query_gradient, support_loss
from distmaml.episodes import Batch, Episode
from distmaml.inner import Metrics, Params, UpdateRule, descend, descend_vjp
from distmaml.objectives import Objective
from distmaml.trees import Tree


def by_learned_rule(
    objective: Objective,
    make: Callable[[Params, Tree], Any],
    rule: UpdateRule,
    num_inner_steps: int,
    *,
    init_rule: Callable[[Params], Tree],
) -> Algorithm:
    """Exact gradients of the query loss for the initialisation and for the parameters of the rule.

    Args:
      make: ``(params, rule_params) -> meta_params``, a NamedTuple of these two.
      init_rule: ``params -> rule_params`` at the start.

    Raises:
      ConfigError: no inner step.
    """
    check_steps(num_inner_steps)

    def adapt(meta: Any, support: Batch, num_steps: int | None = None, key: Tensor | None = None) -> list[Params]:
        params, rule_params = meta
        steps = num_inner_steps if num_steps is None else num_steps
        loss_fn = support_loss(objective, params, support, key)
        return descend(loss_fn, params, rule=rule, rule_params=rule_params, num_steps=steps)

    def meta_grad(meta: Any, episode: Episode, step: int) -> tuple[Any, Metrics]:
        params, rule_params = meta
        support_key, query_key = halves(episode.key)
        loss_fn = support_loss(objective, params, episode.support, support_key)
        trajectory, pull_back = descend_vjp(
            loss_fn, params, rule=rule, rule_params=rule_params, num_steps=num_inner_steps,
            num_kept=num_kept(episode, loss_fn, num_inner_steps),
        )  # fmt: skip
        query_grads, metrics = query_gradient(objective, trajectory[-1], episode.query, num_inner_steps, query_key)
        back = pull_back([*[None] * num_inner_steps, query_grads])
        return make(back.params, back.rule_params), metrics

    return Algorithm(
        lambda params, generator: make(params, init_rule(params)), adapt, predict(objective), meta_grad, steady_from=0
    )
