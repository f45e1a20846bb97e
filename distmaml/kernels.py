"""The loops over memory of `chain_loss.py` and `convolution.py`, compiled for this machine's CPU by numba.

Arrays are numpy views of tensors. Maps are [num_samples, height, width, channels] in that memory order, or flat
[rows, channels] with one row a pixel, so that the innermost loop always runs over the channels. Sums over rows are
gathered in blocks and added in float64. A value that is not a number stays one.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

FunctionT = TypeVar("FunctionT", bound=Callable[..., None])
_OPTIONS: dict[str, Any] = {
    "error_model": "numpy",
    "fastmath": {"reassoc", "contract", "arcp", "nsz"},
    "boundscheck": False,
    "nogil": True,
}


def _compiled(function: FunctionT) -> FunctionT:
    """The function, compiled at its first call, and kept on disk for the next process where there is a place for it."""

    @functools.cache
    def compiled(*, cache: bool) -> Callable[..., None]:
        import numba  # takes a moment, which a GPU need not spend

        found: Callable[..., None] = numba.njit(cache=cache, **_OPTIONS)(function)
        return found

    keeps = True

    @functools.wraps(function)
    def call(*arguments: Any) -> None:
        nonlocal keeps
        try:
            compiled(cache=keeps)(*arguments)
        except Exception:
            if not keeps:
                raise
            keeps = False  # nowhere to write, a full disk, a file cut short: nothing has run yet
            compiled(cache=False)(*arguments)

    return call  # type: ignore[return-value]


_BLOCK = 128


@_compiled
def patches(maps: Any, out: Any, stride: int, padding: int, kernel: int) -> None:
    """Fills `out`, ``[rows, kernel * kernel * channels]``, with the patch that each output pixel looks at."""
    samples, height, width, channels = maps.shape
    out_height = (height + 2 * padding - kernel) // stride + 1
    out_width = (width + 2 * padding - kernel) // stride + 1
    row = 0
    for n in range(samples):
        for i in range(out_height):
            for j in range(out_width):
                for a in range(kernel):
                    y = i * stride + a - padding
                    for b in range(kernel):
                        x = j * stride + b - padding
                        first = (a * kernel + b) * channels
                        if 0 <= y < height and 0 <= x < width:
                            for c in range(channels):
                                out[row, first + c] = maps[n, y, x, c]
                        else:
                            for c in range(channels):
                                out[row, first + c] = 0
                row += 1


@_compiled
def patches_back(grad: Any, out: Any, stride: int, padding: int, kernel: int) -> None:
    """The transpose of `patches`: fills `out`, maps, with the sum of what each pixel has in `grad`."""
    samples, height, width, channels = out.shape
    out_height = (height + 2 * padding - kernel) // stride + 1
    out_width = (width + 2 * padding - kernel) // stride + 1
    out[:] = 0
    row = 0
    for n in range(samples):
        for i in range(out_height):
            for j in range(out_width):
                for a in range(kernel):
                    y = i * stride + a - padding
                    for b in range(kernel):
                        x = j * stride + b - padding
                        if 0 <= y < height and 0 <= x < width:
                            first = (a * kernel + b) * channels
                            for c in range(channels):
                                out[n, y, x, c] += grad[row, first + c]
                row += 1


@_compiled
def norm_relu(y: Any, gamma: Any, beta: Any, eps: float, inverse: Any, out: Any) -> None:
    """``out = max(gamma y^ + beta, 0)``, with `y` replaced by ``y^ = (y - mean) * inverse``, and `inverse` filled."""
    rows, channels = y.shape
    mean, part = np.zeros(channels), np.zeros_like(gamma)
    for first in range(0, rows, _BLOCK):
        part[:] = 0
        for i in range(first, min(first + _BLOCK, rows)):
            for c in range(channels):
                part[c] += y[i, c]
        for c in range(channels):
            mean[c] += part[c]
    centre, rest = np.empty_like(gamma), np.zeros(channels)
    for c in range(channels):
        centre[c] = mean[c] / rows
        rest[c] = mean[c] / rows - centre[c]
    variance = np.zeros(channels)
    for first in range(0, rows, _BLOCK):
        part[:] = 0
        for i in range(first, min(first + _BLOCK, rows)):
            for c in range(channels):
                distance = y[i, c] - centre[c]
                part[c] += distance * distance
        for c in range(channels):
            variance[c] += part[c]
    shift = np.empty_like(gamma)
    for c in range(channels):
        inverse[c] = 1.0 / np.sqrt(variance[c] / rows - rest[c] * rest[c] + eps)
        shift[c] = rest[c] * inverse[c]
    zero = gamma.dtype.type(0)
    for i in range(rows):
        for c in range(channels):
            hat = (y[i, c] - centre[c]) * inverse[c] - shift[c]
            y[i, c] = hat
            value = gamma[c] * hat + beta[c]
            out[i, c] = zero if value < 0 else value


@_compiled
def norm_relu_back(grad: Any, hat: Any, gamma: Any, beta: Any, inverse: Any, of_gamma: Any, of_beta: Any) -> None:
    """The transpose of `norm_relu`, with z' the part of `grad` that the ReLU lets through::

        gamma' = sum z' y^,  beta' = sum z',  y' = gamma inverse (z' - <z'> - y^ <z' y^>)

    `grad` becomes y'.
    """
    rows, channels = hat.shape
    zero = gamma.dtype.type(0)
    sums, products = np.zeros(channels), np.zeros(channels)
    part, part_products = np.zeros_like(gamma), np.zeros_like(gamma)
    for first in range(0, rows, _BLOCK):
        part[:] = 0
        part_products[:] = 0
        for i in range(first, min(first + _BLOCK, rows)):
            for c in range(channels):
                z = zero if gamma[c] * hat[i, c] + beta[c] <= 0 else grad[i, c]
                part[c] += z
                part_products[c] += z * hat[i, c]
        for c in range(channels):
            sums[c] += part[c]
            products[c] += part_products[c]
    for c in range(channels):
        of_beta[c], of_gamma[c] = sums[c], products[c]
        part[c], part_products[c] = sums[c] / rows, products[c] / rows
    for i in range(rows):
        for c in range(channels):
            z = zero if gamma[c] * hat[i, c] + beta[c] <= 0 else grad[i, c]
            grad[i, c] = gamma[c] * inverse[c] * (z - part[c] - hat[i, c] * part_products[c])


@_compiled
def norm_relu_tangent(
    t_y: Any, hat: Any, gamma: Any, beta: Any, inverse: Any, t_gamma: Any, t_beta: Any, slope: Any, out: Any
) -> None:
    """The derivative of `norm_relu` along tangents: `out` is that of its output, `t_y` becomes that of y^::

    t_y^ = inverse (t_y - <t_y> - y^ <t_y y^>),  slope = <t_y y^>,  t_inverse = -inverse^2 slope
    """
    rows, channels = hat.shape
    zero = gamma.dtype.type(0)
    sums, products = np.zeros(channels), np.zeros(channels)
    part, part_products = np.zeros_like(gamma), np.zeros_like(gamma)
    for first in range(0, rows, _BLOCK):
        part[:] = 0
        part_products[:] = 0
        for i in range(first, min(first + _BLOCK, rows)):
            for c in range(channels):
                part[c] += t_y[i, c]
                part_products[c] += t_y[i, c] * hat[i, c]
        for c in range(channels):
            sums[c] += part[c]
            products[c] += part_products[c]
    for c in range(channels):
        part[c], slope[c] = sums[c] / rows, products[c] / rows
    for i in range(rows):
        for c in range(channels):
            t_hat = inverse[c] * (t_y[i, c] - part[c] - hat[i, c] * slope[c])
            t_y[i, c] = t_hat
            moved = t_gamma[c] * hat[i, c] + gamma[c] * t_hat + t_beta[c]
            out[i, c] = zero if gamma[c] * hat[i, c] + beta[c] <= 0 else moved


@_compiled
def norm_relu_back_tangent(
    grad: Any, t_grad: Any, hat: Any, t_hat: Any, gamma: Any, beta: Any, inverse: Any, t_gamma: Any, slope: Any,
    of_gamma: Any, of_beta: Any,
) -> None:  # fmt: skip
    """The derivative of `norm_relu_back` along the tangents of all its arguments.

    `t_grad` becomes the tangent of y'; `of_gamma` and `of_beta` are filled with theirs.
    """
    rows, channels = hat.shape
    zero = gamma.dtype.type(0)
    sums, products = np.zeros(channels), np.zeros(channels)
    t_sums, t_products = np.zeros(channels), np.zeros(channels)
    part, part_products = np.zeros_like(gamma), np.zeros_like(gamma)
    t_part, t_part_products = np.zeros_like(gamma), np.zeros_like(gamma)
    for first in range(0, rows, _BLOCK):
        part[:] = 0
        part_products[:] = 0
        t_part[:] = 0
        t_part_products[:] = 0
        for i in range(first, min(first + _BLOCK, rows)):
            for c in range(channels):
                shut = gamma[c] * hat[i, c] + beta[c] <= 0
                z = zero if shut else grad[i, c]
                t_z = zero if shut else t_grad[i, c]
                part[c] += z
                part_products[c] += z * hat[i, c]
                t_part[c] += t_z
                t_part_products[c] += t_z * hat[i, c] + z * t_hat[i, c]
        for c in range(channels):
            sums[c] += part[c]
            products[c] += part_products[c]
            t_sums[c] += t_part[c]
            t_products[c] += t_part_products[c]
    scale, t_scale = np.empty_like(gamma), np.empty_like(gamma)
    for c in range(channels):
        of_beta[c], of_gamma[c] = t_sums[c], t_products[c]
        part[c], part_products[c] = sums[c] / rows, products[c] / rows
        t_part[c], t_part_products[c] = t_sums[c] / rows, t_products[c] / rows
        scale[c] = gamma[c] * inverse[c]
        t_scale[c] = t_gamma[c] * inverse[c] - scale[c] * inverse[c] * slope[c]
    for i in range(rows):
        for c in range(channels):
            shut = gamma[c] * hat[i, c] + beta[c] <= 0
            z = zero if shut else grad[i, c]
            t_z = zero if shut else t_grad[i, c]
            centred = z - part[c] - hat[i, c] * part_products[c]
            t_centred = t_z - t_part[c] - t_hat[i, c] * part_products[c] - hat[i, c] * t_part_products[c]
            t_grad[i, c] = t_scale[c] * centred + scale[c] * t_centred


@_compiled
def max_pool(maps: Any, size: int, out: Any, winners: Any) -> None:
    """The largest of each window of size x size, and in `winners` which of them it was, counted row by row."""
    samples, height, width, channels = out.shape
    for n in range(samples):
        for i in range(height):
            for j in range(width):
                for c in range(channels):
                    out[n, i, j, c] = maps[n, i * size, j * size, c]
                    winners[n, i, j, c] = 0
                for k in range(1, size * size):
                    for c in range(channels):
                        value = maps[n, i * size + k // size, j * size + k % size, c]
                        if value > out[n, i, j, c] or value != value:
                            out[n, i, j, c] = value
                            winners[n, i, j, c] = k


@_compiled
def max_pool_tangent(maps: Any, size: int, winners: Any, out: Any) -> None:
    """The tangents of the winners."""
    samples, height, width, channels = out.shape
    for n in range(samples):
        for i in range(height):
            for j in range(width):
                for c in range(channels):
                    k = winners[n, i, j, c]
                    out[n, i, j, c] = maps[n, i * size + k // size, j * size + k % size, c]


@_compiled
def max_pool_back(grad: Any, size: int, winners: Any, out: Any) -> None:
    """The transpose of `max_pool_tangent`."""
    samples, height, width, channels = grad.shape
    out[:] = 0
    for n in range(samples):
        for i in range(height):
            for j in range(width):
                for c in range(channels):
                    k = winners[n, i, j, c]
                    out[n, i * size + k // size, j * size + k % size, c] = grad[n, i, j, c]
