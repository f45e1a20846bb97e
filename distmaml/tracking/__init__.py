"""What a run tells MLflow; the only import of mlflow.

`segments` (rank 0 of the workers) and `outbox` (the driver) put down on disk what is to be told and import no mlflow;
`uploader` tells it, when and as often as MLflow lets it. A run therefore never waits for its tracking.

Importing this package imports nothing, but sets what mlflow reads from the environment when it is imported and at its
calls. What the user has set is left alone.
"""

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# The uploader does its own waiting: with mlflow's defaults one call to a dead server hangs for 246 seconds.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
