"""The exact derivatives, first and second, of the loss of a chain on a CPU, by hand.

Torch's autograd computes them too, and is the reference of this file, but on the five images of a support set it spends
most of its time between the operators, and its second derivative of a batch norm is twenty passes over the data. Here a
gradient is a forward and a backward pass, and the Hessian-vector product that `inner.pull_back` asks for is the
derivative of both along a direction (Pearlmutter, 1994, "Fast Exact Multiplication by the Hessian",
https://doi.org/10.1162/neco.1994.6.1.147), with the convolutions of `convolution.py` and the rest fused into the loops
of `kernels.py`.
`predict` is the forward pass alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distmaml import kernels
from distmaml.chain import Block, Chain
from distmaml.convolution import Convolution, channels_last
from distmaml.inner import Linearization, Metrics, Params
from distmaml.trees import Tree


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
                layer.seen = layer.convolution.look(maps)
            if index == 0:
                self._first = layer.seen = layer.seen if self._first is None else self._first
            layer.hat = layer.convolution.output((layer.seen, layer.weight))
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
            grads[f"{layer.block.convolution}.weight"] = layer.convolution.weight_grad((layer.seen, of_y))
            if index:
                of_maps = layer.convolution.maps_grad((of_y, layer.weight))
            if not twice:
                layer.hat = layer.seen = None  # type: ignore[assignment]  # not needed again, and most of the memory
        return _like(params, grads)

    def _tangent(self, params: Params, here: "_Pass", vector: Params) -> Params:
        """The Hessian's product with a vector: both passes, differentiated along it."""
        t_maps: Tensor | None = None
        t_layers: list[tuple[Tensor | None, Tensor, Tensor, Tensor]] = []
        for layer in here.layers:
            t_weight = channels_last(vector[f"{layer.block.convolution}.weight"])
            t_seen = None if t_maps is None else layer.convolution.look(t_maps)
            pairs = [(layer.seen, t_weight)] if t_seen is None else [(layer.seen, t_weight), (t_seen, layer.weight)]
            t_hat = layer.convolution.output(*pairs)
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
            products[f"{layer.block.convolution}.weight"] = layer.convolution.weight_grad(*pairs)
            if index:
                t_of_maps = layer.convolution.maps_grad((t_of_y, layer.weight), (layer.of_y, t_weight))
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
            layer.hat = layer.convolution.output((layer.convolution.look(maps), layer.weight))
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
        self.block = block
        self.weight = channels_last(params[f"{block.convolution}.weight"])
        self.gamma, self.beta = (params[f"{block.norm}.{name}"].detach().numpy() for name in ("weight", "bias"))
        self.convolution = Convolution(block, shape, self.weight)
        samples, height, width, _ = self.convolution.out_shape
        if min(height, width) < block.pool or samples * height * width == 1:
            raise RuntimeError(f"maps of {shape[1]}x{shape[2]} leave too little")  # torch has a better word for it

    def norm_relu_pool(self) -> Tensor:
        """The maps after the block, from the output of its convolution in `hat`, which becomes what its name says."""
        self.inverse = np.empty_like(self.gamma)
        out = torch.empty_like(self.hat)
        kernels.norm_relu(self.hat.numpy(), self.gamma, self.beta, self.block.eps, self.inverse, out.numpy())
        out = out.view(self.convolution.out_shape)
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
        out = out.view(self.convolution.out_shape)
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
        samples, height, width, channels = self.convolution.out_shape
        return maps.new_empty(samples, height // self.block.pool, width // self.block.pool, channels)

    def _unpooled(self, of_maps: Tensor) -> Tensor:
        if self.block.pool == 1:
            return of_maps
        out = of_maps.new_empty(self.convolution.out_shape)
        kernels.max_pool_back(of_maps.numpy(), self.block.pool, self.winners.numpy(), out.numpy())
        return out


def _features(chain: Chain, maps: Tensor) -> Tensor:
    return maps.mean((1, 2)) if chain.averages else maps.permute(0, 3, 1, 2).flatten(1)


def _outputs(chain: Chain, features: Tensor, params: Params) -> Tensor:
    outputs = features @ params[f"{chain.head}.weight"].detach().t()
    bias = params.get(f"{chain.head}.bias")
    return outputs if bias is None else outputs.add_(bias.detach())


def _like(params: Params, found: Params) -> Params:
    """In the order of `params`; zero for the biases of convolutions, which the norms take out."""
    return {name: found[name] if name in found else torch.zeros_like(p) for name, p in params.items()}
