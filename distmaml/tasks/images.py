"""N-way K-shot image classification over a class store.

Vinyals et al. (2016), "Matching Networks for One Shot Learning", https://arxiv.org/abs/1606.04080; rotations as new
classes as in Santoro et al. (2016), https://arxiv.org/abs/1605.06065.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from distmaml.episodes import Batch, Episode, TaskBatch, fold_in, random_choice, random_ints, task_keys
from distmaml.errors import DataError
from distmaml.store import ClassRows


class ImageTasks:
    """Episodes of `num_ways` classes with `num_shots` support and `num_queries` query images each.

    Inputs are float32 in [0, 1], ``[num_tasks, num_ways * num_samples, channels, height, width]``, sorted by class;
    targets are int64 ``[num_tasks, num_ways * num_samples]`` in [0, num_ways).

    Args:
      images: ``[num_rows, channels, height, width]`` uint8, may be memory-mapped; only the rows drawn are copied. A
        tensor on a GPU has the episodes put together there.
      classes: the classes of this split with their rows.
      rotations: whether a class's rotations by 90, 180 and 270 degrees are classes of their own.

    Raises:
      DataError: too few classes, or a class with too few images, named.
    """

    def __init__(
        self,
        images: np.ndarray | Tensor,
        classes: Sequence[ClassRows],
        *,
        split: str,
        seed: int,
        num_ways: int,
        num_shots: int,
        num_queries: int,
        rotations: bool,
    ) -> None:
        turns = 4 if rotations else 1
        if len(classes) * turns < num_ways:
            raise DataError(
                f"num_ways={num_ways} asks for more classes than the {len(classes) * turns} of the {split} split. "
                "Lower num_ways, or take another split."
            )
        smallest = min(classes, key=lambda entry: len(entry.rows))
        if len(smallest.rows) < num_shots + num_queries:
            raise DataError(
                f"{num_shots} shots and {num_queries} queries need {num_shots + num_queries} images a class, but class "
                f"{smallest.name!r} of the {split} split has {len(smallest.rows)}. Lower num_shots, num_queries or "
                "num_eval_queries."
            )
        self.images, self.split, self.seed = images, split, seed
        self.num_ways, self.num_shots, self.num_queries, self.turns = num_ways, num_shots, num_queries, turns
        if rotations and images.shape[-2] != images.shape[-1]:
            raise DataError(
                f"images of {images.shape[-2]}x{images.shape[-1]} are not square, so rotations change their shape. "
                "Take --rotations none."
            )
        if isinstance(images, Tensor):
            # Where each pixel of a turned picture comes from: looking it up needs no decision of the CPU.
            places = torch.arange(images.shape[-2] * images.shape[-1], device=images.device).view(images.shape[-2:])
            self._orders = torch.stack([places.rot90(turn).flatten() for turn in range(turns)])
        self._names = [entry.name for entry in classes]
        self._counts = torch.tensor([len(entry.rows) for entry in classes])
        self._rows = torch.zeros(len(classes), int(self._counts.max()), dtype=torch.int64)
        for row, entry in zip(self._rows, classes, strict=True):
            row[: len(entry.rows)] = torch.from_numpy(np.array(entry.rows))

    def sample(self, indices: Sequence[int]) -> TaskBatch:
        """The episodes with these indices; pure in (seed, split, index)."""
        keys = task_keys(self.seed, self.split, indices)
        classes, rows = self.draw(indices)
        images = self._turned(rows, classes % self.turns).to(torch.float32)
        images /= torch.tensor(255.0, device=images.device)  # by a number, a GPU would multiply with its inverse
        labels = torch.arange(self.num_ways, device=images.device).expand(len(indices), -1)

        def batch(samples: slice) -> Batch:
            part = images[:, :, samples]
            return Batch(part.flatten(1, 2), labels.repeat_interleave(part.shape[2], dim=1))

        support, query = batch(slice(None, self.num_shots)), batch(slice(self.num_shots, None))
        return Episode(support, query, fold_in(keys, 2), classes)

    @property
    def num_classes(self) -> int:
        """Classes of the split; rotations count."""
        return len(self._names) * self.turns

    def _turned(self, rows: Tensor, quarter_turns: Tensor) -> Tensor:
        """The pixels of store rows, each class turned: ``[*rows, channels, height, width]``; a copy."""
        if isinstance(self.images, Tensor):
            pixels = self.images[rows.to(self.images.device)]
            if self.turns == 1:
                return pixels
            order = self._orders[quarter_turns.to(pixels.device)][:, :, None, None]
            flat = pixels.flatten(-2)
            return flat.gather(-1, order.expand_as(flat)).view_as(pixels)
        turned = self.images[rows.numpy()]
        for turn in range(1, self.turns):
            chosen = quarter_turns.numpy() == turn
            turned[chosen] = np.rot90(turned[chosen], turn, axes=(-2, -1))
        return torch.from_numpy(turned)

    def names_of(self, index: int) -> list[str]:
        """The names of an episode's classes, in the order of their labels; a class's rotations share its name."""
        classes, _ = self.draw([index])
        return [self._names[int(number) // self.turns] for number in classes[0]]

    def draw(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Classes ``[num_tasks, num_ways]``, counted with their rotations, and store rows
        ``[num_tasks, num_ways, num_shots + num_queries]`` of each episode."""
        keys = task_keys(self.seed, self.split, indices)
        classes = random_choice(fold_in(keys, 0), self.num_ways, len(self._counts) * self.turns)
        bases = classes // self.turns
        ways = fold_in(fold_in(keys, 1).unsqueeze(-1), torch.arange(self.num_ways))
        order = random_ints(ways, self._rows.shape[1])
        absent = torch.arange(self._rows.shape[1]) >= self._counts[bases].unsqueeze(-1)
        samples = order.masked_fill(absent, 2**63 - 1).argsort(stable=True)[..., : self.num_shots + self.num_queries]
        return classes, self._rows[bases].gather(-1, samples)
