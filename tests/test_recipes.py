"""A recipe is a whole configuration that trains, and says what its paper prints."""

import ast
import dataclasses
import inspect
import itertools
import math
import re
from pathlib import Path

import pytest
import torch

from distmaml import build, published, recipes, rehearsal, space
from distmaml.algorithms import ALGORITHMS
from distmaml.config import Config, flatten, override
from distmaml.episodes import Batch, Episode, task_keys
from distmaml.limits import check
from distmaml.options import ImageTaskOptions
from distmaml.outer import meta_gradient
from distmaml.published import PUBLISHED
from distmaml.recipes import RECIPES, default_space
from distmaml.tasks.sinusoid import SinusoidTasks
from distmaml.trees import tree_leaves, tree_names, tree_to
from tests.datasets import test_image_folder

SHORT = {"omniglot-maml-5w1s": 6000, "omniglot-maml-5w5s": 11_000}
"""Recipes that are made for two cores and an hour, and say so; all others are as long as their protocol."""
WIDEST = 95
"""Letters of a recipe's first line, which stands behind its name where the recipes are listed."""
NUM_CHARACTERS = 1100
"""Of Omniglot's, in training; four times as many classes with their rotations."""


def doc_of(name: str) -> str:
    return inspect.getdoc(RECIPES[name]) or ""


def spoken(number: float) -> set[str]:
    """How a number may be written: 48.7 also as 48.70."""
    return {f"{number:g}", f"{number:.1f}", f"{number:.2f}"}


# --------------------------------------------------------------------------------------- what is listed


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_passes_its_checks_under_the_name_of_its_function(name: str) -> None:
    config = RECIPES[name]()
    check(config)
    assert config.recipe == name == RECIPES[name].__name__.replace("_", "-")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_in_one_line_what_it_is_and_whose(name: str) -> None:
    first, *rest = doc_of(name).splitlines()
    assert len(first) < WIDEST
    assert first.endswith(".")
    assert not rest or rest[0] == ""
    if name in PUBLISHED:
        authors = re.sub(r" \((\d+)\).*", r", \1", PUBLISHED[name].source)  # "Finn et al. (2017), table 1"
        assert authors in first


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_is_like_another_names_one_that_is_there(name: str) -> None:
    mentioned = re.findall(r"`((?:omniglot|mini_imagenet|sinusoid)_\w+)`", doc_of(name))
    assert {other.replace("_", "-") for other in mentioned} <= RECIPES.keys() - {name}


def test_every_algorithm_has_a_recipe_on_omniglot_and_on_mini_imagenet() -> None:
    for dataset in ("omniglot", "mini-imagenet"):
        named = {f"{dataset}-{algorithm.replace('_', '-')}-5w1s" for algorithm in ALGORITHMS}
        assert named <= RECIPES.keys()
        assert {RECIPES[name]().algorithm for name in named} == ALGORITHMS.keys()


@pytest.mark.parametrize("name", RECIPES)
def test_a_name_says_data_algorithm_ways_and_shots(name: str) -> None:
    config = RECIPES[name]()
    flat = flatten(config)
    dataset = {"image_folder": "mini-imagenet"}.get(
        flat.get("dataset", config.tasks), flat.get("dataset", config.tasks)
    )
    if name == "image-folder-maml":
        return
    setting = f"{flat['num_ways']}w{flat['num_shots']}s" if "num_ways" in flat else f"{flat['num_shots']}s"
    assert name.startswith(f"{dataset}-{config.algorithm.replace('_', '-')}-")
    assert setting in name.split("-")


# ---------------------------------------------------------------------------------------- what is printed


