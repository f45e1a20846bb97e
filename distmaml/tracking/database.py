"""Where MLflow is: the embedded database of an output directory, or a server.

Without a tracking URI everything goes to ``OUTPUT_DIR/mlflow.db`` (SQLite), artifacts to ``OUTPUT_DIR/mlartifacts``.
Many drivers may use one embedded database on one machine; several machines share a server.
"""

import http.client
import logging
import os
import re
import sqlite3
import urllib.error
import urllib.request
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from distmaml.errors import TrackingError

log = logging.getLogger(__name__)

_PROBE_SECONDS = 5.0


@dataclass(frozen=True)
class Tracking:
    """An MLflow that runs are told to."""

    uri: str
    """sqlite:////... or http(s)://..."""
    artifact_root: str | None = None
    """Where an embedded database keeps artifacts; None for a server, which decides that itself."""
    reachable: bool = True
    """Whether it answered when it was opened. A server may come later: runs are kept on disk until then."""

    @property
    def embedded(self) -> bool:
        """Whether this is a database of this machine and not a server."""
        return self.artifact_root is not None

    def client(self) -> MlflowClient:
        """A client of it; mlflow's notion of a current tracking URI, experiment or run is never used."""
        return MlflowClient(self.uri)


def open_tracking(output_dir: Path, tracking_uri: str | None = None) -> Tracking:
    """The MLflow of `tracking_uri`, else of $MLFLOW_TRACKING_URI, else the embedded one, made where there is none.

    A server that cannot be reached is no reason not to train: it costs a warning, and `Tracking.reachable` is false.

    Raises:
      TrackingError: the URI is not that of a server, what answers there is not MLflow, or the embedded database is
        damaged, of another MLflow version, or cannot be written.
    """
    database = output_dir.absolute() / "mlflow.db"
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or embedded_uri(output_dir)
    if uri == embedded_uri(output_dir):
        _ensure_database(database, _artifact_root(database))
        return Tracking(uri, _artifact_root(database))
    try:
        parts = urlsplit(uri)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port or an IPv6 address that is none
        usable = False
    if not usable:
        raise TrackingError(
            f"tracking_uri={_without_password(uri)!r} is not the address of an MLflow server (http://host:5000). Start "
            "one over that database (mlflow server --backend-store-uri ...) and give its address, or give none for "
            f"the embedded {database}."
        )
    if parts.password is not None:
        raise TrackingError(
            f"tracking_uri={_without_password(uri)!r} holds a password, which would be written into every run. Set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, and leave it out of the address."
        )
    return Tracking(uri.rstrip("/"), reachable=_probe(uri.rstrip("/")))


def embedded_uri(output_dir: Path) -> str:
    """The URI of the database in an output folder."""
    return f"sqlite:///{output_dir.absolute() / 'mlflow.db'}"


def _artifact_root(database: Path) -> str:
    return (database.parent / "mlartifacts").as_uri()


def _without_password(uri: str) -> str:
    return re.sub(r"//([^/@:]*):[^/@]*@", r"//\1:***@", uri)


# ---------------------------------------------------------------------------------------------- database


