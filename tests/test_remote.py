"""Stores on other machines: one copy on this one."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pytest

from distmaml.errors import DataError, RunError
from distmaml.store import open_store
from tests.servers import s3_server
from tests.test_store import write


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "distmaml"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write(tmp_path / "far" / "store.arrow")
    return tmp_path / "far" / "store.arrow"


def test_a_uri_is_copied_once_and_again_when_it_changes(path: Path, cache: Path) -> None:
    first = open_store(path.as_uri())
    np.testing.assert_array_equal(first.images, open_store(path).images)
    (copy,) = cache.glob("*.arrow")
    changed = copy.stat().st_mtime_ns
    open_store(path.as_uri())
    assert [entry.stat().st_mtime_ns for entry in cache.glob("*.arrow")] == [changed]
    write(path, ink=False)
    assert not open_store(path.as_uri()).info.ink
    assert len(list(cache.glob("*.arrow"))) == 2
    assert list(cache.glob("*.part")) == []


def test_processes_that_open_a_uri_together_make_one_copy(path: Path, cache: Path) -> None:
    code = "import sys; from distmaml.store import open_store; open_store(sys.argv[1]).verify()"
    processes = [subprocess.Popen([sys.executable, "-c", code, path.as_uri()]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert len(list(cache.glob("*.arrow"))) == 1


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("mock:///none.arrow", "no store at mock:///none.arrow"),
        ("gopher://host/x", "cannot read gopher://host/x: Unrecognized filesystem type"),
    ],
)
def test_a_uri_without_a_store_is_named(uri: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_store(uri)


def test_an_error_does_not_show_the_secrets_of_a_uri() -> None:
    with pytest.raises(DataError) as caught:
        open_store("gopher://key:secret@host/x?token=secret")
    assert "gopher://host/x" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_cache_that_cannot_be_written_is_named(path: Path, cache: Path) -> None:
    cache.parent.touch()
    with pytest.raises(RunError, match=r"cannot write .*cache"):
        open_store(path.as_uri())


# ----------------------------------------------------------------------------------------------------- S3


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The host and port of an S3 server on loopback."""
    with s3_server() as server:
        yield server


@pytest.mark.ray
def test_a_store_is_read_from_s3(s3: str, path: Path, cache: Path) -> None:
    options = f"scheme=http&endpoint_override={quote(s3)}&allow_bucket_creation=true"
    bucket, _ = pa.fs.FileSystem.from_uri(f"s3://key:secret@bucket?{options}")
    bucket.create_dir("bucket")
    with bucket.open_output_stream("bucket/stores/store.arrow") as stream:
        stream.write(path.read_bytes())
    store = open_store(f"s3://key:secret@bucket/stores/store.arrow?{options}")
    store.verify()
    np.testing.assert_array_equal(store.images, open_store(path).images)
    assert len(list(cache.glob("*.arrow"))) == 1
    with pytest.raises(DataError, match=r"no store at s3://bucket/stores/none\.arrow\."):
        open_store(f"s3://key:secret@bucket/stores/none.arrow?{options}")
