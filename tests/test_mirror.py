"""Runs whose folder is mirrored in storage: the same as on a shared disk, whoever looks, and whatever fails."""

import contextlib
import functools
import http.client
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from distmaml import checkpoint, driver, launch, loop, mirror, paths, preflight, ray_cluster
from distmaml.config import Config, override
from distmaml.errors import ConfigError, DistmamlError, RunError
from distmaml.mirror import Mirror
from distmaml.recorder import Recorder, save_now
from distmaml.segments import SegmentWriter, committed_step
from distmaml.worker import LocalWorker, Worker
from tests.conftest import StartJob
from tests.runs import Member, in_groups, waves
from tests.servers import s3_server
from tests.test_driver import artifacts, logged_steps, mlflow_runs, sinusoid
from tests.test_loop import crash_after, model_of, points_of, same_bits, state_after

SECRET = "not-to-be-shown"


class Gate(BaseHTTPRequestHandler):
    """Passes requests on to an S3 server, and refuses as many writes as it is told to."""

    server: "GateServer"
    protocol_version = "HTTP/1.1"  # clients ask before they send

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""

    def _body(self) -> bytes:
        """What was sent, in the pieces in which it came."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        while self.headers.get("Transfer-Encoding") == "chunked" and not body.endswith(b"\n0\r\n\r\n"):
            line = self.rfile.readline()
            body += line + self.rfile.read(int(line.partition(b";")[0], 16) + 2)
        return body

    def _pass(self) -> None:
        body = self._body()
        if self.command == "PUT" and self.server.refusals > 0:
            self.server.refusals -= 1
            status, headers, answer = 403, [], b""
        else:
            behind = http.client.HTTPConnection(self.server.behind)
            headers_in = {name: value for name, value in self.headers.items() if name != "Expect"}
            behind.request(self.command, self.path, body, headers_in)
            response = behind.getresponse()
            status, headers, answer = response.status, response.getheaders(), response.read()
            behind.close()
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in ("server", "date", "connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = {name.lower(): value for name, value in headers}.get("content-length", "0")
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


for _method in ("GET", "PUT", "POST", "DELETE", "HEAD"):
    setattr(Gate, f"do_{_method}", Gate._pass)


class GateServer(ThreadingHTTPServer):
    behind: str
    refusals = 0


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    """An S3 server on loopback, with a bucket named "bucket": host and port."""
    with s3_server() as server:
        client = http.client.HTTPConnection(server)
        client.request("PUT", "/bucket")
        assert client.getresponse().status == 200
        client.close()
        yield server


@pytest.fixture
def s3(moto: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The environment of a node that may use it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{moto}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    return moto


@pytest.fixture
def gate(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[GateServer]:
    """A server in front of it that can refuse."""
    server = GateServer(("127.0.0.1", 0), Gate)
    server.behind = s3
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.ray)])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URI of empty storage."""
    if request.param == "file":
        return (tmp_path / "storage of all").as_uri()
    request.getfixturevalue("s3")
    return f"s3://bucket/{tmp_path.parent.name}-{tmp_path.name}"


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long for storage."""
    monkeypatch.setattr(mirror, "PAUSES", (0.01, 0.02, 0.03))
    monkeypatch.setattr(mirror, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(mirror, "PROGRESS_SECONDS", 0.05)


def at(node: str, config: Config) -> Config:
    """The same run, seen from another node, whose output folder is another."""
    output = paths.output_dir(config.run.output_dir)
    return override(config, {"output_dir": output.parent / node})


@pytest.fixture
def straight(tmp_path: Path) -> Config:
    """A run on a shared disk, which has been trained."""
    config = waves(tmp_path / "shared", "wave")
    loop.train(config, LocalWorker())
    return config


# ------------------------------------------------------------------------------------------ as on a shared disk


@pytest.mark.usefixtures("hurried")
def test_a_run_through_storage_is_the_one_on_a_shared_disk_to_the_last_bit(
    storage: str, straight: Config, tmp_path: Path
) -> None:
    head = waves(tmp_path / "head", "wave", storage=storage)
    there = mirror.of(head)
    with there.followed():
        values = loop.train(at("node", head), LocalWorker())
        scores = loop.evaluate(at("another", head), LocalWorker())
        there.follow()
    there.pull(paths.model(paths.run_folder(head)))
    there.pull_newest()
    assert values["step"] == 20
    assert scores == loop.evaluate(straight, LocalWorker())
    assert same_bits(state_after(head), state_after(straight))
    assert same_bits(model_of(head)[0], model_of(straight)[0])
    found, expected = ([(p.step, no_speed(p.values)) for p in points_of(config)] for config in (head, straight))
    assert found == expected
    progress = json.loads(paths.progress(paths.run_folder(head)).read_text())
    assert progress["step"] == 20


def no_speed(values: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in values.items() if not key.startswith("system/")}


def train_on_its_own_disk(member: Member, config: Config) -> None:
    here = at(f"node-{member.rank}", config)
    loop.train(here, member)
    torch.save(loop.evaluate(here, member), paths.output_dir(here.run.output_dir) / "scores.pt")


@pytest.mark.slow
def test_three_nodes_that_share_no_disk_equal_one_to_the_last_bit(straight: Config, tmp_path: Path) -> None:
    """They go on from the checkpoint of a fourth."""
    config = waves(tmp_path / "fourth", "wave", storage=(tmp_path / "storage").as_uri())
    crash_after(1, config)
    in_groups(tmp_path / "processes", [3], train_on_its_own_disk, config)
    expected = loop.evaluate(straight, LocalWorker())
    for rank in range(3):
        assert torch.load(tmp_path / f"node-{rank}" / "scores.pt", weights_only=False) == expected
        assert same_bits(model_of(at(f"node-{rank}", config))[0], model_of(straight)[0])
    assert same_bits(state_after(at("node-0", config)), state_after(straight))
    assert checkpoint.steps(paths.checkpoints(paths.run_folder(at("node-1", config)))) == [5], "where it went on from"


def test_a_run_goes_on_from_storage_on_nodes_that_have_nothing_of_it(
    storage: str, straight: Config, tmp_path: Path
) -> None:
    first = waves(tmp_path / "first", "wave", storage=storage)
    crash_after(2, first)
    loop.train(at("second", first), LocalWorker())
    assert checkpoint.steps(paths.checkpoints(paths.run_folder(at("second", first)))) == [10, 15, 20]
    head = at("head", first)
    mirror.of(head).pull_run()
    assert same_bits(state_after(head), state_after(straight))
    assert [point.step for point in points_of(head) if "train/query_loss" in point.values] == list(range(1, 21))


def test_an_older_copy_and_another_run_of_the_name_mislead_nobody(
    storage: str, straight: Config, tmp_path: Path
) -> None:
    config = waves(tmp_path / "node", "wave", storage=storage)
    crash_after(1, config)
    shutil.copytree(tmp_path / "node", tmp_path / "stale")  # as after the first of its checkpoints
    loop.train(waves(tmp_path / "other", "wave", seed=7), LocalWorker())  # up to a later step than storage has
    crash_after(1, config)
    for node in ("stale", "other"):
        here = at(node, config)
        mirror.take_state(here, torch.device("cpu"))
        assert checkpoint.steps(paths.checkpoints(paths.run_folder(here)))[-1] == 10
        mirror.of(here).pull_run()
        assert [p.step for p in points_of(here) if "train/query_loss" in p.values] == list(range(1, 11))
    loop.train(at("other", config), LocalWorker())
    assert same_bits(state_after(at("other", config)), state_after(straight))


def test_a_damaged_checkpoint_in_storage_goes_back_to_the_one_before(
    storage: str, straight: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = waves(tmp_path / "node", "wave", storage=storage)
    crash_after(3, config)
    newest = checkpoint.path_of(paths.checkpoints(paths.run_folder(config)), 15)
    newest.write_bytes(newest.read_bytes()[:-100])
    mirror.of(config).push(newest)
    loop.train(at("fresh", config), LocalWorker())
    assert "Going back to the checkpoint of step 10: newer ones are damaged" in caplog.text
    assert same_bits(state_after(at("fresh", config)), state_after(straight))


# --------------------------------------------------------------------------------------- consistent at any moment


def test_whoever_looks_after_any_put_sees_a_consistent_run(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time into a folder of its own: what is committed has its points, and a checkpoint that is whole."""
    put = Mirror._put
    looks: list[tuple[str, int]] = []
    config = waves(tmp_path / "node", "wave", storage=storage, num_outer_steps=15)

    def watched(self: Mirror, name: str, data: bytes) -> None:
        put(self, name, data)
        seen = at(f"seen-{len(looks)}", config)
        mirror.of(seen).pull_run()
        folder = paths.run_folder(seen)
        committed = committed_step(paths.metrics(folder))
        looks.append((name, committed))
        assert (checkpoint.newest(paths.checkpoints(folder)) or 0) >= committed
        assert [p.step for p in points_of(seen) if "train/query_loss" in p.values] == list(range(1, committed + 1))

    monkeypatch.setattr(Mirror, "_put", watched)
    crash_after(2, config)
    loop.train(config, LocalWorker())
    assert [committed for name, committed in looks if name == "metrics/committed"] == [5, 10, 10, 15]
    assert {name.partition("/")[0] for name, _ in looks} == {
        *("metrics", "checkpoints", "model.safetensors", "progress.json"),
    }


