"""The class store: what is written is what is mapped, whole or not at all."""

import itertools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from distmaml.errors import DataError, RunError
from distmaml.files import atomic_file
from distmaml.store import ClassStore, StoreInfo, hash_order, open_store, write_store

SHAPE = (1, 4, 5)
COUNTS = {"a": 5, "b": 3, "c": 7, "d": 4}
SPLITS = {"default": {"train": ["a", "d"], "val": ["b"], "test": ["c"]}}


def pictures(name: str, count: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(ord(name)).integers(0, 256, (count, *SHAPE), dtype=np.uint8)


def four_classes() -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
    for name, count in COUNTS.items():
        yield name, pictures(name, count)


def write(path: Path, **changes: Any) -> StoreInfo:
    arguments: dict[str, Any] = {
        "name": "toy",
        "source": "numpy",
        "licence": "none",
        "image_shape": SHAPE,
        "ink": True,
        "classes": four_classes(),
        "splits": SPLITS,
    }
    return write_store(path, **(arguments | changes))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write(tmp_path / "toy.arrow")
    return tmp_path / "toy.arrow"


@pytest.fixture
def store(path: Path) -> ClassStore:
    return open_store(path)


# ------------------------------------------------------------------------------------- what is written


def test_a_store_gives_back_the_images_and_everything_said_of_them(tmp_path: Path) -> None:
    written = write(tmp_path / "toy.arrow")
    store = open_store(tmp_path / "toy.arrow")
    np.testing.assert_array_equal(store.images, np.concatenate([images for _, images in four_classes()]))
    assert store.info == written
    assert store.info.class_names == ("a", "b", "c", "d")
    assert store.info.offsets == (0, 5, 8, 15, 19)
    assert (store.info.name, store.info.source, store.info.licence, store.info.ink) == ("toy", "numpy", "none", True)


def test_images_are_a_read_only_view_of_the_map(store: ClassStore, path: Path) -> None:
    assert store.images.dtype == np.uint8
    assert not store.images.flags.writeable
    assert not store.images.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        store.images[0] = 0
    address = store.images.__array_interface__["data"][0]
    mappings = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]
    ranges = [[int(edge, 16) for edge in fields[0].split("-")] for fields in mappings]
    assert any(start <= address < end for start, end in ranges)


_SHARE = """
import sys
from distmaml.store import open_store
store = open_store(sys.argv[1])
print(int(store.images.sum()), flush=True)
sys.stdin.read()
"""


def memory_of_map(path: Path) -> dict[str, int]:
    """Sums of /proc/self/smaps over the mappings of a file, in KiB."""
    sums = {"Rss": 0, "Pss": 0, "Private_Dirty": 0}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        fields = line.split()
        if not fields[0].endswith(":"):
            inside = line.endswith(str(path))
        elif inside and fields[0][:-1] in sums:
            sums[fields[0][:-1]] += int(fields[1])
    return sums


