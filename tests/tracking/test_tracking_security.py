"""A server with logins over PostgreSQL: who gets in, what it costs, and that no secret is to be read anywhere."""

import base64
import contextlib
import json
import logging
import os
import secrets
import statistics
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric
from werkzeug.security import check_password_hash, generate_password_hash

from distmaml import driver, ray_cluster
from distmaml.config import override
from distmaml.errors import TrackingError
from distmaml.recipes.sinusoid import sinusoid_maml_5s
from distmaml.tracking.database import experiment_id, open_tracking
from distmaml.tracking.outbox import Outbox
from distmaml.tracking.runs import TrackedRun, sweep
from tests.conftest import StartJob
from tests.servers import Postgres, Server

pytestmark = pytest.mark.ray

NUM_BATCHES, MOST_ROUNDS, NUM_METRICS = 50, 10, 10


class Guarded(NamedTuple):
    """A server that wants logins, and knows two users."""

    server: Server
    passwords: dict[str, str]
    secrets: dict[str, str]
    """What nobody may read anywhere, by what it is."""
    logs: tuple[Path, Path]
    """Of the server and of its database."""

    def request(
        self, path: str, content: Mapping[str, Any] | None = None, *, login: tuple[str, str] | None, host: str = ""
    ) -> int:
        """The status of an answer, asked by hand: what anybody could send."""
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(f"{self.server.uri}{path}", data, {"Content-Type": "application/json"})
        if login is not None:
            request.add_header("Authorization", f"Basic {base64.b64encode(':'.join(login).encode()).decode()}")
        if host:
            request.add_header("Host", host)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code

    def login(self, user: str) -> tuple[str, str]:
        return user, self.passwords[user]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    passwords = {user: f"{user}-{secrets.token_hex(12)}" for user in ("admin", "alice", "bob")}
    postgres = Postgres(folder)
    server = Server(folder, backend=postgres.uri, admin_password=passwords["admin"])
    kept = {
        "the password of the database": postgres.password,
        "the key of the server's sessions": server.secrets[-1],
        "the token of Ray": os.environ["RAY_AUTH_TOKEN"],
        **{f"the password of {user}": password for user, password in passwords.items()},
        **{
            f"the header of {user}": base64.b64encode(f"{user}:{password}".encode()).decode()
            for user, password in passwords.items()
        },
    }
    found = Guarded(server, passwords, kept, (server.log, postgres.log))
    try:
        postgres.start()
        server.start()
        for user in ("alice", "bob"):
            new = {"username": user, "password": passwords[user]}
            assert found.request("/api/2.0/mlflow/users/create", new, login=found.login("admin")) == 200
        yield found
    finally:
        server.stop()
        postgres.stop()


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody is logged in, and no login lies in the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)


def log_in(patch: pytest.MonkeyPatch, user: str, password: str | None) -> None:
    patch.setenv("MLFLOW_TRACKING_USERNAME", user)
    if password is None:
        patch.delenv("MLFLOW_TRACKING_PASSWORD", raising=False)
    else:
        patch.setenv("MLFLOW_TRACKING_PASSWORD", password)


def start(folder: Path, uri: str, experiment: str) -> TrackedRun:
    return TrackedRun.start(
        folder, tracking=open_tracking(folder.parent, uri), experiment=experiment, name=folder.name,
        params={"inner_lr": 0.1}, tags={}, poll_seconds=0.1,
    )  # fmt: skip


