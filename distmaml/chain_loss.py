"""The exact derivatives, first and second, of the loss of a chain on a CPU, by hand.

Torch's autograd computes them too, and is the reference of this file, but on the five images of a support set it spends
most of its time between the operators, and its second derivative of a batch norm is twenty passes over the data. Here a
gradient is a forward and a backward pass, and the Hessian-vector product that `inner.pull_back` asks for is the
derivative of both along a direction (Pearlmutter, 1994, "Fast Exact Multiplication by the Hessian",
https://doi.org/10.1162/neco.1994.6.1.147), with convolutions as products of matrices and the rest fused into the loops
of `kernels.py`.
`predict` is the forward pass alone.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from distmaml import kernels
from distmaml.chain import Block, Chain
from distmaml.inner import Linearization, Metrics, Params
from distmaml.trees import Tree

MAX_EXPANSION = 3.0
"""How many times larger than the maps the matrix of patches may be for a convolution to become a matrix product."""


class ChainLoss:
    """The loss of a chain on one batch: a function of the parameters that brings its own derivatives.

    Args:
      loss: ``(outputs, targets) -> (scalar, metrics)``, any that torch can differentiate twice.
      inputs: ``[num_samples, channels, height, width]``.
    """

    def __init__(
        self, chain: Chain, loss: Callable[[Any, Any], tuple[Tensor, Metrics]], inputs: Tensor, targets: Any
    ) -> None:
        self._chain, self._loss, self._targets = chain, loss, targets
        self._maps = inputs.permute(0, 2, 3, 1).contiguous()
        self._first: Tensor | None = None  # what the first convolution looks at, the same at every inner step

    def gradient_and_value(
        self, params: Params, context: Tree = (), inner_step: int = 0
    ) -> tuple[Params, tuple[Tensor, Metrics]]:
        """The gradient, and what `loss` returns; it depends on no context."""
        here = self._forward(params)
        return self._backward(params, here), here.returned

    def linearize(self, params: Params, context: Tree = (), inner_step: int = 0) -> Linearization:
        """The gradient, and the Hessian's products with vectors."""
        here = self._forward(params, twice=True)
        grads = self._backward(params, here, twice=True)
        return Linearization(grads, lambda vector: (self._tangent(params, here, vector), ()))

    def _forward(self, params: Params, *, twice: bool = False) -> "_Pass":
        maps, layers = self._maps, []
        for index, block in enumerate(self._chain.blocks):
            layer = _Layer(block, maps.shape, params)
            if index or self._first is None:
                layer.seen = _look(layer, maps)
            if index == 0:
                self._first = layer.seen = layer.seen if self._first is None else self._first
            layer.hat = _convolve(layer, (layer.seen, layer.weight))
            maps = layer.norm_relu_pool()
            layers.append(layer)
        features = _features(self._chain, maps)
        with torch.enable_grad():
            leaf = _outputs(self._chain, features, params).requires_grad_()
            returned = self._loss(leaf, self._targets)
            (grad,) = torch.autograd.grad(returned[0], leaf, create_graph=twice, materialize_grads=True)
        value, metrics = returned[0].detach(), {name: metric.detach() for name, metric in returned[1].items()}
        return _Pass(layers, maps.shape, features, leaf, grad, (value, metrics))

    def _backward(self, params: Params, here: "_Pass", *, twice: bool = False) -> Params:
        """The gradient; where it is to be differentiated, `here` keeps what that takes."""
        head, grad = self._chain.head, here.grad.detach()
        grads = {f"{head}.weight": grad.t() @ here.features, f"{head}.bias": grad.sum(0)}
        of_maps = self._features_back(grad @ params[f"{head}.weight"].detach(), here.shape)
        for index, layer in reversed(list(enumerate(here.layers))):
            of_y = layer.norm_relu_pool_back(of_maps, grads, keep=twice)
            grads[f"{layer.block.convolution}.weight"] = _weight_grad(layer, (layer.seen, of_y))
            if index:
                of_maps = _maps_grad(layer, (of_y, layer.weight))
            if not twice:
                layer.hat = layer.seen = None  # type: ignore[assignment]  # not needed again, and most of the memory
        return _like(params, grads)

    def _tangent(self, params: Params, here: "_Pass", vector: Params) -> Params:
        """The Hessian's product with a vector: both passes, differentiated along it."""
        t_maps: Tensor | None = None
        t_layers: list[tuple[Tensor | None, Tensor, Tensor, Tensor]] = []
        for layer in here.layers:
            t_weight = _channels_last(vector[f"{layer.block.convolution}.weight"])
            t_seen = None if t_maps is None else _look(layer, t_maps)
            pairs = [(layer.seen, t_weight)] if t_seen is None else [(layer.seen, t_weight), (t_seen, layer.weight)]
            t_hat = _convolve(layer, *pairs)
            t_maps, slope = layer.norm_relu_pool_tangent(t_hat, vector)
            t_layers.append((t_seen, t_weight, t_hat, slope))
        assert t_maps is not None
        head = self._chain.head
        weight, t_weight = params[f"{head}.weight"].detach(), vector[f"{head}.weight"]
        t_features = _features(self._chain, t_maps)
        t_outputs = torch.addmm(t_features @ weight.t(), here.features, t_weight.t())
        if f"{head}.bias" in vector:
            t_outputs += vector[f"{head}.bias"]
        grad = here.grad.detach()
        t_grad = torch.zeros_like(grad)
        if here.grad.requires_grad:  # the loss of a linear function has no second derivative
            (t_grad,) = torch.autograd.grad(
                here.grad, here.outputs, t_outputs, retain_graph=True, materialize_grads=True
            )
        products = {
            f"{head}.weight": torch.addmm(t_grad.t() @ here.features, grad.t(), t_features),
            f"{head}.bias": t_grad.sum(0),
        }
        t_of_maps = self._features_back(torch.addmm(t_grad @ weight, grad, t_weight), here.shape)
        for index, (layer, (t_seen, t_weight, t_hat, slope)) in reversed(
            list(enumerate(zip(here.layers, t_layers, strict=True)))
        ):
            t_of_y = layer.norm_relu_pool_back_tangent(t_of_maps, t_hat, slope, vector, products)
            pairs = [(layer.seen, t_of_y)] if t_seen is None else [(layer.seen, t_of_y), (t_seen, layer.of_y)]
            products[f"{layer.block.convolution}.weight"] = _weight_grad(layer, *pairs)
            if index:
                t_of_maps = _maps_grad(layer, (t_of_y, layer.weight), (layer.of_y, t_weight))
        return _like(params, products)

    def _features_back(self, grad: Tensor, shape: torch.Size) -> Tensor:
        samples, height, width, channels = shape
        if self._chain.averages:
            return (grad / (height * width)).view(samples, 1, 1, channels).expand(shape).contiguous()
        return grad.view(samples, channels, height, width).permute(0, 2, 3, 1).contiguous()


