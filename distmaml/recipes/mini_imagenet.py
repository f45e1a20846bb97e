"""mini-ImageNet, for those who have its files."""

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
    return InnerLoop(on_the_mean(0.01, num_ways=5), num_inner_steps=5)


def _mini_imagenet_beside_maml(recipe: str, algorithm: str, num_shots: int = 1) -> Config:
    """MAML's own protocol for another algorithm."""
    return _mini_imagenet(recipe, algorithm, _mini_imagenet_inner_loop(), num_eval_steps=10, num_shots=num_shots)


@recipe
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


@recipe
def mini_imagenet_maml_5w5s() -> Config:
    """MAML on mini-ImageNet, 5-way 5-shot (Finn et al., 2017: 63.11 +- 0.92 %).

    2 tasks a step as in the paper (the README of its code: 4), else as `mini_imagenet_maml_5w1s`.
    """
    return _mini_imagenet_beside_maml("mini-imagenet-maml-5w5s", "maml", num_shots=5)


@recipe
def mini_imagenet_fomaml_5w1s() -> Config:
    """First-order MAML on mini-ImageNet, 5-way 1-shot (Finn et al., 2017: 48.07 +- 1.75 %).

    As `mini_imagenet_maml_5w1s`.
    """
    return _mini_imagenet_beside_maml("mini-imagenet-fomaml-5w1s", "fomaml")


@recipe
def mini_imagenet_anil_5w1s() -> Config:
    """ANIL on mini-ImageNet, 5-way 1-shot (Raghu et al., 2020: 46.7 +- 0.4 %).

    The protocol is MAML's, `mini_imagenet_maml_5w1s`; theirs was not looked up.
    """
    return _mini_imagenet_beside_maml("mini-imagenet-anil-5w1s", "anil")


@recipe
def mini_imagenet_boil_5w1s() -> Config:
    """BOIL on mini-ImageNet, 5-way 1-shot (Oh et al., 2021: 49.61 +- 0.16 %).

    As the authors' code: 64 filters, 1 inner step of the body by 0.5 in training and test, 30,000 steps of 4 tasks,
    Adam 1e-3, 15 query images. Otherwise: 600 test episodes (theirs: 5 times 1,000). Data as `mini_imagenet_maml_5w1s`.
    """
    return _mini_imagenet(
        "mini-imagenet-boil-5w1s", "boil", InnerLoop(inner_lr=0.5, num_inner_steps=1), num_eval_steps=1,
        num_filters=64, outer=Outer(30_000, meta_batch_size=4, reduction_chunk=2),
    )  # fmt: skip


@recipe
def mini_imagenet_reptile_5w1s() -> Config:
    """Reptile on mini-ImageNet, 5-way 1-shot (Nichol et al., 2018: 47.07 +- 0.26 %, inductive).

    Transductive the paper has 49.97 +- 0.32 %.

    As the paper: 100,000 steps of 5 tasks, step size from 1 to 0, 8 inner steps on batches of 10, Adam without momentum
    1e-3, 15 images a class in training (here 1 and 14), 50 steps in the test, the head on the flat map. Otherwise their
    network pools before the batch norm, and as `omniglot_reptile_5w1s`; data as `mini_imagenet_maml_5w1s`.
    """
    return _mini_imagenet(
        "mini-imagenet-reptile-5w1s", "reptile", reptile_options(1e-3, 8, inner_batch_size=10), num_eval_steps=50,
        num_queries=14, outer=reptile_outer(100_000),
    )  # fmt: skip


@recipe
def mini_imagenet_meta_sgd_5w1s() -> Config:
    """Meta-SGD on mini-ImageNet, 5-way 1-shot (Li et al., 2017: 50.47 +- 1.87 %).

    As the paper: 1 inner step in training and test, Adam 1e-3. Otherwise: all rates begin as 0.05, MAML's on the mean
    loss (the paper draws them at random). The rest is that of `mini_imagenet_maml_5w1s`.
    """
    options = InnerLoop(on_the_mean(0.01, num_ways=5), num_inner_steps=1)
    return _mini_imagenet("mini-imagenet-meta-sgd-5w1s", "meta_sgd", options, num_eval_steps=1)


def _mini_imagenet_maml_plus_plus(num_shots: int) -> Config:
    return _mini_imagenet(
        f"mini-imagenet-maml-plus-plus-5w{num_shots}s", "maml_plus_plus",
        MamlPlusPlusOptions(inner_lr=0.01, num_inner_steps=5, annealing_steps=7500), num_eval_steps=5,
        num_shots=num_shots, num_filters=48, outer=Outer(50_000, meta_batch_size=2, reduction_chunk=1),
    )  # fmt: skip


@recipe
def mini_imagenet_maml_plus_plus_5w1s() -> Config:
    """MAML++ on mini-ImageNet, 5-way 1-shot (Antoniou et al., 2019: 52.15 +- 0.26 %).

    As the authors' configuration: 48 filters, 2 tasks, 5 inner steps by learned rates that begin as 0.01 (their loss is
    the mean), 15 query images in training and test, Adam at a constant 1e-3 (the paper speaks of a cosine), 50,000
    steps (100 epochs of 500), weights of the losses annealed over 15 epochs. Otherwise: pictures are not normalised by
    the statistics of ImageNet; theirs is an ensemble of 5 models, ours is one; their network has leaky ReLUs;
    statistics for each step, which their code gathers but does not normalise by, are left off. Data as
    `mini_imagenet_maml_5w1s`.
    """
    return _mini_imagenet_maml_plus_plus(1)


