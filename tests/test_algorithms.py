"""Each algorithm's gradient is that of its paper's equation, for every meta-parameter, on both engines.

What is compared with is written out in `oracles.py` with torch.autograd alone. Everything is in float64.
"""

import copy
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from distmaml.algorithms import Algorithm, Stateful, passes
from distmaml.algorithms.anil import anil
from distmaml.algorithms.boil import boil
from distmaml.algorithms.cavia import CaviaParams, cavia
from distmaml.algorithms.fine_tuning import fine_tuning
from distmaml.algorithms.imaml import imaml
from distmaml.algorithms.maml import fomaml, maml
from distmaml.algorithms.maml_plus_plus import loss_weights, maml_plus_plus
from distmaml.algorithms.meta_curvature import meta_curvature, transformed
from distmaml.algorithms.meta_lstm import MetaLstmParams, meta_lstm
from distmaml.algorithms.meta_sgd import meta_sgd
from distmaml.algorithms.metric import matching_networks, prototypical_networks
from distmaml.algorithms.proto_maml import proto_maml
from distmaml.algorithms.recurrent_rule import preprocessed
from distmaml.algorithms.reptile import Moments, mini_batches, reptile
from distmaml.chain import Chain
from distmaml.chain_loss import ChainLoss
from distmaml.config import Outer
from distmaml.engine import warn_once
from distmaml.episodes import Batch, Episode, fold_in
from distmaml.errors import ConfigError
from distmaml.inner import Params
from distmaml.objectives import Objective, classification, initial_params, regression
from distmaml.outer import chunk_sum, init_outer, meta_gradient, outer_step
from distmaml.scoring import predict_one_by_one
from distmaml.trees import tree_index, tree_leaves, tree_map
from tests import oracles
from tests.modules import make

WAYS, CLASSES = 4, 9
INNER_LR, STEPS = 0.2, 3
INNER: dict[str, Any] = {"inner_lr": INNER_LR, "num_inner_steps": STEPS}
ORACLE: dict[str, Any] = {"inner_lr": INNER_LR, "num_steps": STEPS}

MODELS = ("mlp", "batch norm", "conv4")
UNDONE = {"mlp": (), "batch norm": ("0.bias",), "conv4": tuple(f"convolutions.{i}.bias" for i in range(4))}
"""Parameters without an effect: a batch norm takes out the bias of the convolution before it."""


class Setup(NamedTuple):
    """A model with its tasks: 8 support samples that show every class, 12 queries."""

    model: nn.Module
    target: Objective
    theta: Params
    tasks: Episode

    @property
    def head(self) -> str:
        return self.target.head + "."


