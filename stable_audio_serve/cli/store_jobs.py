"""`stable-audio-serve admin jobs`: an operator's look at the job store, beside a running server or without one.

Imports what a command needs only when it runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from stable_audio_serve.cli.configuration import ConfigOption, load_configured
from stable_audio_serve.cli.endings import Ending, fail, said_plainly

if TYPE_CHECKING:
    from stable_audio_serve.core.settings import Settings
    from stable_audio_serve.jobs.job import Job
    from stable_audio_serve.jobs.store.job_store import JobStore

app = typer.Typer(no_args_is_help=True, help="List, show, cancel and retry jobs in the configured store.")

_Limit = Annotated[int, typer.Option(min=1, max=10_000, help="Most jobs to list.")]
_Json = Annotated[bool, typer.Option("--json", help="As JSON, with everything there is.")]
_State = Annotated[
    Literal["queued", "running", "succeeded", "failed", "cancelled"] | None, typer.Option(help="Only such jobs.")
]
_Name = Annotated[
    str, typer.Argument(metavar="ID", help="A job's id; sa3/ID, aiml/ID or fal/ID where it is not unique.")
]
_Client = Annotated[str | None, typer.Option("--client", help="Whose job, where several clients chose its id.")]
_Names = Annotated[list[str], typer.Argument(metavar="ID", help="Jobs' ids, as of `show`.")]


@app.command("list")
def list_jobs(state: _State = None, limit: _Limit = 50, *, as_json: _Json = False, file: ConfigOption = None) -> None:
    """Everybody's jobs, newest first."""
    from stable_audio_serve.cli import job_report

    with _opened(file) as (store, _):
        jobs, counts = store.operators.list_all(state=state, limit=limit), store.operators.counts()
    if as_json:
        _print_json([job_report.as_dict(job) for job in jobs])
    else:
        job_report.print_jobs(jobs, counts)


@app.command("dead-letters")
def list_dead_letters(limit: _Limit = 50, as_json: _Json = False, *, file: ConfigOption = None) -> None:
    """List jobs that failed by no fault of their own.

    They are not tried again by themselves.
    """
    from stable_audio_serve.cli import job_report

    with _opened(file) as (store, _):
        jobs = store.operators.list_all(dead_letters=True, limit=limit)
    if as_json:
        _print_json([job_report.as_dict(job) for job in jobs])
    else:
        job_report.print_dead_letters(jobs)


@app.command()
def show(name: _Name, client: _Client = None, *, as_json: _Json = False, file: ConfigOption = None) -> None:
    """One job and its events."""
    from stable_audio_serve.cli import job_report

    with _opened(file) as (store, _):
        job = _find(store, name, client=client)
        events = store.clients.events(job.spec.ref)
    if as_json:
        _print_json(job_report.as_dict(job) | {"events": [job_report.event_as_dict(event) for event in events]})
    else:
        job_report.print_job(job, events)


@app.command()
def cancel(names: _Names, client: _Client = None, *, file: ConfigOption = None) -> None:
    """End jobs that wait, and ask those that run to stop."""
    import asyncio

    from stable_audio_serve.jobs.open import open_artifacts
    from stable_audio_serve.jobs.queue import JobQueue

    with _opened(file) as (store, settings):
        queue = JobQueue(store, open_artifacts(settings))  # it also deletes the upload of a job that never began

        def cancel_one(job: Job) -> str:
            outcome, now = asyncio.run(queue.cancel(job.spec.ref))
            if outcome == "already_over" and now is not None:
                raise _RefusalError(f"it is over: {now.state}")
            return "cancelled" if outcome == "removed" else "asked to stop; it ends within one denoising step"

        _do_each(store, names, client=client, act=cancel_one)


@app.command()
def retry(names: _Names, client: _Client = None, *, file: ConfigOption = None) -> None:
    """Let dead letters wait again, with new attempts."""
    with _opened(file) as (store, _):

        def retry_one(job: Job) -> str:
            if store.dead_letters.retry_job(job.spec.ref) is None:
                raise _RefusalError(f"it is no dead letter: it is {job.state}")
            return "queued again"

        _do_each(store, names, client=client, act=retry_one)


class _RefusalError(Exception):
    """A refused command; the text says why."""


def _do_each(store: JobStore, names: Sequence[str], *, client: str | None, act: Callable[[Job], str]) -> None:
    """Do the same with several jobs; exit 2 after the last one when it could not be done with all of them."""
    from stable_audio_serve.cli.job_report import plain

    num_refused = 0
    for name in names:
        try:
            typer.echo(f"{plain(name)}: {act(_find(store, name, client=client))}")
        except _RefusalError as error:
            typer.echo(f"error: {plain(name)}: {error}", err=True)
            num_refused += 1
    if num_refused:
        raise typer.Exit(Ending.REFUSED)


def _find(store: JobStore, name: str, *, client: str | None) -> Job:
    """The job that an operator names, with or without its contract and client. Raises _RefusalError."""
    from typing import get_args

    from stable_audio_serve.core.ids import JobId
    from stable_audio_serve.jobs.job import Contract

    contract, _, rest = name.partition("/")
    is_one_contract = contract in get_args(Contract)
    jobs = [
        job
        for job in store.operators.find_all(JobId(rest if is_one_contract else name))
        if (job.spec.contract == contract or not is_one_contract) and client in (None, job.spec.client)
    ]
    if not jobs:
        raise _RefusalError("no such job")
    if len(jobs) > 1:
        places = (f"{job.spec.contract}/{job.spec.id} --client {job.spec.client!r}" for job in jobs)
        raise _RefusalError(f"which one? {', '.join(places)}")
    return jobs[0]


@contextmanager
def _opened(file: Path | None) -> Iterator[tuple[JobStore, Settings]]:
    """The configured store. What goes wrong with it is one sentence and an exit code."""
    from stable_audio_serve.core.errors import ConfigError
    from stable_audio_serve.jobs.open import open_store

    _silence_logs()
    with said_plainly():
        settings = load_configured(file)
        store = open_store(settings)
        database = store.database
        if database.is_sqlite and not Path(database.url.database or "").is_file():
            raise ConfigError(f"there are no jobs yet: {database.url.database} does not exist")
        database.prepare()
        try:
            yield store, settings
        except _RefusalError as error:
            raise fail(str(error)) from error
        finally:
            database.close()


def _silence_logs() -> None:
    """Keep a server's log lines out of the tables; errors end in one sentence."""
    import logging

    import structlog

    if not structlog.is_configured():
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))  # ASCII: no control character reaches the terminal
