"""`stable-audio-serve loras`: list, load and unload the adapters of a running server."""

from __future__ import annotations

from typing import Annotated

import typer

from stable_audio_serve.cli.messages import plain_errors, print_json
from stable_audio_serve.cli.remote import JsonOption, KeyFileOption, UrlOption, open_client

app = typer.Typer(no_args_is_help=True, help="List, load and unload the adapters (LoRA) of a server.")

_Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the adapter in requests.")]
_Model = Annotated[str | None, typer.Option("--model", "-m", help="Name of a served model.")]


@app.command("list")
def list_loras(*, as_json: JsonOption = False, url: UrlOption = None, key_file: KeyFileOption = None) -> None:
    """List the adapters of a server's models."""
    with plain_errors(), open_client(url, key_file) as client:
        found = client.list_loras()
    if as_json:
        print_json([dict(adapter.sent) for adapter in found])
        return
    from stable_audio_serve.cli.tables import print_adapters

    print_adapters(found)


@app.command()
def load(
    name: _Name,
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="Absolute path on the server, https or S3 URL, or repository of the hub."),
    ],
    *,
    model: _Model = None,
    url: UrlOption = None,
    key_file: KeyFileOption = None,
) -> None:
    """Add an adapter to a model of a running server.

    Needs a key with the scope `admin`. The server keeps the adapter until `unload`, also over restarts.
    """
    with plain_errors(), open_client(url, key_file) as client:
        client.load_lora(name, path, model=model)
    typer.echo(f"{name}: loaded")


@app.command()
def unload(name: _Name, *, model: _Model = None, url: UrlOption = None, key_file: KeyFileOption = None) -> None:
    """Remove an adapter that `load` added.

    Needs a key with the scope `admin`. Without --model, all models that have the adapter lose it.
    """
    with plain_errors(), open_client(url, key_file) as client:
        client.unload_lora(name, model=model)
    typer.echo(f"{name}: unloaded")
