"""Scores before and after adaptation, by the two ways to predict a query set."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from distmaml.algorithms.maml import maml
from distmaml.engine import warn_once
from distmaml.episodes import Episode
from distmaml.objectives import classification, initial_params
from distmaml.scoring import SAMPLES_AT_ONCE, interval, predict_one_by_one, score, scored_steps
from distmaml.trees import tree_leaves, tree_map
from tests import oracles
from tests.modules import make

INNER_LR = 0.3


def scored(
    name: str, *, num_steps: int = 2, queries: slice = slice(4), **changes: Any
) -> tuple[nn.Module, Any, Episode, Any]:
    case, tasks, _ = make(name)
    theta = initial_params(case.model)
    target = classification(case.model)
    algorithm = maml(target, inner_lr=INNER_LR, num_inner_steps=1)
    tasks = tasks._replace(query=tree_map(lambda leaf: leaf[:, queries], tasks.query))
    found = score(algorithm, target, theta, tasks, num_steps=num_steps, inductive=True, **changes)
    return case.model, theta, tasks, found


def adapted(model: nn.Module, theta: Any, task: Episode, steps: int) -> Any:
    """Plain gradient descent by torch.autograd."""
    phi = {name: p.clone().requires_grad_() for name, p in theta.items()}
    for _ in range(steps):
        loss = F.cross_entropy(functional_call(model, phi, (task.support.inputs,)), task.support.targets)
        grads = torch.autograd.grad(loss, list(phi.values()))
        phi = {n: (p - INNER_LR * g).detach().requires_grad_() for (n, p), g in zip(phi.items(), grads, strict=True)}
    return phi


def test_mean_and_interval_by_hand() -> None:
    """1, 2, 3, 4: mean 2.5, sample standard deviation sqrt(5 / 3)."""
    found = interval([1.0, 2.0, 3.0, 4.0])
    assert found.mean == 2.5
    assert found.half_width == pytest.approx(1.96 * math.sqrt(5 / 3) / 2, rel=1e-12)


def test_one_episode_says_nothing_of_the_spread() -> None:
    assert interval([0.5]) == (0.5, math.inf)


def test_an_interval_of_float32_scores_is_computed_in_float64() -> None:
    values = torch.full((1000,), 0.1, dtype=torch.float32)
    assert interval(values).mean == pytest.approx(float(values[0]), rel=1e-15)


@pytest.mark.parametrize("name", ["mlp", "batch norm", "lstm", "transformer"])
def test_every_step_equals_descent_by_autograd_one_task_and_one_item_at_a_time(name: str) -> None:
    """The transductive figures predict all queries at once, the inductive ones each with the support set alone."""
    model, theta, tasks, found = scored(name)
    model.eval()
    for index, task in enumerate(oracles.each(tasks)):
        for steps in range(3):
            phi = adapted(model, theta, task, steps)

            def outputs(inputs: Tensor, phi: Any = phi) -> Tensor:
                result: Tensor = functional_call(model, phi, (inputs,))
                return result

            alone = [outputs(torch.cat([task.support.inputs, item[None]]))[-1] for item in task.query.inputs]
            for mode, logits in (("transductive", outputs(task.query.inputs)), ("inductive", torch.stack(alone))):
                loss = F.cross_entropy(logits, task.query.targets).item()
                accuracy = (logits.argmax(-1) == task.query.targets).double().mean().item()
                assert found[mode]["query_loss"][index, steps].item() == pytest.approx(loss, rel=1e-9)
                assert found[mode]["query_accuracy"][index, steps].item() == pytest.approx(accuracy, rel=1e-12)


def test_of_many_steps_the_inductive_figure_is_taken_before_after_the_first_and_after_the_last() -> None:
    assert [scored_steps("inductive", k) for k in (0, 1, 3, 4)] == [[0], [0, 1], [0, 1, 2, 3], [0, 1, 4]]
    assert scored_steps("transductive", 4) == [0, 1, 2, 3, 4]
    short, found = scored("batch norm", num_steps=1)[3], scored("batch norm", num_steps=4)[3]
    assert found["transductive"]["query_loss"].shape == (3, 5)
    torch.testing.assert_close(found["inductive"]["query_loss"][:, :2], short["inductive"]["query_loss"])
    alone = scored("mlp", num_steps=4)[3]  # without batch statistics both figures are one
    for metric in ("query_loss", "query_accuracy"):
        torch.testing.assert_close(alone["inductive"][metric], alone["transductive"][metric][:, [0, 1, 4]])


def test_step_zero_is_the_unadapted_model() -> None:
    model, theta, tasks, found = scored("mlp", num_steps=0)
    logits = functional_call(model, theta, (tasks.query.inputs.flatten(0, 1),)).unflatten(0, tasks.query.targets.shape)
    expected = torch.stack([F.cross_entropy(a, b) for a, b in zip(logits, tasks.query.targets, strict=True)])
    torch.testing.assert_close(found["transductive"]["query_loss"], expected.detach().unsqueeze(-1), rtol=1e-12, atol=0)


def test_batch_statistics_make_the_two_figures_differ_and_nothing_else_does() -> None:
    for name, differ in (("batch norm", True), ("mlp", False)):
        found = scored(name)[3]
        gap = (found["transductive"]["query_loss"] - found["inductive"]["query_loss"]).abs()
        assert (float(gap.min()) > 1e-6) == differ
        assert (float(gap.max()) < 1e-12) == (not differ)


def test_an_item_scored_inductively_does_not_depend_on_the_other_queries() -> None:
    """Query sets of one item: the mean of their losses is the loss of the whole set."""
    whole = scored("batch norm")[3]
    each = [scored("batch norm", queries=slice(i, i + 1))[3] for i in range(4)]
    for mode, same in (("inductive", True), ("transductive", False)):
        single = torch.stack([found[mode]["query_loss"] for found in each]).mean(0)
        assert torch.allclose(single, whole[mode]["query_loss"], rtol=1e-10, atol=0) == same


def test_queries_alone_go_through_in_pieces_of_bounded_size() -> None:
    """Each has the whole support set beside it: what is in memory must not grow with their number."""
    case, tasks, _ = make("batch norm")
    theta = initial_params(case.model)
    algorithm = maml(classification(case.model), inner_lr=INNER_LR, num_inner_steps=1)
    seen = []

    def predict(meta: Any, state: Any, inputs: Tensor) -> Any:
        seen.append(len(inputs))
        return algorithm.predict(meta, state, inputs)

    support = tasks.support.inputs[0]
    queries = torch.randn(300, *support.shape[1:], dtype=support.dtype, generator=torch.Generator().manual_seed(0))
    counted = algorithm._replace(predict=predict)
    whole = predict_one_by_one(counted, theta, theta, support, queries)
    together = len(support) + 1
    assert seen == [together] * math.ceil(300 / (SAMPLES_AT_ONCE // together))
    for index in (0, 150, 299):
        alone = algorithm.predict(theta, theta, torch.cat([support, queries[index : index + 1]]))[-1]
        torch.testing.assert_close(whole[index], alone, rtol=1e-11, atol=1e-12)


def test_a_support_set_that_is_larger_than_a_piece_goes_through_with_one_query() -> None:
    case, tasks, _ = make("mlp")
    theta = initial_params(case.model)
    algorithm = maml(classification(case.model), inner_lr=INNER_LR, num_inner_steps=1)
    support, queries = tasks.support.inputs[0].repeat(SAMPLES_AT_ONCE, 1), tasks.query.inputs[0]
    found = predict_one_by_one(algorithm, theta, theta, support, queries)
    torch.testing.assert_close(found, algorithm.predict(theta, theta, queries), rtol=1e-11, atol=1e-12)


def test_a_model_without_a_batching_rule_is_said_once_and_memory_that_ends_is_no_such_model(
    caplog: pytest.LogCaptureFixture,
) -> None:
    case, tasks, _ = make("mlp")
    theta = initial_params(case.model)
    algorithm = maml(classification(case.model), inner_lr=INNER_LR, num_inner_steps=1)
    support, queries = tasks.support.inputs[0], tasks.query.inputs[0]

    def looks(meta: Any, state: Any, inputs: Tensor) -> Any:
        return algorithm.predict(meta, state, inputs * float(inputs.abs().max() >= 0))

    def full(meta: Any, state: Any, inputs: Tensor) -> Any:
        raise torch.OutOfMemoryError("full")

    warn_once.cache_clear()
    for _ in range(2):
        found = predict_one_by_one(algorithm._replace(predict=looks), theta, theta, support, queries)
        torch.testing.assert_close(found, algorithm.predict(theta, theta, queries), rtol=1e-11, atol=1e-12)
    assert caplog.text.count("one query item after the other") == 1
    with pytest.raises(torch.OutOfMemoryError):
        predict_one_by_one(algorithm._replace(predict=full), theta, theta, support, queries)


def test_side_by_side_equals_one_after_the_other() -> None:
    together, apart = scored("batch norm", vectorize=True)[3], scored("batch norm", vectorize=False)[3]
    for one, other in zip(tree_leaves(together), tree_leaves(apart), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_nothing_random_happens_in_a_score() -> None:
    first, second = scored("dropout")[3], scored("dropout")[3]
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(first), tree_leaves(second), strict=True))
    gap = first["transductive"]["query_loss"] - first["inductive"]["query_loss"]
    assert float(gap.abs().max()) < 1e-12


def test_without_inductive_there_is_one_figure() -> None:
    case, tasks, _ = make("mlp")
    target = classification(case.model)
    algorithm = maml(target, inner_lr=0.1, num_inner_steps=1)
    found = score(algorithm, target, initial_params(case.model), tasks, num_steps=3, inductive=False)
    assert list(found) == ["transductive"]
    assert found["transductive"]["query_accuracy"].shape == (3, 4)
