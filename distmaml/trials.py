"""The trials of a search: their configuration, what the process of one does, and what becomes of them.

A trial is an ordinary training run, in a folder of its own with checkpoints of its own; what makes it a trial is that
its driver is that of the search.
"""

import json
import logging
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from distmaml import build, checkpoint, experiment, launch, loop, paths, population
from distmaml.board import Board
from distmaml.config import Config, override, to_json
from distmaml.files import write_text
from distmaml.findings import text
from distmaml.journal import History, Journal
from distmaml.population import Member
from distmaml.search import TIME, Ending, Report, Trial, forwarding
from distmaml.searchers import Searcher, Tried
from distmaml.segments import SegmentWriter, committed_segments, read_points
from distmaml.selection import selected
from distmaml.space import Search, Space
from distmaml.worker import LocalWorker


def of_trial(config: Config, trial: Trial) -> Config:
    """The configuration of one trial: a training run whose name ends in its number."""
    name = f"{config.run.name}-{trial.number:03d}"
    return override(config, {**trial.values, "name": name, "resume": False})


def run_trial(config: Config, gpus: float, trial: Trial, report: Report) -> None:
    """What the process of a trial does.

    Args:
      gpus: of each worker.
    """
    logging.getLogger("distmaml").setLevel(logging.ERROR)  # what is to be said of all trials, their driver says
    own = of_trial(config, trial)
    for metrics in _measured(paths.run_folder(own), config.evaluation.selection_metric, after=trial.step):
        report(metrics)
    if config.cluster.num_workers == 1:
        device = torch.device("cuda" if gpus else "cpu")
        loop.train(own, LocalWorker(device, tell=report))
    else:
        launch.fit(
            loop.train,
            own,
            name=own.run.name or "",
            storage_path=paths.ray(paths.output_dir(own.run.output_dir)) / (own.run.name or ""),
            num_workers=own.cluster.num_workers,
            gpus_per_worker=gpus,
            max_failures=own.cluster.max_failures,
            callbacks=[forwarding()],
        )


def _measured(run: Path, metric: str, *, after: int) -> list[dict[str, float]]:
    """What an earlier process of a trial measured after a step: it may have been killed before it could report."""
    step = checkpoint.newest(paths.checkpoints(run))
    if step is None:
        return []
    SegmentWriter(paths.metrics(run), step)  # settles which points count
    points = [point for segment in committed_segments(paths.metrics(run), after) for point in read_points(segment)]
    return [{TIME: point.step, **point.values} for point in points if point.step > after and metric in point.values]


def take_weights(config: Config, *, donor: Config, step: int) -> None:
    """Lets a run go on from the weights and the optimizer's state of another, as if they were its own.

    Its best model so far stays, and what is known of it.

    Args:
      config: the run's, as it goes on.
      step: of a checkpoint that both have.

    Raises:
      CheckpointError: one of them is missing or damaged.
    """
    tensors, _ = checkpoint.load(checkpoint.path_of(paths.checkpoints(paths.run_folder(donor)), step))
    own = checkpoint.path_of(paths.checkpoints(paths.run_folder(config)), step)
    _, document = checkpoint.load(own)
    checkpoint.save(own, tensors, {**document, "config": to_json(config)})


