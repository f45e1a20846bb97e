"""The baseline without meta-learning: train a body to tell all training classes apart, then a new head for each task.

Chen, Liu, Kira, Wang, Huang (2019), "A Closer Look at Few-shot Classification", https://arxiv.org/abs/1904.04232 (with
a body that stays as it was trained); Ravi, Larochelle (2017), https://openreview.net/forum?id=rJY0-Kcll (with one that
is tuned too).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from distmaml.algorithms import Algorithm
from distmaml.algorithms.heads import body_of, linear_head
from distmaml.algorithms.passes import check_rate, check_steps, predict, support_loss, training_metrics, uniform
from distmaml.episodes import Batch, Episode
from distmaml.errors import ConfigError
from distmaml.inner import Metrics, Params, descend, gradient_and_value, sgd_by_name
from distmaml.objectives import Moment, Objective
from distmaml.trees import tree_map


class FineTuningParams(NamedTuple):
    """What is trained: the body, and the head that tells the training classes apart, ``[num_classes, features]``."""

    body: Params
    classes: Params


def fine_tuning(
    objective: Objective, *, inner_lr: float, num_inner_steps: int = 10, body_lr: float = 0.0, num_classes: int | None
) -> Algorithm:
    """Pre-training on all classes, and fine-tuning (Chen et al., 2019).

    ::

        training: the gradient of the cross-entropy over all training classes, on support and query set as one batch
        task: head_0 = 0,  head_{k+1} = head_k - inner_lr * grad L_support, and the body likewise by body_lr

    Training adapts to nothing, and its metrics are those of the training classes.

    Args:
      inner_lr: of the new head.
      body_lr: of the body; 0 leaves it as it was trained.
      num_classes: training classes.

    Raises:
      ConfigError: no inner step, no rate above 0, a body_lr below 0, no class; a model that does not end in a linear
        layer, or is nothing else; tasks without classes.
    """
    check_steps(num_inner_steps)
    check_rate(inner_lr)
    if not 0 <= body_lr < math.inf:
        raise ConfigError(f"body_lr={body_lr} must be 0 or more, and finite.")
    layer = linear_head(objective, "fine_tuning", bias=True)
    names = {"weight": f"{objective.head}.weight", "bias": f"{objective.head}.bias"}
    body_of(objective, dict(objective.model.named_parameters()), "fine_tuning")
    if num_classes is None:
        raise ConfigError(
            "fine_tuning is trained to tell all classes of the training split apart, and these tasks have no classes. "
            "Take tasks with classes (images), or another algorithm."
        )
    if num_classes < 1:
        raise ConfigError(f"num_classes={num_classes} must be 1 or more.")
    rule = sgd_by_name(lambda name: inner_lr if name in names.values() else body_lr)

    def init(params: Params, generator: torch.Generator) -> FineTuningParams:
        like, bound = params[names["weight"]], layer.in_features**-0.5
        weight = uniform(-bound, bound, (num_classes, layer.in_features), like, generator)
        classes = {"weight": weight, "bias": like.new_zeros(num_classes)}
        return FineTuningParams(body_of(objective, params, "fine_tuning"), classes)

    def adapt(
        meta: FineTuningParams, support: Batch, num_steps: int | None = None, key: Tensor | None = None
    ) -> list[Params]:
        weight = meta.classes["weight"]
        shapes = {"weight": (layer.out_features, layer.in_features), "bias": (layer.out_features,)}
        phi = {**meta.body, **{names[kind]: weight.new_zeros(shape) for kind, shape in shapes.items()}}
        steps = num_inner_steps if num_steps is None else num_steps
        return descend(support_loss(objective, phi, support, key), phi, rule=rule, num_steps=steps)

    def meta_grad(meta: FineTuningParams, episode: Episode, step: int) -> tuple[FineTuningParams, Metrics]:
        if episode.classes is None:
            raise ConfigError("fine_tuning needs episodes that say which classes their labels stand for (classes).")
        both = tree_map(lambda support, query: torch.cat([support, query]), episode.support, episode.query)
        labels = episode.classes[both.targets]

        def loss(meta: FineTuningParams) -> tuple[Tensor, Metrics]:
            features = objective.features(meta.body, both.inputs, Moment(0, episode.key))
            return objective.loss(F.linear(features, meta.classes["weight"], meta.classes["bias"]), labels)

        grads, returned = gradient_and_value(loss, meta)
        return grads, training_metrics(*returned)

    return Algorithm(init, adapt, predict(objective), meta_grad, steady_from=0)
