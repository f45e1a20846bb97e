"""Servers that tests start, and end: an MLflow server and the PostgreSQL below it.

They listen on loopback alone. Passwords travel by environment and files, never on a command line, which `ps` shows.
"""

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

PATIENCE_SECONDS = 90.0


class Postgres:
    """A PostgreSQL of its own: Debian's binaries over a temporary folder, on a free port of this machine.

    Its data outlive `stop`, and go with this object. They lie in a folder of their own right under /tmp: PostgreSQL
    refuses to run as root, its user may not enter pytest's folders, and the path of a socket may have 107 characters.

    Args:
      folder: where its log goes.
    """

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.log = folder / "postgres.log"
        self.password = secrets.token_hex(16)
        self.uri = f"postgresql+psycopg2://mlflow:{self.password}@127.0.0.1:{self.port}/postgres"
        """The driver is named: SQLAlchemy's default is psycopg 3 since its version 2.1."""
        self.process: subprocess.Popen[bytes] | None = None
        self._ids = _unprivileged_ids()
        self._home = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))
        weakref.finalize(self, shutil.rmtree, self._home, ignore_errors=True)

    def start(self) -> None:
        """Starts it, after a crash too, and waits until it takes connections."""
        if not (self._home / "data").exists():
            self._create()
        command = [str(_binary("postgres")), "-D", str(self._home / "data"), "-p", str(self.port)]
        command += ["-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={self._home}"]
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                command, cwd=self._home, stdout=output, stderr=output, start_new_session=True, **self._ids
            )
        probe = [str(_binary("pg_isready")), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        _wait_for(lambda: subprocess.run(probe, check=False).returncode == 0, self.process, self.log)

    def stop(self) -> None:
        """Ends it as a crash does: nothing is finished, and the next start recovers from the write-ahead log."""
        if self.process is not None:
            self.process.send_signal(signal.SIGQUIT)  # "immediate shutdown"; SIGKILL would leave its children behind
            self.process.wait()
            self.process = None

    def restart(self) -> None:
        """A crash and a start."""
        self.stop()
        self.start()

    def _create(self) -> None:
        password_file = self._home / "password"
        password_file.touch(mode=0o600)
        password_file.write_text(f"{self.password}\n")
        for path in (self._home, password_file):
            os.chown(path, self._ids["user"], self._ids["group"])
        command = [str(_binary("initdb")), "-D", str(self._home / "data"), "-U", "mlflow", "--auth=scram-sha-256"]
        command += [f"--pwfile={password_file}", "--encoding=UTF8", "--no-locale", "--no-sync"]
        with self.log.open("ab") as output:
            made = subprocess.run(command, cwd=self._home, stdout=output, stderr=output, check=False, **self._ids)
        assert made.returncode == 0, self.log.read_text()
        password_file.unlink()


class Server:
    """A real `mlflow server` on a free port of this machine.

    Args:
      folder: where its log and its artifacts go.
      database: an sqlite file; one of its own by default.
      backend: the URI of another database, instead.
      admin_password: where it is given, the server wants logins (MLflow's basic-auth, with its cache on), and this is
        that of the user `admin`.
      workers: processes that answer.
    """

    def __init__(
        self,
        folder: Path,
        database: Path | None = None,
        *,
        backend: str | None = None,
        admin_password: str | None = None,
        workers: int = 1,
    ) -> None:
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.folder, self.log = folder, folder / "server.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._workers = workers
        self._environment = {
            "MLFLOW_BACKEND_STORE_URI": backend or f"sqlite:///{database or folder / 'server.db'}",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        self.secrets: list[str] = []
        """What it was told and nobody may read anywhere."""
        if admin_password is not None:
            self._want_logins(admin_password)

    def _want_logins(self, admin_password: str) -> None:
        # Without its cache MLflow derives a key from the password at each request: hundreds of milliseconds.
        settings = self.folder / "auth.ini"
        settings.write_text(
            "[mlflow]\n"
            "default_permission = NO_PERMISSIONS\n"
            f"database_uri = sqlite:///{self.folder / 'auth.db'}\n"
            "admin_username = admin\n"
            "auth_cache_ttl_seconds = 60\n"
        )
        key = secrets.token_hex(32)
        self.secrets = [admin_password, key]
        self._environment |= {
            "MLFLOW_AUTH_CONFIG_PATH": str(settings),
            "MLFLOW_AUTH_ADMIN_PASSWORD": admin_password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": key,
        }

    def start(self) -> None:
        """Starts it, and waits until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", str(self._workers), "--artifacts-destination", str(self.folder / "artifacts")]
        # MLflow's own list has patterns like 10.*, to which a name like 10.evil.example belongs.
        command += ["--allowed-hosts", f"127.0.0.1:{self.port},localhost:{self.port}"]
        command += ["--app-name", "basic-auth"] if self.secrets else []
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                cwd=self.folder,
                env={**os.environ, **self._environment},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        _wait_for(self._answers, self.process, self.log)

    def stop(self) -> None:
        """Kills it."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)  # its own session: the server and its workers
            self.process.wait()
            self.process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=1):
                return True
        except (urllib.error.URLError, OSError):
            return False


@contextmanager
def s3_server() -> Iterator[str]:
    """The host and port of an S3 server on loopback, without buckets."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert server.poll() is None
                time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def free_port() -> int:
    """A port of this machine that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _Ids(TypedDict):
    user: int
    group: int


def _unprivileged_ids() -> _Ids:
    """The user who runs PostgreSQL: this one, or Debian's own for it where this is root."""
    if os.getuid() != 0:
        return {"user": os.getuid(), "group": os.getgid()}
    known = {entry.pw_name: entry for entry in pwd.getpwall()}
    entry = known.get("postgres") or known["nobody"]
    return {"user": entry.pw_uid, "group": entry.pw_gid}


def _binary(name: str) -> Path:
    """A program of PostgreSQL's server, which Debian keeps out of $PATH; of the newest version."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1]
    on_path = shutil.which(name)
    assert on_path is not None, f"there is no {name}: apt-get install -y --no-install-recommends postgresql"
    return Path(on_path)


def _wait_for(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not ready():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
