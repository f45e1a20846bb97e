"""BOIL: the inner loop moves the body alone.

Oh, Yoo, Kim, Yun (2021), "BOIL: Towards Representation Change for Few-shot Learning",
https://arxiv.org/abs/2008.08882.
"""

from distmaml.algorithms import Algorithm
from distmaml.algorithms.heads import body_of
from distmaml.algorithms.maml import by_rule
from distmaml.algorithms.passes import check_rate
from distmaml.episodes import Episode
from distmaml.inner import Metrics, Params, sgd_by_name
from distmaml.objectives import Moment, Objective


def boil(objective: Objective, *, inner_lr: float, num_inner_steps: int) -> Algorithm:
    """BOIL (Oh et al., 2021): MAML whose inner loop leaves the head where it is.

    ::

        body_{k+1} = body_k - inner_lr * grad_body L_support(body_k, head)
        meta-gradient = d L_query(body_K, head) / d (body, head), K = num_inner_steps

    The meta-gradient is exact, for the head too. The arguments are those of `maml`.

    Raises:
      ConfigError: no inner step, no rate above 0; a model that is nothing but its head; at the first
        gradient, one that does not end in it.
    """
    check_rate(inner_lr)
    moves = body_of(objective, dict(objective.model.named_parameters()), "boil").keys()
    maml = by_rule(objective, sgd_by_name(lambda name: inner_lr if name in moves else 0.0), num_inner_steps)
    is_checked = False

    def meta_grad(theta: Params, episode: Episode, step: int) -> tuple[Params, Metrics]:
        nonlocal is_checked
        if not is_checked:
            objective.features(theta, episode.support.inputs, Moment(0, None))
            is_checked = True
        return maml.meta_grad(theta, episode, step)

    return maml._replace(meta_grad=meta_grad)
