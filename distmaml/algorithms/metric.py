"""Prototypical and matching networks: a learned space in which near is alike. Nothing descends at test time.

Snell, Swersky, Zemel (2017), "Prototypical Networks for Few-shot Learning", https://arxiv.org/abs/1703.05175.
Vinyals, Blundell, Lillicrap, Kavukcuoglu, Wierstra (2016), "Matching Networks for One Shot Learning",
https://arxiv.org/abs/1606.04080.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from distmaml.algorithms import Adapted, Algorithm
from distmaml.algorithms.heads import body_of, linear_head, one_hot
from distmaml.algorithms.passes import halves, training_metrics
from distmaml.episodes import Batch, Episode
from distmaml.inner import Metrics, Params, gradient_and_value
from distmaml.objectives import Moment, Objective
from distmaml.trees import Tree


class Prototypes(NamedTuple):
    """What prototypical networks remember of a task: of each class the mean feature, and how many it is the mean of."""

    centers: Tensor
    shown: Tensor


class Labelled(NamedTuple):
    """What matching networks remember of a task: features of the support set, and labels as one of num_ways."""

    features: Tensor
    labels: Tensor


Remember: TypeAlias = Callable[[Tensor, Tensor], Adapted]
"""(features, labels) of the support set -> what is kept of a task."""
Compare: TypeAlias = Callable[[Adapted, Tensor], Tensor]
"""(what is kept, features of queries) -> logits."""


def prototypical_networks(objective: Objective) -> Algorithm:
    """Prototypical networks (Snell et al., 2017), on the features before the model's head.

    ::

        logits_n(x) = -|f(x) - c_n|^2,  c_n the mean of f over class n in the support set, n over its classes

    The meta-parameters are those of the body f; the gradient is that of the query loss.

    Raises:
      ConfigError: a model that does not end in a linear layer, or is nothing else.
    """
    num_ways = linear_head(objective, "prototypical_networks").out_features

    def remember(features: Tensor, labels: Tensor) -> Prototypes:
        return Prototypes(prototypes(features, labels, num_ways), one_hot(labels, num_ways, features).sum(0))

    def compare(known: Prototypes, queries: Tensor) -> Tensor:
        logits = -(queries.unsqueeze(1) - known.centers.unsqueeze(0)).square().sum(-1)
        # A class that the support set does not show has no probability to speak of, and a logit that is finite.
        least = logits.amin(-1, keepdim=True) + math.log(torch.finfo(logits.dtype).tiny)
        return torch.where(known.shown > 0, logits, least)

    return _by_comparison(objective, "prototypical_networks", remember, compare)


def matching_networks(objective: Objective) -> Algorithm:
    """Matching networks (Vinyals et al., 2016), without full-context embeddings, on the features before the head.

    ::

        P(y | x) = sum_i a(x, x_i) y_i,  a(x, x_i) = softmax_i cosine(f(x), f(x_i)),  i over the support set

    Logits are ``log P``. The meta-parameters are those of the body f; the gradient is that of the query loss.

    Raises:
      ConfigError: a model that does not end in a linear layer, or is nothing else.
    """
    num_ways = linear_head(objective, "matching_networks").out_features

    def remember(features: Tensor, labels: Tensor) -> Labelled:
        return Labelled(F.normalize(features, dim=-1), one_hot(labels, num_ways, features))

    def compare(known: Labelled, queries: Tensor) -> Tensor:
        attention = (F.normalize(queries, dim=-1) @ known.features.t()).softmax(-1)
        # A class that the support set does not show has the probability 0, and no logarithm.
        return (attention @ known.labels).clamp_min(torch.finfo(queries.dtype).tiny).log()

    return _by_comparison(objective, "matching_networks", remember, compare)


def prototypes(features: Tensor, labels: Tensor, num_ways: int) -> Tensor:
    """The mean feature of each class, ``[num_ways, num_features]``; zero for a class that is not there."""
    members = one_hot(labels, num_ways, features)
    return members.t() @ features / members.sum(0).clamp_min(1).unsqueeze(-1)


def _by_comparison(objective: Objective, name: str, remember: Remember, compare: Compare) -> Algorithm:
    body_of(objective, dict(objective.model.named_parameters()), name)

    def adapt(body: Params, support: Batch, num_steps: int | None = None, key: Tensor | None = None) -> list[Adapted]:
        return [remember(objective.features(body, support.inputs, Moment(0, key)), support.targets)]

    def predict(body: Params, known: Adapted, inputs: Tree) -> Tensor:
        return compare(known, objective.features(body, inputs, Moment(0, None)))

    def meta_grad(body: Params, episode: Episode, step: int) -> tuple[Params, Metrics]:
        support_key, query_key = halves(episode.key)

        def loss(body: Params) -> tuple[Tensor, Metrics]:
            (known,) = adapt(body, episode.support, key=support_key)
            queries = objective.features(body, episode.query.inputs, Moment(0, query_key))
            return objective.loss(compare(known, queries), episode.query.targets)

        grads, returned = gradient_and_value(loss, body)
        return grads, training_metrics(*returned)

    def init(params: Params, generator: torch.Generator) -> Params:
        return body_of(objective, params, name)

    return Algorithm(init, adapt, predict, meta_grad, steady_from=0, descends=False)
