"""A real PostgreSQL server for each test process, with a new empty database for each test.

PostgreSQL must be installed on this machine. If it is not, the tests are skipped with a message, or fail if CI=true.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psycopg
import pytest

from tests.patience import PATIENCE_S

_PACKAGES = Path("/usr/lib/postgresql")  # Debian and Ubuntu install each version in a folder here, outside of PATH
_SYSTEM_USER = "postgres"  # runs the server if the tests run as root, because PostgreSQL refuses to run as root
_START_ATTEMPTS = 3  # another process may take the free port before the server does

__all__ = ["PostgresServer", "postgres", "postgres_url", "running_postgres"]


class UnavailableError(Exception):
    """This machine cannot run PostgreSQL. The message has the reason."""


@dataclass(frozen=True)
class PostgresServer:
    """A running PostgreSQL server with access by TCP and password, as in production.

    Committed data survives a crash of the server but not a crash of the machine.
    """

    programs: Path
    folder: Path
    port: int
    user: str
    password: str

    def url(self, database: str = "postgres") -> str:
        """Returns the URL of a database."""
        return f"postgresql://{self.user}:{self.password}@127.0.0.1:{self.port}/{database}"

    def create_database(self, encoding: str = "UTF8") -> str:
        """Create an empty database. Returns its URL."""
        name = f"test_{secrets.token_hex(8)}"
        self.execute(f"CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0")
        return self.url(name)

    def drop_database(self, url: str) -> None:
        """Drop a database, even if clients are connected."""
        self.execute(f"DROP DATABASE IF EXISTS {url.rpartition('/')[2]} WITH (FORCE)")

    def execute(self, statement: str) -> None:
        """Run one SQL statement as the superuser, on a connection to the database `postgres`."""
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(statement.encode())

    def stop(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Close all connections and stop. "immediate" simulates a crash, from which the next `start` recovers."""
        self._control("stop", "--mode", mode)

    def start(self) -> None:
        """Start again after `stop`, on the same port. Committed data is still there."""
        self._control("start", "--log", str(self.folder / "log"), "--options", f"-p {self.port}")

    def restart(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        self.stop(mode)
        self.start()

    def restart_as_standby(self) -> None:
        """Restart as a failover restarts a former primary: the data can only be read, until `promote`."""
        self.stop()
        (self.folder / "data" / "standby.signal").touch()
        self.start()

    def promote(self) -> None:
        """Accept writes again after `restart_as_standby`."""
        self._control("promote")

    def _control(self, *arguments: str) -> None:
        patience = ("--wait", "--timeout", f"{PATIENCE_S:.0f}")
        _run(self.folder, self.programs / "pg_ctl", "--pgdata", "data", *patience, *arguments)


@contextmanager
def running_postgres() -> Iterator[PostgresServer]:
    """Run a server in a temporary folder. The server and the folder are removed even if this process is killed.

    Raises UnavailableError.
    """
    programs = _find_programs()
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    if os.geteuid() == 0:
        try:
            shutil.chown(folder, _SYSTEM_USER, _SYSTEM_USER)
        except LookupError as error:
            folder.rmdir()
            raise UnavailableError(f"root cannot run it and there is no user {_SYSTEM_USER}") from error
    with _cleaned_up(programs, folder):
        user, password = "tester", secrets.token_hex(8)
        (folder / "password").write_text(password)
        (folder / "password").chmod(0o644)  # the server's user must read the file; others cannot open the folder
        access = ("--username", user, "--pwfile", "password", "--auth-local", "trust", "--auth-host", "scram-sha-256")
        encoding = ("--encoding", "UTF8", "--locale", "C")
        _run(folder, programs / "initdb", "--no-sync", "--pgdata", "data", *access, *encoding)
        with (folder / "data" / "postgresql.conf").open("a") as file:
            file.write(f"listen_addresses = '127.0.0.1'\nunix_socket_directories = '{folder}'\nmax_connections = 200\n")
            file.write("fsync = off\nfull_page_writes = off\n")
        yield _start(programs, folder, user=user, password=password)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """Yields the server of this test process."""
    try:
        with running_postgres() as server:
            yield server
    except UnavailableError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI needs PostgreSQL: {error}")
        pytest.skip(f"NOT TESTED AGAINST POSTGRESQL: {error}")


@pytest.fixture
def postgres_url(postgres: PostgresServer) -> Iterator[str]:
    """Yields the URL of a new empty database."""
    url = postgres.create_database()
    yield url
    postgres.drop_database(url)


def _find_programs() -> Path:
    on_path = shutil.which("postgres")
    folders = [Path(on_path).resolve().parent] if on_path else []
    folders += sorted(_PACKAGES.glob("*/bin"), key=lambda folder: -float(folder.parent.name))
    for folder in folders:
        if all((folder / name).is_file() for name in ("postgres", "initdb", "pg_ctl")):
            return folder
    raise UnavailableError("it is not installed (Debian and Ubuntu: apt-get install postgresql)")


def _start(programs: Path, folder: Path, *, user: str, password: str) -> PostgresServer:
    for attempts_left in reversed(range(_START_ATTEMPTS)):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        server = PostgresServer(programs, folder, port, user, password)
        try:
            server.start()
        except UnavailableError:
            if not attempts_left:
                raise
        else:
            return server
    raise AssertionError("unreachable: the last attempt returns or raises")


@contextmanager
def _cleaned_up(programs: Path, folder: Path) -> Iterator[None]:
    """Stop the server in `folder` and remove the folder when the context ends or this process exits.

    A shell in another process does the work, so that it happens even if this process is killed.
    """
    stop = f"'{programs}/pg_ctl' stop --pgdata data --mode immediate --wait"
    script = f"cat >/dev/null; if [ -e data/postmaster.pid ]; then {stop}; fi; rm -rf '{folder}'"
    keeper = subprocess.Popen(
        ["/bin/sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # so that Ctrl-C stops only the tests
        **_as_system_user(folder),
    )
    try:
        yield
    finally:
        keeper.communicate()
        # The shell runs as another user, who may not be allowed to remove the folder itself from /tmp.
        shutil.rmtree(folder, ignore_errors=True)


def _run(folder: Path, *command: str | Path) -> None:
    """Run a PostgreSQL program in `folder`. If it fails, raises UnavailableError with its output."""
    with (folder / "output").open("w+b") as output:  # not a pipe, which the server would keep open while it runs
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=PATIENCE_S + 60,  # longer than the program's own timeout
                check=False,
                **_as_system_user(folder),
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise UnavailableError(f"{Path(command[0]).name} cannot run: {error}") from error
        output.seek(0)
        printed = output.read().decode(errors="replace").strip()
    if done.returncode:
        raise UnavailableError(f"{Path(command[0]).name} failed with status {done.returncode}: {printed[-500:]}")


def _as_system_user(folder: Path) -> dict[str, Any]:
    options: dict[str, Any] = {"cwd": folder, "env": {"PATH": os.environ["PATH"], "LC_ALL": "C"}}
    is_root = os.geteuid() == 0
    return options | {"user": _SYSTEM_USER, "group": _SYSTEM_USER, "extra_groups": ()} if is_root else options
