"""Conjugate gradients against a direct solver, and where they have to stop."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap

from distmaml.conjugate_gradient import conjugate_gradient, tree_axpy, tree_dot
from distmaml.trees import Tree

SIZE = 7


def tree(vector: Tensor) -> Tree:
    """A vector as leaves of several shapes."""
    return {"a": vector[:4].view(2, 2), "b": (vector[4:5].view(()), vector[5:])}


def flat(leaves: Tree) -> Tensor:
    return torch.cat([leaves["a"].reshape(-1), leaves["b"][0].reshape(-1), leaves["b"][1]])


def times(matrix: Tensor) -> Callable[[Tree], Tree]:
    return lambda leaves: tree(matrix @ flat(leaves))


def solved(matrix: Tensor, target: Tensor, num_steps: int) -> Tensor:
    return flat(conjugate_gradient(times(matrix), tree(target), num_steps))


def positive(eigenvalues: list[float], seed: int = 0) -> tuple[Tensor, Tensor]:
    """A symmetric matrix with these eigenvalues, and a right-hand side with a part along each."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64))
    values = torch.tensor(eigenvalues, dtype=torch.float64)
    return basis @ values.diag() @ basis.t(), basis @ torch.arange(1.0, SIZE + 1, dtype=torch.float64)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_as_many_steps_as_unknowns_are_the_solution(seed: int) -> None:
    matrix, target = positive([0.3, 0.7, 1.0, 1.4, 2.0, 3.5, 6.0], seed)
    expected = torch.linalg.solve(matrix, target)
    torch.testing.assert_close(solved(matrix, target, SIZE), expected, rtol=1e-10, atol=1e-10)
    for num_steps in (SIZE + 1, 3 * SIZE, 50):  # once there, nothing more happens
        torch.testing.assert_close(solved(matrix, target, num_steps), expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(solved(matrix, target, SIZE - 1), expected, rtol=1e-4)


@pytest.mark.parametrize("distinct", [1, 2, 3])
def test_as_many_steps_as_different_eigenvalues_are_the_solution(distinct: int) -> None:
    matrix, target = positive([[2.0, 5.0, 0.5][i % distinct] for i in range(SIZE)])
    expected = torch.linalg.solve(matrix, target)
    torch.testing.assert_close(solved(matrix, target, distinct), expected, rtol=1e-12, atol=1e-12)
    assert distinct == 1 or not torch.allclose(solved(matrix, target, distinct - 1), expected, rtol=1e-4)


def test_each_step_comes_nearer_in_the_norm_of_the_matrix() -> None:
    matrix, target = positive([0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 9.0])
    expected = torch.linalg.solve(matrix, target)
    away = [solved(matrix, target, number) - expected for number in range(SIZE + 1)]
    lengths = [float(vector @ matrix @ vector) for vector in away]
    assert all(later < earlier for earlier, later in itertools.pairwise(lengths))


def test_a_direction_that_curves_downwards_ends_it_by_hand() -> None:
    """A = diag(1, -1, 3), b = (3, 3, 3): b has the curvature 27 and the squared length 27, so the first step is b. It
    leaves (0, 6, -6), which curves upwards by 72; but the next direction, 8/3 b more, is (8, 14, 2), and by
    64 - 196 + 12 it curves downwards."""
    matrix, target = torch.zeros(SIZE, SIZE, dtype=torch.float64), torch.zeros(SIZE, dtype=torch.float64)
    matrix[:3, :3] = torch.tensor([1.0, -1, 3], dtype=torch.float64).diag()
    target[:3] = 3
    for num_steps in (1, 2, 3, 20):
        torch.testing.assert_close(solved(matrix, target, num_steps), target, rtol=1e-14, atol=1e-14)
    matrix[1, 1] = -2  # now b has the curvature 18
    for num_steps in (1, 2, 3, 20):
        torch.testing.assert_close(solved(matrix, target, num_steps), 1.5 * target, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("curvature", [-1.0, 0.0])
@pytest.mark.parametrize("num_steps", [1, 4])
def test_a_first_direction_that_does_not_curve_upwards_is_the_answer(curvature: float, num_steps: int) -> None:
    _, target = positive([1.0] * SIZE)
    assert torch.equal(solved(curvature * torch.eye(SIZE, dtype=torch.float64), target, num_steps), target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_on_the_right_is_nothing_as_a_solution(dtype: torch.dtype) -> None:
    matrix, _ = positive([0.3, 0.7, 1.0, 1.4, 2.0, 3.5, 6.0])
    found = solved(matrix.to(dtype), torch.zeros(SIZE, dtype=dtype), 4)
    assert found.dtype == dtype
    assert torch.equal(found, torch.zeros(SIZE, dtype=dtype))


def test_systems_side_by_side_each_stop_where_they_would_alone() -> None:
    """One is solved in a step, one in seven, one curves downwards, one has nothing on its right."""
    many, target = positive([0.3, 0.7, 1.0, 1.4, 2.0, 3.5, 6.0])
    eye = torch.eye(SIZE, dtype=torch.float64)
    matrices, targets = torch.stack([2 * eye, many, -eye, many]), torch.stack([target, target, target, 0 * target])
    for num_steps in (1, 3, SIZE, 20):
        together = vmap(lambda a, b, n=num_steps: solved(a, b, n))(matrices, targets)
        alone = torch.stack([solved(a, b, num_steps) for a, b in zip(matrices, targets, strict=True)])
        assert together.isfinite().all()
        torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(together[0], target / 2, rtol=1e-14, atol=0)
    torch.testing.assert_close(together[2], target, rtol=0, atol=0)


def test_what_is_no_number_is_seen() -> None:
    matrix, target = positive([1.0] * SIZE)
    target[3] = torch.nan
    assert solved(matrix, target, 3).isnan().any()


def test_the_matrix_is_asked_for_as_many_products_as_steps() -> None:
    matrix, target = positive([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    asked: list[Any] = []
    product = times(matrix)
    conjugate_gradient(lambda leaves: asked.append(leaves) or product(leaves), tree(target), 3)  # type: ignore[func-returns-value]
    assert len(asked) == 3


def test_tree_dot_and_tree_axpy_by_hand() -> None:
    one = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}
    other = {"a": torch.tensor([4.0, 5.0]), "b": torch.tensor(6.0)}
    assert float(tree_dot(one, other)) == 32
    moved = tree_axpy(torch.tensor(2.0), one, other)
    assert moved["a"].tolist() == [6, 9]
    assert float(moved["b"]) == 12
