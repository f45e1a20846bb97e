"""The benchmarks of growth and of a step's parts: exact on what is known exactly, and whole on a small run."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import growth, pipeline
from benchmarks.growth import AXES, BASE, Cost, Point, axis, costs, model, random_tasks, slope, upper_half
from benchmarks.pipeline import CHECKPOINT, EPISODES, GRADIENT, PARTS, REST, WHOLE, Clock, milliseconds, timed_steps
from distmaml import collectives, loop, outer
from distmaml.config import override
from distmaml.meter import Meter
from distmaml.recipes.glyphs import glyphs_maml_5w1s
from distmaml.recorder import Recorder

# -------------------------------------------------------------------------------------------------- growth


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_the_slope_of_a_power_law_is_its_exponent(exponent: float) -> None:
    sizes = [1, 2, 5, 10, 20]
    assert slope(sizes, [3.0 * size**exponent for size in sizes]) == pytest.approx(exponent, abs=1e-12)


def test_the_slope_is_that_of_least_squares() -> None:
    # ln y = 0, 2, 1 over ln x = 0, 1, 2: the deviations from the means multiply to 1, and those of x squared sum to 2
    e = 2.718281828459045
    assert slope([1, e, e**2], [1.0, e**2, e]) == pytest.approx(0.5)


def test_the_upper_half_is_that_of_a_logarithmic_axis() -> None:
    assert [[sizes[place] for place in upper_half(sizes)] for sizes in ([1, 2, 4, 8, 16], [5, 10, 20, 40])] == [
        [4, 8, 16],
        [20, 40],
    ]


def test_what_grows_at_last_with_a_power_of_1_06_is_more_than_linear() -> None:
    sizes = [1.0, 2.0, 4.0, 8.0, 16.0]
    flat_at_first = growth.growth(sizes, [1.0, 1.0, *(size**1.06 for size in sizes[2:])])
    assert flat_at_first["upper_slope"] == pytest.approx(1.06)
    assert flat_at_first["at_most_linear"] is False
    assert growth.growth(sizes, [size**1.04 for size in sizes])["at_most_linear"] is True
    assert growth.growth(sizes, [5.0 + size for size in sizes])["at_most_linear"] is True


def test_each_axis_begins_at_or_passes_what_the_others_stay_at() -> None:
    assert all(getattr(BASE, name) in values for name, values in AXES.items())


def test_tasks_and_models_are_of_the_size_that_is_asked_for() -> None:
    point = Point(tasks=3, ways=7, shots=2, filters=16, queries=4)
    support, query, *_ = random_tasks(point)
    assert (support.inputs.shape, query.inputs.shape) == ((3, 14, 1, 28, 28), (3, 28, 1, 28, 28))
    assert torch.equal(support.targets[2].bincount(), torch.full([7], 2))
    num_params = (1 * 9 + 1) * 16 + 3 * (16 * 9 + 1) * 16 + 4 * 2 * 16 + (16 + 1) * 7
    assert sum(p.numel() for p in model(point).parameters()) == num_params


def test_every_point_has_a_time_for_each_round_and_live_bytes_of_its_images_at_least() -> None:
    few, many = Point(tasks=1, filters=8), Point(tasks=1, shots=4, filters=8)
    found = costs([few, many], rounds=3)
    assert all(len(cost.seconds) == 3 and min(cost.seconds) > 0 for cost in found.values())
    activations = 4 * 5 * 4 * 8 * 14 * 14  # bytes of the first layer's output alone: float32, 5 ways of 4 shots
    assert found[many].live_bytes > max(found[few].live_bytes, activations)


def test_filters_are_reported_against_the_number_of_parameters() -> None:
    points = [BASE._replace(filters=filters) for filters in AXES["filters"]]
    costs_of = {point: Cost([9.0, 1.0 * point.filters**2, 1e9], point.filters) for point in points}
    along = axis("filters", costs_of)
    assert along["seconds"] == [256.0, 1024.0, 4096.0, 9216.0, 16384.0]  # the medians
    assert along["parameters"] == [sum(p.numel() for p in model(point).parameters()) for point in points]
    # Four times the parameters, less a few, for twice the filters; the seconds four times, the bytes twice.
    assert along["growth"]["seconds"]["slope"] == pytest.approx(1.0, abs=0.03)
    assert along["growth"]["live_bytes"]["slope"] == pytest.approx(0.5, abs=0.015)


# ------------------------------------------------------------------------------------------ a step by its parts


def test_a_clock_gives_each_second_to_the_part_that_took_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def take(seconds: float) -> float:
        nonlocal now
        now += seconds
        return seconds

    def tasks() -> Iterator[int]:
        for number in (1, 2, 3):
            take(0.25)
            yield number

    clock = Clock()
    work, save = clock.part("work", take), clock.part("save", take)
    assert work(100.0) == 100.0  # before the first step
    for number in clock.loop(tasks)():
        work(2.0)
        work(1.0)
        take(0.5)
        if number == 2:
            save(8.0)
            break
    take(1000.0)
    assert clock.steps == [
        {EPISODES: 0.25, "work": 3.0, WHOLE: 3.75},
        {EPISODES: 0.25, "work": 3.0, "save": 8.0, WHOLE: 11.75},
    ]


def test_milliseconds_are_medians_and_a_checkpoint_is_spread_over_the_steps_between_two() -> None:
    nothing = dict.fromkeys(PARTS, 0.0)
    steps = [{**nothing, GRADIENT: 0.1}, {**nothing, GRADIENT: 0.5, CHECKPOINT: 0.02}, {**nothing, GRADIENT: 0.2}]
    assert milliseconds(steps, 10) == {**nothing, GRADIENT: 200.0, CHECKPOINT: 2.0}
    assert milliseconds(steps[:1], 10) == {**nothing, GRADIENT: 100.0}


def test_the_parts_of_a_run_add_up_to_its_steps_and_the_product_is_as_before(output_dir: Path) -> None:
    config = override(
        glyphs_maml_5w1s(),
        {"name": "timed", "output_dir": output_dir, "num_outer_steps": 3, "meta_batch_size": 2, "num_filters": 8,
         "val_every": 0, "log_every": 1, "checkpoint_every": 2},
    )  # fmt: skip
    wrapped = [(owner, name, getattr(owner, name)) for owner, name in [
        (loop, "prefetched"), (outer, "chunk_sum"), (outer, "outer_step"), (collectives, "mean_over_tasks"),
        (Recorder, "points"), (Recorder, "checkpoint"), (Meter, "read"),
    ]]  # fmt: skip
    begun = time.perf_counter()
    steps = timed_steps(config)
    elapsed = time.perf_counter() - begun
    assert len(steps) == 3
    for step in steps:
        assert sum(step[part] for part in PARTS) == pytest.approx(step[WHOLE], rel=1e-9)
        assert step[REST] >= 0
        assert all(step[part] > 0 for part in PARTS if part not in (CHECKPOINT, REST))
    assert [step[CHECKPOINT] > 0 for step in steps] == [False, True, True]  # in turn, and at the end
    assert sum(step[WHOLE] for step in steps) < elapsed
    assert all(getattr(owner, name) is function for owner, name, function in wrapped)


def test_building_is_counted_in_images_of_support_and_query() -> None:
    tasks = random_tasks(Point(tasks=3, ways=5, shots=2, queries=4))
    assert pipeline._num_images(tasks) == 3 * 5 * (2 + 4)
