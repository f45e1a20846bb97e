"""Complete configurations for known experiments: dataset_algorithm_setting.

A recipe is a function of no arguments; its name on the command line has dashes for underscores. What a recipe does
otherwise than its paper is said in its docstring, what it prints in published.py. All of them differ in this:

- Batch norm takes the statistics of the batch, and its scale and shift adapt like all parameters. The MAML authors'
  code takes them too, has no scale, and does not adapt the shift.
- The head is torch's nn.Linear. The MAML authors draw that of Omniglot from N(0, 1).
- The division of Omniglot's characters, 1100, 100 and 423, is drawn anew; every paper has its own.
- A test query set is 15 images a class with 5 ways and 5 with 20, where it is not said otherwise. MAML's has as many as
  there are shots, hence its wide intervals.
- Accuracy is scored in both batch-norm modes. The figures of MAML, iMAML, CAVIA and MAML++ are transductive, those of
  Reptile and the metric learners inductive.
- Gradients are not clipped entry by entry, as the MAML and MAML++ authors' code does for mini-ImageNet.

An inner rate is on the mean loss. That of a paper whose code sums it over the ways goes through `_on_the_mean`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from distmaml.config import Config, Evaluation, Outer, flatten
from distmaml.options import (
    AlgorithmOptions,
    CaviaOptions,
    Conv4Options,
    FineTuningOptions,
    ImageTaskOptions,
    ImamlOptions,
    InnerLoop,
    MamlPlusPlusOptions,
    MetaLstmOptions,
    MetricOptions,
    MlpOptions,
    ReptileOptions,
    SinusoidOptions,
)

RECIPES: dict[str, Callable[[], Config]] = {}
"""Name on the command line -> recipe, in the order of this file."""


def _recipe(function: Callable[[], Config]) -> Callable[[], Config]:
    """Lists a recipe."""
    RECIPES[function.__name__.replace("_", "-")] = function
    return function


def _on_the_mean(summed: float, num_ways: int) -> float:
    """The inner rate for the mean loss that steps as far as a paper's for the loss summed over ways (cbfinn/maml)."""
    return num_ways * summed


# ---------------------------------------------------------------------------------------------- glyphs


@_recipe
def glyphs_maml_5w1s() -> Config:
    """MAML on the embedded glyphs, 5-way 1-shot: no download, minutes on two cores."""
    return Config(
        recipe="glyphs-maml-5w1s",
        algorithm_options=InnerLoop(inner_lr=0.4, num_inner_steps=1),
        model_options=Conv4Options(num_filters=32),
        task_options=ImageTaskOptions(dataset="glyphs", num_queries=5),
        outer=Outer(num_outer_steps=800, meta_batch_size=8, outer_lr=2e-3, schedule="cosine"),
        evaluation=Evaluation(val_every=200, num_val_episodes=100, num_test_episodes=400),
    )


# -------------------------------------------------------------------------------------------- Omniglot


@_recipe
def omniglot_maml_5w1s() -> Config:
    """MAML on Omniglot, 5-way 1-shot (Finn et al., 2017: 98.7 +- 0.4 % after 60,000 steps).

    Otherwise than the paper: inner_lr 0.4 on the mean loss (the paper's 0.4 on the summed loss is 2.0 here, which
    starts slower), 5 query images a class in training (the paper: as many as shots), 3 test steps, cosine schedule. An
    outer_lr of 3e-3 is ahead for some hundred steps and behind after 3,000.
    """
    return Config(
        recipe="omniglot-maml-5w1s",
        algorithm_options=InnerLoop(inner_lr=0.4, num_inner_steps=1),
        task_options=ImageTaskOptions(dataset="omniglot", split="maml", num_shots=1, num_queries=5, rotations="all"),
        outer=Outer(num_outer_steps=6000, meta_batch_size=32, schedule="cosine"),
        evaluation=Evaluation(val_every=500, num_val_episodes=200, num_test_episodes=1000),
    )


@_recipe
def omniglot_maml_5w5s() -> Config:
    """MAML on Omniglot, 5-way 5-shot (Finn et al., 2017: 99.9 +- 0.1 % after 60,000 steps).

    Made for half an hour on two cores: 32 filters (the paper: 64) and 8 tasks a step (the paper: 32), which at the same
    number of tasks is ahead in the beginning and no worse at the end. Else as `omniglot_maml_5w1s`.
    """
    base = omniglot_maml_5w1s()
    return Config(
        recipe="omniglot-maml-5w5s",
        algorithm_options=base.algorithm_options,
        model_options=Conv4Options(num_filters=32),
        task_options=ImageTaskOptions(dataset="omniglot", split="maml", num_shots=5, num_queries=5, rotations="all"),
        outer=Outer(num_outer_steps=11_000, meta_batch_size=8, schedule="cosine"),
        evaluation=replace(base.evaluation, val_every=1000),
    )


def _omniglot(
    recipe: str,
    algorithm: str,
    options: AlgorithmOptions,
    outer: Outer,
    *,
    num_eval_steps: int,
    num_ways: int = 5,
    num_shots: int = 1,
    num_queries: int = 5,
    num_eval_queries: int | None = None,
    num_val_episodes: int = 200,
    model: Conv4Options | None = None,
    rotations: Literal["none", "train", "all"] = "all",
) -> Config:
    """What all have in common: the split, Conv4 as in the MAML paper, rotations as classes, 600 test episodes."""
    if num_eval_queries is None:
        num_eval_queries = 15 if num_ways <= 5 else 5  # the inductive test costs num_ways times their number
    return Config(
        recipe=recipe,
        algorithm=algorithm,
        algorithm_options=options,
        model_options=Conv4Options() if model is None else model,
        task_options=ImageTaskOptions(
            dataset="omniglot", split="maml", num_ways=num_ways, num_shots=num_shots, num_queries=num_queries,
            num_eval_queries=num_eval_queries, rotations=rotations,
        ),
        outer=outer,
        evaluation=Evaluation(num_eval_steps=num_eval_steps, val_every=1000, num_val_episodes=num_val_episodes),
    )  # fmt: skip