class _Predict(torch.autograd.Function):
    """The outputs of a chain. Under vmap, whose own way would be torch's slow one, item by item."""

    @staticmethod
    def forward(chain: Chain, params: Params, inputs: Tensor) -> Tensor:
        maps = inputs.permute(0, 2, 3, 1).contiguous()
        for block in chain.blocks:
            layer = _Layer(block, maps.shape, params)
            layer.hat = _convolve(layer, (_look(layer, maps), layer.weight))
            maps = layer.norm_relu_pool()
        return _outputs(chain, _features(chain, maps), params)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, Any, int], chain: Chain, params: Params, inputs: Tensor) -> Any:
        items = inputs.unbind(in_dims[2])
        return torch.stack([predict(chain, params, item) for item in items]), 0


def predict(chain: Chain, params: Params, inputs: Tensor) -> Tensor:
    """The outputs of a chain, without derivatives; `inputs` may be batched by vmap, `params` may not."""
    outputs: Tensor = _Predict.apply(chain, params, inputs)  # type: ignore[no-untyped-call]
    return outputs


class _Pass(NamedTuple):
    """What a forward pass leaves for the backward pass."""

    layers: list["_Layer"]
    shape: torch.Size  # of the last maps
    features: Tensor
    outputs: Tensor
    grad: Tensor  # of the loss in the outputs
    returned: tuple[Tensor, Metrics]


