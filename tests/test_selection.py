"""Which validation is the best, and when there have been enough."""

import math

import pytest

from distmaml.config import Evaluation
from distmaml.errors import ConfigError
from distmaml.selection import Selection, best_of, selected

DOWN = Evaluation(selection_metric="val/query_loss", selection_mode="min", patience=2)


def test_more_is_better_or_less_as_the_mode_says() -> None:
    assert Selection().after(0.5, Evaluation()).after(0.7, Evaluation()).after(0.6, Evaluation()) == (0.7, 1)
    assert Selection().after(0.5, DOWN).after(0.7, DOWN).after(0.4, DOWN) == (0.4, 0)


def test_an_equal_value_is_not_better() -> None:
    assert Selection().after(0.5, DOWN).after(0.5, DOWN) == (0.5, 1)


@pytest.mark.parametrize("options", [Evaluation(), DOWN])
def test_what_is_not_a_number_is_never_the_best(options: Evaluation) -> None:
    assert Selection().after(math.nan, options) == (None, 1)
    assert Selection().after(0.5, options).after(math.nan, options) == (0.5, 1)


def test_patience_counts_validations_without_a_better_one() -> None:
    stands = Selection().after(0.5, DOWN).after(0.6, DOWN)
    assert not stands.is_over(DOWN)
    assert stands.after(0.7, DOWN).is_over(DOWN)
    assert not stands.after(0.7, DOWN).is_over(Evaluation())


def test_a_checkpoint_gives_back_how_the_run_stood() -> None:
    stands = Selection(0.25, 3)
    assert Selection.of({"step": 7, **stands._asdict()}) == stands


def test_a_metric_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'val/query_loss' is not among the metrics: val/query_accuracy"):
        selected({"val/query_accuracy": 1.0}, DOWN)


def test_the_best_is_logged_under_what_it_measures() -> None:
    assert best_of(Selection(0.25, 3), DOWN) == {"best/query_loss": 0.25}
    assert best_of(Selection(), DOWN) == {}
