"""Omniglot, 5-way and 20-way, 1 and 5 shots."""

from dataclasses import replace
from typing import Literal

from distmaml.config import Config, Evaluation, Outer
from distmaml.options import (
    AlgorithmOptions,
    Conv4Options,
    FineTuningOptions,
    ImageTaskOptions,
    ImamlOptions,
    InnerLoop,
    MamlPlusPlusOptions,
    MetaLstmOptions,
    MetricOptions,
)
from distmaml.recipes.shared import (
    cavia_on_images,
    meta_lstm_outer,
    on_the_mean,
    recipe,
    reptile_options,
    reptile_outer,
)


@recipe
def omniglot_maml_5w1s() -> Config:
    """MAML on Omniglot, 5-way 1-shot (Finn et al., 2017: 98.7 +- 0.4 % after 60,000 steps).

    Otherwise than the paper: inner_lr 0.4 on the mean loss (the paper's 0.4 on the summed loss is 2.0 here, which
    starts slower), 5 query images a class in training (the paper: as many as shots), 6,000 steps by a cosine schedule
    (60,000 at a constant rate), 1,000 test episodes. In runs of 1,500 steps an outer_lr of 3e-3 is ahead.
    """
    return Config(
        recipe="omniglot-maml-5w1s",
        algorithm_options=InnerLoop(inner_lr=0.4, num_inner_steps=1),
        task_options=ImageTaskOptions(dataset="omniglot", split="maml", num_shots=1, num_queries=5, rotations="all"),
        outer=Outer(num_outer_steps=6000, meta_batch_size=32, schedule="cosine"),
        evaluation=Evaluation(val_every=500, num_val_episodes=200, num_test_episodes=1000),
    )


@recipe
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


def _omniglot_maml_paper(num_shots: int) -> Config:
    return _omniglot(
        f"omniglot-maml-5w{num_shots}s-paper", "maml", InnerLoop(on_the_mean(0.4, num_ways=5), num_inner_steps=1),
        Outer(num_outer_steps=60_000, meta_batch_size=32), num_eval_steps=3, num_shots=num_shots, num_queries=num_shots,
        num_eval_queries=num_shots, num_val_episodes=600,
    )  # fmt: skip


@recipe
def omniglot_maml_5w1s_paper() -> Config:
    """MAML on Omniglot, 5-way 1-shot, by the paper's protocol (Finn et al., 2017: 98.7 +- 0.4 %).

    60,000 steps of 32 tasks, constant Adam 1e-3, as many query images as shots in training and test, 1 inner step in
    training and 3 in the test. The paper's inner_lr of 0.4 is on the loss summed over 5 ways: 2.0 on the mean. What all
    recipes do otherwise (recipes/__init__.py) is otherwise here too: the norms' scale and shift, the head's first
    weights, the division of the characters.
    """
    return _omniglot_maml_paper(1)


@recipe
def omniglot_maml_5w5s_paper() -> Config:
    """MAML on Omniglot, 5-way 5-shot, by the paper's protocol (Finn et al., 2017: 99.9 +- 0.1 %).

    As `omniglot_maml_5w1s_paper`.
    """
    return _omniglot_maml_paper(5)


def _omniglot_20w(algorithm: str, num_shots: int) -> Config:
    return _omniglot(
        f"omniglot-{algorithm}-20w{num_shots}s", algorithm,
        InnerLoop(on_the_mean(0.1, num_ways=20), num_inner_steps=5), Outer(num_outer_steps=60_000, meta_batch_size=16),
        num_eval_steps=5, num_ways=20, num_shots=num_shots, num_queries=num_shots,
    )  # fmt: skip


@recipe
def omniglot_maml_20w1s() -> Config:
    """MAML on Omniglot, 20-way 1-shot (Finn et al., 2017: 95.8 +- 0.3 %).

    As the paper: 60,000 steps of 16 tasks, constant Adam 1e-3, 5 inner steps in training and test, as many query images
    as shots in training. Its inner_lr of 0.1 is on the loss summed over 20 ways: 2.0 on the mean.
    """
    return _omniglot_20w("maml", 1)


@recipe
def omniglot_maml_20w5s() -> Config:
    """MAML on Omniglot, 20-way 5-shot (Finn et al., 2017: 98.9 +- 0.2 %). As `omniglot_maml_20w1s`."""
    return _omniglot_20w("maml", 5)


