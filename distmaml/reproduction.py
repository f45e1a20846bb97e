"""Published experiments once more, for as many tasks as one has time for: each recipe and seed is a run and a row.

The same command again goes on where it was stopped: a row that is there is left alone, and a run that was interrupted
goes on.
"""

import json
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distmaml import checkpoint, comparison, driver, experiment, paths, preflight, workers
from distmaml.config import as_recipe, flatten, from_json, override, read
from distmaml.errors import ConfigError, DistmamlError, RunError, first_line
from distmaml.interrupt import interruptible
from distmaml.plans import Plan, Request, plans_of
from distmaml.progress import say
from distmaml.published import PUBLISHED
from distmaml.recipes import RECIPES
from distmaml.rows import Figure, Row, share_of_protocol
from distmaml.segments import Point, committed_segments, committed_step, read_points
from distmaml.table import figure_text, published_text
from distmaml.tracking.outbox import Outbox


def reproduce(request: Request) -> list[str]:
    """Trains what has no row yet, writes the rows, and writes the table and its picture anew from all rows there are.

    Returns:
      The rows that could not be made; each was said why.

    Raises:
      ConfigError, RunError: before any training, what is wrong whatever the data are; at the end, that the table
        cannot be written, when the rows are there.
      KeyboardInterrupt: SIGINT or SIGTERM came; the same command goes on.
    """
    with interruptible():
        plans = [plan._replace(config=workers.checked(plan.config)) for plan in plans_of(request)]
        comparison.check_table(request.table)
        comparison.read_rows(request.results)
        _check_writable(request.results, "--results")
        _check_writable(comparison.picture_of(request.table).parent, "--table")
        failed = []
        for number, plan in enumerate(plans):
            file = comparison.file_of(request.results, plan.name)
            try:
                if file.exists():
                    _check_same(comparison.read_row(file), plan, file)
                    say(f"{plan.name} is there: {file}")
                    continue
                say(f"{plan.name} ({number + 1} of {len(plans)}): {plan.config.outer.num_outer_steps} outer steps")
                _train(plan)
                row = row_of(plan)
                comparison.write_row(request.results, row)
                say(f"{plan.name}: {_in_short(row)}")
            except DistmamlError as error:
                say(f"error: {plan.name}: {error}")
                failed.append(plan.name)
            except KeyboardInterrupt:
                say(f"Stopped in {plan.name}, row {number + 1} of {len(plans)}: the same command goes on with it.")
                raise
            with suppress(DistmamlError):  # said at the end, when all rows are there
                comparison.write_table(request.table, request.results)
        comparison.write_table(request.table, request.results)
    return failed


def listing(request: Request) -> str:
    """The recipes with what their papers print, and the rows that are there, to print."""
    rows = comparison.read_rows(request.results)
    table = [("recipe", "published", "rows")]
    for recipe in RECIPES:
        mine = [row.name.removeprefix(f"reproduce-{recipe}-") for row in rows if row.recipe == recipe]
        table.append((recipe, published_text(PUBLISHED.get(recipe)), " ".join(mine) or "-"))
    widths = [max(len(line[column]) for line in table) for column in range(2)]
    return "\n".join(f"{recipe:{widths[0]}}  {published:{widths[1]}}  {mine}" for recipe, published, mine in table)


