"""What a person sees who opens the link of a search, in a real browser on a real MLflow server."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from distmaml import study
from distmaml.space import Search
from tests.browser import PATIENCE_MS, cards, open_page
from tests.runs import pictures, run_serially, tiny_store
from tests.servers import Server

pytestmark = pytest.mark.ray
NUM_TRIALS, NUM_STEPS = 12, 6


@pytest.fixture(scope="module")
def page(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The page that a search's link opens."""
    output = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("page") / "output"))
    tiny_store(output / "tiny.arrow")
    space = ("inner_lr=log:0.001:0.5", "outer_lr=log:0.0001:0.1", "num_inner_steps=int:1:3")
    config = pictures(output, "s", num_outer_steps=NUM_STEPS, val_every=2, log_every=1)
    with pytest.MonkeyPatch.context() as patch:
        run_serially(patch)
        study.tune(config, Search(space=space, num_samples=2))  # another search of the experiment
        config = pictures(output, "t", num_outer_steps=NUM_STEPS, val_every=2, log_every=1)
        found = study.tune(config, Search(space=space, num_samples=NUM_TRIALS))
    link = found.compare[-1].removeprefix("open http://127.0.0.1:5000")
    server = Server(output, output / "mlflow.db")
    server.start()
    try:
        with open_page(server.uri + link) as opened:
            yield opened
    finally:
        server.stop()


@pytest.mark.parametrize("section", ["Comparison", "train", "val"])
def test_the_page_has_the_sections_of_a_search(page: Page, section: str) -> None:
    headers = page.get_by_test_id("experiment-view-compare-runs-section-header")
    expect(headers.filter(has_text=section).first).to_be_visible(timeout=PATIENCE_MS)


def test_it_lists_the_trials_of_this_search_from_the_best_on(page: Page) -> None:
    expect(page.get_by_text(f"{NUM_TRIALS} matching runs")).to_be_visible(timeout=PATIENCE_MS)
    names = page.get_by_role("link", name=re.compile(r"^[st]-\d{3}$"))
    expect(names).to_have_count(NUM_TRIALS)
    assert sorted(names.all_inner_texts()) == [f"t-{number:03d}" for number in range(NUM_TRIALS)]


def test_its_charts_show_every_trial(page: Page) -> None:
    drawn = cards(page)
    parallel, contour, best = (drawn.nth(number) for number in range(3))
    expect(parallel).to_contain_text("Parallel Coordinates")
    for axis in ("log10_inner_lr", "log10_outer_lr", "num_inner_steps", "best/query_accuracy"):
        expect(parallel.locator("svg text").filter(has_text=axis).first).to_be_attached()
    expect(contour.locator(".contourlayer path").first).to_be_attached()
    expect(contour.locator(".scatterlayer path.point")).to_have_count(NUM_TRIALS)
    expect(contour).to_contain_text("log10_outer_lr")
    expect(best).to_contain_text("best/query_accuracy")
    expect(best.locator(".barlayer .point")).to_have_count(NUM_TRIALS)


def test_its_curves_have_a_line_for_every_trial(page: Page) -> None:
    curve = cards(page).filter(has_text="train/query_loss").first
    curve.scroll_into_view_if_needed()
    expect(curve.locator(".scatterlayer path.point")).to_have_count(NUM_TRIALS * NUM_STEPS)
