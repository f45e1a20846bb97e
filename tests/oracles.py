"""What the engine's results are compared with: unrolled autodiff by the textbook, and differences of losses.

Written with torch.autograd alone, on purpose: nothing here shares code with the engine under test.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from distmaml.episodes import Batch, Episode, fold_in
from distmaml.inner import Params
from distmaml.models.conv4 import Conv4
from distmaml.trees import named_leaves, tree_index, tree_leaves, tree_map, tree_unflatten

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


def check_slope(grads: Any, meta: Any, loss: Callable[[Any], Tensor]) -> None:
    """The gradient is the slope of a loss along a random direction, by differences."""
    torch.manual_seed(3)
    along = tree_map(torch.randn_like, meta)
    slope = sum(float((g * way).sum()) for g, way in zip(tree_leaves(grads), tree_leaves(along), strict=True))

    def at(place: Params) -> Tensor:
        return loss(tree_map(lambda leaf, way: leaf + place["distance"] * way, meta, along))

    start, way = ({"distance": torch.tensor(x, dtype=torch.float64)} for x in (0.0, 1.0))
    # Richardson's extrapolation of two central differences: the error is of fourth order in the step.
    coarse, fine = (central_difference(at, start, way, h) for h in (1e-3, 5e-4))
    assert (4 * fine - coarse) / 3 == pytest.approx(slope, rel=1e-6)


def each(tasks: Episode) -> Sequence[Episode]:
    """The tasks of a batch, one by one."""
    return [tree_index(tasks, i) for i in range(len(tree_leaves(tasks)[0]))]


def relative_error(found: Params, expected: Params) -> float:
    """Largest absolute difference over the largest expected entry, over all parameters together."""
    scale = max(float(e.abs().max()) for e in expected.values())
    return max(float((found[name] - e).abs().max()) for name, e in expected.items()) / scale


def leaf_errors(found: Any, expected: Any) -> dict[str, float]:
    """For each leaf of a tree, by its name, the largest difference over the largest expected entry.

    A leaf that is zero but for rounding has no scale of its own: its difference is over 1e-5 of the largest entry of
    all.
    """
    left, right = ({name: leaf.detach() for name, leaf in named_leaves(tree).items()} for tree in (found, expected))
    assert left.keys() == right.keys()
    sizes = {name: float(leaf.abs().max()) for name, leaf in right.items()}
    floor = 1e-5 * max(sizes.values())
    return {name: float((left[name] - leaf).abs().max()) / max(sizes[name], floor) for name, leaf in right.items()}


def vanishing(expected: Any) -> set[str]:
    """The names of leaves that are zero but for rounding, about which a comparison says nothing."""
    sizes = {name: float(leaf.abs().max()) for name, leaf in named_leaves(expected).items()}
    return {name for name, size in sizes.items() if size < 1e-10 * max(sizes.values())}


# ------------------------------------------------------------------------------- a model, layer by layer


def layers_of(model: nn.Module) -> list[tuple[str, Any]]:
    """What a sequence or a Conv4 calls, one after the other; names are those of submodules with parameters."""
    if isinstance(model, nn.Sequential):
        return list(model.named_children())
    assert isinstance(model, Conv4)
    found: list[tuple[str, Any]] = []
    for number, (convolution, norm) in enumerate(zip(model.convolutions, model.norms, strict=True)):
        found += [(f"convolutions.{number}", convolution), (f"norms.{number}", norm), ("", nn.ReLU())]
        found += [("", nn.MaxPool2d(2))] if model.downsample == "pool" else []
    return [
        *found,
        ("", nn.Flatten() if model.downsample == "pool" else lambda x: x.mean((2, 3))),
        ("head", model.head),
    ]


def walk(
    model: nn.Module, params: Params, inputs: Tensor, change: Mapping[str, Callable[[Tensor], Tensor]] = {}
) -> tuple[Tensor, dict[str, Tensor]]:
    """The outputs, and what each named layer got.

    Args:
      change: by the name of a layer, what becomes of its output.
    """
    seen: dict[str, Tensor] = {}
    x = inputs
    for name, layer in layers_of(model):
        seen[name] = x
        own = {n.removeprefix(f"{name}."): p for n, p in params.items() if n.startswith(f"{name}.")}
        x = functional_call(layer, own, x) if own else layer(x)
        x = change[name](x) if name in change else x
    return x, seen


def features(model: nn.Module, params: Params, inputs: Tensor) -> Tensor:
    """What the last layer gets."""
    seen = walk(model, params, inputs)[1]
    return list(seen.values())[-1]


# ---------------------------------------------------------------------------- what papers differentiate
#
# Each is the loss of one task as a function of the meta-parameters, with the inner loop on the graph, so that autograd
# gives the gradient: `mean_gradient`. The meta-parameters are those of the algorithm of the same name.


def mean_gradient(value: Callable[[Any, Episode], Tensor], meta: Any, tasks: Episode) -> Any:
    """The gradient of the mean over tasks of a function of the meta-parameters."""
    leaves = tree_map(lambda leaf: leaf.detach().clone().requires_grad_(), meta)
    mean = torch.stack([value(leaves, task) for task in each(tasks)]).mean()
    return tree_unflatten(leaves, torch.autograd.grad(mean, tree_leaves(leaves), materialize_grads=True))


def loss_of(model: nn.Module, params: Params, batch: Batch) -> Tensor:
    """The cross-entropy on a batch."""
    return F.cross_entropy(functional_call(model, params, (batch.inputs,)), batch.targets)


def slope(value: Tensor, params: Params, *, detach: bool = False) -> Params:
    """The gradient of a value, on the graph or as a constant."""
    grads = torch.autograd.grad(value, list(params.values()), create_graph=not detach, materialize_grads=True)
    return dict(zip(params, grads, strict=True))


def meta_sgd(model: nn.Module, meta: Any, task: Episode, *, num_steps: int) -> Tensor:
    phi = meta.params
    for _ in range(num_steps):
        grads = slope(loss_of(model, phi, task.support), phi)
        phi = {name: p - meta.inner_lr[name] * grads[name] for name, p in phi.items()}
    return loss_of(model, phi, task.query)


def mode_product(gradient: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Park and Oliva (2019), equation 7, with the filter positions as one mode, by einsum."""
    if gradient.ndim == 1:
        return torch.einsum("ai,i->a", *matrices, gradient)
    if gradient.ndim == 2:
        return torch.einsum("ai,bj,ij->ab", *matrices, gradient)
    outputs, inputs, *window = gradient.shape
    flat = gradient.reshape(outputs, inputs, -1)
    return torch.einsum("ai,bj,ck,ijk->abc", *matrices, flat).reshape(outputs, inputs, *window)


