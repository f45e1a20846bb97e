"""What a search has found, and how it is shown."""

import math
from pathlib import Path

import pytest

from distmaml import findings, space
from distmaml.board import Board
from distmaml.config import override
from distmaml.journal import History, Journal
from distmaml.recipes import default_space
from distmaml.recipes.glyphs import glyphs_maml_5w1s
from distmaml.recipes.sinusoid import sinusoid_maml_5s

ACCURACY, LOSS = glyphs_maml_5w1s().evaluation, sinusoid_maml_5s().evaluation
TRIALS = [
    History(0, {"inner_lr": 0.1, "clip_norm": None}, [(10, 0.5), (20, 0.7)], "finished"),
    History(1, {"inner_lr": 0.25, "clip_norm": 1.0}, [(10, 0.9), (20, math.nan)], "failed", "a loss is not finite"),
    History(2, {"inner_lr": 0.4, "clip_norm": None}, [(10, 0.7)], "pruned"),
    History(3, {"inner_lr": 0.01, "clip_norm": None}, [], "running"),
]


def test_the_best_is_the_first_of_equals_and_none_that_failed() -> None:
    best, worst = findings.best_of(TRIALS, "max"), findings.best_of(TRIALS, "min")
    assert best is TRIALS[0]
    assert worst is TRIALS[0]
    assert findings.best_of(TRIALS[1:2], "max") is None
    assert findings.best_of(TRIALS[::-1], "max") is TRIALS[0]


def test_the_table_goes_from_the_best_to_those_that_failed() -> None:
    lines = findings.table(TRIALS, ACCURACY).splitlines()
    assert lines[0].split() == ["trial", "inner_lr", "clip_norm", "step", "query_accuracy", "state"]
    assert [line.split()[0] for line in lines[1:]] == ["000", "002", "003", "001"]
    assert lines[1].split() == ["000", "0.1", "none", "20", "70.00", "%", "finished"]
    assert lines[2].endswith("pruned at 10")
    assert lines[3].split()[-2:] == ["-", "running"]
    assert len({len(line) for line in lines}) == 1


def test_a_short_table_keeps_those_that_run() -> None:
    lines = findings.table(TRIALS, ACCURACY, most=2).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["000", "003"]


def test_the_least_loss_is_the_best() -> None:
    assert [line.split()[0] for line in findings.table(TRIALS, LOSS).splitlines()[1:3]] == ["000", "002"]
    assert "0.5000" in findings.table(TRIALS, LOSS)


def test_a_log_gets_a_line_for_each_trial_that_ends_and_where_the_search_stands(
    capsys: pytest.CaptureFixture[str],
) -> None:
    board = Board(ACCURACY, num_trials=8, num_steps=20)
    board.show(TRIALS[:1])
    assert capsys.readouterr().err == ""  # it is not time yet
    board.show(TRIALS, ended=TRIALS[1])
    ended, stands = capsys.readouterr().err.splitlines()
    assert ended.startswith("trial 001 failed: inner_lr=0.25  clip_norm=1  query_accuracy 90.00 %")
    assert ended.endswith("a loss is not finite")
    assert stands == "3/8 trials  50 of 160 outer steps  best 70.00 % (trial 000)"


def test_a_terminal_gets_a_table_that_is_drawn_over(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    board = Board(ACCURACY, num_trials=8, num_steps=20)
    board.show(TRIALS)
    first = capsys.readouterr().err
    board.show(TRIALS)
    assert capsys.readouterr().err == f"\x1b[{len(first.splitlines())}F\x1b[J" + first


@pytest.mark.parametrize("scheduler", ["asha", "none"])
def test_a_search_is_drawn_whatever_its_trials_came_to(tmp_path: Path, scheduler: str) -> None:
    config = override(glyphs_maml_5w1s(), {"name": "s", "num_outer_steps": 90, "val_every": 10})
    chosen = space.parse(config, default_space(config))
    journal = Journal(tmp_path / "journal.jsonl")
    for number in range(6):
        journal.started(number, space.sample(chosen, 0, number))
        for step in range(10, 40, 10):
            journal.reported(number, step, math.nan if number == 1 else 0.1 * number + 0.01 * step)
        journal.over(number, "failed" if number == 2 else "pruned", None)
    options = space.Search(scheduler=scheduler)  # type: ignore[arg-type]
    files = list(findings.draw(tmp_path / "pictures", config, options, chosen, journal))
    assert sorted(file.name for file in files) == [
        *("best_so_far.png", "budget.png", "learning_rates.png", "parallel_coordinates.html"),
    ]
    assert sorted((tmp_path / "pictures").iterdir()) == sorted(files)
