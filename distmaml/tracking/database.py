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
from mlflow.utils.credentials import read_mlflow_creds

from distmaml.errors import TrackingError

log = logging.getLogger(__name__)

_PROBE_SECONDS = 5.0
_AWAY = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED")
"""What MLflow's client says where the server, or the database below it, cannot answer just now."""


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
      TrackingError: the URI is not that of a server or holds a password, what answers there is not MLflow or does not
        take the login, or the embedded database is damaged, of another MLflow version, or cannot be written.
    """
    database = output_dir.absolute() / "mlflow.db"
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or embedded_uri(output_dir)
    if uri == embedded_uri(output_dir):
        _ensure_database(database, _artifact_root(database))
        return Tracking(uri, _artifact_root(database))
    _check_address(uri, database)
    return Tracking(uri.rstrip("/"), reachable=_probe(uri.rstrip("/")))


def embedded_uri(output_dir: Path) -> str:
    """The URI of the database in an output folder."""
    return f"sqlite:///{output_dir.absolute() / 'mlflow.db'}"


def _artifact_root(database: Path) -> str:
    return (database.parent / "mlartifacts").as_uri()


def _check_address(uri: str, database: Path) -> None:
    is_http = uri.lower().startswith(("http://", "https://"))
    if is_http and "@" in uri:
        raise TrackingError(
            f"tracking_uri={_without_secrets(uri)!r} holds a login, and an address is written into every run. Set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, and leave it out of the address."
        )
    try:
        parts = urlsplit(uri)
        usable = is_http and bool(parts.hostname) and parts.port != 0 and not parts.query and not parts.fragment
    except ValueError:  # a port or an IPv6 address that is none
        usable = False
    if not usable:
        raise TrackingError(
            f"tracking_uri={_without_secrets(uri)!r} is not the address of an MLflow server, like http://host:5000. "
            "Give one (for a database that of a server over it: mlflow server --backend-store-uri ...), or none for "
            f"the embedded {database}."
        )


def _without_secrets(uri: str) -> str:
    """The URI without what may be a password or a token, whatever characters that has and even if there is no //."""
    hidden = re.sub(r"^([a-z0-9+.-]+://)?.*@", r"\1***@", uri, flags=re.DOTALL | re.IGNORECASE)
    return re.sub(r"\?.*", "?***", hidden, flags=re.DOTALL)


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
    """Whether an MLflow server answers, and to us.

    Raises:
      TrackingError: something else answers, or a server that refuses this host name or this login.
    """
    try:
        if _get(f"{uri}/health") != "OK" or not re.match(r"\d+\.\d+", _get(f"{uri}/version")):
            raise TrackingError(_not_mlflow(uri, "it has no /health and /version like MLflow's"))
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (502, 503, 504):  # a proxy whose server is away
            _warn_unreachable(uri, str(error))
            return False
        if error.code not in (401, 403):  # it wants a login, which the client has
            raise TrackingError(_not_mlflow(uri, str(error))) from error
    except http.client.RemoteDisconnected as error:
        _warn_unreachable(uri, str(error))
        return False
    except (http.client.HTTPException, UnicodeError) as error:
        raise TrackingError(_not_mlflow(uri, repr(error))) from error
    except OSError as error:
        _warn_unreachable(uri, str(error))
        return False
    return _answers_us(uri)


def _answers_us(uri: str) -> bool:
    """Whether the server does what a client asks: /health and /version answer to everybody, its database down or not.

    Raises:
      TrackingError: it refuses us, or knows nothing of experiments.
    """
    try:
        MlflowClient(uri).search_experiments(max_results=1)
    except MlflowException as error:
        raise_refusal(uri, error)
        if error.error_code not in _AWAY:
            raise TrackingError(_not_mlflow(uri, one_line(error))) from error
        _warn_unreachable(uri, one_line(error))
        return False
    return True


def raise_refusal(uri: str, error: MlflowException) -> None:
    """Says what to do where the server refuses us rather than what we say; returns where it does not.

    Raises:
      TrackingError: it refuses this host name, or wants a login.
    """
    if "Invalid Host header" in str(error):
        raise TrackingError(
            f"The MLflow server at {uri} refuses requests under this host name. Start it with "
            f"--allowed-hosts {urlsplit(uri).netloc}, or use a name that it allows."
        ) from error
    if error.error_code != "UNAUTHENTICATED":
        return
    user = own_user()
    taken = f"that of the user {user!r}" if user else "the token" if "MLFLOW_TRACKING_TOKEN" in os.environ else "none"
    raise TrackingError(
        f"The MLflow server at {uri} wants a login, and {taken} will not do. Set MLFLOW_TRACKING_USERNAME and "
        "MLFLOW_TRACKING_PASSWORD to one that it knows."
    ) from error


def own_user() -> str | None:
    """The user that we log in as at a server; None where we have no whole login."""
    known = read_mlflow_creds()
    return known.username if known.username and known.password else None


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=_PROBE_SECONDS) as response:
        return str(response.read(200).decode()).strip()


def one_line(error: Exception) -> str:
    """Why, in short: MLflow's message may have all of the server's answer in it, and has the cause at its end."""
    text = str(error).partition("\n")[0]
    return (text.partition("(Caused by ")[2].removesuffix(")") or text)[:200]


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