def meta_curvature(model: nn.Module, meta: Any, task: Episode, *, inner_lr: float, num_steps: int) -> Tensor:
    phi = meta.params
    for _ in range(num_steps):
        grads = slope(loss_of(model, phi, task.support), phi)
        phi = {name: p - inner_lr * mode_product(grads[name], meta.curvature[name]) for name, p in phi.items()}
    return loss_of(model, phi, task.query)


def maml_plus_plus_states(
    model: nn.Module, meta: Any, task: Episode, *, inner_lr: float, num_steps: int, detach: bool = False
) -> list[Params]:
    """All parameters of the model with which the query set is judged: phi_k with row k - 1, k = 1..K."""
    phi, states = meta.params, []
    for k in range(num_steps):
        row = {name: rows[k] for name, rows in meta.norms.items()}
        grads = slope(loss_of(model, {**phi, **row}, task.support), phi, detach=detach)
        phi = {n: p - (meta.inner_lr[n][k] if meta.inner_lr else inner_lr) * grads[n] for n, p in phi.items()}
        states.append({**phi, **row})
    return states


def maml_plus_plus(model: nn.Module, meta: Any, task: Episode, *, weights: Sequence[float], **options: Any) -> Tensor:
    states = maml_plus_plus_states(model, meta, task, num_steps=len(weights), **options)
    losses = [w * loss_of(model, state, task.query) for w, state in zip(weights, states, strict=True)]
    return torch.stack(losses).sum()


def cavia(
    predict: Callable[[Any, Tensor, Tensor], Tensor], meta: Any, task: Episode, *, inner_lr: float, num_steps: int
) -> Tensor:
    """
    Args:
      predict: ``(meta, context, inputs) -> logits``.
    """
    weight = meta.modulation["weight"]
    context = torch.zeros(weight.shape[1], dtype=weight.dtype, requires_grad=True)
    for _ in range(num_steps):
        loss = F.cross_entropy(predict(meta, context, task.support.inputs), task.support.targets)
        context = context - inner_lr * torch.autograd.grad(loss, context, create_graph=True)[0]
    return F.cross_entropy(predict(meta, context, task.query.inputs), task.query.targets)


def class_means(values: Tensor, labels: Tensor, num_ways: int) -> Tensor:
    """``[num_ways, num_features]``; every class is there."""
    return torch.stack([values[labels == way].mean(0) for way in range(num_ways)])


def proto_maml(model: nn.Module, body: Params, task: Episode, *, head: str, inner_lr: float, num_steps: int) -> Tensor:
    layer: Any = model.get_submodule(head)
    centers = class_means(features(model, body, task.support.inputs), task.support.targets, layer.out_features)
    # Copies, for the inner gradient is the partial one: it does not go through the head to the body.
    phi = {name: p.clone() for name, p in body.items()}
    phi.update({f"{head}.weight": 2 * centers, f"{head}.bias": -(centers**2).sum(1)})
    for _ in range(num_steps):
        grads = slope(loss_of(model, phi, task.support), phi)
        phi = {name: p - inner_lr * grads[name] for name, p in phi.items()}
    return loss_of(model, phi, task.query)


