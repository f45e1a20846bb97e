"""Trees keep their structure, their order and their types."""

import torch

from distmaml.episodes import Batch, Episode
from distmaml.trees import tree_add, tree_index, tree_leaves, tree_map, tree_names, tree_to, tree_unflatten

TREE = {"b": torch.tensor([1.0, 2.0]), "a": (torch.tensor([3.0]), {"c": torch.tensor([[4.0]])})}


def test_leaves_and_names_come_in_the_order_of_insertion() -> None:
    assert [leaf.flatten().tolist() for leaf in tree_leaves(TREE)] == [[1.0, 2.0], [3.0], [4.0]]
    assert tree_names(TREE) == ["b", "a.0", "a.1.c"]


def test_names_of_a_named_tuple_are_those_of_its_fields() -> None:
    assert tree_names(Batch(torch.zeros(1), {"x": torch.zeros(1)})) == ["inputs", "targets.x"]


def test_names_of_parameters_stay_as_they_are() -> None:
    assert tree_names({"body.0.weight": torch.zeros(1)}) == ["body.0.weight"]


def test_unflatten_undoes_leaves() -> None:
    again = tree_unflatten(TREE, tree_leaves(TREE))
    assert list(again) == ["b", "a"]
    assert again["a"][1]["c"] is TREE["a"][1]["c"]  # type: ignore[index]


def test_sum_by_hand() -> None:
    assert [leaf.flatten().tolist() for leaf in tree_leaves(tree_add(TREE, TREE))] == [[2.0, 4.0], [6.0], [8.0]]


def test_map_goes_over_several_trees() -> None:
    assert tree_map(lambda a, b: a - 2 * b, (3, {"x": 4}), (1, {"x": 1})) == (1, {"x": 2})


def test_index_takes_one_task_and_keeps_a_missing_key_missing() -> None:
    tasks = Episode(
        Batch(torch.arange(6).reshape(3, 2), torch.arange(3)), Batch(torch.arange(3), torch.arange(3)), None
    )
    one = tree_index(tasks, 1)
    assert one.support.inputs.tolist() == [2, 3]
    assert one.key is None
    assert tree_index(tasks, slice(1, 3)).query.targets.tolist() == [1, 2]


def test_to_converts_floating_point_leaves_alone() -> None:
    batch = Batch(torch.zeros(2, dtype=torch.float32), torch.zeros(2, dtype=torch.int64))
    moved = tree_to(Episode(batch, batch), torch.device("cpu"), torch.float64)
    assert (moved.support.inputs.dtype, moved.support.targets.dtype, moved.key) == (torch.float64, torch.int64, None)
