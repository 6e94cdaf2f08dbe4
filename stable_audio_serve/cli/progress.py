"""A line that shows how far a sound is, on standard error and only where somebody can see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from stable_audio_serve.client import JobProgress


@contextmanager
def shown(*, quiet: bool) -> Iterator[Callable[[JobProgress], None]]:
    """Yields what to call with each progress."""
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
            where = {None: "", 0: ", next"}.get(progress.queue_position, f", {progress.queue_position} ahead")
            left = "" if progress.eta_s is None else f"{progress.eta_s:.0f} s left"
            bar.update(task, completed=progress.fraction, description=f"{progress.stage}{where}", left=left)

        yield show
