"""CAVIA: the inner loop moves a few context parameters alone, and the network is meta-learned.

Zintgraf, Shiarlis, Kurin, Hofmann, Whiteson (2019), "Fast Context Adaptation via Meta-Learning",
https://arxiv.org/abs/1810.03642.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from distmaml.algorithms import Algorithm
from distmaml.algorithms.modulation import layers_of, modulated
from distmaml.algorithms.passes import check_rate, check_steps, halves, training_metrics, uniform
from distmaml.episodes import Batch, Episode
from distmaml.errors import ConfigError
from distmaml.inner import LossFn, Metrics, Params, descend, descend_vjp, gradient_and_value, sgd
from distmaml.objectives import Moment, Objective
from distmaml.trees import Tree, tree_add, tree_leaves


class CaviaParams(NamedTuple):
    """What CAVIA learns: the network, and the linear map from context parameters to what they do to a layer."""

    params: Params
    modulation: Params


def cavia(
    objective: Objective,
    *,
    inner_lr: float,
    num_inner_steps: int,
    num_context: int = 5,
    modulated_layer: str | None = None,
    modulation: Literal["shift", "scale_shift"] = "shift",
) -> Algorithm:
    """CAVIA (Zintgraf et al., 2019).

    ::

        context_0 = 0,  context_{k+1} = context_k - inner_lr * grad_context L_support(context_k, theta)
        shift:       layer(x) + W context                        (context parameters as further inputs of the layer)
        scale_shift: (1 + W_1 context + b_1) * layer(x) + W_2 context + b_2                                    (FiLM)
        meta-gradient = d L_query(context_K, theta) / d (theta, W, b), K = num_inner_steps

    Args:
      inner_lr: 1.0 in the paper.
      num_context: context parameters.
      modulated_layer: name of a batch or instance norm, a linear layer or a convolution; by default the first norm of
        the model, or, in one without, the first layer.

    Raises:
      ConfigError: no inner step, no rate above 0, no context parameter, no such modulation, no such layer, or one that
        a norm over samples or positions follows, in a `torch.nn.Sequential` or a known chain, or that the model never
        calls.
    """
    check_steps(num_inner_steps)
    check_rate(inner_lr)
    if num_context < 1:
        raise ConfigError(f"num_context={num_context} must be 1 or more: the inner loop moves nothing else.")
    if modulation not in ("shift", "scale_shift"):
        raise ConfigError(f"modulation={modulation!r} must be one of shift, scale_shift.")
    name, channels = modulated(objective, modulated_layer)
    rule = sgd(inner_lr)
    parts = 1 if modulation == "shift" else 2

    def init(params: Params, generator: torch.Generator) -> CaviaParams:
        like, bound = tree_leaves(params)[0], num_context**-0.5
        weight = uniform(-bound, bound, (parts * channels, num_context), like, generator)
        offset = {"bias": like.new_zeros(parts * channels)} if parts == 2 else {}  # one shift is the layer's own
        return CaviaParams(params, {"weight": weight, **offset})

    def outputs(meta: CaviaParams, context: Params, inputs: Tree, moment: Moment) -> Any:
        values = meta.modulation["weight"] @ context["context"] + meta.modulation.get("bias", 0.0)

        called = []

        def modulate(layer: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            called.append(layer)
            along = values if isinstance(layer, nn.Linear) else values.view(-1, *[1] * (arguments[0].ndim - 2))
            return output + along if parts == 1 else (1 + along[:channels]) * output + along[channels:]

        predicted = objective.predict_hooked(meta.params, inputs, moment, {name: modulate})
        if not called:  # an attention reads the weights of its layers without calling them
            others = ", ".join(other for other, _ in layers_of(objective) if other != name)
            raise ConfigError(
                f"modulated_layer={name!r} is never called by the model, so a context has no effect there. Name "
                f"another one: {others or 'it has none'}."
            )
        return predicted

    def loss_on(batch: Batch, key: Tensor | None) -> LossFn:
        def loss(context: Params, meta: Tree, k: int) -> Tensor:
            return objective.loss(outputs(meta, context, batch.inputs, Moment(k, key)), batch.targets)[0]

        return loss

    def origin(meta: CaviaParams) -> Params:
        return {"context": meta.modulation["weight"].new_zeros(num_context)}

    def adapt(
        meta: CaviaParams, support: Batch, num_steps: int | None = None, key: Tensor | None = None
    ) -> list[Params]:
        steps = num_inner_steps if num_steps is None else num_steps
        return descend(loss_on(support, key), origin(meta), rule=rule, num_steps=steps, context=meta)

    def meta_grad(meta: CaviaParams, episode: Episode, step: int) -> tuple[CaviaParams, Metrics]:
        support_key, query_key = halves(episode.key)
        contexts, pull_back = descend_vjp(
            loss_on(episode.support, support_key), origin(meta), rule=rule, num_steps=num_inner_steps, context=meta
        )

        def query_loss(both: tuple[CaviaParams, Params]) -> tuple[Tensor, Metrics]:
            predicted = outputs(*both, episode.query.inputs, Moment(num_inner_steps, query_key))
            return objective.loss(predicted, episode.query.targets)

        (direct, of_context), returned = gradient_and_value(query_loss, (meta, contexts[-1]))
        back = pull_back([*[None] * num_inner_steps, of_context])
        return tree_add(direct, back.context), training_metrics(*returned)

    def predict(meta: CaviaParams, context: Params, inputs: Tree) -> Any:
        return outputs(meta, context, inputs, Moment(0, None))

    return Algorithm(init, adapt, predict, meta_grad, steady_from=0)
