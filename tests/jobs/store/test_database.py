"""The job database at startup, during an outage and after an outage."""

from __future__ import annotations

import socket
import sqlite3
import sys
from functools import partial
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from stable_audio_serve.core.errors import ConfigError, StorageError, StorageFullError, StoreMovedError
from stable_audio_serve.core.settings import JobSettings, Settings
from stable_audio_serve.jobs.open import prepare_stores
from stable_audio_serve.jobs.store import database as module
from stable_audio_serve.jobs.store.database import Database, database_url
from stable_audio_serve.jobs.store.job_store import JobStore
from stable_audio_serve.jobs.store.migrations.upgrade import newest_revision
from stable_audio_serve.jobs.store.tables import METADATA
from tests.databases import PostgresServer
from tests.jobs.stores import CONTRACT_KINDS, add, find, open_database

pytestmark = pytest.mark.usefixtures("made_by_alembic")


@pytest.fixture(params=CONTRACT_KINDS)
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of a database without tables."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'new' / 'jobs.db'}"
    url: str = request.getfixturevalue("postgres_url")
    return url


def execute(url: str, statement: str) -> None:
    """Execute an SQL statement directly, without the job store."""
    if url.startswith("sqlite"):
        with sqlite3.connect(url.removeprefix("sqlite:///")) as connection:
            connection.execute(statement)
    else:
        with psycopg.connect(url) as connection:
            connection.execute(statement.encode())


def swap(postgres: PostgresServer, first: str, second: str) -> None:
    """Swap the names of two databases, which ends all connections to them."""
    for name, new in ((first, "moved"), (second, first), ("moved", second)):
        postgres.execute(f"SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE datname = '{name}'")
        postgres.execute(f"ALTER DATABASE {name} RENAME TO {new}")


def test_only_transactions_without_durability_skip_the_disk(empty_url: str) -> None:
    database = open_database(empty_url)
    setting, waits, hasty = (
        ("PRAGMA synchronous", 2, 1) if database.is_sqlite else ("SHOW synchronous_commit", "on", "off")
    )
    for is_durable, expected in ((True, waits), (False, hasty), (True, waits)):
        with database.writing(is_durable=is_durable) as connection:  # always the same pooled connection
            assert connection.execute(sa.text(setting)).scalar_one() == expected
    database.close()


@pytest.mark.server
def test_no_statement_has_a_name_in_the_session(postgres_url: str) -> None:
    """PgBouncer may run each transaction in another session, in which the name is unknown or another statement's."""
    database = open_database(postgres_url)
    for _ in range(10):
        with database.writing() as connection:
            connection.execute(sa.text("SELECT 1"))
    with database.engine.connect() as connection:  # the same pooled connection
        assert connection.execute(sa.text("SELECT count(*) FROM pg_prepared_statements")).scalar_one() == 0
    database.close()


def refusal_of(url: str) -> str:
    """Check that a server cannot start with this database, and return the error message.

    The message must be a single line without the password.
    """
    with pytest.raises(ConfigError) as caught:
        open_database(url).prepare()
    assert caught.value.field == "jobs.database_url"
    assert "jobs.database_url" in caught.value.message
    assert "\n" not in caught.value.message
    password = sa.make_url(url).password
    assert password is None or password not in caught.value.message
    return caught.value.message


def test_a_rehearsal_leaves_no_table(empty_url: str) -> None:
    database = open_database(empty_url)
    database.rehearse()
    assert sa.inspect(database.engine).get_table_names() == []
    database.prepare()
    store = JobStore(database)
    job = add(store)
    database.rehearse()
    assert find(store, job) == job
    database.close()


def fill(store: JobStore) -> None:
    for _ in range(100):
        add(store)