def _omniglot_beside_maml(
    recipe: str, algorithm: str, options: AlgorithmOptions | None = None, *, num_eval_steps: int = 3
) -> Config:
    """The inner loop of `omniglot_maml_5w1s`, unless `options` has another, for as many steps as the MAML paper."""
    base = omniglot_maml_5w1s()
    return _omniglot(
        recipe, algorithm, base.algorithm_options if options is None else options,
        replace(base.outer, num_outer_steps=60_000), num_eval_steps=num_eval_steps,
    )  # fmt: skip


@_recipe
def omniglot_maml_5w1s_paper() -> Config:
    """MAML on Omniglot, 5-way 1-shot, by the paper to the letter (Finn et al., 2017: 98.7 +- 0.4 %).

    60,000 steps of 32 tasks, constant Adam 1e-3, 1 query image a class in training and test, 1 inner step in training
    and 3 in the test. The paper's inner_lr of 0.4 is on the loss summed over 5 ways: 2.0 on the mean.
    """
    return _omniglot(
        "omniglot-maml-5w1s-paper", "maml", InnerLoop(_on_the_mean(0.4, num_ways=5), num_inner_steps=1),
        Outer(num_outer_steps=60_000, meta_batch_size=32), num_eval_steps=3, num_queries=1, num_eval_queries=1,
        num_val_episodes=600,
    )  # fmt: skip


def _omniglot_maml_20w(num_shots: int) -> Config:
    return _omniglot(
        f"omniglot-maml-20w{num_shots}s", "maml", InnerLoop(_on_the_mean(0.1, num_ways=20), num_inner_steps=5),
        Outer(num_outer_steps=60_000, meta_batch_size=16), num_eval_steps=5, num_ways=20, num_shots=num_shots,
        num_queries=num_shots,
    )  # fmt: skip


@_recipe
def omniglot_maml_20w1s() -> Config:
    """MAML on Omniglot, 20-way 1-shot (Finn et al., 2017: 95.8 +- 0.3 %).

    As the paper: 60,000 steps of 16 tasks, constant Adam 1e-3, 5 inner steps in training and test, as many query images
    as shots in training. Its inner_lr of 0.1 is on the loss summed over 20 ways: 2.0 on the mean.
    """
    return _omniglot_maml_20w(1)


@_recipe
def omniglot_maml_20w5s() -> Config:
    """MAML on Omniglot, 20-way 5-shot (Finn et al., 2017: 98.9 +- 0.2 %). As `omniglot_maml_20w1s`."""
    return _omniglot_maml_20w(5)


@_recipe
def omniglot_fomaml_5w1s() -> Config:
    """First-order MAML on Omniglot, 5-way 1-shot (Nichol et al., 2018: 98.3 +- 0.5 %, transductive).

    Finn et al. (2017) have no such row. Inner loop, query images and cosine are those of `omniglot_maml_5w1s`, the
    60,000 steps of 32 tasks those of the MAML paper.
    """
    return _omniglot_beside_maml("omniglot-fomaml-5w1s", "fomaml")


@_recipe
def omniglot_anil_5w1s() -> Config:
    """ANIL on Omniglot, 5-way 1-shot (Raghu et al., 2020, have 20 ways alone).

    So there is nothing to compare with; 1 inner step, and all else as `omniglot_fomaml_5w1s`.
    """
    return _omniglot_beside_maml("omniglot-anil-5w1s", "anil")


@_recipe
def omniglot_boil_5w1s() -> Config:
    """BOIL on Omniglot, 5-way 1-shot (Oh et al., 2021, have no such row).

    Their inner loop: 1 step of the body by 0.5, the head stays, in training and test. The rest is that of
    `omniglot_fomaml_5w1s`, not theirs.
    """
    return _omniglot_beside_maml(
        "omniglot-boil-5w1s", "boil", InnerLoop(inner_lr=0.5, num_inner_steps=1), num_eval_steps=1
    )


@_recipe
def omniglot_meta_sgd_5w1s() -> Config:
    """Meta-SGD on Omniglot, 5-way 1-shot (Li et al., 2017: 99.5 %).

    As the paper: 1 inner step in training and test, 32 tasks a step, Adam 1e-3. Otherwise: all rates begin as 0.4, that
    of `omniglot_maml_5w1s` (the paper draws them at random); 5 query images a class in training, cosine, 60,000 steps.
    """
    return _omniglot_beside_maml("omniglot-meta-sgd-5w1s", "meta_sgd", num_eval_steps=1)


def _omniglot_maml_plus_plus(num_ways: int, num_shots: int) -> Config:
    return _omniglot(
        f"omniglot-maml-plus-plus-{num_ways}w{num_shots}s", "maml_plus_plus",
        MamlPlusPlusOptions(inner_lr=0.1, num_inner_steps=5, annealing_steps=5000),
        Outer(num_outer_steps=50_000, meta_batch_size=8, schedule="cosine", final_lr_fraction=0.01),
        num_eval_steps=5, num_ways=num_ways, num_shots=num_shots, num_queries=1, num_eval_queries=1,
        num_val_episodes=600, model=Conv4Options(downsample="pool"), rotations="train",
    )  # fmt: skip