def test_points_that_were_never_committed_count_nowhere(storage: str, tmp_path: Path) -> None:
    """A crash between segment and checkpoint; then the run goes on with checkpoints at other steps."""
    config = waves(tmp_path / "node", "wave", storage=storage)
    crash_after(1, config)
    folder = paths.run_folder(config)
    writer = SegmentWriter(paths.metrics(folder), 5)
    for step in range(6, 11):
        writer.put(step, {"train/query_loss": 99.0})
    writer.write(10)
    mirror.of(config).push(paths.metrics(folder) / "00000005-00000010.jsonl")
    loop.train(override(at("fresh", config), {"checkpoint_every": 4}), LocalWorker())
    head = at("head", config)
    mirror.of(head).pull_run()
    points = [p for p in points_of(head) if "train/query_loss" in p.values]
    assert [point.step for point in points] == list(range(1, 21))
    assert max(point.values["train/query_loss"] for point in points) < 99


def test_a_crash_between_checkpoint_and_marker_is_made_up_for(storage: str, tmp_path: Path) -> None:
    config = waves(tmp_path / "node", "wave", storage=storage)
    crash_after(2, config)
    marker = paths.metrics(paths.run_folder(config)) / "committed"
    marker.write_text("5\n")
    mirror.of(config).push(marker)
    loop.train(at("fresh", config), LocalWorker())
    head = at("head", config)
    mirror.of(head).pull_run()
    assert [p.step for p in points_of(head) if "train/query_loss" in p.values] == list(range(1, 21))


