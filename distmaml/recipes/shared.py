"""What the recipes of several data sets share, and the list of all."""

from collections.abc import Callable

from distmaml.config import Config, Outer
from distmaml.options import CaviaOptions, ReptileOptions

RECIPES: dict[str, Callable[[], Config]] = {}
"""Name on the command line -> recipe, in the order in which the files of this package are read."""


def recipe(function: Callable[[], Config]) -> Callable[[], Config]:
    """Lists a recipe."""
    RECIPES[function.__name__.replace("_", "-")] = function
    return function


def on_the_mean(summed: float, num_ways: int) -> float:
    """The inner rate for the mean loss that steps as far as a paper's for the loss summed over ways (cbfinn/maml)."""
    return num_ways * summed


def reptile_options(inner_lr: float, num_inner_steps: int, inner_batch_size: int) -> ReptileOptions:
    """The paper's inner loop: Adam without momentum, on mini-batches."""
    return ReptileOptions(inner_lr, num_inner_steps, inner_batch_size=inner_batch_size, inner_optimizer="adam")


def reptile_outer(num_outer_steps: int) -> Outer:
    """The step size falls from 1 to 0; all 5 tasks are one piece, as a second one of a single task would be a waste."""
    return Outer(
        num_outer_steps, meta_batch_size=5, outer_lr=1.0, optimizer="sgd", schedule="linear", final_lr_fraction=0.0,
        reduction_chunk=5,
    )  # fmt: skip


def cavia_on_images() -> CaviaOptions:
    """The paper's for mini-ImageNet: FiLM of the third layer, behind its batch norm."""
    return CaviaOptions(1.0, 2, num_context=100, modulated_layer="norms.2", modulation="scale_shift")


def meta_lstm_outer() -> Outer:
    """The paper's: one task a step, gradients clipped."""
    return Outer(num_outer_steps=75_000, meta_batch_size=1, clip_norm=0.25, reduction_chunk=1)
