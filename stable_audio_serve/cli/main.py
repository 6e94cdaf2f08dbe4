"""The commands. Thin: parses arguments and imports what a command needs only when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from stable_audio_serve import __version__
from stable_audio_serve.cli import admin, jobs, keys, quality, sound
from stable_audio_serve.cli.configuration import ConfigOption, load_configured, read_configuration, refusing
from stable_audio_serve.cli.endings import said_plainly
from stable_audio_serve.cli.serving import run_server
from stable_audio_serve.cli.status import status

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(sound.app)
app.add_typer(jobs.app, name="jobs")
app.add_typer(quality.app, name="quality")
app.add_typer(keys.app, name="keys")
app.add_typer(admin.app, name="admin")
app.command()(status)


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


@app.command()
def openapi(
    out: Annotated[Path | None, typer.Option(help="File to write; without it standard output.")] = None,
) -> None:
    """Write the OpenAPI description of the HTTP API as JSON."""
    import json

    _write(json.dumps(_describe_api(), indent=2) + "\n", out)


@app.command()
def routes(
    out: Annotated[Path | None, typer.Option(help="File to write; without it standard output.")] = None,
) -> None:
    """Write the page of all routes in Markdown."""
    from stable_audio_serve.cli.routes_page import draw_page

    _write(draw_page(_describe_api()), out)


@app.command()
def metrics(
    out: Annotated[Path | None, typer.Option(help="File to write; without it standard output.")] = None,
) -> None:
    """Write the page of all metrics in Markdown."""
    from stable_audio_serve.cli.metrics_page import draw_page

    _write(draw_page(), out)


@app.command()
def init(
    file: Annotated[Path, typer.Argument(help="File to write.")] = Path("serve_config.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace the file if there is one.")] = False,
) -> None:
    """Write a configuration to start from.

    It serves the demo model and shows in comments how to serve others.
    """
    from stable_audio_serve.serving.serve_file import PACKAGED_FILE

    try:
        with file.open("w" if force else "x", encoding="utf-8") as written:
            written.write(PACKAGED_FILE.read_text(encoding="utf-8"))
    except FileExistsError as error:
        typer.echo(f"error: {file} exists already; --force replaces it", err=True)
        raise typer.Exit(2) from error
    except OSError as error:
        typer.echo(f"error: {file} cannot be written: {error.strerror}", err=True)
        raise typer.Exit(2) from error
    option = "" if file == Path("serve_config.yaml") else f" --config {file}"
    typer.echo(f"wrote {file}; start the server with: stable-audio-serve serve{option}")


@app.command()
def config(file: ConfigOption = None) -> None:
    """Print the effective settings, secrets hidden.

    They are merged from defaults, file, .env and environment.
    """
    import yaml

    from stable_audio_serve.serving.placement import plan_deployments

    with refusing():
        settings = load_configured(file)
        plan_deployments(settings)
    typer.echo(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False), nl=False)


@app.command()
def serve(
    file: ConfigOption = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; default: the file's, else 127.0.0.1.")] = None,
    *,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port; default: the file's, else 8000.")] = None,
    metrics_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of the metrics; default: the file's, else a free one.")
    ] = None,
    proxy: Annotated[
        Literal["auto", "haproxy", "python"] | None,
        typer.Option(help="Who accepts connections; auto = HAProxy where it runs; default: the setting proxy.kind."),
    ] = None,
) -> None:
    """Serve the models of a config file until Ctrl-C.

    On this machine, with a Ray of its own.
    """
    with refusing():
        found = read_configuration(file)
    run_server(found, host=host, port=port, metrics_port=metrics_port, proxy=proxy)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="Checkpoint with golden.json and golden.safetensors beside it.")],
    json_file: Annotated[
        typer.FileTextWrite | None,
        typer.Option("--json", metavar="FILE", help="File for every comparison."),
    ] = None,
) -> None:
    """Check a checkpoint's stored reference numbers here.

    Exit code 1 names what this machine does not reproduce.
    """
    import json

    from stable_audio_serve.verification import verify as verify_folder

    report = verify_folder(folder, typer.echo)
    if json_file is not None:
        json_file.write(json.dumps(report.as_dict(), indent=1) + "\n")
    if not report.passed:
        raise typer.Exit(1)


def _describe_api() -> dict[str, Any]:
    from stable_audio_serve.api.app import create_app
    from stable_audio_serve.api.offline import OfflineBackend
    from stable_audio_serve.core.settings import Settings

    return create_app(OfflineBackend(), Settings()).openapi()


def _write(text: str, out: Path | None) -> None:
    if out is None:
        typer.echo(text, nl=False)
        return
    with said_plainly():
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)
