"""iMAML: the meta-gradient of an inner problem's solution, whatever way led to it.

Rajeswaran, Finn, Kakade, Levine (2019), "Meta-Learning with Implicit Gradients", https://arxiv.org/abs/1909.04630.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from distmaml.algorithms import Algorithm
from distmaml.algorithms.newton import newton_step
from distmaml.algorithms.passes import (
    check_rate,
    check_steps,
    halves,
    predict,
    query_gradient,
    support_loss,
)
from distmaml.conjugate_gradient import conjugate_gradient, tree_dot
from distmaml.episodes import Batch, Episode
from distmaml.errors import ConfigError
from distmaml.inner import Metrics, Params, differentiable, last, linearize, walk
from distmaml.objectives import Moment, Objective
from distmaml.trees import tree_map


def imaml(
    objective: Objective,
    *,
    inner_lr: float,
    num_inner_steps: int,
    regularization: float = 2.0,
    num_cg_steps: int = 5,
    cg_damping: float = 0.0,
    solver: Literal["gradient", "hessian_free"] = "gradient",
) -> Algorithm:
    """iMAML (Rajeswaran et al., 2019).

    ::

        phi* = argmin_phi L_support(phi) + lambda / 2 * |phi - theta|^2
        meta-gradient = (I + H(phi*) / (lambda + damping))^{-1} grad L_query(phi*),  H the Hessian of L_support

    An approximation in two places, as in the paper: the inner loop comes near phi*, and conjugate gradients come near
    the solution of the linear system. Where a direction has a curvature of -(lambda + damping) or less they end before
    it; if the first one has, what is left is the first-order gradient. Of a task whose curvature comes near that the
    meta-gradient is as large as one likes, and a mean over tasks is its alone: against this there is the damping, which
    the paper's equations lack and its authors' code has. Memory and cost of the meta-gradient do not depend on the
    number of inner steps.

    Args:
      inner_lr: of the gradient solver; it must be well below ``2 / lambda``.
      regularization: lambda.
      num_cg_steps: for the meta-gradient, and for the direction of a Newton step.
      cg_damping: of the meta-gradient alone; 0 is the paper's equation.
      solver: "gradient": gradient descent on the inner problem. "hessian_free": each inner step goes along the Newton
        direction that conjugate gradients find (Martens, 2010), as far as a line search lets it.

    Raises:
      ConfigError: no inner step, no rate above 0, no step of conjugate gradients, a regularization of 0 or less, a
        negative damping, an inner_lr with which lambda alone leads away, no such solver.
    """
    check_steps(num_inner_steps)
    check_rate(inner_lr)
    if not regularization > 0:
        raise ConfigError(
            f"regularization={regularization} must be greater than 0: iMAML divides by it. To hold the inner loop back "
            "by nothing, take maml."
        )
    if solver == "gradient" and inner_lr * regularization >= 2:
        raise ConfigError(
            f"inner_lr={inner_lr} with regularization={regularization} goes further from the initialisation at each "
            f"step: inner_lr must be well below 2 / regularization = {2 / regularization:g}."
        )
    if num_cg_steps < 1:
        raise ConfigError(f"num_cg_steps={num_cg_steps} must be 1 or more.")
    if not cg_damping >= 0:
        raise ConfigError(f"cg_damping={cg_damping} must be 0 or more.")
    if solver not in ("gradient", "hessian_free"):
        raise ConfigError(f"solver={solver!r} must be one of gradient, hessian_free.")
    weight, damped = regularization, regularization + cg_damping

    def proximal_step(theta: Params, params: Params, grads: Params, k: int) -> Params:
        return {n: p - inner_lr * (grads[n] + weight * (p - theta[n])) for n, p in params.items()}

    def by_gradient(theta: Params, support: Batch, steps: int, key: Tensor | None) -> Iterator[Params]:
        loss_fn = support_loss(objective, theta, support, key)
        return walk(loss_fn, theta, rule=differentiable(proximal_step), rule_params=theta, num_steps=steps)

    def by_newton(theta: Params, support: Batch, steps: int, key: Tensor | None) -> Iterator[Params]:
        loss_fn = support_loss(objective, theta, support, key)

        def step(phi: Params, k: int) -> Params:
            here = linearize(loss_fn, phi, (), k, needs_grads=True)

            def value_of(params: Params) -> Tensor:
                away = tree_map(torch.sub, params, theta)
                outputs = objective.predict(params, support.inputs, Moment(k, key))
                return objective.loss(outputs, support.targets)[0] + 0.5 * weight * tree_dot(away, away)

            def hessian(vector: Params) -> Params:
                curved: Params = tree_map(lambda h, v: h + weight * v, here.transpose(vector)[0], vector)
                return curved

            grads = tree_map(lambda g, p, t: g + weight * (p - t), here.grads, phi, theta)
            return newton_step(value_of, phi, grads, hessian, num_cg_steps)

        phi = theta
        yield phi
        for k in range(steps):
            phi = step(phi, k)
            yield phi

    solve = by_gradient if solver == "gradient" else by_newton

    def adapt(theta: Params, support: Batch, num_steps: int | None = None, key: Tensor | None = None) -> list[Params]:
        return list(solve(theta, support, num_inner_steps if num_steps is None else num_steps, key))

    def meta_grad(theta: Params, episode: Episode, step: int) -> tuple[Params, Metrics]:
        support_key, query_key = halves(episode.key)
        phi = last(solve(theta, episode.support, num_inner_steps, support_key))
        query_grads, metrics = query_gradient(objective, phi, episode.query, num_inner_steps, query_key)
        loss_fn = support_loss(objective, theta, episode.support, support_key)
        curvature = linearize(loss_fn, phi, (), num_inner_steps).transpose
        solution: Params = conjugate_gradient(
            lambda v: tree_map(lambda x, h: x + h / damped, v, curvature(v)[0]), query_grads, num_cg_steps
        )
        return solution, metrics

    return Algorithm(lambda params, generator: params, adapt, predict(objective), meta_grad, steady_from=0)
