"""`stable-audio-serve admin jobs`: manage jobs in the configured store, with or without a running server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from stable_audio_serve.cli.configuration import ConfigOption, load_configured
from stable_audio_serve.cli.messages import ExitCode, fail, plain, plain_errors, print_json
from stable_audio_serve.cli.remote import JsonOption

if TYPE_CHECKING:
    from stable_audio_serve.core.settings import Settings
    from stable_audio_serve.jobs.job import Job
    from stable_audio_serve.jobs.store.job_store import JobStore

app = typer.Typer(no_args_is_help=True, help="List, show, cancel and retry jobs in the configured store.")

_State = Annotated[
    Literal["queued", "running", "succeeded", "failed", "cancelled"] | None,
    typer.Option(help="Only jobs in this state."),
]
_Name = Annotated[
    str,
    typer.Argument(metavar="ID", help="Id of a job; sa3/ID, aiml/ID, ... if the id is not unique."),
]
_Client = Annotated[str | None, typer.Option("--client", help="Client of the job, if several clients chose its id.")]
_Names = Annotated[list[str], typer.Argument(metavar="ID", help="Ids of jobs, as for `show`.")]


@app.command("list")
def list_jobs(
    state: _State = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Maximum number to list.")] = 50,
    *,
    dead: Annotated[bool, typer.Option("--dead-letters", help="Only jobs that used up their attempts.")] = False,
    as_json: JsonOption = False,
    file: ConfigOption = None,
) -> None:
    """List the jobs of all clients, newest first."""
    from stable_audio_serve.cli import tables

    with _opened(file) as (store, _):
        jobs = [_as_json(job) for job in store.operators.list_all(state=state, dead_letters=dead, limit=limit)]
        counts = store.operators.counts()
    if as_json:
        print_json(jobs)
    elif dead:
        tables.print_dead_letters(jobs)
    else:
        tables.print_jobs(jobs, counts)


@app.command()
def show(name: _Name, client: _Client = None, *, as_json: JsonOption = False, file: ConfigOption = None) -> None:
    """Show a job and its events."""
    from stable_audio_serve.cli import tables

    with _opened(file) as (store, _):
        job = _find(store, name, client=client)
        events = store.clients.events(job.spec.ref)
        found = _as_json(job) | {"events": [asdict(event) | {"at": _iso(event.at)} for event in events]}
    if as_json:
        print_json(found)
    else:
        tables.print_details(found)


@app.command()
def cancel(names: _Names, client: _Client = None, *, file: ConfigOption = None) -> None:
    """Cancel waiting jobs, and stop running ones."""
    import asyncio

    from stable_audio_serve.jobs.open import open_artifacts
    from stable_audio_serve.jobs.queue import JobQueue

    with _opened(file) as (store, settings):
        # A queue and not only the store, because `queue.cancel` also deletes the uploaded file of a waiting job.
        queue = JobQueue(store, open_artifacts(settings))

        def cancel_one(job: Job) -> str:
            outcome, now = asyncio.run(queue.cancel(job.spec.ref))
            if outcome == "already_over" and now is not None:
                raise _RefusalError(f"the job is already over: {now.state}")
            return "cancelled" if outcome == "removed" else "asked to stop; it ends within one denoising step"

        _do_each(store, names, client=client, act=cancel_one)


@app.command()
def retry(names: _Names, client: _Client = None, *, file: ConfigOption = None) -> None:
    """Queue dead letters again, with their attempts reset to 0."""
    with _opened(file) as (store, _):

        def retry_one(job: Job) -> str:
            if store.dead_letters.retry_job(job.spec.ref) is None:
                raise _RefusalError(f"the job is not a dead letter: it is {job.state}")
            return "queued again"

        _do_each(store, names, client=client, act=retry_one)


class _RefusalError(Exception):
    """A command cannot find or change a job. The message is the reason."""


def _do_each(store: JobStore, names: Sequence[str], *, client: str | None, act: Callable[[Job], str]) -> None:
    """Call `act` with each named job and print the result. Ends the command with exit code 2 if any job was refused."""
    num_refused = 0
    for name in names:
        try:
            typer.echo(f"{plain(name)}: {act(_find(store, name, client=client))}")
        except _RefusalError as error:
            typer.echo(f"error: {plain(name)}: {error}", err=True)
            num_refused += 1
    if num_refused:
        raise typer.Exit(ExitCode.REFUSED)


def _find(store: JobStore, name: str, *, client: str | None) -> Job:
    """Return the job that `name` and `client` identify. `name` is a job id, or an API and a job id, such as `sa3/ID`.

    Raises _RefusalError if no job or several jobs match.
    """
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
        raise _RefusalError(f"several jobs have this id; choose one: {', '.join(places)}")
    return jobs[0]


@contextmanager
def _opened(file: Path | None) -> Iterator[tuple[JobStore, Settings]]:
    """Open the configured job store. Expected errors in the block end the command."""
    from stable_audio_serve.core.errors import ConfigError
    from stable_audio_serve.jobs.open import open_store

    _silence_logs()
    with plain_errors():
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
    """Turn off logging, whose lines would appear between the lines of a table."""
    import logging

    import structlog

    if not structlog.is_configured():
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


def _as_json(job: Job) -> dict[str, Any]:
    """Return a job as JSON values, with times in ISO 8601."""
    spec, result, error = job.spec, job.result, job.error
    return {
        "contract": spec.contract,
        "id": spec.id,
        "state": job.state,
        "is_dead_letter": job.is_dead_letter,
        "model": spec.model,
        "mode": spec.mode,
        "prompt": spec.request.prompt,
        "duration_s": spec.request.duration_s,
        "batch_size": spec.request.batch_size,
        "seed": spec.request.seed,
        "priority": spec.request.priority,
        "client": spec.client,
        "idempotency_key": spec.idempotency_key,
        "webhook_url": spec.webhook_url,
        "created_at": _iso(job.created_at),
        "started_at": _iso(job.started_at),
        "completed_at": _iso(job.completed_at),
        "attempts": job.attempts,
        "cancel_requested": job.cancel_requested,
        "stage": job.stage,
        "fraction": job.fraction,
        "eta_s": job.eta_s,
        "owner": job.lease.owner if job.lease else None,
        "fence": job.lease.fence if job.lease else None,
        "error": asdict(error) if error else None,
        "upload_key": spec.upload.file.key if spec.upload else None,
        "artifact_key": result.file.key if result else None,
        "artifact_bytes": result.file.num_bytes if result else None,
        "artifact_sha256": result.file.sha256 if result else None,
    }


def _iso(at: datetime | None) -> str | None:
    return None if at is None else at.isoformat()
