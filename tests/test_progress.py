"""What somebody sees who waits for a run."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import pytest

from distmaml import paths, progress
from distmaml.config import Config, override
from distmaml.progress import Progress, line
from distmaml.recipes import RECIPES
from distmaml.recorder import EvaluationProgress

Seen: TypeAlias = tuple[float, Mapping[str, float]]
"""Seconds after what was seen before, and what stands in the file then."""


@pytest.fixture
def config() -> Config:
    return override(RECIPES["glyphs-maml-5w1s"](), {"num_outer_steps": 200})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds since some moment, to be set by a test."""
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_a_line_says_how_far_the_training_is_and_how_long_it_will_take(config: Config, clock: list[float]) -> None:
    values = {"train/query_accuracy": 0.875, "val/query_accuracy": 0.5, "system/tasks_per_second": 31.4}
    clock[0] += 60  # for 40 of 200 steps
    said = line(config, {"step": 50, **values}, (1000.0, 10))
    assert said == "step 50/200  train accuracy 87.5 %  val accuracy 50.0 %  31 tasks/s  3:45 left"
    assert line(config, {"step": 200}, (1000.0, 10)) == "step 200/200"
    assert line(config, {"step": 10}, (1000.0, 10)) == "step 10/200"


def test_a_line_says_how_far_the_test_is(config: Config, clock: list[float]) -> None:
    clock[0] += 90  # for a fourth of it
    assert line(config, {"step": 200, "tested": 0.35}, (1000.0, 0.1)) == "test 35 %  3:54 left"
    assert line(config, {"step": 200, "tested": 1.0}, (1000.0, 0.1)) == "test 100 %"


def followed(config: Config, folder: Path, seen: list[Seen], clock: list[float]) -> None:
    watcher = Progress(config, folder)
    for number, (seconds, values) in enumerate(seen, start=1):
        clock[0] += seconds
        watcher._follow(values, last=number == len(seen))


def test_a_log_has_the_last_step_and_of_a_long_test_a_line_now_and_then(
    config: Config, tmp_path: Path, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    training: list[Seen] = [(0.0, {"step": 1}), (1.0, {"step": 2}), (1.0, {"step": 200})]
    short = [*training, (1.0, {"step": 200, "tested": 0.5}), (1.0, {"step": 200, "tested": 1.0})]
    followed(config, tmp_path, short, clock)
    assert capsys.readouterr().err.splitlines() == ["step 1/200", "step 200/200"]
    long = [*training, *[(6.0, {"step": 200, "tested": number / 4}) for number in range(1, 5)]]
    followed(config, tmp_path, long, clock)
    assert capsys.readouterr().err.splitlines() == ["step 1/200", "step 200/200", "test 75 %  0:06 left"]


def test_a_terminal_keeps_the_last_step_above_the_test(
    config: Config,
    tmp_path: Path,
    clock: list[float],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    followed(config, tmp_path, [(0.0, {"step": 200}), (1.0, {"step": 200, "tested": 0.5})], clock)
    assert capsys.readouterr().err == "\r\x1b[Kstep 200/200\n\r\x1b[Ktest 50 %"


def test_the_share_of_a_test_is_said_once_a_second(config: Config, tmp_path: Path, clock: list[float]) -> None:
    config = override(config, {"name": "run", "output_dir": tmp_path})
    file = paths.progress(paths.run_folder(config))
    file.parent.mkdir(parents=True)
    tell = EvaluationProgress(config, 200)
    tell(0.1)
    assert not file.exists(), "a test of less than a second has no progress"
    for seconds, share, shown in ((1.1, 0.2, 0.2), (0.5, 0.3, 0.2), (0.6, 0.4, 0.4)):
        clock[0] += seconds
        tell(share)
        assert json.loads(file.read_text()) == {"step": 200, "tested": shown}


def test_progress_follows_the_file(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of an earlier start is not shown, and the last one is, however short the time was."""
    monkeypatch.setattr(progress, "LOOK_SECONDS", 0.01)
    paths.progress(tmp_path).write_text(json.dumps({"step": 17}))
    with Progress(config, tmp_path):
        paths.progress(tmp_path).write_text(json.dumps({"step": 200}))
    assert capsys.readouterr().err == "step 200/200\n"
