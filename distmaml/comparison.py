"""Figures of ours beside published ones: a row as a JSON file, and all rows as a table and a picture.

Knows nothing of how a row is made.
"""

import itertools
import json
import math
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from scipy.special import stdtrit

from distmaml.errors import ConfigError, RunError, first_line
from distmaml.files import write_text
from distmaml.pictures.reproduction import Line, Mark, Panel, against_published
from distmaml.published import PUBLISHED, Published

BEGIN, END = "<!-- reproduction: begin -->", "<!-- reproduction: end -->"
"""The lines of a file between which the table stands."""

Figure: TypeAlias = dict[str, float | None]
"""mean and half_width of its 95 % interval; None where a number is not finite."""


@dataclass(frozen=True)
class Row:
    """One training run beside what its paper prints."""

    name: str
    """That of the run and of the file."""
    recipe: str
    algorithm: str
    """With what the recipe's name has beside it: "imaml-hf"."""
    setting: str
    """Data, ways and shots."""
    command: str
    """What made it."""
    overrides: dict[str, Any]
    """Fields that were set otherwise than in the recipe."""
    schedules: dict[str, list[int]]
    """Fields that count outer steps, which shrink with them: the recipe's value and that of the run."""
    seed: int
    tasks: int
    """Tasks that were asked for."""
    outer_steps: int
    """Outer steps that were done."""
    share_of_paper: float | None
    """Tasks that were trained on, as a fraction of the paper's."""
    chosen_step: int
    """Outer step of the model that was tested."""
    published: Published | None
    unit: Literal["percent", "mean squared error"]
    """Of the published value and of all of ours."""
    inner_steps: int
    """Inner steps in the test."""
    transductive: Figure
    inductive: Figure | None
    num_test_episodes: int
    query_loss: dict[str, Figure]
    """For a regression, after 1, 5 and 10 inner steps, as far as there are so many."""
    validation: Sequence[tuple[int, float | None]]
    """Outer step and value of each validation."""
    still_rose: float | None
    """How much better the last validation was than the last one of the first two thirds of the outer steps."""
    minutes: float
    """By the clock: from the start of Ray to the last picture, over all starts of the run."""
    cpu_seconds: float
    """For training and validation, of all workers."""
    num_workers: int
    commit: str | None
    dataset: dict[str, Any] | None
    """What identifies the data, with the hash of their division."""
    date: str
    machine: dict[str, Any]
    """Its gpu is the model that computed, or None."""
    config: dict[str, Any]
    """Everything else that decides the figures."""

    @property
    def kind(self) -> tuple[str, int, str, int]:
        """What seeds of the same row have in common."""
        return self.recipe, self.tasks, json.dumps(self.overrides, sort_keys=True), self.num_test_episodes


# ---------------------------------------------------------------------------------------------------- files


def file_of(results: Path, name: str) -> Path:
    """Where a row lies."""
    return results / f"{name}.json"


def write_row(results: Path, row: Row) -> None:
    """Writes a row as a whole.

    Raises:
      RunError: the folder cannot be written.
    """
    write_text(file_of(results, row.name), json.dumps(asdict(row), indent=1, allow_nan=False) + "\n")


def read_rows(results: Path) -> list[Row]:
    """All rows of a folder: by setting, then in the order in which `PUBLISHED` has them.

    Raises:
      RunError: a file that holds no row.
    """
    return sorted((read_row(file) for file in results.glob("*.json")), key=_rank)


def read_row(file: Path) -> Row:
    """The row in a file.

    Raises:
      RunError: it holds none, or that of another file: a copy would count as a seed of its own.
    """
    try:
        fields = json.loads(file.read_text())
        published = fields.pop("published")
        row = Row(**fields, published=None if published is None else Published(**published))
        table_of([row], folder="")  # what cannot be shown is no row either
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RunError(
            f"{file} is no row of a reproduction, or one of another version ({first_line(error)}). Move it away, or "
            "name another folder by --results."
        ) from error
    if row.name != file.stem:
        raise RunError(f"{file} holds the row {row.name}. Name it {row.name}.json, or move it away.")
    return row


