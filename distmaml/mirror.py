"""The mirror of a run's folder at STORAGE/runs/NAME, for nodes that share no disk.

Each node then has a folder of its own. Storage is the truth: whoever starts takes from there what it needs, and what
storage does not have does not count. Objects are whole or not at all, and come in an order in which everybody sees a
consistent run at any moment: a metric segment, its checkpoint, and after them the marker that commits both.

A run without storage has a mirror that does nothing: its folder is on a disk that all nodes share.
"""

import contextlib
import copy
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

import pyarrow as pa
import pyarrow.fs
import torch

from distmaml import checkpoint, collectives, paths
from distmaml.config import Config
from distmaml.errors import DamagedError, DistmamlError, RunError, first_line
from distmaml.files import atomic_file, disk_errors
from distmaml.segments import committed_step

PAUSES = (1.0, 5.0, 20.0)
"""Seconds before each further try at what a run cannot go on without."""
LOOK_SECONDS = 2.0
PROGRESS_SECONDS = 5.0
_TRACKING = ("tracking/run.json", "tracking/outbox.jsonl", "tracking/refused.jsonl", "tracking/sent.json")
"""In this order: that MLflow has been told something never goes before what it is to be told."""
_OF_THE_DRIVER = ("config.json", "store", *_TRACKING, "evaluation-*", "artifacts/*")
_SEGMENT = re.compile(r"metrics/\d+-(\d+)\.jsonl")

ResultT = TypeVar("ResultT")