@pytest.fixture
def alices(guarded: Guarded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The id of an experiment of alice's, one for each test, which has a run whose driver is gone."""
    log_in(monkeypatch, *guarded.login("alice"))
    tracking = open_tracking(tmp_path, guarded.server.uri)
    found = experiment_id(tracking, tracking.client(), f"alices {tmp_path.name}")
    leave_dead_run(tracking.client(), found)
    return found


def leave_dead_run(client: MlflowClient, experiment: str) -> str:
    tags = {"distmaml.run_uid": "0", "distmaml.host": "elsewhere", "distmaml.heartbeat": "0"}
    return str(client.create_run(experiment, tags=tags).info.run_id)


# ------------------------------------------------------------------------------------------- who gets in


@pytest.mark.parametrize("path", ["/", "/version", "/graphql", "/api/2.0/mlflow/experiments/search?max_results=1"])
def test_without_a_login_nothing_is_told(guarded: Guarded, path: str) -> None:
    assert guarded.request(path, login=None) == 401
    assert guarded.request(path, login=("alice", "not her password")) == 401


def test_a_foreign_host_name_is_refused_even_with_a_login(guarded: Guarded) -> None:
    path = "/api/2.0/mlflow/experiments/search?max_results=1"
    assert guarded.request(path, login=guarded.login("alice")) == 200
    for host in ("evil.example", "10.evil.example", f"evil.example:{guarded.server.port}"):
        assert guarded.request(path, login=guarded.login("alice"), host=host) == 403


def test_another_user_s_experiment_is_forbidden(guarded: Guarded, alices: str) -> None:
    path = f"/api/2.0/mlflow/experiments/get?experiment_id={alices}"
    assert guarded.request(path, login=guarded.login("alice")) == 200
    assert guarded.request(path, login=guarded.login("bob")) == 403


def test_a_login_in_the_environment_is_all_that_a_run_needs(
    guarded: Guarded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(monkeypatch, *guarded.login("alice"))
    run = start(tmp_path / "run", guarded.server.uri, "waves of alice")
    (tmp_path / "run" / "table.json").write_text("{}")
    run.add_metrics(1, {"best/query_loss": 0.25})
    run.add_artifact(tmp_path / "run" / "table.json", "tables")
    assert run.end("FINISHED", timeout=30)
    client = open_tracking(tmp_path, guarded.server.uri).client()
    assert client.get_run(run.run_id).data.metrics == {"best/query_loss": 0.25}
    assert [file.path for file in client.list_artifacts(run.run_id, "tables")] == ["tables/table.json"]


# ------------------------------------------------------------------------------------ what the others are told


@pytest.mark.parametrize(
    ("user", "password", "named"),
    [
        (None, None, "none will not do"),
        ("alice", None, "none will"),
        ("alice", "wrong-1234", "of the user 'alice' will"),
    ],
)
def test_a_run_without_the_right_login_is_one_error_before_anything_starts(
    guarded: Guarded,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    user: str | None,
    password: str | None,
    named: str,
) -> None:
    def connect(*_: object, **__: object) -> None:
        pytest.fail("a cluster was started")

    monkeypatch.setattr(ray_cluster, "connect", connect)
    if user is not None:
        log_in(monkeypatch, user, password)
    config = override(
        sinusoid_maml_5s(), {"name": "sine", "output_dir": tmp_path / "out", "tracking_uri": guarded.server.uri}
    )
    with pytest.raises(TrackingError, match="MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD") as info:
        driver.train(config)
    assert named in str(info.value)
    assert "\n" not in str(info.value)
    assert "wrong-1234" not in f"{info.value}{caplog.text}"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not (tmp_path / "out" / "runs" / "sine" / "tracking" / "run.json").exists()


@pytest.mark.parametrize("permission", [None, "READ"])
def test_another_user_s_experiment_is_a_clear_error_and_leaves_the_name_free(
    guarded: Guarded, alices: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, permission: str | None
) -> None:
    if permission:
        grant(guarded, alices, permission)
    log_in(monkeypatch, *guarded.login("bob"))
    with pytest.raises(TrackingError, match=r"'alices .*' at .* is somebody else's, and 'bob' may not write") as info:
        start(tmp_path / "run", guarded.server.uri, f"alices {tmp_path.name}")
    assert "\n" not in str(info.value)
    assert Outbox(tmp_path / "run").read_run() is None


def grant(guarded: Guarded, experiment: str, permission: str) -> None:
    path = "/api/3.0/mlflow/users/permissions/grant"
    content = {"username": "bob", "resource_type": "experiment", "resource_id": experiment, "permission": permission}
    assert guarded.request(path, content, login=guarded.login("admin")) == 200


def test_a_host_name_that_the_server_does_not_allow_is_said_to_be_that(
    guarded: Guarded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(monkeypatch, *guarded.login("alice"))
    with pytest.raises(TrackingError, match=rf"--allowed-hosts 127\.1:{guarded.server.port}"):
        open_tracking(tmp_path, f"http://127.1:{guarded.server.port}")  # loopback by another name


def test_dead_runs_of_other_users_are_left_to_them_and_do_not_hide_one_s_own(
    guarded: Guarded, alices: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    grant(guarded, alices, "READ")
    log_in(monkeypatch, *guarded.login("bob"))
    tracking = open_tracking(tmp_path, guarded.server.uri)
    client = tracking.client()
    own = [leave_dead_run(client, experiment_id(tracking, client, f"bobs {part}")) for part in ("first", "second")]
    readable = client.search_runs([alices], "attributes.status = 'RUNNING'")
    assert readable  # or there would be nothing to stumble over
    assert sorted(sweep(tracking)) == sorted(own)
    assert "Cannot look for dead runs" not in caplog.text
    log_in(monkeypatch, *guarded.login("alice"))
    assert {run.info.run_id for run in readable} <= set(sweep(tracking))


# ------------------------------------------------------------------------------------------------- the cost


def test_a_batch_with_a_login_costs_less_than_one_check_of_the_password(
    guarded: Guarded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that checks it anew for each request takes longer than that on any machine, ours about a fifth of it.

    Of the medians of the rounds the best counts: others use the machine too, and only ever slow it down.
    """
    log_in(monkeypatch, *guarded.login("alice"))
    stored = generate_password_hash(guarded.passwords["alice"])  # as MLflow keeps it
    run = start(tmp_path / "run", guarded.server.uri, "fast")
    ratios: list[float] = []
    while len(ratios) < MOST_ROUNDS and min(ratios, default=1) >= 1:
        writing, checking = [], []
        for batch in range(NUM_BATCHES):
            step = len(ratios) * NUM_BATCHES + batch
            metrics = [Metric(f"train/metric_{key}", 1 / (step + 1), 1, step) for key in range(NUM_METRICS)]
            before = time.perf_counter()
            run._uploader._log(metrics, {})
            written = time.perf_counter()
            assert check_password_hash(stored, guarded.passwords["alice"])
            writing.append(written - before)
            checking.append(time.perf_counter() - written)
        ratios.append(statistics.median(writing) / statistics.median(checking))
    assert run.end("FINISHED", timeout=30)
    assert min(ratios) < 1, ratios
    history = open_tracking(tmp_path, guarded.server.uri).client().get_metric_history(run.run_id, "train/metric_0")
    assert len(history) == len(ratios) * NUM_BATCHES  # it was written indeed


# ------------------------------------------------------------------------------------------------- secrets


class Trained(NamedTuple):
    """A training job that was watched to its end."""

    status: int
    texts: dict[str, str]
    """What could be read while it went on and afterwards, by where."""


def texts_below(folder: Path) -> Iterator[tuple[Path, str]]:
    """The files of a folder and what is in them, but for those that vanish meanwhile."""
    for root, _, names in os.walk(folder):  # rglob fails where a folder vanishes
        for path in (Path(root) / name for name in names):
            with contextlib.suppress(OSError):  # a socket too
                if path.is_file():
                    yield path.relative_to(folder), path.read_bytes().decode(errors="replace")


@pytest.fixture(scope="module")
def trained(guarded: Guarded, start_job: StartJob, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """`jobs/train.py` on two Ray workers with alice's login, and all that it leaves behind or shows meanwhile."""
    folder = tmp_path_factory.mktemp("trained")
    options = (
        "--name sine --num-workers 2 --num-outer-steps 40 --val-every 10 --checkpoint-every 10 --num-val-episodes 4 "
        f"--num-test-episodes 4 --experiment watched --tracking-uri {guarded.server.uri} --output-dir {folder / 'out'}"
    )
    texts: dict[str, str] = {}
    with pytest.MonkeyPatch.context() as patch:
        log_in(patch, *guarded.login("alice"))
        job = start_job("train", "sinusoid-maml-5s", *options.split(), folder=folder)
        deadline = time.monotonic() + 240
        while job.process.poll() is None:
            assert time.monotonic() < deadline, job.output
            listed = subprocess.run(["ps", "-efww"], capture_output=True, text=True, check=True).stdout
            texts["ps"] = texts.get("ps", "") + listed
            texts |= {f"Ray's {file.name}": text for file, text in texts_below(job._ray_folder)}  # gone at its end
            time.sleep(0.5)
        texts["output"] = job.output
        texts |= {str(file): text for file, text in texts_below(folder)}
        for log in guarded.logs:
            texts[log.name] = log.read_text()
        client = open_tracking(folder, guarded.server.uri).client()
        experiment = client.get_experiment_by_name("watched")
        (run,) = client.search_runs([experiment.experiment_id])
        texts["parameters"], texts["tags"] = json.dumps(run.data.params), json.dumps(run.data.tags)
        texts["tags of the experiment"] = json.dumps(experiment.tags)
        artifacts = Path(client.download_artifacts(run.info.run_id, "", str(tmp_path_factory.mktemp("artifacts"))))
        texts |= {f"artifact {file}": text for file, text in texts_below(artifacts)}
    return Trained(job.process.returncode, texts)


def test_the_job_that_is_searched_for_secrets_was_seen_at_work(guarded: Guarded, trained: Trained) -> None:
    """Otherwise finding none would say nothing."""
    assert trained.status == 0, trained.texts["output"]
    assert "RayTrainWorker" in trained.texts["ps"]
    assert "mlflow server" in trained.texts["ps"]
    assert "--tracking-uri" in trained.texts["ps"]
    assert guarded.server.uri in trained.texts["out/runs/sine/tracking/run.json"]
    assert any(name.startswith("Ray's raylet") and text for name, text in trained.texts.items())
    assert any(name.startswith("artifact model") and text for name, text in trained.texts.items())
    assert "POST" in trained.texts["server.log"]
    assert "inner_lr" in trained.texts["parameters"]
    assert "mlflow.user" in trained.texts["tags"]


def test_no_secret_is_to_be_read_anywhere(guarded: Guarded, trained: Trained) -> None:
    assert len(guarded.secrets) == 9
    shown = [
        f"{what} in {where}"
        for where, text in trained.texts.items()
        for what, s in guarded.secrets.items()
        if s in text
    ]
    assert not shown


def test_a_job_with_a_wrong_password_ends_with_one_line_that_does_not_hold_it(
    guarded: Guarded, start_job: StartJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(monkeypatch, "alice", "sesame-sesame")
    options = f"--name refused --tracking-uri {guarded.server.uri} --output-dir {tmp_path / 'out'}"
    job = start_job("train", "sinusoid-maml-5s", *options.split(), folder=tmp_path)
    assert job.wait(seconds=120) == 2
    (line,) = job.output.splitlines()
    assert "MLFLOW_TRACKING_PASSWORD" in line
    assert "alice" in line
    assert not [file for file, text in texts_below(tmp_path) if "sesame" in text]