def prototypical_networks(model: nn.Module, body: Params, task: Episode, *, num_ways: int) -> Tensor:
    centers = class_means(features(model, body, task.support.inputs), task.support.targets, num_ways)
    queries = features(model, body, task.query.inputs)
    squares = torch.stack([(queries - center).pow(2).sum(1) for center in centers], 1)
    return F.cross_entropy(-squares, task.query.targets)


def matching_networks(model: nn.Module, body: Params, task: Episode, *, num_ways: int) -> Tensor:
    known, queries = (features(model, body, batch.inputs) for batch in (task.support, task.query))
    cosines = F.cosine_similarity(queries[:, None], known[None], dim=-1)
    attention = cosines.exp() / cosines.exp().sum(1, keepdim=True)
    chances = torch.stack([attention[:, task.support.targets == way].sum(1) for way in range(num_ways)], 1)
    return -chances[torch.arange(len(queries)), task.query.targets].log().mean()


def fine_tuning(model: nn.Module, meta: Any, task: Episode) -> Tensor:
    assert task.classes is not None
    inputs = torch.cat([task.support.inputs, task.query.inputs])
    labels = torch.cat([task.classes[batch.targets] for batch in (task.support, task.query)])
    logits = features(model, meta.body, inputs) @ meta.classes["weight"].t() + meta.classes["bias"]
    return F.cross_entropy(logits, labels)


def preprocessed(x: float) -> tuple[float, float]:
    """Ravi and Larochelle (2017), section 3.4, with p = 10."""
    if x != 0 and abs(x) >= math.exp(-10):
        return math.log(abs(x)) / 10, math.copysign(1, x)
    return -1.0, math.exp(10) * x


def meta_lstm_states(model: nn.Module, meta: Any, support: Batch, num_steps: int) -> list[Params]:
    """phi_0..phi_K by the equations of section 3.2 and torch's own LSTM cell; inner gradients are constants."""
    rule, names = meta.rule, list(meta.params)
    hidden_size = rule["lstm_hidden"].shape[1]
    cell = nn.LSTMCell(4, hidden_size, dtype=rule["lstm_hidden"].dtype)
    weights = {
        "weight_ih": rule["lstm_input"],
        "weight_hh": rule["lstm_hidden"],
        "bias_ih": rule["lstm_bias"],
        "bias_hh": torch.zeros_like(rule["lstm_bias"]),
    }
    sizes = [p.numel() for p in meta.params.values()]
    theta = torch.cat([p.reshape(-1) for p in meta.params.values()])
    forget = enter = torch.zeros_like(theta)
    state: Any = None
    states = [meta.params]
    for _ in range(num_steps):
        loss = loss_of(model, states[-1], support)
        slopes = slope(loss, states[-1], detach=True)
        gradient = torch.cat([slopes[name].reshape(-1) for name in names])
        seen = [[*preprocessed(x), *preprocessed(loss.detach().item())] for x in gradient.tolist()]
        state = functional_call(cell, weights, (torch.tensor(seen, dtype=theta.dtype), state))
        look = torch.stack([theta, forget], 1), torch.stack([theta, enter], 1)
        forget, enter = (
            torch.sigmoid(torch.cat([state[0], own], 1) @ rule[f"{gate}_weight"] + rule[f"{gate}_bias"])
            for gate, own in zip(("forget", "input"), look, strict=True)
        )
        theta = forget * theta - enter * gradient
        parts = zip(names, torch.split(theta, sizes), strict=True)
        states.append({name: part.view_as(meta.params[name]) for name, part in parts})
    return states


def meta_lstm(model: nn.Module, meta: Any, task: Episode, *, num_steps: int) -> Tensor:
    return loss_of(model, meta_lstm_states(model, meta, task.support, num_steps)[-1], task.query)


# --------------------------------------------------------------------------------- implicit gradients


def hessian(loss: Callable[[Params], Tensor], params: Params) -> Callable[[Tensor], Tensor]:
    """The Hessian of a loss, as what it makes of vectors: ``[num_params] -> [num_params]``."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    grads = flat(slope(loss(leaves), leaves))

    def product(vector: Tensor) -> Tensor:
        parts = torch.autograd.grad(grads, list(leaves.values()), vector, retain_graph=True)
        return torch.cat([part.reshape(-1) for part in parts])

    return product


def dense(product: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """The matrix of a linear map, row by row."""
    return torch.stack([product(row) for row in torch.eye(size, dtype=torch.float64)]).t()


def flat(params: Params) -> Tensor:
    """All parameters as one vector."""
    return torch.cat([p.reshape(-1) for p in params.values()])


def unflat(like: Params, vector: Tensor) -> Params:
    """The inverse of `flat`."""
    parts = torch.split(vector, [p.numel() for p in like.values()])
    return {name: part.view_as(like[name]) for name, part in zip(like, parts, strict=True)}
