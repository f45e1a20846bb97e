"""What the engine's results are compared with: unrolled autodiff by the textbook, and differences of losses.

Written with torch.autograd alone, on purpose: nothing here shares code with the engine under test.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from distmaml.episodes import Batch, Episode, fold_in
from distmaml.inner import Params
from distmaml.trees import tree_index, tree_leaves

Loss = Callable[[Tensor, Tensor], Tensor]


def forward(model: nn.Module, params: Params, batch: Batch, loss: Loss, key: Tensor | None, inner_step: int) -> Tensor:
    """Loss of one pass; random operators draw from (key, inner_step), as documented for an Episode's key."""
    model.train(key is not None)
    inputs = batch.inputs if isinstance(batch.inputs, tuple) else (batch.inputs,)
    with torch.random.fork_rng([]), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        if key is not None:
            torch.manual_seed(int(fold_in(key, inner_step)))
        return loss(functional_call(model, params, inputs), batch.targets)


def query_loss(
    model: nn.Module,
    theta: Params,
    episode: Episode,
    loss: Loss,
    *,
    inner_lr: float,
    num_steps: int,
    adapts: Callable[[str], bool] = lambda name: True,
    create_graph: bool = True,
) -> Tensor:
    """The query loss after unrolled inner steps, differentiable in theta."""
    support_key, query_key = (None, None) if episode.key is None else (fold_in(episode.key, 0), fold_in(episode.key, 1))
    phi = dict(theta)
    for k in range(num_steps):
        moved = [name for name in phi if adapts(name)]
        value = forward(model, phi, episode.support, loss, support_key, k)
        grads = torch.autograd.grad(value, [phi[name] for name in moved], create_graph=create_graph)
        phi = {**phi, **{name: phi[name] - inner_lr * g for name, g in zip(moved, grads, strict=True)}}
    return forward(model, phi, episode.query, loss, query_key, num_steps)


def unrolled(model: nn.Module, theta: Params, tasks: Episode, loss: Loss, **options: object) -> Params:
    """Mean exact meta-gradient by reverse-over-reverse autodiff of the unrolled loop."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in theta.items()}
    losses = [query_loss(model, leaves, task, loss, **options) for task in each(tasks)]  # type: ignore[arg-type]
    grads = torch.autograd.grad(torch.stack(losses).mean(), list(leaves.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(leaves.items(), grads, strict=True)}


def first_order(model: nn.Module, theta: Params, tasks: Episode, loss: Loss, **options: object) -> Params:
    """Mean first-order meta-gradient: the inner gradients are constants."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in theta.items()}
    losses = [
        query_loss(model, leaves, task, loss, create_graph=False, **options)  # type: ignore[arg-type]
        for task in each(tasks)
    ]
    grads = torch.autograd.grad(torch.stack(losses).mean(), list(leaves.values()))
    return dict(zip(leaves, grads, strict=True))


def central_difference(function: Callable[[Params], Tensor], theta: Params, direction: Params, step: float) -> float:
    """Directional derivative of a scalar function, by (f(x + hd) - f(x - hd)) / 2h."""
    ahead = function({name: p + step * direction[name] for name, p in theta.items()})
    behind = function({name: p - step * direction[name] for name, p in theta.items()})
    return float((ahead - behind).detach() / (2 * step))


def each(tasks: Episode) -> Sequence[Episode]:
    """The tasks of a batch, one by one."""
    return [tree_index(tasks, i) for i in range(len(tree_leaves(tasks)[0]))]


def relative_error(found: Params, expected: Params) -> float:
    """Largest absolute difference over the largest expected entry, over all parameters together."""
    scale = max(float(e.abs().max()) for e in expected.values())
    return max(float((found[name] - e).abs().max()) for name, e in expected.items()) / scale
