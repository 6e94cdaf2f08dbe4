"""Jobs as tables and as plain JSON values. What clients wrote is shown as text, never as the terminal's commands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from stable_audio_serve.jobs.job import Job, JobEvent, State

_WIDEST = 2000  # characters of a line; a terminal that is narrower breaks it
_PROMPT_CHARACTERS = 60
_STYLES: Mapping[State, str] = {
    "queued": "cyan",
    "running": "yellow",
    "succeeded": "green",
    "failed": "red",
    "cancelled": "bright_black",
}


def print_jobs(jobs: Sequence[Job], counts: Mapping[State, int]) -> None:
    """A table of jobs, and how many there are in all."""
    table = new_table("Job", "Client", "State", "Model", "Created", "Attempts", "Progress", "Prompt")
    for job in jobs:
        progress = f"{job.stage} {job.fraction:.0%}"
        table.add_row(*_first_cells(job), _when(job.created_at), str(job.attempts), progress, _prompt(job))
    print_wide(table)
    print_wide(", ".join(f"{count} {state}" for state in _STYLES if (count := counts.get(state))) or "no jobs")


def print_dead_letters(jobs: Sequence[Job]) -> None:
    """A table of dead letters, with what they failed of."""
    table = new_table("Job", "Client", "State", "Model", "Failed", "Attempts", "Error", "Prompt")
    for job in jobs:
        error = plain(job.error.message) if job.error else ""
        table.add_row(*_first_cells(job), _when(job.completed_at), str(job.attempts), error, _prompt(job))
    print_wide(table if jobs else "no dead letters")


def print_job(job: Job, events: Iterable[JobEvent]) -> None:
    """Returns one job as text, a fact a line, and its events."""
    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(job).items():
        facts.add_row(Text(name, style="bold"), Text(plain(str(value), limit=None)))
    print_wide(facts)
    table = new_table("Event", "At", "Stage", "Done", "Message")
    for event in events:
        message = plain(event.message or "", limit=None)
        table.add_row(str(event.id), _when(event.at), plain(event.stage), f"{event.fraction:.0%}", message)
    print_wide(table)


def as_dict(job: Job) -> dict[str, Any]:
    """Returns a job as JSON values; times in ISO 8601."""
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
        "error": {"code": error.code, "message": error.message, "field": error.field} if error else None,
        "upload_key": spec.upload.file.key if spec.upload else None,
        "artifact_key": result.file.key if result else None,
        "artifact_bytes": result.file.num_bytes if result else None,
        "artifact_sha256": result.file.sha256 if result else None,
    }


def event_as_dict(event: JobEvent) -> dict[str, Any]:
    """Returns an event as JSON values."""
    return {
        "id": event.id,
        "at": _iso(event.at),
        "stage": event.stage,
        "fraction": event.fraction,
        "eta_s": event.eta_s,
        "message": event.message,
    }


def plain(text: str, *, limit: int | None = _PROMPT_CHARACTERS) -> str:
    """`text` on one line without a character that a terminal would obey, cut to `limit` characters."""
    shown = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in " ".join(text.split()))
    return shown if limit is None or len(shown) <= limit else f"{shown[: limit - 1]}\N{HORIZONTAL ELLIPSIS}"


def _facts(job: Job) -> dict[str, Any]:
    """Returns `as_dict` without what is unset, the prompt cut."""
    facts = as_dict(job) | {"prompt": plain(job.spec.request.prompt)}
    if job.error is not None:
        facts["error"] = f"{job.error.code}: {job.error.message}"
    return {name: value for name, value in facts.items() if value not in (None, "")}


def _first_cells(job: Job) -> tuple[Text, Text, Text, Text]:
    return (
        Text(plain(f"{job.spec.contract}/{job.spec.id}", limit=None)),
        Text(plain(job.spec.client)),
        Text(job.state, style=_STYLES[job.state]),
        Text(plain(job.spec.model)),
    )


def _prompt(job: Job) -> Text:
    return Text(plain(job.spec.request.prompt))


def new_table(*columns: str) -> Table:
    """Returns a table whose cells keep to one line."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    for name in columns:
        table.add_column(name, no_wrap=True)
    return table


def print_wide(what: RenderableType) -> None:
    """Print a table or a line as wide as it is: nothing in it is cut short."""
    Console(highlight=False, markup=False, emoji=False, width=_WIDEST).print(what)


def _when(at: datetime | None) -> str:
    return "" if at is None else at.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _iso(at: datetime | None) -> str | None:
    return None if at is None else at.isoformat()
