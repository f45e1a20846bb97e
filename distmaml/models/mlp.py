"""A multi-layer perceptron."""

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


class Mlp(nn.Module):
    """Linear layers with ReLU between: input ``[num_samples, *input_shape]``, output ``[num_samples, num_outputs]``.

    With hidden sizes 40 and 40 it is the sinusoid network of Finn et al. (2017), https://arxiv.org/abs/1703.03400.
    """

    def __init__(self, input_shape: Sequence[int], num_outputs: int, *, hidden_sizes: Sequence[int] = (40, 40)) -> None:
        super().__init__()
        widths = [math.prod(input_shape), *hidden_sizes]
        layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.body = nn.Sequential(nn.Flatten(), *layers)
        self.head = nn.Linear(widths[-1], num_outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.body(inputs))
        return outputs
