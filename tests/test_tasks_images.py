"""Image episodes over pictures that tell, in their pixels, which class and which sample they are."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from distmaml.errors import DataError
from distmaml.store import ClassRows
from distmaml.tasks.images import ImageTasks
from distmaml.trees import tree_leaves

COUNTS = (6, 9, 7, 20, 6, 8)  # uneven classes
SIDE = 4


def told(label: int, sample: int) -> npt.NDArray[np.uint8]:
    """A picture of class and sample, whose corner says how it is turned."""
    picture = np.zeros((1, SIDE, SIDE), np.uint8)
    picture[0, 0, 0] = 255
    picture[0, 1, 1:3] = (label, sample)
    picture[0, 2, 2] = 100 + label
    return picture


def made() -> tuple[npt.NDArray[np.uint8], list[ClassRows]]:
    pictures: list[npt.NDArray[np.uint8]] = []
    classes: list[ClassRows] = []
    for label, count in enumerate(COUNTS):
        rows = np.arange(len(pictures), len(pictures) + count)
        pictures += [told(label, sample) for sample in range(count)]
        classes.append(ClassRows(f"class-{label}", rows))
    return np.stack(pictures), classes


IMAGES, CLASSES = made()


def source(**changes: Any) -> ImageTasks:
    arguments = {"split": "train", "seed": 0, "num_ways": 3, "num_shots": 2, "num_queries": 4, "rotations": False}
    images, classes = changes.pop("images", IMAGES), changes.pop("classes", CLASSES)
    return ImageTasks(images, classes, **{**arguments, **changes})


def upright(picture: npt.NDArray[np.float32]) -> tuple[int, int, int]:
    """(class, sample, quarter turns) that a picture tells, after undoing its turn by numpy."""
    values = np.round(picture * 255).astype(np.uint8)
    for turns in range(4):
        back = np.rot90(values, -turns, axes=(1, 2))
        if back[0, 0, 0] == 255:
            assert np.array_equal(back, told(int(back[0, 1, 1]), int(back[0, 1, 2])))
            return int(back[0, 1, 1]), int(back[0, 1, 2]), turns
    raise AssertionError("a picture that was never in the store")


def read(tasks: Any) -> list[dict[str, list[tuple[int, tuple[int, int, int]]]]]:
    """For each episode and half: (label, what the picture tells)."""
    episodes = []
    for i in range(len(tasks.support.targets)):
        halves = {"support": tasks.support, "query": tasks.query}
        episodes.append({
            half: [(int(y), upright(x)) for x, y in zip(b.inputs[i].numpy(), b.targets[i], strict=True)]
            for half, b in halves.items()
        })  # fmt: skip
    return episodes


@pytest.mark.parametrize("rotations", [False, True])
def test_labels_are_right_classes_distinct_and_halves_disjoint(rotations: bool) -> None:
    for episode in read(source(rotations=rotations).sample(range(200))):
        both = episode["support"] + episode["query"]
        class_of = {label: (told_class, turns) for label, (told_class, _, turns) in both}
        assert sorted(class_of) == [0, 1, 2]
        assert len(set(class_of.values())) == 3  # a class and its rotation are two classes
        assert all((c, t) == class_of[label] for label, (c, _, t) in both)
        assert len({told_all for _, told_all in both}) == len(both) == 3 * (2 + 4)
        assert [label for label, _ in episode["support"]] == [0, 0, 1, 1, 2, 2]
        assert [label for label, _ in episode["query"]] == [0] * 4 + [1] * 4 + [2] * 4


def test_every_class_sample_and_turn_is_drawn() -> None:
    seen = {
        told_all for e in read(source(rotations=True).sample(range(600))) for half in e.values() for _, told_all in half
    }
    assert seen == {(c, s, t) for c, count in enumerate(COUNTS) for s in range(count) for t in range(4)}


def test_without_rotations_nothing_is_turned() -> None:
    assert {t for e in read(source().sample(range(50))) for half in e.values() for _, (_, _, t) in half} == {0}


def test_a_large_class_is_drawn_evenly() -> None:
    """Samples of the class of 20: each is in an episode of that class with probability 6 / 20."""
    counts = torch.zeros(20)
    for episode in read(source(num_ways=6).sample(range(1000))):
        for half in episode.values():
            for _, (label, sample, _) in half:
                counts[sample] += label == 3
    # binomial: mean 300, standard deviation sqrt(1000 * 0.3 * 0.7) = 14.5
    assert float((counts - 300).abs().max()) < 5 * 14.5


def test_support_and_query_share_no_row_of_the_store() -> None:
    _, rows = source().draw(range(500))
    assert all(len(set(episode)) == len(episode) for episode in rows.flatten(1).tolist())


def test_one_by_one_in_any_order_equals_the_batch() -> None:
    indices = [9, 0, 77777, 4]
    together = source(rotations=True).sample(indices)
    for position in reversed(range(len(indices))):
        alone = source(rotations=True).sample([indices[position]])
        for one, all_ in zip(tree_leaves(alone), tree_leaves(together), strict=True):
            assert torch.equal(one[0], all_[position])


@pytest.mark.parametrize("changes", [{"seed": 1}, {"split": "val"}])
def test_another_seed_or_split_draws_other_episodes(changes: dict[str, Any]) -> None:
    assert not torch.equal(source().draw(range(20))[1], source(**changes).draw(range(20))[1])


def test_pixels_are_floats_between_zero_and_one() -> None:
    inputs = source().sample([0]).support.inputs
    assert (inputs.dtype, tuple(inputs.shape)) == (torch.float32, (1, 6, 1, SIDE, SIDE))
    assert (float(inputs.min()), float(inputs.max())) == (0.0, 1.0)


def test_the_store_is_not_written_to() -> None:
    images = IMAGES.copy()
    images.flags.writeable = False
    tasks = source(images=images, rotations=True).sample(range(20))
    tasks.support.inputs.zero_()
    assert np.array_equal(images, IMAGES)


def test_rows_of_a_split_by_samples_need_not_be_next_to_each_other() -> None:
    classes = [ClassRows(entry.name, entry.rows[::2]) for entry in CLASSES]
    found = read(source(classes=classes, num_shots=1, num_queries=2).sample(range(100)))
    assert {s % 2 for e in found for half in e.values() for _, (_, s, _) in half} == {0}


def test_as_many_ways_as_classes_and_as_many_samples_as_the_smallest_class_will_do() -> None:
    tasks = source(num_ways=6, num_shots=1, num_queries=5).sample([0])
    assert len({c for half in read(tasks)[0].values() for _, (c, _, _) in half}) == 6
    source(num_ways=24, rotations=True).sample([0])


def test_too_many_ways_are_refused() -> None:
    with pytest.raises(DataError, match=r"num_ways=7 asks for more classes than the 6 of the train split"):
        source(num_ways=7)
    with pytest.raises(DataError, match=r"num_ways=25 asks for more classes than the 24 of the train split"):
        source(num_ways=25, rotations=True)


def test_a_class_with_too_few_samples_is_named() -> None:
    with pytest.raises(DataError, match=r"2 shots and 5 queries need 7 images a class, but class 'class-0' .* has 6"):
        source(num_queries=5)
