"""Tables of ours beside published figures, read as a person reads them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distmaml import comparison
from distmaml.comparison import BEGIN, END, read_rows, write_row, write_table
from distmaml.errors import ConfigError, RunError
from distmaml.published import Published
from distmaml.rows import Row, mean_of_seeds
from distmaml.table import HEAD, published_text, table_of

FINN = Published(
    value=98.7, half_width=0.4, num_outer_steps=60_000, meta_batch_size=32, source="Finn et al. (2017), Table 1",
    url="https://arxiv.org/abs/1703.03400", mode="either",
)  # fmt: skip
BLUE, VERMILION = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)


def row(recipe: str = "omniglot-maml-5w1s", seed: int = 0, **changes: Any) -> Row:
    """1,500 of 60,000 steps of 32 tasks."""
    algorithm = recipe.split("-")[1]
    made = Row(
        name=f"reproduce-{recipe}-48000-s{seed}",
        recipe=recipe,
        algorithm=algorithm,
        setting="omniglot 5-way 1-shot",
        command="python jobs/reproduce.py",
        overrides={},
        schedules={},
        seed=seed,
        tasks=48_000,
        outer_steps=1500,
        share_of_paper=0.025,
        chosen_step=1375,
        published=replace(FINN, mode="transductive"),
        unit="percent",
        inner_steps=3,
        transductive={"mean": 96.304, "half_width": 0.251},
        inductive={"mean": 94.4, "half_width": 0.333},
        num_test_episodes=1000,
        query_loss={},
        validation=[(1000, 96.0), (1500, 96.5)],
        still_rose=0.5,
        minutes=12.4,
        cpu_seconds=1234.5,
        num_workers=2,
        commit="0123456789abcdef0123456789abcdef01234567",
        dataset={"split_hash": "ff"},
        date="2026-11-26",
        machine={"processor": "a CPU", "cores": 2},
        config={"meta_batch_size": 32},
    )
    return replace(made, **changes)


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """What stands in the table, without its head."""
    lines = [line for line in table_of(rows, folder="rows").splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("omniglot-reptile-5w1s", "omniglot-maml-20w1s", "omniglot-maml-5w1s", "sinusoid-maml-5s")
    monkeypatch.setattr(comparison, "PUBLISHED", dict.fromkeys(names, FINN))


# ---------------------------------------------------------------------------------------------------- table


def test_a_line_says_everything_about_its_row() -> None:
    assert cells([row()]) == [
        [
            *("maml", "omniglot 5-way 1-shot"),
            "[98.7 +- 0.4 transductive](https://arxiv.org/abs/1703.03400)",
            *(
                "96.30 +- 0.25",
                "94.40 +- 0.33",
                "1500 / 60000 (2.5 %)",
                "1375",
                "+0.50",
                "1000",
                "0",
                "12.4",
                "1234",
                "0123456",
            ),
            "[json](rows/reproduce-omniglot-maml-5w1s-48000-s0.json)",
        ]
    ]
    assert len(table_of([row()], folder="rows").splitlines()[0].split("|")) == 16


def test_a_line_names_the_gpu() -> None:
    made = row(machine={"processor": "a CPU", "cores": 16, "gpu": "NVIDIA H100"})
    assert cells([made])[0][10:12] == ["12.4 (NVIDIA H100)", "1234"]


def test_a_regression_has_its_own_digits_and_what_is_not_there_is_a_dash() -> None:
    wave = row(
        "sinusoid-maml-5s", unit="mean squared error", setting="sinusoid 5-shot", inductive=None, published=None,
        transductive={"mean": 0.34, "half_width": 0.0361}, share_of_paper=None, still_rose=-0.0123, commit=None,
    )  # fmt: skip
    assert cells([wave])[0][2:8] == ["-", "0.340 +- 0.036", "-", "1500", "1375", "-0.012"]
    assert cells([wave])[0][12] == "-"
    assert cells([replace(wave, published=replace(FINN, value=None), share_of_paper=0.5)])[0][2] == "-"
    diverged = replace(wave, transductive={"mean": None, "half_width": None}, still_rose=None)
    assert cells([diverged])[0][3:8:4] == ["not finite", "-"]


@pytest.mark.parametrize(
    ("published", "says"),
    [
        (FINN, "98.7 +- 0.4"),
        (replace(FINN, half_width=None, mode="inductive"), "98.7 inductive"),
        (replace(FINN, value=0.35, half_width=None), "0.35"),
        (replace(FINN, value=48.7, half_width=1.84), "48.70 +- 1.84"),
        (replace(FINN, value=95.39, half_width=0.1), "95.39 +- 0.10"),
        (replace(FINN, value=96.0, half_width=None), "96.0"),
        (replace(FINN, value=None), "-"),
        (None, "-"),
    ],
)
def test_a_published_figure_is_printed_as_in_its_paper(published: Published | None, says: str) -> None:
    assert published_text(published) == says


def test_what_decides_a_comparison_is_said_once_with_the_recipes_it_is_about() -> None:
    ensemble = replace(FINN, remark="An ensemble of 5 models.")
    rows = [row(published=ensemble), row(seed=1, published=ensemble), row("omniglot-anil-5w1s", published=ensemble)]
    lines = table_of([*rows, row("omniglot-boil-5w1s")], folder="rows").splitlines()
    assert lines.count("omniglot-maml-5w1s, omniglot-anil-5w1s: An ensemble of 5 models.") == 1
    assert not [line for line in lines if line.startswith("omniglot-boil")]


def test_a_validation_that_fell_by_next_to_nothing_has_no_sign_of_falling() -> None:
    assert [cells([row(still_rose=rose)])[0][7] for rose in (-0.001, 0.0, -0.006)] == ["+0.00", "+0.00", "-0.01"]


def test_code_that_is_in_no_commit_is_marked() -> None:
    assert cells([row(commit="0123456789abcdef0123456789abcdef01234567+")])[0][12] == "0123456+"


def test_seeds_have_a_line_each_and_their_mean() -> None:
    # The means 96, 97 and 98 have a standard deviation of 1, and t is 4.303: 4.303 / sqrt(3) = 2.48.
    seeds = [row(seed=seed, transductive={"mean": 96.0 + seed, "half_width": 0.2}) for seed in range(3)]
    seeds[2] = replace(seeds[2], inductive={"mean": None, "half_width": None})
    found = cells([*seeds, row("omniglot-anil-5w1s")])
    assert [(line[0], line[3], line[9]) for line in found] == [
        ("maml", "96.00 +- 0.20", "0"),
        ("maml", "97.00 +- 0.20", "1"),
        ("maml", "98.00 +- 0.20", "2"),
        ("maml", "97.00 +- 2.48", "mean of 3 seeds"),
        ("anil", "96.30 +- 0.25", "0"),
    ]
    assert found[3][4] == "not finite"
    assert all(len(line) == len(HEAD) for line in found)


def test_the_mean_of_seeds_without_a_figure_has_none() -> None:
    assert mean_of_seeds([{"mean": 1.0, "half_width": 0.1}, None]) is None
    assert mean_of_seeds([{"mean": 1.0, "half_width": 0.1}, {"mean": 3.0, "half_width": 0.1}]) == {
        "mean": 2.0,
        "half_width": pytest.approx(12.706, abs=1e-3),  # t; the standard deviation is sqrt(2)
    }


def test_other_settings_are_said_once_for_all_rows_that_share_them() -> None:
    small = {"num_filters": 32, "downsample": "pool"}
    rows = [row(), row(overrides=small), row("omniglot-anil-5w1s", overrides=small), row(overrides={"outer_lr": 0.01})]
    assert [line[0] for line in cells(rows)] == ["maml", "maml (1)", "anil (1)", "maml (2)"]
    notes = [line for line in table_of(rows, folder="rows").splitlines() if line.startswith("(")]
    assert notes == ["(1) `num_filters=32`, `downsample=pool`", "(2) `outer_lr=0.01`"]


def test_schedules_that_have_shrunk_are_said() -> None:
    rows = [row("omniglot-mamlpp-5w1s", seed=seed, schedules={"annealing_steps": [5000, 600]}) for seed in range(2)]
    said = (
        "omniglot-mamlpp-5w1s with 48000 tasks has annealing_steps 600 rather than 5000: as large a share of the outer "
        "steps."
    )
    assert table_of(rows, folder="rows").splitlines().count(said) == 1
    changed = row("omniglot-mamlpp-5w1s", schedules={"annealing_steps": [5000, 300]}, overrides={"meta_batch_size": 64})
    other = said.replace("5w1s with", "5w1s (1) with").replace("600", "300")
    assert {said, other} <= set(table_of([*rows, changed], folder="rows").splitlines())


# ----------------------------------------------------------------------------------------------------- rows


@pytest.mark.usefixtures("order")
def test_rows_stand_by_setting_and_then_as_published(tmp_path: Path) -> None:
    twenty = "omniglot 20-way 1-shot"
    made = [
        row("omniglot-zeta-5w1s"), row("sinusoid-maml-5s", setting="sinusoid 5-shot"), row(seed=10), row(seed=2),
        row("omniglot-maml-20w1s", setting=twenty), row("omniglot-reptile-5w1s"),
        row(seed=3, tasks=96_000, name="more"),
    ]  # fmt: skip
    for one in made:
        write_row(tmp_path, one)
    assert [(found.recipe, found.tasks, found.seed) for found in read_rows(tmp_path)] == [
        ("omniglot-reptile-5w1s", 48_000, 0),
        ("omniglot-maml-5w1s", 48_000, 2),
        ("omniglot-maml-5w1s", 48_000, 10),
        ("omniglot-maml-5w1s", 96_000, 3),
        ("omniglot-zeta-5w1s", 48_000, 0),
        ("omniglot-maml-20w1s", 48_000, 0),
        ("sinusoid-maml-5s", 48_000, 0),
    ]


def test_a_row_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = row("omniglot-zeta-5w1s", overrides={"hidden_sizes": [8, 8], "clip_norm": None}, inductive=None)
    write_row(tmp_path, made)
    (found,) = read_rows(tmp_path)
    assert replace(found, validation=made.validation) == made
    assert [tuple(point) for point in found.validation] == made.validation


@pytest.mark.usefixtures("order")
def test_a_row_stands_beside_what_is_known_of_its_paper_by_now(tmp_path: Path) -> None:
    """1,500 of 60,000 steps of 32 tasks are no more than a fortieth of it, whatever was known when it was made."""
    write_row(tmp_path, row(published=replace(FINN, value=9.0, num_outer_steps=10), share_of_paper=150.0))
    (found,) = read_rows(tmp_path)
    assert (found.published, found.share_of_paper) == (FINN, 0.025)


def test_rows_that_differ_in_more_than_their_seed_are_no_seeds_of_one(tmp_path: Path) -> None:
    configs = [{"meta_batch_size": 32, "seed": 0}, {"meta_batch_size": 32, "seed": 1, "added_later": 3}]
    for seed, config in enumerate(configs):
        write_row(tmp_path, row(seed=seed, config=config))
    assert len(read_rows(tmp_path)) == 2
    write_row(tmp_path, row(seed=2, config={"meta_batch_size": 8, "seed": 2}))
    with pytest.raises(
        RunError, match=r"-s2\.json would count as another seed .*-s1, but differs in meta_batch_size\. M"
    ):
        read_rows(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"name": "x"}', '{"published": {"value": 3}}'])
def test_a_file_that_is_no_row_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(RunError, match=r"other\.json is no row of a reproduction.*Move it away"):
        read_rows(tmp_path)


@pytest.mark.parametrize("change", [{"transductive": {}}, {"still_rose": "much"}, {"overrides": 3}, {"commit": 3}])
def test_a_row_that_cannot_be_shown_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    write_row(tmp_path, row(name="torn", **change))
    with pytest.raises(RunError, match=r"torn\.json is no row of a reproduction"):
        read_rows(tmp_path)


# ---------------------------------------------------------------------------------------------------- files


def test_nothing_but_the_table_changes_in_its_file(tmp_path: Path) -> None:
    file, results = tmp_path / "docs" / "RESULTS.md", tmp_path / "docs" / "results" / "rows"
    file.parent.mkdir()
    before, after = b"# Caf\xe9\r\n\r\n| old |\n", b"\r\nThe end, without a line's"
    file.write_bytes(before + BEGIN.encode() + b"\nold\n" + END.encode() + after)
    for rows in (1, 2):
        write_row(results, row(seed=rows))
        write_table(file, results)
        text = file.read_bytes()
        assert text.startswith(before + BEGIN.encode() + b"\n\n| algorithm | setting |")
        assert text.endswith(b"\n\n" + END.encode() + after)
        assert b"old\n" not in text[len(before) :]
        assert text.count(b"[json](results/rows/reproduce-omniglot-maml-5w1s-48000-s") == rows
        assert b"(images/reproduction.png)" in text
    assert sorted(path.name for path in file.parent.iterdir()) == ["RESULTS.md", "images", "results"]


def test_a_table_without_rows_says_so(tmp_path: Path) -> None:
    file = tmp_path / "RESULTS.md"
    file.write_text(f"{BEGIN}\n{END}\n")
    write_table(file, tmp_path / "rows")
    assert file.read_text() == f"{BEGIN}\n\nNo row yet.\n\n{END}\n"


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}", f"{BEGIN}{END}{END}"])
def test_a_file_without_a_place_for_the_table_is_told_which_lines_to_add(tmp_path: Path, text: str) -> None:
    (tmp_path / "RESULTS.md").write_text(text)
    with pytest.raises(ConfigError, match=r"does not have the lines <!-- reproduction: begin --> and .*Add the two"):
        comparison.check_table(tmp_path / "RESULTS.md")
    assert (tmp_path / "RESULTS.md").read_text() == text


def test_a_copy_of_a_row_is_no_other_seed(tmp_path: Path) -> None:
    write_row(tmp_path, row())
    (tmp_path / "copy.json").write_bytes(comparison.file_of(tmp_path, row().name).read_bytes())
    with pytest.raises(RunError, match=r"copy\.json holds the row reproduce-.*-s0\. Name it reproduce-.*-s0\.json"):
        read_rows(tmp_path)


def test_a_table_in_no_file_is_refused(tmp_path: Path) -> None:
    for place in (tmp_path / "none.md", tmp_path):
        with pytest.raises(ConfigError, match=r"--table .* cannot be read"):
            comparison.check_table(place)


# -------------------------------------------------------------------------------------------------- picture


def drawn(folder: Path, rows: Sequence[Row]) -> np.ndarray[Any, Any]:
    (folder / "RESULTS.md").write_text(f"{BEGIN}{END}")
    for one in rows:
        write_row(folder / "rows", one)
    picture = write_table(folder / "RESULTS.md", folder / "rows")
    for file in (folder / "rows").iterdir():
        file.unlink()
    return np.asarray(Image.open(picture).convert("RGB"))


def count(image: np.ndarray[Any, Any], color: tuple[int, int, int]) -> int:
    return int((image == color).all(axis=-1).sum())


def test_the_picture_has_a_line_for_each_kind_of_row_and_grows_with_them(tmp_path: Path) -> None:
    one = drawn(tmp_path, [row()])
    seeds = drawn(tmp_path, [row(seed=seed) for seed in range(3)])
    two = drawn(tmp_path, [row(), row("omniglot-anil-5w1s")])
    panels = drawn(tmp_path, [row(), row("omniglot-maml-20w1s", setting="omniglot 20-way 1-shot")])
    assert one.shape == seeds.shape
    assert one.shape[1] == two.shape[1] == panels.shape[1]
    assert one.shape[0] < two.shape[0] < panels.shape[0]


def test_the_picture_says_how_much_of_the_paper_s_tasks_ours_has_seen_or_how_many() -> None:
    short, long = row(), row(tasks=1_920_000, name="long", share_of_paper=1.0)
    labels = [line.label for panel in comparison._panels([short, long]) for line in panel.lines]
    assert labels == ["maml, 2.5 %", "maml, 100 %"]
    unknown = [replace(found, share_of_paper=None) for found in (short, long)]
    labels = [line.label for panel in comparison._panels(unknown) for line in panel.lines]
    assert labels == ["maml, 48000 tasks", "maml, 1920000 tasks"]


def test_what_is_not_there_is_not_drawn(tmp_path: Path) -> None:
    whole = drawn(tmp_path, [row()])
    without = drawn(tmp_path, [row(inductive=None)])
    assert count(whole, VERMILION) > 200 > 0 == count(without, VERMILION)
    nothing: dict[str, Any] = {"transductive": {"mean": None, "half_width": None}, "published": None}
    unknown = drawn(tmp_path, [row("omniglot-zeta-5w1s", **nothing)])
    assert count(whole, BLUE) > 200 > 0 == count(unknown, BLUE)
    drawn(tmp_path, [row("omniglot-zeta-5w1s", **nothing, inductive=None)])
