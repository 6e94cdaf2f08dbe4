"""Tables of jobs, dead letters, models and a server's status, and the progress line.

Text from clients and servers is printed without control characters, which a terminal would interpret.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from stable_audio_serve.cli.messages import plain

if TYPE_CHECKING:
    from stable_audio_serve.client import Adapter, Job, JobProgress, Model

_WIDEST = 2000  # characters per line of a table; a narrower terminal wraps the lines
_PIPE_WIDTH = 200  # characters per line of the server status if the output is not a terminal
_CELL = 60  # most characters of a table's cell; the rest is cut off
_JOB_STYLES = {
    "queued": "cyan",
    "running": "yellow",
    "succeeded": "green",
    "failed": "red",
    "cancelled": "bright_black",
}
_STAGE_STYLES = {"ready": "green", "loading": "yellow", "waking": "yellow", "failed": "red", "idle": "bright_black"}
_OLD_S = 5.0
_UNKNOWN = "?"

Row = Mapping[str, Any]  # a job or dead letter as JSON


def print_models(models: Sequence[Model]) -> None:
    """Print the models of a server."""
    table = new_table("Model", "Longest", "Rate", "Channels", "Steps", "Guidance", "Aliases")
    for model in models:
        name = f"{model.name} (default)" if model.is_default else model.name
        rate, longest = f"{model.sample_rate_hz:,} Hz", f"{model.max_duration_s:g} s"
        guidance, aliases = f"{model.default_cfg_scale:g}", ", ".join(model.aliases)
        table.add_row(name, longest, rate, str(model.channels), str(model.default_steps), guidance, aliases)
    print_wide(table)


def print_adapters(adapters: Sequence[Adapter]) -> None:
    """Print the adapters of a server's models."""
    table = new_table("Adapter", "Model", "Type", "Rank", "SHA-256")
    for adapter in adapters:
        table.add_row(*map(_cell, (adapter.name, adapter.model, adapter.type, adapter.rank, adapter.sha256[:12])))
    print_wide(table if adapters else "no adapters")


def print_own_jobs(jobs: Sequence[Job]) -> None:
    """Print the jobs of a client."""
    table = new_table("Job", "Status", "Model", "Seconds", "Created", "Error")
    for job in jobs:
        created = _when(job.created_at.isoformat())
        table.add_row(job.id, job.status, job.model, f"{job.duration_s:g}", created, _cell(job.error))
    print_wide(table)


def print_jobs(jobs: Sequence[Row], counts: Mapping[Any, int]) -> None:
    """Print jobs of all clients, and the number of jobs in each state."""
    table = new_table("Job", "Client", "State", "Model", "Created", "Attempts", "Progress", "Prompt")
    for job in jobs:
        state = Text(job["state"], style=_JOB_STYLES[job["state"]])
        progress = f"{job['stage']} {job['fraction']:.0%}"
        row = (_cell(job["client"]), state, _cell(job["model"]), _when(job["created_at"]), str(job["attempts"]))
        table.add_row(_job_name(job), *row, progress, _cell(job["prompt"]))
    print_wide(table)
    print_wide(", ".join(f"{count} {state}" for state in _JOB_STYLES if (count := counts.get(state))) or "no jobs")


def print_dead_letters(letters: Sequence[Row]) -> None:
    """Print dead letters, with their numbers if `letters` contains numbers."""
    number = ["Number"] if any("number" in letter for letter in letters) else []
    table = new_table(*number, "Job", "Client", "Model", "Failed", "Attempts", "Error", "Prompt")
    for letter in letters:
        error = (letter["error"] or {}).get("message")
        row = (_job_name(letter), _cell(letter["client"]), _cell(letter["model"]))
        failed_at = _when(letter.get("failed_at") or letter.get("completed_at"))
        more = (failed_at, str(letter["attempts"]), _cell(error), _cell(letter["prompt"]))
        table.add_row(*([str(letter["number"])] if number else []), *row, *more)
    print_wide(table if letters else "no dead letters")


def print_details(job: Row) -> None:
    """Print a job or dead letter, one field per line, and its events."""
    facts = Table.grid(padding=(0, 2))
    for name, value in job.items():
        if name == "error" and value:
            value = f"{value['code']}: {value['message']}"
        if name != "events" and value not in (None, ""):
            facts.add_row(Text(name, style="bold"), Text(plain(str(value), limit=_CELL if name == "prompt" else None)))
    print_wide(facts)
    table = new_table("At", "Stage", "Done", "Message")
    for event in job.get("events", ()):
        done, message = f"{event['fraction']:.0%}", Text(plain(event["message"] or ""))
        table.add_row(_when(event["at"]), _cell(event["stage"]), done, message)
    print_wide(table)


def print_status(found: Mapping[str, Any]) -> None:
    """Print a response of `/v1/status`. Parts of the response may be missing if the server has another version."""
    print_wide(_draw_status(found))


