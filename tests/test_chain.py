"""Derivatives by hand equal those of torch, and are used for nothing else than what they are the derivatives of."""

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

from distmaml import chain_loss, kernels, loop, paths
from distmaml.algorithms.maml import fomaml, maml
from distmaml.chain import Block, chain_of
from distmaml.chain_loss import ChainLoss
from distmaml.config import Outer, override
from distmaml.engine import Engine
from distmaml.episodes import Batch, Episode
from distmaml.models.conv4 import Conv4
from distmaml.objectives import Objective, classification, initial_params, objective
from distmaml.outer import chunk_sum, init_outer, outer_step
from distmaml.recipes.glyphs import glyphs_maml_5w1s
from distmaml.scoring import after_last, score
from distmaml.trees import tree_leaves
from distmaml.worker import LocalWorker
from tests import oracles

BATCH_NORM: dict[str, Any] = {"track_running_stats": False}


def block(
    inputs: int, outputs: int, kernel: int = 3, *, pool: int = 1, bias: bool = True, **options: Any
) -> list[nn.Module]:
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, bias=bias, **options),
        nn.BatchNorm2d(outputs, eps=1e-3, **BATCH_NORM),
        nn.ReLU(),
    ]
    return layers if pool == 1 else [*layers, nn.MaxPool2d(pool)]


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv4": (lambda: Conv4((1, 28, 28), 5, num_filters=6), (1, 28, 28)),
    "conv4, odd sides": (lambda: Conv4((3, 21, 21), 5, num_filters=6), (3, 21, 21)),
    "conv4 pooled": (lambda: Conv4((3, 36, 36), 5, num_filters=4, downsample="pool"), (3, 36, 36)),
    "one block, flat": (lambda: nn.Sequential(*block(2, 4), nn.Flatten(), nn.Linear(144, 5)), (2, 8, 8)),
    "large kernels": (
        lambda: nn.Sequential(
            *block(1, 8, 5, stride=3, padding=2, bias=False),
            *block(8, 6, 1),
            nn.Flatten(),
            nn.Linear(54, 5, bias=False),
        ),
        (1, 9, 9),
    ),
    "pooled by three": (
        lambda: nn.Sequential(
            *block(3, 4, pool=3, padding=1), *block(4, 5, pool=2, padding=1), nn.Flatten(), nn.Linear(20, 5)
        ),
        (3, 14, 14),
    ),
}


def make(name: str, num_tasks: int = 2) -> tuple[nn.Module, Episode]:
    torch.manual_seed(len(name))
    factory, shape = MODELS[name]
    model = factory().double()
    for norm in (layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)):
        nn.init.normal_(norm.weight, 1.0, 0.5)  # negative ones among them
        nn.init.normal_(norm.bias, 0.0, 0.3)
    labels = torch.arange(5)
    support = Batch(torch.randn(num_tasks, 5, *shape).double(), labels.expand(num_tasks, 5))
    query = Batch(torch.randn(num_tasks, 15, *shape).double(), labels.repeat(3).expand(num_tasks, 15))
    return model, Episode(support, query)


def summed(target: Objective, theta: dict[str, Tensor], tasks: Episode, **options: Any) -> Any:
    algorithm = options.pop("algorithm", maml)(target, **{"inner_lr": 0.3, "num_inner_steps": 3, **options})
    return chunk_sum(algorithm, theta, tasks, 0, vectorize=False)


@pytest.mark.parametrize("num_inner_steps", [1, 3, 6])
@pytest.mark.parametrize("name", MODELS)
def test_the_meta_gradient_equals_unrolled_autodiff(name: str, num_inner_steps: int) -> None:
    model, tasks = make(name)
    target, theta = classification(model), initial_params(model)
    assert target.chain is not None
    found, metrics = summed(target, theta, tasks, num_inner_steps=num_inner_steps)
    expected = oracles.unrolled(model, theta, tasks, F.cross_entropy, inner_lr=0.3, num_steps=num_inner_steps)
    assert list(found) == list(theta)
    assert oracles.relative_error({name: grad / 2 for name, grad in found.items()}, expected) < 1e-10
    by_torch = summed(target._replace(chain=None), theta, tasks, num_inner_steps=num_inner_steps)[1]
    for metric, value in by_torch.items():
        assert float(metrics[metric]) == pytest.approx(float(value))


