"""What the papers print, beside which a recipe's result is to stand.

Figures were read in the papers' own tables, those of MAML++ in part in papers that quote it; of any other that was not,
`remark` says so. One that was not found is left out: None.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Published:
    """One row of a paper's table, and what its comparison with ours hangs on."""

    value: float | None
    """Accuracy in percent, or mean squared error; None where the paper has no such row, or it is not verified."""
    half_width: float | None
    """Of the 95 % interval, as printed; None where none is."""
    num_outer_steps: int
    """Outer steps of the protocol: the paper's, unless `remark` says whose it is."""
    meta_batch_size: int
    """Tasks per outer step, likewise."""
    source: str
    """The paper, and the table where it was noted."""
    url: str
    """Where it is."""
    mode: Literal["transductive", "inductive", "either"]
    """What batch norm saw of the query set when the value was measured: all of it, or no more than one item; either:
    nothing depends on it, or it is not known."""
    remark: str = ""
    """What decides the comparison beside that."""


_MAML = "Finn et al. (2017), table 1", "https://arxiv.org/abs/1703.03400"
_MAML_WAVES = "Finn et al. (2017), table 2", _MAML[1]
_REPTILE = "Nichol et al. (2018)", "https://arxiv.org/abs/1803.02999"
_META_SGD = "Li et al. (2017)", "https://arxiv.org/abs/1707.09835"
_MAML_PLUS_PLUS = "Antoniou et al. (2019)", "https://arxiv.org/abs/1810.09502"
_IMAML = "Rajeswaran et al. (2019)", "https://arxiv.org/abs/1909.04630"
_ANIL = "Raghu et al. (2020)", "https://arxiv.org/abs/1909.09157"
_BOIL = "Oh et al. (2021)", "https://arxiv.org/abs/2008.08882"
_CAVIA = "Zintgraf et al. (2019)", "https://arxiv.org/abs/1810.03642"
_META_CURVATURE = "Park and Oliva (2019)", "https://arxiv.org/abs/1902.03356"
_PROTO_MAML = "Triantafillou et al. (2020)", "https://arxiv.org/abs/1903.03096"
_META_LSTM = "Ravi and Larochelle (2017)", "https://openreview.net/forum?id=rJY0-Kcll"
_PROTOTYPICAL = "Snell et al. (2017)", "https://arxiv.org/abs/1703.05175"
_MATCHING = "Vinyals et al. (2016)", "https://arxiv.org/abs/1606.04080"
_FINE_TUNING = "Chen et al. (2019)", "https://arxiv.org/abs/1904.04232"

_NO_ROW = "The paper has no such row. Steps and tasks are those of Finn et al. (2017)."
_NOT_VERIFIED = "The paper's figure is not verified. Steps and tasks are those of Finn et al. (2017)."
_ENSEMBLE = "An ensemble of the 5 models that are best in validation; ours is one model."
_EQUATIONS = "Ours is the paper's equations, from which the code that was given away departs (see the recipe)."
_MANY_WAYS = (
    "Trained with more ways than tested, one episode a step, until it converged. Steps, and tasks that stand for that "
    "episode, are the recipe's."
)


def _published(
    paper: tuple[str, str],
    value: float | None,
    half_width: float | None = None,
    *,
    steps: int = 60_000,
    tasks: int = 32,
    mode: Literal["transductive", "inductive", "either"] = "either",
    remark: str = "",
) -> Published:
    return Published(value, half_width, steps, tasks, *paper, mode, remark)


def _maml(value: float, half_width: float, *, tasks: int, inner_lr: float, num_ways: int) -> Published:
    remark = (
        "As many query images as shots in the test: its batch norm sees no more, and the interval is wide. Inner rate "
        f"{inner_lr:g} on the loss summed over the ways, {inner_lr * num_ways:g} on its mean."
    )
    return _published(_MAML, value, half_width, tasks=tasks, mode="transductive", remark=remark)


def _maml_plus_plus(value: float, half_width: float | None, *, tasks: int, remark: str = _ENSEMBLE) -> Published:
    return _published(_MAML_PLUS_PLUS, value, half_width, steps=50_000, tasks=tasks, mode="transductive", remark=remark)


def _omniglot_maml_plus_plus(value: float, half_width: float | None) -> Published:
    remark = f"{_ENSEMBLE} 1 query image a class in the test, and no rotations there."
    return _maml_plus_plus(value, half_width, tasks=8, remark=remark)


def _imaml(value: float, half_width: float) -> Published:
    return _published(_IMAML, value, half_width, steps=20_000, mode="transductive", remark=_EQUATIONS)


