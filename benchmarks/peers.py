"""Second-order MAML as distmaml and as others compute it: one workload, one gradient.

The workload W(K): 5-way 1-shot, 15 queries a class, random images, second-order MAML with K inner steps. Contenders:

    distmaml   what a worker runs: `chunk_sum` on chunks of `reduction_chunk` tasks
    fomaml     the same to first order, to compare the memory with
    plain      `torch.autograd.grad(create_graph=True)` in a loop; learn2learn does the same inside
    vmap       tasks side by side, unrolled: vmap over a loop of `torch.func.grad`, as in torch's own example
    higher     https://github.com/facebookresearch/higher, as in its examples/maml-omniglot.py
    torchopt   https://github.com/metaopt/torchopt, as in its examples/few-shot/maml_omniglot.py, but with a backward
               pass after each task, which is leaner than one after all of them

Each returns the sum of the meta-gradients of its tasks.
"""

import importlib
import importlib.util
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import backward
from torch.func import functional_call, vmap
from torch.func import grad as func_grad

from benchmarks.resnet12 import ResNet12
from distmaml import build
from distmaml.config import override
from distmaml.episodes import Batch, Episode, TaskBatch
from distmaml.inner import Params
from distmaml.models.conv4 import Conv4
from distmaml.objectives import initial_params
from distmaml.outer import chunk_sum
from distmaml.recipes.omniglot import omniglot_maml_5w1s
from distmaml.trees import tree_add, tree_index, tree_leaves

NUM_WAYS, NUM_SHOTS, NUM_QUERIES = 5, 1, 15
INNER_LR = 0.4
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Largest relative error of a contender's gradient, by type."""
Shape: TypeAlias = tuple[int, int, int]
MODELS: dict[str, tuple[Shape, Callable[[], nn.Module]]] = {
    "conv4": ((1, 28, 28), lambda: Conv4((1, 28, 28), NUM_WAYS)),
    "resnet12": ((3, 84, 84), lambda: ResNet12(NUM_WAYS)),
}
"""Name -> the shape of its images, and its factory."""

MetaGradient: TypeAlias = Callable[[TaskBatch], Params]
"""The sum of the meta-gradients of some tasks."""


# ------------------------------------------------------------------------------------------------ workload


class Workload(NamedTuple):
    """What each contender computes at a time."""

    num_inner_steps: int
    num_tasks: int = 16
    model: str = "conv4"

    @property
    def task_flops(self) -> float:
        """Of the second-order meta-gradient of one task of Conv4, by `forward_flops`.

        A loss and its gradient are 3 forward passes, an inner step with its adjoint is 9: what was counted for Conv4.
        """
        passes = 3 * NUM_QUERIES + 9 * self.num_inner_steps * NUM_SHOTS
        return forward_flops(Conv4((1, 28, 28), NUM_WAYS), 28) * passes * NUM_WAYS


