"""The inner loop, descent on a support set, and its exact adjoint.

Every function is pure, sees one task, and leaves no autograd graph behind; `outer.py` lays tasks
side by side. Notation, as in Finn et al. (2017):

    theta    meta-parameters, the initialisation
    phi_k    parameters after k inner steps, phi_0 = theta
    g(phi)   gradient of the support loss, H(phi) its Hessian
    U        update rule, phi_{k+1} = U(rho, phi_k, g(phi_k)); plain SGD: phi - alpha * g
    context  what the support loss depends on but no inner step moves
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp

from distmaml.trees import Tree, tree_add, tree_dot, tree_leaves, tree_map

Params: TypeAlias = dict[str, Tensor]
Metrics: TypeAlias = dict[str, Tensor]
LossFn: TypeAlias = Callable[[Params, Tree, int], Tensor]
"""Support loss: (params, context, inner_step) -> scalar."""


class UpdateRule(NamedTuple):
    """How one inner step moves the parameters, and the derivative of that.

    Attributes:
      step: ``(rule_params, params, grads, inner_step) -> params``.
      pull_back: ``(rule_params, params, grads, inner_step, cotangent) -> cotangents of the first three``.
      needs_grads: whether `pull_back` looks at `grads`; it gets None otherwise.
    """

    step: Callable[[Tree, Params, Params, int], Params]
    pull_back: Callable[[Tree, Params, Params | None, int, Params], tuple[Tree, Params, Params]]
    needs_grads: bool


def sgd(inner_lr: float) -> UpdateRule:
    """``U = phi - alpha * g`` with a fixed alpha: the cotangents of phi and g are lambda and -alpha * lambda."""

    def step(rule_params: Tree, params: Params, grads: Params, k: int) -> Params:
        moved: Params = tree_map(lambda p, g: torch.sub(p, g, alpha=inner_lr), params, grads)
        return moved

    def pull_back(
        rule_params: Tree, params: Params, grads: Params | None, k: int, adjoint: Params
    ) -> tuple[Tree, Params, Params]:
        return (), adjoint, tree_map(lambda entry: -inner_lr * entry, adjoint)

    return UpdateRule(step, pull_back, needs_grads=False)


def differentiable(step: Callable[[Tree, Params, Params, int], Params]) -> UpdateRule:
    """Any differentiable step as a rule, its derivative by autodiff: learned rates, curvature, a recurrent rule.

    Costs one more gradient of the support loss an inner step than `sgd`.
    """

    def pull_back(
        rule_params: Tree, params: Params, grads: Params | None, k: int, adjoint: Params
    ) -> tuple[Tree, Params, Params]:
        def moved(rule_params: Tree, params: Params, grads: Params | None) -> Params:
            return step(rule_params, params, grads or {}, k)

        pull = vjp(moved, rule_params, params, grads)[1]
        cotangents: tuple[Tree, Params, Params] = pull(adjoint)
        return cotangents

    return UpdateRule(step, pull_back, needs_grads=True)


class Cotangents(NamedTuple):
    """Gradients of the meta-loss, shaped like what they belong to."""

    params: Params
    rule_params: Tree
    context: Tree


def descend(
    loss_fn: LossFn, params: Params, *, rule: UpdateRule, num_steps: int, rule_params: Tree = (), context: Tree = ()
) -> list[Params]:
    """Runs `num_steps` inner steps; returns ``[phi_0, ..., phi_K]``."""
    trajectory = [params]
    for k in range(num_steps):
        grads = grad(loss_fn)(trajectory[-1], context, k)
        trajectory.append(rule.step(rule_params, trajectory[-1], grads, k))
    return trajectory


def pull_back(
    loss_fn: LossFn,
    trajectory: Sequence[Params],
    cotangents: Sequence[Params | None],
    *,
    rule: UpdateRule,
    rule_params: Tree = (),
    context: Tree = (),
) -> Cotangents:
    """Pulls cotangents on ``phi_0 ... phi_K`` back to theta, to the rule and to the context.

    The adjoint of `descend`, from k = K-1 down to 0, with ``lambda_K = c_K``::

        (rho', phi', g') = U'(rho, phi_k, g(phi_k))^T lambda_{k+1}
        lambda_k         = phi' + H(phi_k) g' + c_k
        rho_bar         += rho'
        context_bar     += (d g / d context)^T g'

    For SGD that is ``lambda_k = lambda_{k+1} - H(phi_k)(alpha * lambda_{k+1}) + c_k``. Exact, not truncated: it
    equals reverse-over-reverse autodiff of the unrolled loop, but keeps K+1 copies of the parameters and the
    activations of a single step, where unrolling keeps the activations of all K.

    Args:
      loss_fn: the support loss that `descend` ran on.
      trajectory: ``[phi_0, ..., phi_K]`` from `descend`, leaves ``[*param]``.
      cotangents: ``[c_0, ..., c_K]``, direct gradient of the meta-loss at each phi_k; None is zero, except the last.
      rule: the rule that `descend` ran with; likewise `rule_params` and `context`.

    See Kemaev et al. (2025), "Scalable Meta-Learning via Mixed-Mode Differentiation",
    https://arxiv.org/abs/2505.00793, for the forward-over-reverse argument.
    """
    adjoint = cotangents[-1]
    assert adjoint is not None
    rule_bar: Tree = None
    context_bar: Tree = None
    for k in reversed(range(len(trajectory) - 1)):
        phi = trajectory[k]
        grads = grad(loss_fn)(phi, context, k) if rule.needs_grads else None
        rule_part, phi_part, grad_part = rule.pull_back(rule_params, phi, grads, k, adjoint)
        curvature, context_part = hvp(loss_fn, phi, context, k, grad_part)
        direct = cotangents[k]
        adjoint = tree_add(phi_part, curvature)
        adjoint = adjoint if direct is None else tree_add(adjoint, direct)
        rule_bar = rule_part if rule_bar is None else tree_add(rule_bar, rule_part)
        context_bar = context_part if context_bar is None else tree_add(context_bar, context_part)
    return Cotangents(
        adjoint,
        tree_map(torch.zeros_like, rule_params) if rule_bar is None else rule_bar,
        tree_map(torch.zeros_like, context) if context_bar is None else context_bar,
    )


HvpMode: TypeAlias = Literal["forward", "reverse"]
_hvp_mode: ContextVar[HvpMode] = ContextVar("hvp_mode", default="forward")


@contextmanager
def hvp_mode(mode: HvpMode) -> Iterator[None]:
    """How `hvp` differentiates the gradient inside this block.

    forward: forward over reverse, the cheaper. reverse: reverse over reverse, for modules with an operator that has
    no forward derivative (`F.mse_loss` is one). Both are exact.
    """
    token = _hvp_mode.set(mode)
    try:
        yield
    finally:
        _hvp_mode.reset(token)


def hvp(loss_fn: LossFn, params: Params, context: Tree, inner_step: int, vector: Params) -> tuple[Params, Tree]:
    """``H v`` and ``(d g / d context)^T v``, where g and H are taken with respect to `params`."""
    has_context = bool(tree_leaves(context))
    if _hvp_mode.get() == "reverse":

        def along(params: Params, context: Tree) -> Tensor:
            return tree_dot(grad(loss_fn)(params, context, inner_step), vector)

        if not has_context:
            return grad(along)(params, context), context
        both: tuple[Params, Tree] = grad(along, argnums=(0, 1))(params, context)
        return both

    def gradient(params: Params) -> Any:
        return grad(loss_fn, argnums=(0, 1) if has_context else 0)(params, context, inner_step)

    tangent = jvp(gradient, (params,), (vector,))[1]
    return tangent if has_context else (tangent, context)
