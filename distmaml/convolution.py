"""A convolution of a chain on a CPU, and its two transposes: products of matrices where the patches fit, else torch's.

A product with all patches of the maps side by side is the fastest of all for the few small images of a support set.
Where the patches take too much room (many input channels, stride 1), the library's convolution takes over. Maps are
``[num_samples, height, width, channels]``; rows ``[num_samples * height * width, channels]``, one a pixel.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from distmaml import kernels
from distmaml.chain import Block

MAX_EXPANSION = 3.0
"""How many times larger than the maps the matrix of patches may be for a convolution to become a matrix product."""


class Convolution:
    """A block's convolution, without its bias: the norm that follows takes it out again.

    Each of `output`, `weight_grad` and `maps_grad` is a sum over pairs, as a derivative along a direction has two
    terms.

    Args:
      shape: of the maps that go in.
      weight: ``[num_filters, channels, kernel, kernel]``, `channels_last`.

    Attributes:
      out_shape: of the maps that come out.
    """

    def __init__(self, block: Block, shape: torch.Size, weight: Tensor) -> None:
        self._block, self._shape, self._weight = block, shape, weight
        samples, height, width, channels = shape
        height, width = ((side + 2 * block.padding - block.kernel) // block.stride + 1 for side in (height, width))
        self.out_shape = torch.Size((samples, height, width, len(weight)))
        self._num_rows, self._num_columns = samples * height * width, block.kernel**2 * channels
        largest = max(self.out_shape.numel(), shape.numel())
        self._is_product = self._num_rows * self._num_columns <= MAX_EXPANSION * largest

    def look(self, maps: Tensor) -> Tensor:
        """What the convolution looks at: the patches of the maps, or, where these take too much room, the maps."""
        if not self._is_product:
            return maps
        block = self._block
        seen = maps.new_empty(self._num_rows, self._num_columns)
        kernels.patches(maps.numpy(), seen.numpy(), block.stride, block.padding, block.kernel)
        return seen

    def output(self, *pairs: tuple[Tensor, Tensor]) -> Tensor:
        """The output, rows, from pairs of what is looked at and a weight."""
        if self._is_product:
            return _sum_of_products((seen, _matrix(weight).t()) for seen, weight in pairs)
        stride, padding = self._block.stride, self._block.padding
        return _sum(_rows(F.conv2d(_images(seen), weight, None, stride, padding)) for seen, weight in pairs)

    def weight_grad(self, *pairs: tuple[Tensor, Tensor]) -> Tensor:
        """The gradient of the weight from pairs of what was looked at and the gradient of the output, rows."""
        if self._is_product:
            matrix = _sum_of_products((of_y.t(), seen) for seen, of_y in pairs)
            outputs, inputs, height, width = self._weight.shape
            return matrix.view(outputs, height, width, inputs).permute(0, 3, 1, 2)
        return _sum(self._library(of_y, _images(seen), self._weight, of_weight=True) for seen, of_y in pairs)

    def maps_grad(self, *pairs: tuple[Tensor, Tensor]) -> Tensor:
        """The gradient of the maps that went in, from pairs of the gradient of the output, rows, and a weight."""
        if self._is_product:
            of_seen = _sum_of_products((of_y, _matrix(weight)) for of_y, weight in pairs)
            maps = of_seen.new_empty(self._shape)
            block = self._block
            kernels.patches_back(of_seen.numpy(), maps.numpy(), block.stride, block.padding, block.kernel)
            return maps
        like = _images(pairs[0][0].new_empty(self._shape))
        terms = (self._library(of_y, like, weight, of_weight=False) for of_y, weight in pairs)
        return _sum(term.permute(0, 2, 3, 1).contiguous() for term in terms)

    def _library(self, of_y: Tensor, images: Tensor, weight: Tensor, *, of_weight: bool) -> Tensor:
        """The gradient in the weight, or in the images, from torch; of the wanted one it reads the shape alone."""
        of_images = _images(of_y.view(self.out_shape))
        stride, padding = [self._block.stride] * 2, [self._block.padding] * 2
        wanted = [not of_weight, of_weight, False]
        found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
            of_images, images, weight, None, stride, padding, [1, 1], False, [0, 0], 1, wanted
        )
        return found[1 if of_weight else 0]


def channels_last(weight: Tensor) -> Tensor:
    """The weight in the memory order in which a `Convolution` takes it."""
    return weight.detach().contiguous(memory_format=torch.channels_last)


def _sum_of_products(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    total: Tensor | None = None
    for left, right in pairs:
        total = left @ right if total is None else total.addmm_(left, right)
    assert total is not None
    return total


def _sum(terms: Iterable[Tensor]) -> Tensor:
    first, *others = terms
    for term in others:
        first = first.add_(term)
    return first


def _matrix(weight: Tensor) -> Tensor:
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1)


def _images(maps: Tensor) -> Tensor:
    return maps.permute(0, 3, 1, 2)


def _rows(images: Tensor) -> Tensor:
    return images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])
