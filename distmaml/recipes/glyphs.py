"""The embedded letters."""

from distmaml.config import Config, Evaluation, Outer
from distmaml.options import Conv4Options, ImageTaskOptions, InnerLoop
from distmaml.recipes.shared import recipe


@recipe
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
