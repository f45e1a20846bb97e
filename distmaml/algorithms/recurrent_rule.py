"""The update rule of the LSTM meta-learner: a recurrent network with one set of weights, for each parameter by itself.

Ravi, Larochelle (2017), "Optimization as a Model for Few-Shot Learning", https://openreview.net/forum?id=rJY0-Kcll.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from distmaml.algorithms.passes import uniform
from distmaml.inner import Params

P = 10.0
"""That of the preprocessing of gradients and losses (Andrychowicz et al., 2016)."""


class Memory(NamedTuple):
    """What the rule remembers of each parameter: the state of the LSTM, and the gates of the step before.

    Parameters lie last: torch goes over long rows nearly twice as fast as over rows of hidden_size.
    """

    hidden: Tensor  # [hidden_size, num_params]
    cell: Tensor  # [hidden_size, num_params]
    forget: Tensor  # [num_params]
    input: Tensor  # [num_params]


def first_rule(hidden_size: int, like: Tensor, generator: torch.Generator) -> Params:
    """The weights of the rule before training; its forget gate is near 1, its input gate near 0.01."""

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return uniform(low, high, shape, like, generator)

    bound = hidden_size**-0.5
    return {
        "lstm_input": draw(-bound, bound, 4 * hidden_size, 4),
        "lstm_hidden": draw(-bound, bound, 4 * hidden_size, hidden_size),
        "lstm_bias": draw(-bound, bound, 4 * hidden_size),
        "forget_weight": draw(-0.01, 0.01, hidden_size + 2),
        "forget_bias": draw(4, 6),
        "input_weight": draw(-0.01, 0.01, hidden_size + 2),
        "input_bias": draw(-5, -4),
    }


def blank(rule: Params, phi: Tensor) -> Memory:
    """The memory before the first step, of parameters ``[num_params]``."""
    zeros = torch.zeros_like(phi)
    wide = zeros.expand(rule["lstm_hidden"].shape[1], -1)
    return Memory(wide, wide, zeros, zeros)


def step(rule: Params, phi: Tensor, memory: Memory, grads: Tensor, loss: Tensor) -> tuple[Tensor, Memory]:
    """One inner step of all parameters, ``[num_params]``.

    ::

        h = LSTM(preprocessed gradient and loss)
        f = sigmoid(w_f . [h, phi, f before] + b_f),  i = sigmoid(w_i . [h, phi, i before] + b_i)
        phi <- f * phi - i * gradient
    """
    of_grads, of_loss = rule["lstm_input"].chunk(2, -1)
    of_both = torch.cat([of_grads, rule["lstm_hidden"]], -1) @ torch.cat([preprocessed(grads), memory.hidden])
    of_all = rule["lstm_bias"] + of_loss @ preprocessed(loss)  # the loss is the same for all parameters
    enter, keep, candidate, show = (of_both + of_all.unsqueeze(-1)).chunk(4)
    cell = keep.sigmoid() * memory.cell + enter.sigmoid() * candidate.tanh()
    hidden = show.sigmoid() * cell.tanh()

    def gate(name: str, before: Tensor) -> Tensor:
        weight = rule[f"{name}_weight"]
        logits: Tensor = weight[:-2] @ hidden + weight[-2] * phi + weight[-1] * before + rule[f"{name}_bias"]
        return logits.sigmoid()

    forget, input_ = gate("forget", memory.forget), gate("input", memory.input)
    return forget * phi - input_ * grads, Memory(hidden, cell, forget, input_)


def preprocessed(values: Tensor) -> Tensor:
    """Magnitude and sign of numbers of any size, ``[2, *values]`` (Ravi and Larochelle, 2017, section 3.4).

    ::

        (log|x| / p, sign(x))  where |x| >= e^-p,  else (-1, e^p x)
    """
    magnitude = values.abs()
    large = magnitude >= math.exp(-P)
    log = magnitude.clamp_min(torch.finfo(values.dtype).tiny).log() / P
    ones = torch.ones_like(values)
    return torch.stack([torch.where(large, log, -ones), torch.where(large, values.sign(), values * math.exp(P))])
