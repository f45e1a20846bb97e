"""Reptile: the initialisation moves towards where the inner loop ends.

Nichol, Achiam, Schulman (2018), "On First-Order Meta-Learning Algorithms", https://arxiv.org/abs/1803.02999; where the
paper leaves something open, the authors' code, https://github.com/openai/supervised-reptile, is followed.
"""

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from distmaml.algorithms import Algorithm, MetaParams, Stateful
from distmaml.algorithms.passes import check_rate, check_steps, halves, loss_gradient, predict, training_metrics
from distmaml.episodes import Batch, Episode, fold_in
from distmaml.errors import ConfigError
from distmaml.inner import Metrics, Params, last
from distmaml.objectives import Moment, Objective
from distmaml.trees import tree_leaves, tree_map

BETA, EPSILON = 0.999, 1e-8


class Moments(NamedTuple):
    """What Adam without momentum knows: running means of squared gradients, and of how many."""

    squares: Params
    num_squares: Tensor


class _Point(NamedTuple):
    """Where the inner loop is, and what the loss was on the way there."""

    params: Params
    moments: Moments | None
    returned: tuple[Tensor, Metrics] | None


def reptile(
    objective: Objective,
    *,
    inner_lr: float,
    num_inner_steps: int,
    inner_batch_size: int | None = None,
    inner_optimizer: Literal["sgd", "adam"] = "sgd",
) -> Algorithm:
    """Reptile (Nichol et al., 2018).

    ::

        phi_0 = theta,  phi_{k+1} = U(phi_k, grad L_{B_k}(phi_k)),  B_k a mini-batch of the task's samples
        "meta-gradient" = theta - phi_K, K = num_inner_steps

    It is the gradient of no loss: with plain SGD as the outer optimiser, ``outer_lr`` is the paper's step size, which
    falls from 1 to 0. Training knows no support and query; both are one pool. Adaptation takes the support set as a
    whole at each step.

    Args:
      inner_batch_size: samples of a mini-batch in training, without replacement until the pool is used up; the whole
        pool by default.
      inner_optimizer: "adam" is Adam without momentum (beta_1 = 0), whose second moments go on from task to task, the
        mean over the tasks of a step. Then the meta-parameters are `Stateful`.

    Raises:
      ConfigError: no inner step, no rate above 0; no such optimizer; an empty mini-batch; a mini-batch that is larger
        than the pool.
    """
    check_steps(num_inner_steps)
    check_rate(inner_lr)
    if inner_batch_size is not None and inner_batch_size < 1:
        raise ConfigError(f"inner_batch_size={inner_batch_size} must be 1 or more.")
    if inner_optimizer not in ("sgd", "adam"):
        raise ConfigError(f"inner_optimizer={inner_optimizer!r} must be one of sgd, adam.")
    adam = inner_optimizer == "adam"

    def init(params: Params, generator: torch.Generator) -> MetaParams:
        count = tree_leaves(params)[0].new_zeros(())
        return Stateful(params, Moments(tree_map(torch.zeros_like, params), count)) if adam else params

    def run(meta: MetaParams, batch_of: Callable[[int], Batch], num_steps: int, key: Tensor | None) -> Iterator[_Point]:
        here = _Point(meta.learned, meta.state, None) if isinstance(meta, Stateful) else _Point(meta, None, None)
        yield here
        for k in range(num_steps):
            grads, returned = loss_gradient(objective, here.params, batch_of(k), Moment(k, key))
            moments = here.moments
            if moments is not None:
                grads, moments = _scaled(grads, moments)
            here = _Point(tree_map(lambda p, g: p - inner_lr * g, here.params, grads), moments, returned)
            yield here

    def adapt(
        meta: MetaParams, support: Batch, num_steps: int | None = None, key: Tensor | None = None
    ) -> list[Params]:
        steps = num_inner_steps if num_steps is None else num_steps
        return [point.params for point in run(meta, lambda k: support, steps, key)]

    def meta_grad(meta: MetaParams, episode: Episode, step: int) -> tuple[MetaParams, Metrics]:
        pool = tree_map(lambda support, query: torch.cat([support, query]), episode.support, episode.query)
        order_key, pass_key = halves(episode.key)
        batches = mini_batches(pool, inner_batch_size, num_inner_steps, order_key)
        phi, moments, returned = last(run(meta, lambda k: batches[k], num_inner_steps, pass_key))
        moved = tree_map(torch.sub, meta if moments is None else meta.learned, phi)
        # Of the last batch before its step: there is no query set that the inner loop has not seen.
        return (moved if moments is None else Stateful(moved, moments)), training_metrics(*returned)

    return Algorithm(init, adapt, predict(objective), meta_grad, steady_from=0)


def _scaled(grads: Params, before: Moments) -> tuple[Params, Moments]:
    """Adam's step of length 1 without momentum, and the moments after it (Kingma and Ba, 2015)."""
    squares = tree_map(lambda v, g: BETA * v + (1 - BETA) * g * g, before.squares, grads)
    num_squares = before.num_squares + 1
    bias = -torch.expm1(num_squares * math.log(BETA))
    return tree_map(lambda g, v: g / ((v / bias).sqrt() + EPSILON), grads, squares), Moments(squares, num_squares)


def mini_batches(pool: Batch, size: int | None, number: int, key: Tensor | None) -> list[Batch]:
    """Mini-batches that go through the pool in random order, and again in another; in its own order without a key.

    Raises:
      ConfigError: the pool is smaller than one of them.
    """
    total = len(tree_leaves(pool)[0])
    if size is None:
        return [pool] * number
    if size > total:
        raise ConfigError(
            f"inner_batch_size={size} is more than the {total} samples of a task, support and query. Lower it, or "
            "raise num_queries."
        )
    rounds = range(math.ceil(number * size / total))
    places = torch.arange(total, device=tree_leaves(pool)[0].device)
    order = torch.cat([places if key is None else fold_in(fold_in(key, n), places).argsort() for n in rounds])
    return [tree_map(lambda leaf, at=order[k * size : (k + 1) * size]: leaf[at], pool) for k in range(number)]