@contextmanager
def live_status() -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yield a function that shows a response of `/v1/status`. On a terminal, a response replaces the previous one."""
    console = _console()
    if not console.is_terminal:
        yield lambda found: console.print(_draw_status(found))
        return
    with Live(console=console, auto_refresh=False, screen=True) as screen:
        yield lambda found: screen.update(_draw_status(found), refresh=True)


def _console() -> Console:
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    return console


def _draw_status(found: Mapping[str, Any]) -> RenderableType:
    if "error" in found:
        return Text(plain(str(found["error"])), style="red")
    parts: list[RenderableType] = [_headline(found), _models(found.get("models", {}))]
    if replicas := _replicas(found.get("models", {})):
        parts.append(replicas)
    parts.append(_count_jobs(found.get("jobs", {})))
    return Group(*parts)


def _headline(found: Mapping[str, Any]) -> Text:
    status = str(found.get("status", _UNKNOWN))
    line = Text(f"{plain(str(found.get('server', '')))} {plain(str(found.get('version', '')))}  ")
    line.append(plain(status), style="green" if found.get("ready") else "red")
    line.append(f"  backlog {_seconds(found.get('backlog_s'))}")
    drain = found.get("draining", {})
    if drain.get("state", "no") != "no":
        left = f"{_number(drain.get('requests'))} requests and {_number(drain.get('jobs'))} jobs left"
        line.append(f"  {plain(str(drain['state']))}: {left}", style="yellow")
    for reason in (*found.get("reasons", ()), found.get("reason")):
        if reason:
            line.append(f"\n{plain(str(reason))}", style="yellow")
    return line


def _models(models: Mapping[str, Any]) -> Table:
    table = new_table(
        "Model", "Stage", "Replicas", "Bounds", "Kept", "Backlog", "Jobs wait", "Rows/step", "Requests/min"
    )
    for name, model in models.items():
        stage = str(model.get("stage", _UNKNOWN))
        states = ", ".join(f"{number} {state}" for state, number in model.get("states", {}).items())
        table.add_row(
            Text(plain(name, limit=_CELL) + (" *" if model.get("default") else "")),
            Text(plain(stage, limit=_CELL), style=_STAGE_STYLES.get(stage, "")),
            _cell(states or "none"),
            f"{_number(model.get('min_replicas'))}-{_number(model.get('max_replicas'))}",
            "yes" if model.get("kept") else "",
            _seconds(model.get("backlog_s")),
            _seconds(model.get("waiting_jobs_s")),
            _mean(model.get("rows_per_step")),
            _number(model.get("requests_per_minute")),
        )
    return table


def _replicas(models: Mapping[str, Any]) -> Table | None:
    table = new_table(
        "Replica", "Model", "Device", "Precision", "In progress", "Per min", "Backlog", "Rows/step", "Updated"
    )
    for name, model in models.items():
        for replica in model.get("replicas", ()):
            age_s = replica.get("age_s")
            is_old = age_s is not None and age_s > _OLD_S
            table.add_row(
                _cell(replica.get("id", _UNKNOWN)),
                _cell(name),
                _cell(replica.get("device") or _UNKNOWN),
                _cell(replica.get("dtype") or _UNKNOWN),
                _number(replica.get("requests")),
                _number(replica.get("requests_per_minute")),
                _seconds(replica.get("backlog_s")),
                _mean(replica.get("rows_per_step")),
                Text(f"{_seconds(age_s)} ago", style="red" if is_old else ""),
            )
    return table if table.row_count else None


def _count_jobs(jobs: Mapping[str, Any]) -> Text:
    states = ("queued", "running", "succeeded", "failed", "cancelled")
    line = Text("Jobs: " + ", ".join(f"{_number(jobs.get(state))} {state}" for state in states))
    dead = jobs.get("dead_letters")
    line.append(f", {_number(dead)} dead letters", style="red" if dead else "")
    if jobs.get("waited_s"):
        line.append(f"; the first has waited {_seconds(jobs['waited_s'])}")
    store = jobs.get("store", {})
    problems: Sequence[object] = [store.get("reason") or store.get("state")] if store.get("state") != "ok" else []
    for problem in dict.fromkeys([*problems, jobs.get("reason")]):
        if problem:
            line.append(f"\njob store: {plain(str(problem))}", style="yellow")
    return line


def _number(value: object) -> str:
    return _UNKNOWN if value is None else str(value)


def _seconds(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:.1f} s"


def _mean(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


@contextmanager
def progress_line(*, quiet: bool) -> Iterator[Callable[[JobProgress], None]]:
    """Yield a function that shows progress on standard error, or does nothing if standard error is not a terminal."""
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("waiting", total=1.0, left="")

        def show(progress: JobProgress) -> None:
            place = {None: "", 0: ", next"}.get(progress.queue_position, f", {progress.queue_position} ahead")
            if progress.num_sections:
                place += f", section {min((progress.sections_done or 0) + 1, progress.num_sections)}"
                place += f" of {progress.num_sections}"
            left = "" if progress.eta_s is None else f"{progress.eta_s:.0f} s left"
            bar.update(task, completed=progress.fraction, description=f"{progress.stage}{place}", left=left)

        yield show


def new_table(*columns: str) -> Table:
    """Return a table whose cells are not wrapped."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    for name in columns:
        table.add_column(name, no_wrap=True)
    return table


def print_wide(what: RenderableType) -> None:
    """Print a table or a line in its full width, even if the terminal is narrower."""
    Console(highlight=False, markup=False, emoji=False, width=_WIDEST).print(what)


def _job_name(job: Row) -> Text:
    return Text(plain(f"{job['contract']}/{job['id']}"))


def _cell(text: object) -> Text:
    return Text(plain("" if text is None else str(text), limit=_CELL))


def _when(text: str | None) -> str:
    """Convert a time in ISO 8601 to local time. Returns the empty string for None."""
    try:
        return "" if text is None else datetime.fromisoformat(text).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except ValueError:
        return plain(text or "", limit=_CELL)