def _rank(row: Row) -> tuple[Any, ...]:
    order = list(PUBLISHED)
    setting = [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", row.setting)]  # 5-way, 20-way
    return setting, order.index(row.recipe) if row.recipe in order else len(order), row.kind, row.seed


def check_table(table: Path) -> None:
    """Refuses a file that has no place for the table.

    Raises:
      ConfigError: saying which lines to add.
    """
    _around(table)


def write_table(table: Path, results: Path) -> Path:
    """Writes the table and its picture anew from all rows of a folder; nothing else of the file changes.

    Returns:
      The picture, in the folder images beside the table.

    Raises:
      ConfigError: as `check_table`.
      RunError: a file that holds no row, a folder that cannot be written.
    """
    before, after = _around(table)
    rows, picture = read_rows(results), picture_of(table)
    if rows:
        has_shares = any(row.share_of_paper is not None for row in rows)
        note = "behind a name: share of the paper's tasks" if has_shares else ""
        against_published(picture, _panels(rows), note=note)
    written = table_of(rows, folder=os.path.relpath(results, table.parent)) if rows else "No row yet.\n"
    shown = f"\n![Ours beside the published figures]({picture.parent.name}/{picture.name})\n" if rows else ""
    write_text(table, f"{before}{BEGIN}\n\n{written}{shown}\n{END}{after}")
    return picture


def picture_of(table: Path) -> Path:
    """The picture that belongs to a table."""
    return table.parent / "images" / "reproduction.png"


def _around(table: Path) -> tuple[str, str]:
    """What stands before and behind the table in its file, to the byte."""
    try:
        text = table.read_bytes().decode(errors="surrogateescape")
    except OSError as error:
        raise ConfigError(f"--table {table} cannot be read ({first_line(error)}). Name a text file.") from error
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found or text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ConfigError(
            f"--table {table} does not have the lines {BEGIN} and {END} once each, in this order. Add the two where "
            "the table is to stand."
        )
    return before, after


# ---------------------------------------------------------------------------------------------------- table

HEAD = (
    "algorithm", "setting", "published", "transductive", "inductive", "outer steps / the paper's (tasks)",
    "validation still rose by", "test episodes", "seed", "minutes", "CPU-s", "commit", "",
)  # fmt: skip

NOTE = """\
"transductive" or "inductive" beside a published figure says which of ours it is to be held against. +-: a 95 %
interval, 1.96 standard errors over the test episodes of a seed; over the seeds of a mean Student's t in place of 1.96.
Rows of one setting and seed that ask as many queries and turn the images of the same split alike have the same test
episodes. Validation still rose by: from two thirds of the outer steps to the last one, in points; of a loss, by how
much it fell. CPU-s: of training and validation, of all workers. Behind the minutes: the GPU, where there was one."""


def table_of(rows: Sequence[Row], *, folder: str) -> str:
    """All rows in Markdown, the mean of each row's seeds, and below what they were made with.

    Args:
      rows: in their order; those of the same kind stand together.
      folder: where the rows lie, as seen from the table.
    """
    marks, lines = _marks(rows), [HEAD, ("---",) * len(HEAD)]
    for _, group in itertools.groupby(rows, key=lambda row: row.kind):
        seeds = list(group)
        algorithm = seeds[0].algorithm + marks.get(_assignments(seeds[0].overrides), "")
        lines += [_cells(row, algorithm, folder) for row in seeds]
        if len(seeds) > 1:
            lines.append(_mean_cells(seeds, algorithm))
    notes = [
        *(f"{mark.strip()} {assignments}" for assignments, mark in marks.items()),
        *dict.fromkeys(
            f"{row.recipe} with {row.tasks} tasks has {_scaled(row)}: as large a share of the outer steps."
            for row in rows
            if row.schedules
        ),
        *(f"{', '.join(recipes)}: {remark}" for remark, recipes in _remarks(rows).items()),
        NOTE,
    ]
    body = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return body + "\n\n" + "\n\n".join(notes) + "\n"


def published_text(published: Published | None) -> str:
    """What a paper prints, "-" where it has no such row."""
    if published is None or published.value is None:
        return "-"
    printed = [published.value] if published.half_width is None else [published.value, published.half_width]
    digits = max(1, *(len(f"{number:g}".partition(".")[2]) for number in printed))
    text = " +- ".join(f"{number:.{digits}f}" for number in printed)
    return text if published.mode == "either" else f"{text} {published.mode}"


def figure_text(found: Figure | None, unit: str) -> str:
    """A figure as people read it."""
    if found is None:
        return "-"
    mean, half_width = found["mean"], found["half_width"]
    if mean is None or half_width is None:
        return "not finite"
    return f"{mean:.{_digits(unit)}f} +- {half_width:.{_digits(unit)}f}"


def mean_of_seeds(figures: Sequence[Figure | None]) -> Figure | None:
    """The mean of the means of N seeds, with ``t * s / sqrt(N)``; None where a seed has no such figure.

    t is Student's for 95 % with N - 1 degrees of freedom: 12.7 for two seeds, 4.3 for three.
    """
    found = [figure["mean"] for figure in figures if figure is not None]
    means = [mean for mean in found if mean is not None]
    if len(found) < len(figures):
        return None
    if len(means) < len(figures):
        return {"mean": None, "half_width": None}
    t = float(stdtrit(len(means) - 1, 0.975))
    return {"mean": statistics.mean(means), "half_width": t * statistics.stdev(means) / math.sqrt(len(means))}


def _cells(row: Row, algorithm: str, folder: str) -> tuple[str, ...]:
    digits = _digits(row.unit)
    rose = "-" if row.still_rose is None else f"{round(row.still_rose, digits) + 0.0:+.{digits}f}"  # and never -0.00
    gpu = f" ({row.machine['gpu']})" if row.machine.get("gpu") else ""
    commit = "-" if row.commit is None else row.commit[:7] + ("+" if row.commit.endswith("+") else "")
    return (
        algorithm, row.setting, _linked(row.published), figure_text(row.transductive, row.unit),
        figure_text(row.inductive, row.unit), _steps(row), rose, str(row.num_test_episodes), str(row.seed),
        f"{row.minutes:.1f}{gpu}", f"{row.cpu_seconds:.0f}", commit, f"[json]({folder}/{row.name}.json)",
    )  # fmt: skip


def _mean_cells(rows: Sequence[Row], algorithm: str) -> tuple[str, ...]:
    first, modes = rows[0], ([row.transductive for row in rows], [row.inductive for row in rows])
    ours = [figure_text(mean_of_seeds(figures), first.unit) for figures in modes]
    seeds = f"mean of {len(rows)} seeds"
    return algorithm, first.setting, _linked(first.published), *ours, "", "", "", seeds, "", "", "", ""


def _digits(unit: str) -> int:
    return 2 if unit == "percent" else 3


def _linked(published: Published | None) -> str:
    text = published_text(published)
    return text if published is None or published.value is None else f"[{text}]({published.url})"


def _steps(row: Row) -> str:
    if row.published is None or row.share_of_paper is None:
        return str(row.outer_steps)
    return f"{row.outer_steps} / {row.published.num_outer_steps} ({100 * row.share_of_paper:.3g} %)"


def _marks(rows: Sequence[Row]) -> dict[str, str]:
    """A number for each set of overrides, by what they say."""
    overrides = dict.fromkeys(_assignments(row.overrides) for row in rows if row.overrides)
    return {assignments: f" ({number + 1})" for number, assignments in enumerate(overrides)}


def _assignments(overrides: Mapping[str, Any]) -> str:
    return ", ".join(f"`{field}={json.dumps(value).strip(chr(34))}`" for field, value in overrides.items())


def _scaled(row: Row) -> str:
    return ", ".join(f"{field} {value} rather than {usual}" for field, (usual, value) in row.schedules.items())


def _remarks(rows: Sequence[Row]) -> dict[str, list[str]]:
    """What decides a comparison with a published figure, and the recipes that it is about."""
    remarks: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.published is not None and row.published.remark:
            remarks.setdefault(row.published.remark, {})[row.recipe] = None
    return {remark: list(recipes) for remark, recipes in remarks.items()}


# -------------------------------------------------------------------------------------------------- picture


def _panels(rows: Sequence[Row]) -> list[Panel]:
    """The picture's lines by setting; the seeds of a row are one line."""
    marks = _marks(rows)
    panels = []
    for (setting, unit), of_setting in itertools.groupby(rows, key=lambda row: (row.setting, row.unit)):
        kinds = [list(seeds) for _, seeds in itertools.groupby(of_setting, key=lambda row: row.kind)]
        axis = "Test accuracy (%)" if unit == "percent" else f"Test {unit}"
        panels.append(Panel(setting, axis, [_line(seeds, marks, kinds) for seeds in kinds]))
    return panels


def _line(seeds: Sequence[Row], marks: Mapping[str, str], others: Sequence[Sequence[Row]]) -> Line:
    def mark(figure: Figure | None) -> Mark | None:
        return None if figure is None or figure["mean"] is None else Mark(figure["mean"], figure["half_width"])

    first, published = seeds[0], seeds[0].published
    label = first.algorithm + marks.get(_assignments(first.overrides), "")
    if first.share_of_paper is not None:
        label += f", {100 * first.share_of_paper:.3g} %"
    elif len({row.tasks for rows in others for row in rows}) > 1:
        label += f", {first.tasks} tasks"
    label += f", {len(seeds)} seeds" if len(seeds) > 1 else ""
    modes = [row.transductive for row in seeds], [row.inductive for row in seeds]
    transductive, inductive = (mark(mean_of_seeds(figures) if len(seeds) > 1 else figures[0]) for figures in modes)
    return Line(
        label,
        None if published is None or published.value is None else Mark(published.value, published.half_width),
        "either" if published is None else published.mode,
        transductive,
        inductive,
    )
