"""Your own pictures."""

from distmaml.config import Config, Evaluation, Outer
from distmaml.options import Conv4Options, ImageTaskOptions, InnerLoop
from distmaml.recipes.shared import recipe


@recipe
def image_folder_maml() -> Config:
    """MAML on your own pictures, a folder for each class: name theirs by --data-dir.

    Size, color, model and inner steps are those of Finn et al. (2017) for mini-ImageNet. inner_lr 0.01 on the mean loss
    is ours, a fifth of theirs, which is on the sum over the ways.
    """
    return Config(
        recipe="image-folder-maml",
        algorithm_options=InnerLoop(inner_lr=0.01, num_inner_steps=5),
        model_options=Conv4Options(num_filters=32, downsample="pool"),
        task_options=ImageTaskOptions(dataset="image_folder", image_size=84, color=True),
        outer=Outer(num_outer_steps=1000, meta_batch_size=4),
        evaluation=Evaluation(num_eval_steps=10, num_test_episodes=600),
    )
