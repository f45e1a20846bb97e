"""The benchmark against other libraries: what it compares is equal, and what it says follows from what it measured."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from benchmarks import peers
from benchmarks.memory import trajectory_bytes
from benchmarks.peers import CONTENDERS, Workload, agree, module_of, random_tasks
from benchmarks.processes import MATMUL, MATMUL_FLOPS, peak_of_live_bytes
from benchmarks.throughput import Case, Series, compare, measure, ratios_of, table
from distmaml.objectives import initial_params
from tests.oracles import relative_error, unrolled


@pytest.mark.parametrize("contender", ["distmaml", "plain", "vmap"])
@pytest.mark.parametrize("num_inner_steps", [1, 3])
def test_contenders_find_the_sum_of_the_exact_gradients(contender: str, num_inner_steps: int) -> None:
    workload = Workload(num_inner_steps)
    module = module_of(workload, torch.float64)
    tasks = random_tasks(3, 0, torch.float64, shape=(1, 28, 28), num_queries=3)
    mean = unrolled(module, initial_params(module), tasks, F.cross_entropy, inner_lr=0.4, num_steps=num_inner_steps)
    found = CONTENDERS[contender](module, num_inner_steps)(tasks)
    assert relative_error({name: leaf / 3 for name, leaf in found.items()}, mean) < 1e-12


def test_another_gradient_is_not_timed() -> None:
    workload = Workload(1, model="conv4")
    with pytest.raises(SystemExit, match="fomaml does not find the gradient of the plain loop at K=1: its relative"):
        agree(["distmaml", "fomaml"], workload, shape=(1, 16, 16), num_queries=1)


def test_second_order_of_the_residual_network_is_exact() -> None:
    module = module_of(Workload(1, model="resnet12"), torch.float64)
    tasks = random_tasks(1, 0, torch.float64, shape=(3, 16, 16), num_queries=1)
    expected = unrolled(module, initial_params(module), tasks, F.cross_entropy, inner_lr=0.4, num_steps=1)
    assert relative_error(CONTENDERS["distmaml"](module, 1)(tasks), expected) < 1e-12


def test_tasks_are_5_ways_of_one_shot_and_fifteen_queries_and_differ_by_seed() -> None:
    support, query, *_ = random_tasks(2, 0, torch.float32, shape=(1, 28, 28))
    assert support.inputs.shape == (2, 5, 1, 28, 28)
    assert query.inputs.shape == (2, 75, 1, 28, 28)
    assert torch.equal(query.targets[1].bincount(), torch.full([5], 15))
    assert not torch.equal(support.inputs, random_tasks(2, 1, torch.float32, shape=(1, 28, 28)).support.inputs)


def test_flops_are_those_counted_by_hand() -> None:
    # 2 * pixels * filters * channels * 9 of each convolution, on 14x14, 7x7, 4x4 and 2x2, and of the head
    image = 2 * (196 * 64 * 1 * 9 + 49 * 64 * 64 * 9 + 16 * 64 * 64 * 9 + 4 * 64 * 64 * 9 + 64 * 5)
    assert Workload(1).task_flops == image * (3 * 75 + 9 * 1 * 5) == pytest.approx(1.43e9, rel=5e-3)
    assert Workload(5).task_flops == image * (3 * 75 + 9 * 5 * 5) == pytest.approx(2.39e9, rel=5e-3)


def test_the_trajectory_is_a_copy_of_the_parameters_for_each_step() -> None:
    parameters = (1 * 9 + 1) * 64 + 3 * (64 * 9 + 1) * 64 + 4 * 2 * 64 + (64 + 1) * 5
    assert trajectory_bytes(Workload(20)) == 20 * 4 * parameters


def test_live_bytes_are_the_most_at_once_with_those_that_autograd_keeps() -> None:
    mebibyte = torch.zeros(2**18)

    def one_at_a_time() -> None:
        for _ in range(5):
            torch.empty_like(mebibyte).fill_(1.0)

    def kept() -> torch.Tensor:
        value = mebibyte.requires_grad_()
        for _ in range(5):
            value = value.exp()  # keeps its result for the backward pass
        return value

    assert peak_of_live_bytes(one_at_a_time)[0] == 2**20
    assert peak_of_live_bytes(kept)[0] == 5 * 2**20


@pytest.mark.slow
def test_processes_are_measured_together() -> None:
    measured = [Case("distmaml", "workers"), Case(MATMUL, "workers"), Case(MATMUL, "single")]
    series = measure(Workload(1, 2), measured, rounds=2, num_workers=2)
    assert {case: len(found.rates) for case, found in series.items()} == dict.fromkeys(measured, 2)
    assert all(rate > 0 for found in series.values() for rate in found.rates)
    assert all(peak > 0 for peak in series[measured[0]].peak_bytes)


def test_ratios_and_shares_follow_from_the_rates() -> None:
    rates = {
        Case("distmaml", "workers"): [30.0, 60.0, 90.0], Case("plain", "users"): [10.0, 30.0, 30.0],
        Case("plain", "workers"): [30.0, 40.0, 45.0], Case("plain", "single"): [10.0, 20.0, 25.0],
    }  # fmt: skip
    series = {case: Series(found, [1, 3, 2]) for case, found in rates.items()}
    assert ratios_of(series, "plain") == {"users": 3.0, "workers": 1.5}  # the medians of 3, 2, 3 and of 1, 1.5, 2
    # As many FLOPs a second in products as 120 tasks have: the median of 60 tasks a second is half of them.
    product = 120 * Workload(1).task_flops / MATMUL_FLOPS
    series |= {Case(MATMUL, arrangement): Series([product], [0]) for arrangement in ("users", "workers", "single")}
    first, *_ = table(Workload(1), series, num_workers=2)
    assert (first["processes"], first["tasks_per_second"], first["peak_bytes_of_a_process"]) == (2, 60.0, 3)
    assert (first["limit"], first["share_of_limit"]) == pytest.approx((120.0, 0.5))


def result(**ratios: float) -> dict[str, Any]:
    machine = {"processor": "one", "cores": 2}
    return {"machine": machine, "ratios": {"5": {peer: {"workers": value} for peer, value in ratios.items()}}}


def test_a_ratio_that_fell_by_16_percent_fails_the_check(capsys: pytest.CaptureFixture[str]) -> None:
    recorded = result(plain=2.0, vmap=3.0, higher=2.5)  # and without `higher` now
    with pytest.raises(SystemExit) as caught:
        compare(result(plain=1.68, vmap=3.0), recorded, "earlier.json")
    line = "distmaml has fallen by more than 15% since earlier.json: 1.68 times plain at K=5, and it was 2.00."
    assert caught.value.code == line
    compare(result(plain=1.72, vmap=2.6), recorded, "earlier.json")
    assert capsys.readouterr().out == "no ratio is more than 15% below that of earlier.json\n"


def test_a_check_against_another_machine_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = {**result(plain=1.0), "machine": {"processor": "other", "cores": 64}}
    compare(result(plain=1.0), elsewhere, "earlier.json")
    assert "earlier.json is of another machine, other with 64 cores" in capsys.readouterr().out


def test_a_missing_peer_is_said_with_the_way_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "PACKAGES", ("no_such_library",))
    assert peers.missing("plain") is None
    assert peers.missing("no_such_library") == (
        "no_such_library is not installed, and is left out: pip install -e '.[bench]' -c constraints.txt"
    )
