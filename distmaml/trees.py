"""Arithmetic on pytrees of tensors: nested dicts, tuples and NamedTuples."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Tree: TypeAlias = Any
"""A tensor, or a dict, list, tuple or NamedTuple of trees."""


def tree_map(function: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """The tree of ``function(leaf, *leaves of rest)``; all trees have one structure."""
    if (
        type(tree) is dict
        and all(type(leaf) is Tensor for leaf in tree.values())
        and all(type(other) is dict and other.keys() == tree.keys() for other in rest)
    ):
        # Parameters, at every inner step: pytree takes longer than the arithmetic on a small network.
        return {name: function(leaf, *[other[name] for other in rest]) for name, leaf in tree.items()}
    return pytree.tree_map(function, tree, *rest)


def tree_leaves(tree: Tree) -> list[Any]:
    """The leaves in a fixed order: dicts by insertion, tuples by position."""
    return pytree.tree_leaves(tree)


def tree_unflatten(like: Tree, leaves: Sequence[Any]) -> Tree:
    """The tree with the structure of `like` and these leaves."""
    return pytree.tree_unflatten(leaves, pytree.tree_structure(like))


def tree_names(tree: Tree) -> list[str]:
    """A name for each leaf, in the order of `tree_leaves`: the path to it, joined by dots."""
    paths, _ = pytree.tree_flatten_with_path(tree)
    return [".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)
            for path, _ in paths]  # fmt: skip


def named_leaves(tree: Tree) -> dict[str, Any]:
    """The leaves by their names."""
    return dict(zip(tree_names(tree), tree_leaves(tree), strict=True))


def tree_add(a: Tree, b: Tree) -> Tree:
    """``a + b``, leaf by leaf."""
    return tree_map(torch.add, a, b)


def floats(scalars: Mapping[str, Tensor]) -> dict[str, float]:
    """Scalars of one type as numbers, in a single transfer from their device."""
    return dict(zip(scalars, torch.stack(list(scalars.values())).tolist(), strict=True))


def tree_index(tree: Tree, index: int | slice) -> Tree:
    """``leaf[index]`` of every tensor leaf; leaves that are None stay None."""
    return tree_map(lambda leaf: leaf if leaf is None else leaf[index], tree)


def tree_to(tree: Tree, device: torch.device, dtype: torch.dtype) -> Tree:
    """The tree on a device, floating-point leaves in `dtype`."""

    def move(leaf: Any) -> Any:
        if leaf is None:
            return None
        return leaf.to(device, dtype if leaf.is_floating_point() else leaf.dtype)

    return tree_map(move, tree)