# ----------------------------------------------------------------------------------------------------- failures


@pytest.mark.ray
@pytest.mark.usefixtures("hurried")
def test_a_push_that_fails_twice_succeeds_at_the_third_try(gate: GateServer, tmp_path: Path) -> None:
    there = Mirror("s3://bucket/flaky", tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    gate.refusals = 2
    there.push(tmp_path / "run" / "config.json")
    assert gate.refusals == 0
    assert there.read(tmp_path / "run" / "config.json") == b"{}"
    gate.refusals = 4
    with pytest.raises(RunError, match=r"cannot write s3://bucket/flaky/runs/run: .*ACCESS_DENIED.*credentials"):
        there.push(tmp_path / "run" / "config.json")


class LosingWorker(LocalWorker):
    """A worker whose storage goes away after its first checkpoint."""

    def __init__(self, lose: Callable[[], None]) -> None:
        super().__init__()
        self._lose = lose

    def report(self, metrics: Mapping[str, float]) -> None:
        self._lose()


@pytest.mark.ray
@pytest.mark.usefixtures("hurried", "s3")
def test_storage_that_is_away_for_good_ends_the_run_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: GateServer
) -> None:
    config = waves(tmp_path / "node", "wave", storage="s3://bucket/gone")

    def lose() -> None:
        gate.refusals = 10**6

    with pytest.raises(RunError, match=r"cannot write s3://bucket/gone/runs/wave: .*--storage takes") as caught:
        loop.train(config, LosingWorker(lose))
    assert len(str(caught.value).splitlines()) == 1
    gate.refusals = 0
    head = at("head", config)
    mirror.of(head).pull_run()
    assert checkpoint.newest(paths.checkpoints(paths.run_folder(head))) == 5


