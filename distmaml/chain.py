"""Which networks are chains: blocks of convolution, batch norm, ReLU and perhaps max-pooling, then a linear head.

Most of few-shot image classification runs on them, and their derivatives are known: `chain_loss.py`.
"""

from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from distmaml.models.conv4 import Conv4

MOST_POOL = 16
"""Side of a pooling's windows whose pixels a byte can count."""


class Block(NamedTuple):
    """A convolution with square kernel, batch norm, ReLU and max-pooling.

    Attributes:
      convolution: name of the layer; its bias, if it has one, is undone by the norm and has no gradient.
      norm: name of the batch norm.
      pool: side of the windows of the max-pooling; 1 is none.
    """

    convolution: str
    kernel: int
    stride: int
    padding: int
    norm: str
    eps: float
    pool: int


class Chain(NamedTuple):
    """A network whose derivatives are known.

    Attributes:
      averages: whether the head gets the mean over space, rather than the flat map.
      head: name of the linear layer at the end.
      parameters: the names of all that it has.
    """

    blocks: tuple[Block, ...]
    averages: bool
    head: str
    parameters: frozenset[str]


def chain_of(model: nn.Module) -> Chain | None:
    """The model as a chain, or None where it is anything else.

    What `forward` does is known of two types alone, `nn.Sequential` and `Conv4`; of those that derive from them it is
    not, nor of one with hooks.
    """
    layers = _layers(model)
    if layers is None or _has_any_global_hook():  # type: ignore[no-untyped-call]
        return None
    if any(_is_altered(module) for module in model.modules()):
        return None
    names = {id(module): name for name, module in model.named_modules()}
    kinds = [_kind(layer) for layer in layers]
    blocks: list[Block] = []
    at = 0
    while kinds[at : at + 3] == ["convolution", "norm", "relu"]:
        convolution, norm = layers[at], layers[at + 1]
        pooled = kinds[at + 3 : at + 4] == ["pool"]
        blocks.append(
            Block(names[id(convolution)], convolution.kernel_size[0], convolution.stride[0], convolution.padding[0],
                  names[id(norm)], norm.eps, layers[at + 3].kernel_size if pooled else 1)
        )  # fmt: skip
        at += 4 if pooled else 3
    averages = kinds[at : at + 2] == ["mean", "flatten"]
    if not blocks or kinds[at:] != [*(["mean"] if averages else []), "flatten", "linear"]:
        return None
    head = names[id(layers[-1])]
    expected = {
        f"{name}.{parameter}"
        for name in (head, *(name for block in blocks for name in (block.convolution, block.norm)))
        for parameter, value in model.get_submodule(name).named_parameters(recurse=False)
    }
    found = list(model.named_parameters(remove_duplicate=False))
    is_whole = len(found) == len(expected) == len({id(parameter) for _, parameter in found})
    return Chain(tuple(blocks), averages, head, frozenset(expected)) if is_whole else None


def _layers(model: nn.Module) -> list[Any] | None:
    """What a model calls, one after the other."""
    if type(model) is nn.Sequential:
        parts = [_layers(module) or [module] for module in model]
        return [layer for part in parts for layer in part]
    if type(model) is Conv4:
        pool = [nn.MaxPool2d(2)] if model.downsample == "pool" else []
        blocks = zip(model.convolutions, model.norms, strict=True)
        body = [layer for convolution, norm in blocks for layer in (convolution, norm, nn.ReLU(), *pool)]
        return [*body, *([] if pool else [nn.AdaptiveAvgPool2d(1)]), nn.Flatten(), model.head]
    return None


def _is_altered(module: nn.Module) -> bool:
    """Whether something else than its type says what calling it does."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def _kind(layer: Any) -> str:
    """What a layer is in a chain; "" for what has no place in one."""
    kind = type(layer)
    if kind is nn.Conv2d:
        square = all(len(set(pair)) == 1 for pair in (layer.kernel_size, layer.stride, layer.padding))
        plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
        return "convolution" if square and plain and not isinstance(layer.padding, str) else ""
    if kind is nn.BatchNorm2d:
        learned = layer.weight is not None and layer.bias is not None
        return "norm" if layer.running_mean is None and learned and layer.eps > 0 else ""
    if kind is nn.MaxPool2d:
        side = layer.kernel_size
        apart = isinstance(side, int) and layer.stride == side and layer.padding == 0 and layer.dilation == 1
        return "pool" if apart and side <= MOST_POOL and not (layer.ceil_mode or layer.return_indices) else ""
    if kind is nn.AdaptiveAvgPool2d:
        return "mean" if layer.output_size in (1, (1, 1)) else ""
    if kind is nn.Flatten:
        return "flatten" if (layer.start_dim, layer.end_dim) == (1, -1) else ""
    return {nn.ReLU: "relu", nn.Linear: "linear"}.get(kind, "")