@recipe
def mini_imagenet_maml_plus_plus_5w5s() -> Config:
    """MAML++ on mini-ImageNet, 5-way 5-shot (Antoniou et al., 2019: 68.32 +- 0.44 %).

    As `mini_imagenet_maml_plus_plus_5w1s`.
    """
    return _mini_imagenet_maml_plus_plus(5)


@recipe
def mini_imagenet_imaml_5w1s() -> Config:
    """iMAML on mini-ImageNet, 5-way 1-shot (Rajeswaran et al., 2019: 49.30 +- 1.88 %, Hessian-free).

    Their protocol for mini-ImageNet was not looked up. Inner loop and conjugate gradients are those of
    `omniglot_imaml_hf_5w1s`, the rest is that of `mini_imagenet_maml_5w1s`.
    """
    options = ImamlOptions(0.1, 3, regularization=2.0, num_cg_steps=5, solver="hessian_free")
    return _mini_imagenet("mini-imagenet-imaml-5w1s", "imaml", options, num_eval_steps=3)


@recipe
def mini_imagenet_cavia_5w1s() -> Config:
    """CAVIA on mini-ImageNet, 5-way 1-shot (Zintgraf et al., 2019: 47.24 +- 0.65 % with 32 filters).

    As the paper: 2 inner steps by 1.0, in training and test, of 100 context parameters that scale and shift the third
    layer. Otherwise: the scale is 1 + W c + b before the pooling (theirs: W c + b behind it), and the outer loop is
    that of `mini_imagenet_maml_5w1s`, with its constant rate (their code lowers it).
    """
    return _mini_imagenet("mini-imagenet-cavia-5w1s", "cavia", cavia_on_images(), num_eval_steps=2)


@recipe
def mini_imagenet_meta_curvature_5w1s() -> Config:
    """Meta-Curvature on mini-ImageNet, 5-way 1-shot (Park and Oliva, 2019; figures not verified).

    The protocol is MAML's, `mini_imagenet_maml_5w1s`, not theirs.
    """
    return _mini_imagenet_beside_maml("mini-imagenet-meta-curvature-5w1s", "meta_curvature")


@recipe
def mini_imagenet_proto_maml_5w1s() -> Config:
    """Proto-MAML on mini-ImageNet, 5-way 1-shot (Triantafillou et al., 2020, have no such row).

    5 inner steps by 0.01 in training and test; the rest is that of `mini_imagenet_maml_5w1s`.
    """
    return _mini_imagenet("mini-imagenet-proto-maml-5w1s", "proto_maml", InnerLoop(0.01, 5), num_eval_steps=5)


@recipe
def mini_imagenet_meta_lstm_5w1s() -> Config:
    """LSTM meta-learner on mini-ImageNet, 5-way 1-shot (Ravi and Larochelle, 2017: 43.44 +- 0.77 %).

    As the authors' code: 32 filters, 12 inner steps, 75,000 steps of 1 task, Adam 1e-3, gradients clipped to 0.25, 15
    query images. Otherwise: batch norm takes the statistics of each batch. Data as `mini_imagenet_maml_5w1s`.
    """
    options = MetaLstmOptions(num_inner_steps=12)
    return _mini_imagenet(
        "mini-imagenet-meta-lstm-5w1s", "meta_lstm", options, num_eval_steps=12, outer=meta_lstm_outer()
    )


def _mini_imagenet_by_metric(algorithm: str, num_shots: int) -> Config:
    return _mini_imagenet(
        f"mini-imagenet-{algorithm.replace('_', '-')}-5w{num_shots}s", algorithm, MetricOptions(), num_eval_steps=1,
        num_shots=num_shots, num_filters=64,
        outer=Outer(20_000, meta_batch_size=4, schedule="cosine", reduction_chunk=2),
    )  # fmt: skip


@recipe
def mini_imagenet_prototypical_networks_5w1s() -> Config:
    """Prototypical networks on mini-ImageNet, 5-way 1-shot (Snell et al., 2017: 49.42 +- 0.78 %).

    As the paper: 64 filters, 15 query images, Adam 1e-3. Otherwise: training has 5 ways as the test (the paper: one
    episode of more ways a step; here 4 episodes), the rate falls by a cosine over 20,000 steps (the paper: by half
    every 2,000, until it converges). Data as `mini_imagenet_maml_5w1s`.
    """
    return _mini_imagenet_by_metric("prototypical_networks", 1)


@recipe
def mini_imagenet_prototypical_networks_5w5s() -> Config:
    """Prototypical networks on mini-ImageNet, 5-way 5-shot (Snell et al., 2017: 68.20 +- 0.66 %).

    As `mini_imagenet_prototypical_networks_5w1s`.
    """
    return _mini_imagenet_by_metric("prototypical_networks", 5)


@recipe
def mini_imagenet_matching_networks_5w1s() -> Config:
    """Matching networks on mini-ImageNet, 5-way 1-shot (Ravi and Larochelle, 2017: 43.40 +- 0.78 %).

    Without full-context embeddings, as that figure of a table which others quote. The protocol is that of
    `mini_imagenet_prototypical_networks_5w1s`.
    """
    return _mini_imagenet_by_metric("matching_networks", 1)


@recipe
def mini_imagenet_fine_tuning_5w1s() -> Config:
    """Fine-tuning on mini-ImageNet, 5-way 1-shot (Ravi and Larochelle, 2017: 28.86 +- 0.54 %).

    The baseline that looks at as many images as `mini_imagenet_maml_5w1s`: trained to tell all classes apart, with Adam
    1e-3; in the test 10 steps by 0.5 of a head that begins as 0. The body stays as it was trained, theirs is tuned too.
    """
    options = FineTuningOptions(inner_lr=0.5)
    return _mini_imagenet("mini-imagenet-fine-tuning-5w1s", "fine_tuning", options, num_eval_steps=10)
