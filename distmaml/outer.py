"""The outer loop's arithmetic: a meta-gradient over many tasks, and the step along it.

Knows no processes: what several workers computed is added in `collectives.py`.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distmaml.algorithms import Algorithm, MetaParams, Stateful, learned_part
from distmaml.config import Outer
from distmaml.engine import sum_over_tasks
from distmaml.episodes import TaskBatch
from distmaml.errors import CheckpointError, ConfigError
from distmaml.inner import Metrics
from distmaml.trees import named_leaves, tree_add, tree_index, tree_leaves, tree_map, tree_unflatten

META_PARAMS = "meta_params/"
"""Before the names of the meta-parameters in a checkpoint, which holds the optimiser's state too."""


def meta_gradient(
    algorithm: Algorithm, meta_params: MetaParams, tasks: TaskBatch, step: int, *, chunk_size: int | None = None
) -> tuple[MetaParams, Metrics]:
    """Mean meta-gradient and metrics over tasks.

    Args:
      algorithm: from ``maml(...)`` or a sibling.
      meta_params: as `algorithm.init` made them.
      tasks: leaves ``[num_tasks, ...]``.
      step: outer step, for algorithms whose gradient changes over training.
      chunk_size: tasks computed together, which bounds the memory; all by default.

    Returns:
      The mean gradient, shaped like `meta_params`, and the mean of each metric.

    Raises:
      ConfigError: no task at all, or a chunk of none.
    """
    num_tasks = len(tree_leaves(tasks)[0])
    size = num_tasks if chunk_size is None else chunk_size
    if size < 1:
        raise ConfigError(
            f"{num_tasks} tasks with chunk_size={chunk_size} have no mean gradient; both must be 1 or more."
        )
    # Tasks of pictures go to convolutions, which on a CPU are faster one task after the other.
    leaves = [leaf for leaf in tree_leaves(tasks[:2]) if isinstance(leaf, Tensor)]
    side_by_side = not any(leaf.ndim > 4 and leaf.device.type == "cpu" for leaf in leaves)
    total: tuple[MetaParams, Metrics] | None = None
    for start in range(0, num_tasks, size):
        chunk = tree_index(tasks, slice(start, start + size))
        part = chunk_sum(algorithm, meta_params, chunk, step, vectorize=side_by_side)
        total = part if total is None else tree_add(total, part)
    mean: tuple[MetaParams, Metrics] = tree_map(lambda leaf: leaf / num_tasks, total)
    return mean


def chunk_sum(
    algorithm: Algorithm, meta_params: MetaParams, tasks: TaskBatch, step: int, *, vectorize: bool = True
) -> tuple[MetaParams, Metrics]:
    """Sum of meta-gradients and metrics over the tasks of one chunk, on the engine that the module gets along with.

    Args:
      vectorize: False keeps to one task after the other, which is faster for convolutions on a CPU.
    """
    summed: tuple[MetaParams, Metrics] = sum_over_tasks(
        algorithm.adapt, lambda task: algorithm.meta_grad(meta_params, task, step), tasks, vectorize=vectorize
    )
    return summed


# --------------------------------------------------------------------------------------------- the step


class OuterState(NamedTuple):
    """What an outer step changes.

    Attributes:
      meta_params: updated in place, always: a GPU's recorded work reads them where they are.
      optimizer: torch's, over the leaves of `meta_params` that are learned.
    """

    meta_params: MetaParams
    optimizer: torch.optim.Optimizer


def init_outer(meta_params: MetaParams, options: Outer) -> OuterState:
    """The state before the first outer step."""
    meta_params = tree_map(lambda leaf: leaf.detach().clone(), meta_params)
    leaves = tree_leaves(learned_part(meta_params))
    # Fused: one loop over all parameters, where the others make a dozen small ones of each.
    groups: dict[str, Any] = {"lr": options.outer_lr, "weight_decay": options.weight_decay, "fused": True}
    optimizer: torch.optim.Optimizer
    if options.optimizer == "sgd":
        optimizer = torch.optim.SGD(leaves, **groups)
    else:
        kind = torch.optim.AdamW if options.optimizer == "adamw" else torch.optim.Adam
        optimizer = kind(leaves, **groups)
    return OuterState(meta_params, optimizer)