class Trials:
    """The plan of a search, and what it hears: the journal, the trials' MLflow runs and the board."""

    def __init__(
        self,
        config: Config,
        options: Search,
        proposer: Searcher,
        journal: Journal,
        tracking: Any,
        parent_run_id: str | None,
    ) -> None:
        self.journal = journal
        self._config, self._options, self._proposer = config, options, proposer
        self._tracking, self._parent = tracking, parent_run_id
        self._runs: dict[int, Any] = {}
        self._board = Board(config.evaluation, num_trials=proposer.num_trials, num_steps=config.outer.num_outer_steps)
        self._until = 0
        self._left: deque[int] = deque()

    def plan(self, until: int) -> None:
        """Makes those the trials that are left which have not come to an outer step, or to their end if it is the last.

        Those that come there stand still, until the next plan.
        """
        self._until, known = until, self.journal.trials
        at_end = until == self._config.outer.num_outer_steps
        begun = [n for n, trial in known.items() if trial.state == "running" and (at_end or trial.step < until)]
        self._left = deque([*begun, *(n for n in range(self._proposer.num_trials) if n not in known)])

    @property
    def num_left(self) -> int:
        return len(self._left)

    def next(self) -> Trial:
        number = self._left.popleft()
        known = self.journal.trials.get(number)
        if known is not None:
            return Trial(number, known.values, known.step)
        mode, ended = self._config.evaluation.selection_mode, [self.journal.trials[n] for n in self.journal.ended]
        tried = [Tried(trial.values, None if trial.state == "failed" else trial.best(mode)) for trial in ended]
        return Trial(number, self._proposer.suggest(number, tried))

    def started(self, trial: Trial) -> None:
        config, known = of_trial(self._config, trial), self.journal.trials.get(trial.number)
        folder = paths.run_folder(config)
        write_text(paths.config_file(folder), json.dumps(to_json(config), indent=2))
        build.pin_store(config)
        if trial.number not in self._runs:
            first = trial if known is None else trial._replace(values=known.first_values)
            tags = {
                "mlflow.parentRunId": self._parent or "",
                "distmaml.kind": "trial",
                "distmaml.search": self._config.run.name or "",
                "distmaml.searcher": self._options.searcher,
                "distmaml.scheduler": self._options.scheduler,
            }
            self._runs[trial.number] = experiment.begin(
                of_trial(self._config, first), folder, self._tracking, params={"trial": trial.number}, tags=tags
            )
        if self._options.scheduler == "pbt":
            changing = {f"hparam/{field}": value for field, value in trial.values.items()}
            self._runs[trial.number].add_metrics(trial.step, changing)
        self.journal.started(trial.number, trial.values)
        self._show()

    def reported(self, trial: Trial, metrics: Mapping[str, float]) -> None:
        value = selected(metrics, self._config.evaluation)
        self.journal.reported(trial.number, int(metrics[TIME]), value, metrics)
        self._show()

    def ended(self, trial: Trial, how: Ending, reason: str | None) -> None:
        known = self.journal.trials[trial.number]
        if how == "finished" and self._until <= known.step < self._config.outer.num_outer_steps:
            return  # it stands still
        run = self._runs.pop(trial.number)
        run.add_tags(
            {"distmaml.trial_state": how, **({"distmaml.pruned_at": str(known.step)} if how == "pruned" else {})}
        )
        run.end("FAILED" if how == "failed" else "FINISHED", reason=reason)
        self.journal.over(trial.number, how, reason)
        self._show(ended=known)

    def move(self, chosen: Space, step: int) -> None:
        """Lets the worst of the trials that stand still at a step go on from the weights of the best.

        Done anew for those that have not gone on since: a driver that was killed may have left it half done.
        """
        trials, mode = self.journal.trials, self._config.evaluation.selection_mode
        if step not in self.journal.moves:
            members = [Member(t.number, t.values, t.results[-1][1]) for t in trials.values() if t.state == "running"]
            seed = self._options.search_seed
            self.journal.moved(step, population.moves(chosen, members, mode=mode, seed=seed, step=step))
        for move in self.journal.moves[step]:
            if trials[move.trial].step == step:
                donor = of_trial(self._config, Trial(move.donor, trials[move.donor].values))
                take_weights(of_trial(self._config, Trial(move.trial, move.values)), donor=donor, step=step)
                self._board.tell(
                    f"step {step}: trial {move.trial:03d} goes on from the weights of {move.donor:03d}, with "
                    + "  ".join(f"{field}={text(value)}" for field, value in move.values.items())
                )

    def interrupted(self) -> None:
        """The search ends before its trials do."""
        for run in self._runs.values():
            run.end("KILLED", reason="its search was stopped", timeout=3.0)
        self._runs.clear()

    def _show(self, *, ended: History | None = None) -> None:
        self._board.show(list(self.journal.trials.values()), ended=ended)