def test_every_recipe_on_data_of_a_paper_has_its_row() -> None:
    assert PUBLISHED.keys() == RECIPES.keys() - {"glyphs-maml-5w1s", "image-folder-maml"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_is_as_long_as_its_protocol(name: str) -> None:
    assert RECIPES[name]().outer.num_outer_steps == SHORT.get(name, PUBLISHED[name].num_outer_steps)


@pytest.mark.parametrize("name", sorted(PUBLISHED.keys() - {"omniglot-maml-5w5s"}))  # which says that it has fewer
def test_a_step_has_as_many_tasks_as_the_protocol(name: str) -> None:
    assert RECIPES[name]().outer.meta_batch_size == PUBLISHED[name].meta_batch_size


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_says_the_figure_that_is_noted(name: str) -> None:
    row, doc = PUBLISHED[name], doc_of(name)
    if row.value is None:
        assert re.search(r"no such row|20 ways alone|verified|no number|other waves", doc)
        assert re.search(r"no such row|20 ways alone|verified|no number|other waves", row.remark)
        assert row.half_width is None
        return
    assert spoken(row.value) & set(re.findall(r"\d+\.\d+", doc))
    if row.half_width is not None:
        both = {f"{value} +- {half}" for value in spoken(row.value) for half in spoken(row.half_width)}
        assert any(text in doc for text in both)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_row_is_a_plausible_one_of_a_paper_that_can_be_found(name: str) -> None:
    row = PUBLISHED[name]
    assert row.url.startswith(("https://arxiv.org/abs/", "https://openreview.net/forum?id="))
    assert not row.remark or row.remark.endswith(".")
    if row.value is not None:
        assert (0 < row.value < 10) if name.startswith("sinusoid") else (20 < row.value < 100)
        assert row.half_width is None or 0 < row.half_width < 2


def test_every_field_of_a_row_has_a_docstring_under_it() -> None:
    tree = ast.parse(Path(published.__file__).read_text())
    (cls,) = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    fields = 0
    for entry, after in itertools.pairwise([*cls.body, None]):
        if isinstance(entry, ast.AnnAssign):
            fields += 1
            assert isinstance(after, ast.Expr)
            assert isinstance(after.value, ast.Constant)
    assert fields == len(dataclasses.fields(published.Published))


# ------------------------------------------------------------------------------- what a paper's rate means


@pytest.mark.parametrize(
    ("name", "summed", "num_ways", "on_the_mean"),
    [
        ("omniglot-maml-5w1s-paper", 0.4, 5, 2.0),
        ("omniglot-maml-5w5s-paper", 0.4, 5, 2.0),
        ("omniglot-maml-20w1s", 0.1, 20, 2.0),
        ("omniglot-anil-20w1s", 0.1, 20, 2.0),
        ("omniglot-anil-20w5s", 0.1, 20, 2.0),
        ("omniglot-maml-20w5s", 0.1, 20, 2.0),
        ("mini-imagenet-maml-5w1s", 0.01, 5, 0.05),
        ("mini-imagenet-maml-5w5s", 0.01, 5, 0.05),
        ("mini-imagenet-fomaml-5w1s", 0.01, 5, 0.05),
    ],
)
def test_a_rate_of_a_loss_summed_over_ways_is_as_many_times_larger_on_the_mean(
    name: str, summed: float, num_ways: int, on_the_mean: float
) -> None:
    flat = flatten(RECIPES[name]())
    assert flat["num_ways"] == num_ways
    assert math.isclose(recipes.shared.on_the_mean(summed, num_ways), on_the_mean)
    assert math.isclose(flat["inner_lr"], on_the_mean)


@pytest.mark.parametrize(("num_ways", "num_shots", "summed"), [(5, 1, 0.4), (20, 1, 0.1), (5, 5, 0.01)])
def test_a_step_on_the_mean_is_the_papers_step_on_the_sum(num_ways: int, num_shots: int, summed: float) -> None:
    """cbfinn/maml divides the cross-entropy of each sample by the shots, and TensorFlow's gradient adds the samples."""
    torch.manual_seed(0)
    samples, labels = torch.randn(num_ways * num_shots, 7), torch.arange(num_ways).repeat_interleave(num_shots)
    weight = torch.randn(7, num_ways, requires_grad=True)
    each = torch.nn.functional.cross_entropy(samples @ weight, labels, reduction="none")
    (theirs,) = torch.autograd.grad((each / num_shots).sum(), weight, retain_graph=True)
    (ours,) = torch.autograd.grad(each.mean(), weight)
    torch.testing.assert_close(recipes.shared.on_the_mean(summed, num_ways) * ours, summed * theirs)


def test_the_papers_own_maml_differs_from_ours_in_what_it_says_alone() -> None:
    ours, paper = (flatten(RECIPES[name]()) for name in ("omniglot-maml-5w1s", "omniglot-maml-5w1s-paper"))
    different = {name: paper[name] for name in paper if paper[name] != ours[name]}
    assert different == {
        "recipe": "omniglot-maml-5w1s-paper", "inner_lr": 2.0, "num_queries": 1, "num_eval_queries": 1,
        "num_outer_steps": 60_000, "schedule": "constant", "val_every": 1000, "num_val_episodes": 600,
        "num_test_episodes": 600,
    }  # fmt: skip
    assert {name: paper[name] for name in ("num_filters", "downsample", "outer_lr", "optimizer", "num_eval_steps")} == {
        "num_filters": 64, "downsample": "stride", "outer_lr": 1e-3, "optimizer": "adam", "num_eval_steps": 3,
    }  # fmt: skip
    five = flatten(RECIPES["omniglot-maml-5w5s-paper"]())
    assert {name: five[name] for name in five if five[name] != paper[name]} == {
        "recipe": "omniglot-maml-5w5s-paper", "num_shots": 5, "num_queries": 5, "num_eval_queries": 5,
    }  # fmt: skip


@pytest.mark.parametrize(("name", "images"), [("omniglot-reptile-5w1s", 10), ("omniglot-reptile-20w1s", 10),
                                              ("mini-imagenet-reptile-5w1s", 15)])  # fmt: skip
def test_reptile_trains_on_the_papers_images_a_class_and_its_step_falls_from_one_to_zero(
    name: str, images: int
) -> None:
    flat = flatten(RECIPES[name]())
    assert flat["num_shots"] + flat["num_queries"] == images
    assert (flat["outer_lr"], flat["final_lr_fraction"]) == (1.0, 0.0)
    assert (flat["optimizer"], flat["schedule"], flat["inner_optimizer"]) == ("sgd", "linear", "adam")


@pytest.mark.parametrize(("name", "epochs"), [("omniglot-maml-plus-plus-20w5s", 10),
                                              ("mini-imagenet-maml-plus-plus-5w5s", 15)])  # fmt: skip
def test_maml_plus_plus_anneals_over_the_authors_epochs_of_500_steps(name: str, epochs: int) -> None:
    assert flatten(RECIPES[name]())["annealing_steps"] == 500 * epochs
    assert flatten(RECIPES[name]())["num_outer_steps"] == 500 * 100


@pytest.mark.parametrize("name", [name for name in RECIPES if "prototypical" in name and name.startswith("omniglot")])
def test_a_step_of_a_metric_learner_sees_60_classes_as_in_the_paper(name: str) -> None:
    flat = flatten(RECIPES[name]())
    assert flat["meta_batch_size"] * flat["num_ways"] == 60


# ------------------------------------------------------------------------------------ whether it learns


def learner_of(config: Config) -> build.Learner:
    options = config.task_options
    if not isinstance(options, ImageTaskOptions):
        return build.learner(config, build.Shapes((1,), 1), torch.device("cpu"))
    shape = (3 if options.color else 1, options.image_size, options.image_size)
    num_classes = NUM_CHARACTERS * (1 if options.rotations == "none" else 4)
    return build.learner(config, build.Shapes(shape, options.num_ways, num_classes), torch.device("cpu"))


def tasks_of(config: Config, num_tasks: int = 2) -> Episode:
    """Tasks as the recipe's, of noise where they would be pictures, with 2 query images a class at most."""
    options = config.task_options
    if not isinstance(options, ImageTaskOptions):
        flat = flatten(options)
        waves = SinusoidTasks(split="train", seed=0, num_shots=flat["num_shots"], num_queries=flat["num_queries"])
        sampled: Episode = tree_to(waves.sample(range(num_tasks)), torch.device("cpu"), torch.float32)
        return sampled
    generator = torch.Generator().manual_seed(0)
    size = (3 if options.color else 1, options.image_size, options.image_size)

    def batch(per_class: int) -> Batch:
        labels = torch.arange(options.num_ways).repeat_interleave(per_class).expand(num_tasks, -1)
        return Batch(torch.rand(*labels.shape, *size, generator=generator), labels)

    classes = torch.randint(4 * NUM_CHARACTERS, (num_tasks, options.num_ways), generator=generator)
    num_queries = 2 if config.algorithm != "reptile" else options.num_queries  # an inner batch wants so many
    return Episode(
        batch(options.num_shots), batch(min(num_queries, options.num_queries)), task_keys(0, "train", range(num_tasks)),
        classes,
    )  # fmt: skip


def narrow(config: Config) -> Config:
    """With a tenth of the time: what a recipe says of widths and numbers of steps is looked at elsewhere."""
    flat = flatten(config)
    least = {"num_filters": 8, "num_inner_steps": 2, "hidden_size": 4, "num_context": 4}
    return override(config, {name: min(value, flat[name]) for name, value in least.items() if name in flat})


@pytest.mark.parametrize("name", [name for name in PUBLISHED if not name.startswith("mini-imagenet")])
def test_a_recipe_builds_its_learner_and_its_meta_gradient_is_finite(name: str) -> None:
    config = RECIPES[name]()
    whole = learner_of(config)  # with all of its widths
    learner = learner_of(narrow(config))
    assert tree_names(learner.meta_params) == tree_names(whole.meta_params)
    grads, metrics = meta_gradient(learner.algorithm, learner.meta_params, tasks_of(config), 0)
    assert tree_names(grads) == tree_names(learner.meta_params)
    assert all(bool(leaf.isfinite().all()) for leaf in tree_leaves(grads))
    assert any(bool(leaf.any()) for leaf in tree_leaves(grads))
    assert all(math.isfinite(float(metric)) for metric in metrics.values())


@pytest.fixture(scope="module")
def mini_imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the form of mini-ImageNet's, of grey pictures."""
    splits = {split: [f"n{split}{number}" for number in range(5)] for split in ("train", "val", "test")}
    folder = tmp_path_factory.mktemp("mini") / "data"
    folder.mkdir()
    return test_image_folder.flat(folder, splits, count=20)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("mini-imagenet")])
