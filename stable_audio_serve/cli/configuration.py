"""Find the configuration of a command.

It is the file that `--config` names. Without this option, it is `serve_config.yaml` in the current folder, or if there
is none, the packaged file.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from stable_audio_serve.core.settings import Settings
    from stable_audio_serve.serving.serve_file import ServeFile

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="Serve config file; default: serve_config.yaml here, else the packaged one (demo)."),
]


def read_configuration(asked: Path | None, *, quiet: bool = False) -> ServeFile:
    """Return the configuration. Unless `quiet`, print the path of its file to standard error. Raises ConfigError."""
    from stable_audio_serve.serving.serve_file import PACKAGED_FILE, find_serve_file, read_serve_file

    path = find_serve_file(asked)
    packaged = "the packaged one, which serves the demo model; `stable-audio-serve init` copies it here for editing"
    if not quiet:
        say(packaged if path == PACKAGED_FILE else str(path))
    return read_serve_file(path)


def load_configured(asked: Path | None, *, quiet: bool = False) -> Settings:
    """Return the effective settings of the configuration that `read_configuration` finds. Raises ConfigError."""
    from stable_audio_serve.core.settings_sources import load_settings
    from stable_audio_serve.serving.serve_file import PACKAGED_FILE, require_known_keys

    file = read_configuration(asked, quiet=quiet)
    settings = load_settings(file.args)
    if file.path != PACKAGED_FILE:  # skip the check of the packaged file: it imports Ray, which takes 1 s
        require_known_keys(file)
    return settings


def say(which: str) -> None:
    """Print to standard error which configuration is in use. Standard output is for the result of the command."""
    typer.echo(f"configuration: {which}", err=True)
