"""Dead letters as tables, from the JSON of their routes. What clients wrote is shown as text, never as commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from stable_audio_serve.cli.job_report import new_table, plain, print_wide


def print_letters(letters: Sequence[Mapping[str, Any]]) -> None:
    """A table, newest first."""
    table = new_table("Number", "Job", "Client", "Model", "Failed", "Attempts", "Error", "Prompt")
    for letter in letters:
        error = letter["error"] or {}
        table.add_row(
            str(letter["number"]),
            Text(plain(f"{letter['contract']}/{letter['id']}", limit=None)),
            Text(plain(letter["client"])),
            Text(plain(letter["model"])),
            Text(plain((letter["failed_at"] or "")[:19])),
            str(letter["attempts"]),
            Text(plain(str(error.get("message", "")))),
            Text(plain(letter["prompt"])),
        )
    print_wide(table if letters else "no dead letters")


def print_letter(letter: Mapping[str, Any]) -> None:
    """One of them, a fact a line, and its events."""
    facts = Table.grid(padding=(0, 2))
    for name, value in letter.items():
        if name == "error" and value:
            value = f"{value['code']}: {value['message']}"
        if name != "events" and value not in (None, ""):
            facts.add_row(Text(name, style="bold"), Text(plain(str(value), limit=None)))
    print_wide(facts)
    table = new_table("At", "Stage", "Done", "Message")
    for event in letter.get("events", ()):
        message = Text(plain(event["message"] or "", limit=None))
        table.add_row(plain(event["at"][:19]), plain(event["stage"]), f"{event['fraction']:.0%}", message)
    print_wide(table)
