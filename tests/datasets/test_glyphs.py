"""Glyphs: many legible letters, the same on every machine, and no letter under two names."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distmaml.datasets import ensure_store, glyphs
from distmaml.errors import ConfigError
from distmaml.store import ClassStore, open_store

JOB = Path(__file__).parents[2] / "jobs" / "build_store.py"


def run_job(*arguments: str, output_dir: Path) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"DISTMAML_HOME": str(output_dir), "PYTHONHASHSEED": "1"}
    return subprocess.run([sys.executable, str(JOB), *arguments], capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def answer(home: Path) -> "subprocess.CompletedProcess[str]":
    return run_job("glyphs", output_dir=home)


@pytest.fixture(scope="module")
def store(home: Path, answer: "subprocess.CompletedProcess[str]") -> ClassStore:
    assert answer.returncode == 0, answer.stderr
    return open_store(home / "stores" / "glyphs-28.arrow")


def test_the_job_prints_what_is_in_the_store(
    answer: "subprocess.CompletedProcess[str]", store: ClassStore, home: Path
) -> None:
    lines = answer.stdout.splitlines()
    assert lines[0] == str(home / "stores" / "glyphs-28.arrow")
    assert lines[1] == f"{len(store.info.class_names)} classes, {len(store.images)} images of (1, 28, 28)"
    assert lines[2] == f"content {store.info.content_hash}"
    assert lines[3].startswith("split default: ")
    assert lines[3].endswith(store.split_hash("default"))
    assert answer.stderr == ""


def test_the_job_ends_with_status_2_and_one_line_on_an_error(tmp_path: Path) -> None:
    answer = run_job("glyfs", output_dir=tmp_path)
    assert answer.returncode == 2
    assert answer.stderr == (
        "error: unknown dataset 'glyfs'; did you mean 'glyphs'? Known: glyphs, image_folder, omniglot. A ready store's "
        "path or URI ends in .arrow; your own data set is named package.module:attribute.\n"
    )


def test_there_are_a_thousand_letters_with_20_samples_each(store: ClassStore) -> None:
    assert len(store.info.class_names) >= 1000
    assert store.info.offsets == tuple(range(0, len(store.images) + 1, 20))
    assert "U+0041 LATIN CAPITAL LETTER A" in store.info.class_names
    assert store.info.ink


def test_a_built_store_is_not_built_again(store: ClassStore, home: Path) -> None:
    path = home / "stores" / "glyphs-28.arrow"
    before = path.stat().st_ino
    assert ensure_store("glyphs", data_dir=None, image_size=28, color=False, stores_dir=path.parent) == path
    assert path.stat().st_ino == before


def test_no_sample_is_blank_clipped_or_off_centre(store: ClassStore) -> None:
    images = store.images[:, 0]
    border = np.concatenate([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], axis=1)
    assert border.max() == 0
    assert images.max(axis=(1, 2)).min() > 100
    for axis in (1, 2):
        used = np.asarray(images.any(axis=axis))
        centres = (used.argmax(axis=1) + 27 - used[:, ::-1].argmax(axis=1)) / 2
        assert np.abs(centres - 13.5).max() <= 4


def test_samples_of_a_letter_differ_and_resemble_each_other(store: ClassStore) -> None:
    assert len(np.unique(store.images.reshape(len(store.images), -1), axis=0)) == len(store.images)
    means = store.images.reshape(-1, 20, 784).astype(np.float32).mean(axis=1)
    start = store.info.offsets[store.info.class_names.index("U+0057 LATIN CAPITAL LETTER W")]
    distances = ((means - store.images[start].reshape(784)) ** 2).sum(axis=1)
    assert start // 20 in np.argsort(distances)[:20]


def test_letters_that_look_the_same_are_one_class(store: ClassStore) -> None:
    codes = {name.split()[0] for name in store.info.class_names}
    # Latin, Greek and Cyrillic A, O and X; Latin and Cyrillic small a; Armenian Oh looks like O.
    assert {"U+0041", "U+004F", "U+0058", "U+0061"} <= codes
    assert not {"U+0391", "U+0410", "U+039F", "U+041E", "U+0555", "U+03A7", "U+0425", "U+0430"} & codes
    bitmaps: dict[bytes, str] = {}
    for letter, faces in glyphs.distinct_letters().items():
        for face in faces:
            bitmap = glyphs._bitmap(face, letter)
            assert bitmap is not None
            key = hashlib.sha256(f"{face} {bitmap.size}".encode() + bitmap.tobytes()).digest()
            assert bitmaps.setdefault(key, letter) == letter


def test_the_split_is_70_10_20_percent_of_all_classes(store: ClassStore) -> None:
    parts = store.info.splits["default"]
    names = [name for split in ("train", "val", "test") for name in parts[split]]
    assert sorted(names) == sorted(store.info.class_names)
    shares = [len(parts[split]) / len(names) for split in ("train", "val", "test")]
    np.testing.assert_allclose(shares, [0.7, 0.1, 0.2], atol=0.001)
    digests = [hashlib.sha256(f"distmaml-glyphs:{name}".encode()).hexdigest() for name in names]
    assert digests == sorted(digests)


def test_samples_are_the_same_in_another_process(store: ClassStore) -> None:
    # The store was built by the job under another hash seed.
    letters = glyphs.distinct_letters()
    for letter in "AQя":
        name = glyphs._class_name(letter)
        start = store.info.offsets[store.info.class_names.index(name)]
        np.testing.assert_array_equal(glyphs._samples(name, letters[letter], 28), store.images[start : start + 20])


def test_colors_and_impossible_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no colors"):
        ensure_store("glyphs", data_dir=None, image_size=28, color=True, stores_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"image_size=0 must lie in \[1, 1024\]"):
        ensure_store("glyphs", data_dir=None, image_size=0, color=False, stores_dir=tmp_path)