@pytest.mark.parametrize("name", ["conv4", "conv4 pooled"])
def test_twenty_steps_end_where_those_of_unrolled_autodiff_do(name: str) -> None:
    model, _ = make(name)
    options = Outer(optimizer="sgd", outer_lr=0.1)
    found, expected = (init_outer(initial_params(model), options) for _ in range(2))
    for step in range(20):
        torch.manual_seed(step)
        support, query = (Batch(torch.randn_like(batch.inputs), batch.targets) for batch in make(name)[1][:2])
        tasks = Episode(support, query)
        grads, _ = summed(classification(model), found.meta_params, tasks)
        outer_step(found, {name: grad / 2 for name, grad in grads.items()}, step, options)
        grads = oracles.unrolled(model, expected.meta_params, tasks, F.cross_entropy, inner_lr=0.3, num_steps=3)
        outer_step(expected, grads, step, options)
    assert oracles.relative_error(found.meta_params, expected.meta_params) < 1e-9


@pytest.mark.parametrize("name", MODELS)
def test_first_order_equals_that_of_torch(name: str) -> None:
    model, tasks = make(name)
    target, theta = classification(model), initial_params(model)
    found, _ = summed(target, theta, tasks, algorithm=fomaml)
    expected, _ = summed(target._replace(chain=None), theta, tasks, algorithm=fomaml)
    assert oracles.relative_error(found, expected) < 1e-12


def with_no_metrics(loss: Callable[[Any, Any], Tensor], outputs: Any, targets: Any) -> tuple[Tensor, dict[str, Tensor]]:
    return loss(outputs, targets), {}


def test_any_loss_will_do_also_one_without_a_second_derivative() -> None:
    model, tasks = make("conv4")
    theta = initial_params(model)
    for loss in (
        lambda outputs, labels: F.cross_entropy(outputs, labels, label_smoothing=0.1),
        lambda outputs, labels: -outputs[torch.arange(len(labels)), labels].mean(),
    ):
        target = objective(model, partial(with_no_metrics, loss))
        found, _ = summed(target, theta, tasks)
        expected, _ = summed(target._replace(chain=None), theta, tasks)
        assert oracles.relative_error(found, expected) < 1e-10


def test_a_product_with_the_hessian_is_symmetric() -> None:
    model, tasks = make("pooled by three")
    target, theta = classification(model), initial_params(model)
    assert target.chain is not None
    loss = ChainLoss(target.chain, target.loss, tasks.query.inputs[0], tasks.query.targets[0])
    product = loss.linearize(theta).transpose
    u, v = ({name: torch.randn_like(p) for name, p in theta.items()} for _ in range(2))
    uv, vu = (sum(float((a[n] * product(b)[0][n]).sum()) for n in theta) for a, b in ((u, v), (v, u)))
    assert uv == pytest.approx(vu, rel=1e-10)


def test_a_step_in_float32_is_near_the_one_in_float64() -> None:
    model, tasks = make("conv4", num_tasks=4)
    theta = initial_params(model)
    exact, _ = summed(classification(model), theta, tasks, num_inner_steps=1)
    single = {name: p.float() for name, p in theta.items()}
    halves = [batch._replace(inputs=batch.inputs.float()) for batch in tasks[:2]]
    found, _ = summed(classification(model.float()), single, Episode(*halves), num_inner_steps=1)
    assert all(grad.dtype == torch.float32 for grad in found.values())
    assert oracles.relative_error({name: grad.double() for name, grad in found.items()}, exact) < 1e-4


def test_what_is_no_number_is_seen() -> None:
    model, tasks = make("conv4 pooled")
    theta = initial_params(model)
    theta["convolutions.0.weight"][0, 0, 0, 0] = float("nan")
    found, metrics = summed(classification(model), theta, tasks)
    assert torch.isnan(metrics["query_loss"])
    assert torch.isnan(found["convolutions.0.weight"]).any()


