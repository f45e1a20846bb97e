"""docs/ALGORITHMS.md names every algorithm, and the one that it makes is one."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import distmaml
from distmaml import LocalWorker, build, classification, initial_params, train
from distmaml.algorithms import ALGORITHMS
from distmaml.config import Config, flatten, override
from distmaml.options import OPTIONS
from distmaml.recipes import RECIPES
from distmaml.trees import tree_index, tree_leaves, tree_map
from tests.modules import make

ROOT = Path(distmaml.__file__).parents[1]
PAGE = ROOT / "docs" / "ALGORITHMS.md"


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the page's example, where a run would import it from."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "one_rate.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    return build.import_attribute("one_rate:one_rate")


def test_the_page_has_a_row_and_a_section_for_every_algorithm_and_for_no_other() -> None:
    text = PAGE.read_text()
    assert {name for row in re.findall(r"^\| \[?`(\w+)`", text, re.MULTILINE) for name in [row]} == set(ALGORITHMS)
    headings = re.findall(r"^## ([\w, ]+)$", text, re.MULTILINE)
    sections = {name for heading in headings for name in heading.split(", ")}
    assert sections == {*ALGORITHMS, "Your own"}


def test_the_options_that_the_page_names_exist() -> None:
    flags = set(re.findall(r"`?--((?:no-)?[a-z]+(?:-[a-z]+)*)", PAGE.read_text()))
    known = {name for kind in [*OPTIONS["algorithm"][0].values(), OPTIONS["algorithm"][1]] for name in _fields(kind)}
    known |= {"help", *flatten(Config())}
    assert {flag.removeprefix("no-").replace("-", "_") for flag in flags} <= known


def test_the_gradient_of_the_example_is_that_of_its_loss(example: Any) -> None:
    module, tasks, _ = make("mlp", num_tasks=3)
    objective = classification(module.model)
    algorithm = example(objective, inner_lr=0.3, num_inner_steps=2)
    generator = torch.Generator().manual_seed(0)
    meta = algorithm.init(initial_params(module.model), generator)
    grads, metrics = distmaml.meta_gradient(algorithm, meta, tasks, 0)
    direction = tree_map(lambda leaf: torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype), meta)

    def mean_loss(length: float) -> float:
        moved = tree_map(lambda leaf, d: leaf + length * d, meta, direction)
        losses = []
        for index in range(3):
            task = tree_index(tasks, index)
            state = algorithm.adapt(moved, task.support)[-1]
            outputs = algorithm.predict(moved, state, task.query.inputs)
            losses.append(objective.loss(outputs, task.query.targets)[0].item())
        return sum(losses) / len(losses)

    along = sum(float((g * d).sum()) for g, d in zip(tree_leaves(grads), tree_leaves(direction), strict=True))
    assert along == pytest.approx((mean_loss(1e-5) - mean_loss(-1e-5)) / 2e-5, rel=1e-6)
    assert float(metrics["query_loss"]) == pytest.approx(mean_loss(0.0), rel=1e-12)
    assert grads.inner_lr.shape == ()
    assert grads.inner_lr != 0


def test_the_example_trains(example: Any, tmp_path: Path) -> None:
    config = override(
        RECIPES["sinusoid-maml-5s"](),
        {
            "algorithm": "one_rate:one_rate", "algorithm_arguments": {"inner_lr": 0.01, "num_inner_steps": 1},
            "num_outer_steps": 30, "val_every": 30, "num_val_episodes": 20, "num_test_episodes": 0, "name": "own",
            "output_dir": tmp_path,
        },
    )  # fmt: skip
    values = train(config, LocalWorker())
    assert values["step"] == 30
    tensors, _ = distmaml.checkpoint.load(tmp_path / "runs" / "own" / "model.safetensors")
    assert tensors["inner_lr"] != 0.01


def _fields(kind: type) -> list[str]:
    return list(kind.__dataclass_fields__)  # type: ignore[attr-defined]
