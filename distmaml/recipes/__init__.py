"""Complete configurations for known experiments: dataset_algorithm_setting.

A recipe is a function of no arguments; its name on the command line has dashes for underscores. What a recipe does
otherwise than its paper is said in its docstring, what it prints in published.py. All of them differ in this:

- Batch norm takes the statistics of the batch, and its scale and shift adapt like all parameters. The MAML authors'
  code takes them too, has no scale, and does not adapt the shift.
- The head is torch's nn.Linear. The MAML authors draw that of Omniglot from N(0, 1).
- The division of Omniglot's characters, 1100, 100 and 423, is drawn anew; every paper has its own.
- A test query set is 15 images a class with 5 ways and 5 with 20, where it is not said otherwise. MAML's has as many as
  there are shots, hence its wide intervals.
- Accuracy is scored in both batch-norm modes. The figures of MAML, iMAML, CAVIA and MAML++ are transductive, those of
  Reptile and the metric learners inductive.
- Gradients are not clipped entry by entry, as the authors' code of MAML (on mini-ImageNet), MAML++ and CAVIA does.
- Prototypes and queries go through batch norm apart.

An inner rate is on the mean loss. That of a paper whose code sums it over the ways goes through `shared.on_the_mean`.
"""

import math

from distmaml.config import Config, flatten
from distmaml.recipes import glyphs, mini_imagenet, omniglot, pictures, sinusoid  # noqa: F401 (they list themselves)
from distmaml.recipes.shared import RECIPES

__all__ = ["RECIPES", "default_space"]

_BY_GRADIENT = ("maml", "fomaml", "anil")
"""Algorithms with the same options, for which one inner rate does as well: a search may change one for another."""


def default_space(config: Config, *, rates_only: bool = False) -> tuple[str, ...]:
    """What a search tries where nobody says otherwise: what MAML is most sensitive to.

    Fields that the configuration does not have, or that do nothing for its algorithm, are left out.

    Args:
      rates_only: only what may change while a trial runs.
    """
    size, flat = config.outer.meta_batch_size, flatten(config)
    pull = flat.get("regularization", 0.0)
    space = {
        "inner_lr": _around(flat.get("inner_lr"), 0.001, 1, most=2 / pull if pull > 0 else math.inf),
        "outer_lr": _around(config.outer.outer_lr, 0.0001, 0.01),
        "num_inner_steps": f"int:1:{max(5, flat.get('num_inner_steps', 1))}",
        "algorithm": "choice:" + ",".join(_BY_GRADIENT),
        "meta_batch_size": "choice:" + ",".join(str(n) for n in sorted({max(size // 2, 1), size, 2 * size})),
    }
    if config.algorithm not in _BY_GRADIENT:
        del space["algorithm"]
    if flat.get("solver") == "hessian_free":
        del space["inner_lr"]
    if rates_only:
        space = {field: space[field] for field in ("inner_lr", "outer_lr") if field in space}
    return tuple(f"{field}={domain}" for field, domain in space.items() if field in flat)


def _around(rate: float | None, low: float, high: float, *, most: float = math.inf) -> str:
    """The usual range of a rate; for one that lies outside, or at its lower end, a tenth of it to three times as much.

    Reptile's outer rate begins as 1, its inner one is Adam's, and that of a summed loss is large.

    Args:
      most: that it must stay below: that of iMAML's gradient solver, below 2 / lambda.
    """
    if rate is not None and not low < rate <= high:
        low, high = rate / 10, 3 * rate
    return f"log:{low:g}:{min(high, most):g}"