def test_inputs_and_parameters_are_left_alone() -> None:
    model, tasks = make("conv4")
    theta = initial_params(model)
    before = {name: p.clone() for name, p in theta.items()}, tasks.support.inputs.clone(), tasks.query.inputs.clone()
    summed(classification(model), theta, tasks)
    assert all(torch.equal(before[0][name], p) for name, p in theta.items())
    assert torch.equal(before[1], tasks.support.inputs)
    assert torch.equal(before[2], tasks.query.inputs)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_training_by_hand_ends_where_that_by_torch_does(
    seed: int, output_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 the two part in their last bits and then ever more; what they learn stays within both intervals."""
    found = []
    for name in ("by_hand", "by_torch"):
        config = override(
            glyphs_maml_5w1s(),
            {"name": name, "output_dir": output_dir, "seed": seed, "num_filters": 16, "num_outer_steps": 150,
             "val_every": 0, "num_test_episodes": 200, "inductive": False},
        )  # fmt: skip
        paths.checkpoints(paths.run_folder(config)).mkdir(parents=True)
        loop.train(config, LocalWorker())
        found.append(after_last(loop.evaluate(config, LocalWorker()).scores["transductive"]["query_accuracy"]))
        monkeypatch.setattr("distmaml.objectives.chain_of", lambda model: None)
    by_hand, by_torch = found
    assert by_hand.mean > 0.6
    assert abs(by_hand.mean - by_torch.mean) < by_hand.half_width + by_torch.half_width


# ------------------------------------------------------------------------------------------------ recognition


def test_a_conv4_is_a_chain() -> None:
    chain = chain_of(Conv4((1, 28, 28), 5, downsample="pool"))
    assert chain is not None
    assert chain.blocks[1] == Block("convolutions.1", 3, 1, 1, "norms.1", 1e-5, 2)
    assert (chain.averages, chain.head) == (False, "head")


def test_sequences_may_be_nested_and_share_what_has_no_parameters() -> None:
    relu = nn.ReLU()
    body = nn.Sequential(nn.Sequential(*block(2, 4)[:2], relu), nn.Sequential(*block(4, 4)[:2], relu))
    chain = chain_of(nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)))
    assert chain is not None
    assert [entry.norm for entry in chain.blocks] == ["0.0.1", "0.1.1"]
    assert chain.averages


class Subclass(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Doubling(Conv4):
    def forward(self, images: Tensor) -> Tensor:
        return 2 * super().forward(images)


def sequential(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(5))


def norm(**options: Any) -> nn.Module:
    return nn.BatchNorm2d(4, **{"track_running_stats": False, **options})


def tied() -> nn.Module:
    model = nn.Sequential(*block(2, 4), *block(4, 4), nn.Flatten(), nn.Linear(64, 5))
    model[4].weight = model[1].weight
    return model


def hooked(method: str) -> nn.Module:
    model = sequential(*block(2, 4))
    getattr(model[1], method)(lambda *arguments: None)
    return model


def patched() -> nn.Module:
    model = sequential(*block(2, 4))
    model[0].forward = lambda x: x[:, :, 1:-1, 1:-1].repeat(1, 2, 1, 1)
    return model


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "a class that is not known": lambda: Doubling((2, 8, 8), 5),
    "no norm": lambda: sequential(nn.Conv2d(2, 4, 3), nn.ReLU()),
    "no rectifier": lambda: sequential(*block(2, 4)[:2]),
    "leaky": lambda: sequential(*block(2, 4)[:2], nn.LeakyReLU()),
    "dropout": lambda: sequential(*block(2, 4), nn.Dropout(0.5)),
    "two layers in the head": lambda: nn.Sequential(*block(2, 4), nn.Flatten(), nn.Linear(144, 8), nn.Linear(8, 5)),
    "dilation": lambda: sequential(*block(2, 4, dilation=2)),
    "groups": lambda: sequential(*block(2, 4, groups=2)),
    "reflection": lambda: sequential(*block(2, 4, padding=1, padding_mode="reflect")),
    "same": lambda: sequential(*block(2, 4, padding="same")),
    "not square": lambda: sequential(nn.Conv2d(2, 4, (3, 1)), norm(), nn.ReLU()),
    "no weights in the norm": lambda: sequential(nn.Conv2d(2, 4, 3), norm(affine=False), nn.ReLU()),
    "no shift in the norm": lambda: sequential(nn.Conv2d(2, 4, 3), norm(bias=False), nn.ReLU()),
    "overlapping windows": lambda: sequential(*block(2, 4), nn.MaxPool2d(3, 2)),
    "windows over the edge": lambda: sequential(*block(2, 4), nn.MaxPool2d(4, ceil_mode=True)),
    "a class of their own": lambda: sequential(Subclass(2, 4, 3), *block(2, 4)[1:]),
    "softmax": lambda: nn.Sequential(sequential(*block(2, 4)), nn.Softmax(1)),
    "tied": tied,
    "a forward of its own": patched,
    **{
        method: lambda method=method: hooked(method)  # type: ignore[misc]
        for method in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook")
    },
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_networks_are_none(name: str) -> None:
    model = OTHERS[name]()
    model(torch.randn(3, 2, 8, 8))  # it runs, so it is a network
    assert chain_of(model) is None


@pytest.mark.parametrize(("side", "covered"), [(16, True), (17, False)])
def test_windows_are_as_large_as_a_byte_can_count(side: int, covered: bool) -> None:
    torch.manual_seed(side)
    model = nn.Sequential(*block(2, 4, pool=side, padding=1), nn.Flatten(), nn.Linear(4, 5)).double()
    labels = torch.arange(5).expand(2, 5)
    support, query = (Batch(torch.randn(2, 5, 2, side, side).double(), labels) for _ in range(2))
    tasks = Episode(support, query)
    target = classification(model)
    assert (target.chain is not None) == covered
    found, _ = summed(target, initial_params(model), tasks)
    expected, _ = summed(target._replace(chain=None), initial_params(model), tasks)
    assert oracles.relative_error(found, expected) < 1e-10


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_torch_also_of_each_item_beside_the_support_set(name: str) -> None:
    model, tasks = make(name)
    chain, theta = chain_of(model), initial_params(model)
    assert chain is not None
    support, queries = tasks.support.inputs[0], tasks.query.inputs[0]

    def beside(item: Tensor) -> Tensor:
        return torch.cat([support, item[None]])

    with torch.no_grad():
        torch.testing.assert_close(chain_loss.predict(chain, theta, queries), model(queries), rtol=1e-10, atol=1e-12)
        expected = torch.stack([model(beside(item)) for item in queries])
        found = vmap(lambda item: chain_loss.predict(chain, theta, beside(item)), chunk_size=4)(queries)
        moved = vmap(lambda item: chain_loss.predict(chain, theta, beside(item)), in_dims=1)(queries.movedim(0, 1))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(moved, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("name", "by_hand"), [("conv4 pooled", True), ("conv4", False)])
def test_a_test_s_predictions_are_by_hand_where_something_is_pooled(
    name: str, by_hand: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tasks = make(name)
    target, theta = classification(model), initial_params(model)
    algorithm = maml(target, inner_lr=0.1, num_inner_steps=1)
    calls: list[int] = []
    own = chain_loss.predict

    def counted(*arguments: Any) -> Tensor:
        calls.append(1)
        return own(*arguments)

    monkeypatch.setattr(chain_loss, "predict", counted)

    found = score(algorithm, target, theta, tasks, num_steps=1, inductive=True, vectorize=False)
    assert bool(calls) == by_hand
    calls.clear()
    expected = score(algorithm, target._replace(chain=None), theta, tasks, num_steps=1, inductive=True, vectorize=False)
    for one, other in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)

    calls.clear()
    leaves = {key: leaf.requires_grad_() for key, leaf in initial_params(model).items()}
    outputs = algorithm.predict(theta, leaves, tasks.query.inputs[0])  # which a user may want to differentiate
    assert outputs.requires_grad
    assert not calls


def test_what_torch_refuses_is_refused() -> None:
    model = nn.Sequential(*block(1, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    for images, message in ((torch.randn(2, 1, 1, 3, 3), "more than 1 value per channel"),
                            (torch.randn(2, 5, 1, 2, 2), "Kernel size")):  # fmt: skip
        batch = Batch(images, torch.zeros(2, images.shape[1], dtype=torch.int64))
        with pytest.raises((RuntimeError, ValueError), match=message):
            summed(classification(model), initial_params(model), Episode(batch, batch))


def test_parameters_that_are_others_go_to_torch() -> None:
    model, tasks = make("conv4")
    target, theta = classification(model), initial_params(model)
    del theta["head.bias"]  # functional_call takes the module's own
    found, _ = summed(target, theta, tasks)
    expected, _ = summed(target._replace(chain=None), theta, tasks)
    assert oracles.relative_error(found, expected) < 1e-12


def test_derivatives_by_hand_serve_one_task_after_the_other_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tasks = make("conv4")
    asked: list[int] = []
    original = ChainLoss.linearize

    def counted(self: ChainLoss, params: Any, *where: Any) -> Any:
        asked.append(1)
        return original(self, params, *where)

    monkeypatch.setattr(ChainLoss, "linearize", counted)
    for engine, expected in ((Engine(False, "graph"), 2), (Engine(False, "forward"), 0), (Engine(True, "forward"), 0)):
        asked.clear()
        monkeypatch.setattr("distmaml.engine.ENGINES", (engine,))
        algorithm = maml(classification(model), inner_lr=0.1, num_inner_steps=1)
        chunk_sum(algorithm, initial_params(model), tasks, 0)
        assert len(asked) == expected, engine


# ---------------------------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize(
    ("side", "stride", "padding", "kernel"), [(7, 2, 1, 3), (8, 2, 1, 3), (6, 1, 0, 3), (9, 3, 2, 5)]
)
def test_patches_are_those_of_torch_and_their_transpose_is_one(
    side: int, stride: int, padding: int, kernel: int
) -> None:
    generator = np.random.default_rng(side)
    maps = generator.normal(size=(2, side, side, 3))
    unfolded = F.unfold(torch.from_numpy(maps).permute(0, 3, 1, 2), kernel, stride=stride, padding=padding)
    rows = unfolded.shape[0] * unfolded.shape[2]
    expected = unfolded.view(2, 3, kernel * kernel, -1).permute(0, 3, 2, 1).reshape(rows, -1).numpy()
    found = np.full_like(expected, np.nan)
    kernels.patches(maps, found, stride, padding, kernel)
    assert np.array_equal(found, expected)
    grad, back = generator.normal(size=found.shape), np.full_like(maps, np.nan)
    kernels.patches_back(grad, back, stride, padding, kernel)
    assert (grad * found).sum() == pytest.approx((back * maps).sum(), rel=1e-12)


def test_pooling_takes_the_first_of_equals_and_passes_on_what_is_no_number() -> None:
    maps = torch.tensor([[1.0, 1.0, 3.0, 2.0], [1.0, 0.0, float("nan"), 4.0]], dtype=torch.float64)[None, None]
    expected, places = F.max_pool2d(maps, 2, return_indices=True)
    out, winners = np.empty((1, 1, 2, 1)), np.empty((1, 1, 2, 1), np.uint8)
    kernels.max_pool(maps.permute(0, 2, 3, 1).numpy(), 2, out, winners)
    assert np.array_equal(out.ravel(), expected.numpy().ravel(), equal_nan=True)
    assert [int(k) // 2 * 4 + 2 * i + int(k) % 2 for i, k in enumerate(winners.ravel())] == places.flatten().tolist()


def test_a_kernel_that_cannot_be_kept_on_disk_runs_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = tmp_path / "own_kernels.py"
    source.write_text(Path(kernels.__file__).read_text())
    spec = importlib.util.spec_from_file_location("own_kernels", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numba.core.caching.IndexDataCacheFile.save", full)
    out = np.full((1, 1), np.nan)
    module.patches(np.ones((1, 1, 1, 1)), out, 1, 0, 1)
    assert out == 1


def test_a_norm_over_many_rows_keeps_its_digits() -> None:
    """A mean far from zero, in float32: sums that are not gathered in float64 lose the variance."""
    y = (1000 + np.random.default_rng(0).normal(size=(20_000, 3))).astype(np.float32)
    exact = y.astype(np.float64)
    expected = (exact - exact.mean(0)) / exact.std(0)
    ones, zeros, inverse, out = (
        np.ones(3, np.float32),
        np.zeros(3, np.float32),
        np.empty(3, np.float32),
        np.empty_like(y),
    )
    kernels.norm_relu(y, ones, zeros, 0.0, inverse, out)
    assert np.abs(y - expected).max() < 2e-4
    assert np.array_equal(out, np.maximum(y, 0))
