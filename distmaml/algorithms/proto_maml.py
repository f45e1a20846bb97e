"""Proto-MAML: MAML whose head starts, in each task, as the classifier of prototypical networks.

Triantafillou et al. (2020), "Meta-Dataset: A Dataset of Datasets for Learning to Learn from Few Examples",
https://arxiv.org/abs/1903.03096.
"""

import torch
from torch import Tensor
from torch.func import vjp

from distmaml.algorithms import Algorithm
from distmaml.algorithms.heads import body_of, linear_head
from distmaml.algorithms.metric import prototypes
from distmaml.algorithms.passes import check_rate, check_steps, halves, num_kept, predict, query_gradient, support_loss
from distmaml.episodes import Batch, Episode
from distmaml.inner import Metrics, Params, descend, descend_vjp, sgd
from distmaml.objectives import Moment, Objective


def proto_maml(objective: Objective, *, inner_lr: float, num_inner_steps: int) -> Algorithm:
    """Proto-MAML (Triantafillou et al., 2020).

    ::

        head_0: weight_n = 2 c_n, bias_n = -|c_n|^2,  c_n the mean feature of class n in the support set
        phi_0 = (theta, head_0),  phi_{k+1} = phi_k - inner_lr * grad L_support(phi_k)
        meta-gradient = d L_query(phi_K) / d theta, through head_0 too, K = num_inner_steps

    The meta-parameters are those of the body. The arguments are those of `maml`.

    Raises:
      ConfigError: no inner step, no rate above 0; a model that does not end in a linear layer, or is nothing else.
    """
    check_steps(num_inner_steps)
    check_rate(inner_lr)
    num_ways = linear_head(objective, "proto_maml", bias=True).out_features
    body_of(objective, dict(objective.model.named_parameters()), "proto_maml")
    rule = sgd(inner_lr)

    def with_head(theta: Params, support: Batch, key: Tensor | None) -> Params:
        features = objective.features(theta, support.inputs, Moment(0, key))
        centers = prototypes(features, support.targets, num_ways)
        head = {"weight": 2 * centers, "bias": -centers.square().sum(-1)}
        return {**theta, **{f"{objective.head}.{name}": value for name, value in head.items()}}

    def adapt(theta: Params, support: Batch, num_steps: int | None = None, key: Tensor | None = None) -> list[Params]:
        phi = with_head(theta, support, key)
        steps = num_inner_steps if num_steps is None else num_steps
        return descend(support_loss(objective, phi, support, key), phi, rule=rule, num_steps=steps)

    def meta_grad(theta: Params, episode: Episode, step: int) -> tuple[Params, Metrics]:
        support_key, query_key = halves(episode.key)
        phi, pull_head, *_ = vjp(lambda theta: with_head(theta, episode.support, support_key), theta)
        loss_fn = support_loss(objective, phi, episode.support, support_key)
        trajectory, pull_back = descend_vjp(
            loss_fn, phi, rule=rule, num_steps=num_inner_steps, num_kept=num_kept(episode, loss_fn, num_inner_steps)
        )
        query_grads, metrics = query_gradient(objective, trajectory[-1], episode.query, num_inner_steps, query_key)
        return pull_head(pull_back([*[None] * num_inner_steps, query_grads]).params)[0], metrics

    def init(params: Params, generator: torch.Generator) -> Params:
        return body_of(objective, params, "proto_maml")

    return Algorithm(init, adapt, predict(objective), meta_grad, steady_from=0)