def setup(name: str, *, num_tasks: int = 3, seed: int = 0) -> Setup:
    case, tasks, _ = make(name, num_tasks=num_tasks, seed=seed)
    for norm in (layer for layer in case.model.modules() if isinstance(layer, nn.BatchNorm2d)):
        nn.init.normal_(norm.weight, 1.0, 0.3)
        nn.init.normal_(norm.bias, 0.0, 0.3)
    labels = [torch.arange(WAYS).repeat(size // WAYS) for size in (8, 12)]
    support, query = (
        batch._replace(targets=torch.stack([own[torch.randperm(len(own))] for _ in range(num_tasks)]))
        for batch, own in zip(tasks[:2], labels, strict=True)
    )
    classes = torch.stack([torch.randperm(CLASSES)[:WAYS] for _ in range(num_tasks)])
    return Setup(
        case.model,
        classification(case.model),
        initial_params(case.model),
        Episode(support, query, tasks.key, classes),
    )


def begun(algorithm: Algorithm, theta: Params) -> Any:
    """Meta-parameters at which nothing is alike by chance: those of the start, and noise."""
    torch.manual_seed(1)
    meta = algorithm.init(theta, torch.Generator().manual_seed(0))
    return tree_map(lambda leaf: leaf + 0.05 * torch.randn_like(leaf), meta)


def mean_gradient(algorithm: Algorithm, meta: Any, tasks: Episode, step: int = 0, *, vectorize: bool) -> Any:
    """The gradient that `meta_gradient` returns, on an engine of one's choice."""
    total, _ = chunk_sum(algorithm, meta, tasks, step, vectorize=vectorize)
    return tree_map(lambda leaf: leaf / len(tasks.support.inputs), total)


def check_gradient(
    algorithm: Algorithm, of: Setup, value: Callable[[Any, Episode], Tensor], *, name: str, vectorize: bool,
    step: int = 0,
) -> None:  # fmt: skip
    """The gradient is that of a function of the meta-parameters and the task, and no leaf of it is zero by mistake."""
    meta = begun(algorithm, of.theta)
    expected = oracles.mean_gradient(value, meta, of.tasks)
    assert all(leaf.endswith(UNDONE[name]) or ".".join(leaf.split(".")[:-1]).endswith(UNDONE[name])
               for leaf in oracles.vanishing(expected)), oracles.vanishing(expected)  # fmt: skip
    errors = oracles.leaf_errors(mean_gradient(algorithm, meta, of.tasks, step, vectorize=vectorize), expected)
    assert max(errors.values()) < 1e-9, errors


engines = pytest.mark.parametrize("vectorize", [True, False], ids=["side by side", "one by one"])
models = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def _no_engine_steps_down(caplog: pytest.LogCaptureFixture) -> Any:
    """Else both engines would be one and the same."""
    warn_once.cache_clear()
    yield
    assert not caplog.get_records("call")


# --------------------------------------------------------------------- exact gradients, against autograd


def _of_mlp(model: nn.Module, meta: CaviaParams, context: Tensor, inputs: Tensor) -> Tensor:
    """The context as further inputs of the first layer, as in section 3.2 of the paper."""
    first: Any = model[0]  # type: ignore[index]
    wider = nn.Linear(first.in_features + len(context), first.out_features, dtype=torch.float64)
    weight = torch.cat([meta.params["0.weight"], meta.modulation["weight"]], 1)
    further = torch.cat([inputs, context.expand(len(inputs), -1)], 1)
    hidden: Tensor = functional_call(wider, {"weight": weight, "bias": meta.params["0.bias"]}, further).tanh()
    return hidden @ meta.params["2.weight"].t() + meta.params["2.bias"]


def _shifted(layer: str, model: nn.Module, meta: CaviaParams, context: Tensor, inputs: Tensor) -> Tensor:
    shift = meta.modulation["weight"] @ context
    return oracles.walk(model, meta.params, inputs, {layer: lambda out: out + shift[:, None, None]})[0]


def _film(layer: str, model: nn.Module, meta: CaviaParams, context: Tensor, inputs: Tensor) -> Tensor:
    """Perez et al. (2018): a scale and a shift for each channel, from a linear layer; the scale about 1."""
    scale, shift = F.linear(context, meta.modulation["weight"], meta.modulation["bias"]).chunk(2)

    def film(out: Tensor) -> Tensor:
        apart = [1, -1, *[1] * (out.ndim - 2)]
        return (1 + scale.view(apart)) * out + shift.view(apart)

    return oracles.walk(model, meta.params, inputs, {layer: film})[0]


NORM = {"batch norm": "1", "conv4": "norms.1"}


def _cavia(of: Setup, name: str, modulation: Any) -> tuple[Algorithm, Callable[[Any, Episode], Tensor]]:
    layer = NORM.get(name, "0")
    algorithm = cavia(of.target, **INNER, num_context=3, modulated_layer=layer, modulation=modulation)
    shift = _of_mlp if name == "mlp" else partial(_shifted, layer)
    predict: Any = partial(shift if modulation == "shift" else partial(_film, layer), of.model)
    return algorithm, partial(oracles.cavia, predict, **ORACLE)


def _by_layer(of: Setup, *, head: bool) -> Callable[[Any, Episode], Tensor]:
    """MAML whose inner loop moves the head alone, or all but the head."""
    adapts: Callable[[str], bool] = lambda parameter: parameter.startswith(of.head) == head  # noqa: E731
    return lambda theta, task: oracles.query_loss(of.model, theta, task, F.cross_entropy, adapts=adapts, **ORACLE)


def _maml(of: Setup, *, create_graph: bool = True) -> Callable[[Any, Episode], Tensor]:
    options = {**ORACLE, "create_graph": create_graph}
    return lambda theta, task: oracles.query_loss(of.model, theta, task, F.cross_entropy, **options)


PAPERS: dict[str, Callable[[Setup, str], tuple[Algorithm, Callable[[Any, Episode], Tensor]]]] = {
    "maml": lambda of, name: (maml(of.target, **INNER), _maml(of)),
    "fomaml": lambda of, name: (fomaml(of.target, **INNER), _maml(of, create_graph=False)),
    "anil": lambda of, name: (anil(of.target, **INNER), _by_layer(of, head=True)),
    "boil": lambda of, name: (boil(of.target, **INNER), _by_layer(of, head=False)),
    "meta_sgd": lambda of, name: (
        meta_sgd(of.target, **INNER), partial(oracles.meta_sgd, of.model, num_steps=STEPS)
    ),
    "meta_curvature": lambda of, name: (
        meta_curvature(of.target, **INNER), partial(oracles.meta_curvature, of.model, **ORACLE)
    ),
    "cavia, shift": lambda of, name: _cavia(of, name, "shift"),
    "cavia, scale_shift": lambda of, name: _cavia(of, name, "scale_shift"),
    "proto_maml": lambda of, name: (
        proto_maml(of.target, **INNER), partial(oracles.proto_maml, of.model, head=of.target.head, **ORACLE)
    ),
    "meta_lstm": lambda of, name: (
        meta_lstm(of.target, num_inner_steps=STEPS, hidden_size=5),
        partial(oracles.meta_lstm, of.model, num_steps=STEPS),
    ),
    "prototypical_networks": lambda of, name: (
        prototypical_networks(of.target), partial(oracles.prototypical_networks, of.model, num_ways=WAYS)
    ),
    "matching_networks": lambda of, name: (
        matching_networks(of.target), partial(oracles.matching_networks, of.model, num_ways=WAYS)
    ),
    "fine_tuning": lambda of, name: (
        fine_tuning(of.target, **INNER, num_classes=CLASSES), partial(oracles.fine_tuning, of.model)
    ),
}  # fmt: skip
"""Each algorithm, and what its paper differentiates; of fomaml and meta_lstm with constant inner gradients."""


@engines
@models
@pytest.mark.parametrize("paper", PAPERS)
def test_the_gradient_is_that_of_the_papers_equation(paper: str, name: str, vectorize: bool) -> None:
    of = setup(name)
    algorithm, value = PAPERS[paper](of, name)
    check_gradient(algorithm, of, value, name=name, vectorize=vectorize)


SWITCHES: dict[str, dict[str, Any]] = {
    "all off": {},
    "multi_step_loss": {"multi_step_loss": True},
    "learned_rates": {"learned_rates": True},
    "per_step_biases": {"per_step_biases": True},
    "per_step_statistics": {"per_step_statistics": True},
    "first_order_steps": {"first_order_steps": 1000},
    "all on": {
        "multi_step_loss": True, "learned_rates": True, "per_step_biases": True, "per_step_statistics": True,
        "first_order_steps": 2,
    },
}  # fmt: skip
OFF: dict[str, Any] = {
    "multi_step_loss": False, "annealing_steps": 10, "learned_rates": False, "per_step_biases": False,
}  # fmt: skip


def weights_of(step: int, *, multi_step_loss: bool = False) -> list[float]:
    """Those of three inner steps that are annealed over 10 outer steps, by hand."""
    by_hand = {0: [1 / 3, 1 / 3, 1 / 3], 4: [0.2, 0.2, 0.6], 10: [0.0, 0.0, 1.0], 700: [0.0, 0.0, 1.0]}
    return by_hand[step] if multi_step_loss else [0.0, 0.0, 1.0]


def check_maml_plus_plus(name: str, switches: dict[str, Any], step: int, *, vectorize: bool) -> None:
    of = setup(name)
    algorithm = maml_plus_plus(of.target, **INNER, **{**OFF, **switches})
    weights = weights_of(step, multi_step_loss="multi_step_loss" in switches)
    value = partial(
        oracles.maml_plus_plus, of.model, weights=weights, inner_lr=INNER_LR,
        detach=step < switches.get("first_order_steps", 0),
    )  # fmt: skip
    if "per_step_statistics" in switches:
        whole = algorithm
        state = begun(whole, of.theta).state

        def meta_grad(learned: Any, task: Episode, step: int) -> Any:
            grads, metrics = whole.meta_grad(Stateful(learned, state), task, step)
            return grads.learned, metrics

        algorithm = whole._replace(
            init=lambda params, generator: whole.init(params, generator).learned, meta_grad=meta_grad
        )
    check_gradient(algorithm, of, value, name=name, vectorize=vectorize, step=step)


@engines
@pytest.mark.parametrize("name", ["batch norm", "conv4"])
@pytest.mark.parametrize("switches", SWITCHES)
def test_maml_plus_plus_is_exact_with_each_switch_alone_and_with_all(switches: str, name: str, vectorize: bool) -> None:
    for step in (0, 4, 10) if "multi_step_loss" in SWITCHES[switches] else (0,):
        check_maml_plus_plus(name, SWITCHES[switches], step, vectorize=vectorize)


@engines
def test_maml_plus_plus_is_exact_without_batch_norms_long_after_the_annealing(vectorize: bool) -> None:
    for step in (4, 700):
        check_maml_plus_plus("mlp", {"multi_step_loss": True, "learned_rates": True}, step, vectorize=vectorize)


EXACT = [name for name in PAPERS if name not in ("fomaml", "meta_lstm", "fine_tuning")]


@pytest.mark.parametrize("paper", EXACT)
def test_the_gradient_is_the_slope_of_the_loss_after_adaptation_with_batch_norm(paper: str) -> None:
    """Without it: test_tables.py."""
    of = setup("batch norm", num_tasks=2)
    algorithm, _ = PAPERS[paper](of, "batch norm")

    def loss(meta: Any) -> Tensor:
        losses = []
        for task in oracles.each(of.tasks):
            outputs = algorithm.predict(meta, algorithm.adapt(meta, task.support)[-1], task.query.inputs)
            losses.append(F.cross_entropy(outputs, task.query.targets))
        return torch.stack(losses).mean()

    meta = begun(algorithm, of.theta)
    oracles.check_slope(mean_gradient(algorithm, meta, of.tasks, vectorize=True), meta, loss)


@pytest.mark.parametrize("name", ["mlp", "batch norm"])
def test_the_gradient_of_maml_plus_plus_is_the_slope_of_the_weighted_losses(name: str) -> None:
    of = setup(name, num_tasks=2)
    algorithm = maml_plus_plus(of.target, **INNER, annealing_steps=10, per_step_biases=name != "mlp")

    def loss(meta: Any) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for task in oracles.each(of.tasks):
            for weight, state in zip((0.2, 0.2, 0.6), algorithm.adapt(meta, task.support)[1:], strict=True):
                outputs = algorithm.predict(meta, state, task.query.inputs)
                total += weight / 2 * F.cross_entropy(outputs, task.query.targets)
        return total

    meta = begun(algorithm, of.theta)
    oracles.check_slope(mean_gradient(algorithm, meta, of.tasks, step=4, vectorize=True), meta, loss)


@pytest.mark.parametrize("paper", [*EXACT, "fine_tuning", "maml_plus_plus"])
def test_random_masks_are_the_same_wherever_a_pass_is_done_again(paper: str) -> None:
    """Else the gradient would not be the slope of the loss that training logs."""
    of = setup("dropout", num_tasks=2)
    if paper == "maml_plus_plus":
        algorithm = maml_plus_plus(of.target, **INNER, multi_step_loss=False, per_step_biases=False)
    else:
        algorithm, _ = PAPERS[paper](of, "mlp")
    meta = begun(algorithm, of.theta)
    assert logged_loss(algorithm, of.tasks, meta) != logged_loss(algorithm, of.tasks._replace(key=None), meta)
    grads = mean_gradient(algorithm, meta, of.tasks, vectorize=False)
    oracles.check_slope(grads, meta, partial(logged_loss, algorithm, of.tasks))


def logged_loss(algorithm: Algorithm, tasks: Episode, meta: Any) -> Tensor:
    _, summed = chunk_sum(algorithm, meta, tasks, 0, vectorize=False)
    return summed["query_loss"] / len(tasks.support.inputs)


WITH_ALL_PARAMETERS: dict[str, Callable[..., Algorithm]] = {
    "maml": maml, "fomaml": fomaml, "boil": boil, "reptile": reptile, "meta_sgd": meta_sgd,
    "maml_plus_plus": maml_plus_plus, "imaml": imaml, "meta_curvature": meta_curvature, "proto_maml": proto_maml,
    "meta_lstm": lambda target, inner_lr, num_inner_steps: meta_lstm(target, num_inner_steps=num_inner_steps),
}  # fmt: skip


@pytest.mark.parametrize("name", WITH_ALL_PARAMETERS)
def test_derivatives_by_hand_serve_whoever_calls_the_model_as_it_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the comparisons on conv4, one by one, are about them."""
    sizes = set()

    def counted(chain: Chain, loss: Any, inputs: Tensor, targets: Tensor) -> ChainLoss:
        sizes.add(len(inputs))
        return ChainLoss(chain, loss, inputs, targets)

    monkeypatch.setattr(passes, "ChainLoss", counted)
    of = setup("conv4", num_tasks=1)
    algorithm = WITH_ALL_PARAMETERS[name](of.target, **INNER)
    mean_gradient(algorithm, begun(algorithm, of.theta), of.tasks, vectorize=False)
    assert sizes == ({20} if name == "reptile" else {8, 12})  # support and query; Reptile has them in one pool


# ---------------------------------------------------------------------------------------- MAML++


@engines
@models
def test_maml_plus_plus_with_all_switches_off_is_maml(name: str, vectorize: bool) -> None:
    of = setup(name)
    plus, plain = maml_plus_plus(of.target, **INNER, **OFF), maml(of.target, **INNER)
    meta = plus.init(of.theta, torch.Generator())
    found = mean_gradient(plus, meta, of.tasks, vectorize=vectorize)
    expected = mean_gradient(plain, of.theta, of.tasks, vectorize=vectorize)
    assert found.inner_lr == found.norms == {}
    assert oracles.relative_error(found.params, expected) < 1e-12


def test_loss_weights_by_hand() -> None:
    """Five steps begin as a fifth each; those before the last fall to 0.03/5 and stay there until the end."""
    fifth = pytest.approx([0.2] * 5)
    assert loss_weights(0, 5, 100) == fifth
    assert loss_weights(50, 5, 100) == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.6])
    for step in (97, 98, 99):
        assert loss_weights(step, 5, 100) == pytest.approx([0.006] * 4 + [0.976])
    for step in (100, 101, 10**6):
        assert loss_weights(step, 5, 100) == [0, 0, 0, 0, 1]
    assert loss_weights(0, 5, 0) == [0, 0, 0, 0, 1]
    assert loss_weights(0, 1, 100) == loss_weights(70, 1, 100) == [1]


def plus_with_statistics(name: str = "conv4") -> tuple[Setup, Algorithm, Stateful]:
    of = setup(name)
    algorithm = maml_plus_plus(of.target, **INNER, per_step_statistics=True)
    meta = begun(algorithm, of.theta)
    return of, algorithm, meta


def test_steps_past_those_of_training_reuse_the_last_rates_norms_and_statistics() -> None:
    of, algorithm, meta = plus_with_statistics()
    task = tree_index(of.tasks, 0)
    states = algorithm.adapt(meta, task.support, num_steps=STEPS + 2)
    phi = {name: p.clone().requires_grad_() for name, p in meta.learned.params.items()}
    for k in range(STEPS + 2):
        row = min(k, STEPS - 1)
        norms = {name: rows[row] for name, rows in meta.learned.norms.items()}
        grads = oracles.slope(oracles.loss_of(of.model, {**phi, **norms}, task.support), phi, detach=True)
        phi = {name: p - meta.learned.inner_lr[name][row] * grads[name] for name, p in phi.items()}
        assert max(oracles.leaf_errors(states[k + 1].params, {**phi, **norms}).values()) < 1e-12
        for norm, of_norm in meta.state.items():
            assert torch.equal(states[k + 1].statistics[norm]["mean"], of_norm["mean"][row])
            assert torch.equal(states[k + 1].statistics[norm]["variance"], of_norm["variance"][row])
    assert states[0].params.keys() == of.theta.keys()


def norms_of(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}


@engines
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("name", ["batch norm", "conv4"])
def test_running_statistics_are_those_that_torch_gathers_of_the_query_set_at_each_step(
    name: str, biases: bool, vectorize: bool
) -> None:
    of = setup(name)
    algorithm = maml_plus_plus(of.target, **INNER, per_step_statistics=True, per_step_biases=biases)
    meta = begun(algorithm, of.theta)
    found = mean_gradient(algorithm, meta, of.tasks, vectorize=vectorize).state
    expected: Any = tree_map(torch.zeros_like, meta.state)
    learned = tree_map(lambda leaf: leaf.clone().requires_grad_(), meta.learned)
    for task in oracles.each(of.tasks):
        states = oracles.maml_plus_plus_states(of.model, learned, task, **ORACLE, detach=True)
        for k, state in enumerate(states):
            seen = oracles.walk(of.model, state, task.query.inputs)[1]
            for norm, module in norms_of(of.model).items():
                own = nn.BatchNorm2d(module.num_features, dtype=torch.float64)
                own.running_mean, own.running_var = (meta.state[norm][n][k].clone() for n in ("mean", "variance"))
                own(seen[norm].detach())
                expected[norm]["mean"][k] += own.running_mean / len(of.tasks.support.inputs)
                expected[norm]["variance"][k] += own.running_var / len(of.tasks.support.inputs)
    errors = oracles.leaf_errors(found, expected)
    assert max(errors.values()) < 1e-9, errors


def evaluating(model: nn.Module, statistics: Any) -> nn.Module:
    """The model with batch norms of torch that have gathered these statistics."""
    copied = copy.deepcopy(model)
    for name, norm in norms_of(copied).items():
        norm.track_running_stats = True
        norm.running_mean, norm.running_var = statistics[name]["mean"], statistics[name]["variance"]
    return copied.eval()


@pytest.mark.parametrize("name", ["batch norm", "conv4"])
def test_predictions_alone_are_those_of_torch_in_evaluation(name: str) -> None:
    of, algorithm, meta = plus_with_statistics(name)
    assert algorithm.predict_alone is not None
    task = tree_index(of.tasks, 1)
    for k, state in enumerate(algorithm.adapt(meta, task.support)):
        row = max(k - 1, 0)
        rows = tree_map(lambda leaf, row=row: leaf[row], meta.state)
        expected = functional_call(evaluating(of.model, rows), state.params, (task.query.inputs,)).detach()
        found = algorithm.predict_alone(meta, state, task.query.inputs)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(found, algorithm.predict(meta, state, task.query.inputs), rtol=1e-3)
        through = predict_one_by_one(algorithm, meta, state, task.support.inputs, task.query.inputs)
        assert torch.equal(through, found)


@pytest.mark.parametrize("name", ["batch norm", "conv4"])
def test_what_is_predicted_alone_does_not_depend_on_the_others(name: str) -> None:
    """Also where the last maps are one pixel, of which there is no batch statistic."""
    of, algorithm, meta = plus_with_statistics(name)
    assert algorithm.predict_alone is not None
    task = tree_index(of.tasks, 0)
    state = algorithm.adapt(meta, task.support)[-1]
    together = algorithm.predict_alone(meta, state, task.query.inputs)
    for number in (0, 5):
        one = algorithm.predict_alone(meta, state, task.query.inputs[number : number + 1])
        torch.testing.assert_close(one[0], together[number], rtol=1e-12, atol=1e-12)
    assert algorithm.predict_alone(meta, state, task.query.inputs[:0]).shape == (0, WAYS)


def test_the_outer_step_writes_the_state_and_descends_on_what_is_learned() -> None:
    of, algorithm, meta = plus_with_statistics()
    options = Outer(optimizer="sgd", outer_lr=0.5, weight_decay=0.1, clip_norm=1e6)
    state = init_outer(meta, options)
    assert isinstance(state.meta_params, Stateful)
    seen = state.optimizer.param_groups[0]["params"]
    assert [id(leaf) for leaf in seen] == [id(leaf) for leaf in tree_leaves(state.meta_params.learned)]
    places = [leaf.data_ptr() for leaf in tree_leaves(state.meta_params)]
    grads, _ = meta_gradient(algorithm, meta, of.tasks, 0)
    norm = outer_step(state, tree_map(torch.clone, grads), 0, options)
    assert float(norm) == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in tree_leaves(grads.learned))))
    moved = tree_map(lambda p, g: p - 0.5 * (g + 0.1 * p), meta.learned, grads.learned)
    assert max(oracles.leaf_errors(state.meta_params.learned, moved).values()) < 1e-12
    for found, expected in zip(tree_leaves(state.meta_params.state), tree_leaves(grads.state), strict=True):
        assert torch.equal(found, expected)
    assert [leaf.data_ptr() for leaf in tree_leaves(state.meta_params)] == places  # a recorded step reads them there


def test_a_recorded_step_is_possible_where_no_weight_changes_over_training() -> None:
    target = setup("batch norm").target
    assert maml_plus_plus(target, **INNER, multi_step_loss=False).steady_from == 0
    assert maml_plus_plus(target, **INNER, annealing_steps=70).steady_from == 70
    assert maml_plus_plus(target, **INNER, multi_step_loss=False, first_order_steps=3).steady_from == 3


# ----------------------------------------------------------------------------------------- iMAML


def proximal(of: Setup, task: Episode, weight: float, steps: int) -> Params:
    """Gradient descent on the inner problem."""
    phi = {name: p.clone().requires_grad_() for name, p in of.theta.items()}
    for _ in range(steps):
        grads = oracles.slope(oracles.loss_of(of.model, phi, task.support), phi, detach=True)
        phi = {n: p - INNER_LR * (grads[n] + weight * (p - of.theta[n])) for n, p in phi.items()}
        phi = {name: p.detach().requires_grad_() for name, p in phi.items()}
    return phi


def textbook(product: Callable[[Tensor], Tensor], target: Tensor, num_steps: int) -> Tensor:
    """Conjugate gradients as in Nocedal and Wright (2006), algorithm 5.2."""
    x, r = torch.zeros_like(target), -target
    p = -r
    for _ in range(num_steps):
        along = product(p)
        alpha = (r @ r) / (p @ along)
        assert alpha > 0
        x, before = x + alpha * p, r @ r
        r = r + alpha * along
        p = -r + (r @ r) / before * p
    return x


def by_newton(of: Setup, task: Episode, weight: float, steps: int, num_cg_steps: int) -> Params:
    """Hessian-free steps on the inner problem, each as far as Armijo's rule lets it: the longest of five lengths."""
    value, phi = inner_problem(of, task, weight), of.theta
    for _ in range(steps):
        here = {name: p.clone().requires_grad_() for name, p in phi.items()}
        grads = oracles.flat(oracles.slope(value(here), here, detach=True))
        along = textbook(oracles.hessian(value, here), grads, num_cg_steps)
        for length in (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 0):
            there = oracles.unflat(phi, oracles.flat(phi) - length * along)
            if value(there) <= value(phi) - 1e-4 * length * (grads @ along):
                break
        phi = there
    return {name: p.detach().requires_grad_() for name, p in phi.items()}


@engines
@pytest.mark.parametrize(
    ("name", "weight", "damping", "num_cg_steps", "solver"),
    [
        ("mlp", 2.0, 0.0, 3, "gradient"),
        ("mlp", 0.5, 3.0, 3, "gradient"),
        ("batch norm", 8.0, 0.0, 4, "gradient"),
        ("conv4", 9.0, 0.0, 4, "gradient"),
        ("conv4", 2.0, 22.0, 4, "gradient"),
        ("mlp", 0.5, 3.0, 3, "hessian_free"),  # of whose lengths one is a half
        ("conv4", 250.0, 0.0, 3, "hessian_free"),
        ("conv4", 200.0, 22.0, 3, "hessian_free"),
    ],
)
def test_imaml_is_conjugate_gradients_on_the_hessian_at_the_end_of_the_inner_loop(
    name: str, weight: float, damping: float, num_cg_steps: int, solver: Any, vectorize: bool
) -> None:
    of = setup(name, num_tasks=2)
    expected = torch.zeros(sum(p.numel() for p in of.theta.values()), dtype=torch.float64)
    for task in oracles.each(of.tasks):
        if solver == "gradient":
            phi = proximal(of, task, weight, STEPS)
        else:
            phi = by_newton(of, task, weight, STEPS, num_cg_steps)
        curvature = oracles.hessian(partial(oracles.loss_of, of.model, batch=task.support), phi)
        target = oracles.flat(oracles.slope(oracles.loss_of(of.model, phi, task.query), phi, detach=True))
        expected += textbook(lambda v, h=curvature: v + h(v) / (weight + damping), target, num_cg_steps) / 2  # type: ignore[misc]
    options: Any = {
        "regularization": weight, "num_cg_steps": num_cg_steps, "cg_damping": damping, "solver": solver,
    }  # fmt: skip
    algorithm = imaml(of.target, **INNER, **options)
    found = mean_gradient(algorithm, of.theta, of.tasks, vectorize=vectorize)
    errors = oracles.leaf_errors(found, oracles.unflat(of.theta, expected))
    assert max(errors.values()) < 1e-9, errors


def test_imaml_with_enough_steps_solves_the_dense_system() -> None:
    of, weight = setup("mlp"), 2.0
    expected = torch.zeros(sum(p.numel() for p in of.theta.values()), dtype=torch.float64)
    for task in oracles.each(of.tasks):
        phi = proximal(of, task, weight, STEPS)
        curvature = oracles.hessian(partial(oracles.loss_of, of.model, batch=task.support), phi)
        matrix = torch.eye(len(expected)) + oracles.dense(curvature, len(expected)) / weight
        assert torch.linalg.eigvalsh(matrix).min() > 0
        target = oracles.flat(oracles.slope(oracles.loss_of(of.model, phi, task.query), phi, detach=True))
        expected += torch.linalg.solve(matrix, target) / 3
    algorithm = imaml(of.target, **INNER, regularization=weight, num_cg_steps=80)
    found = mean_gradient(algorithm, of.theta, of.tasks, vectorize=True)
    errors = oracles.leaf_errors(found, oracles.unflat(of.theta, expected))
    assert max(errors.values()) < 1e-9, errors


def squared_error(model: nn.Module, params: Params, batch: Batch) -> Tensor:
    off: Tensor = functional_call(model, params, (batch.inputs,)) - batch.targets
    return off.square().mean()


@pytest.mark.parametrize(("solver", "steps"), [("gradient", 400), ("hessian_free", 8)])
def test_imaml_on_a_linear_model_is_the_closed_form(solver: Any, steps: int) -> None:
    """The squared error of a linear model has one Hessian H: phi* = theta - (H + lambda)^-1 g(theta).

    H is the same block of 4 x 4 for each of the two outputs, so 4 steps of conjugate gradients are exact.
    """
    case, tasks, _ = make("linear")
    theta, weight = initial_params(case.model), 0.5
    expected = torch.zeros(8, dtype=torch.float64)
    for task in oracles.each(tasks):
        of_support, of_query = (partial(squared_error, case.model, batch=batch) for batch in task[:2])
        curvature, eye = oracles.dense(oracles.hessian(of_support, theta), 8), torch.eye(8, dtype=torch.float64)
        start = {name: p.clone().requires_grad_() for name, p in theta.items()}
        slope = oracles.flat(oracles.slope(of_support(start), start, detach=True))
        phi = oracles.unflat(theta, oracles.flat(theta) - torch.linalg.solve(curvature + weight * eye, slope))
        phi = {name: p.clone().requires_grad_() for name, p in phi.items()}
        target = oracles.flat(oracles.slope(of_query(phi), phi, detach=True))
        expected += torch.linalg.solve(eye + curvature / weight, target) / 3
    options: Any = {"regularization": weight, "num_cg_steps": 4, "solver": solver}
    algorithm = imaml(regression(case.model), inner_lr=0.2, num_inner_steps=steps, **options)
    found, _ = meta_gradient(algorithm, theta, tasks, 0)
    errors = oracles.leaf_errors(found, oracles.unflat(theta, expected))
    assert max(errors.values()) < 1e-9, errors


def inner_problem(of: Setup, task: Episode, weight: float) -> Callable[[Params], Tensor]:
    def value(phi: Params) -> Tensor:
        away = sum((p - of.theta[name]).square().sum() for name, p in phi.items())
        return oracles.loss_of(of.model, phi, task.support) + weight / 2 * away

    return value


def test_both_solvers_reach_the_minimiser_of_a_strongly_convex_problem() -> None:
    """Cross-entropy of a linear model is convex, and the pull to theta makes it strongly so."""
    _, tasks, _ = make("mlp")
    model, weight = nn.Sequential(nn.Linear(3, WAYS)).double(), 0.3
    of = Setup(model, classification(model), initial_params(model), tasks)
    task = tree_index(tasks, 0)
    ends = []
    for solver, steps in (("gradient", 400), ("hessian_free", 10)):
        options: Any = {"regularization": weight, "num_cg_steps": 16, "solver": solver}
        ends.append(imaml(of.target, inner_lr=0.5, num_inner_steps=steps, **options).adapt(of.theta, task.support)[-1])
        phi = {name: p.clone().requires_grad_() for name, p in ends[-1].items()}
        slope = oracles.slope(inner_problem(of, task, weight)(phi), phi, detach=True)
        assert oracles.flat(slope).abs().max() < 1e-9
    assert max(oracles.leaf_errors(*ends).values()) < 1e-8


@pytest.mark.parametrize(("name", "weight"), [("mlp", 0.01), ("batch norm", 0.01), ("conv4", 0.1)])
@pytest.mark.parametrize("num_cg_steps", [1, 6])
def test_hessian_free_never_goes_up(name: str, weight: float, num_cg_steps: int) -> None:
    of = setup(name, num_tasks=2)
    algorithm = imaml(of.target, **INNER, regularization=weight, num_cg_steps=num_cg_steps, solver="hessian_free")
    for task in oracles.each(of.tasks):
        value = inner_problem(of, task, weight)
        values = [float(value(phi)) for phi in algorithm.adapt(of.theta, task.support, num_steps=5)]
        assert all(after <= before + 1e-12 for before, after in itertools.pairwise(values)), values
        assert values[-1] < values[0]


# --------------------------------------------------------------------------------------- Reptile


def pool_of(task: Episode) -> Batch:
    return Batch(*(torch.cat([one, other]) for one, other in zip(task.support, task.query, strict=True)))


@engines
@models
@pytest.mark.parametrize("size", [None, 5])
def test_reptile_is_the_way_that_the_inner_loop_went(size: int | None, name: str, vectorize: bool) -> None:
    of = setup(name)
    expected = tree_map(torch.zeros_like, of.theta)
    for task in oracles.each(of.tasks):
        assert task.key is not None
        batches = mini_batches(pool_of(task), size, STEPS, fold_in(task.key, 0))
        phi = {n: p.clone().requires_grad_() for n, p in of.theta.items()}
        for batch in batches:
            grads = oracles.slope(oracles.loss_of(of.model, phi, batch), phi, detach=True)
            phi = {n: (p - INNER_LR * grads[n]).detach().requires_grad_() for n, p in phi.items()}
        expected = {n: e + (of.theta[n] - phi[n].detach()) / 3 for n, e in expected.items()}
    found = mean_gradient(reptile(of.target, **INNER, inner_batch_size=size), of.theta, of.tasks, vectorize=vectorize)
    errors = oracles.leaf_errors(found, expected)
    assert max(errors.values()) < 1e-9, errors


@engines
@pytest.mark.parametrize("name", ["mlp", "batch norm"])
def test_reptile_with_adam_is_torchs_adam_with_the_moments_of_the_tasks_before(name: str, vectorize: bool) -> None:
    of = setup(name)
    algorithm = reptile(of.target, inner_lr=0.01, num_inner_steps=STEPS, inner_optimizer="adam")
    torch.manual_seed(2)
    squares = tree_map(lambda p: 1e-3 * torch.rand_like(p), of.theta)
    for before in (0, 7):
        old = squares if before else tree_map(torch.zeros_like, of.theta)
        meta = Stateful(of.theta, Moments(old, torch.tensor(float(before), dtype=torch.float64)))
        if not before:  # so it begins
            begins = algorithm.init(of.theta, torch.Generator())
            assert all(torch.equal(a, b) for a, b in zip(tree_leaves(begins), tree_leaves(meta), strict=True))
        found = mean_gradient(algorithm, meta, of.tasks, vectorize=vectorize)
        moved, seen = tree_map(torch.zeros_like, of.theta), tree_map(torch.zeros_like, of.theta)
        for task in oracles.each(of.tasks):
            phi = {n: nn.Parameter(p.clone()) for n, p in of.theta.items()}
            adam = torch.optim.Adam(phi.values(), lr=0.01, betas=(0.0, 0.999), eps=1e-8)
            for n, p in phi.items():
                squared = {"exp_avg_sq": old[n].clone(), "step": torch.tensor(float(before))}
                adam.state[p] = {"exp_avg": torch.zeros_like(p), **squared}
            for _ in range(STEPS):
                adam.zero_grad()
                oracles.loss_of(of.model, dict(phi), pool_of(task)).backward()  # type: ignore[no-untyped-call]
                adam.step()
            moved = {n: m + (of.theta[n] - phi[n].detach()) / 3 for n, m in moved.items()}
            seen = {n: s + adam.state[phi[n]]["exp_avg_sq"] / 3 for n, s in seen.items()}
        errors = oracles.leaf_errors(found.state.squares, seen)
        assert max(errors.values()) < 1e-9, errors
        assert float(found.state.num_squares) == before + STEPS
        alike = {n: ("0.bias" if name == "batch norm" else "") != n for n in moved}  # noise divided by its own size
        errors = oracles.leaf_errors(*({n: tree[n] for n in tree if alike[n]} for tree in (found.learned, moved)))
        assert max(errors.values()) < 1e-9, errors


def test_reptile_adapts_to_the_whole_support_set() -> None:
    of = setup("mlp")
    support = tree_index(of.tasks, 0).support
    found = reptile(of.target, **INNER, inner_batch_size=1).adapt(of.theta, support, key=torch.tensor(3))
    expected = maml(of.target, **INNER).adapt(of.theta, support)
    for one, other in zip(found, expected, strict=True):
        assert max(oracles.leaf_errors(one, other).values()) < 1e-14


@pytest.mark.parametrize(("size", "number"), [(2, 9), (4, 3), (6, 3), (5, 12), (1, 6)])
def test_mini_batches_go_through_every_sample_once_a_round(size: int, number: int) -> None:
    pool = Batch(torch.arange(6.0)[:, None], torch.arange(6))
    rounds: dict[int, list[list[int]]] = {}
    for seed in (0, 0, 1):
        batches = mini_batches(pool, size, number, torch.tensor(seed))
        assert all(torch.equal(batch.inputs[:, 0].long(), batch.targets) for batch in batches)
        assert [len(batch.targets) for batch in batches] == [size] * number
        order = torch.cat([batch.targets for batch in batches]).tolist()
        found = [order[start : start + 6] for start in range(0, len(order), 6)]
        assert all(sorted(one) == list(range(6)) for one in found[: len(order) // 6])
        assert len(set(found[-1])) == len(found[-1])
        assert rounds.setdefault(seed, found) == found
        assert len(found) == 1 or found[0] != found[1][: len(found[0])]
    assert rounds[0] != rounds[1]
    without = torch.cat([batch.targets for batch in mini_batches(pool, size, number, None)]).tolist()
    assert without == [i % 6 for i in range(size * number)]


# ----------------------------------------------------------------------------- what moves, and what does not


@pytest.mark.parametrize("name", ["mlp", "batch norm", "conv4"])
def test_boil_leaves_the_head_and_anil_the_body_where_they_are(name: str) -> None:
    of = setup(name)
    support = tree_index(of.tasks, 0).support
    for algorithm, stays in ((boil(of.target, **INNER), True), (anil(of.target, **INNER), False)):
        for state in algorithm.adapt(of.theta, support)[1:]:
            for parameter, p in state.items():
                if parameter.startswith(of.head) == stays:
                    assert torch.equal(p, of.theta[parameter])
                elif not parameter.endswith(UNDONE[name] or "-"):
                    assert not torch.equal(p, of.theta[parameter]), parameter


@models
def test_fine_tuning_moves_a_new_head_and_the_body_where_it_has_a_rate(name: str) -> None:
    of = setup(name)
    support = tree_index(of.tasks, 0).support
    for body_lr in (0.0, 0.05):
        algorithm = fine_tuning(of.target, **INNER, body_lr=body_lr, num_classes=CLASSES)
        meta = begun(algorithm, of.theta)
        assert meta.classes["weight"].shape == (CLASSES, of.theta[of.head + "weight"].shape[1])
        states = algorithm.adapt(meta, support)
        phi = {**meta.body, **{of.head + n: torch.zeros_like(of.theta[of.head + n]) for n in ("weight", "bias")}}
        for state in states:
            assert max(oracles.leaf_errors(state, phi).values()) < 1e-12
            body = [n for n in of.theta if not n.startswith(of.head)]
            assert body_lr or all(torch.equal(state[n], meta.body[n]) for n in body)
            leaves = {n: p.detach().clone().requires_grad_() for n, p in phi.items()}
            grads = oracles.slope(oracles.loss_of(of.model, leaves, support), leaves, detach=True)
            rates = {n: INNER_LR if n.startswith(of.head) else body_lr for n in phi}
            phi = {n: p - rates[n] * grads[n] for n, p in phi.items()}
        assert list(states[0]) == [*meta.body, of.head + "weight", of.head + "bias"]


# ------------------------------------------------------------------------------------- rules that are learned


@engines
@models
def test_meta_curvature_and_meta_sgd_begin_as_maml(name: str, vectorize: bool) -> None:
    of = setup(name)
    expected = mean_gradient(maml(of.target, **INNER), of.theta, of.tasks, vectorize=vectorize)
    for algorithm in (meta_curvature(of.target, **INNER), meta_sgd(of.target, **INNER)):
        meta = algorithm.init(of.theta, torch.Generator())
        found = mean_gradient(algorithm, meta, of.tasks, vectorize=vectorize)
        assert oracles.relative_error(found.params, expected) < 1e-12


@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 4, 5), (3, 4, 2, 5), (3, 4, 2, 1, 2)])
def test_the_mode_products_are_those_of_einsum(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    gradient = torch.randn(shape, dtype=torch.float64)
    sizes = [*shape[:2], *([math.prod(shape[2:])] if len(shape) > 2 else [])]
    matrices = tuple(torch.randn(size, size, dtype=torch.float64) for size in sizes)
    expected = oracles.mode_product(gradient, matrices)
    torch.testing.assert_close(transformed(gradient, matrices), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (math.e**3, (0.3, 1.0)),
        (-(math.e**-4), (-0.4, -1.0)),
        (1.0, (0.0, 1.0)),
        (math.e**-11, (-1.0, math.e**-1)),
        (-(math.e**-13), (-1.0, -(math.e**-3))),
        (0.0, (-1.0, 0.0)),
        (1e-300, (-1.0, 0.0)),
    ],
)
def test_the_lstm_sees_magnitude_and_sign(x: float, expected: tuple[float, float]) -> None:
    """p = 10: (log|x| / p, sign x) from e^-10 on, below that (-1, e^10 x)."""
    for values in (torch.tensor(x, dtype=torch.float64), torch.tensor([5.0, x], dtype=torch.float64)):
        found = preprocessed(values).reshape(2, -1)[:, -1].tolist()
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert oracles.preprocessed(x) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_the_lstm_begins_as_gradient_descent() -> None:
    """A forget gate near 1 and an input gate near 0.01: about a hundredth of the gradient is gone along."""
    of = setup("mlp")
    task = tree_index(of.tasks, 0)
    meta = meta_lstm(of.target, num_inner_steps=1).init(of.theta, torch.Generator().manual_seed(0))
    phi = {n: p.clone().requires_grad_() for n, p in of.theta.items()}
    rule = {**meta.rule, "forget_bias": torch.tensor(50.0, dtype=torch.float64)}
    after = meta_lstm(of.target, num_inner_steps=1).adapt(MetaLstmParams(of.theta, rule), task.support)[1]
    grads = oracles.slope(oracles.loss_of(of.model, phi, task.support), phi, detach=True)
    for n, p in of.theta.items():
        share = (p - after[n]) / grads[n]
        assert ((share > 0.005) & (share < 0.025)).all()
    assert 4 <= float(meta.rule["forget_bias"]) <= 6
    assert -5 <= float(meta.rule["input_bias"]) <= -4


def test_the_lstm_adapts_by_the_papers_recurrence() -> None:
    of = setup("mlp", num_tasks=1)
    support = tree_index(of.tasks, 0).support
    algorithm = meta_lstm(of.target, num_inner_steps=STEPS, hidden_size=5)
    meta = begun(algorithm, of.theta)
    leaves = tree_map(lambda leaf: leaf.clone().requires_grad_(), meta)
    expected = oracles.meta_lstm_states(of.model, leaves, support, STEPS + 2)
    for one, other in zip(algorithm.adapt(meta, support, num_steps=STEPS + 2), expected, strict=True):
        assert max(oracles.leaf_errors(one, other).values()) < 1e-12


# ----------------------------------------------------------------------------------------------- CAVIA


def test_cavia_changes_the_first_layer_by_default_and_begins_as_the_network_itself() -> None:
    of = setup("mlp")
    task = tree_index(of.tasks, 0)
    for modulation, rows in (("shift", 8), ("scale_shift", 16)):
        options: Any = {"modulation": modulation, "num_context": 3}
        algorithm = cavia(of.target, **INNER, **options)
        meta = algorithm.init(of.theta, torch.Generator().manual_seed(0))
        assert meta.modulation["weight"].shape == (rows, 3)
        assert ("bias" in meta.modulation) == (modulation == "scale_shift")
        states = algorithm.adapt(meta, task.support)
        assert all(set(state) == {"context"} for state in states)
        assert not states[0]["context"].any()
        assert states[1]["context"].all()
        plain = functional_call(of.model, of.theta, (task.query.inputs,)).detach()
        torch.testing.assert_close(algorithm.predict(meta, states[0], task.query.inputs), plain)
        elsewhere = cavia(of.target, **INNER, **options, modulated_layer="2")
        assert elsewhere.init(of.theta, torch.Generator()).modulation["weight"].shape == (rows // 2, 3)


def test_cavia_changes_the_first_batch_norm_by_default_or_else_the_first_layer() -> None:
    convolution, norm, linear = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, track_running_stats=False), nn.Linear(108, 4)
    wide, wide_norm = nn.Linear(5, 7), nn.BatchNorm1d(7, track_running_stats=False)
    for layers, channels in (
        ([convolution, nn.GELU(), nn.Flatten(), linear], 3),
        ([nn.Flatten(), linear, wide], 4),
        ([nn.Conv2d(1, 6, 3), nn.Conv2d(6, 3, 3), norm, nn.Flatten(), linear], 3),
        ([nn.Linear(3, 5), wide, wide_norm, nn.Linear(7, 4)], 7),
    ):
        model = nn.Sequential(*layers)
        meta = cavia(classification(model), **INNER).init(initial_params(model), torch.Generator())
        assert len(meta.modulation["weight"]) == channels


@pytest.mark.parametrize("name", ["batch norm", "conv4"])
@pytest.mark.parametrize("modulation", ["shift", "scale_shift"])
def test_the_context_has_an_effect_by_default(name: str, modulation: Any) -> None:
    """Not before a batch norm, which would take it out again: the inner loop would go nowhere."""
    of = setup(name, num_tasks=1)
    task = tree_index(of.tasks, 0)
    algorithm = cavia(of.target, inner_lr=1.0, num_inner_steps=1, modulation=modulation)
    before, after = algorithm.adapt(begun(algorithm, of.theta), task.support)
    assert (after["context"] - before["context"]).abs().max() > 1e-3


# ------------------------------------------------------------------------------------- nearest is alike


def plane(num_ways: int) -> tuple[Objective, Params]:
    """A model whose features are its inputs, two numbers."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, num_ways)).double()
    theta = initial_params(model)
    theta.update({"0.weight": torch.eye(2, dtype=torch.float64), "0.bias": torch.zeros(2, dtype=torch.float64)})
    return classification(model), theta


def points(*rows: tuple[float, float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_prototypical_networks_by_hand() -> None:
    """Centres (1, 0) and (0, 3). From (1, 1) they are 1 and 1 + 4 away, squared; from (0, 3) they are 10 and 0."""
    target, theta = plane(2)
    algorithm = prototypical_networks(target)
    body = algorithm.init(theta, torch.Generator())
    assert set(body) == {"0.weight", "0.bias"}
    support = Batch(points((0, 0), (0, 4), (2, 0), (0, 2)), torch.tensor([0, 1, 0, 1]))
    (known,) = algorithm.adapt(body, support, num_steps=7)
    assert known.centers.tolist() == [[1, 0], [0, 3]]
    assert algorithm.predict(body, known, points((1, 1), (0, 3))).tolist() == [[-1, -5], [-10, 0]]
    episode = Episode(support, Batch(points((1, 1)), torch.tensor([0])))
    loss = algorithm.meta_grad(body, episode, 0)[1]["query_loss"]
    assert float(loss) == pytest.approx(math.log(1 + math.exp(-4)))


def test_matching_networks_by_hand() -> None:
    """(2, 0) has the cosines 1, 0 and 0.6 with (1, 0), (0, 2) and (3, 4); of these the first and last are class 1."""
    target, theta = plane(3)
    algorithm = matching_networks(target)
    body = algorithm.init(theta, torch.Generator())
    support = Batch(points((1, 0), (0, 2), (3, 4)), torch.tensor([1, 0, 1]))
    (known,) = algorithm.adapt(body, support)
    chances = algorithm.predict(body, known, points((2, 0), (-5, 1))).exp()
    total = math.e + 1 + math.exp(0.6)
    assert chances[0].tolist() == pytest.approx([1 / total, (math.e + math.exp(0.6)) / total, 0])
    assert chances.sum(1).tolist() == pytest.approx([1, 1])
    absent = Episode(support, Batch(points((2, 0)), torch.tensor([2])))
    grads, metrics = algorithm.meta_grad(body, absent, 0)
    assert all(leaf.isfinite().all() for leaf in tree_leaves((grads, metrics)))  # unlikely, but a number


@models
def test_matching_networks_share_out_a_whole(name: str) -> None:
    of = setup(name)
    algorithm = matching_networks(of.target)
    task = tree_index(of.tasks, 0)
    (known,) = algorithm.adapt(of.theta, task.support)
    sums = algorithm.predict(of.theta, known, task.query.inputs).exp().sum(1)
    torch.testing.assert_close(sums, torch.ones(12, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_a_head_of_prototypes_says_what_prototypical_networks_do() -> None:
    """2 c x - |c|^2 is -|x - c|^2 but for |x|^2, which all classes share."""
    of = setup("conv4")
    task = tree_index(of.tasks, 0)
    proto, nearest = proto_maml(of.target, **INNER), prototypical_networks(of.target)
    body = proto.init(of.theta, torch.Generator())
    assert set(body) == {n for n in of.theta if not n.startswith(of.head)}
    logits = [a.predict(body, a.adapt(body, task.support, num_steps=0)[0], task.query.inputs) for a in (proto, nearest)]
    torch.testing.assert_close(logits[0].log_softmax(1), logits[1].log_softmax(1), rtol=1e-10, atol=1e-10)


def test_a_query_is_of_a_class_that_the_support_set_shows() -> None:
    """(0.5, 0) is nearer to the origin than to the one centre, (2, 0)."""
    target, theta = plane(3)
    algorithm = prototypical_networks(target)
    support = Batch(points((1, 0), (3, 0)), torch.tensor([1, 1]))
    (known,) = algorithm.adapt(theta, support)
    chances = algorithm.predict(theta, known, points((0.5, 0), (-40, 0))).softmax(-1)
    assert chances.tolist() == [pytest.approx([0, 1, 0]), pytest.approx([0, 1, 0])]
    absent = Episode(support, Batch(points((0.5, 0)), torch.tensor([2])))
    grads, metrics = algorithm.meta_grad(theta, absent, 0)
    assert all(leaf.isfinite().all() for leaf in tree_leaves((grads, metrics)))  # unlikely, but a number


# -------------------------------------------------------------------------------------------- bad input

DESCENDING: dict[str, Callable[..., Algorithm]] = {
    **WITH_ALL_PARAMETERS,
    "anil": anil,
    "cavia": cavia,
    "fine_tuning": partial(fine_tuning, num_classes=CLASSES),
}


@pytest.mark.parametrize("num_inner_steps", [0, -1])
@pytest.mark.parametrize("name", DESCENDING)
def test_an_inner_loop_without_steps_is_refused(name: str, num_inner_steps: int) -> None:
    with pytest.raises(ConfigError, match=rf"num_inner_steps={num_inner_steps} must be 1 or more"):
        DESCENDING[name](setup("mlp").target, inner_lr=0.1, num_inner_steps=num_inner_steps)


WITH_A_BODY: dict[str, Callable[[Objective], Algorithm]] = {
    "anil": lambda target: anil(target, **INNER),
    "boil": lambda target: boil(target, **INNER),
    "proto_maml": lambda target: proto_maml(target, **INNER),
    "fine_tuning": lambda target: fine_tuning(target, **INNER, num_classes=CLASSES),
    "prototypical_networks": prototypical_networks,
    "matching_networks": matching_networks,
}


@pytest.mark.parametrize("name", WITH_A_BODY)
def test_a_model_that_is_nothing_but_its_head_is_refused(name: str) -> None:
    target = classification(nn.Sequential(nn.Linear(3, 4)))
    with pytest.raises(ConfigError, match=rf"the head '0' is the whole model, and {name} treats head and body apart"):
        WITH_A_BODY[name](target)


@pytest.mark.parametrize("name", WITH_A_BODY)
def test_a_model_that_does_not_end_in_its_head_is_refused(name: str) -> None:
    module, task = _HeadFirst().double(), tree_index(setup("mlp").tasks, 0)
    algorithm = WITH_A_BODY[name](classification(module))
    meta = algorithm.init(initial_params(module), torch.Generator().manual_seed(0))
    with pytest.raises(ConfigError, match=r"_HeadFirst.forward does not end in its head 'body'.* the right head"):
        algorithm.meta_grad(meta, task, 0)


@pytest.mark.parametrize("name", ["proto_maml", "fine_tuning", "prototypical_networks", "matching_networks"])
def test_a_head_that_is_no_linear_classifier_is_refused(name: str) -> None:
    target = classification(nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8)))
    with pytest.raises(ConfigError, match=rf"{name} .* must end in an nn.Linear.*; its head '1' is LayerNorm"):
        WITH_A_BODY[name](target)


@pytest.mark.parametrize("name", ["proto_maml", "fine_tuning"])
def test_a_head_without_a_bias_is_refused_where_one_is_made(name: str) -> None:
    target = classification(nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 4, bias=False)))
    with pytest.raises(ConfigError, match=rf"{name} .* must end in an nn.Linear with a bias; its head '1' is Linear"):
        WITH_A_BODY[name](target)


@pytest.mark.parametrize("name", ["prototypical_networks", "matching_networks"])
def test_a_head_without_a_bias_will_do_where_none_is_made(name: str) -> None:
    WITH_A_BODY[name](classification(nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 4, bias=False))))


def _normed(norm: nn.Module) -> nn.Sequential:
    """A chain that is not known, for its activation."""
    layers = [nn.Conv2d(1, 4, 3), norm, nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, WAYS)]
    return nn.Sequential(*layers)


def _mlp(make: Callable[..., Algorithm], **options: Any) -> Callable[[], object]:
    return lambda: make(setup("mlp").target, **{**INNER, **options})


def _two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Linear(8, WAYS))


class _HeadFirst(nn.Module):
    """A model whose last layer is not the one that it names last."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, WAYS)
        self.body = nn.Linear(3, 8)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(inputs).tanh())
        return logits