def test_two_processes_share_the_pages_of_a_store(tmp_path: Path) -> None:
    path = tmp_path / "large.arrow"
    large = ((name, np.full((8, 1, 512, 512), 7, np.uint8)) for name in "abc")
    write(path, image_shape=(1, 512, 512), classes=large, splits={})
    store = open_store(path)
    total = int(store.images.sum())
    alone = memory_of_map(path)
    other = subprocess.Popen(
        [sys.executable, "-c", _SHARE, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with other:
        assert other.stdout is not None
        assert int(other.stdout.readline()) == total
        shared = memory_of_map(path)
    kib = store.images.nbytes // 1024
    assert alone["Rss"] >= kib
    assert shared["Rss"] >= kib
    assert shared["Pss"] < 0.6 * shared["Rss"]
    assert shared["Private_Dirty"] == 0


def test_the_content_hash_depends_on_images_names_shape_and_ink(tmp_path: Path) -> None:
    base = write(tmp_path / "0.arrow").content_hash
    assert write(tmp_path / "1.arrow", name="other", splits={}).content_hash == base
    changed = dict(four_classes())
    changed["b"][0, 0, 0, 0] ^= 1
    renamed = [(name.replace("b", "e"), images) for name, images in four_classes()]
    square = [(name, images.reshape(-1, 1, 5, 4)) for name, images in four_classes()]
    others = {
        write(tmp_path / "2.arrow", classes=changed.items()).content_hash,
        write(tmp_path / "3.arrow", classes=renamed, splits={}).content_hash,
        write(tmp_path / "4.arrow", classes=square, image_shape=(1, 5, 4)).content_hash,
        write(tmp_path / "5.arrow", ink=False).content_hash,
    }
    assert len(others) == 4
    assert base not in others


def test_other_arrow_readers_see_a_tensor_column(path: Path) -> None:
    with pa.OSFile(str(path)) as file:
        table = pa.ipc.open_file(file).read_all()
    assert table.schema.field("image").type == pa.fixed_shape_tensor(pa.uint8(), SHAPE)
    np.testing.assert_array_equal(table["image"].combine_chunks().to_numpy_ndarray()[:5], pictures("a", 5))


# -------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": []}, "no classes"),
        ({"classes": [("a", np.zeros((0, *SHAPE), np.uint8))]}, "'a' of toy has no images"),
        ({"classes": [("a", np.zeros((2, 1, 4, 4), np.uint8))]}, r"\(2, 1, 4, 4\), not uint8 \[n, \*\(1, 4, 5\)\]"),
        ({"classes": [("a", np.zeros((2, *SHAPE), np.float32))]}, "float32"),
        ({"classes": [*four_classes(), ("a", pictures("a", 2))]}, "'a' of toy comes twice"),
        ({"splits": {"s": {"train": ["a", "b"], "val": ["b"], "test": ["c"]}}}, "'b' is in train and in val"),
        ({"splits": {"s": {"train": ["a", "a"], "val": ["b"], "test": ["c"]}}}, "'a' is in train and in train"),
        ({"splits": {"s": {"train": ["a"], "val": ["x"], "test": ["c"]}}}, "val names the unknown class 'x'"),
        ({"splits": {"s": {"train": ["a"], "val": ["b"]}}}, "each of train, val and test"),
        ({"splits": {"s": {"train": ["a"], "val": [], "test": ["c"]}}}, "each of train, val and test"),
        ({"splits": {"samples": SPLITS["default"]}}, "reserved"),
        ({"name": "two\nlines"}, r"the name 'two\\nlines' must be one line"),
        ({"name": "x" * 201}, "must be one line of at most 200 characters"),
    ],
)
def test_what_is_no_store_is_refused_and_nothing_is_left(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        write(tmp_path / "toy.arrow", **changes)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_source_leaves_the_old_store(path: Path) -> None:
    before = path.read_bytes()

    def broken() -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
        yield "a", pictures("a", 5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(path, classes=broken())
    assert [entry.name for entry in path.parent.iterdir()] == ["toy.arrow"]
    assert path.read_bytes() == before


def test_an_os_error_of_the_source_is_not_taken_for_the_disk(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
        yield "a", pictures("a", 5)
        raise TimeoutError("the source")

    with pytest.raises(TimeoutError, match="the source"):
        write(tmp_path / "toy.arrow", classes=broken())


def test_an_atomic_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        with atomic_file(path) as file:
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
    with atomic_file(tmp_path / "x") as file:
        file.write(b"whole")
        assert not (tmp_path / "x").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == b"whole"


_TOO_LARGE = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from distmaml.errors import RunError
from distmaml.store import write_store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
classes = [(name, np.zeros((64, 1, 64, 64), np.uint8)) for name in "abcd"]
try:
    write_store(Path(sys.argv[1]), name="toy", source="", licence="", image_shape=(1, 64, 64), ink=True,
                classes=classes, splits={})
except RunError as error:
    print(error)
"""


# 1 MiB of images: the first limit stops the waiting images, the second the store, which is larger by its metadata.
@pytest.mark.parametrize("limit", [300_000, 2**20 + 100])
def test_a_disk_that_takes_no_more_leaves_nothing_and_names_the_way_out(tmp_path: Path, limit: int) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    path = tmp_path / "full" / "toy.arrow"
    command = [sys.executable, "-c", _TOO_LARGE, str(path), str(limit)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert answer.stdout == (
        f"cannot write {path}: File too large. Make room or choose another folder with --output-dir.\n"
    ), answer.stderr
    assert list(path.parent.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot write .*file/toy.arrow: .*--output-dir"):
        write(tmp_path / "file" / "toy.arrow")


def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    own = os.geteuid()
    if own == 0:  # root may write anywhere, so be nobody for a moment
        os.seteuid(65534)
    try:
        with pytest.raises(RunError, match="Permission denied"):
            write(tmp_path / "toy.arrow")
    finally:
        os.seteuid(own)


# ----------------------------------------------------------------------------------------------- splits


def test_a_scheme_gives_its_classes_with_all_their_rows(store: ClassStore) -> None:
    train = store.classes("default", "train")
    assert [name for name, _ in train] == ["a", "d"]
    assert [rows.tolist() for _, rows in train] == [[0, 1, 2, 3, 4], [15, 16, 17, 18]]
    np.testing.assert_array_equal(store.images[train[1].rows], pictures("d", 4))


def test_samples_divides_every_class_60_20_20_without_sharing_a_row(tmp_path: Path) -> None:
    sizes = {"three": 3, "twenty": 20, "fifty": 50}
    classes = [(name, np.zeros((count, *SHAPE), np.uint8)) for name, count in sizes.items()]
    write(tmp_path / "toy.arrow", classes=classes, splits={})
    store = open_store(tmp_path / "toy.arrow")
    parts = [store.classes("samples", split) for split in ("train", "val", "test")]
    assert [[len(rows) for _, rows in part] for part in parts] == [[1, 12, 30], [1, 4, 10], [1, 4, 10]]
    for name, together in zip(sizes, zip(*parts, strict=True), strict=True):
        assert {entry.name for entry in together} == {name}
    every_row = np.concatenate([rows for part in parts for _, rows in part])
    assert sorted(every_row.tolist()) == list(range(73))
    assert all(rows.dtype == np.int64 for part in parts for _, rows in part)


def test_samples_depends_on_the_class_name_alone(tmp_path: Path, store: ClassStore) -> None:
    reverse = list(four_classes())[::-1]
    write(tmp_path / "reverse.arrow", classes=reverse)
    other = open_store(tmp_path / "reverse.arrow")
    starts, other_starts = (dict(zip(s.info.class_names, s.info.offsets, strict=False)) for s in (store, other))
    expected = {name: (rows - starts[name]).tolist() for name, rows in store.classes("samples", "test")}
    assert {name: (rows - other_starts[name]).tolist() for name, rows in other.classes("samples", "test")} == expected


def test_samples_needs_three_images_a_class(tmp_path: Path) -> None:
    write(tmp_path / "toy.arrow", classes=[("few", pictures("a", 2))], splits={})
    with pytest.raises(DataError, match=r"'few' of toy has 2 images; split by samples needs 3"):
        open_store(tmp_path / "toy.arrow").classes("samples", "train")


def test_split_hash_is_that_of_the_sorted_class_names(tmp_path: Path, store: ClassStore) -> None:
    # printf '{"test":["c"],"train":["a","d"],"val":["b"]}' | sha256sum
    assert store.split_hash("default") == "f666a1b8dda498809e1ebfbb1f8ce7bae230d5d18760128fb7d96f65cc2921e6"
    shuffled = {"default": {"test": ["c"], "train": ["d", "a"], "val": ["b"]}}
    write(tmp_path / "1.arrow", splits=shuffled)
    assert open_store(tmp_path / "1.arrow").split_hash("default") == store.split_hash("default")
    write(tmp_path / "2.arrow", splits={"default": {"test": ["b"], "train": ["d", "a"], "val": ["c"]}})
    assert open_store(tmp_path / "2.arrow").split_hash("default") != store.split_hash("default")
    assert store.split_hash("samples") not in (store.split_hash("default"), hash_order("", []))


def test_unknown_names_are_answered_with_the_known_ones(store: ClassStore, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"unknown split scheme 'defalt'; did you mean 'default'\? Known: default, samples"
    ):
        store.classes("defalt", "train")
    with pytest.raises(DataError, match=r"unknown split 'valid'; did you mean 'val'"):
        store.classes("default", "valid")
    write(tmp_path / "none.arrow", splits={})
    with pytest.raises(DataError, match=r"4 classes of toy are too few to divide.*--split-by samples"):
        open_store(tmp_path / "none.arrow").classes("default", "train")


def test_hash_order_is_a_permutation_that_the_salt_changes() -> None:
    names = [str(number) for number in range(100)]
    first, second = hash_order("first", names), hash_order("second", names)
    assert sorted(first) == sorted(second) == sorted(names)
    assert first != second
    assert hash_order("first", reversed(names)) == first


# --------------------------------------------------------------------------------------------- damage


def test_a_whole_store_verifies(store: ClassStore) -> None:
    store.verify()


def test_verify_finds_one_changed_pixel(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(pictures("c", 7)[3].tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="store of toy is damaged"):
        open_store(path).verify()


def test_a_missing_store_says_how_to_build_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no store at .*none.arrow. Build it with jobs/build_store.py"):
        open_store(tmp_path / "none.arrow")
    with pytest.raises(DataError, match="cannot be read"):
        open_store(tmp_path)


@pytest.mark.parametrize("content", [b"", b"A", b"ARROW1", b"PNG" * 100, b"ARROW1" + bytes(100) + b"ARROW1"])
def test_another_file_is_no_store(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(DataError, match=r"x is not a store that can be used: it is .*Rebuild it"):
        open_store(tmp_path / "x")


def test_an_arrow_file_of_something_else_is_no_store(tmp_path: Path) -> None:
    table = pa.table({"x": [1, 2]})
    with pa.OSFile(str(tmp_path / "x"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match="no distmaml metadata"):
        open_store(tmp_path / "x")


def test_a_store_cut_off_at_any_byte_is_refused(path: Path) -> None:
    content = path.read_bytes()
    for length in [*range(0, len(content), 7), *range(len(content) - 40, len(content))]:
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match="not a store that can be used"):
            open_store(path)


def test_a_store_with_a_piece_missing_in_the_middle_is_refused(path: Path) -> None:
    content = path.read_bytes()
    for cut in (8, 64, 200):
        path.write_bytes(content[:1000] + content[1000 + cut :])
        with pytest.raises(DataError):
            open_store(path).verify()


def test_no_flipped_bit_gives_wrong_data_or_another_kind_of_error(path: Path) -> None:
    whole = open_store(path)
    images = whole.images.copy()
    content = path.read_bytes()
    for position, bit in itertools.product(range(len(content)), (0x01, 0x80)):
        damaged = bytearray(content)
        damaged[position] ^= bit
        # A new file each time: a mapped one must not change below its reader.
        path.unlink()
        path.write_bytes(damaged)
        try:
            store = open_store(path)
            store.verify()
        except DataError:
            continue
        np.testing.assert_array_equal(store.images, images)
        assert store.info.class_names == whole.info.class_names


def with_table(path: Path, change: Callable[[Any], Any], *, rows: int | None = None, **options: Any) -> None:
    """Rewrites a store as another Arrow file, in batches of some rows."""
    with pa.OSFile(str(path)) as file:
        table = change(pa.ipc.open_file(file).read_all())
    options = {"options": pa.ipc.IpcWriteOptions(**options)}
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema, **options) as writer:
        writer.write_table(table, max_chunksize=rows)


def with_metadata(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrites the metadata of a store and leaves its images."""

    def changed(table: Any) -> Any:
        values = json.loads(table.schema.metadata[b"distmaml"])
        change(values)
        return table.replace_schema_metadata({b"distmaml": json.dumps(values)})

    with_table(path, changed)


def with_column(storage: Callable[[Any], Any], *, name: str = "image") -> Callable[[Any], Any]:
    """A change of the column of images."""

    def changed(table: Any) -> Any:
        column = storage(table["image"].combine_chunks())
        return pa.table({name: column}).replace_schema_metadata(table.schema.metadata)

    return changed


OTHER_TYPE = "not one batch of the uint8 images"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_column(lambda column: column.storage), OTHER_TYPE),
        (with_column(lambda column: column.storage.cast(pa.list_(pa.int8(), 20), safe=False)), OTHER_TYPE),
        (with_column(lambda column: column.storage.cast(pa.list_(pa.uint16(), 20))), OTHER_TYPE),
        (with_column(lambda column: pa.nulls(len(column))), OTHER_TYPE),
        (with_column(lambda column: pa.array(["x"] * len(column)).dictionary_encode()), OTHER_TYPE),
        (with_column(lambda column: column, name="picture"), OTHER_TYPE),
        (lambda table: table.append_column("more", table["image"]), OTHER_TYPE),
        (lambda table: table.slice(0, 0), "not hold its images in one batch"),
        (lambda table: table.slice(0, 18), "18 images, its metadata say 19"),
    ],
)
def test_an_arrow_file_of_another_table_is_no_store(path: Path, change: Callable[[Any], Any], message: str) -> None:
    with_table(path, change)
    with pytest.raises(DataError, match=message):
        open_store(path)


