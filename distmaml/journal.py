"""A search's journal: what happened to its trials, a line each, in the order in which it happened.

All that a search knows about its past. A line is written whole and at once, so a driver that is killed leaves at most
one torn line, the last, which does not count.

Knows nothing of what a trial does.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from distmaml.errors import RunError

State = Literal["running", "finished", "pruned", "failed", "lost"]
"""A trial that is lost could not go on for a reason that may pass: a full disk, a node that is gone."""


class Move(NamedTuple):
    """A trial goes on from the weights of another."""

    trial: int
    """Its number."""
    donor: int
    """The other's."""
    values: dict[str, Any]
    """What is particular about its configuration from there on."""


@dataclass
class History:
    """What is known of one trial."""

    number: int
    """From 0, in the order in which they were planned."""
    values: dict[str, Any]
    """Its configuration, as far as it is particular, by now."""
    results: list[tuple[int, float]] = field(default_factory=list)
    """(outer step, value of the selection metric) of each report; a step that was repeated counts once."""
    state: State = "running"
    """How it stands; one whose driver was killed is running still."""
    reason: str | None = None
    """Why it failed or was lost."""
    earlier: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    """(outer step, values up to there) for each configuration that it had before."""

    @property
    def step(self) -> int:
        """Outer steps done."""
        return self.results[-1][0] if self.results else 0

    @property
    def first_values(self) -> dict[str, Any]:
        """Its configuration as it began."""
        return self.earlier[0][1] if self.earlier else self.values

    def best(self, mode: str) -> float | None:
        """The best value so far; None before the first that is a number."""
        values = [value for _, value in self.results if value == value]  # NaN is not equal to itself
        return (max(values) if mode == "max" else min(values)) if values else None

    def best_values(self, mode: str) -> dict[str, Any]:
        """The configuration with which it came to the first of its best values."""
        best = self.best(mode)
        at = next((step for step, value in self.results if value == best), self.step)
        return next((values for until, values in self.earlier if at <= until), self.values)


class Journal:
    """Reads what there is, and adds to it; one writer at a time."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.trials: dict[int, History] = {}
        """By number, in the order in which they began."""
        self.results: list[tuple[int, int, float]] = []
        """(trial number, step, value) in the order in which they came."""
        self.ended: list[int] = []
        """Numbers of the trials that are over, in the order in which they ended."""
        self.moves: dict[int, tuple[Move, ...]] = {}
        """By the outer step at which trials went on from the weights of others; empty where it was found that none
        does."""
        whole = self._whole_lines()
        for number, line in enumerate(whole, start=1):
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
                raise RunError(
                    f"line {number} of {file} is damaged ({error!r:.200}). Remove the lines from there on to go on "
                    "from what is before it, or search under another name."
                ) from error
        self._length: int | None = sum(len(line) for line in whole)  # without a torn line, which the first write drops

    def started(self, number: int, values: Mapping[str, Any]) -> None:
        """A trial begins, or goes on after an interruption."""
        self._write({"kind": "started", "trial": number, "values": dict(values)})

    def reported(self, number: int, step: int, value: float) -> None:
        """A trial has come to a step."""
        self._write({"kind": "reported", "trial": number, "step": step, "value": value})

    def over(self, number: int, state: State, reason: str | None) -> None:
        """A trial has ended."""
        self._write({"kind": "ended", "trial": number, "state": state, "reason": reason})

    def moved(self, step: int, moves: Sequence[Move]) -> None:
        """Trials that stand at a step go on from the weights of others."""
        self._write({"kind": "moved", "step": step, "moves": [move._asdict() for move in moves]})

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        if self._length is not None and self._file.exists() and self._file.stat().st_size > self._length:
            os.truncate(self._file, self._length)
        self._length = None
        line = (json.dumps(entry) + "\n").encode()
        descriptor = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)
        self._take(entry)

    def _take(self, entry: Mapping[str, Any]) -> None:
        if entry["kind"] == "moved":
            step, moves = _count(entry["step"]), [self._move(**move) for move in entry["moves"]]
            for move in moves:
                trial = self.trials[move.trial]
                trial.earlier.append((step, trial.values))
                trial.values = move.values
            self.moves[step] = tuple(moves)
            return
        number = _count(entry["trial"])
        if entry["kind"] == "started":
            self.trials.setdefault(number, History(number, _values(entry["values"]))).state = "running"
            return
        trial = self.trials[number]
        if entry["kind"] == "reported":
            step, value = _count(entry["step"]), _number(entry["value"])
            if step > trial.step:
                trial.results.append((step, value))
                self.results.append((number, step, value))
        elif entry["kind"] == "ended" and entry["state"] in get_args(State):
            trial.state, trial.reason = entry["state"], None if entry["reason"] is None else str(entry["reason"])
            if trial.state != "lost":
                self.ended.append(number)
        else:
            raise ValueError("neither started, nor reported, nor moved, nor ended in a way that is known")

    def _move(self, trial: Any, donor: Any, values: Any) -> Move:
        move = Move(_count(trial), _count(donor), _values(values))
        if move.donor not in self.trials or move.trial == move.donor:
            raise ValueError(f"a trial cannot go on as {move.donor}")
        return move

    def _whole_lines(self) -> list[bytes]:
        try:
            *whole, _torn = self._file.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RunError(
                f"{self._file} cannot be read ({error}). Bring it back, or search under another name."
            ) from None
        return [line + b"\n" for line in whole]


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{value!r:.40} is no whole number, 0 or more")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r:.40} is no number")
    return float(value)


def _values(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{value!r:.40} is no table of names and values")
    return dict(value)
