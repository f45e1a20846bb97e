"""A search's journal: what is read back is what was written, whatever killed the writer."""

import math
from pathlib import Path

import pytest

from distmaml.errors import RunError
from distmaml.journal import Journal, Move


def written(file: Path) -> Journal:
    journal = Journal(file)
    journal.started(0, {"inner_lr": 0.1})
    journal.started(1, {"inner_lr": 0.4, "clip_norm": None})
    journal.reported(1, 10, 0.5)
    journal.reported(0, 10, 0.7)
    journal.reported(1, 20, math.nan)
    journal.over(1, "failed", "a loss is no longer finite")
    return journal


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    before, after = written(tmp_path / "journal.jsonl"), Journal(tmp_path / "journal.jsonl")
    assert str(after.trials) == str(before.trials)  # NaN is not equal to itself
    assert str(after.results) == str(before.results) == "[(1, 10, 0.5), (0, 10, 0.7), (1, 20, nan)]"
    assert after.ended == [1]
    assert (after.trials[0].state, after.trials[0].step, after.trials[0].best("max")) == ("running", 10, 0.7)
    assert (after.trials[1].state, after.trials[1].reason) == ("failed", "a loss is no longer finite")
    assert after.trials[1].best("max") == 0.5
    assert after.trials[1].values == {"inner_lr": 0.4, "clip_norm": None}


def test_a_torn_last_line_does_not_count_and_the_next_one_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    written(file)
    for cut in range(1, len(file.read_bytes().splitlines()[-1]) + 1):
        whole = file.read_bytes()
        file.write_bytes(whole[:-cut])
        journal = Journal(file)
        assert journal.ended == []
        journal.over(1, "finished", None)
        assert Journal(file).trials[1].state == "finished"
        file.write_bytes(whole)


def test_a_step_that_was_done_twice_counts_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.started(0, {})
    for step, value in ((10, 0.5), (20, 0.6), (10, 0.5), (20, 0.6), (30, 0.7)):
        journal.reported(0, step, value)
    assert journal.results == [(0, 10, 0.5), (0, 20, 0.6), (0, 30, 0.7)]
    assert Journal(tmp_path / "journal.jsonl").trials[0].results == [(10, 0.5), (20, 0.6), (30, 0.7)]


def test_the_best_of_a_loss_is_the_least(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.started(0, {})
    assert journal.trials[0].best("min") is None
    for step, value in ((10, 0.5), (20, 0.3), (30, 0.7)):
        journal.reported(0, step, value)
    assert (journal.trials[0].best("min"), journal.trials[0].best("max")) == (0.3, 0.7)


@pytest.mark.parametrize("line", ["{", '{"kind": "reported", "trial": 9, "step": 1, "value": 1, "metrics": {}}', "7"])
def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "journal.jsonl"
    written(file)
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:3], line, *lines[3:]]) + "\n")
    with pytest.raises(RunError, match="line 4 of"):
        Journal(file)


@pytest.mark.parametrize(
    "line",
    [
        '{"kind": "reported", "trial": 0, "step": -20, "value": 0.5}',
        '{"kind": "reported", "trial": 0, "step": 20.0, "value": 0.5}',
        '{"kind": "reported", "trial": 0, "step": "20", "value": 0.5}',
        '{"kind": "reported", "trial": 0, "step": 9223372036854775808, "value": 0.5}',
        '{"kind": "reported", "trial": 0, "step": 20, "value": "0.5"}',
        '{"kind": "reported", "trial": 0, "step": 20, "value": true}',
        '{"kind": "started", "trial": -1, "values": {}}',
        '{"kind": "started", "trial": true, "values": {}}',
        '{"kind": "started", "trial": 2, "values": [["inner_lr", 0.1]]}',
        '{"kind": "ended", "trial": 0, "state": "won", "reason": null}',
        '{"kind": "ended", "trial": 0, "state": ["won"], "reason": null}',
        '{"kind": "begun", "trial": 0, "values": {}}',
        '{"kind": "moved", "step": 10, "moves": [{"trial": 0, "donor": 7, "values": {}}]}',
        '{"kind": "moved", "step": 10, "moves": [{"trial": 0, "donor": 0, "values": {}}]}',
        '{"kind": "moved", "step": 10, "moves": [{"trial": 0, "donor": 1, "values": 3}]}',
        "[" * 5000 + "]" * 5000,
    ],
    ids=lambda line: line[:70],
)
def test_what_cannot_have_happened_is_not_believed(tmp_path: Path, line: str) -> None:
    file = tmp_path / "journal.jsonl"
    written(file)
    file.write_bytes(file.read_bytes() + line.encode() + b"\n")
    with pytest.raises(RunError, match=r"line 7 of .* is damaged"):
        Journal(file)


def test_a_carriage_return_ends_no_line(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    written(file)
    content = file.read_bytes()
    file.write_bytes(content[:10] + b"\r" + content[11:])
    with pytest.raises(RunError, match="line 1 of"):
        Journal(file)


def test_there_is_no_journal_before_the_first_trial(tmp_path: Path) -> None:
    assert Journal(tmp_path / "no" / "journal.jsonl").trials == {}
    assert not (tmp_path / "no").exists()


def test_a_trial_that_goes_on_as_another_keeps_what_it_began_with(tmp_path: Path) -> None:
    journal = written(tmp_path / "journal.jsonl")
    journal.moved(10, [Move(0, 1, {"inner_lr": 0.48})])
    journal.moved(20, [])
    for known in (journal, Journal(tmp_path / "journal.jsonl")):
        assert known.moves == {10: (Move(0, 1, {"inner_lr": 0.48}),), 20: ()}
        assert known.trials[0].values == {"inner_lr": 0.48}
        assert known.trials[0].first_values == {"inner_lr": 0.1}
        assert known.trials[0].results == [(10, 0.7)]
        assert known.trials[0].best_values("max") == {"inner_lr": 0.1}
    journal.reported(0, 20, 0.6)
    assert journal.trials[0].best_values("max") == {"inner_lr": 0.1}  # which came to the best
    journal.reported(0, 30, 0.8)
    assert journal.trials[0].best_values("max") == {"inner_lr": 0.48}
