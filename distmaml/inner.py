"""The inner loop, descent on a support set, and its exact adjoint.

Every function sees one task, and its tensors come without an autograd graph; `outer.py` lays tasks side by side.
Notation, as in Finn et al. (2017):

    theta    meta-parameters, the initialisation
    phi_k    parameters after k inner steps, phi_0 = theta
    g(phi)   gradient of the support loss, H(phi) its Hessian
    U        update rule, phi_{k+1} = U(rho, phi_k, g(phi_k)); plain SGD: phi - alpha * g
    context  what the support loss depends on but no inner step moves
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, func
from torch.func import jvp, vjp

from distmaml.trees import Tree, tree_add, tree_leaves, tree_map, tree_unflatten

Params: TypeAlias = dict[str, Tensor]
Metrics: TypeAlias = dict[str, Tensor]
LossFn: TypeAlias = "Callable[[Params, Tree, int], Tensor] | ExplicitLoss"
"""Support loss: (params, context, inner_step) -> scalar; or one that knows its own derivatives."""


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


def sgd_by_name(rate_of: Callable[[str], float]) -> UpdateRule:
    """`sgd` with a rate for each parameter; 0 leaves it where it is."""

    def step(rule_params: Tree, params: Params, grads: Params, k: int) -> Params:
        rates = {name: rate_of(name) for name in params}
        return {n: torch.sub(p, grads[n], alpha=rates[n]) if rates[n] else p for n, p in params.items()}

    def pull_back(
        rule_params: Tree, params: Params, grads: Params | None, k: int, adjoint: Params
    ) -> tuple[Tree, Params, Params]:
        return (), adjoint, {name: -rate_of(name) * entry for name, entry in adjoint.items()}

    return UpdateRule(step, pull_back, needs_grads=False)


def differentiable(step: Callable[[Tree, Params, Params, int], Params]) -> UpdateRule:
    """Any differentiable step as a rule, its derivative by autodiff: learned rates, curvature, a recurrent rule.

    Where tasks lie side by side it costs one more gradient of the support loss per inner step than `sgd`.
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


class Linearization(NamedTuple):
    """The gradient of the support loss at phi_k, and how that gradient changes.

    Attributes:
      grads: g(phi_k); None where it was not asked for and would cost a pass.
      transpose: ``v -> (H v, (d g / d context)^T v)``, where g and H are taken with respect to the parameters.
    """

    grads: Params | None
    transpose: Callable[[Params], tuple[Params, Tree]]


class ExplicitLoss(Protocol):
    """A support or query loss that brings its own derivatives, in the place of a function that is differentiated.

    Attributes:
      gradient_and_value: ``(params, context, inner_step) -> (gradient, (value, metrics))``.
      linearize: ``(params, context, inner_step) -> Linearization``.
    """

    def gradient_and_value(
        self, params: Params, context: Tree = (), inner_step: int = 0
    ) -> tuple[Params, tuple[Tensor, Metrics]]: ...
    def linearize(self, params: Params, context: Tree = (), inner_step: int = 0) -> Linearization: ...


def descend(
    loss_fn: LossFn, params: Params, *, rule: UpdateRule, num_steps: int, rule_params: Tree = (), context: Tree = ()
) -> list[Params]:
    """Runs `num_steps` inner steps; returns ``[phi_0, ..., phi_K]``."""
    return list(walk(loss_fn, params, rule=rule, num_steps=num_steps, rule_params=rule_params, context=context))


def walk(
    loss_fn: LossFn, params: Params, *, rule: UpdateRule, num_steps: int, rule_params: Tree = (), context: Tree = ()
) -> Iterator[Params]:
    """`descend`, one after the other, for those who need not keep them."""
    yield params
    for k in range(num_steps):
        grads = gradient(loss_fn, params, context, k)
        params = rule.step(rule_params, params, grads, k)
        yield params


def last(states: Iterable[Any]) -> Any:
    """The last of some states, those before it let go."""
    return deque(states, maxlen=1).pop()


def descend_vjp(
    loss_fn: LossFn, params: Params, *, rule: UpdateRule, num_steps: int, rule_params: Tree = (), context: Tree = (),
    num_kept: int = 1, first_order: bool = False,
) -> tuple[list[Params], Callable[[Sequence[Params | None]], Cotangents]]:  # fmt: skip
    """`descend`, and its `pull_back` as a function of the cotangents alone.

    Reverse over reverse, the pass that gives the gradient of an inner step also begins its derivative. That of the
    last `num_kept` steps is kept for `pull_back`, and these steps cost what they do in unrolled autodiff; their
    activations live until it has used them. Those of the steps before are computed again.

    Args:
      first_order: take the inner gradients for constants. An approximation: `pull_back` then knows the rule alone.
    """
    options: dict[str, Tree] = {"rule_params": rule_params, "context": context}
    first_kept = num_steps if _hvp_mode.get() == "forward" else max(num_steps - num_kept, 0)
    first_kept = 0 if first_order else first_kept
    trajectory = descend(loss_fn, params, rule=rule, num_steps=first_kept, **options)
    kept: dict[int, Linearization] = {}
    for k in range(first_kept, num_steps):
        kept[k] = (_constant if first_order else linearize)(loss_fn, trajectory[-1], context, k)
        grads = kept[k].grads
        assert grads is not None  # both compute them anyway
        trajectory.append(rule.step(rule_params, trajectory[-1], grads, k))
    return trajectory, lambda cotangents: pull_back(loss_fn, trajectory, cotangents, rule=rule, kept=kept, **options)