def _reptile(value: float, half_width: float, transductive: str, *, steps: int) -> Published:
    remark = f"Transductive: {transductive} %."
    return _published(_REPTILE, value, half_width, steps=steps, tasks=5, mode="inductive", remark=remark)


def _by_metric(
    paper: tuple[str, str], value: float, half_width: float | None = None, *, tasks: int, remark: str = _MANY_WAYS
) -> Published:
    return _published(paper, value, half_width, steps=20_000, tasks=tasks, mode="inductive", remark=remark)


PUBLISHED: dict[str, Published] = {
    # ---------------------------------------------------------------------------------------- Omniglot
    "omniglot-maml-5w1s": _maml(98.7, 0.4, tasks=32, inner_lr=0.4, num_ways=5),
    "omniglot-maml-5w5s": _maml(99.9, 0.1, tasks=32, inner_lr=0.4, num_ways=5),
    "omniglot-maml-5w1s-paper": _maml(98.7, 0.4, tasks=32, inner_lr=0.4, num_ways=5),
    "omniglot-maml-5w5s-paper": _maml(99.9, 0.1, tasks=32, inner_lr=0.4, num_ways=5),
    "omniglot-maml-20w1s": _maml(95.8, 0.3, tasks=16, inner_lr=0.1, num_ways=20),
    "omniglot-maml-20w5s": _maml(98.9, 0.2, tasks=16, inner_lr=0.1, num_ways=20),
    "omniglot-fomaml-5w1s": _published(
        _REPTILE, 98.3, 0.5, mode="transductive", remark="Steps and tasks are those of Finn et al. (2017)."
    ),
    "omniglot-anil-5w1s": _published(
        _ANIL, None, remark="The paper has 20 ways alone. Steps and tasks are those of Finn et al. (2017)."
    ),
    "omniglot-anil-20w1s": _published(
        _ANIL, 96.2, 0.5, tasks=16, remark="MAML there: 93.7 +- 0.7. Steps and tasks are those of Finn et al. (2017)."
    ),
    "omniglot-anil-20w5s": _published(
        _ANIL, 98.0, 0.3, tasks=16, remark="MAML there: 96.4 +- 0.1. Steps and tasks are those of Finn et al. (2017)."
    ),
    "omniglot-boil-5w1s": _published(_BOIL, None, remark=_NO_ROW),
    "omniglot-meta-sgd-5w1s": _published(
        _META_SGD, 99.5, remark="Not read in the paper itself. Steps and tasks are those of Finn et al. (2017)."
    ),
    "omniglot-maml-plus-plus-5w1s": _omniglot_maml_plus_plus(99.47, None),
    "omniglot-maml-plus-plus-5w5s": _omniglot_maml_plus_plus(99.93, None),
    "omniglot-maml-plus-plus-20w1s": _omniglot_maml_plus_plus(97.65, 0.05),
    "omniglot-maml-plus-plus-20w5s": _omniglot_maml_plus_plus(99.33, 0.03),
    "omniglot-imaml-5w1s": _imaml(99.16, 0.35),
    "omniglot-imaml-hf-5w1s": _imaml(99.50, 0.26),
    "omniglot-imaml-20w1s": _imaml(94.46, 0.42),
    "omniglot-reptile-5w1s": _reptile(95.39, 0.09, "97.68 +- 0.04", steps=100_000),
    "omniglot-reptile-20w1s": _reptile(88.14, 0.15, "89.43 +- 0.14", steps=200_000),
    "omniglot-cavia-5w1s": _published(_CAVIA, None, remark=_NO_ROW),
    "omniglot-meta-curvature-5w1s": _published(_META_CURVATURE, None, remark=_NOT_VERIFIED),
    "omniglot-proto-maml-5w1s": _published(_PROTO_MAML, None, remark=_NO_ROW),
    "omniglot-meta-lstm-5w1s": _published(
        _META_LSTM, None, steps=75_000, tasks=1,
        remark="The paper has no such row. Steps and tasks are those of its mini-ImageNet.",
    ),
    "omniglot-prototypical-networks-5w1s": _by_metric(_PROTOTYPICAL, 98.8, tasks=12),
    "omniglot-prototypical-networks-5w5s": _by_metric(_PROTOTYPICAL, 99.7, tasks=12),
    "omniglot-prototypical-networks-20w1s": _by_metric(_PROTOTYPICAL, 96.0, tasks=3),
    "omniglot-prototypical-networks-20w5s": _by_metric(_PROTOTYPICAL, 98.9, tasks=3),
    "omniglot-matching-networks-5w1s": _by_metric(
        _MATCHING, 98.1, tasks=12, remark="Steps and tasks are the recipe's."
    ),
    "omniglot-fine-tuning-5w1s": _published(_FINE_TUNING, None, remark=_NO_ROW),
    # ----------------------------------------------------------------------------------- mini-ImageNet
    "mini-imagenet-maml-5w1s": _maml(48.70, 1.84, tasks=4, inner_lr=0.01, num_ways=5),
    "mini-imagenet-maml-5w5s": _maml(63.11, 0.92, tasks=2, inner_lr=0.01, num_ways=5),
    "mini-imagenet-fomaml-5w1s": _maml(48.07, 1.75, tasks=4, inner_lr=0.01, num_ways=5),
    "mini-imagenet-anil-5w1s": _published(
        _ANIL, 46.7, 0.4, tasks=4, remark="Steps and tasks are those of Finn et al. (2017)."
    ),
    "mini-imagenet-boil-5w1s": _published(
        _BOIL, 49.61, 0.16, steps=30_000, tasks=4, remark="64 filters. Steps and tasks are those of the authors' code."
    ),
    "mini-imagenet-reptile-5w1s": _reptile(47.07, 0.26, "49.97 +- 0.32", steps=100_000),
    "mini-imagenet-meta-sgd-5w1s": _published(
        _META_SGD, 50.47, 1.87, tasks=4, remark="Steps and tasks are those of Finn et al. (2017)."
    ),
    "mini-imagenet-maml-plus-plus-5w1s": _maml_plus_plus(52.15, 0.26, tasks=2),
    "mini-imagenet-maml-plus-plus-5w5s": _maml_plus_plus(68.32, 0.44, tasks=2),
    "mini-imagenet-imaml-5w1s": _published(
        _IMAML, 49.30, 1.88, tasks=4, mode="transductive",
        remark="Hessian-free; by gradient descent it is not verified. Steps and tasks are those of Finn et al. (2017).",
    ),
    "mini-imagenet-cavia-5w1s": _published(
        _CAVIA, 47.24, 0.65, tasks=4, mode="transductive",
        remark="32 filters; with 512 of them 51.82 +- 0.65. Steps and tasks are those of Finn et al. (2017).",
    ),
    "mini-imagenet-meta-curvature-5w1s": _published(_META_CURVATURE, None, tasks=4, remark=_NOT_VERIFIED),
    "mini-imagenet-proto-maml-5w1s": _published(_PROTO_MAML, None, tasks=4, remark=_NO_ROW),
    "mini-imagenet-meta-lstm-5w1s": _published(
        _META_LSTM, 43.44, 0.77, steps=75_000, tasks=1, remark="Steps and tasks are those of the authors' code."
    ),
    "mini-imagenet-prototypical-networks-5w1s": _by_metric(_PROTOTYPICAL, 49.42, 0.78, tasks=4),
    "mini-imagenet-prototypical-networks-5w5s": _by_metric(_PROTOTYPICAL, 68.20, 0.66, tasks=4),
    "mini-imagenet-matching-networks-5w1s": _by_metric(
        _META_LSTM, 43.40, 0.78, tasks=4, remark="Without full-context embeddings. Steps and tasks are the recipe's."
    ),
    "mini-imagenet-fine-tuning-5w1s": _published(
        _META_LSTM, 28.86, 0.54, tasks=4,
        remark="The whole network is tuned there. Steps and tasks are those of Finn et al. (2017).",
    ),
    # ---------------------------------------------------------------------------------------- sinusoid
    "sinusoid-maml-5s": _published(
        _MAML_WAVES, 0.35, steps=70_000, tasks=25,
        remark="After 10 inner steps; 0.67 after 1, and 0.38 after 5. Of a model trained with 10 points, ours with 5.",
    ),
    "sinusoid-maml-10s": _published(
        _MAML_WAVES, None, steps=70_000, tasks=25, remark="The paper has a figure, no number."
    ),
    "sinusoid-meta-sgd-5s": _published(_META_SGD, None, steps=70_000, tasks=25, remark=_NOT_VERIFIED),
    "sinusoid-cavia-10s": _published(
        _CAVIA, None, steps=50_000, tasks=25, remark="The paper's figure is not verified."
    ),
    "sinusoid-cavia-5s": _published(
        _CAVIA, None, steps=50_000, tasks=25, remark="The paper has no such row. Steps and tasks are those of 10 shots."
    ),
    "sinusoid-reptile-10s": _published(
        _REPTILE, None, steps=30_000, tasks=25, remark="The paper has other waves. Steps and tasks are the recipe's."
    ),
    "sinusoid-imaml-5s": _published(
        _IMAML, None, steps=20_000, tasks=25, remark="The paper has no such row. Steps and tasks are the recipe's."
    ),
}  # fmt: skip
"""Recipe -> what its paper prints. Recipes of data that no paper has are not among them."""