def _ensure_database(path: Path, artifact_root: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # MLflow would let two processes migrate one new file at once, which leaves it unusable for ever.
        with FileLock(f"{path}.lock"):
            if not path.exists():
                _create_database(path, artifact_root)
            _check_database(path)
    except (OSError, sqlite3.OperationalError) as error:
        raise TrackingError(
            f"The embedded MLflow database {path} cannot be written ({error}). Give a writable output_dir with free "
            "space, or the tracking_uri of a server."
        ) from error


def _create_database(path: Path, artifact_root: str) -> None:
    """Creates it beside its place and moves it there whole: the migrations take seconds in which we may be killed."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore  # a second that users of a server do not need

    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)
    store = SqlAlchemyStore(f"sqlite:///{part}", artifact_root)
    store.engine.dispose()
    with closing(sqlite3.connect(part)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")  # kept in the file; readers no longer wait for writers
    part.replace(path)


def _check_database(path: Path) -> None:
    """Looks with sqlite3 itself: MLflow tries ten times to open a damaged file and migrates an old one unasked."""
    try:
        with closing(sqlite3.connect(path, timeout=20)) as connection:
            connection.execute("BEGIN IMMEDIATE")  # as good as a write, without one
            revision = connection.execute("SELECT version_num FROM alembic_version").fetchone()[0]
            connection.rollback()
    except (sqlite3.DatabaseError, TypeError) as error:
        if isinstance(error, sqlite3.OperationalError) and "no such table" not in str(error):
            raise
        raise TrackingError(
            f"{path} is damaged or not a database of MLflow ({error}). Restore it from a copy, or move it away and a "
            "new one is made."
        ) from error
    from mlflow.store.db.utils import _get_latest_schema_revision

    if revision != _get_latest_schema_revision():
        raise TrackingError(
            f"{path} was written by another version of MLflow (schema {revision}). If that was an older one, make a "
            f"copy of it and run: mlflow db upgrade sqlite:///{path}. If it was a newer one, install that."
        )


# ------------------------------------------------------------------------------------------------ server


def _probe(uri: str) -> bool:
    """Whether an MLflow server answers; nothing is asked that needs a login.

    Raises:
      TrackingError: something else answers, or a server that refuses this host name.
    """
    try:
        if _get(f"{uri}/health") != "OK" or not re.match(r"\d+\.\d+", _get(f"{uri}/version")):
            raise TrackingError(_not_mlflow(uri, "it has no /health and /version like MLflow's"))
    except urllib.error.HTTPError as error:
        with error:
            body = error.read(200).decode(errors="replace")
        if error.code in (502, 503, 504):  # a proxy whose server is away
            _warn_unreachable(uri, str(error))
            return False
        if "Invalid Host header" in body:
            raise TrackingError(
                f"The MLflow server at {uri} refuses requests under this host name. Start it with "
                f"--allowed-hosts {urlsplit(uri).netloc}, or use a name that it allows."
            ) from error
        if error.code not in (401, 403):  # it wants a login, which the client has from MLFLOW_TRACKING_USERNAME
            raise TrackingError(_not_mlflow(uri, str(error))) from error
    except http.client.RemoteDisconnected as error:
        _warn_unreachable(uri, str(error))
        return False
    except (http.client.HTTPException, UnicodeError) as error:
        raise TrackingError(_not_mlflow(uri, repr(error))) from error
    except OSError as error:
        _warn_unreachable(uri, str(error))
        return False
    return True


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=_PROBE_SECONDS) as response:
        return str(response.read(200).decode()).strip()


def _not_mlflow(uri: str, reason: str) -> str:
    return (
        f"What answers at tracking_uri={uri!r} is not an MLflow server ({reason}). Give the address "
        "of one, or none for the embedded database."
    )


def _warn_unreachable(uri: str, reason: str) -> None:
    log.warning("The MLflow server at %s cannot be reached (%s).", uri, reason)


# -------------------------------------------------------------------------------------------- experiment


def experiment_id(tracking: Tracking, client: MlflowClient, name: str) -> str:
    """The id of the experiment of this name, which is created where there is none.

    Raises:
      TrackingError: the experiment is in MLflow's bin.
      MlflowException: MLflow cannot be reached, or refuses the name.
    """
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            # An experiment keeps the artifact location it is born with; MLflow's own choice is the working directory.
            return str(client.create_experiment(name, artifact_location=tracking.artifact_root))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)  # somebody else was faster
    if experiment.lifecycle_stage == "deleted":
        raise TrackingError(
            f"The MLflow experiment {name!r} has been deleted. Restore it (mlflow experiments restore --experiment-id "
            f"{experiment.experiment_id}), or choose another experiment."
        )
    return str(experiment.experiment_id)
