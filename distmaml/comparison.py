"""Figures of ours beside published ones: all rows of a folder, a JSON file each, as a table and a picture.

Knows nothing of how a row is made.
"""

import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from distmaml.errors import ConfigError, RunError, first_line
from distmaml.files import write_text
from distmaml.pictures.reproduction import Line, Mark, Panel, against_published
from distmaml.published import PUBLISHED, Published
from distmaml.rows import Figure, Row, mean_of_seeds, share_of_protocol
from distmaml.table import assignments, marks_of, table_of

BEGIN, END = "<!-- reproduction: begin -->", "<!-- reproduction: end -->"
"""The lines of a file between which the table stands."""


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
      RunError: a file that holds no row; seeds of a row that differ in more than their seed.
    """
    rows = sorted((read_row(file) for file in results.glob("*.json")), key=_rank)
    for one, other in itertools.pairwise(rows):
        fields = one.config.keys() & other.config.keys() - {"seed"}
        different = [name for name in sorted(fields) if one.config[name] != other.config[name]]
        if one.kind == other.kind and different:
            raise RunError(
                f"{file_of(results, other.name)} would count as another seed of {one.name}, but differs in "
                f"{', '.join(different)}. Move one of the two away, or name another folder by --results."
            )
    return rows


def read_row(file: Path) -> Row:
    """The row in a file, beside what is known by now of what its paper prints.

    Raises:
      RunError: it holds none, or that of another file: a copy would count as a seed of its own.
    """
    try:
        fields = json.loads(file.read_text())
        published = fields.pop("published")
        row = Row(**fields, published=None if published is None else Published(**published))
        published = PUBLISHED.get(row.recipe, row.published)
        share = share_of_protocol(published, row.outer_steps, row.config["meta_batch_size"])
        row = replace(row, published=published, share_of_paper=share)
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
        note = "behind a name: share of the protocol's tasks" if has_shares else ""
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


# -------------------------------------------------------------------------------------------------- picture


def _panels(rows: Sequence[Row]) -> list[Panel]:
    """The picture's lines by setting; the seeds of a row are one line."""
    marks = marks_of(rows)
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
    label = first.algorithm + marks.get(assignments(first.overrides), "")
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
