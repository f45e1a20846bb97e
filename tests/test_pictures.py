"""Pictures are looked at by people; here only what can be said of their pixels and of their pages."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import rcParams
from PIL import Image

from distmaml.errors import DataError
from distmaml.pictures.runs import adaptation_curve, episode_sheet, fit_curve, learning_curve
from distmaml.pictures.searches import best_so_far, budget, parallel_coordinates, value_map
from distmaml.pictures.style import Array

GREEN, RED = (0x00, 0x9E, 0x73), (0xD5, 0x5E, 0x00)  # bluish green and vermilion of Okabe and Ito


def pixels(path: Path) -> Array:
    return np.asarray(Image.open(path).convert("RGB"))


def count(path: Path, color: tuple[int, int, int]) -> int:
    return int((pixels(path) == color).all(axis=-1).sum())


def sheet(path: Path, predictions: list[int], *, ink: bool = True, channels: int = 1, scale: float = 1.0) -> None:
    """Two classes, one shot, three queries each; the images are a single stroke."""
    images = np.zeros((8, channels, 28, 28))
    images[:, :, 10:18, 4:24] = scale
    episode_sheet(
        path,
        images[:2], np.array([0, 1]), images[2:], np.array([0, 0, 0, 1, 1, 1]), np.array(predictions),
        class_names=["Greek/character01", "Korean/character02"], ink=ink, title="A test episode",
    )  # fmt: skip


def test_right_predictions_are_framed_green_and_wrong_ones_red(tmp_path: Path) -> None:
    sheet(tmp_path / "right.png", [0, 0, 0, 1, 1, 1])
    sheet(tmp_path / "wrong.png", [1, 1, 1, 0, 0, 0])
    legend = 200  # both colours stand in it
    assert count(tmp_path / "right.png", GREEN) > 10 * legend > 10 * count(tmp_path / "wrong.png", GREEN) / 4
    assert count(tmp_path / "wrong.png", RED) > 5 * count(tmp_path / "right.png", RED)


def test_ink_is_dark_on_light(tmp_path: Path) -> None:
    sheet(tmp_path / "ink.png", [0, 0, 0, 1, 1, 1], ink=True)
    sheet(tmp_path / "light.png", [0, 0, 0, 1, 1, 1], ink=False)
    stroke = 8 * 20 / 28**2  # share of an image that is ink
    black_if_ink, black_if_light = (count(tmp_path / name, (0, 0, 0)) for name in ("ink.png", "light.png"))
    assert black_if_ink / (black_if_ink + black_if_light) == pytest.approx(stroke, abs=0.05)


@pytest.mark.parametrize(("channels", "scale"), [(1, 1.0), (3, 1.0), (3, 4.0)])
def test_grey_and_coloured_images_of_any_range_are_shown(tmp_path: Path, channels: int, scale: float) -> None:
    sheet(tmp_path / "any.png", [0, 0, 0, 1, 1, 1], channels=channels, scale=scale)
    sheet(tmp_path / "grey.png", [0, 0, 0, 1, 1, 1])
    assert (pixels(tmp_path / "any.png") == pixels(tmp_path / "grey.png")).all()


def test_images_of_two_channels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 channels"):
        sheet(tmp_path / "two.png", [0, 0, 0, 1, 1, 1], channels=2)


def test_a_sheet_grows_with_its_shots_and_not_beyond_fifteen_queries_a_line(tmp_path: Path) -> None:
    sizes = {}
    for num_shots, num_queries in [(1, 15), (5, 15), (1, 30)]:
        path = tmp_path / f"{num_shots}.png"
        support, query = np.zeros((5 * num_shots, 1, 8, 8), np.uint8), np.zeros((5 * num_queries, 1, 8, 8), np.uint8)
        labels = np.repeat(np.arange(5), num_queries)
        episode_sheet(
            path, support, np.repeat(np.arange(5), num_shots), query, labels, labels,
            class_names=list("abcde"), ink=True, title="Size",
        )  # fmt: skip
        sizes[num_shots, num_queries] = pixels(path).shape
    (low, narrow, _), (same, wide, _), (high, unchanged, _) = sizes.values()
    assert (low, narrow) == (same, unchanged)
    assert wide > narrow
    assert high > low


def test_the_best_validation_is_marked_and_missing_values_are_none(tmp_path: Path) -> None:
    points = {
        "train/query_loss": ([1, 2, 3], [1.0, 0.5, 0.2]),
        "val/query_accuracy": ([1, 2, 3], [0.2, float("nan"), 0.9]),
        "val/query_accuracy_step_0": ([1, 2, 3], [0.2, 0.2, 0.2]),
    }
    learning_curve(tmp_path / "both.png", points, title="Run")
    learning_curve(tmp_path / "loss.png", {"train/query_loss": points["train/query_loss"]}, title="Run")
    assert pixels(tmp_path / "both.png").shape[1] > 1.8 * pixels(tmp_path / "loss.png").shape[1]  # two panels
    assert count(tmp_path / "both.png", (0x22, 0x22, 0x22)) > count(tmp_path / "loss.png", (0x22, 0x22, 0x22)) + 300


def test_one_validation_that_diverged_does_not_press_the_others_onto_the_axis(tmp_path: Path) -> None:
    """The curve of the training keeps its slope: it is seen at many heights, as without the outlier."""
    steps = list(range(1, 101))
    training = [4.0 / step for step in steps]

    def heights(validation: list[float]) -> int:
        points = {"train/query_loss": (steps, training), "val/query_loss": ([50, 80, 100], validation)}
        learning_curve(tmp_path / "curve.png", points, title="Run")
        image = pixels(tmp_path / "curve.png").astype(int)
        blue = (image[:, :, 2] - image[:, :, 0] > 60)[:, : image.shape[1] // 3]
        return int(blue.any(1).sum())

    assert heights([0.1, 1e6, 0.1]) > 0.1 * heights([0.1, 0.1, 0.1])


def test_a_run_without_points_has_no_learning_curve(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one point"):
        learning_curve(tmp_path / "none.png", {"train/query_loss": ([], [])}, title="Run")
    assert not (tmp_path / "none.png").exists()


def test_pictures_replace_older_ones_and_leave_nothing_else(tmp_path: Path) -> None:
    before = dict(rcParams)
    for _ in range(2):
        adaptation_curve(
            tmp_path / "adaptation.png",
            {
                "transductive": {k: (0.2 + 0.1 * k, 0.01) for k in range(6)},
                "inductive": {0: (0.2, 0.01), 5: (0.6, 0.02)},
            },
            metric="query_accuracy",
            title="Adaptation",
        )
        x = np.linspace(-5, 5, 50)
        fit_curve(
            tmp_path / "fit.png",
            inputs=x, targets=np.sin(x), support_inputs=x[::10], support_targets=np.sin(x[::10]),
            predictions={0: 0 * x, 1: 0.5 * np.sin(x), 10: np.sin(x)}, title="A sinusoid",
        )  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adaptation.png", "fit.png"]
    assert dict(rcParams) == before


# ------------------------------------------------------------------------------------------------ searches


@pytest.mark.parametrize("values", [[0.2, 0.5, 0.9, 0.4, 0.1], [0.5] * 5])
@pytest.mark.parametrize("y", [[1e-4, 1e-2, 1e-3, 5e-3, 2e-4], [1e-3] * 5])
def test_trials_anywhere_have_a_map_and_one_star(tmp_path: Path, y: list[float], values: list[float]) -> None:
    x = [1e-3, 1e-2, 0.1, 1.0, 0.3]
    for mode in ("max", "min"):
        value_map(
            tmp_path / f"{mode}.png", x, y, values, [True, True, False, True, True],
            names=("inner_lr", "outer_lr"), metric="query_accuracy", mode=mode, title="Search",
        )  # fmt: skip
        assert 300 < count(tmp_path / f"{mode}.png", RED) < 3000  # of the star and the legend
    same = (pixels(tmp_path / "max.png") == pixels(tmp_path / "min.png")).all()
    assert not same


def test_a_single_trial_has_a_map(tmp_path: Path) -> None:
    value_map(
        tmp_path / "one.png", [0.1], [0.01], [0.5], [True],
        names=("inner_lr", "outer_lr"), metric="query_loss", mode="min", title="Search",
    )  # fmt: skip
    assert count(tmp_path / "one.png", RED) > 300


def test_the_best_so_far_never_gets_worse_and_gaps_do_not_matter(tmp_path: Path) -> None:
    values = [3.0, 1.0, float("nan"), 1e9, 0.5]
    best_so_far(tmp_path / "best.png", [10, 20, 30, 40, 50], values, metric="query_loss", mode="min", title="Search")
    blue = (pixels(tmp_path / "best.png") == (0x00, 0x72, 0xB2)).all(axis=-1)
    columns = np.flatnonzero(blue[:, : blue.shape[1] // 2].any(0))  # the legend is on the right
    heights = [np.flatnonzero(blue[:, column]).max() for column in columns]  # rows are counted from above
    assert (np.diff(heights) >= -6).all()  # the width of the line


def test_a_budget_is_drawn_with_and_without_rungs(tmp_path: Path) -> None:
    budget(tmp_path / "asha.png", [10, 30, 270], most=270, rungs=[10, 30, 90], title="Search")
    budget(tmp_path / "none.png", [270, 270], most=270, rungs=[], title="Search")
    assert count(tmp_path / "asha.png", RED) > 1000 > 10 > count(tmp_path / "none.png", RED)


def test_parallel_coordinates_need_no_network_and_name_their_categories(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    columns: dict[str, list[Any]] = {
        "log10_inner_lr": [-1.0, -2.0],
        "algorithm": ["maml", "anil"],
        "clip_norm": [None, 1.0],
    }
    parallel_coordinates(page, columns, [0.5, 0.9], metric="query_accuracy", mode="max", title="Search")
    text = page.read_text()
    assert "<script src=" not in text
    assert '"ticktext":["anil","maml"]' in text
    assert '"values":[1,0]' in text
    assert '"values":[50.0,90.0]' in text