@_recipe
def omniglot_maml_plus_plus_5w1s() -> Config:
    """MAML++ on Omniglot, 5-way 1-shot (Antoniou et al., 2019: 99.47 %, an ensemble of 5).

    As the authors' configuration: 8 tasks, 5 inner steps by learned rates that begin as 0.1, 1 query image a class in
    training and test, max-pooling, Adam from 1e-3 to 1e-5 by a cosine over 50,000 steps (100 epochs of 500), weights of
    the losses annealed over 10 epochs, scales and shifts of batch norm for each step, rotations in training alone.
    Otherwise: their division of the characters is 1151, 50, 423; their figures are of the 5 models that are best in
    validation together, and ours of one.
    """
    return _omniglot_maml_plus_plus(5, 1)


@_recipe
def omniglot_maml_plus_plus_5w5s() -> Config:
    """MAML++ on Omniglot, 5-way 5-shot (Antoniou et al., 2019: 99.93 %, an ensemble of 5).

    As `omniglot_maml_plus_plus_5w1s`.
    """
    return _omniglot_maml_plus_plus(5, 5)


@_recipe
def omniglot_maml_plus_plus_20w1s() -> Config:
    """MAML++ on Omniglot, 20-way 1-shot (Antoniou et al., 2019: 97.65 +- 0.05 %).

    As `omniglot_maml_plus_plus_5w1s`.
    """
    return _omniglot_maml_plus_plus(20, 1)


@_recipe
def omniglot_maml_plus_plus_20w5s() -> Config:
    """MAML++ on Omniglot, 20-way 5-shot (Antoniou et al., 2019: 99.33 +- 0.03 %).

    As `omniglot_maml_plus_plus_5w1s`.
    """
    return _omniglot_maml_plus_plus(20, 5)


def _omniglot_imaml(recipe: str, options: ImamlOptions, *, num_ways: int = 5) -> Config:
    return _omniglot(
        recipe, "imaml", options, Outer(num_outer_steps=20_000, meta_batch_size=32),
        num_eval_steps=options.num_inner_steps, num_ways=num_ways, num_queries=1,
    )  # fmt: skip


@_recipe
def omniglot_imaml_5w1s() -> Config:
    """iMAML on Omniglot, 5-way 1-shot (Rajeswaran et al., 2019: 99.16 +- 0.35 %).

    As the paper: 16 gradient steps by 0.1, lambda 2, 5 steps of conjugate gradients, 20,000 steps of 32 tasks, Adam
    1e-3, as many query images as shots in training. Otherwise: Adam's epsilon is torch's (theirs: 1e-3), tasks are
    always new (theirs: out of 200,000), and every inner step feels lambda (in their code one more step at the end).
    """
    return _omniglot_imaml("omniglot-imaml-5w1s", ImamlOptions(0.1, 16, regularization=2.0, num_cg_steps=5))


@_recipe
def omniglot_imaml_hf_5w1s() -> Config:
    """iMAML, Hessian-free, on Omniglot, 5-way 1-shot (Rajeswaran et al., 2019: 99.50 +- 0.26 %).

    As the paper: the direction of an inner step by 5 steps of conjugate gradients, its length by a line search. The
    number of such steps, 3, is ours. Else as `omniglot_imaml_5w1s`.
    """
    return _omniglot_imaml(
        "omniglot-imaml-hf-5w1s",
        ImamlOptions(0.1, 3, regularization=2.0, num_cg_steps=5, solver="hessian_free"),
    )


@_recipe
def omniglot_imaml_20w1s() -> Config:
    """iMAML on Omniglot, 20-way 1-shot (Rajeswaran et al., 2019: 94.46 +- 0.42 %).

    25 gradient steps as in the paper, else as `omniglot_imaml_5w1s`.
    """
    options = ImamlOptions(0.1, 25, regularization=2.0, num_cg_steps=5)
    return _omniglot_imaml("omniglot-imaml-20w1s", options, num_ways=20)


def _reptile(inner_lr: float, num_inner_steps: int, inner_batch_size: int) -> ReptileOptions:
    return ReptileOptions(inner_lr, num_inner_steps, inner_batch_size=inner_batch_size, inner_optimizer="adam")


def _reptile_outer(num_outer_steps: int) -> Outer:
    """The step size falls from 1 to 0; all 5 tasks are one piece, as a second one of a single task would be a waste."""
    return Outer(
        num_outer_steps, meta_batch_size=5, outer_lr=1.0, optimizer="sgd", schedule="linear", final_lr_fraction=0.0,
        reduction_chunk=5,
    )  # fmt: skip


@_recipe
def omniglot_reptile_5w1s() -> Config:
    """Reptile on Omniglot, 5-way 1-shot (Nichol et al., 2018: 95.39 +- 0.09 %, inductive).

    Transductive the paper has 97.68 +- 0.04 %.

    As the paper: 100,000 steps of 5 tasks, step size from 1 to 0, 5 inner steps on batches of 10, Adam without momentum
    1e-3 whose second moments go on from task to task, 10 images a class in training (here 1 of the support and 9 of the
    query set), 50 steps in the test. The README of the authors' code names other values for this row. Otherwise: a test
    step takes all of the support set, a test is 600 episodes (theirs: 10,000 samples).
    """
    return _omniglot(
        "omniglot-reptile-5w1s", "reptile", _reptile(1e-3, 5, inner_batch_size=10), _reptile_outer(100_000),
        num_eval_steps=50, num_queries=9,
    )  # fmt: skip


