"""MAML, its first-order approximation, and ANIL.

Finn, Abbeel, Levine (2017), "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks",
https://arxiv.org/abs/1703.03400.
Raghu, Raghu, Bengio, Vinyals (2020), "Rapid Learning or Feature Reuse? Towards Understanding the Effectiveness of
MAML", https://arxiv.org/abs/1909.09157.
"""

from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

from distmaml.algorithms import Algorithm
from distmaml.chain_loss import ChainLoss
from distmaml.episodes import Batch, Episode, fold_in
from distmaml.errors import ConfigError
from distmaml.inner import (
    ExplicitLoss,
    LossFn,
    Metrics,
    Params,
    descend,
    descend_vjp,
    gradient_and_value,
    on_one_graph,
    sgd,
)
from distmaml.objectives import Moment, Objective
from distmaml.trees import Tree, tree_add


def maml(objective: Objective, *, inner_lr: float, num_inner_steps: int) -> Algorithm:
    """Exact second-order MAML (Finn et al., 2017).

    ::

        phi_0 = theta,  phi_{k+1} = phi_k - inner_lr * grad L_support(phi_k)
        meta-gradient = d L_query(phi_K) / d theta, K = num_inner_steps

    Args:
      inner_lr: on the mean loss over the support set.
    """
    rule = sgd(inner_lr)

    def adapt(theta: Params, support: Batch, num_steps: int | None = None, key: Tensor | None = None) -> list[Params]:
        steps = num_inner_steps if num_steps is None else num_steps
        return descend(_support_loss(objective, theta, support, key), theta, rule=rule, num_steps=steps)

    def meta_grad(theta: Params, episode: Episode, step: int) -> tuple[Params, Metrics]:
        support_key, query_key = _split(episode.key)
        loss_fn = _support_loss(objective, theta, episode.support, support_key)
        trajectory, pull_back = descend_vjp(
            loss_fn, theta, rule=rule, num_steps=num_inner_steps, num_kept=_num_kept(episode, loss_fn, num_inner_steps)
        )
        query_grads, metrics = _query_grads(objective, trajectory[-1], episode.query, num_inner_steps, query_key)
        return pull_back([*[None] * num_inner_steps, query_grads]).params, metrics

    return Algorithm(lambda params, generator: params, adapt, _predictor(objective), meta_grad, steady=True)


def fomaml(objective: Objective, *, inner_lr: float, num_inner_steps: int) -> Algorithm:
    """First-order MAML (Finn et al., 2017): ``grad L_query(phi_K)``, as if the Hessian in the adjoint were zero.

    An approximation: it ignores how theta moves the path to phi_K. The arguments are those of `maml`.
    """
    second_order = maml(objective, inner_lr=inner_lr, num_inner_steps=num_inner_steps)

    def meta_grad(theta: Params, episode: Episode, step: int) -> tuple[Params, Metrics]:
        support_key, query_key = _split(episode.key)
        phi = second_order.adapt(theta, episode.support, key=support_key)[-1]
        return _query_grads(objective, phi, episode.query, num_inner_steps, query_key)

    return second_order._replace(meta_grad=meta_grad)


