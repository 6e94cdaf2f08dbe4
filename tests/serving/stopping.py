"""Checks of a server's shutdown, for tests with different signals and with HAProxy or Ray's Python proxy."""

from __future__ import annotations

import io
import re
import sqlite3
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from tests.patience import PATIENCE_S, wait_until
from tests.serving.launched import LaunchedServer

DRAIN_S = PATIENCE_S  # how long stopping servers wait for running work; these tests' work ends long before
_BODY = {"prompt": "a door closes", "duration": 2, "seed": 5, "steps": 3}
_LONG_BODY = _BODY | {"steps": 1000, "batch_size": 4, "duration": 16}
_SECONDS_OF_WORK = _LONG_BODY | {"steps": 150}


def check_that_stopping_finishes_work(stopped: LaunchedServer, number: int) -> None:
    """Send signal `number` while the model `tiny` runs a request and a job.

    The request must end normally, and the job must go back into the queue.
    The server must have no other work.
    """
    num_lines = len(stopped.lines)
    job = stopped.client.post("/jobs", json=_LONG_BODY).json()
    with ThreadPoolExecutor(2) as pool:
        events = pool.submit(stopped.client.get, f"/jobs/{job['id']}/events")
        wait_until(lambda: stopped.client.get(job["status_url"]).json()["status"] == "running")
        busy = pool.submit(stopped.client.post, "/generate", json=_SECONDS_OF_WORK)
        wait_until(lambda: stopped.num_requests("tiny") == 2)  # the model runs the request and the job
        with stopped.suspended("ray::ServeReplica:audio:tiny"):
            stopped.signal(number)
            wait_until(lambda: stopped.client.get("/ready").status_code == 503)
            refused = stopped.client.post("/generate", json=_BODY)
            assert (refused.status_code, refused.headers["content-type"]) == (503, "application/json")
            assert int(refused.headers["retry-after"]) >= 1
            assert stopped.client.get("/health").status_code == 200
            assert not busy.done()
        assert events.result().text.split("\n")[-3].startswith("retry: ")
        assert len(zipfile.ZipFile(io.BytesIO(busy.result().content)).namelist()) == 4
        answered_at = time.monotonic()
        stopped.wait_until_stopped()
    assert stopped.start_s is not None
    assert time.monotonic() - answered_at < stopped.start_s  # stopping is faster than starting was
    assert "cutting off" not in stopped.output
    check_log(stopped, since=num_lines)
    with closing(sqlite3.connect(_database_of(stopped))) as database:  # the interrupted attempt does not count
        kept = database.execute("SELECT state, attempts FROM jobs WHERE id = ?", (job["id"],)).fetchall()
        assert kept == [("queued", 0)]
    assert stopped.process.returncode == 0, stopped.output
    assert stopped.leftovers() == []
    assert not stopped.directory.exists()


def check_log(launched: LaunchedServer, *, since: int) -> None:
    """Check that the server's output has no traceback or failed call from line `since` on, and no colour codes."""
    faults = ("Traceback", "retries remaining")
    assert not [line for line in launched.lines[since:] if any(fault in line for fault in faults)], launched.output
    assert "\x1b" not in launched.output


def _database_of(launched: LaunchedServer) -> str:
    kept = re.search(r"jobs are kept in SQLite (\S+),", launched.output)
    assert kept is not None
    return kept[1]
