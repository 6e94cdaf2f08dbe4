"""The `stable-audio-serve` command. Thin: parses arguments and imports what a command needs only when it runs."""

from __future__ import annotations

import typer

from stable_audio_serve import __version__

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)


@app.callback()
def main() -> None:
    """Serve Stable Audio models."""


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


if __name__ == "__main__":
    app()