@recipe
def omniglot_fomaml_5w1s() -> Config:
    """First-order MAML on Omniglot, 5-way 1-shot (Nichol et al., 2018: 98.3 +- 0.5 %, transductive).

    Finn et al. (2017) have no such row. Inner loop, query images and cosine are those of `omniglot_maml_5w1s`, the
    60,000 steps of 32 tasks those of the MAML paper.
    """
    return _omniglot_beside_maml("omniglot-fomaml-5w1s", "fomaml")


@recipe
def omniglot_anil_5w1s() -> Config:
    """ANIL on Omniglot, 5-way 1-shot (Raghu et al., 2020, have 20 ways alone).

    So there is nothing to compare with; 1 inner step, and all else as `omniglot_fomaml_5w1s`.
    """
    return _omniglot_beside_maml("omniglot-anil-5w1s", "anil")


@recipe
def omniglot_anil_20w1s() -> Config:
    """ANIL on Omniglot, 20-way 1-shot (Raghu et al., 2020: 96.2 +- 0.5 %).

    Their MAML has 93.7 +- 0.7 %. Inner loop and protocol are those of `omniglot_maml_20w1s`, theirs were not looked up.
    """
    return _omniglot_20w("anil", 1)


@recipe
def omniglot_anil_20w5s() -> Config:
    """ANIL on Omniglot, 20-way 5-shot (Raghu et al., 2020: 98.0 +- 0.3 %).

    Their MAML has 96.4 +- 0.1 %. As `omniglot_anil_20w1s`.
    """
    return _omniglot_20w("anil", 5)


@recipe
def omniglot_boil_5w1s() -> Config:
    """BOIL on Omniglot, 5-way 1-shot (Oh et al., 2021, have no such row).

    Their inner loop: 1 step of the body by 0.5, the head stays, in training and test. The rest is that of
    `omniglot_fomaml_5w1s`, not theirs.
    """
    return _omniglot_beside_maml(
        "omniglot-boil-5w1s", "boil", InnerLoop(inner_lr=0.5, num_inner_steps=1), num_eval_steps=1
    )


