"""The inner loop and its adjoint against autodiff of the unrolled loop, in values and in memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad
from torch.nn import functional as F

from distmaml.inner import Params, descend, descend_vjp, differentiable, gradient, hvp_mode, linearize, pull_back, sgd
from distmaml.trees import Tree, tree_leaves, tree_map

torch.manual_seed(0)
THETA: Params = {
    "w1": torch.randn(3, 5, dtype=torch.float64),
    "b1": torch.randn(5, dtype=torch.float64),
    "w2": torch.randn(5, 2, dtype=torch.float64),
}
INPUTS, TARGETS = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
QUERY, QUERY_TARGETS = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
CONTEXT: Tree = {"shift": torch.randn(2, dtype=torch.float64)}
RATES: Params = {name: 0.05 + 0.1 * torch.rand_like(p) for name, p in THETA.items()}


def network(params: Params, inputs: Tensor) -> Tensor:
    return torch.tanh(inputs @ params["w1"] + params["b1"]) @ params["w2"]


def support_loss(params: Params, context: Tree, inner_step: int) -> Tensor:
    """Depends on the inner step, as a loss with per-step weights or masks would."""
    shift = context["shift"] if context else 0.0
    return (1 + 0.1 * inner_step) * (network(params, INPUTS) + shift - TARGETS).square().mean()


def query_loss(params: Params, k: int) -> Tensor:
    return (0.5 + k) * (network(params, QUERY) - QUERY_TARGETS).square().mean()


def learned_rates(rates: Params, params: Params, grads: Params, inner_step: int) -> Params:
    """Not SGD: a rate for every parameter, which decays with the step, and decay towards zero."""
    return {name: 0.99 * p - rates[name] * grads[name] / (1 + inner_step) for name, p in params.items()}


def unroll(steps: int, seen: list[int], *, with_context: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Leaves (theta, rates, context) and the gradients of the sum of the query losses at the steps seen."""
    theta, rates = ({n: p.clone().requires_grad_() for n, p in tree.items()} for tree in (THETA, RATES))
    context = {"shift": CONTEXT["shift"].clone().requires_grad_()} if with_context else ()
    phi, states = dict(theta), [dict(theta)]
    for k in range(steps):
        grads = torch.autograd.grad(support_loss(phi, context, k), list(phi.values()), create_graph=True)
        phi = learned_rates(rates, phi, dict(zip(phi, grads, strict=True)), k)
        states.append(phi)
    leaves = [*theta.values(), *rates.values(), *(context.values() if isinstance(context, dict) else ())]
    total = torch.stack([query_loss(states[k], k) for k in seen]).sum()
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return leaves, [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]


