"""The residual network of few-shot image classification, for what a large model costs.

Oreshkin et al. (2018), "TADAM: Task dependent adaptive metric for improved few-shot learning",
https://arxiv.org/abs/1805.10123; the widths are those of Lee et al. (2019), "Meta-Learning with Differentiable Convex
Optimization", https://arxiv.org/abs/1904.03758. No DropBlock.
"""

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = (64, 160, 320, 640)
SLOPE = 0.1


class Block(nn.Module):
    """Three 3x3 convolutions with batch norm, a 1x1 convolution around them, leaky ReLU, 2x2 max-pooling."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        widths = [num_inputs, *[num_outputs] * 3]
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(num_outputs, track_running_stats=False) for _ in range(3))
        self.shortcut = nn.Conv2d(num_inputs, num_outputs, 1, bias=False)
        self.shortcut_norm = nn.BatchNorm2d(num_outputs, track_running_stats=False)

    def forward(self, maps: Tensor) -> Tensor:
        around: Tensor = self.shortcut_norm(self.shortcut(maps))
        for index, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            maps = norm(convolution(maps))
            maps = F.leaky_relu(maps + around if index == 2 else maps, SLOPE)
        return F.max_pool2d(maps, 2)


class ResNet12(nn.Module):
    """Four blocks, the mean over space, a linear head: ``[num_samples, 3, height, width] -> [num_samples, 5]``."""

    def __init__(self, num_outputs: int = 5) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(a, b) for a, b in pairwise((3, *WIDTHS))))
        self.head = nn.Linear(WIDTHS[-1], num_outputs)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(images).mean((2, 3)))
        return logits
