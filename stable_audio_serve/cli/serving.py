"""What the commands that serve have in common."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from stable_audio_serve.core.setting_types import ProxyKind
    from stable_audio_serve.serving.serve_file import ServeFile


def run_server(
    file: ServeFile,
    *,
    host: str | None,
    port: int | None,
    metrics_port: int | None = None,
    proxy: ProxyKind | None = None,
) -> None:
    """Serve until Ctrl-C; exit code 2 when the server cannot start, which it has said by then."""
    from stable_audio_serve.core.errors import StableAudioError
    from stable_audio_serve.launcher import launch

    print_error = partial(typer.echo, err=True)
    try:
        launch.serve(
            file,
            host=host,
            port=port,
            metrics_port=metrics_port,
            proxy=proxy,
            report=typer.echo,
            print_error=print_error,
        )
    except StableAudioError as error:
        raise typer.Exit(2) from error
