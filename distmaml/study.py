"""The life of one search: its checks, its MLflow runs, its trials on the cluster, going on with it, and its best trial.

A search is a run in MLflow, and each of its trials a run below it.
"""

import functools
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from distmaml import build, experiment, findings, launch, loop, paths, preflight, rehearsal, report, space, workers
from distmaml.config import Config, as_recipe, changes, is_repeated, override, to_json
from distmaml.errors import ClusterError, DistmamlError, RunError, TrackingError
from distmaml.files import write_text
from distmaml.interrupt import Interrupt, interruptible
from distmaml.journal import History, Journal
from distmaml.progress import say
from distmaml.recipes import RECIPES, default_space
from distmaml.scoring import Evaluated, Intervals
from distmaml.search import Halving, Trial, pruned, search
from distmaml.searchers import searcher
from distmaml.space import Search
from distmaml.trial import of_trial, run_trial
from distmaml.trials import Trials

log = logging.getLogger("distmaml")


class Study(NamedTuple):
    """What a search came to.

    Attributes:
      trials: what is known of each, in the order in which they began.
      best: the best of them.
      config: of the best trial.
      scores: of the best trial's model on test episodes; None where the search has no test.
      registered: what its model is found under in MLflow's registry; None where it is not.
      compare: what opens the MLflow page that compares the trials, a line each.
    """

    name: str
    folder: Path
    trials: list[History]
    best: History
    config: Config
    scores: Intervals | None
    registered: str | None
    compare: tuple[str, ...]


def tune(config: Config, options: Search) -> Study:
    """Searches, and tests the best trial.

    Args:
      config: what all trials have in common; its name is the search's.

    Raises:
      DistmamlError: whatever is wrong, before the cluster starts where that can be known; or no trial came to a result.
      KeyboardInterrupt: SIGINT or SIGTERM came; all is put in order.
    """
    with interruptible() as interrupt:
        return _tune(config, options, interrupt)


def _tune(config: Config, options: Search, interrupt: Interrupt) -> Study:
    config = _common(workers.checked(config))
    name, output = config.run.name or "", paths.output_dir(config.run.output_dir)
    folder = _folder(config)
    options = replace(options, space=options.space or default_space(config, rates_only=options.scheduler == "pbt"))
    chosen = space.parse(config, options.space)
    space.check_search(config, options, chosen)
    space.check_space(config, chosen)
    mode = config.evaluation.selection_mode
    proposer = searcher(options.searcher, chosen, num_trials=options.num_samples, seed=options.search_seed, mode=mode)
    if not config.run.resume and _is_interrupted(config, options, folder):
        say(f"{name} was stopped on its way: it goes on.")
        config = override(config, {"resume": True})
    _check_folder(config, options, folder)
    rehearsal.rehearse(replace(config, run=replace(config.run, resume=False)))
    tracking = experiment.open_tracking(config, resuming=folder if config.run.resume else None)
    if not tracking.reachable:
        raise TrackingError(
            f"the MLflow server at {tracking.uri} cannot be reached, and a search begins with a run there, to which "
            "its trials belong. Start it, or leave --tracking-uri out for the embedded database."
        )
    if not config.run.resume:
        preflight.remove_false_start(folder)
    tags = {"distmaml.kind": "search", "distmaml.searcher": options.searcher, "distmaml.scheduler": options.scheduler}
    described = {f"space_{field}": str(domain) for field, domain in chosen.items()} | {
        key: value for key, value in asdict(options).items() if key not in ("space", "max_concurrent")
    }
    with experiment.tracked(config, folder, tracking, interrupt, params=described, tags=tags) as run:
        write_text(paths.search_file(folder), space.to_text(config, options))
        journal = Journal(paths.journal(folder))  # now that no other process writes it
        changing = [f"hparam/{field}" for field in chosen] if options.scheduler == "pbt" else []
        view = experiment.view(config, run, tracking, params=_axes(chosen), curves=changing, of_search=True)
        compare = experiment.how_to_compare(tracking, output, view)
        say("The trials in MLflow: " + ", then ".join(compare))
        trials = Trials(config, options, proposer, journal, tracking, run.run_id, interrupt)
        with workers.cluster(config, launch.worker_environment()) as resources:
            concurrent = _room(config, options, resources)
            say(
                f"{workers.count(proposer.num_trials, 'trial')}, {concurrent} at a time on "
                f"{workers.described(resources)}; the search lies in {folder}"
            )
            with _told_how_to_go_on(name):
                _run_all(config, options, chosen, trials, resources, concurrent)
            best = _best(config, journal)
            winner = of_trial(config, Trial(best.number, best.best_values(mode)))
            with _told_how_to_go_on(name):
                tested = _test(winner, resources)
        _record(config, options, chosen, journal, run, best=best, winner=winner, tested=tested)
        registered = experiment.register(winner, paths.model(paths.run_folder(winner)), run, tracking)
        experiment.send_left_over(
            [paths.run_folder(of_trial(config, Trial(n, t.values))) for n, t in journal.trials.items()], tracking
        )
    scores = None if tested is None else tested.scores
    return Study(name, folder, list(journal.trials.values()), best, winner, scores, registered, compare)


