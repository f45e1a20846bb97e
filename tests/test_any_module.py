"""The meta-gradient is exact for every kind of module, so that a silently first-order one cannot pass."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distmaml import engine as engines
from distmaml.algorithms.anil import anil
from distmaml.algorithms.maml import fomaml, maml
from distmaml.engine import ENGINES
from distmaml.errors import ConfigError
from distmaml.objectives import classification, initial_params, objective, regression
from distmaml.outer import chunk_sum, meta_gradient
from distmaml.scoring import score
from distmaml.trees import tree_map
from tests import oracles
from tests.modules import SMOOTH, WITH_ORACLE, make

INNER: dict[str, Any] = {"inner_lr": 0.3, "num_inner_steps": 3}
ORACLE: dict[str, Any] = {"inner_lr": 0.3, "num_steps": 3}


def objective_of(case: Any) -> Any:
    return regression(case.model) if case.classes is None else classification(case.model)


@pytest.mark.parametrize("name", WITH_ORACLE)
def test_maml_equals_unrolled_autodiff(name: str) -> None:
    case, tasks, loss = make(name)
    theta = initial_params(case.model)
    found, metrics = meta_gradient(maml(objective_of(case), **INNER), theta, tasks, 0)
    expected = oracles.unrolled(case.model, theta, tasks, loss, **ORACLE)
    assert oracles.relative_error(found, expected) < 1e-10
    losses = [oracles.query_loss(case.model, _leaves(theta), task, loss, **ORACLE) for task in oracles.each(tasks)]
    assert float(metrics["query_loss"]) == pytest.approx(float(torch.stack(losses).detach().mean()), rel=1e-12)


@pytest.mark.parametrize("name", WITH_ORACLE)
def test_fomaml_equals_autodiff_with_constant_inner_gradients(name: str) -> None:
    case, tasks, loss = make(name)
    theta = initial_params(case.model)
    found, _ = meta_gradient(fomaml(objective_of(case), **INNER), theta, tasks, 0)
    assert oracles.relative_error(found, oracles.first_order(case.model, theta, tasks, loss, **ORACLE)) < 1e-10


@pytest.mark.parametrize("name", WITH_ORACLE)
def test_second_order_differs_from_first_order(name: str) -> None:
    """The oracle itself tells the two apart, or the tests above would prove nothing."""
    case, tasks, loss = make(name)
    theta = initial_params(case.model)
    exact = oracles.unrolled(case.model, theta, tasks, loss, **ORACLE)
    assert oracles.relative_error(oracles.first_order(case.model, theta, tasks, loss, **ORACLE), exact) > 1e-3


@pytest.mark.parametrize("name", [n for n in WITH_ORACLE if n not in ("linear", "dropout")])
def test_anil_equals_unrolled_autodiff_over_the_head(name: str) -> None:
    case, tasks, loss = make(name)
    theta = initial_params(case.model)
    target = objective_of(case)
    found, _ = meta_gradient(anil(target, **INNER), theta, tasks, 0)
    adapts = lambda parameter: parameter.startswith(target.head + ".")  # noqa: E731
    expected = oracles.unrolled(case.model, theta, tasks, loss, adapts=adapts, **ORACLE)
    assert list(found) == list(theta)
    assert oracles.relative_error(found, expected) < 1e-10


@pytest.mark.parametrize("name", SMOOTH)
def test_maml_equals_central_differences(name: str) -> None:
    case, tasks, _ = make(name, num_tasks=2)
    theta = initial_params(case.model)
    algorithm = maml(objective_of(case), **INNER)
    found, _ = meta_gradient(algorithm, theta, tasks, 0)
    direction = {n: torch.randn_like(p) for n, p in theta.items()}

    def mean_query_loss(params: dict[str, Tensor]) -> Tensor:
        return meta_gradient(algorithm, params, tasks, 0)[1]["query_loss"]

    slope = sum(float((found[n] * direction[n]).sum()) for n in theta)
    # Richardson's extrapolation of two central differences: the error is of fourth order in the step.
    coarse, fine = (oracles.central_difference(mean_query_loss, theta, direction, h) for h in (2e-3, 1e-3))
    assert (4 * fine - coarse) / 3 == pytest.approx(slope, rel=1e-6)


WITHOUT_BATCHING_RULE = ("lstm", "gru", "dropout")


@pytest.mark.parametrize("engine", ENGINES, ids=str)
@pytest.mark.parametrize("name", WITH_ORACLE)
def test_every_engine_gives_the_same_gradient(name: str, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case, tasks, loss = make(name)
    theta = initial_params(case.model)
    monkeypatch.setattr(engines, "ENGINES", (engine,))
    if engine.vectorize and name in WITHOUT_BATCHING_RULE:
        with pytest.raises(RuntimeError):  # refused, and never computed wrongly
            chunk_sum(maml(objective_of(case), **INNER), theta, tasks, 0)
        return
    found, _ = chunk_sum(maml(objective_of(case), **INNER), theta, tasks, 0)
    num_tasks = len(tasks.support.inputs)
    mean = {name: grad / num_tasks for name, grad in found.items()}
    assert oracles.relative_error(mean, oracles.unrolled(case.model, theta, tasks, loss, **ORACLE)) < 1e-10


def test_a_loss_without_forward_derivative_steps_down_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    case, tasks, loss = make("gru")
    target = objective(case.model, lambda a, b: (nn.functional.mse_loss(a, b), {}))
    algorithm = maml(target, **INNER)
    theta = initial_params(case.model)
    for _ in range(2):
        found, _ = meta_gradient(algorithm, theta, tasks, 0)
    assert oracles.relative_error(found, oracles.unrolled(case.model, theta, tasks, loss, **ORACLE)) < 1e-10
    assert [record.message.split(" (")[0] for record in caplog.records] == [
        "Computing one task after the other, reverse over reverse"
    ]


def test_the_engine_of_the_evaluation_is_not_forced_on_the_gradient() -> None:
    """Side by side, forward over reverse: predicting gets along with that, the derivative of mse_loss does not."""
    case, tasks, loss = make("linear")
    target = objective(case.model, lambda a, b: (nn.functional.mse_loss(a, b), {}))
    algorithm, theta = maml(target, **INNER), initial_params(case.model)
    score(algorithm, target, theta, tasks, num_steps=1, inductive=False)
    found, _ = meta_gradient(algorithm, theta, tasks, 0)
    assert oracles.relative_error(found, oracles.unrolled(case.model, theta, tasks, loss, **ORACLE)) < 1e-10


def test_a_module_that_changes_its_buffers_is_refused() -> None:
    _, tasks, _ = make("linear")
    normed = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2))
    # Dropout has no batching rule: the first engines fail before they can have looked at the buffers.
    for model in (nn.Sequential(normed).double(), nn.Sequential(normed, nn.Dropout(0.5), nn.Linear(2, 2)).double()):
        algorithm = maml(regression(model), **INNER)
        with pytest.raises(ConfigError, match=r"Sequential changes its buffer '0\.parametrizations.*_u'"):
            meta_gradient(
                algorithm, initial_params(model), tasks._replace(key=torch.arange(len(tasks.support.inputs))), 0
            )


@pytest.mark.parametrize("chunk_size", [1, 2, 5])
def test_chunks_equal_the_whole(chunk_size: int) -> None:
    case, tasks, _ = make("mlp", num_tasks=5)
    theta = initial_params(case.model)
    algorithm = maml(objective_of(case), **INNER)
    whole, _ = meta_gradient(algorithm, theta, tasks, 0)
    parts, _ = meta_gradient(algorithm, theta, tasks, 0, chunk_size=chunk_size)
    assert oracles.relative_error(parts, whole) < 1e-13


def test_inputs_are_left_as_they_were() -> None:
    case, tasks, _ = make("batch norm")
    theta = initial_params(case.model)
    before = tree_map(torch.clone, (theta, tasks[:3]))
    state = torch.get_rng_state()
    chunk_sum(maml(objective_of(case), **INNER), theta, tasks, 0, vectorize=False)
    assert all(torch.equal(a, b) for a, b in zip(*map(_flat, (before, (theta, tasks[:3]))), strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_users_mistake_is_shown_as_it_is() -> None:
    case, tasks, _ = make("mlp")
    wrong = tasks._replace(support=tasks.support._replace(inputs=tasks.support.inputs[..., :2]))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        meta_gradient(maml(objective_of(case), **INNER), initial_params(case.model), wrong, 0)


def test_running_statistics_are_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"BatchNorm2d\(\.\.\., track_running_stats=False\)"):
        classification(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2)))


class ScaledHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x)) * 2.0
        return out


def test_anil_pays_no_gradient_for_the_body_in_its_inner_loop() -> None:
    """One pass of the body over support and query and one back, whatever the number of inner steps."""
    _, tasks, _ = make("linear", num_tasks=1)
    calls = {"forward": 0, "backward": 0}

    class Counting(torch.autograd.Function):
        @staticmethod
        def forward(x: torch.Tensor) -> torch.Tensor:
            calls["forward"] += 1
            return x.clone()

        @staticmethod
        def setup_context(ctx: object, inputs: object, output: object) -> None:
            pass

        @staticmethod
        def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
            calls["backward"] += 1
            return gradient

    class Body(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = Counting.apply(x)  # type: ignore[no-untyped-call]
            return out

    model = nn.Sequential(nn.Linear(3, 5), Body(), nn.Linear(5, 2)).double()
    found = {}
    for steps in (1, 8):
        calls.update(forward=0, backward=0)
        algorithm = anil(regression(model), inner_lr=0.01, num_inner_steps=steps)
        chunk_sum(algorithm, initial_params(model), tasks, 0, vectorize=False)
        found[steps] = dict(calls)
    assert found[1] == found[8]
    assert found[1]["backward"] <= 2


def test_anil_refuses_a_module_that_does_not_end_in_its_head() -> None:
    _, tasks, _ = make("mlp")
    model = ScaledHead().double()
    with pytest.raises(ConfigError, match="does not end in its head 'head'"):
        meta_gradient(anil(classification(model), **INNER), initial_params(model), tasks, 0)


def test_regression_refuses_shapes_that_would_broadcast() -> None:
    _, tasks, _ = make("linear")
    flat = tasks._replace(support=tasks.support._replace(targets=tasks.support.targets[..., 0]))
    model = nn.Sequential(nn.Linear(3, 2)).double()
    with pytest.raises(ConfigError, match="broadcasting them"):
        meta_gradient(maml(regression(model), **INNER), initial_params(model), flat, 0)


def _leaves(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach().clone().requires_grad_() for name, p in params.items()}


def _flat(tree: Any) -> list[Tensor]:
    from distmaml.trees import tree_leaves

    return tree_leaves(tree)