def test_a_recipe_of_large_pictures_builds_its_learner(name: str) -> None:
    learner = learner_of(RECIPES[name]())
    assert all(bool(leaf.isfinite().all()) for leaf in tree_leaves(learner.meta_params))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("mini-imagenet")])
def test_a_recipe_of_large_pictures_reads_a_users_files_and_computes_a_gradient(name: str, mini_imagenet: Path) -> None:
    config = override(narrow(RECIPES[name]()), {"data_dir": mini_imagenet, "output_dir": mini_imagenet.parent / "out"})
    rehearsal.rehearse(config)
    tasks = build.task_distributions(config)
    for split in ("train", "val", "test"):
        support, query, *_ = tasks[split].sample([0])
        assert support.inputs.shape[1:] == (5 * flatten(config)["num_shots"], 3, 84, 84)
        assert 0 <= float(query.inputs.min()) < float(query.inputs.max()) <= 1
    learner = learner_of(config)
    one = tree_to(tasks["train"].sample([0]), torch.device("cpu"), torch.float32)
    grads, _ = meta_gradient(learner.algorithm, learner.meta_params, one, 0)
    assert all(bool(leaf.isfinite().all()) for leaf in tree_leaves(grads))
    assert any(bool(leaf.any()) for leaf in tree_leaves(grads))


