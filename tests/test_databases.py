"""The PostgreSQL that other tests rely on is a real one, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from tests.databases import PostgresServer
from tests.patience import wait_until

pytestmark = pytest.mark.slow

_HOLD = """
import sys, time
from tests.databases import running_postgres
with running_postgres() as server:
    print(server.folder, server.port, flush=True)
    time.sleep(3600)
"""


def test_a_crash_keeps_what_was_committed(postgres: PostgresServer, postgres_url: str) -> None:
    with psycopg.connect(postgres_url) as connection:
        assert connection.execute("SELECT current_setting('fsync')").fetchone() == ("on",)
        connection.execute("CREATE TABLE kept (n integer)")
        connection.execute("INSERT INTO kept VALUES (7)")
    postgres.restart("immediate")
    with psycopg.connect(postgres_url) as connection:
        assert connection.execute("SELECT n FROM kept").fetchone() == (7,)


@pytest.mark.parametrize("_", range(2))
def test_each_test_has_an_empty_database(postgres_url: str, _: int) -> None:
    with psycopg.connect(postgres_url) as connection:
        connection.execute("CREATE TABLE mine (n integer)")


def test_the_password_is_checked(postgres: PostgresServer) -> None:
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(postgres.url().replace(postgres.password, "wrong"))


def test_nothing_is_left_when_the_test_process_is_killed(postgres: PostgresServer) -> None:
    with subprocess.Popen([sys.executable, "-c", _HOLD], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        folder, _ = process.stdout.readline().split()
        os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: not Path(folder).exists())
