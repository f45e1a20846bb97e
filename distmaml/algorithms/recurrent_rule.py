"""The update rule of the LSTM meta-learner: a recurrent network with one set of weights, for each parameter by itself.

Its derivative is written by hand: the rule is nearly all of the algorithm's work, and with autodiff the whole takes a
fifth longer.

Ravi, Larochelle (2017), "Optimization as a Model for Few-Shot Learning", https://openreview.net/forum?id=rJY0-Kcll.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

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
    gates: Tensor  # [2, num_params]: forget, input


Pull: TypeAlias = Callable[[Tensor, Memory], tuple[Params, Tensor, Memory]]
"""(gradient of phi, of the memory after a step) -> those of the rule, and of phi and the memory before it, each of the
shape of what it is the gradient of."""


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
    wide = torch.zeros_like(phi).expand(rule["lstm_hidden"].shape[1], -1)
    return Memory(wide, wide, wide.new_zeros(2, *phi.shape))


def step(rule: Params, phi: Tensor, memory: Memory, grads: Tensor, loss: Tensor) -> tuple[Tensor, Memory]:
    """One inner step of all parameters, ``[num_params]``.

    ::

        h = LSTM(preprocessed gradient and loss)
        f = sigmoid(w_f . [h, phi, f before] + b_f),  i = sigmoid(w_i . [h, phi, i before] + b_i)
        phi <- f * phi - i * gradient
    """
    return step_vjp(rule, phi, memory, grads, loss)[0]


def step_vjp(
    rule: Params, phi: Tensor, memory: Memory, grads: Tensor, loss: Tensor
) -> tuple[tuple[Tensor, Memory], Pull]:
    """`step`, and its derivative with `grads` and `loss` as constants.

    In `pull`, of_X is the gradient of X.
    """
    hidden_size = len(memory.hidden)
    slopes = phi.new_tensor([1.0, 1.0, 2.0, 1.0]).repeat_interleave(hidden_size).unsqueeze(-1)
    # The loss is the same for all parameters: with the bias it is one column, before a row of ones. The row of zeros
    # makes 24 of them with a hidden_size of 20: with 23 a product of matrices takes up to 1.6 times as long.
    seen_loss = preprocessed(loss)
    constant = rule["lstm_input"][:, 2:] @ seen_loss + rule["lstm_bias"]
    ones = torch.ones_like(phi)
    seen = torch.cat([preprocessed(grads), torch.stack([ones, torch.zeros_like(phi)]), memory.hidden])
    columns = torch.stack([constant, torch.zeros_like(constant)], -1)
    weight = torch.cat([rule["lstm_input"][:, :2], columns, rule["lstm_hidden"]], -1)
    # All four through a sigmoid, as tanh(x) = 2 sigmoid(2 x) - 1, whose derivative is 4 sigmoid'(2 x).
    units = ((slopes * weight) @ seen).sigmoid_()
    enter, keep, half, show = units.chunk(4)
    candidate = half.mul(2).sub_(1)
    cell = torch.addcmul(keep * memory.cell, enter, candidate)
    squashed = _tanh(cell)
    hidden = show * squashed

    gate_weights = torch.stack([rule["forget_weight"], rule["input_weight"]])
    biases = torch.stack([rule["forget_bias"], rule["input_bias"]]).unsqueeze(-1)
    logits = gate_weights[:, :-2] @ hidden + gate_weights[:, -2:-1] * phi + gate_weights[:, -1:] * memory.gates + biases
    forget, input_ = gates = logits.sigmoid()

    def pull(of_phi: Tensor, of_memory: Memory) -> tuple[Params, Tensor, Memory]:
        of_logits = _through_sigmoid(of_memory.gates + torch.stack([of_phi * phi, -of_phi * grads]), gates)
        of_hidden = torch.addmm(of_memory.hidden, gate_weights[:, :-2].t(), of_logits)
        of_cell = of_memory.cell + _through_tanh(of_hidden * show, squashed)
        of_units = _through_sigmoid(
            torch.cat([of_cell * candidate, of_cell * memory.cell, of_cell * enter, of_hidden * squashed]), units
        )
        of_weight = slopes.square() * (of_units @ seen.t())
        of_constant = of_weight[:, 2]
        own = torch.stack([of_logits @ phi, (of_logits * memory.gates).sum(-1)], -1)
        of_forget, of_enter = torch.cat([of_logits @ hidden.t(), own], -1)
        of_biases = of_logits.sum(-1)
        of_rule = {
            "lstm_input": torch.cat([of_weight[:, :2], torch.outer(of_constant, seen_loss)], -1),
            "lstm_hidden": of_weight[:, 4:], "lstm_bias": of_constant,
            "forget_weight": of_forget, "forget_bias": of_biases[0],
            "input_weight": of_enter, "input_bias": of_biases[1],
        }  # fmt: skip
        of_phi = of_phi * forget + gate_weights[:, -2] @ of_logits
        of_before = (slopes.square() * rule["lstm_hidden"]).t() @ of_units
        return of_rule, of_phi, Memory(of_before, of_cell * keep, of_logits * gate_weights[:, -1:])

    return (forget * phi - input_ * grads, Memory(hidden, cell, gates)), pull


def _tanh(values: Tensor) -> Tensor:
    """By the sigmoid: on a CPU torch's tanh takes several times as long. The error is a rounding of 1 at any size."""
    return values.mul(2).sigmoid_().mul_(2).sub_(1)


def _through_sigmoid(grads: Tensor, values: Tensor) -> Tensor:
    found: Tensor = torch.ops.aten.sigmoid_backward(grads, values)
    return found


def _through_tanh(grads: Tensor, values: Tensor) -> Tensor:
    found: Tensor = torch.ops.aten.tanh_backward(grads, values)
    return found


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
