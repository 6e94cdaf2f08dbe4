"""`stable-audio-serve admin jobs` on a job store in SQLite or PostgreSQL, while a server has the store open."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from stable_audio_serve.artifacts.store import StoredFile
from stable_audio_serve.cli import app
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.jobs.job import Job, JobError, JobUpload
from stable_audio_serve.jobs.store.job_store import JobStore
from tests.jobs.stores import RESULT, add, find, lease, open_database, postgres_with_tables, report, store_url
from tests.patience import PATIENCE_S

pytestmark = pytest.mark.server

__all__ = ["postgres_with_tables", "store_url"]

DEAD = JobError("unavailable", "the model lost its replica too often")
HOSTILE = "\x1b]0;owned\x07\x1b[31mred\x9b2J \u202egnp.exe [bold]b[/bold] :smile:\r\nnext \ud83c " + "long " * 50

Run = Callable[..., Result]


@pytest.fixture
def store(store_url: str) -> Iterator[JobStore]:
    store = JobStore(open_database(store_url))
    store.database.prepare()
    yield store
    store.database.close()


@pytest.fixture
def run(store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Returns a function that runs `stable-audio-serve admin jobs` on the job store at `store_url`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STABLE_AUDIO_DATABASE_URL", store_url)
    monkeypatch.setenv("STABLE_AUDIO_OUTPUT_DIR", str(tmp_path / "jobs"))
    return lambda *arguments: CliRunner().invoke(app, ["admin", "jobs", *arguments])


def errors(text: str) -> list[str]:
    """Returns the lines of standard error after the first line. Checks that the first line names the configuration."""
    first, *others = text.splitlines()
    assert first.startswith("configuration: ")
    return others


def expect(result: Result, *words: str, code: int = 0) -> str:
    """Check that a command ended with `code` and printed these words, and no traceback or control characters.

    Returns the output.
    """
    assert result.exit_code == code, result.output
    messages = errors(result.stderr)
    assert all(line.startswith("error: ") for line in messages)
    assert bool(messages) == bool(code)
    assert all(char.isprintable() or char == "\n" for char in result.output)
    for word in words:
        assert word in result.output
    return result.output


def load(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    assert result.stdout.isascii()
    return json.loads(result.stdout)


def add_one_of_each(store: JobStore) -> dict[str, Job]:
    """Add a job in each state, and a failed job that is a dead letter.

    Returns the jobs by state. The key of the dead letter is "dead".
    """
    jobs = {"succeeded": add(store), "failed": add(store), "dead": add(store), "running": add(store)}
    for _ in jobs:
        lease(store)
    leased = {name: find(store, job) for name, job in jobs.items()}
    store.runners.succeed(leased["succeeded"], RESULT)
    store.runners.fail(leased["failed"], JobError("invalid", "steps: too many", "steps"))
    store.runners.fail(leased["dead"], DEAD, is_dead_letter=True)
    jobs |= {"cancelled": add(store), "queued": add(store)}
    store.clients.cancel(jobs["cancelled"].spec.ref)
    return {name: find(store, job) for name, job in jobs.items()}


def test_jobs_are_listed_newest_first_with_counts(store: JobStore, run: Run) -> None:
    jobs = add_one_of_each(store)
    output = expect(run("list"), "1 queued, 1 running, 1 succeeded, 2 failed, 1 cancelled")
    rows = [line for line in output.splitlines() if "sa3/" in line]
    assert [row.split()[0] for row in rows] == [f"sa3/{job.spec.id}" for job in list(jobs.values())[::-1]]
    assert [row.split()[1] for row in rows] == [job.state for job in list(jobs.values())[::-1]]


def test_a_list_can_be_limited_to_a_state(store: JobStore, run: Run) -> None:
    jobs = add_one_of_each(store)
    for state in ("queued", "running", "succeeded", "failed", "cancelled"):
        listed = load(run("list", "--state", state, "--json"))
        assert [job["id"] for job in listed] == [job.spec.id for job in list(jobs.values())[::-1] if job.state == state]
        assert {job["state"] for job in listed} == {state}


def test_a_list_can_be_limited_to_a_number(store: JobStore, run: Run) -> None:
    jobs = [add(store) for _ in range(4)]
    assert [job["id"] for job in load(run("list", "--limit", "2", "--json"))] == [job.spec.id for job in jobs[:1:-1]]
    assert expect(run("list", "--limit", "1")).count("sa3/") == 1


def test_an_empty_store(store: JobStore, run: Run) -> None:
    expect(run("list"), "no jobs")
    expect(run("list", "--dead-letters"), "no dead letters")
    assert load(run("list", "--json")) == []


def test_dead_letters_show_their_error(store: JobStore, run: Run) -> None:
    dead = add_one_of_each(store)["dead"]
    output = expect(run("list", "--dead-letters"), f"sa3/{dead.spec.id}", DEAD.message)
    assert output.count("sa3/") == 1
    (letter,) = load(run("list", "--dead-letters", "--json"))
    assert (letter["id"], letter["is_dead_letter"], letter["error"]["code"]) == (dead.spec.id, True, "unavailable")


def test_show_prints_a_job_and_its_events(store: JobStore, run: Run) -> None:
    job = add(store, client="0123456789abcdef", webhook_url="https://example.com/hook", idempotency_key="order-1")
    leased = lease(store, "runner-7")
    report(store, leased, stage="denoising", fraction=0.25, eta_s=3.0)
    output = expect(run("show", job.spec.id), "running", "runner-7", "0123456789abcdef", "order-1", "25%")
    assert output.count("denoising") == 2
    shown = load(run("show", f"sa3/{job.spec.id}", "--json"))
    assert (shown["state"], shown["owner"], shown["fence"], shown["attempts"]) == ("running", "runner-7", 1, 1)
    assert shown["prompt"] == "rain"
    assert [event["message"] for event in shown["events"]] == ["queued", "started", None]
    store.runners.succeed(leased, RESULT)
    assert load(run("show", job.spec.id, "--json"))["artifact_sha256"] == RESULT.file.sha256


def test_control_characters_of_clients_are_removed(store: JobStore, run: Run) -> None:
    job = add(store, request=GenerationRequest(prompt=HOSTILE, duration_s=1.0, seed=7))
    store.runners.fail(lease(store), JobError("invalid", "\x1b[2Jno \x07"), is_dead_letter=True)
    for arguments in (("list",), ("list", "--dead-letters"), ("show", job.spec.id)):
        output = expect(run(*arguments), "[bold]b[/bold] :smile: next")
        assert "long " * 20 not in output
    (listed,) = load(run("list", "--json"))
    assert listed["prompt"].startswith("\x1b]0;owned\x07")


def test_an_id_needs_no_contract_if_it_is_unique(store: JobStore, run: Run) -> None:
    fal = add(store, contract="fal", id="7875a82d-0991-47c8-99fa-bdd57f4f0303")
    aiml = add(store, contract="aiml", id="ed58c4e0-2ed6-429f-91a1-b2c13a89ff46:stable-audio")
    for job in (fal, aiml):
        for name in (job.spec.id, f"{job.spec.contract}/{job.spec.id}"):
            assert load(run("show", name, "--json"))["contract"] == job.spec.contract
    other = "aiml" if fal.spec.contract == "fal" else "fal"
    expect(run("show", f"{other}/{fal.spec.id}"), "no such job", code=2)


def test_an_ambiguous_id_is_refused(store: JobStore, run: Run) -> None:
    for contract in ("sa3", "fal"):
        add(store, contract=contract, id="a" * 32)
    expect(
        run("cancel", "a" * 32),
        f"several jobs have this id; choose one: sa3/{'a' * 32} --client '', fal/{'a' * 32} --client ''",
        code=2,
    )
    expect(run("cancel", f"fal/{'a' * 32}"), "cancelled")
    assert [job.state for job in store.operators.list_all()] == ["cancelled", "queued"]


def test_jobs_of_all_clients_are_listed_with_their_client(store: JobStore, run: Run) -> None:
    for client in ("alice", "bob"):
        add(store, client=client, id="a" * 32, id_is_chosen=True)
    output = expect(run("list"), "alice", "bob")
    assert output.count(f"sa3/{'a' * 32}") == 2
    for name in ("a" * 32, f"sa3/{'a' * 32}"):
        expect(run("show", name), "--client 'alice'", "--client 'bob'", code=2)
        assert load(run("show", name, "--client", "bob", "--json"))["client"] == "bob"
    expect(run("cancel", "a" * 32, "--client", "alice"), "cancelled")
    expect(run("retry", "a" * 32, "--client", "carol"), "no such job", code=2)
    assert {job.spec.client: job.state for job in store.operators.list_all()} == {"alice": "cancelled", "bob": "queued"}


def test_an_unknown_job_is_reported_in_one_sentence(store: JobStore, run: Run) -> None:
    names = ["x", "", "/", "sa3/", "\x00", "\x1b[31m", "nope/" + "a" * 32, "a" * 5000, "'; --"]
    calls = [("show", name) for name in names] + [("cancel", "x"), ("retry", "x")]
    for command, name in calls:
        _, message = expect(run(command, name), "no such job", code=2).splitlines()
        assert message.startswith("error: "), (command, name)


def test_cancelling(store: JobStore, run: Run, tmp_path: Path) -> None:
    upload = tmp_path / "jobs" / "uploads" / ("b" * 32)
    upload.parent.mkdir(parents=True)
    upload.write_bytes(b"abc")
    file = StoredFile(f"uploads/{'b' * 32}", "application/octet-stream", "upload", 3, "0" * 64)
    running, waiting = add(store), add(store, upload=JobUpload(file, "init", 1.0))
    lease(store)
    expect(run("cancel", running.spec.id, waiting.spec.id), f"{waiting.spec.id}: cancelled", "asked to stop")
    assert find(store, waiting).state == "cancelled"
    assert find(store, running).cancel_requested
    assert not upload.exists()
    expect(run("cancel", waiting.spec.id), "the job is already over: cancelled", code=2)


def test_only_a_dead_letter_can_be_retried(store: JobStore, run: Run) -> None:
    jobs = add_one_of_each(store)
    for name, job in jobs.items():
        if name != "dead":
            expect(run("retry", job.spec.id), f"the job is not a dead letter: it is {job.state}", code=2)
            assert find(store, job) == job
    expect(run("retry", jobs["dead"].spec.id), "queued again")
    again = find(store, jobs["dead"])
    assert (again.state, again.attempts, again.error) == ("queued", 0, None)
    expect(run("list", "--dead-letters"), "no dead letters")


def test_one_failed_retry_does_not_prevent_others(store: JobStore, run: Run) -> None:
    jobs = add_one_of_each(store)
    result = run("retry", "nope", jobs["dead"].spec.id)
    assert (result.exit_code, errors(result.stderr)) == (2, ["error: nope: no such job"])
    assert find(store, jobs["dead"]).state == "queued"


def test_invalid_arguments_are_refused(run: Run, store: JobStore) -> None:
    for arguments in (("list", "--state", "done"), ("list", "--limit", "0"), ("show",), ("nope",)):
        assert run(*arguments).exit_code == 2


def test_a_missing_store_is_reported_in_one_sentence(
    run: Run, store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STABLE_AUDIO_DATABASE_URL", f"sqlite:///{tmp_path}/nowhere/jobs.db")
    expect(run("list"), "there are no jobs yet", code=2)
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "text").write_text("no database at all, but long enough for a header of one" * 20)
    monkeypatch.setenv("STABLE_AUDIO_DATABASE_URL", f"sqlite:///{tmp_path}/text")
    assert len(errors(expect(run("list"), code=2))) == 1
    monkeypatch.setenv("STABLE_AUDIO_DATABASE_URL", "postgresql://me:secret@127.0.0.1:1/jobs")
    assert "secret" not in expect(run("list"), "127.0.0.1", code=2)
    monkeypatch.setenv("STABLE_AUDIO_DATABASE_URL", "mysql://h/db")
    expect(run("list"), "jobs.database_url", code=2)


def test_the_config_file_names_the_store(
    run: Run, store: JobStore, store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("STABLE_AUDIO_DATABASE_URL")
    job = add(store)
    tree = {"applications": [{"args": {"jobs": {"database_url": store_url}}}]}
    (tmp_path / "mine.yaml").write_text(json.dumps(tree))
    assert load(run("show", job.spec.id, "--json", "--config", "mine.yaml"))["id"] == job.spec.id
    (tmp_path / "mine.yaml").rename("serve_config.yaml")  # the default path of the configuration
    assert load(run("show", job.spec.id, "--json"))["id"] == job.spec.id
    expect(run("list", "--config", "mine.yaml"), "mine.yaml", code=2)


@pytest.mark.server
def test_the_command_runs_as_a_process(store: JobStore, store_url: str, tmp_path: Path) -> None:
    job = add(store)
    command = [sys.executable, "-m", "stable_audio_serve.cli", "admin", "jobs", "cancel", job.spec.id, "nope"]
    environment = os.environ | {"STABLE_AUDIO_DATABASE_URL": store_url, "STABLE_AUDIO_OUTPUT_DIR": str(tmp_path)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert (done.returncode, done.stdout) == (2, f"{job.spec.id}: cancelled\n")
    assert errors(done.stderr) == ["error: nope: no such job"]
    assert find(store, job).state == "cancelled"
