"""The trials of a search as its driver sees them: the plan, the journal, their MLflow runs."""

import json
import shutil
from collections import deque
from collections.abc import Mapping
from typing import Any

from distmaml import build, experiment, paths, population
from distmaml.board import Board
from distmaml.config import Config, to_json
from distmaml.files import write_text
from distmaml.findings import text
from distmaml.interrupt import Interrupt
from distmaml.journal import History, Journal
from distmaml.population import Member
from distmaml.search import TIME, Ending, Trial
from distmaml.searchers import Searcher, Tried
from distmaml.selection import selected
from distmaml.space import Search, Space
from distmaml.trial import of_trial, take_weights

SETTLE_SECONDS = 30.0
"""For what trials that have ended still have to tell MLflow; the rest waits in their folders."""
STOP_SECONDS = 3.0
"""The same where somebody has stopped the search."""


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
        interrupt: Interrupt,
    ) -> None:
        self.journal = journal
        self._config, self._options, self._proposer = config, options, proposer
        self._tracking, self._parent, self._interrupt = tracking, parent_run_id, interrupt
        self._runs: dict[int, Any] = {}
        self._board = Board(config.evaluation, num_trials=proposer.num_trials, num_steps=config.outer.num_outer_steps)
        self._until = 0
        self._left: deque[int] = deque()

    def settle(self, pruned: frozenset[int]) -> None:
        """Makes up for what an earlier driver was killed before it could do.

        Args:
          pruned: trials that are to end where they are, some of which may be running still.
        """
        for number in sorted(pruned):
            if self.journal.trials[number].state == "running":
                self.journal.over(number, "pruned", None)
        for number in self.journal.ended:
            known = self.journal.trials[number]
            folder = paths.run_folder(of_trial(self._config, Trial(number, known.values)))
            if experiment.status(folder) in (None, "KILLED"):
                self._begin_run(known)
                self._end_run(known)

    def plan(self, until: int) -> None:
        """Makes those the trials that are left which have not come to an outer step, or to their end if it is the last.

        Those that come there stand still, until the next plan.
        """
        self._until, known = until, self.journal.trials
        at_end = until == self._config.outer.num_outer_steps
        begun = [n for n, t in known.items() if t.state in ("running", "lost") and (at_end or t.step < until)]
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
        with self._interrupt.deferred():
            config = of_trial(self._config, trial)
            write_text(paths.config_file(paths.run_folder(config)), json.dumps(to_json(config), indent=2))
            build.pin_store(config)
            self.journal.started(trial.number, trial.values)
            if trial.number not in self._runs:
                self._begin_run(self.journal.trials[trial.number])
            if self._options.scheduler == "pbt":
                changing = {f"hparam/{field}": value for field, value in trial.values.items()}
                self._runs[trial.number].add_metrics(trial.step, changing)
        self._show()

    def reported(self, trial: Trial, metrics: Mapping[str, float]) -> None:
        self.journal.reported(trial.number, int(metrics[TIME]), selected(metrics, self._config.evaluation))
        self._show()

    def ended(self, trial: Trial, how: Ending, reason: str | None) -> None:
        known = self.journal.trials[trial.number]
        if how == "finished" and self._until <= known.step < self._config.outer.num_outer_steps:
            return  # it stands still
        with self._interrupt.deferred():
            self.journal.over(trial.number, how, reason)  # first: what is decided stays so, whatever happens
            self._end_run(known)
        # Of workers that were killed with the process of their trial.
        ray_folder = paths.ray(paths.output_dir(self._config.run.output_dir))
        shutil.rmtree(ray_folder / (of_trial(self._config, trial).run.name or ""), ignore_errors=True)
        self._show(ended=known)

    def _begin_run(self, known: History) -> None:
        first = of_trial(self._config, Trial(known.number, known.first_values))
        searched = {"searcher": self._options.searcher, "scheduler": self._options.scheduler}
        self._runs[known.number] = experiment.begin(
            first,
            paths.run_folder(first),
            self._tracking,
            params={"trial": known.number, **searched},
            tags={
                "mlflow.parentRunId": self._parent or "",
                "distmaml.kind": "trial",
                "distmaml.search": self._config.run.name or "",
                "distmaml.trial": str(known.number),
                "distmaml.space": " ".join(self._options.space),
                **{f"distmaml.{key}": value for key, value in searched.items()},
            },
        )

    def _end_run(self, known: History) -> None:
        run = self._runs.pop(known.number)
        pruned = {"distmaml.pruned_at": str(known.step)} if known.state == "pruned" else {}
        run.add_tags({"distmaml.trial_state": known.state, **pruned})
        status = "FAILED" if known.state in ("failed", "lost") else "FINISHED"
        run.end(status, reason=known.reason, timeout=SETTLE_SECONDS, wait=False)

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

    def finished(self) -> None:
        """All trials have ended: waits, for a while, until MLflow knows how."""
        self._settle(SETTLE_SECONDS)

    def _settle(self, seconds: float) -> None:
        from distmaml.tracking.runs import settle  # which imports mlflow

        settle(self._tracking, seconds)

    def interrupted(self) -> None:
        """The search ends before its trials do."""
        for number in list(self._runs):
            known = self.journal.trials[number]
            if known.state == "running":
                run = self._runs.pop(number)
                run.end("KILLED", reason="its search was stopped", timeout=STOP_SECONDS, wait=False)
            else:
                self._end_run(known)
        self._settle(STOP_SECONDS)

    def _show(self, *, ended: History | None = None) -> None:
        self._board.show(list(self.journal.trials.values()), ended=ended)