class _Layer:
    """A block at one point: parameters, and what its passes keep. Rows are ``[num_samples * height * width, ...]``."""

    seen: Tensor  # what the convolution looks at: patches, or the maps themselves
    hat: Tensor  # the normalised output of the convolution, rows
    of_out: Tensor  # gradient of the ReLU's output, rows
    of_y: Tensor  # gradient of the convolution's output, rows

    def __init__(self, block: Block, shape: torch.Size, params: Params) -> None:
        self.block, self.shape = block, shape
        self.weight = _channels_last(params[f"{block.convolution}.weight"])
        self.gamma, self.beta = (params[f"{block.norm}.{name}"].detach().numpy() for name in ("weight", "bias"))
        samples, height, width, channels = shape
        height, width = ((side + 2 * block.padding - block.kernel) // block.stride + 1 for side in (height, width))
        self.out_shape = torch.Size((samples, height, width, len(self.weight)))
        if min(height, width) < block.pool or samples * height * width == 1:
            raise RuntimeError(f"maps of {shape[1]}x{shape[2]} leave too little")  # torch has a better word for it
        rows, columns = samples * height * width, block.kernel**2 * channels
        largest = max(rows * len(self.weight), shape.numel())
        self.is_product = rows * columns <= MAX_EXPANSION * largest

    def norm_relu_pool(self) -> Tensor:
        """The maps after the block, from the output of its convolution in `hat`, which becomes what its name says."""
        self.inverse = np.empty_like(self.gamma)
        out = torch.empty_like(self.hat)
        kernels.norm_relu(self.hat.numpy(), self.gamma, self.beta, self.block.eps, self.inverse, out.numpy())
        out = out.view(self.out_shape)
        if self.block.pool == 1:
            return out
        pooled = self._pooled(out)
        self.winners = torch.empty(pooled.shape, dtype=torch.uint8)
        kernels.max_pool(out.numpy(), self.block.pool, pooled.numpy(), self.winners.numpy())
        return pooled

    def norm_relu_pool_back(self, of_maps: Tensor, grads: Params, *, keep: bool) -> Tensor:
        """The gradient of the convolution's output; those of the norm's parameters go to `grads`."""
        of_y = self._unpooled(of_maps).view_as(self.hat)
        if keep:
            self.of_out, self.of_y = of_y.clone(), of_y
        kernels.norm_relu_back(
            of_y.numpy(), self.hat.numpy(), self.gamma, self.beta, self.inverse, *self._of_norm(grads)
        )
        return of_y

    def norm_relu_pool_tangent(self, t_hat: Tensor, vector: Params) -> tuple[Tensor, Any]:
        """Tangent of `norm_relu_pool`, from that of the convolution's output in `t_hat`, and the kernel's `slope`."""
        slope, out = np.empty_like(self.gamma), torch.empty_like(t_hat)
        t_gamma, t_beta = (vector[f"{self.block.norm}.{name}"].numpy() for name in ("weight", "bias"))
        kernels.norm_relu_tangent(
            t_hat.numpy(), self.hat.numpy(), self.gamma, self.beta, self.inverse, t_gamma, t_beta, slope, out.numpy()
        )
        out = out.view(self.out_shape)
        if self.block.pool == 1:
            return out, slope
        pooled = self._pooled(out)
        kernels.max_pool_tangent(out.numpy(), self.block.pool, self.winners.numpy(), pooled.numpy())
        return pooled, slope

    def norm_relu_pool_back_tangent(
        self, t_of_maps: Tensor, t_hat: Tensor, slope: Any, vector: Params, products: Params
    ) -> Tensor:
        """Tangent of `norm_relu_pool_back`; those of the norm's gradients go to `products`."""
        t_of_out = self._unpooled(t_of_maps).view_as(self.hat)
        t_gamma = vector[f"{self.block.norm}.weight"].numpy()
        kernels.norm_relu_back_tangent(
            self.of_out.numpy(), t_of_out.numpy(), self.hat.numpy(), t_hat.numpy(), self.gamma, self.beta,
            self.inverse, t_gamma, slope, *self._of_norm(products),
        )  # fmt: skip
        return t_of_out

    def _of_norm(self, grads: Params) -> list[Any]:
        """Room in `grads` for the norm's two parameters."""
        names = [f"{self.block.norm}.{name}" for name in ("weight", "bias")]
        grads.update({name: torch.from_numpy(np.empty_like(self.gamma)) for name in names})
        return [grads[name].numpy() for name in names]

    def _pooled(self, maps: Tensor) -> Tensor:
        samples, height, width, channels = self.out_shape
        return maps.new_empty(samples, height // self.block.pool, width // self.block.pool, channels)

    def _unpooled(self, of_maps: Tensor) -> Tensor:
        if self.block.pool == 1:
            return of_maps
        out = of_maps.new_empty(self.out_shape)
        kernels.max_pool_back(of_maps.numpy(), self.block.pool, self.winners.numpy(), out.numpy())
        return out


def _features(chain: Chain, maps: Tensor) -> Tensor:
    return maps.mean((1, 2)) if chain.averages else maps.permute(0, 3, 1, 2).flatten(1)


def _outputs(chain: Chain, features: Tensor, params: Params) -> Tensor:
    outputs = features @ params[f"{chain.head}.weight"].detach().t()
    bias = params.get(f"{chain.head}.bias")
    return outputs if bias is None else outputs.add_(bias.detach())


# ------------------------------------------------------------------------------------------------- convolutions
#
# Each of the three is a sum over pairs, as a derivative along a direction has two terms. A bias is not seen here: the
# norm that follows takes it out again.


def _look(layer: _Layer, maps: Tensor) -> Tensor:
    """What a convolution looks at: the patches of the maps, or, where these take too much room, the maps."""
    if not layer.is_product:
        return maps
    block = layer.block
    rows = layer.out_shape.numel() // layer.out_shape[-1]
    seen = maps.new_empty(rows, block.kernel**2 * maps.shape[-1])
    kernels.patches(maps.numpy(), seen.numpy(), block.stride, block.padding, block.kernel)
    return seen


def _convolve(layer: _Layer, *pairs: tuple[Tensor, Tensor]) -> Tensor:
    """The output, rows, from pairs of what is looked at and a weight."""
    if layer.is_product:
        return _sum_of_products((seen, _matrix(weight).t()) for seen, weight in pairs)
    stride, padding = layer.block.stride, layer.block.padding
    return _sum(_rows(F.conv2d(_images(seen), weight, None, stride, padding)) for seen, weight in pairs)


def _weight_grad(layer: _Layer, *pairs: tuple[Tensor, Tensor]) -> Tensor:
    """The gradient of the weight from pairs of what was looked at and the gradient of the output."""
    if layer.is_product:
        matrix = _sum_of_products((of_y.t(), seen) for seen, of_y in pairs)
        outputs, inputs, height, width = layer.weight.shape
        return matrix.view(outputs, height, width, inputs).permute(0, 3, 1, 2)
    return _sum(_library(layer, of_y, _images(seen), layer.weight, of_weight=True) for seen, of_y in pairs)


def _maps_grad(layer: _Layer, *pairs: tuple[Tensor, Tensor]) -> Tensor:
    """The gradient of the maps that went in, from pairs of the gradient of the output and a weight."""
    if layer.is_product:
        of_seen = _sum_of_products((of_y, _matrix(weight)) for of_y, weight in pairs)
        maps = of_seen.new_empty(layer.shape)
        block = layer.block
        kernels.patches_back(of_seen.numpy(), maps.numpy(), block.stride, block.padding, block.kernel)
        return maps
    like = _images(layer.seen)
    return _sum(
        _library(layer, of_y, like, weight, of_weight=False).permute(0, 2, 3, 1).contiguous() for of_y, weight in pairs
    )


def _library(layer: _Layer, of_y: Tensor, images: Tensor, weight: Tensor, *, of_weight: bool) -> Tensor:
    """The gradient of a convolution in its weight, or in its images, from torch."""
    of_images = _images(of_y.view(layer.out_shape))
    stride, padding = [layer.block.stride] * 2, [layer.block.padding] * 2
    wanted = [not of_weight, of_weight, False]
    found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        of_images, images, weight, None, stride, padding, [1, 1], False, [0, 0], 1, wanted
    )
    return found[1 if of_weight else 0]


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


def _channels_last(weight: Tensor) -> Tensor:
    return weight.detach().contiguous(memory_format=torch.channels_last)


def _matrix(weight: Tensor) -> Tensor:
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1)


def _images(maps: Tensor) -> Tensor:
    return maps.permute(0, 3, 1, 2)


def _rows(images: Tensor) -> Tensor:
    return images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])


def _like(params: Params, found: Params) -> Params:
    """In the order of `params`; zero for the biases of convolutions, which the norms take out."""
    return {name: found[name] if name in found else torch.zeros_like(p) for name, p in params.items()}