def test_images_that_are_null_are_refused(path: Path) -> None:
    def nulled(column: Any) -> Any:
        mask = pa.array([True] + [False] * (len(column) - 1))
        storage = pa.FixedSizeListArray.from_arrays(column.storage.values, 20, mask=mask)
        return pa.ExtensionArray.from_storage(column.type, storage)

    with_table(path, with_column(nulled))
    with pytest.raises(DataError, match="images that are null"):
        open_store(path)


def test_images_in_two_batches_are_refused(path: Path) -> None:
    with_table(path, lambda table: table, rows=10)
    with pytest.raises(DataError, match="not hold its images in one batch"):
        open_store(path)


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_images_that_would_have_to_be_unpacked_are_refused(path: Path, compression: str) -> None:
    with_table(path, lambda table: table, compression=compression)
    with pytest.raises(DataError, match="without compression"):
        open_store(path)


def test_a_store_of_another_writer_of_the_same_form_is_read(path: Path) -> None:
    before = open_store(path)
    images = before.images.copy()
    with_table(path, lambda table: table, allow_64bit=False)
    np.testing.assert_array_equal(open_store(path).images, images)
    open_store(path).verify()


def test_a_million_classes_of_one_name_are_refused_at_once(path: Path) -> None:
    names = [str(number) for number in range(1_000_000)]
    names[-1] = names[-2]
    with_metadata(path, lambda values: values.update(class_names=names, offsets=list(range(1_000_001))))
    start = time.monotonic()
    with pytest.raises(DataError, match="class '999998' of toy comes twice"):
        open_store(path)
    assert time.monotonic() - start < 20  # of the order of a second; comparing each with all before takes hours