def _check_writable(folder: Path, option: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RunError(f"cannot write in {folder} ({error}). Name another place by {option}.") from error


# ----------------------------------------------------------------------------------------------------- rows


def _check_same(row: Row, plan: Plan, file: Path) -> None:
    """Refuses to take a row for that of a plan which it is not, since the recipe has changed.

    Raises:
      RunError: naming what differs.
    """
    try:
        before = as_recipe(from_json(row.config))  # an option that has come since is what it was by default
    except ConfigError as error:
        raise RunError(
            f"{file} is of another version of distmaml: {error} Move it away, or name another folder by --results."
        ) from error
    different = _differences(before, plan)
    if different:
        raise RunError(
            f"{file} was made with other settings: {', '.join(different)}. Move it away, or name another folder by "
            "--results."
        )


def _differences(before: Mapping[str, Any], plan: Plan) -> list[str]:
    """In what an earlier configuration, from `as_recipe`, is not that of a plan; where the data lie does not count."""
    now = as_recipe(plan.config)
    return [
        f"{name}={now.get(name)!r} (was {was!r})"
        for name, was in before.items()
        if name != "data_dir" and now.get(name) != was
    ]


def _train(plan: Plan) -> None:
    """Trains and tests a run, from where it stands.

    Raises:
      DistmamlError: as `driver.train`, or what lies there under its name is another run.
    """
    folder, config = paths.run_folder(plan.config), plan.config
    steps = checkpoint.steps(paths.checkpoints(folder))
    if steps and paths.config_file(folder).exists():
        different = _differences(as_recipe(read(paths.config_file(folder))), plan)
        if different:
            raise RunError(
                f"{folder} holds a run of that name that was trained with other settings: {', '.join(different)}. Move "
                "it away, or name another --output-dir."
            )
        if experiment.status(folder) == "FINISHED":
            say(f"It is trained already: the row is that of the run in {folder}.")
            return
        with preflight.claimed(folder):
            say(f"{plan.name} was stopped after {steps[-1]} outer steps: it goes on.")
        config = override(config, {"resume": True})  # what decides no figure may be another, as where the data lie
    driver.train(config)


def row_of(plan: Plan) -> Row:
    """What the run of a plan came to, by the files in its folder.

    Raises:
      RunError: the test's file is not there, or not whole.
    """
    folder = paths.run_folder(plan.config)
    config, scores_file = read(paths.config_file(folder)), folder / "evaluation-test.json"
    try:
        tested = json.loads(scores_file.read_text())
    except (OSError, ValueError) as error:
        raise RunError(
            f"{scores_file}, the test of a run that has ended, cannot be read ({first_line(error)}). Move {folder} "
            "away to train it again."
        ) from error
    points = [point for segment in committed_segments(paths.metrics(folder), -1) for point in read_points(segment)]
    scores, done = tested["scores"], committed_step(paths.metrics(folder))
    is_loss = "query_accuracy" not in scores["transductive"]
    metric = "query_loss" if is_loss else "query_accuracy"
    num_steps = len(scores["transductive"][metric]) - 1

    def shown(value: float | None) -> float | None:
        return None if value is None or not math.isfinite(value) else (value if is_loss else 100 * value)

    def figure(mode: str, step: int) -> Figure:
        return {name: shown(value) for name, value in scores[mode][metric][step].items()}

    validation = [(point.step, shown(point.values[f"val/{metric}"])) for point in points
                  if f"val/{metric}" in point.values]  # fmt: skip
    published = PUBLISHED.get(config.recipe)
    algorithm, setting = described(config.recipe)
    return Row(
        name=plan.name,
        recipe=config.recipe,
        algorithm=algorithm,
        setting=setting,
        command=plan.command,
        overrides=plan.overrides,
        schedules=plan.schedules,
        seed=config.outer.seed,
        tasks=plan.tasks,
        outer_steps=done,
        share_of_paper=share_of_protocol(published, done, config.outer.meta_batch_size),
        chosen_step=tested["outer_steps"],
        published=published,
        unit="mean squared error" if is_loss else "percent",
        inner_steps=num_steps,
        transductive=figure("transductive", num_steps),
        inductive=figure("inductive", num_steps) if "inductive" in scores else None,
        num_test_episodes=tested["num_episodes"],
        query_loss={str(step): figure("transductive", step) for step in (1, 5, 10) if is_loss and step <= num_steps},
        validation=validation,
        still_rose=still_rose(validation, lower_is_better=is_loss),
        minutes=minutes_of(Outbox(folder), points),
        cpu_seconds=sum(point.values.get("system/cpu_seconds", 0.0) for point in points),
        num_workers=config.cluster.team[1],
        commit=tested["commit"],
        dataset=tested["dataset"],
        date=datetime.fromtimestamp(points[-1].timestamp_ms / 1000, UTC).date().isoformat(),
        machine=tested.get("machine", {}),
        config={field: value for field, value in as_recipe(config).items() if field != "data_dir"},
    )


def described(recipe: str) -> tuple[str, str]:
    """Algorithm and setting of a recipe as a table has them: "imaml-hf" and "omniglot 5-way 1-shot"."""
    flat = flatten(RECIPES[recipe]())
    algorithm = flat["algorithm"].replace("_", "-")
    data, _, rest = recipe.partition(f"-{algorithm}")
    ways = f" {flat['num_ways']}-way" if "num_ways" in flat else ""
    return algorithm + re.sub(r"-(\d+w)?\d+s(?=-|$)", "", rest), f"{data}{ways} {flat['num_shots']}-shot"


def still_rose(validation: Sequence[tuple[int, float | None]], *, lower_is_better: bool) -> float | None:
    """How much better the last validation is than the last one of the first two thirds of the outer steps.

    Args:
      validation: outer step and value of each, in order; None for a value that is not finite.
    """
    early = [value for step, value in validation if 3 * step <= 2 * validation[-1][0]][-1:] or [None]
    before, last = early[0], validation[-1][1] if validation else None
    return None if before is None or last is None else (before - last if lower_is_better else last - before)


def minutes_of(outbox: Outbox, points: Sequence[Point]) -> float:
    """By the clock from each start of a run to its end; to its last point where it was killed outright."""
    marks = [(record["timestamp_ms"], record["kind"]) for record in outbox.records()
             if record["kind"] in ("started", "ended")]  # fmt: skip
    milliseconds = 0
    for (begun, kind), (end, what) in zip(marks, [*marks[1:], (math.inf, "nothing")], strict=True):
        if kind == "started":
            seen = [point.timestamp_ms for point in points if begun <= point.timestamp_ms < end]
            milliseconds += (end if what == "ended" else max(seen, default=begun)) - begun
    return milliseconds / 60_000


def _in_short(row: Row) -> str:
    unit, published = "%" if row.unit == "percent" else row.unit, published_text(row.published)
    ours = f"{figure_text(row.transductive, row.unit)} {unit}"
    if row.inductive is not None:
        ours += f" transductive, {figure_text(row.inductive, row.unit)} inductive"
    return f"{ours}; published {published}"