class Mirror:
    """Storage, seen from one node. Files are named by their paths on this node.

    Args:
      uri: STORAGE, of any Arrow file system; None for a run that has none, whose mirror does nothing.
      folder: the run's folder on this node; its last part is the run's name.

    Raises:
      RunError: of the methods too: storage cannot be used, though they have tried several times.
    """

    def __init__(self, uri: str | None, folder: Path) -> None:
        self.uri, self.shown, self._folder = uri, "", folder
        self._pauses: tuple[float, ...] = ()
        self._aside = ThreadPoolExecutor(1)  # a thread only once there is work for it
        self._look: Future[bool] | None = None
        self._telling: Future[None] | None = None
        self._look_at = self._tell_at = 0.0
        self._committed, self._progress = paths.metrics(folder) / "committed", paths.progress(folder)
        self._seen: bytes | None = None
        self._following = threading.Lock()
        if uri is not None:
            self.shown = f"{re.sub('//[^/]*@', '//', uri.partition('?')[0]).rstrip('/')}/runs/{folder.name}"
            self._filesystem, base = self._tried("open", _opened, uri)
            self._base = f"{base.rstrip('/')}/runs/{folder.name}"
        self._pauses = PAUSES

    def hasty(self) -> "Mirror":
        """The same, but each thing is tried once: for what may fail."""
        hasty = copy.copy(self)
        hasty._pauses = ()
        return hasty

    def push(self, *files: Path) -> None:
        """Puts files there, in this order; returns when all are there."""
        for file in files if self.uri else ():
            self._tried("write", self._put, self._name(file), file.read_bytes())

    def delete(self, *files: Path) -> None:
        """Removes files there, where they exist."""
        self._look = None  # what it sees may be from before
        for file in files if self.uri else ():
            self._tried("write", self._remove, self._name(file))

    def pull(self, *files: Path) -> None:
        """Makes files of this node what they are there; one that does not exist there is removed."""
        for file in files if self.uri else ():
            self._fetch(self._name(file))

    def read(self, file: Path) -> bytes | None:
        """What a file holds there; None where it does not exist."""
        return self._tried("read", self._get, self._name(file)) if self.uri else None

    def has(self, file: Path) -> bool:
        """Whether a file exists there; true of a run without storage."""
        return not self.uri or self._tried("read", self._info, self._name(file)).type == pa.fs.FileType.File

    def checkpoints(self) -> list[int]:
        """The steps of the run's checkpoints, ascending."""
        if not self.uri:
            return checkpoint.steps(paths.checkpoints(self._folder))
        found = [Path(name) for name in self._names() if name.startswith("checkpoints/")]
        return sorted(int(path.stem) for path in found if path.suffix == ".safetensors" and path.stem.isdecimal())

    def pull_newest(self) -> None:
        """Takes the newest whole checkpoint, and the damaged ones after it; removes here what does not exist there."""
        if not self.uri:
            return
        folder, steps = paths.checkpoints(self._folder), self.checkpoints()
        for step in {*checkpoint.steps(folder)} - {*steps}:
            checkpoint.path_of(folder, step).unlink(missing_ok=True)
        for step in reversed(steps):
            self.pull(checkpoint.path_of(folder, step))
            with contextlib.suppress(DamagedError):
                checkpoint.load(checkpoint.path_of(folder, step))
                return

    # --------------------------------------------------------------------------------------------- rank 0

    def settle(self) -> None:
        """Repeats there what a `SegmentWriter` that opens has settled here: which points count."""
        if self.uri:
            committed = committed_step(paths.metrics(self._folder))
            self.delete(*(self._folder / name for name in self._names() if _end_of(name) > committed))
            self.push(*self._committed.parent.glob(self._committed.name))

    def push_sometimes(self, file: Path) -> None:
        """Puts a file there every 5 s at most, without waiting, and without a word where that fails."""
        if self.uri and _is_idle(self._telling) and time.monotonic() >= self._tell_at:
            self._tell_at = time.monotonic() + PROGRESS_SECONDS
            self._telling = self._aside.submit(self.hasty().push, file)

    def has_lately(self, file: Path) -> bool:
        """Whether a file existed there a moment ago: looks every 2 s, without waiting."""
        if not self.uri:
            return False
        look = self._look
        if _is_idle(look) and time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + LOOK_SECONDS
            self._look = self._aside.submit(self.hasty().has, file)
        return look is not None and look.done() and look.exception() is None and look.result()

    # --------------------------------------------------------------------------------------------- driver

    def check(self) -> None:
        """Refuses storage that cannot be written: puts an object there, and removes it."""
        if self.uri:
            self._tried("read", self._info, ".probe")  # a server that does not answer shows soonest here
            self._tried("write", self._put, ".probe", b"distmaml")
            self._tried("write", self._remove, ".probe")

    def pull_run(self) -> None:
        """Makes the folder what it is there, without the checkpoints before the newest whole one."""
        committed = self.read(self._committed)  # before the names: what it promises is among them, whatever comes
        found = self._names()
        for file in [file for file in self._folder.rglob("*") if file.is_file()]:
            if self._name(file) not in found and file.name != "lock":
                file.unlink()
        passing = (self._name(file) for file in (self._committed, self._progress, paths.save_request(self._folder)))
        wanted = [name for name in {*found} - {*passing} if not name.startswith("checkpoints/")]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda name: self._fetch(name, found[name]), wanted))
        self.pull_newest()
        self._write(self._committed, committed)

    def clear(self) -> None:
        """Removes the run there."""
        if self.uri:
            self.delete(*(self._folder / name for name in self._names()))

    def follow(self) -> None:
        """Takes the points that were committed since, and how far the run is.

        It leaves alone what is here already: rank 0 may be on this node, and write in the same folder.
        """
        if not self.uri:
            return
        with self._following:  # what one has read must not be written after what another has read later
            text = self.read(self._committed) or b""
            committed = int(text) if text.strip().isdigit() else -1
            if committed > committed_step(self._committed.parent):
                for name, info in self._names().items():
                    if 0 <= _end_of(name) <= committed and not (self._folder / name).exists():
                        self._fetch(name, info)
                self._write(self._committed, text)
            progress = self.read(self._progress)
            if progress is not None and progress != self._seen:
                self._seen = progress
                self._write(self._progress, progress)

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """A block in which a thread follows the run every 2 s. Where the block ends well it has done so itself."""
        if not self.uri:
            yield
            return
        end, hasty = threading.Event(), self.hasty()

        def watch() -> None:
            while not end.wait(LOOK_SECONDS):
                with contextlib.suppress(DistmamlError, OSError):  # the next time, or at the end
                    hasty.follow()

        thread = threading.Thread(target=watch, name="mirror", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            with contextlib.suppress(DistmamlError, OSError):  # which would hide why
                hasty.follow()
            raise
        finally:
            end.set()
            thread.join()

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """A block before and after which all that the driver writes is put there."""
        self.push_own()
        try:
            yield
        except BaseException:
            with contextlib.suppress(DistmamlError, OSError):
                self.hasty().push_own()
            raise
        self.push_own()

    def pull_tracking(self) -> None:
        """Takes what MLflow is to be told of the run, and has been told."""
        self.pull(*(self._folder / name for name in _TRACKING))

    def push_own(self) -> None:
        """Puts all there that the driver writes."""
        for pattern in _OF_THE_DRIVER if self.uri else ():
            self.push(*sorted(self._folder.glob(pattern)))

    # ------------------------------------------------------------------------------------------- one object

    def _name(self, file: Path) -> str:
        return file.relative_to(self._folder).as_posix()

    def _names(self) -> dict[str, Any]:
        """All files of the run there, with what is known of each."""
        selector = pa.fs.FileSelector(self._base, allow_not_found=True, recursive=True)
        found = self._tried("read", self._filesystem.get_file_info, selector)
        names = {info.path.removeprefix(f"{self._base}/"): info for info in found if info.type == pa.fs.FileType.File}
        # Hidden are files on their way, and what would lie outside of the run's folder.
        return {name: info for name, info in names.items() if not re.search(r"(^|/)\.", name)}

    def _info(self, name: str) -> Any:
        return self._filesystem.get_file_info(f"{self._base}/{name}")

    def _put(self, name: str, data: bytes) -> None:
        path = f"{self._base}/{name}"
        if self._filesystem.type_name == "local":
            with atomic_file(Path(path)) as file:
                file.write(data)
        else:
            with self._filesystem.open_output_stream(path, compression=None) as stream:
                stream.write(data)  # at once: a piece that failed must not leave an object of the others

    def _get(self, name: str) -> bytes | None:
        while True:
            try:
                with self._filesystem.open_input_file(f"{self._base}/{name}") as stream:
                    data: bytes = stream.read()
            except FileNotFoundError:
                return None
            if self._info(name).size == len(data):  # otherwise it was replaced meanwhile, and this is half of it
                return data

    def _remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._filesystem.delete_file(f"{self._base}/{name}")

    def _fetch(self, name: str, info: Any = None) -> None:
        """Takes a file; a segment, which nobody changes, only where this node's is another one."""
        file = self._folder / name
        second = None if info is None or _end_of(name) < 0 else info.mtime_ns // 10**9
        if second is not None and file.exists():
            here = file.stat()
            if (here.st_size, here.st_mtime_ns // 10**9) == (info.size, second):
                return
        self._write(file, self._tried("read", self._get, name))
        if second is not None:
            os.utime(file, (second, second))

    def _write(self, file: Path, data: bytes | None) -> None:
        if data is None:
            file.unlink(missing_ok=True)
            return
        with disk_errors(file), atomic_file(file) as part:
            part.write(data)

    def _tried(self, verb: str, action: Callable[..., ResultT], *arguments: Any) -> ResultT:
        pauses = iter(self._pauses)
        while True:
            try:
                return action(*arguments)
            except (OSError, pa.ArrowException) as error:
                pause = next(pauses, None)
                if pause is None:
                    reason = first_line(error).replace(self.uri or "", self.shown)[:300]
                    raise RunError(
                        f"cannot {verb} {self.shown}: {reason}. --storage takes s3://, gs:// or file:/// with a bucket "
                        "or folder that exists and may be written; credentials come from the environment of each node "
                        "(AWS_ACCESS_KEY_ID and its like), the server of an S3 of one's own from AWS_ENDPOINT_URL."
                    ) from error
                time.sleep(pause)


def of(config: Config) -> Mirror:
    """The mirror of a run; one that does nothing where it has no storage."""
    return Mirror(config.run.storage, paths.run_folder(config))


def take_state(config: Config, device: torch.device) -> None:
    """Takes, in each worker, what training goes on from; returns when all have it, as rank 0 will go on writing."""
    mirror = of(config)
    if mirror.uri:
        folder = paths.run_folder(config)
        mirror.pull(paths.pinned_store(folder), paths.metrics(folder) / "committed")
        mirror.pull_newest()
        collectives.all_reduce(torch.zeros(1, device=device))  # unlike a broadcast, over for nobody before all are here


def take_file(config: Config, file: Path) -> Path:
    """Takes a file of the run, in a worker that is to evaluate it; the same file."""
    of(config).pull(paths.pinned_store(paths.run_folder(config)), file)
    return file


def _opened(uri: str) -> tuple[Any, str]:
    """The file system of a URI, with the patience of seconds, and the path in it."""
    address = urlsplit(uri)
    asked = dict(parse_qsl(address.query))
    if address.scheme in ("gs", "gcs") and "retry_limit_seconds" not in asked:
        uri += f"{'&' if address.query else '?'}retry_limit_seconds=5"  # not 15 minutes
    filesystem, base = pa.fs.FileSystem.from_uri(uri)
    if filesystem.type_name == "s3":  # whose own patience with a server that does not answer is 100 s
        url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
        scheme, _, host = url.rstrip("/").rpartition("://")
        filesystem = pa.fs.S3FileSystem(
            region=filesystem.region,
            scheme=asked.get("scheme") or scheme or "https",
            endpoint_override=asked.get("endpoint_override") or host or None,
            tls_ca_file_path=asked.get("tls_ca_file_path"),
            retry_strategy=pa.fs.AwsStandardS3RetryStrategy(max_attempts=2),
            allow_delayed_open=True,  # a small object is one request, not three
        )
    return filesystem, base


def _end_of(name: str) -> int:
    """The last step of a segment; -1 for any other file."""
    match = _SEGMENT.fullmatch(name)
    return int(match[1]) if match else -1


def _is_idle(work: Future[Any] | None) -> bool:
    return work is None or work.done()
