"""`stable-audio-serve doctor`: check whether this machine can serve a configuration, without a server."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stable_audio_serve.cli.configuration import ConfigOption
from stable_audio_serve.cli.messages import ExitCode, plain, plain_errors, print_json
from stable_audio_serve.cli.remote import JsonOption

if TYPE_CHECKING:
    from stable_audio_serve.doctor.findings import Finding

_COLOURS = {"ok": "green", "warning": "yellow", "failure": "red"}
_STATE_WIDTH, _CHECK_WIDTH = 8, 22


def doctor(
    file: ConfigOption = None,
    *,
    features: Annotated[bool, typer.Option("--features", help="Also try each accelerated feature alone.")] = False,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write what an issue report needs, without secrets.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check whether this machine can serve a configuration.

    Needs no server and changes nothing. Checks Python, torch, GPUs, ports and stores, and for each model its files,
    memory and speed. Exit code 1: a check fails; its line names the remedy.
    """
    from stable_audio_serve.doctor.examine import Examination

    with plain_errors():
        examination = Examination(file)
        found = []
        for finding in examination.run(features=features):
            found.append(finding)
            if not as_json:
                _print(finding)
        if report is not None:
            from stable_audio_serve.doctor.issue_report import write_report

            write_report(report, examination, found=found)
    is_ok = all(finding.state != "failure" for finding in found)
    if as_json:
        print_json({"ok": is_ok, "findings": [asdict(finding) for finding in found]})
    else:
        typer.echo(_summary(found))
    if report is not None:
        typer.echo(f"wrote {report}; read it before you publish it", err=True)
    if not is_ok:
        raise typer.Exit(ExitCode.FAILED)


def _print(finding: Finding) -> None:
    state = typer.style(finding.state.ljust(_STATE_WIDTH), fg=_COLOURS[finding.state])
    color = False if os.environ.get("NO_COLOR") else None  # None: only on a terminal
    typer.echo(f"{state}{finding.check.ljust(_CHECK_WIDTH)} {plain(finding.message)}", color=color)
    if finding.advice:
        typer.echo(f"{' ' * (_STATE_WIDTH + _CHECK_WIDTH)} -> {plain(finding.advice)}")


def _summary(found: Sequence[Finding]) -> str:
    counts = {state: sum(finding.state == state for finding in found) for state in ("failure", "warning")}
    named = [f"{count} {state}{'s' if count > 1 else ''}" for state, count in counts.items() if count]
    return ", ".join(named) or "all ok"
