"""The answer of `/v1/status` as tables. Knows only its JSON: another version of the server may leave things out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from stable_audio_serve.cli.job_report import plain, print_wide

_PIPE_WIDTH = 200  # characters of a line where there is no terminal
_STAGE_STYLES = {"ready": "green", "loading": "yellow", "waking": "yellow", "failed": "red", "idle": "bright_black"}
_OLD_S = 5.0
_UNKNOWN = "?"


def show(found: Mapping[str, Any]) -> None:
    """Print it once."""
    print_wide(_draw(found))


@contextmanager
def live() -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that shows the newest answer: in place of the one before on a terminal, below it elsewhere."""
    console = _console()
    if not console.is_terminal:
        yield lambda found: console.print(_draw(found))
        return
    with Live(console=console, auto_refresh=False, screen=True) as screen:
        yield lambda found: screen.update(_draw(found), refresh=True)


def _console() -> Console:
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    return console


def _draw(found: Mapping[str, Any]) -> RenderableType:
    if "error" in found:
        return Text(plain(str(found["error"]), limit=None), style="red")
    parts: list[RenderableType] = [_headline(found), _models(found.get("models", {}))]
    if replicas := _replicas(found.get("models", {})):
        parts.append(replicas)
    parts.append(_jobs(found.get("jobs", {})))
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
            line.append(f"\n{plain(str(reason), limit=None)}", style="yellow")
    return line


def _models(models: Mapping[str, Any]) -> Table:
    table = _table("Model", "Stage", "Replicas", "Bounds", "Kept", "Backlog", "Jobs wait", "Rows/step", "Requests/min")
    for name, model in models.items():
        stage = str(model.get("stage", _UNKNOWN))
        states = ", ".join(f"{number} {state}" for state, number in model.get("states", {}).items())
        table.add_row(
            Text(plain(name) + (" *" if model.get("default") else "")),
            Text(plain(stage), style=_STAGE_STYLES.get(stage, "")),
            Text(plain(states) or "none"),
            f"{_number(model.get('min_replicas'))}-{_number(model.get('max_replicas'))}",
            "yes" if model.get("kept") else "",
            _seconds(model.get("backlog_s")),
            _seconds(model.get("waiting_jobs_s")),
            _mean(model.get("rows_per_step")),
            _number(model.get("requests_per_minute")),
        )
    return table


def _replicas(models: Mapping[str, Any]) -> Table | None:
    table = _table("Replica", "Model", "Device", "Precision", "Requests", "Per min", "Backlog", "Rows/step", "Said")
    for name, model in models.items():
        for replica in model.get("replicas", ()):
            age_s = replica.get("age_s")
            is_old = age_s is not None and age_s > _OLD_S
            table.add_row(
                Text(plain(str(replica.get("id", _UNKNOWN)))),
                Text(plain(name)),
                Text(plain(str(replica.get("device") or _UNKNOWN))),
                Text(plain(str(replica.get("dtype") or _UNKNOWN))),
                _number(replica.get("requests")),
                _number(replica.get("requests_per_minute")),
                _seconds(replica.get("backlog_s")),
                _mean(replica.get("rows_per_step")),
                Text(f"{_seconds(age_s)} ago", style="red" if is_old else ""),
            )
    return table if table.row_count else None


def _jobs(jobs: Mapping[str, Any]) -> Text:
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
            line.append(f"\njob store: {plain(str(problem), limit=None)}", style="yellow")
    return line


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    for name in columns:
        table.add_column(name, no_wrap=True)
    return table


def _number(value: object) -> str:
    return _UNKNOWN if value is None else str(value)


def _seconds(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:.1f} s"


def _mean(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