@_recipe
def omniglot_reptile_20w1s() -> Config:
    """Reptile on Omniglot, 20-way 1-shot (Nichol et al., 2018: 88.14 +- 0.15 %, inductive).

    Transductive the paper has 89.43 +- 0.14 %.

    As the paper: 200,000 steps, 10 inner steps on batches of 20, Adam without momentum 5e-4; else as
    `omniglot_reptile_5w1s`.
    """
    return _omniglot(
        "omniglot-reptile-20w1s", "reptile", _reptile(5e-4, 10, inner_batch_size=20), _reptile_outer(200_000),
        num_eval_steps=50, num_ways=20, num_queries=9,
    )  # fmt: skip


def _cavia_on_images() -> CaviaOptions:
    """The paper's for mini-ImageNet: FiLM of the third layer, behind its batch norm."""
    return CaviaOptions(1.0, 2, num_context=100, modulated_layer="norms.2", modulation="scale_shift")


@_recipe
def omniglot_cavia_5w1s() -> Config:
    """CAVIA on Omniglot, 5-way 1-shot (Zintgraf et al., 2019, have no such row).

    Their inner loop for mini-ImageNet: 2 steps by 1.0, in training and test, of 100 context parameters that scale and
    shift the third layer. The rest is that of `omniglot_fomaml_5w1s`.
    """
    return _omniglot_beside_maml("omniglot-cavia-5w1s", "cavia", _cavia_on_images(), num_eval_steps=2)


@_recipe
def omniglot_meta_curvature_5w1s() -> Config:
    """Meta-Curvature on Omniglot, 5-way 1-shot (Park and Oliva, 2019; figures not verified).

    1 inner step by 0.4, and all else as `omniglot_fomaml_5w1s`: the protocol is ours, not theirs.
    """
    return _omniglot_beside_maml("omniglot-meta-curvature-5w1s", "meta_curvature")


@_recipe
def omniglot_proto_maml_5w1s() -> Config:
    """Proto-MAML on Omniglot, 5-way 1-shot (Triantafillou et al., 2020, have no such row).

    5 inner steps by 0.1 in training and test, as MAML++ has them; the rest is that of `omniglot_fomaml_5w1s`.
    """
    return _omniglot_beside_maml("omniglot-proto-maml-5w1s", "proto_maml", InnerLoop(0.1, 5), num_eval_steps=5)


def _meta_lstm_outer() -> Outer:
    return Outer(num_outer_steps=75_000, meta_batch_size=1, clip_norm=0.25, reduction_chunk=1)


@_recipe
def omniglot_meta_lstm_5w1s() -> Config:
    """LSTM meta-learner on Omniglot, 5-way 1-shot (Ravi and Larochelle, 2017, have no such row).

    Their protocol for mini-ImageNet, 1 shot: 32 filters, 12 inner steps, 75,000 steps of 1 task, Adam 1e-3, gradients
    clipped to 0.25, 15 query images a class.
    """
    return _omniglot(
        "omniglot-meta-lstm-5w1s", "meta_lstm", MetaLstmOptions(num_inner_steps=12), _meta_lstm_outer(),
        num_eval_steps=12, num_queries=15, model=Conv4Options(num_filters=32),
    )  # fmt: skip