class _Idle(nn.Module):
    """A model that has a layer and reads its weights alone."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(3, WAYS)
        self.used = nn.Linear(3, WAYS)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.used(inputs) + self.idle.bias
        return outputs


def _adapt_to_mlp_tasks(module: nn.Module, make: Callable[[Objective], Algorithm], tasks: Episode) -> object:
    algorithm = make(classification(module.double()))
    meta = algorithm.init(initial_params(module), torch.Generator().manual_seed(0))
    return algorithm.adapt(meta, tree_index(tasks, 0).support)


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "no regularization": (_mlp(imaml, regularization=0.0), r"regularization=0.0 must be greater than 0.*take maml"),
    "negative regularization": (_mlp(imaml, regularization=-1.0), r"regularization=-1.0 must be greater than 0"),
    "regularization that is no number": (_mlp(imaml, regularization=math.nan), r"regularization=nan must be greater"),
    "no rate": (_mlp(maml, inner_lr=0.0), r"inner_lr=0.0 must be greater than 0 and finite"),
    "a rate that is no number": (_mlp(cavia, inner_lr=math.nan), r"inner_lr=nan must be greater than 0"),
    "a rate that leads away": (
        _mlp(imaml, inner_lr=1.0, regularization=2.0), r"inner_lr=1.0 with regularization=2.0 .* 2 / regularization = 1"
    ),
    "no conjugate gradients": (_mlp(imaml, num_cg_steps=0), r"num_cg_steps=0 must be 1 or more"),
    "negative damping": (_mlp(imaml, cg_damping=-1.0), r"cg_damping=-1.0 must be 0 or more"),
    "no such solver": (_mlp(imaml, solver="newton"), r"solver='newton' must be one of gradient, hessian_free"),
    "biases without norms": (
        _mlp(maml_plus_plus), r"per_step_biases of maml_plus_plus .* has none: it is a Sequential.*--no-per-step-biases"
    ),
    "statistics without norms": (
        _mlp(maml_plus_plus, per_step_biases=False, per_step_statistics=True),
        r"per_step_statistics of maml_plus_plus .* has none: it is a Sequential.*--no-per-step-statistics",
    ),
    "no such layer": (
        _mlp(cavia, modulated_layer="nowhere"), r"modulated_layer='nowhere' must be .* of the model: 0, 2\."
    ),
    "no layer that can be changed": (
        lambda: cavia(classification(nn.Sequential(nn.Embedding(3, 4))), **INNER),
        r"modulated_layer=None must be .* of the model: it has none",
    ),
    "a layer before a batch norm": (
        lambda: cavia(setup("conv4").target, **INNER, modulated_layer="convolutions.1"),
        r"modulated_layer='convolutions.1' is followed by the norm 'norms.1'.* Name the norm",
    ),
    "a layer before an instance norm": (
        lambda: cavia(classification(_normed(nn.InstanceNorm2d(4))), **INNER, modulated_layer="0"),
        r"modulated_layer='0' is followed by the norm '1'.* Name the norm",
    ),
    "a layer before a dropout and a norm": (
        lambda: cavia(
            classification(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Dropout2d(), nn.InstanceNorm2d(4), nn.Conv2d(4, 2, 3))),
            **INNER, modulated_layer="0",
        ),
        r"modulated_layer='0' is followed by the norm '2'",
    ),
    "a layer before a pooling and a norm": (
        lambda: cavia(
            classification(nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.InstanceNorm2d(4), nn.Flatten())),
            **INNER, modulated_layer="0",
        ),
        r"modulated_layer='0' is followed by the norm '2'",
    ),
    "a layer at the end of a block before a norm": (
        lambda: cavia(
            classification(nn.Sequential(_normed(nn.InstanceNorm2d(4))[:1], _normed(nn.InstanceNorm2d(4))[1:])),
            **INNER, modulated_layer="0.0",
        ),
        r"modulated_layer='0.0' is followed by the norm '1.1'",
    ),
    "no context": (_mlp(cavia, num_context=0), r"num_context=0 must be 1 or more"),
    "no such modulation": (_mlp(cavia, modulation="film"), r"modulation='film' must be one of shift, scale_shift"),
    "a layer that is never called": (
        lambda: _adapt_to_mlp_tasks(
            _Idle(), lambda target: cavia(target, **INNER, modulated_layer="idle"), setup("mlp").tasks
        ),
        r"modulated_layer='idle' is never called by the model.* Name another one: used",
    ),
    "a head that matches no parameter": (
        lambda: anil(classification(setup("mlp").model, head="classifier"), **INNER),
        r"head='classifier' names no submodule with parameters; there are 0, 1, 2\.",
    ),
    "a model that is one layer": (
        lambda: classification(nn.Linear(3, 4)),
        r"Linear has no submodule that could be its head. Wrap it: nn.Sequential",
    ),
    "a model without parameters": (lambda: classification(nn.Tanh()), r"Tanh has no parameters"),
    "labels that are no whole numbers": (
        lambda: setup("mlp").target.loss(torch.zeros(2, 4), torch.zeros(2)), r"wants whole numbers .* take regression"
    ),
    "values for labels": (
        lambda: _adapt_to_mlp_tasks(_two_layers(), prototypical_networks, make("linear")[1]),
        r"are of classes, and these tasks have values for targets; take maml",
    ),
    "no classes": (_mlp(fine_tuning, num_classes=None), r"these tasks have no classes. Take tasks with classes"),
    "no class": (_mlp(fine_tuning, num_classes=0), r"num_classes=0 must be 1 or more"),
    "a rate of the body that leads up": (
        _mlp(fine_tuning, num_classes=3, body_lr=-1.0), r"body_lr=-1.0 must be 0 or more, and finite"
    ),
    "a rate of the body that is no number": (
        _mlp(fine_tuning, num_classes=3, body_lr=math.nan), r"body_lr=nan must be 0 or more, and finite"
    ),
    "an empty mini-batch": (_mlp(reptile, inner_batch_size=0), r"inner_batch_size=0 must be 1 or more"),
    "no such optimizer": (_mlp(reptile, inner_optimizer="lion"), r"inner_optimizer='lion' must be one of sgd, adam"),
    "an empty layer": (
        lambda: meta_lstm(setup("mlp").target, num_inner_steps=1, hidden_size=0), r"hidden_size=0 must be 1 or more"
    ),
}  # fmt: skip


def test_a_head_is_any_layer_that_the_model_ends_in() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.Sequential(nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, WAYS))).double()
    theta, task = initial_params(model), tree_index(setup("mlp").tasks, 0)
    adapted = anil(classification(model, head="1.2"), **INNER).adapt(theta, task.support)[-1]
    assert {name for name in theta if not torch.equal(adapted.get(name, theta[name]), theta[name])} == {
        "1.2.weight", "1.2.bias",
    }  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_with_the_way_out(case: str) -> None:
    factory, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        factory()


def test_norms_without_a_scale_have_statistics_but_nothing_to_learn() -> None:
    body = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8, affine=False, track_running_stats=False), nn.Linear(8, 4))
    with pytest.raises(ConfigError, match="has none with a scale and a shift"):
        maml_plus_plus(classification(body), **INNER)
    maml_plus_plus(classification(body), **INNER, per_step_biases=False, per_step_statistics=True)


@engines
def test_a_mini_batch_that_is_larger_than_the_pool_is_refused(vectorize: bool) -> None:
    of = setup("mlp")
    algorithm = reptile(of.target, **INNER, inner_batch_size=21)
    with pytest.raises(ConfigError, match=r"inner_batch_size=21 is more than the 20 samples of a task"):
        mean_gradient(algorithm, of.theta, of.tasks, vectorize=vectorize)
    mean_gradient(reptile(of.target, **INNER, inner_batch_size=20), of.theta, of.tasks, vectorize=vectorize)


@engines
def test_fine_tuning_on_episodes_that_do_not_say_their_classes_is_refused(vectorize: bool) -> None:
    of = setup("mlp")
    algorithm = fine_tuning(of.target, **INNER, num_classes=CLASSES)
    meta = begun(algorithm, of.theta)
    with pytest.raises(ConfigError, match=r"fine_tuning needs episodes that say which classes"):
        mean_gradient(algorithm, meta, of.tasks._replace(classes=None), vectorize=vectorize)