def _record(
    config: Config,
    options: Search,
    chosen: space.Space,
    journal: Journal,
    run: Any,
    *,
    best: History,
    winner: Config,
    tested: Evaluated | None,
) -> None:
    """Leaves what the search came to in its folder and in its MLflow run."""
    folder = _folder(config)
    value = best.best(config.evaluation.selection_mode)
    assert value is not None
    # A search that goes on later has done more steps, and what it finds then is the newest.
    steps = sum(trial.step for trial in journal.trials.values())
    run.add_metrics(steps, {f"best/{config.evaluation.selected_quantity}": value})
    run.add_tags({"distmaml.best_trial": winner.run.name or ""})
    write_text(paths.champion(folder), json.dumps(as_recipe(_at_full_length(winner)), indent=2) + "\n")
    for file in (paths.search_file(folder), paths.champion(folder)):
        run.add_artifact(file, None)
    if tested is not None:
        run.add_metrics(steps, report.metrics_of(tested.scores))
        for file in report.write_evaluation(winner, folder, tested):
            run.add_artifact(file, "evaluation")
    for picture in _draw(config, options, chosen, journal, folder):
        run.add_artifact(picture, "pictures")


def _folder(config: Config) -> Path:
    return paths.searches(paths.output_dir(config.run.output_dir)) / (config.run.name or "")


@contextmanager
def _told_how_to_go_on(name: str) -> Iterator[None]:
    try:
        yield
    except BaseException:
        say(f"Nothing of it is lost: jobs/tune.py --resume {name} goes on.")
        raise


def _best(config: Config, journal: Journal) -> History:
    """The best trial.

    Raises:
      DistmamlError: there is none; why, of the first that failed.
    """
    trials = list(journal.trials.values())
    lost = [trial for trial in trials if trial.state == "lost"]
    if lost:
        say(
            f"{workers.count(len(lost), 'trial')} could not be trained to the end, {lost[0].number:03d} since "
            f"{lost[0].reason}. --resume {config.run.name} tries again."
        )
    best = findings.best_of(trials, config.evaluation.selection_mode)
    if best is None:
        reasons = [trial.reason for trial in trials if trial.reason] or ["no validation gave a number"]
        raise DistmamlError(f"none of the {workers.count(len(trials), 'trial')} came to a result: {reasons[0]}")
    return best


def _at_full_length(config: Config) -> Config:
    """As many outer steps as the recipe has, unless the search's trials have more."""
    usual = RECIPES[config.recipe]().outer.num_outer_steps if config.recipe in RECIPES else 0
    return override(config, {"num_outer_steps": max(usual, config.outer.num_outer_steps)})


def _run_all(
    config: Config,
    options: Search,
    chosen: space.Space,
    trials: Trials,
    resources: Mapping[str, float],
    concurrent: int,
) -> None:
    """Brings all trials to their ends."""
    evaluation, steps = config.evaluation, config.outer.num_outer_steps
    halving, ended = None, frozenset[int]()
    if options.scheduler == "asha":
        first, earlier = space.first_rung(options, config), tuple(trials.journal.results)
        halving = Halving(first, steps, options.reduction_factor, replay=earlier)
        ended = pruned(halving, evaluation.selection_metric, evaluation.selection_mode)
    try:
        trials.settle(ended)
        for stage in space.stages(options, config):
            trials.plan(stage)
            if trials.num_left:
                _search(config, halving, trials, resources, concurrent, until=stage)
            if stage < steps:
                trials.move(chosen, stage)
        trials.finished()
    except BaseException:
        trials.interrupted()
        raise


def _search(
    config: Config,
    halving: Halving | None,
    trials: Trials,
    resources: Mapping[str, float],
    concurrent: int,
    *,
    until: int,
) -> None:
    nested = config.cluster.team[1] > 1
    workers.check_precision(config, resources)
    gpus = workers.gpus_per_worker(config, resources)
    # The process of a nested trial only waits for its workers, which ask for what they need.
    wants = {"node:__internal_head__": 0.001} if nested else {"CPU": 1.0, **({"GPU": gpus} if gpus else {})}
    search(
        functools.partial(run_trial, config, gpus),
        trials,
        trials,
        halving=halving,
        until=until if until < config.outer.num_outer_steps else None,
        metric=config.evaluation.selection_metric,
        mode=config.evaluation.selection_mode,
        max_concurrent=concurrent,
        resources=wants,
        max_failures=config.cluster.max_failures,
        storage_path=paths.ray(paths.output_dir(config.run.output_dir)) / f"{config.run.name}-search",
        name=config.run.name or "",
    )