def _omniglot_by_metric(algorithm: str, num_ways: int, num_shots: int) -> Config:
    """One step sees 60 classes, as an episode of the prototypical networks' authors has, in several episodes."""
    return _omniglot(
        f"omniglot-{algorithm.replace('_', '-')}-{num_ways}w{num_shots}s", algorithm, MetricOptions(),
        Outer(20_000, meta_batch_size=60 // num_ways, schedule="cosine", reduction_chunk=4 if num_ways == 5 else 1),
        num_eval_steps=1, num_ways=num_ways, num_shots=num_shots,
    )  # fmt: skip


@_recipe
def omniglot_prototypical_networks_5w1s() -> Config:
    """Prototypical networks on Omniglot, 5-way 1-shot (Snell et al., 2017: 98.8 %).

    As the paper: 5 query images a class in training, Adam 1e-3. Otherwise: training has as many ways as the test (the
    paper: one episode of 60 ways a step; here 60 / ways episodes), the rate falls by a cosine over 20,000 steps (the
    paper: by half every 2,000, until it converges), convolutions have strides (the paper: max-pooling).
    """
    return _omniglot_by_metric("prototypical_networks", 5, 1)


@_recipe
def omniglot_prototypical_networks_5w5s() -> Config:
    """Prototypical networks on Omniglot, 5-way 5-shot (Snell et al., 2017: 99.7 %).

    As `omniglot_prototypical_networks_5w1s`.
    """
    return _omniglot_by_metric("prototypical_networks", 5, 5)


@_recipe
def omniglot_prototypical_networks_20w1s() -> Config:
    """Prototypical networks on Omniglot, 20-way 1-shot (Snell et al., 2017: 96.0 %).

    As `omniglot_prototypical_networks_5w1s`.
    """
    return _omniglot_by_metric("prototypical_networks", 20, 1)


@_recipe
def omniglot_prototypical_networks_20w5s() -> Config:
    """Prototypical networks on Omniglot, 20-way 5-shot (Snell et al., 2017: 98.9 %).

    As `omniglot_prototypical_networks_5w1s`.
    """
    return _omniglot_by_metric("prototypical_networks", 20, 5)


@_recipe
def omniglot_matching_networks_5w1s() -> Config:
    """Matching networks on Omniglot, 5-way 1-shot (Vinyals et al., 2016: 98.1 %).

    Without full-context embeddings and fine-tuning. The protocol is that of `omniglot_prototypical_networks_5w1s`.
    """
    return _omniglot_by_metric("matching_networks", 5, 1)


@_recipe
def omniglot_fine_tuning_5w1s() -> Config:
    """Pre-training and a new head on Omniglot, 5-way 1-shot (Chen et al., 2019, have no such row).

    The baseline that looks at as many images as `omniglot_fomaml_5w1s`: trained to tell all 4400 classes apart, with
    Adam 1e-3; in the test 10 steps by 0.5 of a head that begins as 0, on a body that stays. The protocol is ours.
    """
    options = FineTuningOptions(inner_lr=0.5, num_inner_steps=10)
    return _omniglot_beside_maml("omniglot-fine-tuning-5w1s", "fine_tuning", options, num_eval_steps=10)


# ------------------------------------------------------------------------------- folders, mini-ImageNet


@_recipe
def image_folder_maml() -> Config:
    """MAML on your own pictures, a folder for each class: name theirs by --data-dir.

    Size, color, model and inner loop are those of the paper for mini-ImageNet (Finn et al., 2017), on the mean loss.
    """
    return Config(
        recipe="image-folder-maml",
        algorithm_options=InnerLoop(inner_lr=0.01, num_inner_steps=5),
        model_options=Conv4Options(num_filters=32, downsample="pool"),
        task_options=ImageTaskOptions(dataset="image_folder", image_size=84, color=True),
        outer=Outer(num_outer_steps=1000, meta_batch_size=4),
        evaluation=Evaluation(num_eval_steps=10, num_test_episodes=600),
    )


def _mini_imagenet(
    recipe: str,
    algorithm: str,
    options: AlgorithmOptions,
    *,
    num_eval_steps: int,
    num_shots: int = 1,
    num_queries: int = 15,
    num_filters: int = 32,
    outer: Outer | None = None,
) -> Config:
    """What all have in common. The outer loop is MAML's for this number of shots, unless another one is given.

    Half of a step's tasks is a piece: pictures of 84 x 84 are worth sharing between two workers.
    """
    num_tasks = 4 if num_shots == 1 else 2
    return Config(
        recipe=recipe,
        algorithm=algorithm,
        algorithm_options=options,
        model_options=Conv4Options(num_filters, downsample="pool"),
        task_options=ImageTaskOptions(
            dataset="image_folder", image_size=84, color=True, num_shots=num_shots, num_queries=num_queries
        ),
        outer=Outer(60_000, meta_batch_size=num_tasks, reduction_chunk=num_tasks // 2) if outer is None else outer,
        evaluation=Evaluation(num_eval_steps=num_eval_steps, val_every=1000, num_val_episodes=200),
    )


def _mini_imagenet_inner_loop() -> InnerLoop:
    return InnerLoop(_on_the_mean(0.01, num_ways=5), num_inner_steps=5)


def _mini_imagenet_beside_maml(recipe: str, algorithm: str, num_shots: int = 1) -> Config:
    """MAML's own protocol for another algorithm."""
    return _mini_imagenet(recipe, algorithm, _mini_imagenet_inner_loop(), num_eval_steps=10, num_shots=num_shots)


@_recipe
def mini_imagenet_maml_5w1s() -> Config:
    """MAML on mini-ImageNet, 5-way 1-shot (Finn et al., 2017: 48.70 +- 1.84 %).

    ``--data-dir`` names a folder with ``images/*.jpg`` and train.csv, val.csv and test.csv (columns filename, label),
    the form of Ravi and Larochelle, or with a folder of pictures for each class and the three files (column label).
    Folders train/, val/ and test/ with the classes below them are refused.

    As the paper: 32 filters and max-pooling, 60,000 steps of 4 tasks, constant Adam 1e-3, 5 inner steps in training and
    10 in the test, 15 query images a class in training. Its inner_lr of 0.01 is on the loss summed over 5 ways: 0.05 on
    the mean. Otherwise: 15 query images a class in the test (the paper: as many as shots).
    """
    return _mini_imagenet_beside_maml("mini-imagenet-maml-5w1s", "maml")


@_recipe
def mini_imagenet_maml_5w5s() -> Config:
    """MAML on mini-ImageNet, 5-way 5-shot (Finn et al., 2017: 63.11 +- 0.92 %).

    2 tasks a step as in the paper (the README of its code: 4), else as `mini_imagenet_maml_5w1s`.
    """
    return _mini_imagenet_beside_maml("mini-imagenet-maml-5w5s", "maml", num_shots=5)


@_recipe
def mini_imagenet_fomaml_5w1s() -> Config:
    """First-order MAML on mini-ImageNet, 5-way 1-shot (Finn et al., 2017: 48.07 +- 1.75 %).

    As `mini_imagenet_maml_5w1s`.
    """
    return _mini_imagenet_beside_maml("mini-imagenet-fomaml-5w1s", "fomaml")


@_recipe
def mini_imagenet_anil_5w1s() -> Config:
    """ANIL on mini-ImageNet, 5-way 1-shot (Raghu et al., 2020: 46.7 +- 0.4 %).

    The protocol is MAML's, `mini_imagenet_maml_5w1s`; theirs was not looked up.
    """
    return _mini_imagenet_beside_maml("mini-imagenet-anil-5w1s", "anil")


@_recipe
def mini_imagenet_boil_5w1s() -> Config:
    """BOIL on mini-ImageNet, 5-way 1-shot (Oh et al., 2021: 49.61 +- 0.16 %).

    As the authors' code: 64 filters, 1 inner step of the body by 0.5 in training and test, 30,000 steps of 4 tasks,
    Adam 1e-3, 15 query images. Otherwise: 600 test episodes (theirs: 5 times 1,000). Data as `mini_imagenet_maml_5w1s`.
    """
    return _mini_imagenet(
        "mini-imagenet-boil-5w1s", "boil", InnerLoop(inner_lr=0.5, num_inner_steps=1), num_eval_steps=1,
        num_filters=64, outer=Outer(30_000, meta_batch_size=4, reduction_chunk=2),
    )  # fmt: skip


@_recipe
def mini_imagenet_reptile_5w1s() -> Config:
    """Reptile on mini-ImageNet, 5-way 1-shot (Nichol et al., 2018: 47.07 +- 0.26 %, inductive).

    Transductive the paper has 49.97 +- 0.32 %.

    As the paper: 100,000 steps of 5 tasks, step size from 1 to 0, 8 inner steps on batches of 10, Adam without momentum
    1e-3, 15 images a class in training (here 1 and 14), 50 steps in the test. The README of the authors' code names
    other values for this row. Otherwise as `omniglot_reptile_5w1s`; data as `mini_imagenet_maml_5w1s`.
    """
    return _mini_imagenet(
        "mini-imagenet-reptile-5w1s", "reptile", _reptile(1e-3, 8, inner_batch_size=10), num_eval_steps=50,
        num_queries=14, outer=_reptile_outer(100_000),
    )  # fmt: skip


@_recipe
def mini_imagenet_meta_sgd_5w1s() -> Config:
    """Meta-SGD on mini-ImageNet, 5-way 1-shot (Li et al., 2017: 50.47 +- 1.87 %).

    As the paper: 1 inner step in training and test, Adam 1e-3. Otherwise: all rates begin as 0.05, MAML's on the mean
    loss (the paper draws them at random). The rest is that of `mini_imagenet_maml_5w1s`.
    """
    options = InnerLoop(_on_the_mean(0.01, num_ways=5), num_inner_steps=1)
    return _mini_imagenet("mini-imagenet-meta-sgd-5w1s", "meta_sgd", options, num_eval_steps=1)


def _mini_imagenet_maml_plus_plus(num_shots: int) -> Config:
    return _mini_imagenet(
        f"mini-imagenet-maml-plus-plus-5w{num_shots}s", "maml_plus_plus",
        MamlPlusPlusOptions(inner_lr=0.01, num_inner_steps=5, annealing_steps=7500), num_eval_steps=5,
        num_shots=num_shots, num_filters=48, outer=Outer(50_000, meta_batch_size=2, reduction_chunk=1),
    )  # fmt: skip


@_recipe
def mini_imagenet_maml_plus_plus_5w1s() -> Config:
    """MAML++ on mini-ImageNet, 5-way 1-shot (Antoniou et al., 2019: 52.15 +- 0.26 %).

    As the authors' configuration: 48 filters, 2 tasks, 5 inner steps by learned rates that begin as 0.01 (their loss is
    the mean), 15 query images in training and test, Adam at a constant 1e-3 (the paper speaks of a cosine), 50,000
    steps (100 epochs of 500), weights of the losses annealed over 15 epochs. Otherwise: pictures are not normalised by
    the statistics of ImageNet; theirs is an ensemble of 5 models, ours is one. Data as `mini_imagenet_maml_5w1s`.
    """
    return _mini_imagenet_maml_plus_plus(1)


@_recipe
def mini_imagenet_maml_plus_plus_5w5s() -> Config:
    """MAML++ on mini-ImageNet, 5-way 5-shot (Antoniou et al., 2019: 68.32 +- 0.44 %).

    As `mini_imagenet_maml_plus_plus_5w1s`.
    """
    return _mini_imagenet_maml_plus_plus(5)


@_recipe
def mini_imagenet_imaml_5w1s() -> Config:
    """iMAML on mini-ImageNet, 5-way 1-shot (Rajeswaran et al., 2019: 49.30 +- 1.88 %, Hessian-free).

    Their protocol for mini-ImageNet was not looked up. Inner loop and conjugate gradients are those of
    `omniglot_imaml_hf_5w1s`, the rest is that of `mini_imagenet_maml_5w1s`.
    """
    options = ImamlOptions(0.1, 3, regularization=2.0, num_cg_steps=5, solver="hessian_free")
    return _mini_imagenet("mini-imagenet-imaml-5w1s", "imaml", options, num_eval_steps=3)


@_recipe
def mini_imagenet_cavia_5w1s() -> Config:
    """CAVIA on mini-ImageNet, 5-way 1-shot (Zintgraf et al., 2019: 47.24 +- 0.65 % with 32 filters).

    As the paper: 2 inner steps by 1.0, in training and test, of 100 context parameters that scale and shift the third
    layer. The outer loop is that of `mini_imagenet_maml_5w1s`, with its constant rate (their code lowers it).
    """
    return _mini_imagenet("mini-imagenet-cavia-5w1s", "cavia", _cavia_on_images(), num_eval_steps=2)


@_recipe
def mini_imagenet_meta_curvature_5w1s() -> Config:
    """Meta-Curvature on mini-ImageNet, 5-way 1-shot (Park and Oliva, 2019; figures not verified).

    The protocol is MAML's, `mini_imagenet_maml_5w1s`, not theirs.
    """
    return _mini_imagenet_beside_maml("mini-imagenet-meta-curvature-5w1s", "meta_curvature")


@_recipe
def mini_imagenet_proto_maml_5w1s() -> Config:
    """Proto-MAML on mini-ImageNet, 5-way 1-shot (Triantafillou et al., 2020, have no such row).

    5 inner steps by 0.01 in training and test; the rest is that of `mini_imagenet_maml_5w1s`.
    """
    return _mini_imagenet("mini-imagenet-proto-maml-5w1s", "proto_maml", InnerLoop(0.01, 5), num_eval_steps=5)


@_recipe
def mini_imagenet_meta_lstm_5w1s() -> Config:
    """LSTM meta-learner on mini-ImageNet, 5-way 1-shot (Ravi and Larochelle, 2017: 43.44 +- 0.77 %).

    As the authors' code: 32 filters, 12 inner steps, 75,000 steps of 1 task, Adam 1e-3, gradients clipped to 0.25, 15
    query images. Otherwise: batch norm takes the statistics of each batch. Data as `mini_imagenet_maml_5w1s`.
    """
    options = MetaLstmOptions(num_inner_steps=12)
    return _mini_imagenet(
        "mini-imagenet-meta-lstm-5w1s", "meta_lstm", options, num_eval_steps=12, outer=_meta_lstm_outer()
    )


def _mini_imagenet_by_metric(algorithm: str, num_shots: int) -> Config:
    return _mini_imagenet(
        f"mini-imagenet-{algorithm.replace('_', '-')}-5w{num_shots}s", algorithm, MetricOptions(), num_eval_steps=1,
        num_shots=num_shots, num_filters=64,
        outer=Outer(20_000, meta_batch_size=4, schedule="cosine", reduction_chunk=2),
    )  # fmt: skip


@_recipe
def mini_imagenet_prototypical_networks_5w1s() -> Config:
    """Prototypical networks on mini-ImageNet, 5-way 1-shot (Snell et al., 2017: 49.42 +- 0.78 %).

    As the paper: 64 filters, 15 query images, Adam 1e-3. Otherwise: training has 5 ways as the test (the paper: one
    episode of more ways a step; here 4 episodes), the rate falls by a cosine over 20,000 steps (the paper: by half
    every 2,000, until it converges). Data as `mini_imagenet_maml_5w1s`.
    """
    return _mini_imagenet_by_metric("prototypical_networks", 1)


@_recipe
def mini_imagenet_prototypical_networks_5w5s() -> Config:
    """Prototypical networks on mini-ImageNet, 5-way 5-shot (Snell et al., 2017: 68.20 +- 0.66 %).

    As `mini_imagenet_prototypical_networks_5w1s`.
    """
    return _mini_imagenet_by_metric("prototypical_networks", 5)


@_recipe
def mini_imagenet_matching_networks_5w1s() -> Config:
    """Matching networks on mini-ImageNet, 5-way 1-shot (Vinyals et al., 2016: 43.40 %).

    Without full-context embeddings, like that figure, which is as later papers quote it. The protocol is that of
    `mini_imagenet_prototypical_networks_5w1s`.
    """
    return _mini_imagenet_by_metric("matching_networks", 1)


@_recipe
def mini_imagenet_fine_tuning_5w1s() -> Config:
    """Pre-training, a new head on mini-ImageNet, 5-way 1-shot (Ravi and Larochelle, 2017: 28.86 %).

    The baseline that looks at as many images as `mini_imagenet_maml_5w1s`: trained to tell all classes apart, with Adam
    1e-3; in the test 10 steps by 0.5 of a head that begins as 0. The body stays as it was trained, theirs is tuned too.
    """
    options = FineTuningOptions(inner_lr=0.5, num_inner_steps=10)
    return _mini_imagenet("mini-imagenet-fine-tuning-5w1s", "fine_tuning", options, num_eval_steps=10)


# -------------------------------------------------------------------------------------------- sinusoid


@_recipe
def sinusoid_maml_5s() -> Config:
    """MAML on sine waves, 5-shot (Finn et al., 2017: MSE 0.67, 0.38, 0.35 after 1, 5, 10 steps).

    As the paper: 70,000 outer steps.
    """
    return Config(
        recipe="sinusoid-maml-5s",
        algorithm_options=InnerLoop(inner_lr=0.01, num_inner_steps=1),
        model="mlp",
        model_options=MlpOptions(),
        objective="regression",
        tasks="sinusoid",
        task_options=SinusoidOptions(num_shots=5, num_queries=10),
        outer=Outer(num_outer_steps=70_000, meta_batch_size=25, reduction_chunk=25),  # too little to share
        evaluation=Evaluation(
            num_eval_steps=10,
            val_every=5000,
            num_val_episodes=600,
            num_test_episodes=600,
            inductive=False,
            selection_metric="val/query_loss",
            selection_mode="min",
        ),
    )


def _sinusoid(
    recipe: str,
    algorithm: str,
    options: AlgorithmOptions,
    outer: Outer,
    *,
    num_eval_steps: int,
    num_shots: int = 5,
) -> Config:
    """Waves, network, 10 query points and evaluation of `sinusoid_maml_5s`."""
    base = sinusoid_maml_5s()
    return replace(
        base, recipe=recipe, algorithm=algorithm, algorithm_options=options,
        task_options=SinusoidOptions(num_shots=num_shots, num_queries=10), outer=outer,
        evaluation=replace(base.evaluation, num_eval_steps=num_eval_steps),
    )  # fmt: skip


@_recipe
def sinusoid_maml_10s() -> Config:
    """MAML on sine waves, 10-shot (Finn et al., 2017, draw a figure of it and print no number).

    As `sinusoid_maml_5s`.
    """
    base = sinusoid_maml_5s()
    return _sinusoid("sinusoid-maml-10s", "maml", base.algorithm_options, base.outer, num_eval_steps=10, num_shots=10)


@_recipe
def sinusoid_meta_sgd_5s() -> Config:
    """Meta-SGD on sine waves, 5-shot (Li et al., 2017; their figures are not verified here).

    1 inner step in training and test as in the paper. Otherwise: all rates begin as 0.01 (the paper draws them at
    random); the outer loop is MAML's, `sinusoid_maml_5s`.
    """
    base = sinusoid_maml_5s()
    return _sinusoid("sinusoid-meta-sgd-5s", "meta_sgd", base.algorithm_options, base.outer, num_eval_steps=1)


def _sinusoid_cavia(num_shots: int) -> Config:
    return _sinusoid(
        f"sinusoid-cavia-{num_shots}s", "cavia", CaviaOptions(inner_lr=1.0, num_inner_steps=1, num_context=5),
        replace(sinusoid_maml_5s().outer, num_outer_steps=50_000), num_eval_steps=1, num_shots=num_shots,
    )  # fmt: skip


@_recipe
def sinusoid_cavia_10s() -> Config:
    """CAVIA on sine waves, 10-shot (Zintgraf et al., 2019; their figures are not verified here).

    As the paper: 1 inner step by 1.0, in training and test, of 5 context parameters, which are further inputs of the
    first layer; 50,000 steps of 25 tasks, Adam 1e-3, 10 query points. Otherwise: 600 test tasks (their code: 100).
    """
    return _sinusoid_cavia(10)


@_recipe
def sinusoid_cavia_5s() -> Config:
    """CAVIA on sine waves, 5-shot (Zintgraf et al., 2019, have no such row).

    As `sinusoid_cavia_10s`.
    """
    return _sinusoid_cavia(5)


@_recipe
def sinusoid_reptile_10s() -> Config:
    """Reptile on sine waves, 10-shot (Nichol et al., 2018, have other waves).

    The protocol is ours: 10 inner steps by 0.02 on all 20 points of a task, 30,000 steps of 25 tasks, step size from 1
    to 0.
    """
    return _sinusoid(
        "sinusoid-reptile-10s", "reptile", ReptileOptions(inner_lr=0.02, num_inner_steps=10),
        Outer(30_000, meta_batch_size=25, outer_lr=1.0, optimizer="sgd", schedule="linear", final_lr_fraction=0.0,
              reduction_chunk=25),
        num_eval_steps=10, num_shots=10,
    )  # fmt: skip


@_recipe
def sinusoid_imaml_5s() -> Config:
    """iMAML on sine waves, 5-shot (Rajeswaran et al., 2019, have no such row).

    The protocol is ours: 16 gradient steps by 0.01, lambda 0.1 (the 2 of Omniglot holds a wave back too much), 5 steps
    of conjugate gradients, 20,000 steps of 25 tasks.
    """
    return _sinusoid(
        "sinusoid-imaml-5s", "imaml", ImamlOptions(0.01, 16, regularization=0.1, num_cg_steps=5),
        replace(sinusoid_maml_5s().outer, num_outer_steps=20_000), num_eval_steps=16,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- search


_BY_GRADIENT = ("maml", "fomaml", "anil")
"""Algorithms with the same options, for which one inner rate does as well: a search may change one for another."""


def default_space(config: Config, *, rates_only: bool = False) -> tuple[str, ...]:
    """What a search tries where nobody says otherwise: what MAML is most sensitive to.

    Fields that the configuration does not have, or that do nothing for its algorithm, are left out.

    Args:
      rates_only: only what may change while a trial runs.
    """
    size, flat = config.outer.meta_batch_size, flatten(config)
    space = {
        "inner_lr": _around(flat.get("inner_lr"), 0.001, 1),
        "outer_lr": _around(config.outer.outer_lr, 0.0001, 0.01),
        "num_inner_steps": f"int:1:{max(5, flat.get('num_inner_steps', 1))}",
        "algorithm": "choice:" + ",".join(_BY_GRADIENT),
        "meta_batch_size": "choice:" + ",".join(str(n) for n in sorted({max(size // 2, 1), size, 2 * size})),
    }
    if config.algorithm not in _BY_GRADIENT:
        del space["algorithm"]
    if config.algorithm == "fine_tuning":
        del space["num_inner_steps"]  # it has none in training, and num_eval_steps in validation
    if rates_only:
        space = {field: space[field] for field in ("inner_lr", "outer_lr")}
    return tuple(f"{field}={domain}" for field, domain in space.items() if field in flat)


def _around(rate: float | None, low: float, high: float) -> str:
    """The usual range of a rate; for one that does not lie in it, a tenth of it to three times as much.

    Reptile's outer rate begins as 1, its inner one is Adam's, and that of a summed loss is large.
    """
    if rate is not None and not low < rate < high:
        low, high = rate / 10, 3 * rate
    return f"log:{low:g}:{high:g}"
