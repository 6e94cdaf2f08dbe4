"""The `stable-audio-serve` command. Thin: parses arguments and imports what a command needs only when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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


@app.command()
def config(
    file: Annotated[Path | None, typer.Option("--config", help="Serve config file; without it defaults.")] = None,
) -> None:
    """Print the effective settings, secrets hidden: defaults, file, .env and environment merged."""
    import yaml

    from stable_audio_serve.core.errors import ConfigError
    from stable_audio_serve.core.settings_sources import load_settings

    try:
        settings = load_settings(_application_args(file) if file else None)
    except ConfigError as error:
        typer.echo(f"error: {error.message}", err=True)
        raise typer.Exit(2) from error
    typer.echo(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False), nl=False)


def _application_args(file: Path) -> dict[str, object]:
    """The `args:` of the only application in a Serve config file. Raises ConfigError."""
    import yaml

    from stable_audio_serve.core.errors import ConfigError

    try:
        tree = yaml.safe_load(file.read_text())
        args = tree["applications"][0].get("args") or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: {error}", field=str(file)) from error
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise ConfigError(f"{file}: applications: needs one application", field="applications") from error
    if not isinstance(args, dict):
        raise ConfigError(f"{file}: applications.0.args: must be a mapping", field="args")
    return args


if __name__ == "__main__":
    app()