def _draw(config: Config, options: Search, chosen: space.Space, journal: Journal, folder: Path) -> list[Path]:
    """What goes wrong with pictures must not make a failure of a search that is done."""
    files = []
    try:
        for file in findings.draw(paths.artifacts(folder), config, options, chosen, journal):
            files.append(file)
    except Exception as error:
        log.warning("Not all pictures could be drawn (%s). All else is there.", build.described(error))
    return files


def _test(winner: Config, resources: Mapping[str, float]) -> Evaluated | None:
    """The best trial's model on the test split, which no trial has seen."""
    if not winner.evaluation.num_test_episodes:
        return None
    say(f"Testing the best: {winner.run.name}")
    found: Evaluated = workers.fit(loop.evaluate, winner, f"{winner.run.name}-test", resources, max_failures=0)
    return found


# ---------------------------------------------------------------------------------------------- checks


def _common(config: Config) -> Config:
    """What all trials have in common: a report, and so a checkpoint, at each validation."""
    run = replace(
        config.run,
        experiment=config.run.experiment or f"{config.recipe}-search",
        checkpoint_every=config.evaluation.val_every or config.run.checkpoint_every,
    )
    return replace(config, run=run)


def _is_interrupted(config: Config, options: Search, folder: Path) -> bool:
    """Whether a search that was stopped on its way is asked for again, by the same settings: then it goes on."""
    if not paths.search_file(folder).exists() or experiment.status(folder) == "FINISHED":
        return False
    before, searched = settings_of(config.run.name or "", config.run.output_dir)
    return searched == options and is_repeated(to_json(before), config)


def _check_folder(config: Config, options: Search, folder: Path) -> None:
    """Refuses to begin a search of a name that is taken, or to go on with one that is not there or is another.

    Raises:
      RunError: naming what stands in the way.
    """
    name, file = config.run.name, paths.search_file(folder)
    runs = paths.runs(paths.output_dir(config.run.output_dir))
    if not config.run.resume:
        if file.exists():
            raise RunError(
                f"a search named {name!r} exists in {folder}. Go on with it by --resume, or choose another --name."
            )
        taken = sorted(
            path.name for path in runs.glob("*") if re.fullmatch(re.escape(f"{name}-") + r"\d{3,}", path.name)
        )
        if taken:
            raise RunError(
                f"runs in {runs} have the names of its trials: {', '.join(taken[:3])}. Choose another --name."
            )
        return
    Journal(paths.journal(folder))  # which tells of damage before anything is written
    before, searched = settings_of(config.run.name or "", config.run.output_dir)
    # A population of another size would have taken other decisions.
    may_change = ("max_concurrent",) if options.scheduler == "pbt" else ("max_concurrent", "num_samples")
    differences = changes(to_json(before), config)
    differences += [
        f"{key}={value!r} (was {getattr(searched, key)!r})"
        for key, value in asdict(options).items()
        if key not in may_change and value != getattr(searched, key)
    ]
    now, then = to_json(config), to_json(before)
    # Which a run may change, but its other trials were judged with the old ones.
    differences += [f"{k}={now[k]!r} (was {then[k]!r})" for k in ("num_outer_steps", "patience") if now[k] != then[k]]
    if differences:
        raise RunError(
            f"the search {name!r} cannot go on with {', '.join(differences)}. Take the old values or another --name."
        )


def settings_of(name: str, output_dir: Path | None) -> tuple[Config, Search]:
    """What the search of a name searches, and how.

    Raises:
      RunError: there is none; the message names those that are.
      ConfigError: its file is damaged.
    """
    searches = paths.searches(paths.output_dir(output_dir))
    return space.read(paths.search_file(preflight.known_folder("search", searches, name, "search.json")))


def _room(config: Config, options: Search, resources: Mapping[str, float]) -> int:
    """How many trials the cluster can carry at a time, and no more than are asked for.

    Raises:
      ClusterError: not a single one.
    """
    team = config.cluster.team[1]
    wants = {"CPU": float(team), "GPU": team * workers.gpus_per_worker(config, resources)}
    room = min(int(resources.get(kind, 0.0) / each) for kind, each in wants.items() if each)
    if room < 1:
        needs = " and ".join(workers.count(each, kind) for kind, each in wants.items() if each)
        raise ClusterError(
            f"a trial needs {needs}, and the cluster has {workers.described(resources)}: none could ever start. Lower "
            "--num-workers, or add nodes."
        )
    return room if options.max_concurrent is None else min(room, options.max_concurrent)


def _axes(chosen: space.Space) -> list[str]:
    """The parameters that the charts are drawn over: the searched ones, with learning rates as logarithms."""
    rates = [f"log10_{field}" for field in ("inner_lr", "outer_lr") if field in chosen]
    return [*rates, *(field for field in chosen if field not in ("inner_lr", "outer_lr"))]