def outer_step(state: OuterState, meta_grads: MetaParams, step: int, options: Outer) -> Tensor:
    """One step of the outer optimiser; returns the norm of the meta-gradient before clipping.

    Learning rate and clipping are functions of `step` and the gradient alone, so they have no state to restore.
    """
    grads = tree_leaves(learned_part(meta_grads))
    norm = torch.nn.utils.get_total_norm(grads)
    leaves = tree_leaves(learned_part(state.meta_params))
    for leaf, gradient in zip(leaves, grads, strict=True):
        # Fused optimisers go over memory, and on a CPU they do not look whether a gradient lies as its parameter does.
        leaf.grad = gradient if gradient.stride() == leaf.stride() else torch.empty_like(leaf).copy_(gradient)
    if options.clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(leaves, options.clip_norm, norm)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(step, options)
    state.optimizer.step()
    state.optimizer.zero_grad()
    if isinstance(state.meta_params, Stateful):
        tree_map(Tensor.copy_, state.meta_params.state, meta_grads.state)
    return norm


def parameter_norm(state: OuterState) -> Tensor:
    """Euclidean norm of the learned meta-parameters."""
    return torch.nn.utils.get_total_norm([leaf.detach() for leaf in tree_leaves(learned_part(state.meta_params))])


def learning_rate(step: int, options: Outer) -> float:
    """The outer learning rate of one step: constant, or falling from `outer_lr` to `final_lr_fraction` of it.

    The cosine is that of Loshchilov and Hutter (2017), https://arxiv.org/abs/1608.03983, without restarts.
    """
    progress = min(step / max(options.num_outer_steps - 1, 1), 1.0)
    remaining = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    floor = 1.0 if options.schedule == "constant" else options.final_lr_fraction
    return options.outer_lr * (floor + (1.0 - floor) * remaining[options.schedule])


def named_state(state: OuterState) -> dict[str, Tensor]:
    """Everything that a checkpoint must hold, by name; the tensors themselves, not copies."""
    return dict(_entries(state))


def _entries(state: OuterState) -> Iterator[tuple[str, Tensor]]:
    for name, leaf in named_leaves(state.meta_params).items():
        yield f"{META_PARAMS}{name}", leaf
        for key, value in state.optimizer.state.get(leaf, {}).items():
            yield f"optimizer/{key}/{name}", torch.as_tensor(value)


_KEPT_BY: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.SGD: (),
    torch.optim.Adam: ("step", "exp_avg", "exp_avg_sq"),
    torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"),
}
"""What an optimiser keeps of each parameter: the number of its steps, and moments of the parameter's shape."""


def load_named_state(state: OuterState, tensors: Mapping[str, Tensor]) -> None:
    """Puts what `named_state` gave back, in place.

    Raises:
      CheckpointError: the parameters are those of another model, or the rest is not what this optimizer keeps.
    """
    found = named_leaves(load_meta_params(state.meta_params, tensors, prefix=META_PARAMS))
    keys = _KEPT_BY[type(state.optimizer)]
    learned = list(found)[: len(tree_leaves(learned_part(state.meta_params)))]  # which come first
    kept = {
        f"optimizer/{key}/{name}": torch.zeros(()) if key == "step" else found[name] for name in learned for key in keys
    }
    _check_alike(kept, {name: tensor for name, tensor in tensors.items() if name.startswith("optimizer/")})
    with torch.no_grad():
        for name, leaf in named_leaves(state.meta_params).items():
            leaf.copy_(found[name])
    entries = {
        index: {key: tensors[f"optimizer/{key}/{name}"] for key in keys} for index, name in enumerate(learned) if keys
    }
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": entries, "param_groups": groups})


def load_meta_params(like: MetaParams, tensors: Mapping[str, Tensor], *, prefix: str = "") -> MetaParams:
    """The meta-parameters in a file's tensors, on the device of `like`.

    Args:
      like: meta-parameters of the model that they are for.
      prefix: of their names in the file; META_PARAMS in a checkpoint, nothing in a model.

    Raises:
      CheckpointError: they are those of another model.
    """
    expected = named_leaves(like)
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    _check_alike(expected, found)
    return tree_unflatten(like, [found[name].to(leaf.device) for name, leaf in expected.items()])


def _check_alike(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    for name in sorted({*expected, *found}):
        shapes = [list(tree[name].shape) if name in tree else None for tree in (found, expected)]
        types = [str(tree[name].dtype) if name in tree else None for tree in (found, expected)]
        for what, (then, now) in (("shape", shapes), ("type", types)):
            if then != now:
                raise CheckpointError(
                    f"the file is of another model: its parameter {name[:100]!r} has the {what} {then}, and now it is "
                    f"{now}. Take the model that it was made with, or train under another name."
                )