@pytest.mark.parametrize("version", [0, 2, "1", None, True])
def test_another_format_version_asks_for_a_new_store(path: Path, version: Any) -> None:
    with_metadata(path, lambda values: values.update(format_version=version))
    with pytest.raises(DataError, match=r"format version .* reads 1. Rebuild it with jobs/build_store.py"):
        open_store(path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("offsets", [0, 5, 8, 15, 20], "19 images, its metadata say 20"),
        ("offsets", [0, 5, 8, 15, 18], "19 images, its metadata say 18"),
        ("offsets", [0, 8, 5, 15, 19], "must increase"),
        ("offsets", [1, 5, 8, 15, 19], "must start at 0"),
        ("offsets", [0, 5, 8, 19], "must start at 0 and bound each"),
        ("offsets", [0, 5, 8, 15, 19.0], "'offsets' must be"),
        ("offsets", [0, 5, 8, 15, -19], "'offsets' must be"),
        ("offsets", [0, 5, 8, 15, 10**30], "'offsets' must be"),
        ("image_shape", [1, 5, 4], "its metadata say"),
        ("image_shape", [1, 4], "'image_shape' must be"),
        ("image_shape", [0, 4, 5], "must be positive"),
        ("image_shape", [2**20, 2**20, 5], "must be positive and below 2 GiB"),
        ("class_names", ["a", "b", "c", 4], "'class_names' must be"),
        ("class_names", ["a", "b", "c", "c"], "comes twice"),
        ("splits", {"default": {"train": ["a", "b"], "val": ["b"], "test": ["c"]}}, "splits must not share a class"),
        ("splits", ["default"], "'splits' must be"),
        ("ink", 1, "'ink' must be true or false"),
        ("content_hash", None, "'content_hash' must be"),
    ],
)
def test_metadata_that_do_not_fit_are_refused(path: Path, field: str, value: Any, message: str) -> None:
    with_metadata(path, lambda values: values.update({field: value}))
    with pytest.raises(DataError, match=message):
        open_store(path)


def test_a_missing_metadata_field_is_named(path: Path) -> None:
    with_metadata(path, lambda values: values.pop("licence"))
    with pytest.raises(DataError, match="'licence' must be a text"):
        open_store(path)