def forward_flops(model: Conv4, size: int) -> int:
    """Multiplications and additions of one image of that height and width; convolutions and the head alone."""
    flops = 2 * model.head.weight.numel()
    for layer in model.convolutions:
        assert isinstance(layer, nn.Conv2d)
        size = -(-size // layer.stride[0])  # 3x3 with a border of one
        flops += 2 * size**2 * layer.weight.numel()
    return flops


def module_of(workload: Workload, dtype: torch.dtype) -> nn.Module:
    """The model, always with the same initial parameters."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return MODELS[workload.model][1]().to(dtype)


def random_tasks(
    num_tasks: int, seed: int, dtype: torch.dtype, *, shape: Shape, num_queries: int = NUM_QUERIES
) -> TaskBatch:
    """Tasks of normal noise, ``[num_tasks, num_samples, *shape]``."""
    generator = torch.Generator().manual_seed(seed)

    def batch(per_class: int) -> Batch:
        images = torch.randn(num_tasks, NUM_WAYS * per_class, *shape, generator=generator, dtype=torch.float64)
        return Batch(images.to(dtype), torch.arange(NUM_WAYS).repeat(per_class).expand(num_tasks, -1))

    return Episode(batch(NUM_SHOTS), batch(num_queries))


# ---------------------------------------------------------------------------------------------- contenders


def distmaml(module: nn.Module, num_inner_steps: int, *, algorithm: str = "maml") -> MetaGradient:
    """As a worker of distmaml: what `build.learner` chooses for this module on a CPU."""
    dtype = next(module.parameters()).dtype
    config = override(
        omniglot_maml_5w1s(),
        {"algorithm": algorithm, "num_inner_steps": num_inner_steps, "inner_lr": INNER_LR,
         "precision": str(dtype).removeprefix("torch.")},
    )  # fmt: skip
    learner = build.learner(config, build.Shapes((), NUM_WAYS), torch.device("cpu"), module=module)
    size = config.outer.reduction_chunk

    def meta_gradient(tasks: TaskBatch) -> Params:
        total: Params | None = None
        for start in range(0, len(tree_leaves(tasks)[0]), size):
            chunk = tree_index(tasks, slice(start, start + size))
            part, _ = chunk_sum(learner.algorithm, learner.meta_params, chunk, 0, vectorize=learner.vectorize)
            total = part if total is None else tree_add(total, part)
        assert total is not None
        return total

    return meta_gradient


def fomaml(module: nn.Module, num_inner_steps: int) -> MetaGradient:
    """distmaml's first-order MAML."""
    return distmaml(module, num_inner_steps, algorithm="fomaml")


def plain(module: nn.Module, num_inner_steps: int) -> MetaGradient:
    """Unrolled autodiff, one task after the other, in plain torch."""
    theta = {name: p.requires_grad_() for name, p in initial_params(module).items()}

    def loss(params: Params, batch: Batch) -> Tensor:
        return F.cross_entropy(functional_call(module, params, (batch.inputs,)), batch.targets)

    def meta_gradient(tasks: TaskBatch) -> Params:
        for leaf in theta.values():
            leaf.grad = None
        for task in _each(tasks):
            phi = theta
            for _ in range(num_inner_steps):
                grads = torch.autograd.grad(loss(phi, task.support), list(phi.values()), create_graph=True)
                phi = {name: p - INNER_LR * g for (name, p), g in zip(phi.items(), grads, strict=True)}
            backward(loss(phi, task.query))
        return _grads(theta)

    return meta_gradient


def vmapped(module: nn.Module, num_inner_steps: int) -> MetaGradient:
    """Unrolled autodiff of all tasks side by side.

    Vmap of the derivative. Torch's example takes the derivative of vmap, which is a tenth faster, and with batch norm
    silently another gradient: in torch 2.13 and float64 its error is 1e-3 on W(1) and 4e-3 on W(5).
    """
    theta = initial_params(module)

    def loss(params: Params, batch: Batch) -> Tensor:
        return F.cross_entropy(functional_call(module, params, (batch.inputs,)), batch.targets)

    def query_loss(params: Params, support: Batch, query: Batch) -> Tensor:
        for _ in range(num_inner_steps):
            grads = func_grad(loss)(params, support)
            params = {name: p - INNER_LR * grads[name] for name, p in params.items()}
        return loss(params, query)

    def meta_gradient(tasks: TaskBatch) -> Params:
        grads = vmap(func_grad(query_loss), in_dims=(None, 0, 0))(theta, tasks.support, tasks.query)
        return {name: g.sum(0) for name, g in grads.items()}

    return meta_gradient


def higher(module: nn.Module, num_inner_steps: int) -> MetaGradient:
    """A functional copy of the module that a differentiable optimiser steps, a new one for each task."""
    library = importlib.import_module("higher")
    optimizer = torch.optim.SGD(module.parameters(), lr=INNER_LR)

    def meta_gradient(tasks: TaskBatch) -> Params:
        module.zero_grad()
        for task in _each(tasks):
            with library.innerloop_ctx(module, optimizer, copy_initial_weights=False) as (net, inner):
                for _ in range(num_inner_steps):
                    inner.step(F.cross_entropy(net(task.support.inputs), task.support.targets))
                backward(F.cross_entropy(net(task.query.inputs), task.query.targets))
        return _grads(dict(module.named_parameters()))

    return meta_gradient


def torchopt(module: nn.Module, num_inner_steps: int) -> MetaGradient:
    """The module itself is stepped, and put back after each task."""
    library = importlib.import_module("torchopt")
    optimizer = library.MetaSGD(module, lr=INNER_LR)

    def meta_gradient(tasks: TaskBatch) -> Params:
        module.zero_grad()
        model_state = library.extract_state_dict(module, by="reference", detach_buffers=True)
        optimizer_state = library.extract_state_dict(optimizer, by="reference")
        for task in _each(tasks):
            for _ in range(num_inner_steps):
                optimizer.step(F.cross_entropy(module(task.support.inputs), task.support.targets))
            backward(F.cross_entropy(module(task.query.inputs), task.query.targets))
            library.recover_state_dict(module, model_state)
            library.recover_state_dict(optimizer, optimizer_state)
        return _grads(dict(module.named_parameters()))

    return meta_gradient


CONTENDERS: dict[str, Callable[[nn.Module, int], MetaGradient]] = {
    "distmaml": distmaml, "fomaml": fomaml, "plain": plain, "vmap": vmapped, "higher": higher, "torchopt": torchopt,
}  # fmt: skip
"""Name -> ``factory(module, num_inner_steps)``; the module is then the contender's own."""
PEERS = ("plain", "vmap", "higher", "torchopt")
PACKAGES = ("higher", "torchopt")
"""Peers that must be installed."""


def missing(peer: str) -> str | None:
    """What to do about a peer that is not installed; None where it is."""
    if peer in PACKAGES and importlib.util.find_spec(peer) is None:
        return f"{peer} is not installed, and is left out: pip install -e '.[bench]' -c constraints.txt"
    return None


def agree(
    contenders: Iterable[str], workload: Workload, *, shape: Shape | None = None, num_queries: int = NUM_QUERIES,
    dtypes: Iterable[torch.dtype] = tuple(TOLERANCES),
) -> dict[str, dict[str, float]]:  # fmt: skip
    """The error of each contender's gradient in each type: the median over three times two tasks.

    One error is the largest difference to the plain loop in float64, over the largest entry of that. Where rounding
    turns a ReLU on or off the gradient jumps, which it does in float32 now and then, the more steps the more often, and
    for any contender: hence a median.

    Args:
      shape: of the images, where it is not that of the workload.

    Raises:
      SystemExit: an error is larger than its tolerance.
    """
    image = shape or MODELS[workload.model][0]

    def gradient(contender: str, seed: int, dtype: torch.dtype) -> Params:
        tasks = random_tasks(2, seed, dtype, shape=image, num_queries=num_queries)
        return CONTENDERS[contender](module_of(workload, dtype), workload.num_inner_steps)(tasks)

    def error(found: Params, expected: Params) -> float:
        scale = max(float(leaf.abs().max()) for leaf in expected.values())
        return max(float((found[name].double() - leaf).abs().max()) for name, leaf in expected.items()) / scale

    expected = [gradient("plain", seed, torch.float64) for seed in range(3)]
    errors: dict[str, dict[str, float]] = {}
    for contender in contenders:
        errors[contender] = {}
        for dtype in dtypes:
            name = str(dtype).removeprefix("torch.")
            each = [error(gradient(contender, seed, dtype), right) for seed, right in enumerate(expected)]
            median = errors[contender][name] = statistics.median(each)
            if not median <= TOLERANCES[dtype]:
                raise SystemExit(
                    f"{contender} does not find the gradient of the plain loop at K={workload.num_inner_steps}: its "
                    f"relative error in {name} is {median:.1e}, and {TOLERANCES[dtype]:.0e} is allowed."
                )
    return errors


def _each(tasks: TaskBatch) -> list[Episode]:
    return [tree_index(tasks, index) for index in range(len(tree_leaves(tasks)[0]))]


def _grads(params: Mapping[str, Tensor]) -> Params:
    return {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in params.items()}
