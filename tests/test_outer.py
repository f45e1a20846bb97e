"""The outer step, by hand."""

import math
from typing import Any

import pytest
import torch

from distmaml.config import Outer
from distmaml.errors import CheckpointError
from distmaml.outer import init_outer, learning_rate, load_named_state, named_state, outer_step

THETA = {"a": torch.tensor([3.0, 4.0], dtype=torch.float64), "b.c": torch.tensor([[1.0]], dtype=torch.float64)}
GRADS = {"a": torch.tensor([3.0, 0.0], dtype=torch.float64), "b.c": torch.tensor([[4.0]], dtype=torch.float64)}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.8, 0.8, 0.8, 0.8, 0.8]),
        ("linear", [0.8, 0.65, 0.5, 0.35, 0.2]),
        ("cosine", [0.8, 0.5 + 0.3 * math.sqrt(0.5), 0.5, 0.5 - 0.3 * math.sqrt(0.5), 0.2]),
    ],
)
def test_learning_rates_of_five_steps_from_four_fifths_to_a_quarter_of_that(
    schedule: Any, expected: list[float]
) -> None:
    options = Outer(num_outer_steps=5, outer_lr=0.8, schedule=schedule, final_lr_fraction=0.25)
    assert [learning_rate(step, options) for step in range(5)] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_run_of_one_step_starts_with_the_whole_rate(schedule: Any) -> None:
    assert learning_rate(0, Outer(num_outer_steps=1, outer_lr=0.8, schedule=schedule)) == 0.8


def test_sgd_step_and_norm_by_hand() -> None:
    options = Outer(optimizer="sgd", outer_lr=0.5)
    state = init_outer(THETA, options)
    norm = outer_step(state, GRADS, 0, options)
    assert float(norm) == 5.0
    assert state.meta_params["a"].tolist() == [1.5, 4.0]
    assert state.meta_params["b.c"].tolist() == [[-1.0]]


def test_clipping_scales_to_the_norm_and_reports_the_norm_before_it() -> None:
    options = Outer(optimizer="sgd", outer_lr=1.0, clip_norm=2.5)
    state = init_outer(THETA, options)
    norm = outer_step(state, {name: g.clone() for name, g in GRADS.items()}, 0, options)
    assert float(norm) == 5.0
    assert state.meta_params["a"].tolist() == pytest.approx([1.5, 4.0], rel=1e-6)
    assert state.meta_params["b.c"].item() == pytest.approx(-1.0, rel=1e-6)


def test_a_small_gradient_is_not_clipped() -> None:
    options = Outer(optimizer="sgd", outer_lr=1.0, clip_norm=7.0)
    state = init_outer(THETA, options)
    outer_step(state, {name: g.clone() for name, g in GRADS.items()}, 0, options)
    assert state.meta_params["a"].tolist() == [0.0, 4.0]


def test_weight_decay_of_sgd_adds_to_the_gradient() -> None:
    options = Outer(optimizer="sgd", outer_lr=0.5, weight_decay=0.1)
    state = init_outer(THETA, options)
    outer_step(state, GRADS, 0, options)
    assert state.meta_params["a"].tolist() == pytest.approx([3 - 0.5 * (3 + 0.3), 4 - 0.5 * 0.4])


def test_weight_decay_of_adamw_is_decoupled() -> None:
    """The first step of Adam has the size of the rate; adamw first shrinks the weights by rate times decay."""
    options = Outer(optimizer="adamw", outer_lr=0.5, weight_decay=0.1)
    state = init_outer(THETA, options)
    outer_step(state, GRADS, 0, options)
    assert state.meta_params["a"].tolist() == pytest.approx([3 * 0.95 - 0.5, 4 * 0.95], rel=1e-7)


def test_adam_by_hand_over_two_steps() -> None:
    options = Outer(optimizer="adam", outer_lr=0.1)
    state = init_outer({"x": torch.tensor([1.0], dtype=torch.float64)}, options)
    x, m, v = 1.0, 0.0, 0.0
    for t, g in enumerate((2.0, -1.0), start=1):
        outer_step(state, {"x": torch.tensor([g], dtype=torch.float64)}, t - 1, options)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        x -= 0.1 * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8)
    assert state.meta_params["x"].item() == pytest.approx(x, rel=1e-12)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_gradient_may_lie_otherwise_in_memory_than_its_parameter(optimizer: Any) -> None:
    theta = {"w": torch.arange(6.0, dtype=torch.float64).view(2, 3)}
    gradient = torch.randn(2, 3, dtype=torch.float64)
    state, other = (init_outer(theta, Outer(optimizer=optimizer, outer_lr=0.1)) for _ in range(2))
    outer_step(state, {"w": gradient}, 0, Outer(optimizer=optimizer, outer_lr=0.1))
    outer_step(other, {"w": gradient.t().contiguous().t()}, 0, Outer(optimizer=optimizer, outer_lr=0.1))
    assert torch.equal(state.meta_params["w"], other.meta_params["w"])


def test_the_parameters_handed_in_stay_as_they_are() -> None:
    options = Outer(optimizer="sgd", outer_lr=1.0)
    outer_step(init_outer(THETA, options), GRADS, 0, options)
    assert THETA["a"].tolist() == [3.0, 4.0]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_state_that_was_put_back_goes_on_as_if_nothing_had_happened(optimizer: Any) -> None:
    options = Outer(optimizer=optimizer, outer_lr=0.3, num_outer_steps=6, schedule="cosine", weight_decay=0.01)
    straight = init_outer(THETA, options)
    for step in range(3):
        outer_step(straight, {name: g * (step + 1) for name, g in GRADS.items()}, step, options)
    saved = {name: tensor.clone() for name, tensor in named_state(straight).items()}
    again = init_outer({name: torch.zeros_like(p) for name, p in THETA.items()}, options)
    load_named_state(again, saved)
    for step in range(3, 6):
        for state in (straight, again):
            outer_step(state, {name: g * (step - 2) for name, g in GRADS.items()}, step, options)
    found, expected = named_state(again), named_state(straight)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_state_of_another_model_is_refused_by_the_name_of_a_parameter() -> None:
    saved = named_state(init_outer({**THETA, "a": torch.zeros(3)}, Outer()))
    with pytest.raises(
        CheckpointError, match=r"another model: its parameter 'a' has the shape \[3\], and now it is \[2\]"
    ):
        load_named_state(init_outer(THETA, Outer()), saved)
    with pytest.raises(CheckpointError, match=r"parameter 'b\.c' has the shape None"):
        load_named_state(init_outer(THETA, Outer()), named_state(init_outer({"a": THETA["a"]}, Outer())))


def test_the_state_of_adam_has_a_name_for_everything() -> None:
    options = Outer()
    state = init_outer(THETA, options)
    outer_step(state, GRADS, 0, options)
    parts = ("meta_params", "optimizer/step", "optimizer/exp_avg", "optimizer/exp_avg_sq")
    assert set(named_state(state)) == {f"{part}/{name}" for part in parts for name in THETA}
