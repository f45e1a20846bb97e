"""Which layer of a model CAVIA's context parameters change, so that they have an effect."""

import itertools
from collections.abc import Iterator

from torch import nn

from distmaml.errors import ConfigError
from distmaml.objectives import Objective

_LETS_THROUGH = (
    nn.Identity, nn.modules.dropout._DropoutNd, nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd,
)  # fmt: skip
"""Modules behind which what was done to a channel as a whole is still done to it as a whole."""


def modulated(objective: Objective, wanted: str | None) -> tuple[str, int]:
    """The layer that context parameters change, by its name, and its channels.

    Args:
      wanted: its name; by default the first norm of the model, or, in one without, the first layer.

    Raises:
      ConfigError: no such layer, or one that a norm over samples or positions follows, in a `torch.nn.Sequential` or a
        known chain.
    """
    layers = dict(layers_of(objective))
    name = next(iter(layers), "") if wanted is None else wanted
    if name not in layers:
        raise ConfigError(
            f"modulated_layer={wanted!r} must be a linear layer, a convolution, a batch or instance norm of the "
            f"model: {', '.join(layers) or 'it has none'}."
        )
    norm = _norm_after(objective, name)
    if norm is not None:
        raise ConfigError(
            f"modulated_layer={name!r} is followed by the norm {norm!r}, which takes out again what a context does to "
            f"it. Name {'the norm' if norm in layers else 'a layer that no such norm follows'}."
        )
    return name, layers[name]


def layers_of(objective: Objective) -> list[tuple[str, int]]:
    """Names and channels of all that a context can change; norms first, which take a shift before them out again."""
    norms, others = [], []
    for name, module in objective.model.named_modules():
        if name and isinstance(module, nn.modules.batchnorm._NormBase):
            norms.append((name, module.num_features))
        elif name and isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            others.append((name, module.out_features if isinstance(module, nn.Linear) else module.out_channels))
    return norms + others


def _norm_after(objective: Objective, name: str) -> str | None:
    """The norm with statistics of each channel that follows a layer, where the model shows its order."""
    if objective.chain is not None:
        return next((block.norm for block in objective.chain.blocks if block.convolution == name), None)
    outermost = name
    while outermost and isinstance(objective.model.get_submodule(outermost.rpartition(".")[0]), nn.Sequential):
        outermost = outermost.rpartition(".")[0]
    behind = itertools.dropwhile(
        lambda step: step[0] != name, _in_order(outermost, objective.model.get_submodule(outermost))
    )
    for other, module in itertools.islice(behind, 1, None):
        if not isinstance(module, _LETS_THROUGH):
            return other if isinstance(module, nn.modules.batchnorm._NormBase) else None
    return None


def _in_order(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What a module calls one after the other, as far as that is known: sequentials within sequentials."""
    if not isinstance(module, nn.Sequential):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _in_order(f"{name}.{child_name}".lstrip("."), child)
