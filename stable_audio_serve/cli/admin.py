"""`stable-audio-serve admin`: commands for operators. They need a running server and a key with the scope `admin`.

`admin jobs` needs no server, only the job database.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from stable_audio_serve.cli import store_jobs
from stable_audio_serve.cli.messages import ExitCode, fail, print_json
from stable_audio_serve.cli.remote import JsonOption, KeyFileOption, UrlOption, ask, connected

if TYPE_CHECKING:
    from stable_audio_serve.client import Client

_PREFIX = "/v1/admin"
_LETTERS = f"{_PREFIX}/dead-letters"
_PAGE = 500
_POLL_S = 0.5
_SPREAD_S = 5.0  # after this time, every process of a server knows that it drains

app = typer.Typer(no_args_is_help=True, help="Load models, drain the server, handle dead letters.")
app.add_typer(store_jobs.app, name="jobs")

_Model = Annotated[str, typer.Argument(metavar="MODEL", help="Name or alias of the model.")]
_Wait = Annotated[float, typer.Option("--wait", min=0, max=86_400, help="Longest time to wait, seconds.")]


@app.command()
def load(model: _Model, wait: _Wait = 0.0, *, url: UrlOption = None, key_file: KeyFileOption = None) -> None:
    """Keep one replica of a model loaded until `unload`.

    The replica stays loaded even without requests. With --wait the command ends when the replica is ready.
    """
    with connected(url, key_file) as client:
        kept = ask(client, f"POST {_PREFIX}/models/{quote(model, safe='')}/load")
        deadline = time.monotonic() + wait
        stage = kept["stage"]
        while stage not in ("ready", "failed") and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            stage = ask(client, "GET /v1/status")["models"][kept["model"]]["stage"]
    typer.echo(f"{kept['model']}: kept loaded; it is {stage} now")
    if stage == "failed":
        raise typer.Exit(ExitCode.FAILED)
    if wait and stage != "ready":
        raise typer.Exit(ExitCode.OUT_OF_TIME)


@app.command()
def unload(model: _Model, *, url: UrlOption = None, key_file: KeyFileOption = None) -> None:
    """Undo `load`: allow an idle model to have no replica.

    The model's last replica stops after `downscale_delay_s` without work.
    """
    with connected(url, key_file) as client:
        kept = ask(client, f"POST {_PREFIX}/models/{quote(model, safe='')}/unload")
    typer.echo(f"{kept['model']}: no longer kept; it is {kept['stage']} now")


@app.command()
def drain(wait: _Wait = 3600.0, *, url: UrlOption = None, key_file: KeyFileOption = None) -> None:
    """Drain the server: finish current work, accept no more.

    While the server drains, /ready answers 503 and waiting jobs are left to other servers. The command ends when the
    work is finished. Afterwards stop the server, or let it accept work again with `resume`. Exit code 6: the work was
    not finished after --wait seconds.
    """
    with connected(url, key_file) as client:
        state = ask(client, f"POST {_PREFIX}/drain")
        began_at, printed = time.monotonic(), None
        while state["state"] != "drained" and time.monotonic() < began_at + wait:
            if state["state"] == "no" and time.monotonic() > began_at + _SPREAD_S:
                raise fail("the server does not drain: it was resumed, or --url leads to several servers")
            left = _left(state)
            if left != printed:
                typer.echo(left)
                printed = left
            time.sleep(_POLL_S)
            state = ask(client, "GET /v1/status")["draining"]
    if state["state"] != "drained":
        raise fail(f"still draining after {wait:g} s: {_left(state)}", ExitCode.OUT_OF_TIME)
    typer.echo("drained: nothing is left to finish")


@app.command()
def resume(*, url: UrlOption = None, key_file: KeyFileOption = None) -> None:
    """Accept new work again after `drain`."""
    with connected(url, key_file) as client:
        ask(client, f"DELETE {_PREFIX}/drain")
    typer.echo("accepts new work again")


@app.command("dead-letters")
def dead_letters(
    numbers: Annotated[
        list[int] | None, typer.Argument(metavar="NUMBER", min=0, help="Only these dead letters, with their events.")
    ] = None,
    *,
    retry: Annotated[bool, typer.Option("--retry", help="Queue them again, with new attempts.")] = False,
    delete: Annotated[bool, typer.Option("--delete", help="Delete them and their source files.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="With --retry or --delete: all of them.")] = False,
    model: Annotated[str | None, typer.Option("--model", help="Only those of this model, by canonical name.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="Maximum number to list.")] = 50,
    as_json: JsonOption = False,
    url: UrlOption = None,
    key_file: KeyFileOption = None,
) -> None:
    """List, show, retry or delete dead letters.

    Dead letters are jobs of any client that used up their attempts. Without NUMBER the command lists them, newest
    first.
    """
    if retry and delete:
        raise fail("use either --retry or --delete, not both")
    with connected(url, key_file) as client:
        if retry or delete:
            chosen = _choose(client, numbers, everything=everything, model=model)
            _act(client, chosen, action="retry" if retry else "delete", done="queued again" if retry else "deleted")
        elif everything:
            raise fail("use --all together with --retry or --delete")
        else:
            _show(client, numbers, model=model, limit=limit, as_json=as_json)


def _show(client: Client, numbers: Sequence[int] | None, *, model: str | None, limit: int, as_json: bool) -> None:
    from stable_audio_serve.cli import tables

    if numbers:
        found = [ask(client, f"GET {_LETTERS}/{number}") for number in numbers]
    else:
        found = list(islice(_list(client, model=model, page_size=min(limit, _PAGE)), limit))
    if as_json:
        print_json(found)
    elif numbers:
        for letter in found:
            tables.print_details(letter)
    else:
        tables.print_dead_letters(found)


def _choose(client: Client, numbers: Iterable[int] | None, *, everything: bool, model: str | None) -> Iterable[int]:
    """Return the numbers of the dead letters that the user chose, without those that are added later."""
    if bool(numbers) == (everything or model is not None):
        raise fail("choose dead letters by NUMBER, or with --all or --model")
    return numbers or (letter["number"] for letter in _list(client, model=model, page_size=_PAGE))


def _act(client: Client, chosen: Iterable[int], *, action: str, done: str) -> None:
    num_done, missing, rest = 0, [], iter(chosen)
    while numbers := list(islice(rest, _PAGE)):
        outcome = ask(client, f"POST {_LETTERS}/{action}", json={"numbers": numbers})
        num_done += len(outcome["done"])
        missing += outcome["not_found"]
    typer.echo(f"{num_done} {done}")
    if missing:
        raise fail(f"no dead letters: {', '.join(map(str, missing[:20]))}{' ...' if missing[20:] else ''}")


def _list(client: Client, *, model: str | None, page_size: int) -> Iterator[dict[str, Any]]:
    """Yield all dead letters, newest first. `page_size` of them are fetched at a time."""
    params = {"limit": str(page_size)} | ({} if model is None else {"model": model})
    while True:
        page = ask(client, f"GET {_LETTERS}", params=params)
        yield from page["dead_letters"]
        if page["next_cursor"] is None:
            return
        params["cursor"] = str(page["next_cursor"])


def _left(state: dict[str, Any]) -> str:
    requests, jobs = ("?" if state[what] is None else state[what] for what in ("requests", "jobs"))
    return f"{requests} requests and {jobs} jobs are left to finish"