def pull_back(
    loss_fn: LossFn,
    trajectory: Sequence[Params],
    cotangents: Sequence[Params | None],
    *,
    rule: UpdateRule,
    rule_params: Tree = (),
    context: Tree = (),
    kept: dict[int, Linearization] | None = None,
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
      kept: linearisations that are there already, by inner step; each is let go once it has been used.

    See Kemaev et al. (2025), "Scalable Meta-Learning via Mixed-Mode Differentiation",
    https://arxiv.org/abs/2505.00793, for the forward-over-reverse argument.
    """
    adjoint = cotangents[-1]
    assert adjoint is not None
    rule_bar: Tree = None
    context_bar: Tree = None
    for k in reversed(range(len(trajectory) - 1)):
        phi = trajectory[k]
        here = kept.pop(k, None) if kept else None
        here = here or linearize(loss_fn, phi, context, k, needs_grads=rule.needs_grads)
        rule_part, phi_part, grad_part = rule.pull_back(rule_params, phi, here.grads, k, adjoint)
        curvature, context_part = here.transpose(grad_part)
        del here  # with the activations of this step, before those of the one before it come
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


HvpMode: TypeAlias = Literal["forward", "reverse", "graph"]
_hvp_mode: ContextVar[HvpMode] = ContextVar("hvp_mode", default="forward")


@contextmanager
def hvp_mode(mode: HvpMode) -> Iterator[None]:
    """How the gradient is differentiated inside this block. All ways are exact.

    forward: forward over reverse; it stores nothing, so side by side, where every task would store its own
    activations, it is the leaner. reverse: reverse over reverse, for modules with an operator that has no forward
    derivative (`F.mse_loss` is one). graph: the same on one graph of torch.autograd, which cannot stand inside vmap,
    for one task after the other: torch's second backward of convolutions and batch norm takes two thirds of the time
    of their forward derivatives, and what torch.func puts around each operator is another tenth and more (Conv4, one
    CPU thread).
    """
    token = _hvp_mode.set(mode)
    try:
        yield
    finally:
        _hvp_mode.reset(token)


def on_one_graph() -> bool:
    """Whether nothing of torch.func is around: `hvp_mode` is "graph"."""
    return _hvp_mode.get() == "graph"


def gradient(loss_fn: "Callable[..., Tensor] | ExplicitLoss", params: Params, *arguments: Any) -> Params:
    """The gradient of ``loss_fn(params, *arguments)`` with respect to `params`."""
    if not callable(loss_fn):
        return loss_fn.gradient_and_value(params, *arguments)[0]
    grads: Params = gradient_and_value(lambda params: (loss_fn(params, *arguments), ()), params)[0]
    return grads


def gradient_and_value(loss_fn: Callable[[Any], tuple[Tensor, Any]], params: Tree) -> tuple[Any, Any]:
    """The gradient of the first thing that `loss_fn` returns, shaped like `params`, and both things."""
    if _hvp_mode.get() != "graph":
        grads, returned = func.grad_and_value(loss_fn, has_aux=True)(params)
        return grads, returned
    with torch.enable_grad():
        leaves = _leaves(params)
        returned = loss_fn(leaves)
        return _backward(returned[:1], leaves), tree_map(Tensor.detach, returned)


def linearize(
    loss_fn: LossFn, params: Params, context: Tree, inner_step: int, *, needs_grads: bool = False
) -> Linearization:
    """The gradient of the support loss with respect to `params`, and its derivative, at one point."""
    if not callable(loss_fn):
        return loss_fn.linearize(params, context, inner_step)
    if _hvp_mode.get() == "graph":
        with torch.enable_grad():
            params, context = _leaves((params, context))
            grads = _backward([loss_fn(params, context, inner_step)], params, create_graph=True)

        def transpose(vector: Params) -> tuple[Params, Tree]:
            pulled: tuple[Params, Tree]
            pulled = _backward(tree_leaves(grads), (params, context), tree_leaves(vector), retain_graph=True)
            return pulled

        return Linearization(tree_map(Tensor.detach, grads), transpose)
    if _hvp_mode.get() == "reverse":
        at = lambda params, context: func.grad(loss_fn)(params, context, inner_step)  # noqa: E731
        return Linearization(*vjp(at, params, context))

    argnums = (0, 1) if tree_leaves(context) else 0

    def pull(vector: Params) -> tuple[Params, Tree]:
        # The Hessian is symmetric: pulling back along its rows is pushing forward along its columns.
        along = lambda params: func.grad(loss_fn, argnums=argnums)(params, context, inner_step)  # noqa: E731
        tangent = jvp(along, (params,), (vector,))[1]
        return tangent if isinstance(argnums, tuple) else (tangent, context)

    return Linearization(func.grad(loss_fn)(params, context, inner_step) if needs_grads else None, pull)


def _constant(loss_fn: LossFn, params: Params, context: Tree, inner_step: int) -> Linearization:
    """The gradient of the support loss as if it did not change."""
    grads = gradient(loss_fn, params, context, inner_step)
    return Linearization(grads, lambda vector: tree_map(torch.zeros_like, (params, context)))


def _leaves(tree: Tree) -> Tree:
    return tree_map(lambda leaf: leaf.detach().requires_grad_(), tree)


def _backward(
    outputs: Sequence[Tensor], inputs: Tree, cotangents: Sequence[Tensor] | None = None, **options: bool
) -> Any:
    """torch.autograd.grad over a tree, with zeros where no output depends on an input."""
    found = [i for i, output in enumerate(outputs) if output.requires_grad]
    if not found:
        return tree_map(torch.zeros_like, inputs)
    outputs = [outputs[i] for i in found]
    cotangents = None if cotangents is None else [cotangents[i] for i in found]
    grads = torch.autograd.grad(outputs, tree_leaves(inputs), cotangents, materialize_grads=True, **options)
    return tree_unflatten(inputs, grads)
