"""Regression on sine waves."""

from dataclasses import replace

from distmaml.config import Config, Evaluation, Outer
from distmaml.options import (
    AlgorithmOptions,
    CaviaOptions,
    ImamlOptions,
    InnerLoop,
    MlpOptions,
    ReptileOptions,
    SinusoidOptions,
)
from distmaml.recipes.shared import recipe


@recipe
def sinusoid_maml_5s() -> Config:
    """MAML on sine waves, 5-shot (Finn et al., 2017: MSE 0.67, 0.38, 0.35 after 1, 5, 10 steps).

    As the paper: 70,000 outer steps of 25 tasks, 1 inner step by 0.01 in training. Otherwise: it is trained with as
    many points as it is tested with, 5, where the paper trains one model with 10 and tests it with 5; 10 query points
    in training, and 100 in the test.
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


@recipe
def sinusoid_maml_10s() -> Config:
    """MAML on sine waves, 10-shot (Finn et al., 2017, draw a figure of it and print no number).

    As `sinusoid_maml_5s`, and as the paper trains, with 10 points.
    """
    base = sinusoid_maml_5s()
    return _sinusoid("sinusoid-maml-10s", "maml", base.algorithm_options, base.outer, num_eval_steps=10, num_shots=10)


@recipe
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


@recipe
def sinusoid_cavia_10s() -> Config:
    """CAVIA on sine waves, 10-shot (Zintgraf et al., 2019; their figures are not verified here).

    As the paper: 1 inner step by 1.0, in training and test, of 5 context parameters, which are further inputs of the
    first layer; 50,000 steps of 25 tasks, Adam 1e-3, 10 query points. Otherwise: 600 test tasks (their code: 100).
    """
    return _sinusoid_cavia(10)


@recipe
def sinusoid_cavia_5s() -> Config:
    """CAVIA on sine waves, 5-shot (Zintgraf et al., 2019, have no such row).

    As `sinusoid_cavia_10s`.
    """
    return _sinusoid_cavia(5)


@recipe
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


@recipe
def sinusoid_imaml_5s() -> Config:
    """iMAML on sine waves, 5-shot (Rajeswaran et al., 2019, have no such row).

    The protocol is ours: Hessian-free, 3 steps, lambda 2 and 5 steps of conjugate gradients as for Omniglot, with a
    damping of 1 and gradients clipped to 1; 20,000 steps of 25 tasks. The gradient solver, by 16 steps of 0.01, learns
    faster and then diverges: what goes on between phi and phi* is not in the meta-gradient, so that nothing keeps the
    inner loop stable.
    """
    return _sinusoid(
        "sinusoid-imaml-5s", "imaml",
        ImamlOptions(num_inner_steps=3, regularization=2.0, num_cg_steps=5, cg_damping=1.0, solver="hessian_free"),
        replace(sinusoid_maml_5s().outer, num_outer_steps=20_000, clip_norm=1.0), num_eval_steps=3,
    )  # fmt: skip
