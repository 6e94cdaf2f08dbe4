"""The commands `init`, `config` and `serve`, and the program `stable-audio-api`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from stable_audio_serve.cli.configuration import ConfigOption, load_configured, read_configuration, say
from stable_audio_serve.cli.messages import fail, plain_errors
from stable_audio_serve.launcher.output import tolerate_lost_output

if TYPE_CHECKING:
    from stable_audio_serve.core.setting_types import ProxyKind
    from stable_audio_serve.serving.serve_file import ServeFile

_Host = Annotated[str | None, typer.Option(help="Address to listen on; default: the file's, else 127.0.0.1.")]
_Port = Annotated[int | None, typer.Option(min=1, max=65535, help="Port; default: the file's, else 8000.")]
_MetricsPort = Annotated[
    int | None, typer.Option(min=1, max=65535, help="Port of the metrics; default: the file's, else a free one.")
]
_Proxy = Annotated[
    Literal["auto", "haproxy", "python"] | None,
    typer.Option(help="Proxy for connections; auto = HAProxy if it can run; default: the setting proxy.kind."),
]

stable_audio_api = typer.Typer(add_completion=False, rich_markup_mode=None)


def init(
    file: Annotated[Path, typer.Argument(help="File to write.")] = Path("serve_config.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Write a configuration to start from.

    The configuration serves the demo model. Its comments show how to serve other models.
    """
    from stable_audio_serve.serving.serve_file import PACKAGED_FILE

    text = PACKAGED_FILE.read_text(encoding="utf-8")  # in a checkout, `file` may be the packaged file itself
    try:
        with file.open("w" if force else "x", encoding="utf-8") as written:
            written.write(text)
    except FileExistsError as error:
        if file.is_dir():
            raise fail(f"{file} is a folder; name a file") from error
        raise fail(f"{file} exists already; --force replaces it") from error
    except OSError as error:
        raise fail(f"{file} cannot be written: {error.strerror}") from error
    option = "" if file == Path("serve_config.yaml") else f" --config {file}"
    typer.echo(f"wrote {file}; start the server with: stable-audio-serve serve{option}")


def config(file: ConfigOption = None) -> None:
    """Print the effective settings, secrets hidden.

    Settings come from the environment, `.env`, the file and the defaults, in this order of precedence.
    """
    import yaml

    from stable_audio_serve.serving.placement import plan_deployments

    with plain_errors():
        settings = load_configured(file)
        plan_deployments(settings)
    typer.echo(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False), nl=False)


def serve(
    file: ConfigOption = None,
    host: _Host = None,
    *,
    port: _Port = None,
    metrics_port: _MetricsPort = None,
    proxy: _Proxy = None,
) -> None:
    """Serve the models of a config file until Ctrl-C.

    Starts Ray on this machine, and stops it at the end.
    """
    tolerate_lost_output()
    with plain_errors():
        found = read_configuration(file)
    _run_server(found, host=host, port=port, metrics_port=metrics_port, proxy=proxy)


@stable_audio_api.command()
def serve_as_stable_audio_3(
    host: _Host = None,
    port: _Port = None,
    *,
    reload: Annotated[bool, typer.Option("--reload", help="Refused: restart the server instead.")] = False,
) -> None:
    """Serve serve_config.yaml if it is here, else the models of the Stable Audio 3 server, until Ctrl-C.

    Environment variables and a `.env` that were written for the Stable Audio 3 server keep their meaning.
    """
    from stable_audio_serve.serving.serve_file import PACKAGED_FILE, find_serve_file, official_models

    if reload:
        raise fail("--reload: not supported; restart the server after a change")
    tolerate_lost_output()
    with plain_errors():
        if find_serve_file(None) == PACKAGED_FILE:
            say("no serve_config.yaml here; serving small-sfx, small-music and medium like the Stable Audio 3 server")
            file = official_models()
        else:
            file = read_configuration(None)
    _run_server(file, host=host, port=port)


def _run_server(
    file: ServeFile,
    *,
    host: str | None,
    port: int | None,
    metrics_port: int | None = None,
    proxy: ProxyKind | None = None,
) -> None:
    """Serve until Ctrl-C. Ends with exit code 2 if the server cannot start. `launch.serve` prints the reason."""
    from stable_audio_serve.core.errors import StableAudioError
    from stable_audio_serve.launcher import launch

    try:
        launch.serve(
            file,
            host=host,
            port=port,
            metrics_port=metrics_port,
            proxy=proxy,
            report=typer.echo,
            print_error=partial(typer.echo, err=True),
        )
    except StableAudioError as error:
        raise typer.Exit(2) from error