class TestAddresses:
    """Which database URLs are allowed."""

    def test_default_is_a_file_in_the_output_folder(self, tmp_path: Path) -> None:
        database = Database(database_url(None, tmp_path / "outputs"))
        assert list(tmp_path.iterdir()) == []
        add(JobStore(database))
        database.close()
        assert (tmp_path / "outputs" / "jobs.db").is_file()
        assert str(database) == f"SQLite {tmp_path / 'outputs' / 'jobs.db'}"

    @pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg", "postgresql+psycopg2"])
    def test_postgresql_is_named_without_its_password(self, scheme: str) -> None:
        database = open_database(f"{scheme}://user:secret@db.example:6543/jobs?sslmode=require")
        assert str(database) == "PostgreSQL db.example:6543/jobs"

    @pytest.mark.parametrize(
        "url",
        [
            "nonsense",
            "",
            "sqlite://",
            "sqlite:///",
            "sqlite:///:memory:",
            "mysql://u:secret@host/db",
            "postgresql://u:secret@host:port/db",
            "postgresql://u:pass@secret@host/db",
            "sqlite:///file:a?mode=memory&uri=true",
            "://",
            "https://secret",
        ],
    )
    def test_other_urls_stop_the_start(self, tmp_path: Path, url: str) -> None:
        with pytest.raises(ConfigError, match="database_url") as caught:
            database_url(url, tmp_path)
        assert "secret" not in caught.value.message

    def test_missing_postgresql_driver_names_the_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "psycopg", None)
        with pytest.raises(ConfigError, match=r"pip install .*postgres"):
            open_database("postgresql://host/db")

    def test_old_sqlite_names_the_required_version(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 31, 1))
        with pytest.raises(ConfigError, match=r"3\.35"):
            open_database("sqlite:////nowhere/jobs.db")