@contextmanager
def deaf_server() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(50)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.ray
@pytest.mark.parametrize("case", ["no bucket", "no server", "deaf server", "no such scheme", "a file"])
def test_storage_that_cannot_be_used_is_named_before_a_cluster_starts(
    case: str, s3: str, output_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "connect", lambda *_, **__: pytest.fail("a cluster was started"))
    (tmp_path / "file").touch()
    uri, reason = {
        "no bucket": ("s3://buckett/runs", "NO_SUCH_BUCKET"),
        "no server": ("s3://bucket/runs", "NETWORK_CONNECTION"),
        "deaf server": ("s3://bucket/runs", "NETWORK_CONNECTION"),
        "no such scheme": ("gopher://bucket/runs", "Unrecognized filesystem type"),
        "a file": ((tmp_path / "file").as_uri(), "Not a directory"),
    }[case]
    with contextlib.ExitStack() as stack:
        if case == "no server":
            monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        if case == "deaf server":
            monkeypatch.setenv("AWS_ENDPOINT_URL", stack.enter_context(deaf_server()))
        begun = time.monotonic()
        with pytest.raises(
            RunError, match=rf"cannot (open|read|write) {uri}/runs/sine: .*{reason}.*--storage takes"
        ) as caught:
            driver.train(sinusoid(output_dir, storage=uri))
    assert time.monotonic() - begun < 15
    assert SECRET not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not mlflow_runs(output_dir)


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        (f"s3://key:{SECRET}@bucket/x", "storage is a URI that holds a key.*AWS_ACCESS_KEY_ID"),
        ("bucket/x", "storage='bucket/x' must be a URI, like s3://bucket/prefix"),
        ("", "storage='' must be a URI"),
    ],
)
def test_a_storage_that_no_run_may_have_is_refused(output_dir: Path, storage: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        driver.train(sinusoid(output_dir, storage=storage))
    assert SECRET not in str(caught.value)
    with pytest.raises(ConfigError, match=message):
        preflight.settings_of("sine", output_dir, storage)


def test_an_error_does_not_show_the_secrets_of_a_uri(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot open gopher://host/x/runs/run") as caught:
        Mirror(f"gopher://key:{SECRET}@host/x?token={SECRET}", tmp_path / "run")
    assert SECRET not in str(caught.value)


def test_a_run_without_storage_has_a_mirror_that_does_nothing(tmp_path: Path) -> None:
    config = waves(tmp_path / "node", "wave")
    there = mirror.of(config)
    there.check()
    there.push(tmp_path / "nowhere")
    there.pull(tmp_path / "nowhere")
    there.settle()
    there.follow()
    assert there.read(tmp_path / "nowhere") is None
    assert not there.has_lately(tmp_path / "nowhere")
    assert not (tmp_path / "node").exists()


# ---------------------------------------------------------------------------------------------- the stop request


@pytest.mark.usefixtures("hurried")
def test_a_checkpoint_can_be_asked_for_from_another_node(storage: str, tmp_path: Path) -> None:
    head = waves(tmp_path / "head", "wave", storage=storage)
    paths.run_folder(head).mkdir(parents=True)
    recorder = Recorder(at("node", head), 0, shapes={"input_shape": [1], "num_outputs": 1})
    asking = threading.Thread(target=functools.partial(save_now, paths.run_folder(head), storage=storage, seconds=60))
    asking.start()
    while not recorder.asked_to_save():
        assert asking.is_alive()
        time.sleep(0.01)
    recorder.points(3, {"train/query_loss": 1.0})
    recorder.checkpoint(3, {"x": torch.zeros(1)}, {"best": None, "stale": 0})
    asking.join()
    assert not paths.save_request(paths.run_folder(head)).exists()
    assert not mirror.of(head).has(paths.save_request(paths.run_folder(head)))
    assert mirror.of(head).checkpoints() == [3]


# ----------------------------------------------------------------------------------------------------- the driver


@pytest.fixture
def on_a_node(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The one worker of a run runs in this process, and its node has an output folder of its own."""
    nodes: list[str] = []

    @contextmanager
    def connect(address: str | None, *, num_cpus: int, environment: object) -> Iterator[Mapping[str, float]]:
        yield {"CPU": float(num_cpus)}

    def fit(function: Callable[[Config, Worker], Any], config: Config, **_: Any) -> Any:
        nodes.append(f"node-{len(nodes)}")
        return function(at(nodes[-1], config) if config.run.storage else config, LocalWorker())

    monkeypatch.setattr(ray_cluster, "connect", connect)
    monkeypatch.setattr(launch, "fit", fit)
    return nodes


def fresh(prepared: Path, folder: Path) -> Path:
    """The output folder of a machine that has never seen the run."""
    return Path(shutil.copytree(prepared, folder))


@pytest.mark.usefixtures("on_a_node", "hurried")
@pytest.mark.slow
def test_a_run_is_tracked_from_storage_and_goes_on_from_another_head(
    storage: str, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = fresh(prepared, tmp_path / "first"), fresh(prepared, tmp_path / "second")
    config = sinusoid(first, storage=storage, num_outer_steps=6)

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", stop)
        with pytest.raises(KeyboardInterrupt):
            driver.train(config)
    assert [run.info.status for run in mlflow_runs(first)] == ["KILLED"]
    (run,) = mlflow_runs(first)
    assert logged_steps(first, run, "train/query_loss") == [1, 2, 3, 4, 5, 6]
    assert "the same command with --name sine goes on" in capsys.readouterr().err

    shutil.rmtree(first / "runs")
    outcome = driver.train(override(config, {"output_dir": second}))  # the same command, elsewhere
    assert "sine was stopped after 6 outer steps: it goes on" in capsys.readouterr().err
    assert outcome.scores is not None
    (again,) = mlflow_runs(second)
    assert again.info.status == "FINISHED"
    assert again.data.tags["distmaml.run_uid"] == run.data.tags["distmaml.run_uid"]
    assert logged_steps(second, again, "train/query_loss") == [1, 2, 3, 4, 5, 6]
    assert "model/model.safetensors" in artifacts(second, again)

    third = fresh(prepared, tmp_path / "third")
    with pytest.raises(RunError, match="finished its 6 outer steps"):
        driver.train(override(config, {"output_dir": third, "resume": True}))
    driver.train(override(config, {"output_dir": third, "resume": True, "num_outer_steps": 8}))
    (longer,) = mlflow_runs(third)
    assert logged_steps(third, longer, "train/query_loss") == list(range(1, 9))
    straight = driver.train(sinusoid(first, name="straight", num_outer_steps=8))
    ours, theirs = (checkpoint.load(paths.model(folder))[0] for folder in (third / "runs" / "sine", straight.folder))
    assert same_bits(ours, theirs)


@pytest.mark.usefixtures("on_a_node", "hurried")
def test_an_evaluation_needs_nothing_but_storage(storage: str, prepared: Path, tmp_path: Path) -> None:
    config = sinusoid(fresh(prepared, tmp_path / "first"), storage=storage)
    scores = driver.train(config).scores
    elsewhere = fresh(prepared, tmp_path / "elsewhere")
    with pytest.raises(RunError, match=r"there is no run .*/runs/cosine"):
        preflight.settings_of("cosine", elsewhere, storage)
    settings = override(preflight.settings_of("sine", elsewhere, storage), {"output_dir": elsewhere})
    found, files = driver.evaluate(settings, split="test", step=None)
    assert found.scores == scores
    assert files[0].is_relative_to(elsewhere)
    (run,) = mlflow_runs(elsewhere)
    assert logged_steps(elsewhere, run, "evaluation_test/query_loss") == [found.step]
    assert driver.evaluate(settings, split="test", step=2)[0].step == 2
    with pytest.raises(ConfigError, match=r"step=77 has no checkpoint; there are those of 2, 4\."):
        driver.evaluate(settings, split="test", step=77)
    assert mirror.of(config).has(paths.run_folder(config) / files[0].name)
    with pytest.raises(RunError, match=r"'sine' lies in .*may be an old one\. Add --storage"):
        driver.train(override(config, {"storage": None, "resume": True, "num_outer_steps": 6}))


@pytest.mark.usefixtures("on_a_node", "hurried")
def test_a_false_start_in_storage_is_cleared_away(storage: str, prepared: Path, tmp_path: Path) -> None:
    first, second = fresh(prepared, tmp_path / "first"), fresh(prepared, tmp_path / "second")
    with pytest.raises(DistmamlError, match="no longer finite"):
        driver.train(sinusoid(first, storage=storage, outer_lr=1e30))
    driver.train(sinusoid(second, storage=storage))
    (run,) = mlflow_runs(second)
    assert (run.info.status, run.data.params["outer_lr"]) == ("FINISHED", "0.001")


@pytest.mark.usefixtures("on_a_node", "hurried")
def test_another_run_in_the_folder_is_not_lost(storage: str, output_dir: Path, tmp_path: Path, prepared: Path) -> None:
    here = driver.train(sinusoid(output_dir))
    with pytest.raises(RunError, match=r"holds a run that is not the one in .*would be lost.*--name"):
        driver.train(sinusoid(output_dir, storage=storage, resume=True))
    driver.train(sinusoid(fresh(prepared, tmp_path / "first"), storage=storage))
    with pytest.raises(RunError, match=r"holds a run that is not the one in .*would be lost"):
        driver.train(sinusoid(output_dir, storage=storage, resume=True, num_outer_steps=6))
    assert checkpoint.steps(paths.checkpoints(here.folder)) == [2, 4]


@pytest.mark.usefixtures("on_a_node", "hurried")
def test_a_worker_sees_in_storage_whether_the_run_is_its_own(storage: str, output_dir: Path) -> None:
    config = sinusoid(output_dir, storage=storage)
    with pytest.raises(RunError, match=r"does not see the run in .*Its storage is .*/runs/sine"):
        driver.train_and_test(config, LocalWorker())
    driver.train(config)
    with pytest.raises(RunError, match=r"has another run of that name in .*another command may use it"):
        driver.train_and_test(override(config, {"seed": 5}), LocalWorker())


# ------------------------------------------------------------------------------------------------------- with Ray


@pytest.mark.ray
def test_a_job_on_ray_trains_into_s3_and_another_goes_on_from_there(
    start_job: StartJob, s3: str, prepared: Path, tmp_path: Path
) -> None:
    storage = f"s3://bucket/{tmp_path.name}"
    options = (
        f"--storage {storage} --name wave --num-workers 2 --meta-batch-size 4 --reduction-chunk 2 --val-every 20 "
        "--num-val-episodes 4 --num-test-episodes 4 --checkpoint-every 10 --log-every 5 --num-eval-steps 1"
    ).split()
    first, second = fresh(prepared, tmp_path / "first"), fresh(prepared, tmp_path / "second")
    job = start_job(
        "train", "sinusoid-maml-5s", *options, "--output-dir", str(first), "--num-outer-steps", "20", folder=tmp_path
    )
    assert job.wait() == 0, job.output
    assert f"the run lies in {storage}/runs/wave" in job.output
    assert "step 20/20" in job.output
    found = Mirror(storage, tmp_path / "looked" / "wave")
    found.pull_run()
    kept = {str(path.relative_to(tmp_path / "looked" / "wave")) for path in (tmp_path / "looked").rglob("*.*")}
    assert {
        *("config.json", "model.safetensors", "evaluation-test.json", "tracking/run.json", "tracking/outbox.jsonl"),
        *("tracking/sent.json", "checkpoints/00000020.safetensors", "artifacts/learning_curve.png"),
        *("metrics/00000000-00000010.jsonl", "metrics/00000010-00000020.jsonl"),
    } <= kept
    assert found.checkpoints() == [10, 20]
    (run,) = mlflow_runs(first)
    assert logged_steps(first, run, "train/query_loss") == [5, 10, 15, 20]

    more = ["--output-dir", str(second), "--num-outer-steps", "30", "--resume"]
    job = start_job("train", "sinusoid-maml-5s", *options, *more, folder=tmp_path)
    assert job.wait() == 0, job.output
    (run,) = mlflow_runs(second)
    assert run.info.status == "FINISHED"
    assert logged_steps(second, run, "train/query_loss") == [5, 10, 15, 20, 25, 30]
    assert found.checkpoints() == [10, 20, 30]
    assert SECRET not in job.output
