"""What a loop needs of the world: who it is, where it computes, and whom it tells."""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch


class Worker(Protocol):
    """One process of a training run.

    Attributes:
      rank: number of this worker, from 0.
      world_size: how many there are.
      device: where this worker computes.
    """

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...

    def report(self, metrics: Mapping[str, float]) -> None:
        """Tells whoever started the workers how far they are. Every worker calls it equally often."""
        ...

    def leaving(self) -> bool:
        """Whether a machine of the workers is about to be taken away. Cheap: it is asked before every step."""
        ...


class LocalWorker:
    """The only worker, in this process: training and debugging without a cluster, and a trial of a search.

    Args:
      tell: who started it, if anybody.
    """

    rank = 0
    world_size = 1

    def __init__(
        self, device: torch.device | str = "cpu", *, tell: Callable[[Mapping[str, float]], None] | None = None
    ) -> None:
        self.device = torch.device(device)
        self._tell = tell

    def report(self, metrics: Mapping[str, float]) -> None:
        """Tells whoever started this worker."""
        if self._tell is not None:
            self._tell(metrics)

    def leaving(self) -> bool:
        """Nobody says so to a process on its own."""
        return False
