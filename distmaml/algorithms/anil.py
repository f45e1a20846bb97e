"""ANIL: the inner loop moves the head alone.

Raghu, Raghu, Bengio, Vinyals (2020), "Rapid Learning or Feature Reuse? Towards Understanding the Effectiveness of
MAML", https://arxiv.org/abs/1909.09157.
"""

from torch import Tensor
from torch.func import vjp

from distmaml.algorithms import Algorithm
from distmaml.algorithms.heads import body_of, head_of
from distmaml.algorithms.passes import check_rate, check_steps, halves, predict, query_gradient
from distmaml.episodes import Batch, Episode
from distmaml.inner import LossFn, Metrics, Params, descend, descend_vjp, sgd
from distmaml.objectives import Moment, Objective
from distmaml.trees import tree_add


def anil(objective: Objective, *, inner_lr: float, num_inner_steps: int) -> Algorithm:
    """ANIL (Raghu et al., 2020): MAML whose inner loop moves the head alone, on features that the body computes once.

    ::

        head_{k+1} = head_k - inner_lr * grad_head L_support(body, head_k)
        meta-gradient = d L_query(body, head_K) / d (body, head), K = num_inner_steps

    The body costs one pass over support and one over query, forward and backward, whatever the number of inner
    steps. The meta-gradient is exact for head and body: the features are the context of the inner loop.
    The arguments are those of `maml`.

    Raises:
      ConfigError: no inner step, no rate above 0; a model that is nothing but its head.
    """
    check_steps(num_inner_steps)
    check_rate(inner_lr)
    body_of(objective, dict(objective.model.named_parameters()), "anil")
    rule = sgd(inner_lr)

    def head_loss(targets: Tensor, key: Tensor | None) -> LossFn:
        def loss(head: Params, features: Tensor, k: int) -> Tensor:
            return objective.loss(objective.apply_head(head, features, Moment(k, key)), targets)[0]

        return loss

    def adapt(theta: Params, support: Batch, num_steps: int | None = None, key: Tensor | None = None) -> list[Params]:
        steps = num_inner_steps if num_steps is None else num_steps
        features = objective.features(theta, support.inputs, Moment(0, key))
        loss_fn, head = head_loss(support.targets, key), head_of(objective, theta)
        return [{**theta, **phi} for phi in descend(loss_fn, head, rule=rule, num_steps=steps, context=features)]

    def meta_grad(theta: Params, episode: Episode, step: int) -> tuple[Params, Metrics]:
        support_key, query_key = halves(episode.key)
        support, head = episode.support, head_of(objective, theta)

        def of_body(body: Params) -> Tensor:
            return objective.features({**theta, **body}, support.inputs, Moment(0, support_key))

        body = body_of(objective, theta, "anil")
        features, pull_features, *_ = vjp(of_body, body)
        loss_fn = head_loss(support.targets, support_key)
        heads, pull_back = descend_vjp(loss_fn, head, rule=rule, num_steps=num_inner_steps, context=features)
        phi = {**theta, **heads[-1]}
        query_grads, metrics = query_gradient(objective, phi, episode.query, num_inner_steps, query_key)
        back = pull_back([*[None] * num_inner_steps, head_of(objective, query_grads)])
        through_features = pull_features(back.context)[0]
        grads = {**tree_add({name: query_grads[name] for name in body}, through_features), **back.params}
        return {name: grads[name] for name in theta}, metrics

    return Algorithm(lambda params, generator: params, adapt, predict(objective), meta_grad, steady_from=0)