def anil(objective: Objective, *, inner_lr: float, num_inner_steps: int) -> Algorithm:
    """ANIL (Raghu et al., 2020): MAML whose inner loop moves the head alone, on features that the body computes once.

    The body costs one pass over support and one over query, forward and backward, whatever the number of inner
    steps. The meta-gradient is exact for head and body: the features are the context of the inner loop.
    The arguments are those of `maml`.

    Raises:
      ConfigError: at the first gradient, that the head is the whole model.
    """
    rule = sgd(inner_lr)
    prefix = objective.head + "."

    def of_head(params: Params) -> Params:
        return {name: p for name, p in params.items() if name.startswith(prefix)}

    def head_loss(targets: Tensor, key: Tensor | None) -> LossFn:
        def loss(head: Params, features: Tensor, k: int) -> Tensor:
            return objective.loss(objective.apply_head(head, features, Moment(k, key)), targets)[0]

        return loss

    def adapt(theta: Params, support: Batch, num_steps: int | None = None, key: Tensor | None = None) -> list[Params]:
        steps = num_inner_steps if num_steps is None else num_steps
        features = objective.features(theta, support.inputs, Moment(0, key))
        heads = descend(head_loss(support.targets, key), of_head(theta), rule=rule, num_steps=steps, context=features)
        return [{**theta, **head} for head in heads]

    def meta_grad(theta: Params, episode: Episode, step: int) -> tuple[Params, Metrics]:
        support_key, query_key = _split(episode.key)
        support = episode.support
        body = {name: p for name, p in theta.items() if not name.startswith(prefix)}
        if not body:
            raise ConfigError(f"the head {objective.head!r} is the whole model, so anil is maml here: use maml.")

        def of_body(body: Params) -> Tensor:
            return objective.features({**theta, **body}, support.inputs, Moment(0, support_key))

        features, pull_features, *_ = vjp(of_body, body)
        loss_fn = head_loss(support.targets, support_key)
        heads, pull_back = descend_vjp(loss_fn, of_head(theta), rule=rule, num_steps=num_inner_steps, context=features)
        phi = {**theta, **heads[-1]}
        query_grads, metrics = _query_grads(objective, phi, episode.query, num_inner_steps, query_key)
        back = pull_back([*[None] * num_inner_steps, of_head(query_grads)])
        through_features = pull_features(back.context)[0]
        grads = {**tree_add({name: query_grads[name] for name in body}, through_features), **back.params}
        return {name: grads[name] for name in theta}, metrics

    return Algorithm(lambda params, generator: params, adapt, _predictor(objective), meta_grad, steady=True)


def _num_kept(episode: Episode, support_loss: LossFn, num_inner_steps: int) -> int:
    """Inner steps to keep the activations of: one, and of a chain while they take a fourth of the query pass's at most.

    Fewer again where there are many steps, whose parameters are kept too: twenty steps of one image a class shall take
    1.3 times the memory of one (Conv4). What autograd keeps for a second derivative is several times as much.
    """
    if callable(support_loss):
        return 1
    support, query = len(episode.support.inputs), len(episode.query.inputs)
    return 1 + max(query // (4 * support) - num_inner_steps // 6, 0)


def _explicit(objective: Objective, params: Params, batch: Batch) -> ExplicitLoss | None:
    """The loss on a batch with its derivatives, where they are known and the faster way to compute them."""
    chain, inputs = objective.chain, batch.inputs
    if chain is None or not on_one_graph() or not isinstance(inputs, Tensor) or inputs.device.type != "cpu":
        return None
    if inputs.ndim != 4 or inputs.dtype not in (torch.float32, torch.float64) or params.keys() != chain.parameters:
        return None
    if any(parameter.dtype != inputs.dtype for parameter in params.values()):
        return None
    return ChainLoss(chain, objective.loss, inputs, batch.targets)


def _support_loss(objective: Objective, theta: Params, support: Batch, key: Tensor | None) -> LossFn:
    explicit = _explicit(objective, theta, support)
    if explicit is not None:
        return explicit

    def loss(params: Params, context: Tree, k: int) -> Tensor:
        return objective.loss(objective.predict(params, support.inputs, Moment(k, key)), support.targets)[0]

    return loss


def _query_grads(
    objective: Objective, phi: Params, query: Batch, inner_step: int, key: Tensor | None
) -> tuple[Params, Metrics]:
    """Gradient of the query loss at phi, and the training metrics."""
    explicit = _explicit(objective, phi, query)

    def loss(params: Params) -> tuple[Tensor, Metrics]:
        return objective.loss(objective.predict(params, query.inputs, Moment(inner_step, key)), query.targets)

    grads, (value, metrics) = explicit.gradient_and_value(phi) if explicit else gradient_and_value(loss, phi)
    return grads, {"query_loss": value, **{f"query_{name}": metric for name, metric in metrics.items()}}


def _predictor(objective: Objective) -> Any:
    return lambda theta, params, inputs: objective.predict(params, inputs, Moment(0, None))


def _split(key: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Streams of the support and of the query: a mask must not be shared between them."""
    return (None, None) if key is None else (fold_in(key, 0), fold_in(key, 1))
