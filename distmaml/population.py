"""Population-based training (Jaderberg et al., 2017, https://arxiv.org/abs/1711.09846): who goes on as whom.

All trials come to the same outer step and stand still there. The worst of them then go on from the weights of the best,
with values near theirs. Who, from whom and with which values is a function of the arguments alone, so a resumed search
decides as it would have.
"""

import math
import random
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from distmaml.journal import Move
from distmaml.space import Domain, Space

QUANTILE = 0.25
"""How large a part of the population goes on as another, and from how large a part of the best."""
RESAMPLED = 0.25
"""How often a value is drawn anew from its whole range."""
FACTORS = (0.8, 1.2)
"""By one of which it is multiplied otherwise."""


class Member(NamedTuple):
    """A trial at that step."""

    trial: int
    """Its number."""
    values: dict[str, Any]
    """What it was trained with."""
    result: float
    """The selection metric there; NaN is the worst."""


def moves(
    space: Space, members: Sequence[Member], *, mode: Literal["max", "min"], seed: int, step: int
) -> tuple[Move, ...]:
    """What the worst members do next; a donor never moves itself, and nobody does where there is only one."""
    sign = -1.0 if mode == "max" else 1.0
    ranked = sorted(
        members, key=lambda m: (math.isnan(m.result), 0.0 if math.isnan(m.result) else sign * m.result, m.trial)
    )
    size = min(math.ceil(QUANTILE * len(ranked)), len(ranked) // 2)
    best, worst = ranked[:size], ranked[len(ranked) - size :]
    found = []
    for member in worst:
        stream = random.Random(f"{seed} {step} {member.trial}")
        donor = stream.choice(best)
        values = {field: _explored(domain, donor.values[field], stream) for field, domain in space.items()}
        found.append(Move(member.trial, donor.trial, values))
    return tuple(found)


def _explored(domain: Domain, value: float, stream: random.Random) -> float:
    if stream.random() < RESAMPLED:
        return float(domain.at(stream.random()))
    return domain.rounded(value * stream.choice(FACTORS))
