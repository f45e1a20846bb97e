"""Omniglot: exactly its 1623 characters, from zips, folders or a server, in splits that are pinned."""

import contextlib
import hashlib
import http.server
import io
import os
import shutil
import stat
import threading
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distmaml.datasets import ensure_store, omniglot
from distmaml.errors import ConfigError, DataError
from distmaml.store import ClassStore, StoreInfo, open_store


def official_names(part: str) -> list[str]:
    """The class names of a part, from the list of the official alphabets and their numbers of characters."""
    rows = [line.split() for line in (Path(__file__).parent / "omniglot_alphabets.txt").read_text().splitlines()]
    return [f"{row[1]}/character{i:02d}" for row in rows if row[0] == part for i in range(1, int(row[2]) + 1)]


BACKGROUND, EVALUATION = official_names("images_background"), official_names("images_evaluation")


def drawing(number: int) -> bytes:
    """A 1-bit picture, black on white, that has `number` in its first row."""
    pixels = np.ones((8, 8), dtype=bool)
    pixels[0] = [not number >> bit & 1 for bit in range(8)]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def members(part: str, names: list[str]) -> Iterator[tuple[str, bytes]]:
    for index, name in enumerate(names):
        content = drawing(index % 256)
        for drawer in range(1, 21):
            yield f"{part}/{name}/{index + 1:04d}_{drawer:02d}.png", content


