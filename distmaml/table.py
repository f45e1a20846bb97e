"""Rows as a table in Markdown, with what they were made with below it."""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from distmaml.published import Published
from distmaml.rows import Figure, Row, mean_of_seeds

HEAD = (
    "algorithm", "setting", "published", "transductive", "inductive", "outer steps / the protocol's (tasks)",
    "tested: the best, of step", "validation still rose by", "test episodes", "seed", "minutes", "CPU-s", "commit", "",
)  # fmt: skip

NOTE = """\
"transductive" or "inductive" beside a published figure says which of ours it is to be held against. +-: a 95 %
interval, 1.96 standard errors over the test episodes of a seed; over the seeds of a mean Student's t in place of 1.96.
Rows of one setting and seed that ask as many queries and turn the images of the same split alike have the same test
episodes. The protocol is the paper's, unless a line above says whose it is. Tested is the model that was best in one of
the validations, with its outer step. Validation still rose by: from two thirds of the outer steps to the last one, in
points; of a loss, by how much it fell. CPU-s: of training and validation, of all workers. Behind the minutes: the GPU,
where there was one."""


def table_of(rows: Sequence[Row], *, folder: str) -> str:
    """All rows in Markdown, the mean of each row's seeds, and below what they were made with.

    Args:
      rows: in their order; those of the same kind stand together.
      folder: where the rows lie, as seen from the table.
    """
    marks, lines = marks_of(rows), [HEAD, ("---",) * len(HEAD)]
    for _, group in itertools.groupby(rows, key=lambda row: row.kind):
        seeds = list(group)
        algorithm = seeds[0].algorithm + marks.get(assignments(seeds[0].overrides), "")
        lines += [_cells(row, algorithm, folder) for row in seeds]
        if len(seeds) > 1:
            lines.append(_mean_cells(seeds, algorithm))
    notes = [
        *(f"{mark.strip()} {settings}" for settings, mark in marks.items()),
        *dict.fromkeys(
            f"{row.recipe}{marks.get(assignments(row.overrides), '')} with {row.tasks} tasks has {_scaled(row)}: as "
            "large a share of the outer steps."
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


def marks_of(rows: Sequence[Row]) -> dict[str, str]:
    """A number for each set of overrides, by its `assignments`: " (1)"."""
    overrides = dict.fromkeys(assignments(row.overrides) for row in rows if row.overrides)
    return {settings: f" ({number + 1})" for number, settings in enumerate(overrides)}


def assignments(overrides: Mapping[str, Any]) -> str:
    return ", ".join(f"`{field}={json.dumps(value).strip(chr(34))}`" for field, value in overrides.items())


def _cells(row: Row, algorithm: str, folder: str) -> tuple[str, ...]:
    digits = _digits(row.unit)
    rose = "-" if row.still_rose is None else f"{round(row.still_rose, digits) + 0.0:+.{digits}f}"  # and never -0.00
    gpu = f" ({row.machine['gpu']})" if row.machine.get("gpu") else ""
    commit = "-" if row.commit is None else row.commit[:7] + ("+" if row.commit.endswith("+") else "")
    return (
        algorithm, row.setting, _linked(row.published), figure_text(row.transductive, row.unit),
        figure_text(row.inductive, row.unit), _steps(row), str(row.chosen_step), rose,
        str(row.num_test_episodes), str(row.seed), f"{row.minutes:.1f}{gpu}", f"{row.cpu_seconds:.0f}", commit,
        f"[json]({folder}/{row.name}.json)",
    )  # fmt: skip


def _mean_cells(rows: Sequence[Row], algorithm: str) -> tuple[str, ...]:
    first, modes = rows[0], ([row.transductive for row in rows], [row.inductive for row in rows])
    ours = [figure_text(mean_of_seeds(figures), first.unit) for figures in modes]
    seeds = f"mean of {len(rows)} seeds"
    return algorithm, first.setting, _linked(first.published), *ours, "", "", "", "", seeds, "", "", "", ""


def _digits(unit: str) -> int:
    return 2 if unit == "percent" else 3


def _linked(published: Published | None) -> str:
    text = published_text(published)
    return text if published is None or published.value is None else f"[{text}]({published.url})"


def _steps(row: Row) -> str:
    if row.published is None or row.share_of_paper is None:
        return str(row.outer_steps)
    return f"{row.outer_steps} / {row.published.num_outer_steps} ({100 * row.share_of_paper:.3g} %)"


def _scaled(row: Row) -> str:
    return ", ".join(f"{field} {value} rather than {usual}" for field, (usual, value) in row.schedules.items())


def _remarks(rows: Sequence[Row]) -> dict[str, list[str]]:
    """What decides a comparison with a published figure, and the recipes that it is about."""
    remarks: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.published is not None and row.published.remark:
            remarks.setdefault(row.published.remark, {})[row.recipe] = None
    return {remark: list(recipes) for remark, recipes in remarks.items()}
