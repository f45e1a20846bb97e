import http.server
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from distmaml.errors import TrackingError
from distmaml.tracking.database import experiment_id, open_tracking


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh database; to be copied, since making one takes seconds."""
    folder = tmp_path_factory.mktemp("template")
    open_tracking(folder)
    return folder / "mlflow.db"


@pytest.fixture(autouse=True)
def no_ambient_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.mark.slow
def test_four_processes_may_open_an_empty_folder_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from distmaml.tracking.database import open_tracking, experiment_id\n"
        "t = open_tracking(Path(sys.argv[1])); c = t.client()\n"
        "print(c.create_run(experiment_id(t, c, 'race')).info.experiment_id)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    outputs = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    tracking = open_tracking(tmp_path)
    experiment = experiment_id(tracking, tracking.client(), "race")
    assert outputs == [experiment] * 4
    assert len(tracking.client().search_runs([experiment])) == 4


def test_readers_do_not_wait_for_writers(template: Path) -> None:
    with closing(sqlite3.connect(template)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_an_experiment_keeps_its_artifacts_in_the_output_directory(template: Path, tmp_path: Path) -> None:
    shutil.copy(template, tmp_path)
    tracking = open_tracking(tmp_path)
    client = tracking.client()
    experiment = client.get_experiment(experiment_id(tracking, client, "omniglot"))
    assert experiment.artifact_location == (tmp_path / "mlartifacts").as_uri()


def test_a_deleted_experiment_is_refused_with_the_way_out(template: Path, tmp_path: Path) -> None:
    shutil.copy(template, tmp_path)
    tracking = open_tracking(tmp_path)
    client = tracking.client()
    client.delete_experiment(experiment_id(tracking, client, "gone"))
    with pytest.raises(TrackingError, match="mlflow experiments restore"):
        experiment_id(tracking, client, "gone")


@pytest.mark.parametrize("content", [b"not a database, and long enough to have a header" * 10, b""])
def test_a_file_that_is_no_database_of_mlflow_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "mlflow.db").write_bytes(content)
    with pytest.raises(TrackingError, match="damaged or not a database of MLflow"):
        open_tracking(tmp_path)
    assert (tmp_path / "mlflow.db").read_bytes() == content


def test_an_older_schema_is_not_migrated_unasked(template: Path, tmp_path: Path) -> None:
    shutil.copy(template, tmp_path)
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '728d730b5ebd'")
        connection.execute("DROP TABLE latest_metrics")
        connection.commit()
    with pytest.raises(TrackingError, match=f"mlflow db upgrade sqlite:///{tmp_path}/mlflow.db"):
        open_tracking(tmp_path)


def test_an_output_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TrackingError, match="cannot be written"):
        open_tracking(tmp_path / "file")


@pytest.mark.parametrize(
    "uri",
    [
        *(
            "postgresql://maml:secret@host/mlflow",
            "sqlite:///elsewhere.db",
            "./mlruns",
            "http:",
            "maml:secret@host:5000",
        ),
        *("http://host:5000?api_key=secret", "http://host:5000/#/experiments/1"),
    ],
)
def test_only_the_address_of_a_server_is_a_tracking_uri(tmp_path: Path, uri: str) -> None:
    with pytest.raises(TrackingError, match="not the address of an MLflow server") as info:
        open_tracking(tmp_path, uri)
    assert "secret" not in str(info.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("login", ["maml:secret", "secret", "maml:sec/ret", "maml:sec@ret", "maml:sec?ret#"])
def test_a_login_does_not_belong_in_the_address(tmp_path: Path, login: str) -> None:
    with pytest.raises(TrackingError, match="MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD") as info:
        open_tracking(tmp_path, f"http://{login}@127.0.0.1:5000")
    assert "sec" not in str(info.value)
    assert list(tmp_path.iterdir()) == []


def test_the_environment_names_the_server_where_nothing_else_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://host/mlflow")
    with pytest.raises(TrackingError, match="postgresql://host/mlflow"):
        open_tracking(tmp_path)


def test_a_server_that_is_away_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as taken:  # bound and not listening: refuses connections
        taken.bind(("127.0.0.1", 0))
        tracking = open_tracking(tmp_path, f"http://127.0.0.1:{taken.getsockname()[1]}/")
    assert not tracking.reachable
    assert not tracking.embedded
    assert "cannot be reached" in caplog.text


class _Website(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>hello</html>")

    def log_message(self, *_: object) -> None:
        pass


class _Broken(_Website):
    def do_GET(self) -> None:
        self.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n")


class _Missing(_Website):
    def do_GET(self) -> None:
        self.send_error(404)


class _Healthy(_Website):
    """Looks like MLflow from afar: /health is common, and any answer may be about to want a login."""

    def do_GET(self) -> None:
        if self.path == "/health":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"OK")
        else:
            self.send_error(401)

    def do_POST(self) -> None:
        self.send_error(404)


def _serve(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture(params=[_Website, _Broken, _Missing, _Healthy])
def not_mlflow(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from _serve(request.param)


def test_a_server_that_is_not_mlflow_is_refused_in_one_line(tmp_path: Path, not_mlflow: str) -> None:
    with pytest.raises(TrackingError, match="is not an MLflow server") as info:
        open_tracking(tmp_path, not_mlflow)
    assert not_mlflow in str(info.value)
    assert "\n" not in str(info.value)


class _NoDatabase(_Website):
    """An MLflow that lives while its database is away."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write({"/health": b"OK", "/version": b"3.17.2"}[self.path])

    def do_POST(self) -> None:
        self.send_response(500)
        self.end_headers()
        self.wfile.write(b'{"error_code": "INTERNAL_ERROR", "message": "connection refused"}')


@pytest.fixture
def no_database() -> Iterator[str]:
    yield from _serve(_NoDatabase)


def test_a_server_whose_database_is_away_counts_as_away(
    tmp_path: Path, no_database: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert not open_tracking(tmp_path, no_database).reachable
    assert "cannot be reached" in caplog.text


def test_the_user_s_own_settings_of_mlflow_are_left_alone() -> None:
    code = (
        "import os, distmaml.tracking\n"
        "print(*[os.environ[f'MLFLOW_HTTP_REQUEST_{name}'] for name in ('MAX_RETRIES', 'TIMEOUT')])"
    )
    environment = {**os.environ, "MLFLOW_HTTP_REQUEST_TIMEOUT": "99"}
    environment.pop("MLFLOW_HTTP_REQUEST_MAX_RETRIES", None)
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["0", "99"]