# ----------------------------------------------------------------------------------------- how it is searched


@pytest.mark.parametrize("rates_only", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_the_default_space_of_a_recipe_is_one_and_its_own_rates_lie_in_it(name: str, rates_only: bool) -> None:
    config = RECIPES[name]()
    texts = default_space(config, rates_only=rates_only)
    chosen = space.parse(config, texts)
    space.check_space(config, chosen)
    flat = flatten(config)
    assert chosen.keys() <= flat.keys()
    for field, domain in chosen.items():
        own = flat[field]
        assert own in domain.values if domain.kind == "choice" else domain.low <= own <= domain.high
    assert not rates_only or chosen.keys() <= {"inner_lr", "outer_lr"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_default_space_changes_an_algorithm_for_one_with_the_same_options_alone(name: str) -> None:
    config = RECIPES[name]()
    chosen = space.parse(config, default_space(config))
    for algorithm in chosen["algorithm"].values if "algorithm" in chosen else ():
        other = override(config, {"algorithm": algorithm})
        assert other.algorithm_options == config.algorithm_options


def test_what_does_nothing_is_not_searched() -> None:
    assert not any(text.startswith("inner_lr") for text in default_space(RECIPES["omniglot-meta-lstm-5w1s"]()))
    networks = default_space(RECIPES["omniglot-prototypical-networks-5w1s"]())
    assert [text.partition("=")[0] for text in networks] == ["outer_lr", "meta_batch_size"]
    tuning = default_space(RECIPES["omniglot-fine-tuning-5w1s"]())
    assert [text.partition("=")[0] for text in tuning] == ["inner_lr", "outer_lr", "meta_batch_size"]


@pytest.mark.parametrize("name", ["omniglot-imaml-hf-5w1s", "sinusoid-imaml-5s"])
def test_newton_steps_have_no_rate_to_search(name: str) -> None:
    assert [text.partition("=")[0] for text in default_space(RECIPES[name]())][:2] == ["outer_lr", "num_inner_steps"]


@pytest.mark.parametrize(("pull", "highest"), [(0.5, 1.0), (9.0, 2 / 9), (1e4, 2e-4)])
def test_a_rate_by_which_imaml_goes_astray_is_not_tried(pull: float, highest: float) -> None:
    config = override(RECIPES["omniglot-imaml-5w1s"](), {"regularization": pull, "inner_lr": min(0.1, 1 / pull)})
    domain = space.parse(config, default_space(config))["inner_lr"]
    assert domain.low < domain.high == pytest.approx(highest, rel=1e-5)


def test_the_default_space_of_maml_is_what_it_was() -> None:
    assert default_space(RECIPES["glyphs-maml-5w1s"]()) == (
        "inner_lr=log:0.001:1", "outer_lr=log:0.0001:0.01", "num_inner_steps=int:1:5",
        "algorithm=choice:maml,fomaml,anil", "meta_batch_size=choice:4,8,16",
    )  # fmt: skip
