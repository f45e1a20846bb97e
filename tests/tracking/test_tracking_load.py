"""A search of many trials at a time, against a real server over PostgreSQL: the benchmark, at a size for a test."""

from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks import tracking_load
from distmaml.tracking.database import open_tracking
from tests.servers import Postgres, Server

pytestmark = pytest.mark.ray

NUM_TRIALS = 40
CONCURRENCY = 32


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What came of it."""
    folder = tmp_path_factory.mktemp("load")
    postgres = Postgres(folder)
    server = Server(folder, backend=postgres.uri)
    try:
        postgres.start()
        server.start()
        tracking = open_tracking(folder / "output", server.uri)
        stage = tracking_load.Stage(server, postgres.uri, None, folder / "output", tracking)
        yield tracking_load.search_of_many_trials(stage, num_trials=NUM_TRIALS, concurrency=CONCURRENCY)
    finally:
        server.stop()
        postgres.stop()


def test_every_point_of_every_trial_arrives_once(search: dict[str, Any]) -> None:
    assert search["points"] == search["segments"] * 120 > 40_000
    assert (search["points_lost"], search["points_doubled"]) == (0, 0)
    assert search["statuses"] == {"FINISHED": NUM_TRIALS}
    assert search["trials_with_all_parameters"] == NUM_TRIALS


def test_the_server_gets_one_batch_a_trial_every_few_seconds(search: dict[str, Any]) -> None:
    """And not one a segment and several at the start and the end."""
    assert search["requests_by_kind"]["POST runs/log-batch"] < search["segments"] + 2 * NUM_TRIALS
    assert search["requests_by_kind"]["POST runs/update"] < 2 * NUM_TRIALS
    assert search["requests_a_second"] < 40


def test_trials_need_no_threads_of_their_own(search: dict[str, Any]) -> None:
    assert search["driver_threads"] < 10


def test_the_backlog_stays_at_seconds(search: dict[str, Any]) -> None:
    assert search["backlog_seconds"]["p50"] < 10
    assert search["backlog_seconds"]["max"] < 30
