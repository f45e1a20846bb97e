"""The four-block convolutional network of few-shot image classification.

Vinyals et al. (2016), "Matching Networks for One Shot Learning", https://arxiv.org/abs/1606.04080, in the two forms
that Finn et al. (2017), https://arxiv.org/abs/1703.03400, use.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from distmaml.errors import ConfigError


class Conv4(nn.Module):
    """Four times 3x3 convolution, batch norm on batch statistics, ReLU; then a linear head.

    With ``downsample="stride"`` (Omniglot) the convolutions have stride 2 and the head gets the mean over space,
    ``[num_filters]`` features; with "pool" (mini-ImageNet) each block ends in 2x2 max-pooling and the head gets the
    flat map. Input ``[num_samples, channels, height, width]``, output ``[num_samples, num_outputs]``.
    """

    def __init__(
        self, input_shape: Sequence[int], num_outputs: int, *, num_filters: int = 64, downsample: str = "stride"
    ) -> None:
        super().__init__()
        channels, height, width = input_shape
        if downsample == "pool" and min(height, width) < 16:
            raise ConfigError(
                f"four 2x2 poolings need images of 16x16 or more, not {height}x{width}: --downsample stride."
            )
        self.downsample = downsample
        stride = 2 if downsample == "stride" else 1
        widths = [channels, *[num_filters] * 4]
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, stride=stride, padding=1) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(num_filters, track_running_stats=False) for _ in range(4))
        cells = (height // 16) * (width // 16) if downsample == "pool" else 1
        self.head = nn.Linear(num_filters * cells, num_outputs)

    def forward(self, images: Tensor) -> Tensor:
        maps = images
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            maps = F.relu(norm(convolution(maps)))
            if self.downsample == "pool":
                maps = F.max_pool2d(maps, 2)
        features = maps.mean((2, 3)) if self.downsample == "stride" else maps.flatten(1)
        logits: Tensor = self.head(features)
        return logits
