"""MAML and its first-order approximation.

Finn, Abbeel, Levine (2017), "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks",
https://arxiv.org/abs/1703.03400.
"""

from torch import Tensor

from distmaml.algorithms import Algorithm
from distmaml.algorithms.passes import check_rate, check_steps, halves, num_kept, predict, query_gradient, support_loss
from distmaml.episodes import Batch, Episode
from distmaml.inner import Metrics, Params, UpdateRule, descend, descend_vjp, last, sgd, walk
from distmaml.objectives import Objective


def maml(objective: Objective, *, inner_lr: float, num_inner_steps: int) -> Algorithm:
    """Exact second-order MAML (Finn et al., 2017).

    ::

        phi_0 = theta,  phi_{k+1} = phi_k - inner_lr * grad L_support(phi_k)
        meta-gradient = d L_query(phi_K) / d theta, K = num_inner_steps

    Args:
      inner_lr: on the mean loss over the support set.

    Raises:
      ConfigError: no inner step, no rate above 0.
    """
    check_rate(inner_lr)
    return by_rule(objective, sgd(inner_lr), num_inner_steps)


def fomaml(objective: Objective, *, inner_lr: float, num_inner_steps: int) -> Algorithm:
    """First-order MAML (Finn et al., 2017): ``grad L_query(phi_K)``, as if the Hessian in the adjoint were zero.

    An approximation: it ignores how theta moves the path to phi_K. The arguments are those of `maml`.
    """
    second_order, rule = maml(objective, inner_lr=inner_lr, num_inner_steps=num_inner_steps), sgd(inner_lr)

    def meta_grad(theta: Params, episode: Episode, step: int) -> tuple[Params, Metrics]:
        support_key, query_key = halves(episode.key)
        loss_fn = support_loss(objective, theta, episode.support, support_key)
        phi = last(walk(loss_fn, theta, rule=rule, num_steps=num_inner_steps))
        return query_gradient(objective, phi, episode.query, num_inner_steps, query_key)

    return second_order._replace(meta_grad=meta_grad)


def by_rule(objective: Objective, rule: UpdateRule, num_inner_steps: int) -> Algorithm:
    """MAML with another update rule that has nothing to learn.

    Raises:
      ConfigError: no inner step.
    """
    check_steps(num_inner_steps)

    def adapt(theta: Params, support: Batch, num_steps: int | None = None, key: Tensor | None = None) -> list[Params]:
        steps = num_inner_steps if num_steps is None else num_steps
        return descend(support_loss(objective, theta, support, key), theta, rule=rule, num_steps=steps)

    def meta_grad(theta: Params, episode: Episode, step: int) -> tuple[Params, Metrics]:
        support_key, query_key = halves(episode.key)
        loss_fn = support_loss(objective, theta, episode.support, support_key)
        trajectory, pull_back = descend_vjp(
            loss_fn, theta, rule=rule, num_steps=num_inner_steps, num_kept=num_kept(episode, loss_fn, num_inner_steps)
        )
        query_grads, metrics = query_gradient(objective, trajectory[-1], episode.query, num_inner_steps, query_key)
        return pull_back([*[None] * num_inner_steps, query_grads]).params, metrics

    return Algorithm(lambda params, generator: params, adapt, predict(objective), meta_grad, steady_from=0)
