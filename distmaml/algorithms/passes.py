"""What the algorithms have in common: the passes of one task over its support and its query set."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.func import vjp

from distmaml import chain_loss
from distmaml.chain import Chain
from distmaml.chain_loss import ChainLoss
from distmaml.episodes import Batch, Episode, fold_in
from distmaml.errors import ConfigError
from distmaml.inner import ExplicitLoss, Linearization, LossFn, Metrics, Params, gradient_and_value, on_one_graph
from distmaml.objectives import Moment, Objective
from distmaml.trees import Tree, tree_map

Merge: TypeAlias = Callable[[Params, Tree, int], Params]
"""(moving parameters, context, inner_step) -> all parameters of the model; linear, a choice of what goes where."""


def support_loss(
    objective: Objective, params: Params, support: Batch, key: Tensor | None, *, merge: Merge | None = None,
    context: Tree = (),
) -> LossFn:  # fmt: skip
    """The loss on the support set as the inner loop sees it.

    Args:
      params: any that the loop may come by, for their names and types.
      merge: where the context holds parameters too that the loop does not move.
    """
    explicit = _explicit(objective, params if merge is None else merge(params, context, 0), support)
    if explicit is not None:
        return explicit if merge is None else _Merged(explicit, merge)

    def loss(params: Params, context: Tree, k: int) -> Tensor:
        whole = params if merge is None else merge(params, context, k)
        return objective.loss(objective.predict(whole, support.inputs, Moment(k, key)), support.targets)[0]

    return loss


def loss_gradient(
    objective: Objective, params: Params, batch: Batch, moment: Moment
) -> tuple[Params, tuple[Tensor, Metrics]]:
    """The gradient of the loss on a batch, and what `objective.loss` returns."""
    explicit = _explicit(objective, params, batch)
    if explicit is not None:
        return explicit.gradient_and_value(params)
    return gradient_and_value(
        lambda params: objective.loss(objective.predict(params, batch.inputs, moment), batch.targets), params
    )


def query_gradient(
    objective: Objective, params: Params, query: Batch, inner_step: int, key: Tensor | None
) -> tuple[Params, Metrics]:
    """Gradient of the query loss at adapted parameters, and the training metrics."""
    grads, returned = loss_gradient(objective, params, query, Moment(inner_step, key))
    return grads, training_metrics(*returned)


def training_metrics(loss: Tensor, metrics: Metrics) -> Metrics:
    """Under the names that a run logs, from what `objective.loss` returns."""
    return {"query_loss": loss, **{f"query_{name}": metric for name, metric in metrics.items()}}


def predict(objective: Objective) -> Callable[[Any, Params, Tree], Any]:
    """An algorithm's `predict` where an adapted state is the parameters of the model."""

    def outputs(meta_params: Any, params: Params, inputs: Tree) -> Any:
        chain = None if torch.is_grad_enabled() else _known_chain(objective, params, inputs)
        if chain is not None and any(block.pool > 1 for block in chain.blocks):  # torch's own pooling is what is slow
            return chain_loss.predict(chain, params, inputs)
        return objective.predict(params, inputs, Moment(0, None))

    return outputs


def halves(key: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Random streams of the support and of the query: a mask must not be shared between them."""
    return (None, None) if key is None else (fold_in(key, 0), fold_in(key, 1))


def num_kept(episode: Episode, support_loss: LossFn, num_inner_steps: int) -> int:
    """Inner steps to keep the activations of: one, and of a chain while they take a fourth of the query pass's at most.

    Fewer again where there are many steps, whose parameters are kept too: twenty steps of one image a class shall take
    1.3 times the memory of one (Conv4). What autograd keeps for a second derivative is several times as much.
    """
    if callable(support_loss):
        return 1
    support, query = len(episode.support.inputs), len(episode.query.inputs)
    return 1 + max(query // (4 * support) - num_inner_steps // 6, 0)


# ---------------------------------------------------------------------------------------- at the start


def uniform(low: float, high: float, shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers in [low, high), of the type of `like` and beside it; the same on every device."""
    if like.is_meta:
        return like.new_empty(tuple(shape))
    drawn = torch.empty(tuple(shape), dtype=like.dtype, device=generator.device).uniform_(
        low, high, generator=generator
    )
    return drawn.to(like.device)


def check_steps(num_inner_steps: int) -> None:
    """Refuses an inner loop that goes nowhere.

    Raises:
      ConfigError: it does.
    """
    if num_inner_steps < 1:
        raise ConfigError(f"num_inner_steps={num_inner_steps} must be 1 or more.")


def check_rate(inner_lr: float) -> None:
    """Refuses a rate that leads nowhere, or up.

    Raises:
      ConfigError: it does.
    """
    if not 0 < inner_lr < math.inf:
        raise ConfigError(f"inner_lr={inner_lr} must be greater than 0 and finite.")


# ------------------------------------------------------------------------- derivatives that are known


def _explicit(objective: Objective, params: Params, batch: Batch) -> ExplicitLoss | None:
    """The loss on a batch with its derivatives, where they are known and the faster way to compute them."""
    chain = _known_chain(objective, params, batch.inputs)
    return None if chain is None else ChainLoss(chain, objective.loss, batch.inputs, batch.targets)


def _known_chain(objective: Objective, params: Params, inputs: Tree) -> Chain | None:
    """The model, where `chain_loss` can and should compute it."""
    chain = objective.chain
    if chain is None or not on_one_graph() or not isinstance(inputs, Tensor) or inputs.device.type != "cpu":
        return None
    if inputs.ndim != 4 or inputs.dtype not in (torch.float32, torch.float64) or params.keys() != chain.parameters:
        return None
    if any(parameter.dtype != inputs.dtype for parameter in params.values()):
        return None
    return chain


class _Merged:
    """A loss that knows its derivatives, as one of the moving parameters and of a context that holds the others."""

    def __init__(self, loss: ExplicitLoss, merge: Merge) -> None:
        self._loss, self._merge = loss, merge

    def gradient_and_value(
        self, params: Params, context: Tree = (), inner_step: int = 0
    ) -> tuple[Params, tuple[Tensor, Metrics]]:
        """The gradient with respect to the moving parameters, and what the loss returns."""
        whole, pull, *_ = vjp(lambda params: self._merge(params, context, inner_step), params)
        grads, returned = self._loss.gradient_and_value(whole)
        return pull(grads)[0], returned

    def linearize(self, params: Params, context: Tree = (), inner_step: int = 0) -> Linearization:
        """That gradient, and how it changes: as merging is linear, ``M^T H M`` for the Hessian H of the whole."""
        whole, pull, *_ = vjp(lambda params, context: self._merge(params, context, inner_step), params, context)
        here, zeros = self._loss.linearize(whole), tree_map(torch.zeros_like, context)
        assert here.grads is not None  # an explicit loss computes them anyway

        def transpose(vector: Params) -> tuple[Params, Tree]:
            pulled: tuple[Params, Tree] = pull(here.transpose(self._merge(vector, zeros, inner_step))[0])
            return pulled

        return Linearization(pull(here.grads)[0], transpose)