def write_zip(path: Path, files: Iterator[tuple[str, bytes]]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{path.stem}/", b"")
        for name, content in files:
            archive.writestr(name, content)


@pytest.fixture(scope="module")
def zips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both archives with the official names and small drawings."""
    folder = tmp_path_factory.mktemp("omniglot")
    write_zip(folder / "images_background.zip", members("images_background", BACKGROUND))
    write_zip(folder / "images_evaluation.zip", members("images_evaluation", EVALUATION))
    return folder


@pytest.fixture(scope="module")
def store(zips: Path, tmp_path_factory: pytest.TempPathFactory) -> ClassStore:
    stores = tmp_path_factory.mktemp("home") / "stores"
    return open_store(ensure_store("omniglot", data_dir=zips, image_size=8, color=False, stores_dir=stores))


def build(data_dir: Path | None, tmp_path: Path, color: bool = False) -> StoreInfo:
    return omniglot.build(
        tmp_path / "s.arrow", data_dir=data_dir, image_size=8, color=color, download_dir=tmp_path / "downloads"
    )


# ------------------------------------------------------------------------------------------ the store


def test_the_store_has_every_character_with_20_drawings(store: ClassStore) -> None:
    assert store.info.class_names == (*BACKGROUND, *EVALUATION)
    assert store.info.offsets == tuple(range(0, 32_460 + 1, 20))
    assert store.images.shape == (32_460, 1, 8, 8)
    store.verify()


def test_ink_is_255_and_paper_0(store: ClassStore) -> None:
    assert store.info.ink
    expected = np.zeros((20, 1, 8, 8))
    expected[:, :, 0] = [255 if 5 >> bit & 1 else 0 for bit in range(8)]
    np.testing.assert_array_equal(store.images[100:120], expected)


@pytest.mark.slow
def test_an_unpacked_folder_gives_the_same_store_as_its_zip(zips: Path, store: ClassStore, tmp_path: Path) -> None:
    (tmp_path / "omniglot-py").mkdir()
    shutil.copy(zips / "images_background.zip", tmp_path / "omniglot-py")
    with zipfile.ZipFile(zips / "images_evaluation.zip") as archive:
        archive.extractall(tmp_path / "omniglot-py")
    assert build(tmp_path, tmp_path).content_hash == store.info.content_hash


def test_colors_are_refused(zips: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no colors"):
        build(zips, tmp_path, color=True)


# ---------------------------------------------------------------------------------------------- splits


def test_the_splits_of_the_official_names_are_pinned(store: ClassStore) -> None:
    assert (len(BACKGROUND), len(EVALUATION)) == (964, 659)
    assert store.split_hash("maml") == "317834db6961b6fb69978a12c844f5434a1429d977298777b2f835d4dab11e1c"
    assert store.split_hash("default") == store.split_hash("maml")
    assert store.split_hash("alphabets") == "5dbc3888648c57dd1cc34e64ea9be0a4b5eecd85f78f1ba3b1cd641efc168a47"


def test_maml_is_1100_100_423_characters_by_the_sha256_of_their_names(store: ClassStore) -> None:
    parts = store.info.splits["maml"]
    assert {split: len(names) for split, names in parts.items()} == {"train": 1100, "val": 100, "test": 423}
    assert {name for names in parts.values() for name in names} == {*BACKGROUND, *EVALUATION}
    digests = [
        hashlib.sha256(f"distmaml-omniglot-maml:{name}".encode()).hexdigest()
        for split in ("train", "val", "test")
        for name in parts[split]
    ]
    assert digests == sorted(digests)


def test_alphabets_shares_no_alphabet_between_splits(store: ClassStore) -> None:
    parts = store.info.splits["alphabets"]
    alphabets = {split: {name.split("/")[0] for name in names} for split, names in parts.items()}
    assert {split: len(names) for split, names in alphabets.items()} == {"train": 25, "val": 5, "test": 20}
    assert len(set.union(*alphabets.values())) == 50
    assert alphabets["val"] == {"Braille", "Greek", "Latin", "Tagalog", "Tifinagh"}
    assert sorted(parts["test"]) == sorted(EVALUATION)
    assert sum(map(len, parts.values())) == 1623


def test_the_order_of_the_names_does_not_change_a_split() -> None:
    one, other = omniglot.split_schemes(BACKGROUND, EVALUATION), omniglot.split_schemes(BACKGROUND[::-1], EVALUATION)
    assert one["maml"] == other["maml"]
    assert sorted(one["alphabets"]["val"]) == sorted(other["alphabets"]["val"])


# ------------------------------------------------------------------------------------------- raw files


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no images_background.zip and no folder images_background in .*--data-dir"):
        build(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-1000], "images_background.zip is no zip or a damaged one"),
        (lambda content: b"<html>404</html>", "images_background.zip is no zip or a damaged one"),
        (lambda content: content.replace(b"IDAT", b"XXXX", 1), "damaged one .*Bad CRC-32"),
    ],
)
def test_a_damaged_zip_is_named(zips: Path, tmp_path: Path, change: Callable[[bytes], bytes], message: str) -> None:
    for part in omniglot.PARTS:
        (tmp_path / f"{part.name}.zip").write_bytes(change((zips / f"{part.name}.zip").read_bytes()))
    with pytest.raises(DataError, match=message):
        build(tmp_path, tmp_path)
    assert not (tmp_path / "s.arrow").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "has 0 characters; Omniglot's images_background has 964"),
        ([("images_background/A/character01/0001_01.png", b"")], "has 1 characters"),
        (
            [("images_evaluation/A/character01/0001_01.png", b"")],
            "it has 'images_evaluation/A/character01/0001_01.png'",
        ),
        ([("images_background/../../etc/passwd", b"")], "not Alphabet/characterNN"),
        ([("images_background/../character01/0001_01.png", b"")], "not Alphabet/characterNN"),
        ([("/images_background/A/character01/0001_01.png", b"")], "it has '/images_background/A"),
        ([("../images_background/A/character01/0001_01.png", b"")], r"it has '\.\./images_background/A"),
        ([("images_background/notes.txt", b"")], "it has 'notes.txt'"),
        ([("images_background/A/character01/0001_01.png", bytes(2**20 + 1))], "1048577 bytes; no drawing has more"),
        ([("__MACOSX/images_background/x", b"")], "has 0 characters"),
    ],
)
def test_a_zip_of_something_else_is_refused(tmp_path: Path, files: list[tuple[str, bytes]], message: str) -> None:
    write_zip(tmp_path / "images_background.zip", iter(files))
    with pytest.raises(DataError, match=message):
        build(tmp_path, tmp_path)


def test_a_link_in_a_zip_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "images_background.zip", "w") as archive:
        link = zipfile.ZipInfo("images_background/A/character01/0001_01.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(DataError, match=r"0001_01\.png' is a link"):
        build(tmp_path, tmp_path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compression_that_unfolds_without_a_limit_is_refused(tmp_path: Path, compression: int) -> None:
    with zipfile.ZipFile(tmp_path / "images_background.zip", "w", compression) as archive:
        archive.writestr("images_background/A/character01/0001_01.png", bytes(2**20))
    with pytest.raises(DataError, match="compressed in an unusual way"):
        build(tmp_path, tmp_path)


def test_a_zip_that_unpacks_to_more_than_its_limit_is_refused_unread(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "images_background.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(257):
            archive.writestr(f"images_background/A/character01/{number:04d}_01.png", bytes(2**20))
    assert (tmp_path / "images_background.zip").stat().st_size < 2**19
    with pytest.raises(DataError, match=r"unpacks to more than 256 MiB"):
        build(tmp_path, tmp_path)


def test_a_member_is_not_unpacked_beyond_the_size_that_it_claims(tmp_path: Path) -> None:
    """Both headers of the member say 10 bytes where 64 MiB come out."""
    path = tmp_path / "images_background.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images_background/A/character01/0001_01.png", bytes(2**26))
    size, less = (2**26).to_bytes(4, "little"), (10).to_bytes(4, "little")
    assert path.read_bytes().count(size) == 2
    path.write_bytes(path.read_bytes().replace(size, less))
    with contextlib.ExitStack() as stack:
        (read,) = omniglot._zip_files(path, omniglot.PARTS[0], stack).values()
        tracemalloc.start()
        stack.callback(tracemalloc.stop)
        with pytest.raises(DataError, match=r"damaged one .*Bad CRC-32"):
            read()
        assert tracemalloc.get_traced_memory()[1] < 2**20


@pytest.mark.parametrize("what", ["zip", "folder", "drawing", "alphabet"])
def test_a_link_out_of_the_folder_is_not_followed(zips: Path, tmp_path: Path, what: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    if what == "zip":
        (data / "images_background.zip").symlink_to(zips / "images_background.zip")
    elif what == "folder":
        (tmp_path / "images_background").mkdir()
        (data / "images_background").symlink_to(tmp_path / "images_background")
    elif what == "drawing":
        (data / "images_background" / "A" / "character01").mkdir(parents=True)
        (tmp_path / "secret").write_text("secret")
        (data / "images_background" / "A" / "character01" / "0001_01.png").symlink_to(tmp_path / "secret")
    else:
        (data / "images_background").mkdir()
        (data / "images_background" / "A").symlink_to(tmp_path)
    with pytest.raises(DataError, match=r"symbolic link|is no file, or a link to none"):
        build(data, tmp_path)


def test_what_is_no_file_or_too_large_for_a_drawing_is_refused_unread(tmp_path: Path) -> None:
    folder = tmp_path / "images_background" / "A" / "character01"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "0001_01.png")
    with pytest.raises(DataError, match=r"0001_01\.png is no file"):
        build(tmp_path, tmp_path)
    (folder / "0001_01.png").unlink()
    (folder / "0001_01.png").write_bytes(bytes(2**20 + 1))
    with pytest.raises(DataError, match="1048577 bytes; no drawing has more"):
        build(tmp_path, tmp_path)


def test_a_missing_drawing_is_noticed(tmp_path: Path) -> None:
    files = list(members("images_background", BACKGROUND))
    write_zip(tmp_path / "images_background.zip", iter(files[:-1]))
    write_zip(tmp_path / "images_evaluation.zip", iter([]))
    with pytest.raises(DataError, match=r"has 19 drawings of Tifinagh/character55, not 20"):
        build(tmp_path, tmp_path)


def test_a_broken_drawing_is_named(tmp_path: Path, zips: Path) -> None:
    files = dict(members("images_background", BACKGROUND))
    files[f"images_background/{BACKGROUND[0]}/0001_07.png"] = b"no picture"
    write_zip(tmp_path / "images_background.zip", iter(files.items()))
    shutil.copy(zips / "images_evaluation.zip", tmp_path)
    with pytest.raises(DataError, match=r"Alphabet_of_the_Magi/character01/0001_07.png cannot be read as a picture"):
        build(tmp_path, tmp_path)
    assert not (tmp_path / "s.arrow").exists()


# -------------------------------------------------------------------------------------------- download


class _Server(http.server.BaseHTTPRequestHandler):
    folder: Path

    def do_GET(self) -> None:
        path = self.folder / self.path.rpartition("/")[2]
        if not path.exists():
            self.send_error(404)
            return
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content) + (1000 if "/short/" in self.path else 0)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(zips: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a server of the zips; below /short it announces 1000 bytes more than it sends."""
    monkeypatch.setenv("no_proxy", "*")
    handler = type("Handler", (_Server,), {"folder": zips})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@pytest.mark.slow
def test_without_a_data_dir_the_zips_are_downloaded_once(
    server: str, store: ClassStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(omniglot, "BASE_URL", server)
    stores = tmp_path / "stores"
    built = ensure_store("omniglot", data_dir=None, image_size=8, color=False, stores_dir=stores)
    assert open_store(built).info == store.info
    downloads = sorted(path.name for path in (tmp_path / "downloads").iterdir())
    assert downloads == ["images_background.zip", "images_evaluation.zip"]
    # From here on every download fails.
    monkeypatch.setattr(omniglot, "BASE_URL", f"{server}/none")
    for part in omniglot.PARTS:
        assert omniglot._downloaded(part, tmp_path / "downloads").name in downloads


def test_a_download_is_the_file_of_the_server(server: str, zips: Path, tmp_path: Path) -> None:
    omniglot.download(f"{server}/images_evaluation.zip", tmp_path / "new" / "x.zip")
    assert (tmp_path / "new" / "x.zip").read_bytes() == (zips / "images_evaluation.zip").read_bytes()


@pytest.mark.parametrize(
    ("path", "message"),
    [("/none.zip", "404 Not Found"), ("/short/images_evaluation.zip", "the last 1000 bytes did not come")],
)
def test_a_download_that_fails_leaves_nothing(server: str, tmp_path: Path, path: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"cannot download {server}{path}: {message}.*--data-dir"):
        omniglot.download(f"{server}{path}", tmp_path / "x.zip")
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with http.server.HTTPServer(("127.0.0.1", 0), _Server) as closed:
        url = f"http://127.0.0.1:{closed.server_port}/x.zip"
    with pytest.raises(DataError, match="Connection refused"):
        omniglot.download(url, tmp_path / "x.zip")
    assert list(tmp_path.iterdir()) == []