@recipe
def omniglot_meta_sgd_5w1s() -> Config:
    """Meta-SGD on Omniglot, 5-way 1-shot (Li et al., 2017: 99.5 %, not read in the paper itself).

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


@recipe
def omniglot_maml_plus_plus_5w1s() -> Config:
    """MAML++ on Omniglot, 5-way 1-shot (Antoniou et al., 2019: 99.47 %, an ensemble of 5).

    As the authors' configuration: 8 tasks, 5 inner steps by learned rates that begin as 0.1, 1 query image a class in
    training and test, max-pooling, Adam from 1e-3 to 1e-5 by a cosine over 50,000 steps (100 epochs of 500), weights of
    the losses annealed over 10 epochs, scales and shifts of batch norm for each step, rotations in training alone.
    Otherwise: their division of the characters is 1151, 50, 423; their figures are of the 5 models that are best in
    validation together, and ours of one; their network has leaky ReLUs. Statistics for each step are left off: their
    code gathers them, and normalises by the batch all the same.
    """
    return _omniglot_maml_plus_plus(5, 1)


@recipe
def omniglot_maml_plus_plus_5w5s() -> Config:
    """MAML++ on Omniglot, 5-way 5-shot (Antoniou et al., 2019: 99.93 %, an ensemble of 5).

    As `omniglot_maml_plus_plus_5w1s`.
    """
    return _omniglot_maml_plus_plus(5, 5)


@recipe
def omniglot_maml_plus_plus_20w1s() -> Config:
    """MAML++ on Omniglot, 20-way 1-shot (Antoniou et al., 2019: 97.65 +- 0.05 %).

    As `omniglot_maml_plus_plus_5w1s`.
    """
    return _omniglot_maml_plus_plus(20, 1)


@recipe
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


@recipe
def omniglot_imaml_5w1s() -> Config:
    """iMAML on Omniglot, 5-way 1-shot (Rajeswaran et al., 2019: 99.16 +- 0.35 %).

    As the paper: 16 gradient steps by 0.1, lambda 2, 5 steps of conjugate gradients, 20,000 steps of 32 tasks, Adam
    1e-3, as many query images as shots in training. Otherwise: Adam's epsilon is torch's (theirs: 1e-3), tasks are
    always new (theirs: out of 200,000), and the head gets the mean over space (theirs: the flat 2x2 map). The code that
    they gave away takes 16 plain steps and one that feels lambda, tests without lambda, and damps the conjugate
    gradients, 2 v + H v / 12; here it is the paper's equations: lambda in every step, v + H v / 2. They train badly,
    and --regularization 0.1 --cg-damping 22 --inner-lr 0.2 well (docs/RESULTS.md): that comes near to their code.
    """
    return _omniglot_imaml("omniglot-imaml-5w1s", ImamlOptions(0.1, 16, regularization=2.0, num_cg_steps=5))


@recipe
def omniglot_imaml_hf_5w1s() -> Config:
    """iMAML, Hessian-free, on Omniglot, 5-way 1-shot (Rajeswaran et al., 2019: 99.50 +- 0.26 %).

    As the paper: the direction of an inner step by 5 steps of conjugate gradients, its length by a line search. The
    number of such steps, 3, is ours. Else as `omniglot_imaml_5w1s`.
    """
    return _omniglot_imaml(
        "omniglot-imaml-hf-5w1s",
        ImamlOptions(0.1, 3, regularization=2.0, num_cg_steps=5, solver="hessian_free"),
    )


@recipe
def omniglot_imaml_20w1s() -> Config:
    """iMAML on Omniglot, 20-way 1-shot (Rajeswaran et al., 2019: 94.46 +- 0.42 %).

    25 gradient steps as in the paper, else as `omniglot_imaml_5w1s`.
    """
    options = ImamlOptions(0.1, 25, regularization=2.0, num_cg_steps=5)
    return _omniglot_imaml("omniglot-imaml-20w1s", options, num_ways=20)


@recipe
def omniglot_reptile_5w1s() -> Config:
    """Reptile on Omniglot, 5-way 1-shot (Nichol et al., 2018: 95.39 +- 0.09 %, inductive).

    Transductive the paper has 97.68 +- 0.04 %.

    As the paper: 100,000 steps of 5 tasks, step size from 1 to 0, 5 inner steps on batches of 10, Adam without momentum
    1e-3 whose second moments go on from task to task, 10 images a class in training (here 1 of the support and 9 of the
    query set), 50 steps in the test. Otherwise: the head gets the mean over space (theirs: the flat 2x2 map), a test is
    600 episodes (theirs: 10,000 samples).
    """
    return _omniglot(
        "omniglot-reptile-5w1s", "reptile", reptile_options(1e-3, 5, inner_batch_size=10), reptile_outer(100_000),
        num_eval_steps=50, num_queries=9,
    )  # fmt: skip


@recipe
def omniglot_reptile_20w1s() -> Config:
    """Reptile on Omniglot, 20-way 1-shot (Nichol et al., 2018: 88.14 +- 0.15 %, inductive).

    Transductive the paper has 89.43 +- 0.14 %.

    As the paper: 200,000 steps, 10 inner steps on batches of 20, Adam without momentum 5e-4; else as
    `omniglot_reptile_5w1s`. A test step takes all 20 images of the support set (theirs: 10 of them).
    """
    return _omniglot(
        "omniglot-reptile-20w1s", "reptile", reptile_options(5e-4, 10, inner_batch_size=20), reptile_outer(200_000),
        num_eval_steps=50, num_ways=20, num_queries=9,
    )  # fmt: skip


@recipe
def omniglot_cavia_5w1s() -> Config:
    """CAVIA on Omniglot, 5-way 1-shot (Zintgraf et al., 2019, have no such row).

    Their inner loop for mini-ImageNet: 2 steps by 1.0, in training and test, of 100 context parameters that scale and
    shift the third layer, as 1 + W c + b and W c + b. The rest is that of `omniglot_fomaml_5w1s`.
    """
    return _omniglot_beside_maml("omniglot-cavia-5w1s", "cavia", cavia_on_images(), num_eval_steps=2)


@recipe
def omniglot_meta_curvature_5w1s() -> Config:
    """Meta-Curvature on Omniglot, 5-way 1-shot (Park and Oliva, 2019; figures not verified).

    1 inner step by 0.4, and all else as `omniglot_fomaml_5w1s`: the protocol is ours, not theirs.
    """
    return _omniglot_beside_maml("omniglot-meta-curvature-5w1s", "meta_curvature")


@recipe
def omniglot_proto_maml_5w1s() -> Config:
    """Proto-MAML on Omniglot, 5-way 1-shot (Triantafillou et al., 2020, have no such row).

    5 inner steps by 0.1 in training and test, as MAML++ has them; the rest is that of `omniglot_fomaml_5w1s`.
    """
    return _omniglot_beside_maml("omniglot-proto-maml-5w1s", "proto_maml", InnerLoop(0.1, 5), num_eval_steps=5)


@recipe
def omniglot_meta_lstm_5w1s() -> Config:
    """LSTM meta-learner on Omniglot, 5-way 1-shot (Ravi and Larochelle, 2017, have no such row).

    Their protocol for mini-ImageNet, 1 shot: 32 filters, 12 inner steps, 75,000 steps of 1 task, Adam 1e-3, gradients
    clipped to 0.25, 15 query images a class.
    """
    return _omniglot(
        "omniglot-meta-lstm-5w1s", "meta_lstm", MetaLstmOptions(num_inner_steps=12), meta_lstm_outer(),
        num_eval_steps=12, num_queries=15, model=Conv4Options(num_filters=32),
    )  # fmt: skip


def _omniglot_by_metric(algorithm: str, num_ways: int, num_shots: int) -> Config:
    """One step sees 60 classes, as an episode of the prototypical networks' authors has, in several episodes."""
    return _omniglot(
        f"omniglot-{algorithm.replace('_', '-')}-{num_ways}w{num_shots}s", algorithm, MetricOptions(),
        Outer(20_000, meta_batch_size=60 // num_ways, schedule="cosine", reduction_chunk=4 if num_ways == 5 else 1),
        num_eval_steps=1, num_ways=num_ways, num_shots=num_shots,
    )  # fmt: skip


@recipe
def omniglot_prototypical_networks_5w1s() -> Config:
    """Prototypical networks on Omniglot, 5-way 1-shot (Snell et al., 2017: 98.8 %).

    As the paper: 5 query images a class in training, Adam 1e-3. Otherwise: training has as many ways as the test (the
    paper: one episode of 60 ways a step; here 60 / ways episodes), the rate falls by a cosine over 20,000 steps (the
    paper: by half every 2,000, until it converges), convolutions have strides (the paper: max-pooling).
    """
    return _omniglot_by_metric("prototypical_networks", 5, 1)


@recipe
def omniglot_prototypical_networks_5w5s() -> Config:
    """Prototypical networks on Omniglot, 5-way 5-shot (Snell et al., 2017: 99.7 %).

    As `omniglot_prototypical_networks_5w1s`.
    """
    return _omniglot_by_metric("prototypical_networks", 5, 5)


@recipe
def omniglot_prototypical_networks_20w1s() -> Config:
    """Prototypical networks on Omniglot, 20-way 1-shot (Snell et al., 2017: 96.0 %).

    As `omniglot_prototypical_networks_5w1s`.
    """
    return _omniglot_by_metric("prototypical_networks", 20, 1)


@recipe
def omniglot_prototypical_networks_20w5s() -> Config:
    """Prototypical networks on Omniglot, 20-way 5-shot (Snell et al., 2017: 98.9 %).

    As `omniglot_prototypical_networks_5w1s`.
    """
    return _omniglot_by_metric("prototypical_networks", 20, 5)


@recipe
def omniglot_matching_networks_5w1s() -> Config:
    """Matching networks on Omniglot, 5-way 1-shot (Vinyals et al., 2016: 98.1 %).

    Without full-context embeddings and fine-tuning. The protocol is that of `omniglot_prototypical_networks_5w1s`.
    """
    return _omniglot_by_metric("matching_networks", 5, 1)


@recipe
def omniglot_fine_tuning_5w1s() -> Config:
    """Pre-training and a new head on Omniglot, 5-way 1-shot (Chen et al., 2019, have no such row).

    The baseline that looks at as many images as `omniglot_fomaml_5w1s`: trained to tell all 4400 classes apart, with
    Adam 1e-3; in the test 10 steps by 0.5 of a head that begins as 0, on a body that stays. The protocol is ours.
    """
    options = FineTuningOptions(inner_lr=0.5)
    return _omniglot_beside_maml("omniglot-fine-tuning-5w1s", "fine_tuning", options, num_eval_steps=10)