@pytest.mark.parametrize("mode", ["forward", "reverse", "graph"])
@pytest.mark.parametrize("with_context", [True, False])
@pytest.mark.parametrize(("steps", "seen"), [(4, [4]), (4, [0, 1, 2, 3, 4]), (3, [1, 3]), (1, [1]), (0, [0])])
def test_learned_rates_and_several_cotangents_equal_unrolled_autodiff(
    steps: int, seen: list[int], with_context: bool, mode: Any
) -> None:
    rule = differentiable(learned_rates)
    context = CONTEXT if with_context else ()
    options: Any = {"rule": rule, "rule_params": RATES, "context": context}
    with torch.no_grad(), hvp_mode(mode):
        trajectory, pull = descend_vjp(support_loss, THETA, num_steps=steps, **options)
        cotangents = [grad(query_loss)(phi, k) if k in seen else None for k, phi in enumerate(trajectory)]
        kept, anew = pull(cotangents), pull_back(support_loss, trajectory, cotangents, **options)
        plain = descend(support_loss, THETA, num_steps=steps, **options)
    assert all(torch.equal(one, other) for one, other in zip(*map(tree_leaves, (trajectory, plain)), strict=True))
    _, expected = unroll(steps, seen, with_context=with_context)
    for found in (kept, anew):
        everything = [*found.params.values(), *found.rule_params.values(), *tree_leaves(found.context)]
        for one, other in zip(everything, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_no_steps_leave_the_cotangent_as_it_is_and_the_rest_zero() -> None:
    rule = differentiable(learned_rates)
    assert descend(support_loss, THETA, rule=rule, num_steps=0, rule_params=RATES) == [THETA]
    found = pull_back(support_loss, [THETA], [THETA], rule=rule, rule_params=RATES, context=CONTEXT)
    assert all(torch.equal(found.params[name], THETA[name]) for name in THETA)
    assert all(not leaf.any() for leaf in tree_leaves((found.rule_params, found.context)))
    assert found.rule_params.keys() == RATES.keys()


def test_one_sgd_step_of_a_quadratic_by_hand() -> None:
    """L = a x^2 / 2 from x = 3 with rate 0.1 and a = 2: x' = 3 (1 - 0.2) = 2.4, dx'/dx = 0.8, dx'/da = -0.1 * 3."""
    theta, curvature = {"x": torch.tensor(3.0, dtype=torch.float64)}, torch.tensor(2.0, dtype=torch.float64)
    loss = lambda params, a, k: 0.5 * a * params["x"] ** 2  # noqa: E731
    trajectory = descend(loss, theta, rule=sgd(0.1), num_steps=1, context=curvature)
    assert float(trajectory[1]["x"]) == pytest.approx(2.4)
    one = {"x": torch.tensor(1.0, dtype=torch.float64)}
    found = pull_back(loss, trajectory, [None, one], rule=sgd(0.1), context=curvature)
    assert float(found.params["x"]) == pytest.approx(0.8)
    assert float(found.context) == pytest.approx(-0.3)


def test_sgd_equals_the_same_rule_by_autodiff() -> None:
    step: Callable[..., Params] = lambda _, params, grads, k: tree_map(lambda p, g: p - 0.1 * g, params, grads)  # noqa: E731
    found = []
    for rule in (sgd(0.1), differentiable(step)):
        trajectory = descend(support_loss, THETA, rule=rule, num_steps=3, context=CONTEXT)
        cotangents = [*[None] * 3, grad(query_loss)(trajectory[-1], 3)]
        found.append(pull_back(support_loss, trajectory, cotangents, rule=rule, context=CONTEXT))
    for one, other in zip(tree_leaves(found[0]), tree_leaves(found[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["forward", "reverse", "graph"])
def test_the_linearisation_is_the_gradient_and_the_explicit_hessian(mode: Any) -> None:
    sizes = [p.numel() for p in THETA.values()]

    def unflat(vector: Tensor) -> Params:
        parts = torch.split(vector, sizes)
        return {name: part.reshape(p.shape) for (name, p), part in zip(THETA.items(), parts, strict=True)}

    def flat(params: Params) -> Tensor:
        return torch.cat([p.reshape(-1) for p in params.values()])

    vector = torch.randn(sum(sizes), dtype=torch.float64)
    shift = CONTEXT["shift"]
    both = torch.cat([flat(THETA), shift])
    whole = torch.autograd.functional.hessian(  # type: ignore[no-untyped-call]
        lambda x: support_loss(unflat(x[: len(vector)]), {"shift": x[len(vector) :]}, 2), both
    )
    with torch.no_grad(), hvp_mode(mode):
        found = linearize(support_loss, THETA, CONTEXT, 2, needs_grads=True)
        curvature, context = found.transpose(unflat(vector))
    (slope,) = torch.autograd.grad(support_loss(unflat(x := flat(THETA).requires_grad_()), CONTEXT, 2), x)
    assert found.grads is not None
    torch.testing.assert_close(flat(found.grads), slope, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(flat(curvature), whole[: len(vector), : len(vector)] @ vector, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(context["shift"], whole[len(vector) :, : len(vector)] @ vector, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("mode", ["forward", "reverse", "graph"])
def test_what_a_loss_does_not_depend_on_gets_zeros(mode: Any) -> None:
    """L = 3 x + c^2: nothing depends on y, the gradient in x depends on nothing, and not on c either."""
    point = {name: torch.tensor(2.0, dtype=torch.float64) for name in "xy"}
    vector, context = {name: torch.ones_like(p) for name, p in point.items()}, torch.tensor(5.0, dtype=torch.float64)
    loss: Any = lambda params, c, k: 3 * params["x"] + c**2  # noqa: E731
    zeros: Any = {"x": 0.0, "y": 0.0}
    with torch.no_grad(), hvp_mode(mode):
        found = linearize(loss, point, context, 0, needs_grads=True)
        assert gradient(loss, point, context, 0) == found.grads == {**zeros, "x": 3.0}
        transposed: Any = found.transpose(vector)
        assert transposed == (zeros, 0.0)
        assert gradient(lambda params: context, point) == zeros


# -------------------------------------------------------------------------------------------------- memory

WIDTH, SAMPLES = 32, 512
WIDE: Params = {f"w{i}": torch.randn(WIDTH, WIDTH) / 8 for i in range(4)}
MANY = torch.randn(SAMPLES, WIDTH)
COPY = 4 * WIDTH * WIDTH * 4  # bytes of one copy of the parameters
ACTIVATION = SAMPLES * WIDTH * 4  # bytes of one layer's output


def deep_loss(params: Params, context: Tree, inner_step: int) -> Tensor:
    hidden = MANY
    for weight in params.values():
        hidden = torch.tanh(hidden @ weight)
    return F.cross_entropy(hidden, torch.zeros(SAMPLES, dtype=torch.int64))


def by_adjoint(steps: int) -> None:
    with torch.no_grad():
        trajectory, pull = descend_vjp(deep_loss, WIDE, rule=sgd(0.1), num_steps=steps)
        pull([*[None] * steps, grad(deep_loss)(trajectory[-1], (), steps)])


def by_unrolling(steps: int) -> None:
    theta = {name: p.clone().requires_grad_() for name, p in WIDE.items()}
    phi = dict(theta)
    for k in range(steps):
        grads = torch.autograd.grad(deep_loss(phi, (), k), list(phi.values()), create_graph=True)
        phi = {name: p - 0.1 * g for (name, p), g in zip(phi.items(), grads, strict=True)}
    torch.autograd.grad(deep_loss(phi, (), steps), list(theta.values()))


def peak_bytes(function: Callable[[int], None], steps: int) -> int:
    """The most memory that tensors hold at one time, from the allocator's own events."""
    function(steps)  # what is allocated once and kept
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function(steps)
    events = profile.profiler.kineto_results.events()
    moments = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in moments:
        held += change
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("mode", ["forward", "reverse", "graph"])
def test_the_adjoint_keeps_one_copy_of_the_parameters_a_step_and_unrolling_the_activations(mode: Any) -> None:
    few, many = 1, 20
    with hvp_mode(mode):
        adjoint = peak_bytes(by_adjoint, many) - peak_bytes(by_adjoint, few)
    assert 0 < adjoint <= (many - few) * COPY + 2 * ACTIVATION
    unrolled = peak_bytes(by_unrolling, many) - peak_bytes(by_unrolling, few)
    assert unrolled >= (many - few) * 4 * ACTIVATION  # at least each layer's output at each step
