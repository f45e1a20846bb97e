"""Who goes on as whom in population-based training, and with which values."""

import math

import pytest

from distmaml.population import FACTORS, Member, moves
from distmaml.space import Domain

SPACE = {"inner_lr": Domain("log", 0.01, 1.0), "clip_norm": Domain("uniform", 0.5, 10.0)}


def population(*results: float) -> list[Member]:
    return [Member(n, {"inner_lr": 0.02 * (n + 1), "clip_norm": 1.0 + n}, result) for n, result in enumerate(results)]


@pytest.mark.parametrize(("size", "num_moves"), [(1, 0), (2, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_the_worst_quarter_goes_on_from_the_best(size: int, num_moves: int) -> None:
    found = moves(SPACE, population(*(0.1 * n for n in range(size))), mode="max", seed=0, step=100)
    assert [move.trial for move in found] == list(range(num_moves))[::-1]
    assert all(size - num_moves <= move.donor < size for move in found)


def test_the_best_of_a_loss_is_the_least_and_nan_the_worst() -> None:
    (move,) = moves(SPACE, population(0.3, math.nan, 0.1, 0.2), mode="min", seed=0, step=100)
    assert (move.trial, move.donor) == (1, 2)
    (move,) = moves(SPACE, population(0.3, math.nan, 0.1, 0.2), mode="max", seed=0, step=100)
    assert (move.trial, move.donor) == (1, 0)


def test_values_lie_beside_those_of_the_donor_or_anywhere_in_their_range() -> None:
    beside = anywhere = 0
    for seed in range(200):
        (move,) = moves(SPACE, population(0.1, 0.9), mode="max", seed=seed, step=100)
        for field, value in move.values.items():
            donor = {"inner_lr": 0.04, "clip_norm": 2.0}[field]
            assert SPACE[field].low <= value <= SPACE[field].high
            near = any(math.isclose(value, donor * factor) for factor in FACTORS)
            beside, anywhere = beside + near, anywhere + (not near)
    assert 0.2 < anywhere / (beside + anywhere) < 0.3


def test_values_stay_in_their_range() -> None:
    for seed in range(50):
        at_ends = [Member(0, {"inner_lr": 0.01}, 0.1), Member(1, {"inner_lr": 1.0}, 0.9)]
        for mode in ("max", "min"):
            (move,) = moves({"inner_lr": SPACE["inner_lr"]}, at_ends, mode=mode, seed=seed, step=1)
            assert 0.01 <= move.values["inner_lr"] <= 1.0


def test_the_same_question_has_the_same_answer_in_any_order() -> None:
    members = population(0.5, 0.1, 0.9, 0.7, 0.2, 0.3, 0.8, 0.4)
    found = moves(SPACE, members, mode="max", seed=3, step=100)
    assert moves(SPACE, members[::-1], mode="max", seed=3, step=100) == found
    assert moves(SPACE, members, mode="max", seed=3, step=200) != found
    assert moves(SPACE, members, mode="max", seed=4, step=100) != found
