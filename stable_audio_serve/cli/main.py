"""The program `stable-audio-serve`, with all its commands.

All modules of `cli` import large modules only when a command runs, so that the program starts quickly.
"""

from __future__ import annotations

import errno
import io
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from stable_audio_serve import __version__
from stable_audio_serve.cli import admin, jobs, keys, loras, serving, sound
from stable_audio_serve.cli.doctor import doctor
from stable_audio_serve.cli.messages import describe_os_error, fail
from stable_audio_serve.cli.quality import quality
from stable_audio_serve.cli.status import status


class _Commands(TyperGroup):
    """All commands. If the disk for their output is full, they end with a sentence instead of a traceback."""

    def main(self, *args: Any, **options: Any) -> Any:
        try:
            return super().main(*args, **options)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            with suppress(OSError):
                sys.stdout.close()  # otherwise Python writes the rest when it ends, and may end with another exit code
            sys.exit(fail(describe_os_error(error)).exit_code)


app = typer.Typer(cls=_Commands, no_args_is_help=True, rich_markup_mode=None)
for _command in (serving.serve, serving.init, serving.config, doctor, status):
    app.command()(_command)
app.add_typer(sound.app)
app.add_typer(jobs.app, name="jobs")
app.add_typer(loras.app, name="loras")
app.add_typer(keys.app, name="keys")
app.add_typer(admin.app, name="admin")
app.command()(quality)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Self-hosted serving of Stable Audio models over HTTP."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # for names and prompts that the terminal's encoding lacks


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="Checkpoint folder with golden.json and golden.safetensors.")],
    json_file: Annotated[
        typer.FileTextWrite | None, typer.Option("--json", metavar="FILE", help="Write every comparison to this file.")
    ] = None,
) -> None:
    """Check a checkpoint against its stored reference numbers.

    Exit code 1: some components differ; the output names them.
    """
    import json

    from stable_audio_serve.verification import verify as verify_folder

    report = verify_folder(folder, typer.echo)
    if json_file is not None:
        json_file.write(json.dumps(report.as_dict(), indent=1) + "\n")
    if report.failed:
        raise typer.Exit(1)