class TestStart:
    """When a server starts, it creates or upgrades the tables, or fails with a reason in one sentence."""

    def test_creates_every_table_once(self, empty_url: str) -> None:
        for _ in range(2):
            database = open_database(empty_url)
            database.prepare()
            tables = set(sa.inspect(database.engine).get_table_names())
            assert tables == {*METADATA.tables, "alembic_version"}
            database.close()

    def test_first_use_creates_the_tables(self, empty_url: str) -> None:
        database = open_database(empty_url)
        store = JobStore(database)
        job = add(store)
        assert find(store, job) == job
        database.close()

    def test_tables_of_a_version_after_the_next_are_refused(self, empty_url: str) -> None:
        database = open_database(empty_url)
        database.prepare()
        identity = JobStore(database).identity()
        ours = newest_revision()
        beyond = f"{int(ours) + 2:04d}"
        execute(empty_url, f"UPDATE alembic_version SET version_num = '{beyond}'")
        for part in ("newer version", f"revision {beyond}", f"knows {ours}", "start that newer version"):
            assert part in refusal_of(empty_url)
        # A server that was running when the tables were upgraded refuses to continue.
        with pytest.raises(StorageError, match=f"revision {beyond}"):
            database.require_same()
        database.close()
        # Another process of this server, which starts later.
        late = Database(database_url(empty_url, Path("/nowhere")), identity=identity)
        with pytest.raises(StorageError):
            JobStore(late).operators.counts()

    def test_tables_of_another_program_with_revisions_are_refused(self, empty_url: str, tmp_path: Path) -> None:
        (tmp_path / "new").mkdir()
        execute(empty_url, "CREATE TABLE alembic_version (version_num varchar(32))")
        execute(empty_url, "INSERT INTO alembic_version VALUES ('1975ea83b712')")
        assert "1975ea83b712, which is none of ours" in refusal_of(empty_url)

    def test_tables_of_unknown_origin_are_refused(self, tmp_path: Path, empty_url: str) -> None:
        (tmp_path / "new").mkdir()
        execute(empty_url, "CREATE TABLE jobs (salary integer)")
        assert "not ours" in refusal_of(empty_url)

    def test_file_that_is_no_database(self, tmp_path: Path) -> None:
        (tmp_path / "jobs.db").write_text("no database at all, but long enough to be looked at" * 100)
        assert "not a database" in refusal_of(f"sqlite:///{tmp_path / 'jobs.db'}")

    def test_folder_that_cannot_be_created(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("no folder")
        assert str(tmp_path) in refusal_of(f"sqlite:///{tmp_path / 'file' / 'jobs.db'}")
        assert str(tmp_path) in refusal_of(f"sqlite:///{tmp_path}")

    def test_unreachable_server(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        assert "refused" in refusal_of(f"postgresql://user:secret@127.0.0.1:{port}/jobs")

    def test_unknown_host(self) -> None:
        assert "nowhere.invalid" in refusal_of("postgresql://user:secret@nowhere.invalid/jobs")

    @pytest.mark.server  # slow: the shortest connection timeout of PostgreSQL's library is two seconds
    def test_server_that_never_answers(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            assert "timeout" in refusal_of(f"postgresql://user:secret@127.0.0.1:{port}/jobs?connect_timeout=2")

    @pytest.mark.server
    def test_wrong_password(self, postgres: PostgresServer) -> None:
        url = postgres.url().replace(postgres.password, "wrong-password")
        assert "password authentication failed" in refusal_of(url)

    @pytest.mark.server
    def test_unknown_database(self, postgres: PostgresServer) -> None:
        assert '"other" does not exist' in refusal_of(postgres.url("other"))

    @pytest.mark.server
    def test_database_without_an_encoding_keeps_every_text(self, postgres: PostgresServer) -> None:
        """Debian makes such a database where no language is set."""
        database = open_database(postgres.create_database(encoding="SQL_ASCII"))
        store = JobStore(database)
        job = add(store, model="\u96e8")
        assert find(store, job) == job
        database.close()

    @pytest.mark.server
    def test_database_that_cannot_store_every_text(self, postgres: PostgresServer) -> None:
        assert "encoding LATIN1" in refusal_of(postgres.create_database(encoding="LATIN1"))

    @pytest.mark.server
    def test_user_without_the_right_to_create_tables(self, postgres: PostgresServer, postgres_url: str) -> None:
        postgres.execute("CREATE ROLE guest LOGIN PASSWORD 'guest-secret'")
        url = postgres_url.replace(f"{postgres.user}:{postgres.password}", "guest:guest-secret")
        assert "permission denied" in refusal_of(url)

    @pytest.mark.server
    def test_read_only_server(self, tmp_path: Path, postgres_url: str) -> None:
        database = open_database(postgres_url)
        database.prepare()
        database.close()
        name = postgres_url.rpartition("/")[2]
        execute(postgres_url, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        settings = Settings(output_dir=str(tmp_path), jobs=JobSettings(database_url=postgres_url))
        with pytest.raises(ConfigError, match=r"STABLE_AUDIO_DATABASE_URL.* read-only transaction"):
            prepare_stores(settings)


class TestFaults:
    """If the database fails while a server runs, calls raise StorageError, and succeed again after the failure."""

    @pytest.mark.server
    def test_restarted_server_is_used_again(self, postgres: PostgresServer, postgres_url: str) -> None:
        database = open_database(postgres_url)
        store = JobStore(database)
        job = add(store)
        for mode in ("fast", "immediate"):
            postgres.restart(mode)
            assert find(store, job) == job
            add(store)
        database.close()

    @pytest.mark.server
    def test_stopped_server_is_a_storage_error_until_it_is_back(
        self, postgres: PostgresServer, postgres_url: str
    ) -> None:
        database = open_database(postgres_url)
        store = JobStore(database)
        job = add(store)
        postgres.stop()
        try:
            for _ in range(2):
                with pytest.raises(StorageError) as caught:
                    store.clients.get(job.spec.ref)
                assert caught.value.retry_after_s
                with pytest.raises(StorageError):
                    add(store)
        finally:
            postgres.start()
        assert find(store, job) == job
        assert store.operators.counts() == {"queued": 1}
        database.close()

    @pytest.mark.server
    def test_standby_is_not_used(self, postgres: PostgresServer, postgres_url: str) -> None:
        """Such a connection would stay, and refuse every write, after the address leads to the primary again."""
        database = open_database(postgres_url)
        store = JobStore(database)
        job = add(store)
        postgres.restart_as_standby()
        try:
            assert "hot standby" in refusal_of(postgres_url)
            with pytest.raises(StorageError):
                store.clients.get(job.spec.ref)
        finally:
            postgres.promote()
        assert find(store, job) == job
        add(store)
        database.close()

    @pytest.mark.server
    def test_read_only_session_is_not_kept(self, postgres: PostgresServer, postgres_url: str) -> None:
        """The database accepts writes again, but sessions that were opened before keep their default."""
        database = open_database(postgres_url)
        store = JobStore(database)
        add(store)
        option = f"ALTER DATABASE {postgres_url.rpartition('/')[2]} {{}} default_transaction_read_only"
        postgres.execute(f"{option.format('SET')} = on")
        database.engine.dispose()
        with pytest.raises(StorageError):
            add(store)
        postgres.execute(option.format("RESET"))
        add(store)
        database.close()

    @pytest.mark.server
    def test_failover_to_another_database_loses_no_job(self, postgres: PostgresServer, postgres_url: str) -> None:
        """Jobs that the other database accepted would be missing once the first one is back."""
        another_url = postgres.create_database()
        another = JobStore(open_database(another_url))
        job = add(another)  # creates the tables
        another.database.close()
        first = open_database(postgres_url)
        identity = JobStore(first).identity()
        first.close()
        store = JobStore(Database(database_url(postgres_url, Path()), identity=identity))
        own = add(store)
        names = [url.rpartition("/")[2] for url in (postgres_url, another_url)]
        swap(postgres, *names)
        try:
            for _ in range(2):
                with pytest.raises(StoreMovedError):
                    add(store)
                with pytest.raises(StoreMovedError):
                    store.clients.get(job.spec.ref)
        finally:
            swap(postgres, *names)
        assert find(store, own) == own
        assert store.operators.counts() == {"queued": 1}
        store.database.close()
        postgres.drop_database(another_url)

    @pytest.mark.server
    def test_connection_lost_in_a_transaction_changes_nothing(
        self, postgres: PostgresServer, postgres_url: str
    ) -> None:
        database = open_database(postgres_url)
        store = JobStore(database)
        add(store)

        def lose_connection() -> None:
            with database.writing() as connection:
                connection.execute(sa.text("DELETE FROM jobs"))
                own = connection.execute(sa.text("SELECT pg_backend_pid()")).scalar()
                postgres.execute(f"SELECT pg_terminate_backend({own})")
                connection.execute(sa.text("SELECT 1"))

        with pytest.raises(StorageError):
            lose_connection()
        assert store.operators.counts() == {"queued": 1}
        database.close()

    @pytest.mark.server
    def test_process_frozen_in_a_transaction_loses_its_locks(self, postgres_url: str) -> None:
        database = open_database(postgres_url)
        with database.writing() as connection:
            limit = connection.execute(sa.text("SHOW idle_in_transaction_session_timeout")).scalar()
        assert limit == "10s"
        database.close()

    def test_full_disk_has_its_own_error_and_passes(self, tmp_path: Path) -> None:
        database = open_database(f"sqlite:///{tmp_path / 'jobs.db'}")
        store = JobStore(database)
        job = add(store)
        # With this limit, SQLite reports a full disk. The limit applies to the connection, which the pool reuses.
        with database.writing() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(StorageFullError):
            fill(store)
        assert find(store, job) == job
        with database.writing() as connection:
            connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
        add(store)
        database.close()

    @pytest.mark.server
    def test_full_disk_of_the_server_has_the_same_error(
        self, postgres_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        database = open_database(postgres_url)
        store = JobStore(database)
        job = add(store)
        raising = "BEGIN RAISE EXCEPTION 'could not extend file' USING ERRCODE = 'disk_full'; END"
        execute(postgres_url, f"CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$ {raising} $$")
        execute(postgres_url, "CREATE TRIGGER full_disk BEFORE INSERT ON jobs EXECUTE FUNCTION full_disk()")
        database.require_room()
        for write in (partial(add, store), database.require_room):
            with pytest.raises(StorageFullError):
                write()
        monkeypatch.setattr(module, "_FULL_FOR_S", 0.0)
        database.require_room()
        execute(postgres_url, "DROP TRIGGER full_disk ON jobs")
        assert find(store, job) == job
        add(store)
        database.close()

    def test_database_that_cannot_be_opened(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("no folder")
        with pytest.raises(StorageError):
            add(JobStore(Database(database_url(None, tmp_path / "file"))))
