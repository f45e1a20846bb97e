"""Sums over workers. The only import of torch.distributed, and a no-op without a process group."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from distmaml.trees import Tree, tree_leaves, tree_unflatten


def all_reduce(buffer: Tensor) -> Tensor:
    """The sum of a buffer over all workers, in place."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(buffer)
    return buffer


def total(number: float, device: torch.device) -> float:
    """The sum of a number over all workers, on every worker."""
    return float(all_reduce(torch.tensor([number], dtype=torch.float64, device=device)))


def from_first(number: int, device: torch.device) -> int:
    """Rank 0's number, on every worker."""
    buffer = torch.tensor([number], device=device)
    if dist.is_available() and dist.is_initialized():
        dist.broadcast(buffer, src=0)
    return int(buffer)


def wait_for_all(device: torch.device) -> None:
    """Returns when every worker has come here."""
    from_first(0, device)  # a barrier of NCCL would guess the device


def mean_over_tasks(
    chunk_sums: Mapping[int, tuple[Tree, int]], like: Tree, *, num_chunks: int, ordered: bool, flag: bool = False
) -> tuple[Tree, int, bool]:
    """The mean over the tasks of all workers, their number, and whether any worker has raised its flag.

    One all-reduce carries everything: gradients, metrics, the number of tasks and the flags, flat. With ``ordered`` it
    carries one row per chunk. A row is zero on all workers but the one that computed it, so the reduction adds nothing
    but zeros to it, in whatever order; then every worker adds the rows by index. That makes the result the same to the
    last bit for every number of workers, for `num_chunks` times the traffic.

    Args:
      chunk_sums: this worker's chunks: index -> (sum over the chunk's tasks, number of tasks). May be empty.
      like: a tree with the structure, shapes, device and type of the sums.
      num_chunks: chunks of the step over all workers.
    """
    leaves = tree_leaves(like)
    width = sum(leaf.numel() for leaf in leaves)
    buffer = leaves[0].new_zeros(num_chunks if ordered else 1, width + 2)
    for index, (total, num_tasks) in sorted(chunk_sums.items()):
        row = torch.cat([*(leaf.reshape(-1) for leaf in tree_leaves(total)), buffer.new_tensor([num_tasks])])
        buffer[index if ordered else 0, :-1] += row
    buffer[0, -1] = float(flag)
    all_reduce(buffer)
    total = buffer[0].clone()
    for row in buffer[1:]:
        total += row
    num_tasks, raised = total[-2:].tolist()
    parts = (total[:-2] / num_tasks).split([leaf.numel() for leaf in leaves])
    mean = tree_unflatten(like, [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)])
    return mean, round(num_tasks), raised > 0
