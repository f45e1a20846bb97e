"""Image folders: a user's pictures as they lie on the disk, and the store that is kept for them."""

import multiprocessing
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distmaml.datasets import ensure_store, image_folder
from distmaml.errors import ConfigError, DataError, RunError
from distmaml.store import ClassStore, StoreInfo, open_store, write_store


def picture(path: Path, value: int, size: tuple[int, int] = (9, 7)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


def folders(data_dir: Path, names: Iterable[str], count: int = 3) -> Path:
    for number, name in enumerate(names):
        for index in range(count):
            picture(data_dir / name / f"{index}.png", 10 * number + index)
    return data_dir


def flat(data_dir: Path, splits: dict[str, list[str]], count: int = 2) -> Path:
    """The form of mini-ImageNet: all pictures in images/, a table filename,label for each split."""
    for split, labels in splits.items():
        rows = [f"{label}{index:08d}.jpg,{label}" for label in labels for index in range(count)]
        (data_dir / f"{split}.csv").write_text("\n".join(["filename,label", *rows, ""]))
        for number, row in enumerate(rows):
            picture(data_dir / "images" / row.split(",")[0], 100 + number)
    return data_dir


def build(data_dir: Path | None, color: bool = False) -> ClassStore:
    path = (data_dir or Path()).absolute().parent / "out" / "s.arrow"
    image_folder.build(path, data_dir=data_dir, image_size=5, color=color, download_dir=path.parent)
    return open_store(path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


# ------------------------------------------------------------------------------------- folders a class


def test_cats_and_dogs_are_divided_by_samples(data: Path) -> None:
    for name, value in (("cats", 50), ("dogs", 200)):
        for index in range(50):
            picture(data / name / f"{name}{index}.jpg", value, size=(20 + index, 30))
    store = build(data, color=True)
    assert store.info.class_names == ("cats", "dogs")
    assert store.images.shape == (100, 3, 5, 5)
    assert not store.info.ink
    np.testing.assert_allclose(store.images[:50], 50, atol=2)
    np.testing.assert_allclose(store.images[50:], 200, atol=2)
    sizes = [[len(rows) for _, rows in store.classes("samples", split)] for split in ("train", "val", "test")]
    assert sizes == [[30, 30], [10, 10], [10, 10]]
    with pytest.raises(DataError, match=r"2 classes of image_folder are too few to divide.*--split-by samples"):
        store.classes("default", "train")


def test_pictures_of_every_kind_come_in_the_order_of_their_names(data: Path) -> None:
    names = ["a.png", "b.JPG", "c.jpeg", "d.bmp", "e.gif", "f.webp", "g.tif", "h.TIFF"]
    for number, name in enumerate(names):
        picture(data / "x" / name, 30 * number)
    picture(data / "y" / "a.png", 0)
    (data / "x" / "notes.txt").write_text("not a picture")
    (data / "x" / "._a.png").write_text("what macOS leaves on other disks")
    store = build(data)
    np.testing.assert_allclose(store.images[:8, 0, 2, 2], [30 * number for number in range(8)], atol=3)
    assert store.info.offsets == (0, 8, 9)


def test_a_folder_whose_name_is_not_unicode_is_a_class(data: Path) -> None:
    folders(data, [os.fsdecode(b"caf\xe9"), *(f"class{number}" for number in range(9))])
    store = build(data)
    assert store.info.class_names[0] == os.fsdecode(b"caf\xe9")
    assert len(store.split_hash("default")) == 64


def test_hidden_folders_are_no_classes(data: Path) -> None:
    folders(data, ["a", "b", ".git", "__MACOSX"])
    assert build(data).info.class_names == ("a", "b")


@pytest.mark.parametrize(("count", "sizes"), [(9, None), (10, (6, 2, 2)), (20, (13, 3, 4)), (100, (64, 16, 20))])
def test_enough_classes_are_divided_64_16_20(data: Path, count: int, sizes: tuple[int, int, int] | None) -> None:
    store = build(folders(data, [f"class{number}" for number in range(count)], count=1))
    if sizes is None:
        assert store.info.splits == {}
        return
    parts = store.info.splits["default"]
    assert tuple(len(parts[split]) for split in ("train", "val", "test")) == sizes
    assert {name for names in parts.values() for name in names} == set(store.info.class_names)


def test_an_added_class_moves_few_others(data: Path) -> None:
    names = [f"class{number}" for number in range(50)]
    before = build(folders(data, names, count=1)).info.splits["default"]
    after = build(folders(data, ["another"], count=1)).info.splits["default"]
    assert sum(name not in after["train"] for name in before["train"]) <= 1


# ------------------------------------------------------------------------------------------- CSV files


def test_mini_imagenet_gives_its_own_splits(data: Path) -> None:
    store = build(flat(data, {"train": ["n02", "n01"], "val": ["n03"], "test": ["n04"]}))
    assert store.info.class_names == ("n01", "n02", "n03", "n04")
    assert store.info.offsets == (0, 2, 4, 6, 8)
    assert [name for name, _ in store.classes("default", "train")] == ["n01", "n02"]
    assert [rows.tolist() for _, rows in store.classes("default", "test")] == [[6, 7]]


@pytest.mark.parametrize("table", ["label\n{}\n", "\ufefffilename,label\nx.png,{}\n"])
def test_tables_may_name_folders(data: Path, table: str) -> None:
    folders(data, ["a", "b", "c", "unused"])
    for split, name in (("train", "c"), ("val", "a"), ("test", "b")):
        (data / f"{split}.csv").write_text(table.format(name), encoding="utf-8")
    store = build(data)
    assert store.info.splits["default"] == {"train": ("c",), "val": ("a",), "test": ("b",)}
    assert store.info.class_names == ("a", "b", "c")


def test_a_folder_is_one_class_however_it_is_spelled(data: Path) -> None:
    folders(data, ["a", "b", "c"])
    for split, names in (("train", "a\nb\n"), ("val", "c\n"), ("test", "./a/\n")):
        (data / f"{split}.csv").write_text(f"label\n{names}")
    with pytest.raises(DataError, match=r"class 'a' in test.csv .* in another split"):
        build(data)


def test_a_class_in_two_splits_is_refused(data: Path) -> None:
    flat(data, {"train": ["n01", "n02"], "val": ["n03"], "test": ["n02"]})
    with pytest.raises(DataError, match=r"class 'n02' in test.csv .* in another split"):
        build(data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name,kind\na,b\n", r"val.csv has the columns \['name', 'kind'\]; it needs `label`"),
        ("", "columns None"),
        ("filename,label\n", "val.csv names no class"),
        ("filename,label\nx.jpg\n", "val.csv, line 2: no usable label"),
        ("filename,label\n../../secret.jpg,n03\n", "val.csv, line 2: no usable label"),
        ("filename,label\nx.jpg,/etc\n", "val.csv, line 2: no usable label"),
        ("filename,label\nnone.jpg,n03\n", "none.jpg is not there, but val.csv names it for the class 'n03'"),
        ("filename,label\nn0100000000.jpg,n03\n", "n0100000000.jpg is named for the classes 'n01' and 'n03'"),
        ("label\nn09\n", "n09 is not there, but a CSV file names the class 'n09'"),
    ],
)
def test_a_table_that_does_not_fit_is_named(data: Path, content: str, message: str) -> None:
    flat(data, {"train": ["n01"], "val": ["n03"], "test": ["n02"]})
    (data / "val.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        build(data)


def test_a_table_that_is_no_text_is_named(data: Path) -> None:
    flat(data, {"train": ["n01"], "val": ["n03"], "test": ["n02"]})
    (data / "val.csv").write_bytes(b"label\n\xff\xfe\n")
    with pytest.raises(DataError, match=r"val.csv cannot be read: .*UTF-8"):
        build(data)


def test_the_three_tables_come_together(data: Path) -> None:
    flat(data, {"train": ["n01"], "test": ["n02"]})
    with pytest.raises(DataError, match=r"has no val.csv; train.csv, val.csv and test.csv come together"):
        build(data)


# ---------------------------------------------------------------------------------------------- errors


def test_a_data_dir_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="--data-dir"):
        build(None)


@pytest.mark.parametrize(("names", "count"), [([], 0), (["only"], 1)])
def test_too_few_folders_are_counted(data: Path, names: list[str], count: int) -> None:
    with pytest.raises(DataError, match=f"has {count} folders of pictures"):
        build(folders(data, names))


def test_a_missing_folder_is_named(data: Path) -> None:
    with pytest.raises(DataError, match="none is not a folder"):
        build(data / "none")


def test_a_class_without_pictures_is_named(data: Path) -> None:
    folders(data, ["a", "b"])
    (data / "empty").mkdir()
    with pytest.raises(DataError, match=r"no picture in the folder .*empty"):
        build(data)


def test_a_broken_picture_is_named_and_leaves_no_store(data: Path) -> None:
    folders(data, ["a", "b"])
    (data / "b" / "1.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"b/1.png cannot be read as a picture"):
        build(data)
    assert list((data.parent / "out").iterdir()) == []


# ----------------------------------------------------------------------------------------------- links


def test_a_link_to_a_picture_of_the_same_folder_is_a_picture(data: Path) -> None:
    folders(data, ["a", "b"])
    (data / "a" / "9.png").symlink_to(data / "b" / "2.png")
    store = build(data)
    assert store.info.offsets == (0, 4, 7)
    np.testing.assert_array_equal(store.images[3], store.images[6])


def test_a_link_to_a_picture_elsewhere_is_named_and_not_followed(data: Path, tmp_path: Path) -> None:
    folders(data, ["a", "b"])
    picture(tmp_path / "private.png", 100)
    (data / "a" / "9.png").symlink_to(tmp_path / "private.png")
    with pytest.raises(DataError, match=r"a/9\.png is a symbolic link that leads out of .*data, to .*private\.png"):
        build(data)


@pytest.mark.parametrize("target", ["..", "a", "../elsewhere"])
def test_a_link_to_a_folder_is_no_class(data: Path, tmp_path: Path, target: str) -> None:
    folders(data, ["a", "b"])
    picture(tmp_path / "elsewhere" / "1.png", 100)
    (data / "c").symlink_to(target)
    with pytest.raises(DataError, match=r"data/c is reached by a symbolic link"):
        build(data)
    for split, label in (("train", "a"), ("val", "b"), ("test", "c")):
        (data / f"{split}.csv").write_text(f"label\n{label}\n")
    with pytest.raises(DataError, match=r"data/c is reached by a symbolic link"):
        build(data)


@pytest.mark.parametrize("what", ["table", "folder", "subfolder", "picture"])
def test_a_table_leads_nowhere_else_by_links(data: Path, tmp_path: Path, what: str) -> None:
    flat(data, {"train": ["n01"], "val": ["n03"], "test": ["n02"]})
    moved = tmp_path / "moved"
    if what == "table":
        (data / "val.csv").rename(moved)
        (data / "val.csv").symlink_to(moved)
    elif what == "folder":
        (data / "images").rename(moved)
        (data / "images").symlink_to(moved)
    elif what == "subfolder":
        picture(moved / "x.jpg", 9)
        (data / "images" / "sub").symlink_to(moved)
        (data / "val.csv").write_text("filename,label\nsub/x.jpg,n03\n")
    else:
        (data / "images" / "n0300000000.jpg").rename(moved)
        (data / "images" / "n0300000000.jpg").symlink_to(moved)
    with pytest.raises(DataError, match="symbolic link"):
        build(data)


def test_the_data_folder_itself_may_be_a_link(data: Path, tmp_path: Path) -> None:
    folders(data, ["a", "b"])
    (tmp_path / "link").symlink_to(data)
    assert build(tmp_path / "link").info.class_names == ("a", "b")


def test_a_pipe_is_no_picture(data: Path) -> None:
    folders(data, ["a", "b"])
    os.mkfifo(data / "a" / "9.png")
    with pytest.raises(DataError, match=r"9\.png is no file"):
        build(data)


def test_links_that_lead_round_and_round_are_listed_once(data: Path, tmp_path: Path) -> None:
    folders(data, ["a", "b"])
    for name in ("c", "d", "e"):
        (data / "a" / name).symlink_to("..")
    assert ensure(data, tmp_path / "stores").exists()


# ---------------------------------------------------------------------------------------- ensure_store


def ensure(data_dir: Path, stores_dir: Path, **changes: object) -> Path:
    return ensure_store(
        "image_folder",
        data_dir=data_dir,
        stores_dir=stores_dir,
        image_size=int(str(changes.get("image_size", 5))),
        color=bool(changes.get("color", False)),
        rebuild=bool(changes.get("rebuild", False)),
    )


def test_a_store_is_kept_until_a_picture_or_an_option_changes(data: Path, tmp_path: Path) -> None:
    folders(data, ["a", "b"])
    stores = tmp_path / "stores"
    first = ensure(data, stores)
    built = first.stat().st_ino
    assert ensure(data, stores) == first
    assert first.stat().st_ino == built
    others = {ensure(data, stores, color=True), ensure(data, stores, image_size=6)}
    picture(data / "a" / "0.png", 99)
    os.utime(data / "a" / "0.png", ns=(1, 1))
    others.add(ensure(data, stores))
    (data / "a" / "1.png").rename(data / "b" / "11.png")
    others.add(ensure(data, stores))
    assert len(others | {first}) == 5
    assert all(path.exists() for path in others)


def test_rebuild_replaces_a_damaged_store(data: Path, tmp_path: Path) -> None:
    path = ensure(folders(data, ["a", "b"]), tmp_path / "stores")
    path.write_bytes(b"damaged")
    assert ensure(data, path.parent) == path
    open_store(ensure(data, path.parent, rebuild=True)).verify()


def test_a_data_dir_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot list .*none: No such file"):
        ensure(tmp_path / "none", tmp_path / "stores")


def test_a_folder_for_stores_that_cannot_be_made_is_named(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot write .*file"):
        ensure(folders(data, ["a", "b"]), tmp_path / "file" / "stores")


def counting_builder(
    path: Path, *, data_dir: Path | None, image_size: int, color: bool, download_dir: Path
) -> StoreInfo:
    """A user's own data set, which leaves a file for each time that it is built."""
    assert data_dir is not None
    (data_dir.parent / f"built-{os.getpid()}").touch()
    images = np.zeros((3, 3 if color else 1, image_size, image_size), np.uint8)
    return write_store(
        path,
        name="own",
        source="",
        licence="",
        image_shape=(3 if color else 1, image_size, image_size),
        ink=False,
        classes=[("a", images), ("b", images)],
        splits={},
    )


def ensure_own(data_dir: Path, stores_dir: Path) -> Path:
    return ensure_store(
        "my.package:digits",
        data_dir=data_dir,
        image_size=4,
        color=True,
        stores_dir=stores_dir,
        builder=counting_builder,
    )


def test_processes_that_need_a_store_together_build_it_once(data: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(3) as pool:
        paths = pool.starmap(ensure_own, [(data, tmp_path / "stores")] * 3, chunksize=1)
        pool.close()
        pool.join()
    assert len(set(paths)) == 1
    assert paths[0].name.startswith("my.package.digits-4-rgb-")
    assert open_store(paths[0]).images.shape == (6, 3, 4, 4)
    assert len(list(tmp_path.glob("built-*"))) == 1


def test_a_name_that_is_not_in_the_table_is_answered_with_the_table(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown dataset 'omniglott'; did you mean 'omniglot'\? Known: glyphs"):
        ensure_store("omniglott", data_dir=None, image_size=28, color=False, stores_dir=tmp_path)
