"""Modules of every kind that users bring, each with a loss and a batch of tasks that suits it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distmaml.episodes import Batch, Episode
from distmaml.models.conv4 import Conv4


class Case(NamedTuple):
    model: nn.Module
    inputs: Callable[[int], Tensor]
    classes: int | None  # None: regression on 2 values


class LastOutput(nn.Module):
    """A recurrent network read at its last step."""

    def __init__(self, cell: nn.RNNBase, hidden: int, outputs: int) -> None:
        super().__init__()
        self.cell = cell
        self.head = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.cell(x)[0][:, -1])
        return out


class Encoder(nn.Module):
    """A transformer encoder layer over tokens."""

    def __init__(self, outputs: int, dropout: float = 0.0, attention_dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, activation="gelu", batch_first=True)
        self.layer.self_attn.dropout = attention_dropout
        self.head = nn.Linear(8, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.layer(self.embed(tokens)).mean(1))
        return out


def _normal(*shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randn(n, *shape)


def _tokens(n: int) -> Tensor:
    return torch.randint(20, (n, 6))


CASES: dict[str, Callable[[], Case]] = {
    "linear": lambda: Case(nn.Sequential(nn.Linear(3, 2)), _normal(3), None),
    "mlp": lambda: Case(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)), _normal(3), 4),
    "convolution": lambda: Case(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 4)),
        _normal(1, 8, 8),
        4,
    ),
    "batch norm": lambda: Case(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2),
            nn.BatchNorm2d(4, track_running_stats=False),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(36, 4),
        ),
        _normal(2, 8, 8),
        4,
    ),
    "conv4": lambda: Case(Conv4((1, 16, 16), 4, num_filters=3), _normal(1, 16, 16), 4),
    "conv4 pooled": lambda: Case(Conv4((1, 16, 16), 4, num_filters=3, downsample="pool"), _normal(1, 16, 16), 4),
    "lstm": lambda: Case(LastOutput(nn.LSTM(3, 5, batch_first=True), 5, 4), _normal(6, 3), 4),
    "gru": lambda: Case(LastOutput(nn.GRU(3, 5, batch_first=True), 5, 2), _normal(6, 3), None),
    "transformer": lambda: Case(Encoder(4), _tokens, 4),
    "dropout": lambda: Case(
        nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Dropout(0.5), nn.Linear(32, 4)), _normal(3), 4
    ),
    # Its masks are drawn in the memory order of tensors that torch.func lays out in another way than autograd does:
    # not the oracle's masks, so it is compared with differences of the engine's own loss alone.
    "transformer with dropout": lambda: Case(Encoder(4, 0.2, 0.2), _tokens, 4),
}  # fmt: skip
SMOOTH = [name for name in CASES if name not in ("conv4", "conv4 pooled")]
"""Modules without kinks, for which differences of losses are precise."""
WITH_ORACLE = [name for name in CASES if name != "transformer with dropout"]
"""Modules that autograd runs just as the engine does."""


def make(name: str, *, num_tasks: int = 3, seed: int = 0) -> tuple[Case, Episode, Callable[[Tensor, Tensor], Tensor]]:
    """A case in float64, its tasks (support 8, query 12), and its loss."""
    torch.manual_seed(seed)
    case = CASES[name]()
    case.model.double()

    def batch(size: int) -> Batch:
        inputs = torch.stack([case.inputs(size) for _ in range(num_tasks)])
        inputs = inputs.double() if inputs.is_floating_point() else inputs
        if case.classes is None:
            return Batch(inputs, torch.randn(num_tasks, size, 2, dtype=torch.float64))
        return Batch(inputs, torch.randint(case.classes, (num_tasks, size)))

    tasks = Episode(batch(8), batch(12), torch.randint(2**62, (num_tasks,)))
    loss = (lambda a, b: (a - b).square().mean()) if case.classes is None else F.cross_entropy
    return case, tasks, loss
